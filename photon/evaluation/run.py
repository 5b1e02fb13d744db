"""A run: a model answers questions, in one process or in several, and goes on where it was stopped."""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm
from transformers import PreTrainedConfig

from photon.evaluation.dealing import batches, dealt, grouped, scan_keys
from photon.evaluation.encoded_scans import EncodedScans
from photon.evaluation.models import Refused, load_model, type_of_weights
from photon.evaluation.predictions import PART, PREDICTIONS, collect, line_of, merge, prediction_files
from photon.loading import adapter_base, usable_device
from photon.run_folder import open_run
from photon.schedulers import SCHEDULERS

WEIGHTS = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt")  # the files that decide what a model answers
LONGEST = timedelta(days=7)  # that one process may wait for the slowest


@dataclass(frozen=True)
class Settings:
    """How questions are asked; the arguments of `evaluate_hf.py` of the same names."""

    benchmark: str
    output: Path
    volumes: str | None
    swap_scans: bool
    model: str
    revision: str | None
    trust_remote_code: bool
    device: str
    dtype: str
    batch_size: int
    max_new_tokens: int
    choices: str
    scheduler: str
    scheduler_layer: int | None
    token_budget: int | None
    keep_ratio: float | None
    seed: int
    modality: str
    cache_dir: str | None
    read_ahead: int
    slices: int
    window: list
    grounding: bool = False
    reuse: str = "exact"

    @property
    def scheduling(self):
        """Arguments of Photon's `generate`."""
        given = {"token_budget": self.token_budget, "keep_ratio": self.keep_ratio}
        given["use_scheduler"] = {"on": None, "off": False}.get(self.scheduler, True)
        return {name: value for name, value in given.items() if value is not None}


def answered(settings, rows):
    """Answers what is not answered yet. Returns {id: record} on rank 0, `None` on the others.

    The result depends neither on the number of processes nor on interruptions. Raises: `RunError` where the output
    folder holds another run.
    """
    state = PartialState(cpu=True, timeout=LONGEST)  # on any device: only text travels
    device = usable_device(settings.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", state.local_process_index % torch.cuda.device_count())
    ids, held, dtype = {row["id"]: None for row in rows}, [None], [settings.dtype]
    if state.is_main_process and settings.dtype == "auto":
        dtype = [type_of_weights(settings.model, device, settings.revision)]
    settings = replace(settings, dtype=broadcast_object_list(dtype)[0])  # by free memory, which each would find less
    if state.is_main_process:
        begun = any(file.stat().st_size for file in prediction_files(settings.output))
        open_run(settings.output, identity(settings, rows, device), begun=begun)
        held = [collect(settings.output, ids)]
        merge(settings.output, held[0], ids)
    held = broadcast_object_list(held)[0]
    groups = grouped(rows)
    open_groups = {key: part for key, part in groups.items() if any(row["id"] not in held for row in part)}
    mine = dealt(open_groups, state.num_processes)[state.process_index]
    fresh = {}
    if mine:
        fresh = _answer_groups(settings, device, {key: groups[key] for key in mine}, set(held), state.process_index)
    parts = gather_object([fresh])
    state.destroy_process_group()
    if not state.is_main_process:
        return None
    for part in parts:
        held |= part
    merge(settings.output, held, ids)
    return {name: held[name] for name in ids}  # in this order: sums must not depend on the run's history


def identity(settings, rows, device):
    """What decides the answers, as JSON: a run goes on only where all of it is the same."""
    names = ("batch_size", "max_new_tokens", "choices", "scheduler", "token_budget", "keep_ratio", "modality", "dtype")
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        scans = [
            {**scan, "path": _relative(scan["path"], settings.volumes)} for scan in map(json.loads, scan_keys(row))
        ]
        asked = [row["id"], row["kind"], row["messages"][:-1], row["choices"], scans]
        digest.update(json.dumps(asked, sort_keys=True).encode())
    return {
        "model": fingerprint(settings.model, settings.revision),
        "benchmark": settings.benchmark,
        "questions": len(rows),
        "question_digest": digest.hexdigest(),
        "swap_scans": settings.swap_scans,
        **{name: getattr(settings, name) for name in names},
        **({"seed": settings.seed} if getattr(SCHEDULERS.get(settings.scheduler), "draws", False) else {}),
        **({} if settings.scheduler_layer is None else {"scheduler_layer": settings.scheduler_layer}),
        **({"grounding": True} if settings.grounding else {}),
        **({} if settings.reuse == "exact" else {"reuse": settings.reuse}),
        "slices": settings.slices,
        "window": list(settings.window),
        "cached_scans": settings.cache_dir is not None,
        "device": device.type,
    }


def _relative(path, root):
    """A path from the folder of scans, so that a run goes on after the folder was moved. A scan that came as bytes has
    a name that its content decides, in a folder that changes."""
    from photon.training.sources import content_name  # needs datasets

    return content_name(path) or (os.path.relpath(path, root) if root else str(path))


def fingerprint(model, revision):
    """Hub id and commit, or a digest of a folder's weights and settings: a checkpoint trained on is another model.
    For adapters, that of their base follows."""
    base = adapter_base(model, revision)
    if Path(model).is_dir():
        name = _digest(Path(model))
    elif base is not None:
        name = f"{model}@{revision}"
    else:
        config, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
        name = f"{model}@{config.get('_commit_hash')}"
    return name if base is None else f"{name} on {fingerprint(base, None)}"


def _digest(folder):
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in WEIGHTS:
            digest.update(file.name.encode())
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()


def _answer_groups(settings, device, groups, done, rank):
    """Answers a rank's groups, except questions in `done`. Returns {id: record}, each already in the rank's file."""
    names = ("revision", "trust_remote_code", "dtype", "modality", "scheduling", "scheduler", "scheduler_layer",
             "seed", "max_new_tokens", "cache_dir", "slices", "window", "grounding", "reuse")  # fmt: skip
    model = load_model(settings.model, device, **{name: getattr(settings, name) for name in names})
    by_letter = settings.choices == "logprob"
    scans, fresh = EncodedScans(model, list(groups), settings.read_ahead), {}
    total = sum(row["id"] not in done for rows in groups.values() for row in rows)
    start = time.perf_counter()
    path = settings.output / (PART.format(rank) if rank else PREDICTIONS)
    with (
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=total, unit="question", disable=rank > 0 or None) as bar,
    ):
        for key, rows in groups.items():
            taken = scans.take(key)
            refused = next((scan.fault for scan in taken if isinstance(scan, Refused)), None)
            for batch in batches(rows, settings.batch_size, by_letter):
                if all(row["id"] in done for row in batch):
                    continue
                if refused is None:
                    answers = model.answer(batch, taken, by_letter and batch[0]["kind"] == "choice")
                else:
                    answers = [{"prediction": "", "refused": refused}] * len(batch)
                for row, answer in zip(batch, answers, strict=True):
                    if row["id"] in done:
                        continue
                    fresh[row["id"]] = {"id": row["id"], **answer}
                    file.write(line_of(fresh[row["id"]]))
                    file.flush()
                    bar.update()
    seconds = time.perf_counter() - start
    if rank == 0:
        print(f"{total} questions, {len(scans.left)} scans, {total / seconds:.2f} questions/s here", file=sys.stderr)
    return fresh
