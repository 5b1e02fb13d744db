"""Answer a benchmark's questions with a model, and score the answers.

    python evaluate_hf.py --model . --benchmark 3d-rad --data QUESTIONS --volumes SCANS --output RUN
    torchrun --nproc-per-node 8 evaluate_hf.py ...                         # each process takes scans of its own
    python evaluate_hf.py --model google/medgemma-4b-it --slices 16 ...    # a 2D model is shown axial slices
    python evaluate_hf.py --benchmark 3d-rad --data QUESTIONS --score predictions.jsonl
    python evaluate_hf.py --benchmark 3d-rad --data QUESTIONS --compare first.jsonl second.jsonl

RUN gets `run.json` (what was run), `predictions.jsonl` (a line a question, written as answers come) and `scores.json`;
the table is printed. A run that was stopped goes on where it was when the command is given again; a folder that holds
another run is refused. Questions on one scan are asked together: the scan is read once, the vision tower sees it once.
How scans are dealt to processes does not change a batch, so the result does not depend on their number. A scan that
cannot be read is noted with its fault code under each of its questions, which count as wrong.
Not a medical device.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from photon.console import print_warning
from photon.evaluation.questions import BENCHMARKS, load_benchmark, missing_report
from photon.evaluation.scoring import compare, read_predictions, score, swapped, table
from photon.loading import HUB_ID, usable_device
from photon.scan_intensity_photon import intensity_window
from photon.scan_reader_photon import read_ahead, read_volume
from photon.schedulers.controls import CONTROLS, ControlScheduler

PREDICTIONS, PART = "predictions.jsonl", "predictions.rank{}.jsonl"
WEIGHTS = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt")  # the files that decide what a model answers


class RunError(ValueError):
    """A run that cannot start or go on as asked."""


# === Questions =======================================================================================================


def scan_keys(row):
    """A row's scans as hashable keys: JSON of what the volume processor takes."""
    entries = [scan if isinstance(scan, dict) else {"path": str(scan)} for scan in row["volumes"]]
    return tuple(json.dumps({k: v for k, v in entry.items() if v is not None}, sort_keys=True) for entry in entries)


