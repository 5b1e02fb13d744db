"""Data, start and trainings of the arms, each in a folder of its own; what is there already is not made again."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from photon.run_folder import write_whole
from photon.schedulers import SCHEDULERS
from photon.training.memory import within_tower

ROOT = Path(__file__).resolve().parents[2]
PHANTOMS = (
    "--diameters", "20", "29", "42", "--contrast", "140", "210", "--ground-glass", "0", "--follow-up", "0.5",
    "--option-orders", "2",
)  # fmt: skip
RECIPE = "configs/recipe_tiny_exact.yaml"
# glibc would give large blocks back to the system after each operation, and fetch them again for the next
QUIET = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_TOP_PAD_": "67108864",
}  # fmt: skip
RESUMED = "resumed"  # a file in the folder of a training that was stopped
TRAIN_SEED, TEST_SEED = 1, 2  # of patients: none is in both


@dataclass(frozen=True)
class Preset:
    """Sizes of all parts. patients, test_patients: of the data; steps: of each arm; seeds: at most; rows: measured, of
    the tasks; arms: default all; tasks: asked, default all nine, which take some three times as many steps; runs: the
    folder of its trainings, within that of the data."""

    patients: int
    test_patients: int
    steps: int
    seeds: int
    rows: int
    batch: int = 32
    arms: tuple | None = None
    tasks: tuple | None = None
    runs: str = "."


PRESETS = {
    "full": Preset(2000, 300, steps=500, seeds=3, rows=600, tasks=("presence", "side", "attenuation")),
    "nine": Preset(
        2000, 300, steps=3000, seeds=3, rows=1000, arms=("exact", "release", "gain_quarter", "divprune"), runs="nine"
    ),
    "smoke": Preset(
        patients=16, test_patients=16, steps=4, seeds=1, rows=24, batch=8, arms=("dense", "exact", "release")
    ),
}


def command(*parts, log=None):
    """Runs a command of this repository in a process of its own, with one thread."""
    environment = {**QUIET, **os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *map(str, parts)], cwd=ROOT, env=environment, stdout=log, stderr=log)
    if result.returncode:
        raise RuntimeError(f"{parts[0]} ended with {result.returncode}" + (f"; see {log.name}" if log else ""))


def make_data(folder, preset):
    """Training and test patients, of two seeds."""
    for name, seed, patients, shares in (
        ("train", TRAIN_SEED, preset.patients, ("--test", "0", "--val", "0.03")),
        ("test", TEST_SEED, preset.test_patients, ("--test", "1", "--val", "0")),
    ):
        if not (folder / name / f"{name}.jsonl").is_file():
            command("-m", "photon.phantoms", "--output", folder / name, "--patients", patients, "--workers",
                    os.cpu_count() or 1, "--seed", seed, *shares, *PHANTOMS)  # fmt: skip


def make_start(folder, seed, layers=None):
    """Untrained weights behind the root's vision tower. layers: of the decoder; default the root's."""
    start = folder / (f"start{seed}" if layers is None else f"start{seed}-{layers}")
    if not (start / "model.safetensors").is_file():
        deeper = [] if layers is None else ["--layers", layers]
        command("scripts/build_root.py", "--output", start, "--tower", ROOT, "--seed", seed, *deeper)
    return start


def run_folder(folder, name, seed, preset):
    """Where an arm's training with a seed lies. name: of the arm."""
    return folder / preset.runs / f"{name}-{seed}"


def train(folder, arm, seed, preset):
    """Trains an arm with a seed, or goes on with it. Returns the folder of the trained model. Raises `RuntimeError`
    where the arm goes on with another one that is not trained yet."""
    run = run_folder(folder, arm.name, seed, preset)
    if (run / "final" / "model.safetensors").is_file():
        return run / "final"
    if arm.begins is None:
        start = make_start(folder, seed, arm.layers)
    else:
        start = run_folder(folder, arm.begins, seed, preset) / "final"
        if not (start / "model.safetensors").is_file():
            raise RuntimeError(f"{arm.name} goes on with {arm.begins}, which is not trained: name it in --arms too")
    photon = [f"{name}={json.dumps(value)}" for name, value in arm.photon.items()]
    labels = ["--evidence-weight", "1"] if arm.labelled else []
    method = [] if arm.method is None else ["--scheduler", arm.method, "--keep-ratio", arm.kept]
    within = arm.method is not None and within_tower(SCHEDULERS[arm.method])
    stored = [] if within or arm.photon.get("robust_probability") else ["--cache-features"]  # output of whole scans
    resume = ["--resume"] if (run / "run.json").is_file() else []
    run.mkdir(parents=True, exist_ok=True)
    if resume:
        (run / RESUMED).touch()
    with open(run.with_name(f"{run.name}.log"), "ab") as log:
        command(
            "train_hf.py", RECIPE, "--model", start, "--output-dir", run, "--train-data", training_rows(folder, arm),
            "--cache-dir", folder / "cache", *stored, "--use-cpu", "--max-steps", steps_of(arm, preset),
            "--per-device-train-batch-size", preset.batch, "--seed", seed, "--save-total-limit", "4",
            *arm.options, *labels, *method,
            *(["--tasks", *preset.tasks] if preset.tasks else []),
            *(["--photon", *photon] if photon else []), *resume, log=log,
        )  # fmt: skip
    return run / "final"


def training_rows(folder, arm):
    """The file of an arm's training rows: with `labelled` the first patients keep their label maps and the others have
    none, with `question_first` the question stands before the scans."""
    whole = folder / "train" / "train.jsonl"
    if not (arm.labelled or arm.question_first):
        return whole
    file = whole.with_name("train_turned.jsonl" if arm.question_first else f"train_labels_{arm.labelled:g}.jsonl")
    if not file.is_file():
        rows = [json.loads(line) for line in open(whole, encoding="utf-8")]
        if arm.question_first:
            rows = map(turned, rows)
        else:
            patients = sorted({row["patient"] for row in rows})
            kept = set(patients[: max(1, round(arm.labelled * len(patients)))])
            unknown = {"labels": [], "lesions": [], "evidence": []}
            rows = (row if row["patient"] in kept else row | unknown for row in rows)
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def steps_of(arm, preset):
    """How many steps an arm is trained, after the arm that it goes on with."""
    return max(round(arm.steps * preset.steps), 1)


def turned(row):
    """A row whose question stands before its scans."""
    asked, *others = row["messages"]
    parts = sorted(asked["content"], key=lambda part: part["type"] == "volume")
    return {**row, "messages": [{**asked, "content": parts}, *others]}


def seconds_of(run):
    """Seconds of a finished training, from its log; `None` where it was resumed, since the last part is then all."""
    lines = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    seconds = next((line["train_runtime"] for line in lines if "train_runtime" in line), None)
    return None if (run / RESUMED).exists() else seconds


def test_rows(folder, count, tasks=None):
    """The test questions of the first patients, about `count` of these tasks, with absolute paths."""
    root, rows = folder / "test", []
    for line in open(root / "test.jsonl", encoding="utf-8"):
        row = json.loads(line)
        if tasks and row["task"] not in tasks:
            continue
        if len(rows) >= count and row["patient"] != rows[-1]["patient"]:
            break
        paths = {name: [str(root / path) for path in row[name]] for name in ("labels", "lesions")}
        volumes = [{"path": str(root / path)} for path in row["volumes"]]
        rows.append({**row, **paths, "volumes": volumes, "kind": "text", "subtask": row["task"]})
    return rows
