"""Your questions: rows of the training format, as JSON lines or a set of `datasets`."""

import json
import re
from pathlib import Path

from photon.evaluation.benchmark import Benchmark
from photon.evaluation.measures import Short
from photon.evaluation.scans import patient_of
from photon.rows import RowError
from photon.training.batches import scan_source


class OwnQuestions(Benchmark):
    name = "jsonl"
    title = "questions of your own, in the training format"
    splits = {"test": ("*.jsonl",)}
    train_split = "train"
    questions = "rows as for training (README): .jsonl, .parquet, or a folder of save_to_disk or of parquet files"
    scans = "those that the rows name, relative to volumes"

    def check_split(self, split):
        """Any: a set of `datasets` names its own splits."""

    def files(self, folder, split):
        from photon.training.sources import SAVED

        if any((folder / name).is_file() for name in SAVED):
            return [folder]
        return super().files(folder, self.default_split) or ([folder] if any(folder.rglob("*.parquet")) else [])

    def rows(self, source):
        """Training rows; `kind`, `subtask`, `patient`, `options` and `choices` are taken where a row gives them."""
        from photon.training.data import load_rows  # needs datasets, which other benchmarks do not
        from photon.training.sources import read_records

        file = source.file
        split = _split(file, source.split)
        good = load_rows(file, split, source.scans.root)
        for (place, record), row in zip(read_records(file, split), good, strict=True):
            try:
                yield place, _row(record, row)
            except RowError as error:
                yield place, error

    def measure(self, rows, texts):
        """Answers in words get exact match and balanced accuracy beside BLEU-1 and ROUGE-1."""
        return Short(rows, texts) if self.rule(rows[0]) == "text" else super().measure(rows, texts)


def _split(file, wanted):
    """The split to read: `wanted`, or the only one; `None` where there are no splits."""
    if isinstance(file, dict):  # `DatasetDict`
        names = list(file)
    elif not isinstance(file, Path) or file.is_file():
        return None
    elif (file / "dataset_dict.json").is_file():
        names = json.loads((file / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    elif any(file.glob("*.arrow")):  # a single set of `save_to_disk`
        return None
    else:
        from datasets import get_dataset_split_names

        names = get_dataset_split_names(str(file))
    if wanted not in names and len(names) > 1:
        raise RowError(f"The set has no split {wanted!r}; it has {', '.join(names)}. Name one by --split.")
    return wanted if wanted in names else names[0]


def _row(record, row):
    options = record.get("options")
    if options is not None and not isinstance(options, dict):
        raise RowError('its options are not an object like {"A": text}')
    options = options and {letter: text for letter, text in options.items() if text is not None}  # Arrow's filling
    choices = record.get("choices") or (list(options) if options else None)
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", row["answer"])
    kind = record.get("kind") or ("choice" if choices else "number" if number else "text")
    if kind not in ("choice", "number", "text"):
        raise RowError(f"its kind is {kind!r}; expected choice, number or text")
    if kind == "choice" and row["answer"] not in (choices or ()):
        raise RowError(f"its answer {row['answer'][:20]!r} is none of the choices {', '.join(choices or ['-'])}")
    volumes = [scan_source(scan) for scan in row["volumes"]]
    volumes = [scan["path"] if list(scan) == ["path"] else scan for scan in volumes]
    first = row["volumes"][0]["path"] if volumes else row["where"]
    asked = [part["text"] for part in row["messages"][-2]["content"] if part["type"] == "text"]
    messages = [
        {"role": m["role"], "content": [{k: v for k, v in part.items() if v is not None} for part in m["content"]]}
        for m in row["messages"]
    ]
    return {
        "id": row["id"] or f"jsonl/{row['example'] + 1:06d}",
        "benchmark": "jsonl",
        "task": row["task"] or "",
        "subtask": str(record.get("subtask") or ""),
        "kind": kind,
        "patient": str(record.get("patient") or patient_of(first)),
        "volumes": volumes,
        "messages": messages,
        "question": str(record.get("question") or " ".join(asked)),
        "answer": row["answer"],
        "options": options,
        "choices": choices,
    }
