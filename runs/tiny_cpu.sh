#!/usr/bin/env bash
# The tiny model of this repository, from nothing, in five trainings. No GPU.
#
#   bash runs/tiny_cpu.sh [FOLDER]        PATIENTS, SEED and PYTHON may be set before it
#
# Two cores take about two hours: 15 minutes for the data, 40 for the tower, 25 for lesions, 20 for all tasks, 10 for
# the same at lower rates, 5 with the scheduler. 5 GB of memory, 6 GB of disk. Run again, it goes on where it was stopped. The result is
# FOLDER/tune/final. The shipped weights come from these commands, but that the second training was stopped after 600
# of 1,200 steps, the third after 600 of 900 (dev/LOG.md).
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-tiny}
PATIENTS=${PATIENTS:-2600}
SEED=${SEED:-0}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ ! -x "$PYTHON" ] && ! command -v "$PYTHON" >/dev/null; then
  echo "There is no $PYTHON. Run 'make demo' and '.venv/bin/pip install -r requirements-train.txt', or set PYTHON." >&2
  exit 1
fi

# data: scans, label maps, balanced questions (completes a data set that is there)
"$PYTHON" phantoms.py --output "$FOLDER/data" --patients "$PATIENTS" --workers 2 \
  --diameters 18 26 34 42 --contrast 110 180 --ground-glass 0

# untrained weights, tokenizer, processor
[ -f "$FOLDER/start/model.safetensors" ] || "$PYTHON" scripts/build_root.py --output "$FOLDER/start"

# train STAGE RECIPE MODEL STEPS PROCESSES [ARGUMENTS]: from MODEL to FOLDER/STAGE
train() {
  local resume=()
  [ -f "$FOLDER/$1/final/model.safetensors" ] && return
  [ -f "$FOLDER/$1/run.json" ] && resume=(--resume)
  "$PYTHON" -m torch.distributed.run --nproc-per-node "$5" train_hf.py "$2" \
    --model "$3" --output-dir "$FOLDER/$1" --train-data "$FOLDER/data/train.jsonl" \
    --eval-data "$FOLDER/data/val.jsonl" --cache-dir "$FOLDER/cache" --use-cpu --max-steps "$4" --seed "$SEED" \
    "${resume[@]}" "${@:6}"
}
train tower configs/recipe_tiny_tower.yaml "$FOLDER/start" 2000 1
train lesions configs/recipe_tiny_lesions.yaml "$FOLDER/tower/final" 1200 1
train dense configs/recipe_tiny_dense.yaml "$FOLDER/lesions/final" 900 2
train settle configs/recipe_tiny_dense.yaml "$FOLDER/dense/final" 600 1 \
  --learning-rate 7e-4 --muon-learning-rate 1e-3 --questions-together 8
train tune configs/recipe_tiny_tune.yaml "$FOLDER/settle/final" 320 1
echo "The trained model is in $FOLDER/tune/final"
