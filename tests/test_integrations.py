"""Photon within others' evaluators, each called as its public code calls it."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace

import pytest
import SimpleITK as sitk

from conftest import ROOT
from photon.phantoms import patient as phantom_patient

# What the evaluator of DeepTumorVQA 2.0 does with a custom backend, rewritten from its public code (repository
# Schuture/DeepTumorVQA: evaluate.py, eval/vqa_evaluator.py, eval/metrics.py, data/prompt.py, data/loader.py):
# the module is imported by its dotted name; `build_evaluator` gets the parsed arguments; each question is one call of
# `generate(prompt, images=..., video_path=...)`, the volume's path under `video_path` or None where it is not there;
# what it raises becomes the answer; a letter is read from the answer as written here.
EVALUATOR = """
import abc, argparse, importlib, json, re
from pathlib import Path


class HFVLMEvaluator(abc.ABC):
    system_prompt = "You are a radiology AI assistant."

    def __init__(self, model_id, device="cuda", **kwargs):
        self.model_id, self.device, self.kwargs = model_id, device, kwargs

    @abc.abstractmethod
    def generate(self, prompt, images=None, video_path=None): ...

    def run(self, split, input_mode, fmt, output_path, data_dir):
        results = []
        root = Path(data_dir) / split
        for q in json.loads((root / "test_qa.json").read_text())["questions"]:
            parts = ["You are given the full 3D abdominal CT volume (NIfTI, native voxel spacing)."]
            if fmt == "mc":
                parts += [q["mc_question"], "Answer with ONLY the single letter (A, B, C, or D)."]
            else:
                parts += [q["question"], "Answer with a single number (no units, no extra words)."]
            asset = root / "ct" / q["image_id"] / "ct.nii.gz"
            path = str(asset) if asset.exists() else None
            try:
                raw = self.generate("\\n".join(parts), images=None, video_path=path)
            except Exception as e:
                raw = f"[ERROR] {type(e).__name__}: {e}"
            results.append({"qid": q["qid"], "raw_output": raw, "letter": extract_letter(raw)})
        Path(output_path).write_text(json.dumps(results))


def extract_letter(text):
    s = text.strip().upper()
    if s and s[0] in "ABCD":
        return s[0]
    m = re.search(r"\\b([A-D])\\b", s)
    return m.group(1) if m else ""


def main(argv=None):
    p = argparse.ArgumentParser()
    for name in ("model", "backend", "custom-module", "mode", "input", "data-dir", "output", "label"):
        p.add_argument(f"--{name}")
    p.add_argument("--format", default="mc")
    p.add_argument("--split", default="benchmark")
    p.add_argument("--max-new-tokens", type=int, default=256)
    args = p.parse_args(argv)
    ev = importlib.import_module(args.custom_module).build_evaluator(args)
    assert isinstance(ev, HFVLMEvaluator)
    ev.run(split=args.split, input_mode=args.input, fmt=args.format, output_path=args.output, data_dir=args.data_dir)
    print("leaderboard:", args.label or Path(args.model).name)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The stand-in as an installed package: its base class where the public one is, its command beside it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "deeptumorvqa" / "eval").mkdir(parents=True)
    (folder / "deeptumorvqa" / "__init__.py").touch()
    (folder / "deeptumorvqa" / "eval" / "__init__.py").touch()
    (folder / "deeptumorvqa" / "eval" / "vqa_evaluator.py").write_text(EVALUATOR)
    start = "from .eval.vqa_evaluator import main\nif __name__ == '__main__':\n    main()\n"
    (folder / "deeptumorvqa" / "evaluate.py").write_text(start)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Two scans and a damaged one, and a scan that is not there; questions with two and with four options."""
    folder = tmp_path_factory.mktemp("dtv")
    for patient in range(2):
        image, *_ = phantom_patient.make_patient(seed=5, patient=patient)
        path = folder / "benchmark" / "ct" / f"BDMAP_{patient}" / "ct.nii.gz"
        path.parent.mkdir(parents=True)
        sitk.WriteImage(image, str(path))
    damaged = folder / "benchmark" / "ct" / "BDMAP_2" / "ct.nii.gz"
    damaged.parent.mkdir()
    damaged.write_bytes(path.read_bytes()[:1500])
    four = "How would you classify the spleen? A: Normal B: Moderate C: Severe D: Mild"
    two = "Is there a lesion in the liver? A: yes B: no"
    asked = [(0, four), (0, two), (1, four), (2, four), (3, two), (1, two)]
    listed = [
        {"qid": f"bench_{i}", "image_id": f"BDMAP_{patient}", "mc_question": text, "question": "What is the volume?"}
        for i, (patient, text) in enumerate(asked)
    ]
    (folder / "benchmark" / "test_qa.json").write_text(json.dumps({"questions": listed}))
    return folder


def command(questions, output, *more):
    return ["--backend", "custom", "--custom-module", "integrations.deeptumorvqa", "--mode", "vqa", "--model",
            str(ROOT), "--data-dir", str(questions), "--output", str(output), *more]  # fmt: skip


def test_deeptumorvqa_choices(package, questions, tmp_path):
    """As its users start it: in a process of its own, with this repository on PYTHONPATH."""
    done = subprocess.run(
        [sys.executable, "-m", "deeptumorvqa.evaluate", *command(questions, tmp_path / "o", "--input", "3d_volume")],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{package}", "OMP_NUM_THREADS": "1"},
        cwd=package, capture_output=True, encoding="utf-8", errors="replace", timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "o").read_text())
    answers = [result["raw_output"] for result in results]
    assert [result["letter"] for result in results] == answers  # bare letters, or nothing
    assert [bool(answer) for answer in answers] == [True, True, True, False, False, True]
    assert all(answer in "AB" for answer in (answers[1], answers[5]))
    assert done.stderr.count("DAMAGED_FILE") == 1 and done.stderr.count("not in the data folder") == 1
    assert "BDMAP" not in done.stderr


@pytest.fixture
def evaluator(package, monkeypatch):
    """The evaluator's `main` in this process."""
    monkeypatch.syspath_prepend(str(package))
    return importlib.import_module("deeptumorvqa.evaluate").main