def parts_of(message):
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def grouped(rows):
    """{scans of the prompt: its questions}, in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault(scan_keys(row), []).append(row)
    return groups


def dealt(groups, ranks):
    """The groups of each rank, a list of lists of keys. Groups that share a scan stay together, so that no scan is
    read twice; ranks get about equally many questions."""
    home = {}  # scan -> the group that stands for all groups connected with it

    def root(group):
        while home.setdefault(group, group) != group:
            group = home[group]
        return group

    first = {}
    for group in groups:
        for scan in group:
            home[root(group)] = root(first.setdefault(scan, group))
    together = {}
    for group in groups:
        together.setdefault(root(group), []).append(group)
    shares, load = [[] for _ in range(ranks)], [0] * ranks
    for members in sorted(together.values(), key=lambda m: -sum(len(groups[g]) for g in m)):  # stable, largest first
        lightest = load.index(min(load))
        shares[lightest] += members
        load[lightest] += sum(len(groups[group]) for group in members)
    return shares


def batches(rows, size, by_letter):
    """A group's questions in batches. They depend on the group and the size alone: a resumed run, or one with other
    ranks, computes the same batches and so the same last digits."""
    letters = [row for row in rows if by_letter and row["kind"] == "choice"]
    written = [row for row in rows if not (by_letter and row["kind"] == "choice")]
    return [part[i : i + size] for part in (letters, written) for i in range(0, len(part), size)]


# === Models ==========================================================================================================


@dataclass
class Refused:
    """A scan that cannot be read."""

    fault: str


class Answerer:
    """A model and its processor. `read` may run in threads; `encode` and `answer` run in turn on the device."""

    def __init__(self, processor, model, max_new_tokens=64, options=None):
        self.processor, self.model = processor, model
        self.max_new_tokens, self.options = max_new_tokens, options or {}  # of `generate`
        self.processor.tokenizer.padding_side = "left"
        self.letter_ids = {}

    def read_or_refuse(self, key):
        """What `encode` takes, or `Refused`."""
        try:
            return self.read(json.loads(key))
        except ValueError as error:
            if getattr(error, "fault", None) is None:  # not of the scan; the class cannot be asked, it exists twice
                raise
            return Refused(error.fault.value)

    def encode(self, scan):
        return scan

    @torch.inference_mode()
    def answer(self, rows, scans, by_letter=False):
        """Answers to questions on the same scans, in one batch.

        Args: rows: of one kind if `by_letter`; scans: what `encode` returned for each scan of the prompt; by_letter:
            take the likeliest of a row's `choices` as the next token after the prompt, in one forward.
        Returns: for each row a dict of `prediction`, `kept` (share of the visual tokens; `None` where nothing is cut)
            and with `by_letter` `choice_logprobs`.
        """
        chats = [prompt(row, scans, self.part) for row in rows]
        inputs = self.inputs(chats, scans)
        output = self.model.generate(
            **inputs,
            max_new_tokens=1 if by_letter else self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=by_letter,
            **self.options,
        )
        cut = getattr(output.past_key_values, "cut", None)
        kept = [None] * len(rows)
        if cut is not None:
            kept = (cut.keep_mask.sum(-1) / cut.visual_count.clamp(min=1)).tolist()
            kept = [round(ratio, 6) if count else None for ratio, count in zip(kept, cut.visual_count, strict=True)]
        if not by_letter:
            new = output.sequences[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.batch_decode(new, skip_special_tokens=True)
            return [{"prediction": t.strip(), "kept": k} for t, k in zip(texts, kept, strict=True)]
        logprobs = output.logits[0].float().log_softmax(-1)  # (B, vocabulary)
        answers = []
        for row, chat, line, ratio in zip(rows, chats, logprobs, kept, strict=True):
            ids = self.tokens_of(tuple(row["choices"]), chat)
            by_choice = dict(zip(row["choices"], line[ids].tolist(), strict=True))
            best = max(by_choice, key=by_choice.get)
            rounded = {choice: round(value, 4) for choice, value in by_choice.items()}
            answers.append({"prediction": best, "kept": ratio, "choice_logprobs": rounded})
        return answers

    def tokens_of(self, choices, chat):
        """The token that each choice is when it follows a prompt."""
        if choices not in self.letter_ids:
            text, ids = self.text(chat), []
            encode = self.processor.tokenizer
            before = encode(text, add_special_tokens=False)["input_ids"]
            for choice in choices:
                after = encode(text + choice, add_special_tokens=False)["input_ids"]
                if after[:-1] != before:
                    raise RunError(
                        f"--choices logprob compares single tokens, but {choice!r} after this model's prompt is not "
                        "one; use --choices generate."
                    )
                ids.append(after[-1])
            self.letter_ids[choices] = ids
        return self.letter_ids[choices]

    def text(self, chat):
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


class VolumeModel(Answerer):
    """Photon: a scan is encoded once, and its visual tokens stand in every prompt of a batch."""

    def __init__(self, *args, cache_dir=None):
        super().__init__(*args)
        self.cache_dir = cache_dir

    def read(self, scan):
        return self.processor.image_processor([scan], return_tensors="pt", cache_dir=self.cache_dir)

    @torch.inference_mode()
    def encode(self, scan):
        """Visual tokens (N, D) and grid (1, 3)."""
        patches, grid = (scan[name].to(self.model.device) for name in ("pixel_values_videos", "video_grid_thw"))
        return self.model.model.get_video_features(patches, grid, return_dict=True).pooler_output[0], grid

    def part(self, scan, number, total):
        return [{"type": "volume"}]

    def inputs(self, chats, scans):
        """As the processor makes them of the same chats, but with encoded scans in place of patches."""
        marks = [self.processor.video_token * len(features) for features, _ in scans] * len(chats)
        texts, _ = self.processor.get_text_with_replacements(
            [self.text(chat) for chat in chats], videos_replacements=marks
        )
        inputs = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
        kinds = self.processor.create_mm_token_type_ids(inputs["input_ids"].tolist())
        inputs = {**inputs, "mm_token_type_ids": torch.tensor(kinds)}
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        if scans:
            features, grids = zip(*scans, strict=True)
            seen = BaseModelOutputWithPooling(pooler_output=list(features) * len(chats))
            inputs |= {"mm_encoder_outputs": {"video": seen}, "video_grid_thw": torch.cat(grids * len(chats))}
        return inputs


class SliceModel(Answerer):
    """Any other model of images and text: a scan is shown as axial slices, through the model's own processor."""

    def __init__(self, *args, slices=16, window=(-160.0, 240.0), modality="auto"):
        super().__init__(*args)
        self.slices, self.window, self.modality = slices, window, modality

    def read(self, scan):
        path, options = scan["path"], {name: scan[name] for name in ("series", "frame") if name in scan}
        return axial_slices(path, self.slices, self.window, self.modality, **options)

    def part(self, scan, number, total):
        label = [{"type": "text", "text": f"Scan {number}: "}] if total > 1 else []
        return label + [{"type": "image", "image": image} for image in scan]

    def inputs(self, chats, scans):
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        return inputs.to(self.model.device, self.model.dtype)


