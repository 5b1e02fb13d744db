"""The file of predictions: a line of JSON for each question, with `id` and `prediction`, and what else is known."""

import json
from collections import Counter
from pathlib import Path

from photon.rows import RowError, listed, read_rows
from photon.run_folder import RunError, write_whole

PREDICTIONS, PART = "predictions.jsonl", "predictions.rank{}.jsonl"


def read_records(path, rows=None):
    """{id: record} of a file of predictions.

    Args: rows: the questions; then each must have exactly one prediction.
    Raises: `RowError` that names the faulty lines.
    """
    found, first, faults = {}, {}, []
    known = None if rows is None else {row["id"] for row in rows}
    name = Path(path).name
    for place, record in read_rows(path, skip_empty=True):
        line = place.removeprefix(f"{name} ")
        fault = record if isinstance(record, RowError) else _fault(record, first, known)
        if fault:
            faults.append(f"{line}: {fault}")
        else:
            first[record["id"]] = line
            found[record["id"]] = record
    if rows is not None:
        faults += [f"question {row['id']}: no prediction" for row in rows if row["id"] not in found]
    if faults:
        raise RowError(listed(f"{name} has {len(faults)} faults", faults))
    return found


def _fault(record, first, known):
    wrong = [key for key in ("id", "prediction") if not isinstance(record.get(key), str)]
    if wrong:
        return f"no text under {' and '.join(map(repr, wrong))}"
    if record["id"] in first:
        return f"a second prediction of the question of {first[record['id']]}"
    return None if known is None or record["id"] in known else "an id of no question"


def read_predictions(path, rows=None):
    """{id: text} of a file of predictions; arguments and errors as in `read_records`."""
    return {name: record["prediction"] for name, record in read_records(path, rows).items()}


def matched(rows, predictions):
    """The benchmark's name, and the predictions in the order of the rows. Raises `RowError` where they differ."""
    names = sorted({row["benchmark"] for row in rows})
    if len(names) != 1:
        raise ValueError(f"Rows are of {', '.join(names) or 'no benchmark'}; score one benchmark at a time.")
    ids = Counter(row["id"] for row in rows)
    faults = [f"question {name}: {count} rows have this id" for name, count in ids.items() if count > 1]
    faults += [f"question {name}: no prediction" for name in ids if name not in predictions]
    faults += [f"prediction {name}: no question" for name in predictions if name not in ids]
    if faults:
        raise RowError(listed(f"Predictions and questions do not match in {len(faults)} places", faults))
    return names[0], [predictions[row["id"]] for row in rows]


# === A run's file ====================================================================================================


def line_of(record):
    return json.dumps(record, ensure_ascii=False) + "\n"


def prediction_files(folder):
    """Those of a run that exist: the run's own or rank 0's, then the other ranks'."""
    return [*folder.glob(PREDICTIONS), *sorted(folder.glob(PART.format("*")))]


def collect(folder, ids):
    """{id: record} of all predictions in a run's folder. A line cut short at a file's end is left out.

    Raises: `RunError` that names file and line of anything that is not a prediction of these questions.
    """
    records = {}
    for file in prediction_files(folder):
        for place, record in read_rows(file, skip_unfinished=True):
            name = None if isinstance(record, RowError) else record.get("id")
            if not isinstance(name, str) or name not in ids or records.setdefault(name, record) != record:
                raise RunError(
                    f"{place} is no prediction of this run, or a second one. Remove the line; its question is asked "
                    "again."
                )
    return records


def merge(folder, records, ids):
    """Writes all predictions into one file, in the order of the questions, and removes the ranks' own files."""
    write_whole(folder / PREDICTIONS, "".join(line_of(records[name]) for name in ids if name in records))
    for file in folder.glob(PART.format("*")):
        file.unlink()
