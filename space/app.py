"""The entry of a Hugging Face Space: the page of `python -m photon.app`. See `scripts/push.py --space`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from photon.app.__main__ import main

if __name__ == "__main__":
    main([])
