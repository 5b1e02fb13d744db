#!/usr/bin/env bash
# Stage 2 with adapters (3B): fine-tune on questions, with the scheduler. One GPU is enough.
#
#   bash runs/stage2_tune_lora.sh TRAIN.jsonl VAL.jsonl [OUTPUT_DIR]      GPUS, MODEL, CACHE and PYTHON may be set
#
# MODEL is the result of stage 1, or converted weights of the authors. Memory, estimated from sizes and not measured:
# about 24 GB a GPU; add --load-in-4bit for about 18 GB. The adapters are merged into OUTPUT_DIR/final.
set -euo pipefail
cd "$(dirname "$0")/.."
TRAIN=${1:?name the .jsonl of training}
VAL=${2:?name the .jsonl of validation}
OUTPUT=${3:-stage2-lora}
MODEL=${MODEL:-stage1/final}
. runs/lib/machine.sh

"$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS" train_hf.py configs/recipe_tune_lora.yaml \
  --model "$MODEL" --train-data "$TRAIN" --eval-data "$VAL" --cache-dir "$CACHE" --output-dir "$OUTPUT"
