#!/usr/bin/env bash
# The table and pictures of docs/tiny_model.md, from three seeds of runs/tiny_cpu.sh:
#
#   for SEED in 0 1 2; do SEED=$SEED TWIN=1 bash runs/tiny_cpu.sh tiny; done
#   bash scripts/tiny_report.sh tiny
#
# Half an hour on two cores. Run again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-tiny}
SEEDS=${SEEDS:-"0 1 2"}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MALLOC_MMAP_MAX_=0 MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=67108864

# answers NAME MODEL [ARGUMENTS]: to the test questions, on two processes
answers() {
  [ -f "$FOLDER/answers/$1/scores.json" ] && return
  "$PYTHON" -m torch.distributed.run --nproc-per-node 2 evaluate_hf.py --benchmark jsonl --data "$FOLDER/data/test.jsonl" \
    --volumes "$FOLDER/data" --cache-dir "$FOLDER/cache" --dtype float32 \
    --batch-size 16 --max-new-tokens 8 --model "$FOLDER/$2/final" --output "$FOLDER/answers/$1" "${@:3}"
}
folders() { # of the answers NAME, of all seeds, with commas between
  local all=()
  for seed in $SEEDS; do all+=("$FOLDER/answers/$1$seed"); done
  (IFS=, && echo "${all[*]}")
}
for seed in $SEEDS; do
  answers "scheduled$seed" "tune$seed"
  answers "twin$seed" "twin$seed"
done
answers none0 tune0 --token-budget 0
answers random0 tune0 --scheduler random
answers flipped0 tune0 --scheduler flipped
answers swapped0 tune0 --swap-scans
state=$(find "$FOLDER/tune0" -name "trainer_state*" | sort -V | tail -1)
"$PYTHON" scripts/tiny_report.py --data "$FOLDER/data/test.jsonl" --train "$FOLDER/data/train.jsonl" \
  --json benchmarks/results/tiny.json --pictures docs --state "$state" \
  --run "scheduled=$(folders scheduled)" --run "trained dense, all tokens=$(folders twin)" \
  --run "no token left=$FOLDER/answers/none0" --run "random, as many=$FOLDER/answers/random0" \
  --run "least salient, as many=$FOLDER/answers/flipped0" --run "another patient's scan=$FOLDER/answers/swapped0"