def prompt(row, scans, part):
    """A row's chat without its answer, each place of a scan filled by `part(scan, number, total)`."""
    numbered = iter(enumerate(scans, start=1))
    messages = []
    for message in row["messages"][:-1]:
        content = []
        for piece in parts_of(message):
            if piece["type"] == "volume":
                number, scan = next(numbered)
                content += part(scan, number, len(scans))
            else:
                content.append({"type": "text", "text": piece["text"]})
        messages.append({"role": message["role"], "content": content})
    return messages


def axial_slices(source, count, window, modality="auto", **options):
    """`count` axial slices of a scan, evenly spaced from head to feet, as 8-bit pictures.

    The patient's right is on the left of a picture and the front at its top; pixels are square. CT is windowed to
    `window` (HU), MR by its percentiles. A scan with fewer slices gives all of them. Raises `VolumeError`.
    """
    import SimpleITK as sitk

    image = read_volume(source, **options)
    low, high = intensity_window(image, modality=modality, window=window)
    image = sitk.DICOMOrient(image, "LPI")  # columns grow to the left, rows to the back, slices to the feet
    voxels = sitk.GetArrayFromImage(image)  # (slices, rows, columns)
    x, y, _ = image.GetSpacing()
    pixel, depth = min(x, y), len(voxels)
    size = (round(voxels.shape[2] * x / pixel), round(voxels.shape[1] * y / pixel))  # width, height
    count = min(count, depth)
    pictures = []
    for index in ((2 * i + 1) * depth // (2 * count) for i in range(count)):
        grey = (np.clip(voxels[index].astype(np.float32), low, high) - low) / (high - low)
        picture = Image.fromarray(np.rint(255 * grey).astype(np.uint8)).convert("RGB")
        pictures.append(picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR))
    return pictures


def load_model(source, device, *, revision=None, trust_remote_code=False, dtype="auto", modality="auto",
               scheduling=None, max_new_tokens=64, cache_dir=None, slices=16, window=(-160.0, 240.0)):  # fmt: skip
    """A `VolumeModel` of a Photon checkpoint, a `SliceModel` of any other.

    Args: scheduling: arguments of Photon's `generate`; cache_dir: folder of preprocessed scans for Photon; slices,
        window: how other models see a scan.
    """
    kind = PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("model_type")
    if kind is None:
        raise RunError("--model has no config.json with a model_type; give a folder or Hub id of a model.")
    photon = kind == "photon"
    if scheduling and not photon:
        raise RunError(f"{', '.join(scheduling)}: only Photon has a scheduler, and --model is a {kind}; leave it out.")
    own = {"revision": revision, "trust_remote_code": photon or trust_remote_code}
    fields = {"modality": modality} if photon and modality != "auto" else {}
    processor = AutoProcessor.from_pretrained(source, **own, **fields)
    dtype = "float32" if dtype == "auto" and device.type == "cpu" else dtype  # bfloat16 is slower there
    model, loaded = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True, **own)
    absent = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
    if absent:  # left at random, and its answers would be scored as if they were the model's
        raise RunError(f"--model lacks {len(absent)} of its weights, or has them in another shape, {absent[0]} first.")
    model = model.to(device).eval()
    if photon:
        return VolumeModel(processor, model, max_new_tokens, scheduling, cache_dir=cache_dir)
    return SliceModel(processor, model, max_new_tokens, slices=slices, window=window, modality=modality)


