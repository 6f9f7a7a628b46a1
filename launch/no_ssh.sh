#!/usr/bin/env bash
# Train on several machines that cannot log in to each other, such as containers: start this on each of them,
# with the same variables but for NODE_RANK. They meet at MASTER_ADDR.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/no_ssh.sh --deepspeed ds_configs/zero3_bf16.json \
#       --model MODEL --task sst2 --output runs/sst2          # on 10.0.0.1
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/no_ssh.sh …   # on the other; first --dry-run to print only
#
# Takes the flags of `tezo-ds train`. Also reads NPROC_PER_NODE (this machine's GPUs, or 2; equal on all),
# MASTER_PORT (29500), NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (the interface to the others; as all variables
# they are the ranks' own), OMP_NUM_THREADS, DS_ACCELERATOR, PYTHON_BIN_DIR. Logs, signals and exit codes are as
# of single_node.sh; rank 0 is shown by node 0. SIGTERM to one node's script stops all of them after the step.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin "$@"
for name in NNODES NODE_RANK MASTER_ADDR; do
    [[ -n "${!name:-}" ]] || die "$name is not set; set it as launch/no_ssh.sh --help shows"
done
number NNODES && number NODE_RANK
((NODE_RANK < NNODES)) || die "NODE_RANK is $NODE_RANK; set it from 0 to $((NNODES - 1)), as NNODES is $NNODES"
count_ranks "${NPROC_PER_NODE:-}"
nodes=()
for ((i = 0; i < NNODES; i++)); do nodes+=("node-$i slots=$ranks"); done
put "$logs/hostfile" "${nodes[@]}"
command=("$bin/deepspeed" --no_ssh --hostfile "$logs/hostfile" --node_rank "$NODE_RANK" --log_level error)
command+=(--master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
command+=(--enable_each_rank_log "$logs" --module -- tezo_ds train "${flags[@]}")
run follow '*_rank0.log'
complain
exit "$code"
