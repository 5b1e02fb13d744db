# Settings of this machine for the other scripts: MODEL, CACHE, GPUS and PYTHON may be set before.
CACHE=${CACHE:-cache}
PYTHON=${PYTHON:-.venv/bin/python}
if [ ! -x "$PYTHON" ] && ! command -v "$PYTHON" >/dev/null; then
  echo "There is no $PYTHON. Run 'make demo' and '.venv/bin/pip install -r requirements-train.txt', or set PYTHON." >&2
  exit 1
fi
if [ -z "${GPUS:-}" ]; then
  if ! command -v nvidia-smi >/dev/null || ! nvidia-smi --list-gpus >/dev/null 2>&1; then
    echo "No NVIDIA GPU was found. This script trains a 3B model and needs at least one (see docs/fine_tune.md)." >&2
    echo "Without a GPU: 'bash runs/tiny_cpu.sh' trains the tiny model. For another kind of GPU set GPUS to their number." >&2
    exit 1
  fi
  GPUS=$(nvidia-smi --list-gpus | wc -l)
fi