class Scans:
    """Encoded scans for groups in turn: read ahead in threads, encoded once, let go after their last group."""

    def __init__(self, model, groups, ahead=2):
        self.model, self.left, self.held = model, Counter(scan for group in groups for scan in group), {}
        order = list(self.left)  # in the order of first need
        reader = read_ahead(order, model.read_or_refuse, ahead=ahead)
        self.reader = zip(order, reader, strict=True)

    def take(self, group):
        """A group's scans, each encoded or `Refused`."""
        while any(scan not in self.held for scan in group):
            key, scan = next(self.reader)
            self.held[key] = scan if isinstance(scan, Refused) else self.model.encode(scan)
        taken = [self.held[scan] for scan in group]
        for scan in group:
            self.left[scan] -= 1
            if not self.left[scan]:
                del self.held[scan]
        return taken


# === A run's folder ==================================================================================================


def identity(args, rows, device):
    """What decides the answers, as JSON: a run goes on only where all of it is the same."""
    dtype = args.dtype if args.dtype != "auto" else "float32" if device.type == "cpu" else "auto"
    names = ("batch_size", "max_new_tokens", "choices", "scheduler", "token_budget", "keep_ratio", "modality")
    seen = hashlib.blake2b(digest_size=16)
    for row in rows:
        scans = [{**scan, "path": relative(scan["path"], args.volumes)} for scan in map(json.loads, scan_keys(row))]
        asked = [row["id"], row["kind"], row["messages"][:-1], row["choices"], scans]
        seen.update(json.dumps(asked, sort_keys=True).encode())
    return {
        "model": fingerprint(args.model, args.revision),
        "benchmark": args.benchmark,
        "questions": len(rows),
        "question_digest": seen.hexdigest(),
        "swap_scans": args.swap_scans,
        **{name: getattr(args, name) for name in names},
        **({"seed": args.seed} if args.scheduler == "random" else {}),
        "slices": args.slices,
        "window": list(args.window),
        "cached_scans": args.cache_dir is not None,
        "dtype": dtype,
        "device": device.type,
    }


def relative(path, root):
    """Of the folder of scans, so that a run goes on after it was moved."""
    return os.path.relpath(path, root) if root else str(path)


def fingerprint(model, revision):
    """Hub id and commit, or a digest of a folder's weights and settings: a checkpoint trained on is another model."""
    if not Path(model).is_dir():
        config, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
        return f"{model}@{config.get('_commit_hash')}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(model).iterdir()):
        if file.is_file() and file.suffix in WEIGHTS:
            digest.update(file.name.encode())
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()


def open_run(folder, settings):
    """Make the run's folder, or check that it holds this run. One that has no prediction yet may become another."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.json"
    if any(found.stat().st_size for found in prediction_files(folder)):
        if not file.exists():
            raise RunError(f"--output has a {PREDICTIONS} but no run.json; whose they are is unknown. Choose another.")
        held = json.loads(file.read_text(encoding="utf-8"))
        other = [
            f"{name}: {held.get(name)!r} there, {settings.get(name)!r} now"
            for name in sorted(held | settings)
            if held.get(name) != settings.get(name)
        ]
        if other:
            listed = ["--output holds another run; choose another folder. What differs:", *other]
            raise RunError("\n  ".join(listed))
    replace(file, json.dumps(settings, indent=2) + "\n")


def prediction_files(folder):
    """Those of a run that are there: the run's own or rank 0's, then the other ranks'."""
    return [*folder.glob(PREDICTIONS), *sorted(folder.glob(PART.format("*")))]


