#!/usr/bin/env bash
# The tiny model of this repository, from nothing: a tower by label maps, then a decoder and its scheduler by answers.
#
#   bash runs/tiny_cpu.sh [FOLDER]        SEED and PYTHON may be set before it
#   TWIN=1 SEED=1 bash runs/tiny_cpu.sh   another seed, and its twin that is trained on all tokens
#   PEER=divprune bash runs/tiny_cpu.sh   and the same decoder with a tenth of the tokens by a method of photon/schedulers
#
# Minutes of one core: tower 1,100 steps, 23; exact cut 3,000, 34; letters 1,200, 10; settled 1,400, 12; the twin 45; a
# peer 40. The data take 4 minutes. 4 GB of memory, 9 GB of disk. Run again, it goes on where it was stopped. The result is
# FOLDER/settled$SEED/final; the weights of this repository are settled0's. scripts/tiny_report.sh makes the table and
# pictures of docs/tiny_model.md.
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-tiny}
SEED=${SEED:-0}
TWIN=${TWIN:-0}
PEER=${PEER:-}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# glibc would give large blocks back to the system after each operation, and fetch them again for the next
export MALLOC_MMAP_MAX_=0 MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=67108864
if [ ! -x "$PYTHON" ] && ! command -v "$PYTHON" >/dev/null; then
  echo "There is no $PYTHON. Run 'make demo' and '.venv/bin/pip install -r requirements-train.txt', or set PYTHON." >&2
  exit 1
fi

# data: patients of one seed to learn from and of another to test with; rows of text that teach answers by letter
SIZES=(--diameters 20 29 42)
LOOKS=("${SIZES[@]}" --contrast 140 210 --ground-glass 0 --follow-up 0.5 --option-orders 2 --workers 2)
phantoms() { "$PYTHON" -m photon.phantoms "$@"; }
phantoms --output "$FOLDER/data" --patients 2000 --seed 1 --test 0 --val 0.03 "${LOOKS[@]}"
phantoms --output "$FOLDER/test" --patients 300 --seed 2 --test 1 --val 0 "${LOOKS[@]}"
phantoms --letters "$FOLDER/data/letters.jsonl" --rows 28000 --seed 1 "${SIZES[@]}"
cat "$FOLDER/data/train.jsonl" "$FOLDER/data/letters.jsonl" >"$FOLDER/data/all.jsonl"

# untrained weights, tokenizer, processor
start() {
  [ -f "$FOLDER/$1/model.safetensors" ] ||
    "$PYTHON" scripts/build_root.py --output "$FOLDER/$1" --seed "$((SEED + 1))" "${@:2}"
}
# train STAGE RECIPE MODEL ROWS STEPS [ARGUMENTS]: from MODEL to FOLDER/STAGE
train() {
  local resume=()
  [ -f "$FOLDER/$1/final/model.safetensors" ] && return
  [ -f "$FOLDER/$1/run.json" ] && resume=(--resume)
  "$PYTHON" train_hf.py "$2" --model "$3" --output-dir "$FOLDER/$1" --seed "$SEED" \
    --train-data "$FOLDER/data/$4.jsonl" --cache-dir "$FOLDER/cache" --use-cpu --max-steps "$5" "${resume[@]}" "${@:6}"
}
EXACT=configs/recipe_tiny_exact.yaml
start "blank$SEED"
train tower configs/recipe_tiny_tower.yaml "$FOLDER/blank$SEED" train 1100
start "start$SEED" --tower "$FOLDER/tower/final"
# decode FIRST LETTERS SETTLED [ARGUMENTS]: a fresh decoder in three stages of these names
decode() {
  local -a more=(--cache-features "${@:4}") cut=(--soft-start 0 --hard-start 0 --flip-start 0 --budget-end 1)
  train "$1" $EXACT "$FOLDER/start$SEED" train 3000 "${more[@]}" \
    --soft-start 60 --hard-start 60 --flip-start 60 --budget-end 300
  train "$2" $EXACT "$FOLDER/$1/final" all 1200 "${more[@]}" "${cut[@]}"
  train "$3" $EXACT "$FOLDER/$2/final" all 1400 "${more[@]}" "${cut[@]}" --seed "$((SEED + 1))" \
    --learning-rate 7e-4 --muon-learning-rate 1e-3
}
decode "exact$SEED" "letters$SEED" "settled$SEED"
if [ -n "$PEER" ]; then # what attention in layer 0 learns for its own sake is all that the ranking learns then
  decode "$PEER$SEED" "${PEER}_letters$SEED" "${PEER}_settled$SEED" --scheduler "$PEER" --keep-ratio 0.1 \
    --photon surrogate=release saliency_gradient=false robust_probability=0 flip_probability=0 band_weight=0
fi
if [ "$TWIN" = 1 ]; then # the same decoder from all tokens, for as many seconds
  DENSE=(--stage dense --parts decoder --pack-questions --questions-together 8 --cache-features)
  train "dense$SEED" $EXACT "$FOLDER/start$SEED" train 2000 "${DENSE[@]}"
  train "dense_letters$SEED" $EXACT "$FOLDER/dense$SEED/final" all 1200 "${DENSE[@]}"
  train "twin$SEED" $EXACT "$FOLDER/dense_letters$SEED/final" all 1200 "${DENSE[@]}" --seed "$((SEED + 1))" \
    --learning-rate 7e-4 --muon-learning-rate 1e-3
fi
echo "The trained model is in $FOLDER/settled$SEED/final"
