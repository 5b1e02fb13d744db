"""What `reuse="select"` costs in accuracy: runs of `evaluate_hf.py` with and without it, with paired intervals.

    for reuse in exact select; do
        python evaluate_hf.py --benchmark jsonl --data QUESTIONS.jsonl --reuse $reuse --output runs/$reuse
    done
    python benchmarks/reuse_select.py --data QUESTIONS.jsonl --runs front runs/exact runs/select

`--runs` may come several times, with a name each, for runs of other cuts (`--scheduler-layer`). Intervals are of 95 %,
of the difference, over draws of patients.
"""

import json
import sys
from pathlib import Path

import torch

from common import ROOT, arguments, report

sys.path.insert(0, str(ROOT))

from photon.evaluation.comparison import compare
from photon.evaluation.predictions import read_predictions
from photon.evaluation.questions import load_benchmark

FIGURES = ("accuracy_micro", "score_micro")  # of closed questions; of those whose answer is a number
FILE = "predictions.jsonl"


def records(run):
    """The run's lines by question."""
    lines = (run / FILE).read_text(encoding="utf-8").splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def table(name, rows, exact, select):
    """A row for each task: both ways' figures and their difference; ratios of the runs."""
    compared = compare(rows, *(read_predictions(run / FILE, rows) for run in (exact, select)))
    found = []
    for task, part in compared["tasks"].items():
        figure = next(figure for figure in FIGURES if figure in part["figures"])
        values = part["figures"][figure]
        row = {"runs": name, "task": task, "questions": part["questions"]}
        row |= {"exact": values["first"], "select": values["second"]}
        found.append(row | {f"difference_{end}": value for end, value in values["difference"].items()})
    one, two = records(exact), records(select)
    ratios = {
        f"{name}_answers_that_differ": sum(one[key]["prediction"] != two[key]["prediction"] for key in one) / len(one),
        f"{name}_kept": sum(record["kept"] for record in one.values()) / len(one),
    }
    return found, ratios


def main():
    options = arguments(
        __doc__,
        ["jsonl"],
        data={"required": True, "metavar": "FILE", "help": "questions, .jsonl"},
        runs={"required": True, "nargs": 3, "action": "append", "metavar": ("NAME", "EXACT", "SELECT"),
              "help": "a name, and two folders of evaluate_hf.py"},
    )  # fmt: skip
    rows, found, ratios = load_benchmark("jsonl", options.data), [], {}
    for name, *runs in options.runs:
        part, more = table(name, rows, *map(Path, runs))
        found, ratios = found + part, ratios | more
    report(torch.device("cpu"), found, ratios, options.json, patients=len({row["patient"] for row in rows}))


if __name__ == "__main__":
    main()
