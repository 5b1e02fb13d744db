#!/usr/bin/env bash
# Stage 1: align the 3D patch embedding on scans with reports (3B).
#
#   bash runs/stage1_align.sh DATA.jsonl [OUTPUT_DIR]      GPUS, MODEL, CACHE and PYTHON may be set before it
#
# DATA.jsonl: {"messages": [{"role": "user", "content": "<volume>Write the report."}, {"role": "assistant", ...}],
# "volumes": ["scan.nii.gz"]} a line. Memory, estimated from sizes and not measured: 8 GB of weights a GPU and about
# 10 GB of activations with checkpointing. Disk: 25 MB a scan in CACHE. Time depends on the data: three epochs.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${1:?name the .jsonl of the data}
OUTPUT=${2:-stage1}
MODEL=${MODEL:-photon-3b-start}
. runs/lib/machine.sh

# from Qwen's weights: 2D patch embedding inflated to 3D, a scheduler that keeps nearly everything
[ -d "$MODEL" ] || "$PYTHON" convert_photon.py --qwen Qwen/Qwen2.5-VL-3B-Instruct --output "$MODEL"

"$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS" train_hf.py configs/recipe_align.yaml \
  --model "$MODEL" --train-data "$DATA" --cache-dir "$CACHE" --output-dir "$OUTPUT"
