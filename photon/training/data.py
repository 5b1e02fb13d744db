"""Questions about scans, from a JSONL file or a Hub data set to the model's inputs, for training and evaluation.

A row has `messages` (a chat whose last turn is the assistant's) and `volumes` (a path for each scan, from the file's
own folder or `volume_root`). In a content list `{"type": "volume"}` stands where a scan goes; in plain text `<volume>`
or `<video>` does. `videos` is another name of `volumes`, as in the authors' release. Optional: `id`, `task`, `answer`,
for `--token-labels` `labels` and `lesions` (label maps beside the scans), and for `--evidence-weight` `labels` and
`evidence` (the values in them that the question is about).

- `load_rows`: rows with one shape, every fault named by file and line before training starts;
- `check_files`, `check_rows`: scans that are missing; rows that are too long or leave nothing to learn;
- `ScanSampler`: the order of rows in which questions on one scan come together, and like rows in a batch;
- `Collator`: rows to a batch, padded on the left, labels on the assistant's tokens alone.
Scans stay paths until the collator. Messages name a row by its file and line, never by its scan.
"""

import json
import os
import random
import re
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value, load_dataset
from torch.utils.data import Sampler
from tqdm import tqdm

from photon.rows import RowError, build_rows, kind_of, read_rows

MARK = re.compile(r"<volume>|<video>")
ROLES = ("system", "user", "assistant")
VOLUME_KEYS = {"path", "series", "frame"}
FEATURES = Features(
    {
        "where": Value("string"),  # file and line, for messages
        "example": Value("int64"),  # number in the data set, from which random draws follow
        "id": Value("string"),
        "task": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "volumes": List({"path": Value("string"), "series": Value("string"), "frame": Value("int64")}),
        "labels": List(Value("string")),
        "lesions": List(Value("string")),
        "evidence": List(Value("int64")),
        "answer": Value("string"),
    }
)


# === Rows ============================================================================================================


