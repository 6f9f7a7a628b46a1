#!/usr/bin/env bash
# Train on this machine by the deepspeed launcher: on all its GPUs, or with two ranks on the CPU.
#
#   launch/single_node.sh --deepspeed ds_configs/zero3_bf16.json --model MODEL --task sst2 --output runs/sst2
#   launch/single_node.sh --dry-run …            print the command, run nothing
#   NPROC_PER_NODE=4 CUDA_VISIBLE_DEVICES=…      so many ranks; certain GPUs (use one of the two)
#
# Takes the flags of `tezo-ds train`. Also reads MASTER_PORT (29500), OMP_NUM_THREADS, DS_ACCELERATOR (cpu: no
# GPUs) and PYTHON_BIN_DIR (.venv/bin). Each rank's output is in OUTPUT/logs/START/; rank 0's is shown. The exit
# code is that of the rank that failed. SIGTERM lets the step finish (exit 0), Ctrl-C stops at once (130); the
# same command goes on from there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin "$@"
count_ranks "${NPROC_PER_NODE:-}"
command=("$bin/deepspeed" --master_port "${MASTER_PORT:-29500}" --log_level error)
# With a number deepspeed would not look at CUDA_VISIBLE_DEVICES.
[[ -z "${CUDA_VISIBLE_DEVICES:-}" || -n "${NPROC_PER_NODE:-}" ]] && command+=(--num_gpus "$ranks")
command+=(--enable_each_rank_log "$logs" --module -- tezo_ds train "${flags[@]}")
run follow '*_rank0.log'
complain
exit "$code"
