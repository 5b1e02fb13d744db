"""Records of question files: CSV, a JSON list, JSON lines; each with its place, "FILE line 3", for messages."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from photon.evaluation.scans import ScanFolder
from photon.rows import RowError, read_rows


@dataclass
class Source:
    """The question files of a benchmark's split, and the folder of the scans."""

    benchmark: object
    split: str
    files: list
    root: Path
    scans: ScanFolder

    @property
    def file(self):
        """The one question file."""
        return self.files[0]

    def name(self, file):
        """A question file's name for messages."""
        return str(file.relative_to(self.root)) if file.is_relative_to(self.root) else file.name


def records(source, columns):
    """The records of a source's one file: a CSV whose columns are checked, or JSON."""
    return csv_records(source, source.file, columns) if source.file.suffix == ".csv" else json_records(source)


def csv_records(source, file, required):
    """(place, record or `RowError`) of a CSV's records.

    Args: required: names of columns that must exist; a tuple among them holds names of which one must exist.
    Raises: `RowError` where the file is no such CSV.
    """
    name = source.name(file)
    with open(file, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            columns = set(reader.fieldnames or [])
            absent = [n if isinstance(n, str) else " or ".join(n) for n in required
                      if not columns & ({n} if isinstance(n, str) else set(n))]  # fmt: skip
            if absent:
                raise RowError(
                    f"{name} line 1: no column {', '.join(absent)}; there are {reader.fieldnames or 'none'}."
                )
            line = reader.line_num + 1
            for record in reader:
                place, line = f"{name} line {line}", reader.line_num + 1
                if None in record or None in record.values():
                    count = len(reader.fieldnames)
                    yield place, RowError(f"its fields are not as many as the {count} columns")
                else:
                    yield place, {key: value.strip() for key, value in record.items()}
        except UnicodeDecodeError as error:
            raise RowError(f"{name} line {reader.line_num + 1}: not UTF-8 ({error.reason}).") from error
        except csv.Error as error:
            raise RowError(f"{name} line {reader.line_num + 1}: not CSV ({error}).") from error


def json_records(source):
    """(place, record or `RowError`) of a source's one file: a JSON list, {"questions": list}, or JSON lines."""
    file = source.file
    if file.suffix == ".jsonl":
        yield from read_rows(file, source.name(file))
        return
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RowError(f"{file.name}: not JSON ({error}).") from error
    data = data.get("questions") if isinstance(data, dict) else data
    if not isinstance(data, list):
        raise RowError(f'{file.name}: expected a list, or {{"questions": list}}.')
    for number, record in enumerate(data, start=1):
        good = isinstance(record, dict)
        yield f"{source.name(file)} question {number}", record if good else RowError("not a JSON object")


def field(record, *names):
    """A record's value under the first of several names that has one, as text. Raises `RowError`."""
    for name in names:
        if record.get(name) not in (None, ""):
            return str(record[name]).strip()
    raise RowError(f"no {' or '.join(map(repr, names))}; it has {', '.join(map(str, sorted(record)))}")