def load_rows(source, split=None, volume_root=None):
    """Rows of one shape (`FEATURES`) from a JSONL file, or from a data set of the Hub.

    Args:
        source: path of a .jsonl file, or a Hub id.
        split: of a Hub data set; default "train".
        volume_root: folder from which relative paths of scans count; default the file's own.
    Raises: `RowError` with each faulty row's file and line.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json") or path.exists():
        if split is not None:
            raise ValueError(f"split {split!r} is for data sets of the Hub; a file was given.")
        if not path.is_file():
            raise FileNotFoundError(f"There is no data file {path.name}; expected a .jsonl file.")
        root = path.parent if volume_root is None else Path(volume_root)
        records = read_rows(path)
    else:
        split = split or "train"
        data = load_dataset(str(source), split=split)
        root = Path() if volume_root is None else Path(volume_root)
        records = ((f"{source} {split} row {number}", record) for number, record in enumerate(data))
    rows, faults = [], []
    for where, row in build_rows(records, lambda record: _row(record, root)):
        if isinstance(row, RowError):
            faults.append(f"{where}: {row}")
        else:
            rows.append({"where": where, "example": len(rows), **row})
    if faults:
        raise RowError.of(faults, "faulty rows")
    if not rows:
        raise RowError(f"{path.name} holds no rows; expected one JSON object a line.")
    return Dataset.from_list(rows, features=FEATURES)


def _row(record, root):
    if record.get("volumes") and record.get("videos"):
        raise RowError("has both 'volumes' and 'videos', two names of one thing; keep one")
    listed = _list(record, "volumes") or _list(record, "videos")
    messages, inline = _messages(record.get("messages"))
    if inline and listed:
        raise RowError("names scans both within 'messages' and in 'volumes'; keep one")
    volumes = [_volume(entry, root) for entry in inline or listed]
    places = sum(part["type"] == "volume" for message in messages for part in message["content"])
    if places != len(volumes):
        raise RowError(
            f'{places} places for scans in \'messages\', but {len(volumes)} scans; write {{"type": "volume"}}, or '
            "<volume> in plain text, once for each"
        )
    if messages[-1]["role"] != "assistant" or not _text(messages[-1]).strip():
        raise RowError("a prompt without an answer; the last message must be the assistant's, and not empty")
    maps = {name: [str(root / _string(path, name)) for path in _list(record, name)] for name in ("labels", "lesions")}
    for name, paths in maps.items():
        if len(paths) not in (0, len(volumes)):
            raise RowError(f"{len(paths)} {name!r} for {len(volumes)} scans; give one for each, or none")
    evidence = _list(record, "evidence")
    if any(type(value) is not int or value < 1 for value in evidence):
        raise RowError(f"'evidence' is {evidence}; expected values of the label maps, whole numbers from 1")
    known = {name: None if record.get(name) is None else str(record[name]) for name in ("id", "task", "answer")}
    known["answer"] = known["answer"] or _text(messages[-1]).strip()
    return {"messages": messages, "volumes": volumes, **maps, "evidence": evidence, **known}


def _list(record, name):
    value = record.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(f"{name!r} is {kind_of(value)}; expected a list")
    return value


def _string(value, name):
    if not isinstance(value, str) or not value:
        raise RowError(f"{name!r} holds {kind_of(value)}; expected paths")
    return value


def _volume(entry, root):
    entry = entry if isinstance(entry, dict) else {"path": entry}
    if entry.get("bytes") is not None:
        raise RowError("a scan is embedded as bytes; write the scans to a folder and name it by volume_root")
    unknown = {key for key, value in entry.items() if value is not None} - VOLUME_KEYS
    if unknown:
        raise RowError(f"a scan has the keys {sorted(unknown)}; expected 'path', and 'series' or 'frame' if need be")
    series, frame = entry.get("series"), entry.get("frame")
    return {
        "path": str(root / _string(entry.get("path"), "volumes")),
        "series": None if series is None else str(series),
        "frame": None if frame is None else int(frame),
    }


def _messages(messages):
    """Messages with content lists of text and volume, and the scans named in them."""
    if not isinstance(messages, list) or not messages:
        raise RowError(f"'messages' is {'empty' if messages == [] else kind_of(messages)}; expected a chat")
    out, inline = [], []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise RowError(f"a message's role is {role!r}; expected one of {', '.join(ROLES)}")
        content = message.get("content")
        parts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("volume", "video"):
                parts.append({"type": "volume", "text": None})
                named = {key: part[key] for key in VOLUME_KEYS if part.get(key) is not None}
                inline += [named] if named else []
            elif kind == "text" and isinstance(part.get("text"), str):
                parts += _split(part["text"])
            else:
                raise RowError(f"a content part of type {kind!r}; expected 'text' with a text, or 'volume'")
        if role != "user" and any(part["type"] == "volume" for part in parts):
            raise RowError(f"a scan in a turn of the {role}; scans belong to the user's turns")
        out.append({"role": role, "content": parts})
    return out, inline


def _split(text):
    """Text with marks -> text and volume parts."""
    parts, begin = [], 0
    for mark in MARK.finditer(text):
        parts += [{"type": "text", "text": text[begin : mark.start()]}, {"type": "volume", "text": None}]
        begin = mark.end()
    parts.append({"type": "text", "text": text[begin:]})
    return [part for part in parts if part["type"] == "volume" or part["text"]]


def _text(message):
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


# === Checks before training ==========================================================================================


def check_files(rows, token_labels=False):
    """Raise `RowError` that lists every row with a scan, or a label map, that is not there."""
    faults, exists = [], {}

    def there(path):
        if path not in exists:
            exists[path] = os.path.exists(path)
        return exists[path]

    for row in rows.select_columns(["where", "volumes", "labels", "lesions"]):
        paths = [(f"scan {i}", volume["path"]) for i, volume in enumerate(row["volumes"], start=1)]
        if token_labels:
            if len(row["labels"]) != len(row["volumes"]):
                faults.append(f"{row['where']}: no 'labels', which token labels need")
            for name in ("labels", "lesions"):
                paths += [(f"{name} {i}", path) for i, path in enumerate(row[name], start=1)]
        missing = [f"{name} of {len(row['volumes'])}" for name, path in paths if not there(path)]
        if missing:
            faults.append(f"{row['where']}: {', '.join(missing)} is missing")
    if faults:
        raise RowError("\n  ".join([f"{len(faults)} rows name files that are not there:", *faults]))


def check_rows(rows, processor, max_length, batch=256):
    """Each row's tokens, visual ones included; a list of int. No scan is read.

    Raises: `RowError` that lists rows whose answer `max_length` would cut away, and rows with nothing to learn.
    """
    volumes = processor.image_processor
    visual = int(torch.tensor(volumes.grid_thw).prod()) // volumes.merge_size**2
    lengths, faults = [], []
    for begin in tqdm(range(0, len(rows), batch), desc="checking rows", unit="batch", leave=False, disable=None):
        part = rows.select(range(begin, min(begin + batch, len(rows))))
        encoded = processor.tokenizer.apply_chat_template(
            [conversation(row) for row in part],
            chat_template=processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        for row, ids, mask in zip(part, encoded["input_ids"], encoded["assistant_masks"], strict=True):
            length = len(ids) + len(row["volumes"]) * (visual - 1)  # one placeholder stands there already
            lengths.append(length)
            if length > max_length:
                faults.append(
                    f"{row['where']}: {length} tokens, of which max_length {max_length} cuts the answer away"
                )
            elif not any(mask):
                faults.append(
                    f"{row['where']}: all labels are masked; the chat template marks no assistant token "
                    "({% generation %})"
                )
    if faults:
        raise RowError.of(faults, "rows cannot be learned from")
    return lengths


# === Batches =========================================================================================================


def conversation(row, answer=True):
    """A row's chat as the processor takes it; without the last turn if not `answer`."""
    volumes = iter(row["volumes"])

    def part(content):
        if content["type"] == "text":
            return {"type": "text", "text": content["text"]}
        return {"type": "volume", **reading(next(volumes))}

    messages = [{"role": m["role"], "content": [part(c) for c in m["content"]]} for m in row["messages"]]
    return messages if answer else messages[:-1]


