"""Runs the code blocks of a page as a reader would: in a folder that has the repository's files and the demo's scans.

A block of bash that names something in capitals (`QUESTIONS`) or a model of the Hub (`Qwen/...`) is an example to fill
in, and is not run; test_docs.py checks that its commands and options exist. `pip`, `make` and the like are stand-ins.
A page with `<!-- blocks: FILE -->` is run by that test file.
"""

import json
import os
import re
import subprocess
import sys

from conftest import ROOT
from photon.phantoms.dataset import DataConfig, write_data_set
from scripts import demo

BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.S | re.M)
TO_FILL_IN = re.compile(r"(?<![\w./=$-])[A-Z][A-Z_]{2,}(?![\w.=/])|\b[A-Z][\w-]+/[A-Z][\w.-]+")
STAND_INS = ("pip", "make", "npm", "hf", "openssl", "serve", "torchrun", "accelerate", "git")
QUICKSTART = BLOCK.findall((ROOT / "README.md").read_text("utf-8"))


def elsewhere(page):
    """The test file that runs a page's blocks, `None` where it is `test_docs_blocks.py`."""
    found = re.search(r"<!-- blocks: (\S+) -->", page)
    return found and found[1]


def blocks(page):
    """[(language, code)] of a page that can be run."""
    found = []
    for language, code in BLOCK.findall(page):
        bare = re.sub(r"(^|\s)#.*", "", code) if language == "bash" else ""
        bare = re.sub(r'"[^"]*"', '""', bare)
        if not TO_FILL_IN.search(bare):
            found.append((language, code))
    return found


def workspace(folder):
    """A folder as a reader has it after `make demo`, with a few rows to train on. Returns it."""
    for path in ROOT.iterdir():
        if path.name not in ("demo", "build", ".git", "outputs"):
            (folder / path.name).symlink_to(path)
    (folder / "demo").mkdir()
    demo.scans(folder / "demo")
    (folder / "dicom_folder").symlink_to(folder / "demo" / "phantom_dicom")
    (folder / "ct.nii.gz").symlink_to(folder / "demo" / "phantom.nii.gz")
    rows, *_ = write_data_set(folder / "scans_of_rows", 3, DataConfig(seed=3))
    lines = []
    for row in rows[:8]:
        kept = {name: row[name] for name in ("id", "task", "answer", "messages") if name in row}
        lines.append(json.dumps(kept | {"volumes": [f"scans_of_rows/{path}" for path in row["volumes"]]}))
    for name, part in (("train", lines[:6]), ("val", lines[6:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    bins = folder / "stand_ins"
    bins.mkdir()
    for name in STAND_INS:
        (bins / name).write_text("#!/bin/sh\nexit 0\n")
        (bins / name).chmod(0o755)
    (bins / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # a link would leave the environment
    (bins / "python").chmod(0o755)
    return folder


def run(page, folder, with_quickstart=True, **environment):
    """Runs a page's blocks one after the other; Python's share their names. Returns what was printed."""
    steps = blocks(page)
    if with_quickstart and any(language == "python" for language, _ in steps):
        steps = [("python", "import warnings; warnings.simplefilter('ignore')"), QUICKSTART_PYTHON, *steps]
    driver = folder / "driver.py"
    driver.write_text(
        "import json, subprocess, sys\n"
        "names = {'__name__': '__main__'}\n"
        "for language, code in json.load(open('steps.json')):\n"
        "    if language == 'python':\n"
        "        exec(compile(code, '<block>', 'exec'), names)\n"
        "    else:\n"
        "        subprocess.run(['bash', '-euo', 'pipefail', '-c', code], check=True)\n"
    )
    (folder / "steps.json").write_text(json.dumps(steps))
    path = f"{folder / 'stand_ins'}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "driver.py"], cwd=folder, capture_output=True, encoding="utf-8", timeout=900,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(folder), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


QUICKSTART_PYTHON = next(step for step in QUICKSTART if step[0] == "python")