def collect(folder, ids):
    """{id: line} of all predictions in a run's folder. A line cut short at a file's end is forgotten.

    Raises: `RunError` that names file and line of anything else that is no prediction of these questions.
    """
    lines = {}
    for file in prediction_files(folder):
        text = file.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            try:
                name = json.loads(line)["id"]
            except (ValueError, KeyError, TypeError):
                name = None
            if not isinstance(name, str) or name not in ids or lines.setdefault(name, line) != line:
                raise RunError(
                    f"{file.name} line {number} is no prediction of this run, or a second one. Remove the line; its "
                    "question is asked again."
                )
    return lines


def merge(folder, lines, ids):
    """All predictions into one file, in the order of the questions; the ranks' own files go."""
    replace(folder / PREDICTIONS, "".join(f"{lines[name]}\n" for name in ids if name in lines))
    for file in folder.glob(PART.format("*")):
        file.unlink()


def replace(file, text):
    """Write a file whole or not at all."""
    partial = file.with_name(file.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


# === A run ===========================================================================================================


def ranks():
    """(rank, how many): 0, 1 alone; else as torchrun or `accelerate launch` started them."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    # gloo on any device: what travels is text; the timeout is how long one rank may wait for the slowest
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    return dist.get_rank(), dist.get_world_size()


def evaluate(args):
    """Answer what is not answered yet. Returns the rows and {id: record} on rank 0, `None` elsewhere."""
    rank, world = ranks()
    rows = questions(args)
    device = usable_device(args.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    ids, done = {row["id"]: None for row in rows}, [None]
    if rank == 0:
        open_run(args.output, identity(args, rows, device))
        lines = collect(args.output, ids)
        merge(args.output, lines, ids)
        done = [lines]
    if world > 1:
        dist.broadcast_object_list(done)
    lines, done = done[0], set(done[0])
    groups = grouped(rows)
    open_groups = {key: part for key, part in groups.items() if any(row["id"] not in done for row in part)}
    mine = dealt(open_groups, world)[rank]
    fresh = answer_groups(args, device, {key: groups[key] for key in mine}, done, rank) if mine else {}
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object(fresh, parts)
        dist.destroy_process_group()
        if rank:
            return None
        fresh = {name: line for part in parts for name, line in part.items()}
    lines |= fresh
    merge(args.output, lines, ids)
    return rows, {name: json.loads(lines[name]) for name in ids}  # in this order: sums must not hang on the history


def questions(args):
    """The benchmark's rows, checked; in a run also that their scans are there."""
    rows = load_benchmark(
        args.benchmark, args.data, volumes=args.volumes, split=args.split, revision=args.data_revision,
        tasks=args.tasks, limit=args.limit, faults=args.faults,
    )  # fmt: skip
    if not rows:
        raise RunError("There are no questions; check --data and --tasks.")
    missing = missing_report(rows, args.benchmark) if args.model else ""
    if missing and (args.missing == "stop" or args.swap_scans):
        advice = "Ask about fewer questions (--tasks, --limit), or count theirs as wrong (--missing record)."
        raise RunError(f"{missing}\n{advice}")
    return swapped(rows, args.seed) if args.swap_scans else rows


def answer_groups(args, device, groups, done, rank):
    """Answer a rank's groups. Returns {id: line}, each of which is already in the rank's file."""
    scheduling = {"token_budget": args.token_budget, "keep_ratio": args.keep_ratio}
    scheduling |= {"use_scheduler": {"on": None, "off": False}.get(args.scheduler, True)}
    names = ("revision", "trust_remote_code", "dtype", "modality", "max_new_tokens", "cache_dir", "slices", "window")
    model = load_model(
        args.model,
        device,
        scheduling={name: value for name, value in scheduling.items() if value is not None},
        **{name: getattr(args, name) for name in names},
    )
    if args.scheduler in CONTROLS:
        decoder = model.model.model.language_model
        decoder.scheduler = ControlScheduler(decoder.scheduler, args.scheduler, args.seed)
    by_letter = args.choices == "logprob"
    scans, fresh = Scans(model, list(groups), args.read_ahead), {}
    total = sum(row["id"] not in done for rows in groups.values() for row in rows)
    start = time.perf_counter()
    path = args.output / (PART.format(rank) if rank else PREDICTIONS)
    with (
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=total, unit="question", disable=rank > 0 or None) as bar,
    ):
        for key, rows in groups.items():
            taken = scans.take(key)
            refused = next((scan.fault for scan in taken if isinstance(scan, Refused)), None)
            for batch in batches(rows, args.batch_size, by_letter):
                if all(row["id"] in done for row in batch):
                    continue
                if refused is None:
                    answers = model.answer(batch, taken, by_letter and batch[0]["kind"] == "choice")
                else:
                    answers = [{"prediction": "", "refused": refused}] * len(batch)
                for row, answer in zip(batch, answers, strict=True):
                    if row["id"] in done:
                        continue
                    line = json.dumps({"id": row["id"], **answer}, ensure_ascii=False)
                    fresh[row["id"]] = line
                    file.write(line + "\n")
                    file.flush()
                    bar.update()
    seconds = time.perf_counter() - start
    if rank == 0:
        print(f"{total} questions, {len(scans.left)} scans, {total / seconds:.2f} questions/s here", file=sys.stderr)
    return fresh


