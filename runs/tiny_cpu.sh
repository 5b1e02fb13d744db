#!/usr/bin/env bash
# The tiny model of this repository, from nothing, in four trainings. No GPU.
#
#   bash runs/tiny_cpu.sh [FOLDER]        PATIENTS, SEED and PYTHON may be set before it
#   TWIN=1 SEED=1 bash runs/tiny_cpu.sh   another seed of the decoder, and its twin that keeps all tokens
#
# Times of two cores: tower 1,100 steps, 23 minutes; lesions 300, 7; all tasks 500, 15; scheduler 500, 10, with other
# work beside it; the data take 5 minutes. 3 GB of memory, 7 GB of disk. Run again, it goes on where it was stopped. The
# result is FOLDER/tune$SEED/final; the weights of this repository are tune0's. scripts/tiny_report.sh makes the table and
# pictures of docs/tiny_model.md.
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-tiny}
PATIENTS=${PATIENTS:-3000}
SEED=${SEED:-0}
TWIN=${TWIN:-0}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# glibc would give large blocks back to the system after each operation, and fetch them again for the next
export MALLOC_MMAP_MAX_=0 MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=67108864
if [ ! -x "$PYTHON" ] && ! command -v "$PYTHON" >/dev/null; then
  echo "There is no $PYTHON. Run 'make demo' and '.venv/bin/pip install -r requirements-train.txt', or set PYTHON." >&2
  exit 1
fi

# data: scans, label maps, balanced questions (completes an existing data set)
"$PYTHON" -m photon.phantoms --output "$FOLDER/data" --patients "$PATIENTS" --workers 2 --test 0.175 --val 0.05 \
  --diameters 20 28 35 42 --contrast 140 210 --ground-glass 0

# untrained weights, tokenizer, processor
[ -f "$FOLDER/start/model.safetensors" ] || "$PYTHON" scripts/build_root.py --output "$FOLDER/start"

# train STAGE RECIPE MODEL STEPS [ARGUMENTS]: from MODEL to FOLDER/STAGE
train() {
  local resume=()
  [ -f "$FOLDER/$1/final/model.safetensors" ] && return
  [ -f "$FOLDER/$1/run.json" ] && resume=(--resume)
  "$PYTHON" train_hf.py "$2" --model "$3" --output-dir "$FOLDER/$1" \
    --train-data "$FOLDER/data/train.jsonl" --cache-dir "$FOLDER/cache" --use-cpu --max-steps "$4" "${resume[@]}" \
    "${@:5}"
}
EVAL=(--seed "$SEED" --eval-data "$FOLDER/data/val.jsonl")
train tower configs/recipe_tiny_tower.yaml "$FOLDER/start" 1100
train "lesions$SEED" configs/recipe_tiny_lesions.yaml "$FOLDER/tower/final" 300 "${EVAL[@]}"
train "dense$SEED" configs/recipe_tiny_dense.yaml "$FOLDER/lesions$SEED/final" 500 "${EVAL[@]}"
train "tune$SEED" configs/recipe_tiny_tune.yaml "$FOLDER/dense$SEED/final" 500 "${EVAL[@]}"
if [ "$TWIN" = 1 ]; then # the same rows at the same rates, from all tokens
  train "twin$SEED" configs/recipe_tiny_dense.yaml "$FOLDER/dense$SEED/final" 500 "${EVAL[@]}" \
    --questions-together 8 --per-device-train-batch-size 32 --learning-rate 1e-3 \
    --muon-learning-rate 1.5e-3
fi
echo "The trained model is in $FOLDER/tune$SEED/final"
