#!/usr/bin/env bash
# Stage 2 in full (3B): every weight learns, with the scheduler; sharded by FSDP2 over the GPUs of one machine.
#
#   bash runs/stage2_tune_full.sh TRAIN.jsonl VAL.jsonl [OUTPUT_DIR]      GPUS, MODEL, CACHE and PYTHON may be set
#
# The paper reports 34.8 GiB a GPU, 0.85 steps a second and 4 hours on 3D-RAD with 8 GPUs; here not measured. float32
# weights, gradients and AdamW take 61 GB over all GPUs together. DeepSpeed in place of FSDP2: the last command with
# torch.distributed.run and --deepspeed configs/deepspeed_zero2.json (or zero3).
set -euo pipefail
cd "$(dirname "$0")/.."
TRAIN=${1:?name the .jsonl of training}
VAL=${2:?name the .jsonl of validation}
OUTPUT=${3:-stage2-full}
MODEL=${MODEL:-stage1/final}
. runs/lib/machine.sh

"$PYTHON" -m accelerate.commands.launch --config_file configs/fsdp2.yaml --num_processes "$GPUS" \
  train_hf.py configs/recipe_tune_full.yaml \
  --model "$MODEL" --train-data "$TRAIN" --eval-data "$VAL" --cache-dir "$CACHE" --output-dir "$OUTPUT"
