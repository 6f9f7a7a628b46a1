#!/usr/bin/env bash
# From nothing to a fine-tuned model: makes .venv, fetches a small real model and data set, fine-tunes it
# under ZeRO-3 on all GPUs, or with two ranks on the CPU: the output layer of the label words and value
# projections in the middle in closed form, then zeroth-order steps. Prints the accuracy before, after the one
# and after the other.
#
#   launch/quickstart.sh                          what README shows
#   launch/quickstart.sh --inner-maps last        the last maps of blocks in the middle instead
#   launch/quickstart.sh --inner-layers none      the output layer alone is fitted: worse, and sooner done
#   launch/quickstart.sh --steps 20 --seed 1      any flag of `tezo-ds train` goes at the end
#   RANKS=4 launch/quickstart.sh                  another number of ranks
set -euo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$repo"
launch/setup.sh
source launch/common.sh
cache="${TEZO_QUICKSTART_CACHE:-.cache/quickstart}"
"$bin/python" launch/prepare_quickstart.py --cache "$cache"

count_ranks "${RANKS:-}"
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}" # torch's, about DeepSpeed's calls

output="runs/quickstart"
if [[ -e "$output" ]]; then
    output="runs/quickstart-$(date +%Y%m%d-%H%M%S)"
fi
PATH="$bin:$PATH" deepspeed --num_gpus "$ranks" --master_port "${MASTER_PORT:-29500}" --log_level error \
    --module -- tezo_ds train \
    --deepspeed ds_configs/quickstart.json \
    --model "$cache/SmolLM2-135M-Instruct" --task trec --data "$cache/trec" \
    --objective choices --output-layer fit --inner-layers auto --inner-maps values \
    --output-layer-examples 900 --steps 4 --lr 2e-6 \
    --test-examples 400 --eval-batch-size 64 --batch-size $((ranks * ((16 + ranks - 1) / ranks))) \
    --output "$output" "$@"
