"""How well a trained model answers phantoms' questions, and which tokens it keeps for them.

Each measured question is one record: whether the answer is right under each condition, the share kept, and how many of
the tokens that hold the asked organ, and its lesions, are among the kept ones. Chance of a recall is the share kept;
chance of a precision is the share of tokens that hold the organ.
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from photon.evaluation.dealing import batches, grouped
from photon.evaluation.encoded_scans import EncodedScans
from photon.evaluation.measures import same_answer
from photon.evaluation.models import load_model
from photon.evaluation.swapping import swapped
from photon.prompt_photon import recorded_outputs
from photon.run_folder import write_whole
from photon.schedulers import use_scheduler
from photon.training.losses.evidence import evidence_tokens
from photon.training.losses.label_maps import PRESENT, TokenLabels

BATCH, LONGEST_ANSWER = 16, 4  # questions at a time; tokens: each answer is one word
CLASSES = 11  # labels of the phantoms' maps, and background
CONTROLS = ("none", "random", "flipped", "other")  # beside "own", the model as it is


def measure(source, rows, cache_dir, output, controls=CONTROLS, dense=False, method=None, kept=None):
    """Measures the model in folder `source` on rows of phantoms; writes and returns a list of records.

    Args: rows: of `trainings.test_rows`; cache_dir: folder of preprocessed scans; output: the JSON file, read instead
        where it exists; controls: some of `CONTROLS`, and grounding with "other"; dense: the model keeps all tokens;
        method: the one it was trained with, which chooses; kept: the share that it keeps.
    """
    if Path(output).is_file():
        return json.loads(Path(output).read_text(encoding="utf-8"))
    model = load_model(
        str(source),
        torch.device("cpu"),
        scheduler="on" if method is None else method,
        scheduling=None if method is None else {"keep_ratio": kept},
        max_new_tokens=LONGEST_ANSWER,
        cache_dir=str(cache_dir),
    )
    options = {"use_scheduler": False} if dense else model.options
    named = ("id", "patient", "task", "evidence")
    records = {row["id"]: {name: row[name] for name in named} | {"right": {}, "grounding": {}} for row in rows}
    scheduler = model.model.model.language_model.scheduler
    chosen = {}
    labels = TokenLabels(model.processor.image_processor, CLASSES, cache_dir)
    for condition in ("own", *(() if dense else controls)):
        model.model.set_scheduler(scheduler)
        model.options, model.prefix_of = options, None
        model.grounding = "other" in controls and condition in ("own", "other")
        if condition == "none":
            model.options = {"token_budget": 0}
        elif condition in ("random", "flipped"):
            use_scheduler(model.model, condition)
        asked = swapped(rows) if condition == "other" else rows
        groups = grouped(asked)
        scans = EncodedScans(model, list(groups))
        for key, questions in tqdm(
            groups.items(), desc=f"{output.parent.name}: {condition}", unit="scan", leave=False
        ):
            taken = scans.take(key)
            for batch in batches(questions, BATCH, by_letter=False):
                with recorded_outputs(chosen, scheduler):
                    answers = model.answer(batch, taken)
                for place, (row, answer) in enumerate(zip(batch, answers, strict=True)):
                    record = records[row["id"]]
                    record["right"][condition] = bool(same_answer(answer["prediction"], row["answer"]))
                    if model.grounding:
                        record["grounding"][condition] = answer["grounding"]
                    if condition == "own" and not dense:
                        schedule = chosen[scheduler]
                        keep = schedule.keep_mask[place, : int(schedule.visual_count[place])]
                        record |= found_tokens(keep, row, labels) | {"places": keep.nonzero()[:, 0].tolist()}
                        record["scans"] = [scan["path"] for scan in row["volumes"]]
    records = list(records.values())
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, json.dumps(records) + "\n")
    return records


def found_tokens(keep, row, labels):
    """How many tokens hold the organs that a question names, their lesions, both kept or not; keep (V,) bool."""
    targets = [labels(row, number) for number in range(len(row["volumes"]))]
    organ = evidence_tokens(targets, row["evidence"])  # (V,)
    lesion = (torch.cat(targets)[:, :, 1][..., row["evidence"]] > PRESENT).any(-1).any(-1)
    counts = {"tokens": len(keep), "kept_tokens": keep, "organ": organ, "organ_kept": organ & keep, "lesion": lesion}
    counts["lesion_kept"] = lesion & keep
    return {name: value if isinstance(value, int) else int(value.sum()) for name, value in counts.items()}
