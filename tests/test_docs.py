"""The README must stay true: its files exist, its code runs, its commands are there."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import SimpleITK as sitk

from conftest import ROOT, TOKENS
from photon.scan_faults_photon import policy_table

README = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode or not listed.stdout:  # a copy without its history
        return {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    return {line.split("/")[0] for line in listed.stdout.splitlines() if not line.startswith(".")}


def test_the_tree_is_the_folder():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.S)[1]
    named = {word.rstrip("/") for line in tree.splitlines() for word in line[:25].split()}
    assert named == tracked()


def test_the_quickstart_runs(tmp_path):
    array = np.random.default_rng(0).integers(-1000, 1000, (20, 30, 40)).astype(np.int16)
    for name in ("ct", "prior", "now"):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / f"{name}.nii.gz"))
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    for block in blocks:
        code = block.replace('"."', repr(str(ROOT)))
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-2000:]
    assert f"of {TOKENS} visual tokens kept" in subprocess.run(
        [sys.executable, "-c", blocks[0].replace('"."', repr(str(ROOT)))],
        cwd=tmp_path, capture_output=True, encoding="utf-8",
    ).stdout  # fmt: skip


def test_commands_exist():
    """Each `python FILE --option` and `make TARGET` of the README."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for line in re.findall(r"python ((?:benchmarks/|scripts/)?\w+\.py[^`\n]*)", README):
        file, *rest = shlex.split(line, comments=True)
        source = (ROOT / file).read_text(encoding="utf-8") + (ROOT / "benchmarks" / "common.py").read_text("utf-8")
        for option in (word for word in rest if word.startswith("--")):
            assert f'"{option}"' in source or f'"{option[2:].replace("-", "_")}"' in source, f"{file} {option}"


def test_the_fault_table_is_the_code():
    assert policy_table().strip() in README


def test_the_picture_and_the_results_are_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    results = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert results
    for file in results:
        content = json.loads(file.read_text(encoding="utf-8"))
        assert {"device", "date", "rows", "ratios"} <= set(content), file.name
