"""Your questions, as JSON lines in the training format."""

import re

from photon.evaluation.benchmark import Benchmark
from photon.evaluation.measures import Short
from photon.evaluation.records import json_records
from photon.evaluation.scans import patient_of
from photon.rows import RowError


class OwnQuestions(Benchmark):
    name = "jsonl"
    title = "questions of your own, in the training format"
    splits = {"test": ("*.jsonl",)}
    questions = "a .jsonl file of rows as for training (README)"
    scans = "those that the rows name, relative to volumes"

    def rows(self, source):
        """Training rows; `kind`, `subtask`, `patient`, `options` and `choices` are taken where a row gives them."""
        from photon.training.data import load_rows  # needs datasets, which other benchmarks do not

        good = load_rows(source.file, volume_root=source.scans.root)
        for (place, record), row in zip(json_records(source), good, strict=True):
            try:
                yield place, _row(record, row)
            except RowError as error:
                yield place, error

    def measure(self, rows, texts):
        """Answers in words get exact match and balanced accuracy beside BLEU-1 and ROUGE-1."""
        return Short(rows, texts) if self.rule(rows[0]) == "text" else super().measure(rows, texts)


def _row(record, row):
    options = record.get("options")
    if options is not None and not isinstance(options, dict):
        raise RowError('its options are not an object like {"A": text}')
    choices = record.get("choices") or (list(options) if options else None)
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", row["answer"])
    kind = record.get("kind") or ("choice" if choices else "number" if number else "text")
    if kind not in ("choice", "number", "text"):
        raise RowError(f"its kind is {kind!r}; expected choice, number or text")
    if kind == "choice" and row["answer"] not in (choices or ()):
        raise RowError(f"its answer {row['answer'][:20]!r} is none of the choices {', '.join(choices or ['-'])}")
    volumes = [{k: v for k, v in scan.items() if v is not None} for scan in row["volumes"]]
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