def summary(args, rows, records):
    """Scores as JSON, with what was refused and how much was kept."""
    train = None
    if args.train:
        split = None if args.benchmark == "jsonl" else "train"  # one's own file is what it is named
        train = load_benchmark(args.benchmark, args.train, split=split, tasks=args.tasks)
    scores = score(rows, {name: record["prediction"] for name, record in records.items()}, train=train,
                   bootstrap=args.bootstrap, seed=args.seed)  # fmt: skip
    refused = {}
    for row in rows:
        fault = records[row["id"]].get("refused")
        if fault:
            entry = refused.setdefault(fault, {"questions": 0, "scans": set()})
            entry["questions"] += 1
            entry["scans"].update(scan_keys(row))
    refused = {fault: {**entry, "scans": len(entry["scans"])} for fault, entry in sorted(refused.items())}
    kept = [records[row["id"]].get("kept") for row in rows]
    kept = [ratio for ratio in kept if ratio is not None]
    kept = {"mean": sum(kept) / len(kept), "min": min(kept), "max": max(kept)} if kept else None
    return {"benchmark": args.benchmark, "questions": len(rows), "refused": refused, "kept": kept, "scores": scores}


def show(result):
    """The table, and beneath it what it does not tell."""
    print(table(result["scores"]))
    if result["kept"]:
        print(
            "\nVisual tokens kept: {mean:.3f} of all, from {min:.3f} to {max:.3f} a question.".format(**result["kept"])
        )
    for fault, count in result["refused"].items():
        print(f"Refused with {fault}: {count['scans']} scans, {count['questions']} questions, counted as wrong.")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("questions")
    group.add_argument("--benchmark", choices=sorted(BENCHMARKS), required=True)
    group.add_argument("--data", required=True, metavar="SOURCE", help="folder, file or Hub id of the questions")
    group.add_argument("--volumes", metavar="FOLDER", help="where the scans are")
    group.add_argument("--split", help="of the questions (default: the benchmark's test split)")
    group.add_argument("--data-revision", metavar="REVISION", help="branch, tag or commit of --data on the Hub")
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="only these")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    group.add_argument("--faults", choices=["refuse", "leave-out"], default="refuse", help="questions with faults")
    group.add_argument("--missing", choices=["stop", "record"], default="stop", help="what to do about absent scans")
    group.add_argument("--swap-scans", action="store_true", help="ask each question about another patient's scan")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="folder or Hub id: Photon, or any image-text-to-text model")
    group.add_argument("--revision", help="branch, tag or commit of --model on the Hub")
    group.add_argument("--trust-remote-code", action="store_true", help="run code of a model other than Photon")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    group.add_argument("--batch-size", type=positive, default=8, metavar="N", help="questions on one scan at a time")
    group.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="longest answer")
    group.add_argument("--choices", choices=["generate", "logprob"], default="generate",
                       help="multiple choice: write an answer, or take the likeliest letter")  # fmt: skip
    group.add_argument(
        "--scheduler",
        choices=["on", "off", *CONTROLS],
        default="on",
        help="on: as the model was trained; off keeps all visual tokens; random, flipped: others, as many",
    )
    group.add_argument("--token-budget", type=int, metavar="K", help="keep exactly the K most salient visual tokens")
    group.add_argument("--keep-ratio", type=float, metavar="R", help="keep this share of the visual tokens")
    group = parser.add_argument_group("scans")
    group.add_argument("--modality", choices=["auto", "ct", "mr"], default="auto", help="what the scans are")
    group.add_argument("--cache-dir", metavar="FOLDER", help="keep scans preprocessed there, in half precision")
    group.add_argument(
        "--read-ahead", type=positive, default=2, metavar="N", help="scans read while one is asked about"
    )
    group.add_argument("--slices", type=positive, default=16, metavar="N", help="axial slices for a 2D model")
    group.add_argument("--window", type=float, nargs=2, default=[-160.0, 240.0], metavar=("LO", "HI"),
                       help="HU that are black and white in them (default: soft tissue)")  # fmt: skip
    group = parser.add_argument_group("scores")
    group.add_argument("--output", type=Path, metavar="RUN", help="folder of the run")
    group.add_argument("--score", type=Path, metavar="FILE", help="score these predictions; no model is run")
    group.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="compare two files of predictions")
    group.add_argument("--train", metavar="SOURCE", help="training questions, for the majority baseline")
    group.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamplings of the patients")
    group.add_argument("--seed", type=int, default=0, help="of the resampling, and of --swap-scans")
    args = parser.parse_args(argv)
    wrong = wrong_arguments(args)
    if wrong:
        parser.error(wrong)
    return args


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number above 0")
    return number