def reading(volume):
    """A row's scan as the volume processor takes it: its path, and what to read from there."""
    out = {key: value for key, value in volume.items() if value is not None}
    if out.get("series", "").isdecimal():
        out["series"] = int(out["series"])  # a number in the list of series
    return out


class ScanSampler(Sampler):
    """Rows in random order, but those on one scan up to `together` at a time, so that a batch encodes it once, and
    batches of rows with equally many scans, so that a comparison of two does not pad the others to twice their length.

    Args: rows with `volumes`; together; batch, rows of a batch; seed, the order follows from it and from the epoch.
    """

    def __init__(self, rows, together, batch, seed):
        self.together, self.batch, self.seed, self.epoch = together, batch, seed, 0
        self.kinds = {}  # {number of scans: {scans: [numbers of rows]}}
        for number, volumes in enumerate(rows["volumes"]):
            scans = self.kinds.setdefault(len(volumes), {})
            scans.setdefault(json.dumps(volumes) if volumes else number, []).append(number)

    def __len__(self):
        return sum(len(numbers) for scans in self.kinds.values() for numbers in scans.values())

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        chance = random.Random(f"{self.seed},{self.epoch}")
        batches, rest = [], []
        for scans in self.kinds.values():
            groups = []
            for numbers in scans.values():
                numbers = chance.sample(numbers, len(numbers))
                groups += [numbers[begin : begin + self.together] for begin in range(0, len(numbers), self.together)]
            chance.shuffle(groups)
            numbers = [number for group in groups for number in group]
            whole = len(numbers) - len(numbers) % self.batch
            batches += [numbers[begin : begin + self.batch] for begin in range(0, whole, self.batch)]
            rest += numbers[whole:]
        chance.shuffle(batches)
        return (number for numbers in [*batches, rest] for number in numbers)


