#!/usr/bin/env bash
# Stage 2 on several machines. Run it on each of them, with the same arguments; folders must be shared between them.
#
#   NODES=2 HEAD=hostname-of-the-first bash runs/multi_node.sh TRAIN.jsonl VAL.jsonl [OUTPUT_DIR]
#
# Under SLURM: srun --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 env NODES=2 HEAD="$(hostname)" bash
# runs/multi_node.sh ... Keep the effective batch: the recipe takes 2 rows a GPU and step, the release had 8 GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
TRAIN=${1:?name the .jsonl of training}
VAL=${2:?name the .jsonl of validation}
OUTPUT=${3:-stage2-full}
MODEL=${MODEL:-stage1/final}
. runs/lib/machine.sh

"$PYTHON" -m torch.distributed.run --nnodes "${NODES:?how many machines}" --nproc-per-node "$GPUS" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:?name the first machine}:29500" --rdzv-id photon \
  train_hf.py configs/recipe_tune_full.yaml --deepspeed configs/deepspeed_zero2.json \
  --model "$MODEL" --train-data "$TRAIN" --eval-data "$VAL" --cache-dir "$CACHE" --output-dir "$OUTPUT"
