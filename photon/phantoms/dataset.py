"""A data set of phantom patients on disk: scans, label maps, questions, a card."""

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from photon.phantoms.anatomy import LABELS
from photon.phantoms.patient import Phantom, PhantomConfig, setting
from photon.phantoms.questions import blind_baseline, patient_questions, write_questions

try:
    import SimpleITK as sitk
except ImportError as error:
    raise ImportError("Phantoms are written with SimpleITK, which is missing: pip install SimpleITK") from error


@dataclass(frozen=True)
class DataConfig:
    """A data set: its seed, the shares of its splits, and its patients' settings."""

    seed: int = setting(0, "of all patients and questions")
    val: float = setting(0.1, "share of patients for validation")
    test: float = setting(0.2, "share of patients for testing")
    phantom: PhantomConfig = PhantomConfig()

    def __post_init__(self):
        if self.seed < 0 or self.val < 0 or self.test < 0 or self.val + self.test > 1:
            raise ValueError(
                f"seed is {self.seed}, val {self.val}, test {self.test}; none may be below 0, nor val + test above 1"
            )


def split_of(patient, config):
    """The split of patient number `patient`: "train", "val" or "test".

    Multiples of the golden ratio fill the unit interval evenly. So the shares hold for any number of patients, and no
    patient changes its split when the data set grows.
    """
    place = (patient + 1) * 0.6180339887498949 % 1
    return "test" if place < config.test else "val" if place < config.test + config.val else "train"


def _write_json(path, value):
    partial = path.with_name(path.name + ".partial")
    partial.write_text(value if isinstance(value, str) else json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_patient(task):
    """Writes one patient's scans, label maps and facts, and returns the facts. A folder under its name is complete."""
    root, patient, config = task
    folder, partial = Path(root) / "scans" / f"p{patient:05d}", Path(root) / "scans" / f".p{patient:05d}.partial"
    if folder.exists():
        return json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    phantom, scans = Phantom(config.seed, patient, config.phantom), []
    for scan in range(phantom.scans):
        *images, facts = phantom.render(scan)
        for image, kind in zip(images, ("", "_organs", "_lesions"), strict=True):
            sitk.WriteImage(image, str(partial / f"scan{scan}{kind}.nii.gz"), True, 1)  # noise packs no better
        scans.append(facts)
    _write_json(partial / "facts.json", scans)
    os.replace(partial, folder)
    return scans


def _written(tasks, workers):
    if workers == 1:
        yield from map(write_patient, tasks)
    else:
        with ProcessPoolExecutor(workers) as pool:
            yield from pool.map(write_patient, tasks)


def _stamp(root, config):
    """Writes the settings beside the data. Raises `ValueError` where the folder holds data of other settings."""
    settings, stamp = json.loads(json.dumps(asdict(config))), root / "settings.json"
    settings |= settings.pop("phantom")
    if stamp.exists():
        held = json.loads(stamp.read_text(encoding="utf-8"))
        other = [name for name in settings if held.get(name) != settings[name]]
        if other:
            found = ", ".join(f"{name} {held.get(name)} (asked for {settings[name]})" for name in other)
            raise ValueError(f"the folder holds a data set with {found}; choose another folder, or remove it")
    elif any(root.iterdir()):
        raise ValueError("the folder is not empty and holds no settings.json of phantoms; choose another folder")
    else:
        _write_json(stamp, settings)


def write_data_set(root, patients, config, workers=1):
    """Writes or completes a data set.

    Args: root: its folder; patients: how many; config: `DataConfig`; workers: processes.
    Returns: its rows; the blind baseline by task (see `blind_baseline`); the same as a table in Markdown.
    Raises: `ValueError` where the folder holds other data.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    _stamp(root, config)
    tasks = [(str(root), patient, config) for patient in range(patients)]
    facts = list(tqdm(_written(tasks, workers), total=patients, desc="patients", unit="patient"))
    candidates = []
    for scans in facts:
        patient = scans[0]["patient"]
        split = split_of(patient, config)
        candidates += patient_questions(f"scans/p{patient:05d}", scans, split, config.phantom)
    rows, left = write_questions(candidates, config.seed, config.phantom)
    by_split = {split: [row for row in rows if row["split"] == split] for split in ("train", "val", "test")}
    for split, group in by_split.items():
        _write_json(root / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in group))
    table = blind_baseline(by_split["train"], by_split["test"])
    lines = ["| task | train | test | chance | blind baseline | left out to balance |", "|---|---|---|---|---|---|"]
    for task, (fitted, scored, chance, blind) in table.items():
        lines.append(f"| {task} | {fitted} | {scored} | {chance:.3f} | {blind:.3f} | {left[task]} |")
    report = "\n".join(lines)
    _write_json(root / "README.md", _card(config, patients, by_split, report))
    return rows, table, report


def _card(config, patients, by_split, report):
    rows = ", ".join(f"{split} {len(group)}" for split, group in by_split.items())
    return f"""---
license: cc0-1.0
task_categories: [visual-question-answering]
tags: [medical, ct, synthetic, 3d]
configs:
- config_name: default
  data_files:
{chr(10).join(f"  - {{split: {'validation' if s == 'val' else s}, path: {s}.jsonl}}" for s in by_split)}
---
# Phantom torso CTs

{patients} synthetic patients made by `python -m photon.phantoms` from seed {config.seed}: analytic organs and lesions,
no real person's data. Voxels are Hounsfield units (int16). They serve to develop and test a method, and are not for
clinical use.

Questions: {rows}. Splits are by patient. Within a split, each question text has each
answer equally often, so that the blind baseline (the best answer from the text, fitted on train, scored on test)
is chance:

{report}

Files: `scans/pNNNNN/scanK.nii.gz`, `scanK_organs.nii.gz` ({", ".join(f"{v} {k}" for k, v in LABELS.items())}),
`scanK_lesions.nii.gz` (the `label` of each lesion in `facts.json`), `facts.json` (mm, ml, LPS); `settings.json`.
A row holds `id`, `patient`, `split`, `task`, `volumes`, `labels`, `lesions` (paths from this folder), `evidence`
(labels of the organs that the question is about), `messages`, `answer`, `choices` (null for an
open answer). A size is the sphere's diameter to the nearest class; an organ that the field of view cuts through is not
asked about. Orientation, spacing, pose and field of view differ from scan to scan.
"""