class Collator:
    """Rows to a batch: what the processor returns, padded on the left, and beside it

    - `labels` (B, S): the assistant's tokens, -100 elsewhere (`answers=True`; else the prompt alone is given);
    - `volume_count` (B,): scans of each row;
    - `example` (B,): number of each row in the data set;
    - `volume_index`: a scan that several rows ask about is given, and encoded, once (see `PhotonModel.forward`);
    - `token_targets`, with `token_labels`: for each scan (T, P, 2, C), what each patch of its visual tokens holds;
      `evidence`: for each row a list of the labels that it asks about.

    Args:
        max_length: longer rows are refused; nothing is ever cut.
        cache_dir: folder where scans are kept preprocessed, in float16; `None` reads them each time.
        token_labels: a `TokenLabels`, or `None`.
    """

    def __init__(self, processor, max_length, cache_dir=None, answers=True, token_labels=None):
        self.processor, self.max_length, self.cache_dir = processor, max_length, cache_dir
        self.answers, self.token_labels = answers, token_labels

    def __call__(self, rows):
        try:
            return self._batch(rows)
        except RowError:
            raise
        except ValueError as error:  # of a scan that cannot be read, say
            for row in rows if len(rows) > 1 else ():
                self([row])  # raises with the one row's place
            raise RowError(f"{rows[0]['where']}: {error}") from error

    def _batch(self, rows):
        batch = self._encode(rows)
        lengths = batch["attention_mask"].sum(-1).tolist()
        for row, length in zip(rows, lengths, strict=True):
            if length > self.max_length:
                raise RowError(f"{row['where']}: {length} tokens, but max_length is {self.max_length}; nothing is cut")
        if self.answers:
            learned = batch.pop("assistant_masks").bool()
            batch["labels"] = batch["input_ids"].masked_fill(~learned, -100)
            for row, some in zip(rows, learned.any(-1).tolist(), strict=True):
                if not some:
                    raise RowError(
                        f"{row['where']}: all labels are masked; the chat template marks no assistant token"
                    )
        batch["volume_count"] = torch.tensor([len(row["volumes"]) for row in rows])
        batch["example"] = torch.tensor([row["example"] for row in rows])
        if self.token_labels is not None and batch["volume_count"].any():
            scans = [(row, number) for row in rows for number in range(len(row["volumes"]))]
            index = batch["volume_index"].tolist()
            first = [scans[index.index(volume)] for volume in range(max(index) + 1)]
            batch["token_targets"] = [self.token_labels(row, number) for row, number in first]
            batch["evidence"] = [row["evidence"] for row in rows]
        return dict(batch)

    def _encode(self, rows):
        chats = [conversation(row, self.answers) for row in rows]
        batch = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=not self.answers,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "cache_dir": self.cache_dir, "share_volumes": True},
        )
        if self.answers:
            batch["assistant_masks"] = self._assistant_masks(chats, batch)
        return batch

    def _assistant_masks(self, chats, batch):
        """(B, S): the assistant's tokens. From the chats with one mark a scan, since the processor's own mask, made of
        places in texts with all marks, takes longer than everything else here."""
        mark = self.processor.video_token_id
        encoded = self.processor.tokenizer.apply_chat_template(
            chats,
            chat_template=self.processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        grids = batch.get("video_grid_thw", torch.zeros(0, 3, dtype=torch.long))
        tokens = iter((grids.prod(-1) // self.processor.image_processor.merge_size**2).tolist())
        masks = torch.zeros_like(batch["input_ids"])
        for row, (ids, mask) in enumerate(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)):
            ids, mask = torch.tensor(ids), torch.tensor(mask)
            times = torch.ones_like(ids)
            times[ids == mark] = torch.tensor(
                [next(tokens) for _ in range(int((ids == mark).sum()))], dtype=torch.long
            )
            real = batch["attention_mask"][row].bool()
            if not torch.equal(ids.repeat_interleave(times), batch["input_ids"][row][real]):
                raise RuntimeError("the tokenizer splits a prompt otherwise when a scan has many marks")
            masks[row, real] = mask.repeat_interleave(times)
        return masks
