"""Questions about scans, from a file or a set of `datasets` to rows of one shape, for training and evaluation.

A row has `messages` (a chat whose last turn is the assistant's) and `volumes` (a path for each scan, relative to the
file's folder or to `volume_root`). `{"type": "volume"}` in a content list marks the place of a scan, `<volume>` or
`<video>` in plain text. `videos` is another name of `volumes`, as in the authors' release. Optional: `id`, `task`,
`answer`, for `--token-labels` `labels` and `lesions` (label maps beside the scans), and for `--evidence-weight`
`labels` and `evidence` (the values in them that the question is about).

- `load_rows`: rows with one shape, every fault named by file and line before training starts;
- `check_files`, `check_rows`: scans that are missing; rows that are too long or leave nothing to learn.
`photon.training.batches` makes batches of them. Messages name a row by its file and line, never by its scan.
"""

import json
import os
import re
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value
from tqdm import tqdm

from photon.processing_photon import READ_OPTIONS
from photon.read_options import checked_option
from photon.rows import RowError, build_rows, kind_of
from photon.training.batches import conversation
from photon.training.sources import EmbeddedScans, read_records

MARK = re.compile(r"<volume>|<video>")
ROLES = ("system", "user", "assistant")
VOLUME_KEYS = {"path", *READ_OPTIONS}
FEATURES = Features(
    {
        "where": Value("string"),  # file and line, for messages
        "example": Value("int64"),  # number in the data set, from which random draws follow
        "id": Value("string"),
        "task": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "volumes": List(
            {"path": Value("string"), "series": Value("string"), "frame": Value("int64"), "read": Value("string")}
        ),  # read: JSON of the other reading options, or null
        "labels": List(Value("string")),
        "lesions": List(Value("string")),
        "evidence": List(Value("int64")),
        "answer": Value("string"),
    }
)


# === Rows ============================================================================================================


def load_rows(source, split=None, volume_root=None, columns=None, embedded=None):
    """Rows of one shape (`FEATURES`) from a file, a folder, a data set of the Hub, or a set in memory.

    Args:
        source, split: as `read_records` takes them.
        volume_root: folder to which relative paths of scans belong; default that of the file, or the current one.
        columns: {name: feature of `datasets`} of further columns to keep; null where a row has none.
        embedded: folder for scans that the set holds as bytes; default one that goes when the process ends.
    Raises: `RowError` with each faulty row's file and line.
    """
    if volume_root is None:
        local = isinstance(source, str | Path) and Path(source).exists()
        volume_root = (Path(source) if Path(source).is_dir() else Path(source).parent) if local else ""
    root, columns, scans = Path(volume_root), columns or {}, EmbeddedScans(embedded)

    def build(record):
        return {name: record.get(name) for name in columns} | _row(record, root, scans)

    rows, faults = [], []
    for where, row in build_rows(read_records(source, split), build):
        if isinstance(row, RowError):
            faults.append(f"{where}: {row}")
        else:
            rows.append({"where": where, "example": len(rows), **row})
    if faults:
        raise RowError.of(faults, "faulty rows")
    if not rows:
        raise RowError("The data set holds no rows; a .jsonl file has one JSON object a line.")
    return Dataset.from_list(rows, features=Features(columns | FEATURES))


def _row(record, root, scans):
    if record.get("volumes") and record.get("videos"):
        raise RowError("has both 'volumes' and 'videos', two names of one thing; keep one")
    listed = _list(record, "volumes") or _list(record, "videos")
    if record.get("messages") is None:
        raise RowError(f"'messages' is null; expected a chat (the row has {', '.join(sorted(record)) or 'nothing'})")
    messages, inline = _messages(record["messages"])
    if inline and listed:
        raise RowError("names scans both within 'messages' and in 'volumes'; keep one")
    volumes = [_volume(entry, root, scans) for entry in inline or listed]
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


def _volume(entry, root, scans):
    entry = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, dict) else entry
    entry = entry if isinstance(entry, dict) else {"path": entry}
    for name in ("path", "volume"):
        if isinstance(entry.get(name), dict):  # a `Nifti` feature within a content part
            entry = entry | entry.pop(name)
    unknown = set(entry) - VOLUME_KEYS - {"bytes"}
    if unknown:
        raise RowError(
            f"a scan has the keys {sorted(unknown)}; expected 'path', and {', '.join(READ_OPTIONS)} if need be"
        )
    try:
        options = {name: checked_option(name, entry[name]) for name in READ_OPTIONS if name in entry}
    except ValueError as error:
        raise RowError(str(error)) from error
    series, frame = options.pop("series", None), options.pop("frame", None)
    path = entry.get("path")
    if entry.get("bytes") is not None and not (isinstance(path, str) and (root / path).is_file()):
        if not isinstance(entry["bytes"], bytes):
            raise RowError(f"a scan's 'bytes' is {kind_of(entry['bytes'])}; expected those of a NIfTI file, or 'path'")
        path = scans.path(entry["bytes"])
    return {
        "path": str(root / _string(path, "volumes")),
        "series": None if series is None else str(series),
        "frame": frame,
        "read": json.dumps(options, sort_keys=True) if options else None,
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
                named = {key: part[key] for key in (*VOLUME_KEYS, "volume", "bytes") if part.get(key) is not None}
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


def check_files(rows, losses=()):
    """Raises `RowError` that lists every row with a scan, or a label map that one of the losses needs, whose file does
    not exist."""
    faults, known = [], {}

    def exists(path):
        if path not in known:
            known[path] = os.path.exists(path)
        return known[path]

    columns = ["where", "volumes", "labels", "lesions", *{name for loss in losses for name in loss.columns}]
    for row in rows.select_columns(columns):
        paths = [(f"scan {i}", volume["path"]) for i, volume in enumerate(row["volumes"], start=1)]
        if any(loss.needs_label_maps(row) for loss in losses):
            if len(row["labels"]) != len(row["volumes"]):
                faults.append(f"{row['where']}: no 'labels', which a loss from label maps needs")
            for name in ("labels", "lesions"):
                paths += [(f"{name} {i}", path) for i, path in enumerate(row[name], start=1)]
        missing = [f"{name} of {len(row['volumes'])}" for name, path in paths if not exists(path)]
        if missing:
            faults.append(f"{row['where']}: {', '.join(missing)} is missing")
    if faults:
        raise RowError("\n  ".join([f"{len(faults)} rows name files that do not exist:", *faults]))


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
            length = len(ids) + len(row["volumes"]) * (visual - 1)  # one placeholder of each is counted already
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
