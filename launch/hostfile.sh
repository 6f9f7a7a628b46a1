#!/usr/bin/env bash
# Train on the hosts of a hostfile, which this machine can reach by ssh without a password, by deepspeed and pdsh.
# Start it on the first of them. Repository, .venv and working folder have the same paths on all.
#
#   HOSTFILE=hosts launch/hostfile.sh --deepspeed ds_configs/zero3_bf16.json --model MODEL --task sst2 \
#       --output runs/sst2                       # hosts: a line `NAME slots=GPUS` for each
#   HOSTFILE=hosts launch/hostfile.sh --dry-run …            print the command, run nothing
#   NCCL_SOCKET_IFNAME=eth1 GLOO_SOCKET_IFNAME=eth1 …        the interface between the hosts
#
# Takes the flags of `tezo-ds train`. Also reads NNODES, NPROC_PER_NODE (of the hostfile only so many hosts, slots
# each), MASTER_ADDR (else the first host's first address), MASTER_PORT (29500), PYTHON_BIN_DIR. Ranks on all hosts
# get this machine's variables that begin with NCCL_, GLOO_, OMP_, MKL_, TORCH_, HF_, DS_, CUDA_, PYTHON …, but no
# token, and those of .deepspeed_env. Logs, signals and exit codes are as of single_node.sh; each host
# writes those of its ranks to its OUTPUT/logs. Ctrl-C and SIGTERM reach the ranks by pdsh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin "$@"
HOSTFILE="${HOSTFILE:-/job/hostfile}"
[[ -f "$HOSTFILE" ]] || die "no hostfile $HOSTFILE; set HOSTFILE to a file of lines such as 'host-1 slots=8'"
hosts="$(awk '/slots=/ && !/^[[:space:]]*#/ {print $1}' "$HOSTFILE" | head -n "${NNODES:--0}" | paste -sd,)"
[[ -n "$hosts" ]] || die "$HOSTFILE names no host; write lines such as 'host-1 slots=8'"
((dry_run)) || command -v pdsh >/dev/null || die "pdsh is missing; install it (Debian, Ubuntu: apt-get install pdsh)"
if [[ "${DS_ACCELERATOR:-}" == cpu ]]; then # with GPUs or without is the hosts' own affair
    count_ranks "${NPROC_PER_NODE:-$(sed -n 's/.*slots=\([0-9]*\).*/\1/p' "$HOSTFILE" | sort -n | tail -n 1)}"
fi

tell() { PDSH_RCMD_TYPE=ssh pdsh -S -w "$1" "mark=$TEZO_LAUNCH signal=$2; $to_ranks"; }
signal_ranks() { # rank 0's host alone, whose SIGTERM stops all after the step; after it others, as it writes results
    tell "${hosts%%,*}" "$1" || return
    [[ "$1" == TERM || "$hosts" != *,* ]] || tell "${hosts#*,}" "$1" || true
}
quoted() { # a word for the remote bash: pdsh reads %, and deepspeed quotes words with spaces in its own way
    local word="$1" out="" char i
    [[ "$word" == *[!A-Za-z0-9_./:=,@+-]* || -z "$word" ]] || { echo "$word" && return; }
    for ((i = 0; i < ${#word}; i++)); do
        char="${word:i:1}"
        [[ "$char" != [[:space:]%\'\\] ]] || printf -v char '\\x%02x' "'$char"
        out+="$char"
    done
    echo "\$'$out'"
}

carried='^(NCCL|GLOO|OMP|MKL|MALLOC|TORCH|CUDA|HF|TRANSFORMERS|TOKENIZERS|DS|PYTHON)[A-Z0-9_]*='
kept='^(PYTHONPATH|CUDA_VISIBLE_DEVICES|DS_ENV_FILE|[A-Z_]*TOKEN(_[A-Z]*)?)='
mapfile -t variables < <(cat ~/.deepspeed_env .deepspeed_env 2>/dev/null || true; env | grep -E "$carried" | grep -vE "$kept")
put "$logs/environment" "TEZO_LAUNCH=${logs##*/}" "${variables[@]}"
default DS_ENV_FILE "$logs/environment"
command=("$bin/deepspeed" --hostfile "$HOSTFILE" --force_multi --master_port "${MASTER_PORT:-29500}")
command+=(--num_nodes "${NNODES:--1}" --num_gpus "${NPROC_PER_NODE:--1}" --master_addr "${MASTER_ADDR:-}")
command+=(--log_level error --enable_each_rank_log "$(quoted "$logs")" --module -- tezo_ds train)
for word in "${flags[@]}"; do command+=("$(quoted "$word")"); done
run follow '*_rank0.log'
complain
exit "$code"