def wrong_arguments(args):
    """What is wrong with the arguments, or `None`."""
    modes = [name for name in ("--model", "--score", "--compare") if getattr(args, name[2:]) is not None]
    if len(modes) != 1:
        return "Give one of --model (a run), --score (predictions) and --compare (two files of predictions)."
    if args.model and not Path(args.model).is_dir() and not HUB_ID.fullmatch(args.model):
        return f"There is no folder {args.model}, and it is no Hub id (owner/name). Check --model."
    if args.model and not args.output:
        return "A run needs --output, the folder for its predictions."
    if args.swap_scans and not args.model:
        return "--swap-scans is for a run; predictions of swapped scans are scored as they are."
    if args.scheduler in CONTROLS and (args.token_budget, args.keep_ratio) != (None, None):
        return f"--scheduler {args.scheduler} keeps as many tokens as the scheduler would; give no other number."
    if sum((args.scheduler == "off", args.token_budget is not None, args.keep_ratio is not None)) > 1:
        return "--scheduler off, --token-budget and --keep-ratio exclude each other."
    if args.token_budget is not None and args.token_budget < 0:
        return "--token-budget is a number of tokens, 0 or more."
    if args.keep_ratio is not None and not 0 <= args.keep_ratio <= 1:
        return "--keep-ratio is a share from 0 to 1."
    if not args.window[0] < args.window[1]:
        return "--window takes two numbers, the lower one first."
    return None


def run(args):
    if args.compare:
        rows = questions(args)
        first, second = (read_predictions(file, rows) for file in args.compare)
        result = compare(rows, first, second, bootstrap=args.bootstrap, seed=args.seed)
        print(json.dumps(result, indent=2))
    elif args.score:
        rows = questions(args)
        read_predictions(args.score, rows)  # names faulty lines
        lines = args.score.read_text(encoding="utf-8").split("\n")  # `splitlines` would also cut within an answer
        records = {record["id"]: record for record in map(json.loads, filter(str.strip, lines))}
        result = summary(args, rows, records)
        show(result)
    else:
        found = evaluate(args)
        if found is None:
            return
        result = summary(args, *found)
        show(result)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        name = "comparison.json" if args.compare else "scores.json"
        replace(args.output / name, json.dumps(result, indent=2) + "\n")


def main(argv=None):
    args = parse(argv)
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            run(args)
    except torch.OutOfMemoryError:
        raise SystemExit("Out of memory. Lower --batch-size, and start a new --output for it.") from None
    except (ValueError, OSError, ImportError) as error:  # a fault of the input or the machine, not of the program
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
