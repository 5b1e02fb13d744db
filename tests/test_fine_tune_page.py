"""docs/fine_tune.md is true: the notebook is the page, and every cell of it runs, in a copy of the repository."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, run_fresh

PAGE = (ROOT / "docs" / "fine_tune.md").read_text(encoding="utf-8")
DRIVER = """
import json, os, subprocess, sys
cells = json.loads(open(sys.argv[1], encoding="utf-8").read())["cells"]
os.chdir("docs")
scope = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    if cell["cell_type"] != "code":
        continue
    print(f"=== cell {number}", flush=True)
    source, python = "".join(cell["source"]).replace("\\\\\\n", " "), []
    for line in source.splitlines():
        if line.startswith("%cd "):
            os.chdir(line[4:])
            sys.path.insert(0, os.getcwd())
        elif line.startswith("%env "):
            os.environ.update([line[5:].split("=", 1)])
        elif line.startswith("!"):
            subprocess.run(line[1:], shell=True, check=True)
        else:
            python.append(line)
    exec(compile("\\n".join(python), f"cell {number}", "exec"), scope)
"""


def test_the_notebook_is_the_page():
    spec = importlib.util.spec_from_file_location("build_notebook", ROOT / "scripts" / "build_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "fine_tune.ipynb").read_text(encoding="utf-8") == module.notebook(PAGE)
    code = [text for kind, text in module.cells(PAGE) if kind == "code"]
    assert len(code) == 1 + len(re.findall(r"^```(?:python|bash)$", PAGE, re.M)) >= 9


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone") / "photon"
    skipped = shutil.ignore_patterns("__pycache__", "node_modules")
    for name in ("photon", "docs", "configs", "metrics"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for file in ROOT.iterdir():
        if file.is_file() and file.suffix in (".py", ".json", ".jinja", ".safetensors"):
            shutil.copy(file, folder)
    programs = folder.parent / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    return folder


def test_every_cell_runs(repository):
    """Exact match of the first run rises from 0 to 100, and the result answers from another folder."""
    env = os.environ | {"PATH": f"{repository.parent / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", DRIVER, str(repository / "docs" / "fine_tune.ipynb")]
    done = subprocess.run(
        command, cwd=repository, env=env, capture_output=True, encoding="utf-8", errors="replace", timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    first = repository / "first"
    assert len((first / "train.jsonl").read_text().splitlines()) == 12

    def exact_match(run):
        scores = json.loads((first / run / "scores.json").read_text())["scores"]
        (task,) = scores["tasks"].values()
        return task["figures"]["exact_match"]["value"]

    assert exact_match("before") == 0 and exact_match("after") == 1 and exact_match("held_out") < 1
    (answer,) = re.findall(r"^\{'answer': .*\}$", done.stdout, re.M)
    assert "'answer': 'lesion'" in answer and "'tokens_seen': 420" in answer and "'finish_reason': 'stop'" in answer
    for name in ("run/final", "trl/final", "torch"):
        code = """
import sys
from transformers import pipeline
ask = pipeline("volume-question-answering", model=sys.argv[1], trust_remote_code=True)
print(ask(sys.argv[2], "Is there a lesion in the liver?", max_new_tokens=4)["tokens_seen"])
"""
        assert run_fresh(code, first / name, first / "patient3.nii.gz").split()[-1] == "420", name
