#!/usr/bin/env bash
# Train as a config file of accelerate's says: on this machine, or on several, where this is started on each of
# them with the same variables but for NODE_RANK.
#
#   launch/accelerate.sh --model MODEL --task sst2 --output runs/sst2          with ds_configs/accelerate_fsdp2.yaml
#   ACCELERATE_CONFIG=ds_configs/accelerate_deepspeed.yaml launch/accelerate.sh …         another one
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/accelerate.sh --dry-run …            print the command
#
# Takes the flags of `tezo-ds train`. Also reads NPROC_PER_NODE (this machine's GPUs, or 2; equal on all),
# MASTER_PORT (29500), NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, OMP_NUM_THREADS, DS_ACCELERATOR, PYTHON_BIN_DIR. Logs,
# signals and exit codes are as of single_node.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin "$@"
config="${ACCELERATE_CONFIG:-$repo/ds_configs/accelerate_fsdp2.yaml}"
[[ -f "$config" ]] || die "no $config; set ACCELERATE_CONFIG to a file that 'accelerate config' wrote"
NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}"
number NNODES && number NODE_RANK
((NODE_RANK < NNODES)) || die "NODE_RANK is $NODE_RANK; set it from 0 to $((NNODES - 1)), as NNODES is $NNODES"
((NNODES == 1)) || [[ -n "${MASTER_ADDR:-}" ]] || die "MASTER_ADDR is not set; set it to the address of node 0"
count_ranks "${NPROC_PER_NODE:-}"
command=("$bin/accelerate" launch --config_file "$config" --num_processes "$((NNODES * ranks))")
command+=(--num_machines "$NNODES" --machine_rank "$NODE_RANK" --main_process_port "${MASTER_PORT:-29500}")
command+=(${MASTER_ADDR:+--main_process_ip "$MASTER_ADDR"} --log_dir "$logs" --tee 3 -m tezo_ds train "${flags[@]}")
run
complain
exit "$code"