def test_deeptumorvqa_command_names_its_line_in_the_leaderboard(evaluator, questions, tmp_path, monkeypatch, capsys):
    """The model is ".", from whose path the evaluator makes no name."""
    page = importlib.import_module("integrations.deeptumorvqa").__doc__
    words = shlex.split(re.search(r"deeptumorvqa-eval (.*?)\n\n", page.replace("\\\n", " "), re.S)[1])
    words[words.index("DeepTumorVQA_2.0")], words[words.index("photon.json")] = str(questions), str(tmp_path / "o")
    monkeypatch.chdir(ROOT)
    evaluator(words)
    assert capsys.readouterr().out.splitlines()[-1] == "leaderboard: Photon"
    assert len(json.loads((tmp_path / "o").read_text())) == 6


def test_deeptumorvqa_numbers(evaluator, questions, tmp_path):
    """What counts is that no fault reads as a number."""
    evaluator(command(questions, tmp_path / "o", "--input", "3d_volume", "--format", "freeform",
                      "--max-new-tokens", "3"))  # fmt: skip
    answers = [result["raw_output"] for result in json.loads((tmp_path / "o").read_text())]
    assert answers[3] == answers[4] == "" and not any("ERROR" in answer for answer in answers)


def test_deeptumorvqa_scan_is_encoded_when_it_changes(evaluator, questions, monkeypatch):
    made = importlib.import_module("integrations.deeptumorvqa")
    counted = []
    encode = made.VolumeModel.encode
    monkeypatch.setattr(made.VolumeModel, "encode", lambda self, scan: counted.append(1) or encode(self, scan))
    args = Namespace(mode="vqa", input="3d_volume", format="mc", model=str(ROOT), max_new_tokens=256)
    photon = made.build_evaluator(args)
    first, second = (str(questions / "benchmark" / "ct" / f"BDMAP_{i}" / "ct.nii.gz") for i in range(2))
    answers = [photon.generate("Is it? A: yes B: no", images=None, video_path=path) for path in (first, first, second)]
    assert len(counted) == 2 and set(answers) <= {"A", "B"}


def test_deeptumorvqa_other_inputs_are_refused(evaluator, questions, tmp_path):
    with pytest.raises(ValueError, match="--input 3d_volume"):
        evaluator(command(questions, tmp_path / "o", "--input", "2d_image"))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Which? A: one B: two C: three D: four\nAnswer with ONLY the single letter (A, B, C, or D).", "ABCD"),
        ("Which?\nA. one\nB. two\nC. three", "ABC"),
        ("Is it? A) yes B) no", "AB"),
        ("Hepatitis B: present. Which? A: yes B: no", "AB"),
        ("Type A: is that it? Answer with ONLY the single letter (A, B, C, or D).", "ABCD"),
        ("No options at all", "ABCD"),
        ("With a gap A: one C: three D: four", "ABCD"),
        ("DATA: x CAB: y", "ABCD"),
    ],
)
def test_deeptumorvqa_letters(evaluator, prompt, expected):
    from integrations.deeptumorvqa import letters

    assert letters(prompt) == list(expected)
