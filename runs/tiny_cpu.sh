#!/usr/bin/env bash
# The tiny model of this repository, from nothing: phantoms -> dense -> scheduler. No GPU.
#
#   bash runs/tiny_cpu.sh [FOLDER]        STEPS, PATIENTS, SEED and PYTHON may be set before it
#
# A step takes about half a second on two cores (eight questions), so the defaults take about an hour; 1 GB of memory,
# 200 MB of disk. Run again, it goes on where it was stopped. The result is FOLDER/tune/final.
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-tiny}
STEPS=${STEPS:-4000}
PATIENTS=${PATIENTS:-1500}
SEED=${SEED:-0}
PYTHON=${PYTHON:-.venv/bin/python}
if [ ! -x "$PYTHON" ] && ! command -v "$PYTHON" >/dev/null; then
  echo "There is no $PYTHON. Run 'make demo' and '.venv/bin/pip install -r requirements-train.txt', or set PYTHON." >&2
  exit 1
fi

# 1. data: scans, label maps, balanced questions (completes a data set that is there)
"$PYTHON" phantoms.py --output "$FOLDER/data" --patients "$PATIENTS" --workers 2

# 2. untrained weights, tokenizer, processor
[ -f "$FOLDER/start/model.safetensors" ] || "$PYTHON" scripts/build_root.py --output "$FOLDER/start"

resume() { if [ -f "$1/run.json" ]; then echo --resume; fi; }
COMMON=(--train-data "$FOLDER/data/train.jsonl" --eval-data "$FOLDER/data/val.jsonl" --cache-dir "$FOLDER/cache"
        --use-cpu --max-steps "$STEPS" --seed "$SEED")

# 3. dense, with token labels
if [ ! -f "$FOLDER/dense/final/model.safetensors" ]; then
  "$PYTHON" train_hf.py configs/recipe_tiny_dense.yaml --model "$FOLDER/start" --output-dir "$FOLDER/dense" \
    "${COMMON[@]}" $(resume "$FOLDER/dense")
fi

# 4. with the scheduler
if [ ! -f "$FOLDER/tune/final/model.safetensors" ]; then
  "$PYTHON" train_hf.py configs/recipe_tiny_tune.yaml --model "$FOLDER/dense/final" --output-dir "$FOLDER/tune" \
    "${COMMON[@]}" $(resume "$FOLDER/tune")
fi
echo "The trained model is in $FOLDER/tune/final"
