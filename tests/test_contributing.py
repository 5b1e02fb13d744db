"""CONTRIBUTING.md is enough: its snippets, in a copy of the repository, add a method, a benchmark and a loss."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, TOKENS, run_fresh

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^##+ ([^\n]*)\n(.*?)(?=^##|\Z)", PAGE, re.S | re.M))
FILE = r"The new\s+file\s+`(\S+)`:\n\n```python\n(.*?)```"
LINE = r"One line in `(\S+)`:\n\n```python\n(.*)\n```"


def run(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def shell(folder, section):
    """The section's commands, with this Python."""
    for block in re.findall(r"```bash\n(.*?)```", SECTIONS[section], re.S):
        run(folder, "bash", "-ec", re.sub(r"^python ", f"{sys.executable} ", block, flags=re.M))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with the phantoms of the examples."""
    folder = tmp_path_factory.mktemp("copy") / "photon"
    kept_out = shutil.ignore_patterns(".*", "__pycache__", "demo", "outputs")
    shutil.copytree(ROOT, folder, ignore=kept_out)
    shell(folder, "Add something")
    return folder


def add(folder, section):
    """Writes the section's new file and adds its one line behind the imports of the others, as a reader would."""
    path, code = re.search(FILE, SECTIONS[section], re.S).groups()
    registry, line = re.search(LINE, SECTIONS[section]).groups()
    assert not (folder / path).exists() and "\n" not in line
    (folder / path).write_text(code)
    lines = (folder / registry).read_text().splitlines(keepends=True)
    package = line.split()[1].rpartition(".")[0]
    last = max(i for i, text in enumerate(lines) if text.startswith(f"from {package}."))
    lines.insert(last + 1, line + "\n")
    (folder / registry).write_text("".join(lines))
    run(folder, sys.executable, "-m", "ruff", "check", "--fix", registry, path)  # sorts the line in
    shell(folder, section)


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_selection_method(copy):
    add(copy, "A selection method")
    answers = rows(copy / "centre_answers" / "predictions.jsonl")
    assert len(answers) == len(rows(copy / "phantoms_data" / "val.jsonl")) > 0
    one_scan = {round(20 / TOKENS, 6), round(20 / TOKENS / 2, 6)}  # a comparison has two scans, and one budget
    assert {answer["kept"] for answer in answers} <= one_scan


def test_a_benchmark(copy):
    add(copy, "A benchmark")
    (answer,) = rows(copy / "liver_answers" / "predictions.jsonl")
    scores = json.loads((copy / "liver_answers" / "scores.json").read_text())
    assert answer["id"] == "liver-lesions/first" and "presence" in json.dumps(scores)


def test_a_loss(copy):
    add(copy, "A loss")
    state = next((copy / "sharp_run").rglob("trainer_state.json"))
    log = [line for line in json.loads(state.read_text())["log_history"] if "sharpness_loss" in line]
    assert len(log) == 2 and all(0 < line["sharpness_loss"] <= 0.25 for line in log)
    assert (copy / "sharp_run" / "final" / "model.safetensors").is_file()


def test_a_scan_format():
    code = re.search(r"```python\n(.*?)```", SECTIONS["A scan format"], re.S)[1]
    prose = SECTIONS["A scan format"].split("```")[-1]
    sources = "".join(file.read_text("utf-8") for file in ROOT.glob("scan_*_photon.py"))
    for name in set(re.findall(r"`(\w+)`", prose)):
        assert re.search(rf"^(def |class )?{name}\b", sources, re.M), name
    for file in set(re.findall(r"`([\w/]+\.py)`", prose)) - {"scan_NAME_photon.py"}:
        assert (ROOT / file).is_file(), file
    run_fresh(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}\nassert image.GetSize() == (20, 30, 40)")
