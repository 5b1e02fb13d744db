"""Reads JSON lines, and names what is wrong in them by file and line.

for place, record in read_rows("train.jsonl"):        # ("train.jsonl line 1", {...}); a faulty line: a RowError
    ...
raise RowError.of(["train.jsonl line 3: no 'messages'"], "faulty rows")      # as many as MAX_FAULTS are spelt out
"""

import json
from pathlib import Path

MAX_FAULTS = 20  # as many are spelt out; the rest is counted


class RowError(ValueError):
    """Something wrong in rows, named by file and line. `faults`: all of them; the message has the first ones."""

    def __init__(self, message, faults=()):
        super().__init__(message)
        self.faults = list(faults)

    @classmethod
    def of(cls, faults, what):
        """One error for a list of faults, each a line of text; `what` follows their number in the first line."""
        return cls(listed(f"{len(faults)} {what}", faults), faults)


def listed(head, faults):
    """Text of `head` and the first `MAX_FAULTS` of the faults, a line each; the rest is counted."""
    more = [f"... and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
    return "\n  ".join([f"{head}:", *faults[:MAX_FAULTS], *more])


def read_rows(path, name=None, skip_empty=False, skip_unfinished=False):
    """Yields (place, record) for each line of a JSON lines file: a dict, or a `RowError` that says what is wrong.

    Args:
        name: of the file in `place`; default its last part.
        skip_empty: leave out empty lines; otherwise they are faults.
        skip_unfinished: leave out a last line without a line end, as a process that was stopped leaves it.
    """
    name = Path(path).name if name is None else name
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if (skip_empty and not line.strip()) or (skip_unfinished and not line.endswith(b"\n")):
                continue
            try:
                yield f"{name} line {number}", _record(line)
            except RowError as error:
                yield f"{name} line {number}", error


def _record(line):
    if not line.strip():
        raise RowError("the line is empty; remove it")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 ({error.reason} at byte {error.start + 1}); expected JSON lines") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON ({error.msg} at character {error.pos + 1})") from error
    if not isinstance(record, dict):
        raise RowError(f"not a JSON object but {kind_of(record)}")
    return record


def kind_of(value):
    """The type of a JSON value, for messages."""
    return "null" if value is None else type(value).__name__


def build_rows(records, build):
    """Yields (place, row or `RowError`) of (place, record or `RowError`): `build(record)` makes a row or a list of
    rows, and raises `RowError` where it cannot."""
    for place, record in records:
        try:
            if isinstance(record, RowError):
                raise record
            rows = build(record)
        except RowError as error:
            rows = error
        yield from ((place, row) for row in (rows if isinstance(rows, list) else [rows]))
