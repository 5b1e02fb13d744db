#!/usr/bin/env bash
# The table and pictures of docs/tiny_model.md, from runs/tiny_cpu.sh:
#
#   TWIN=1 bash runs/tiny_cpu.sh tiny
#   bash scripts/tiny_report.sh tiny
#
# SEEDS="0 1 2" takes several seeds. Ten minutes on two cores. Run again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-tiny}
SEEDS=${SEEDS:-0}
ROWS=${ROWS:-3000} # of the test questions
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MALLOC_MMAP_MAX_=0 MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=67108864

# answers NAME MODEL [ARGUMENTS]: to the test questions, on two processes
answers() {
  [ -f "$FOLDER/answers/$1/scores.json" ] && return
  "$PYTHON" -m torch.distributed.run --nproc-per-node 2 evaluate_hf.py --benchmark jsonl --data "$FOLDER/test/test.jsonl" \
    --volumes "$FOLDER/test" --limit "$ROWS" --cache-dir "$FOLDER/cache" --dtype float32 \
    --batch-size 16 --max-new-tokens 8 --model "$FOLDER/$2/final" --output "$FOLDER/answers/$1" "${@:3}"
}
folders() { # of the answers NAME, of all seeds, with commas between
  local all=()
  for seed in $SEEDS; do all+=("$FOLDER/answers/$1$seed"); done
  (IFS=, && echo "${all[*]}")
}
for seed in $SEEDS; do
  answers "scheduled$seed" "settled$seed"
  answers "twin$seed" "twin$seed"
done
answers none0 settled0 --token-budget 0
answers random0 settled0 --scheduler random
answers flipped0 settled0 --scheduler flipped
answers swapped0 settled0 --swap-scans
state=$(find "$FOLDER/exact0" -name "trainer_state*" | sort -V | tail -1)
"$PYTHON" scripts/tiny_report.py --data "$FOLDER/test/test.jsonl" --limit "$ROWS" --train "$FOLDER/data/train.jsonl" \
  --json benchmarks/results/tiny.json --pictures docs --state "$state" \
  --run "scheduled=$(folders scheduled)" --run "trained dense, all tokens=$(folders twin)" \
  --run "no token left=$FOLDER/answers/none0" --run "random, as many=$FOLDER/answers/random0" \
  --run "least salient, as many=$FOLDER/answers/flipped0" --run "another patient's scan=$FOLDER/answers/swapped0"
