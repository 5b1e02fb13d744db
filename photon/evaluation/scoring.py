"""Scores of predictions, with what a blind guess would get and how certain a figure is.

    scores = score(rows, {id: text}, train=train_rows)      # rows of photon.evaluation.questions.load_benchmark
    print(table(scores))                                    # photon.evaluation.table

- `authors`: the benchmark's own figures, from `metrics/`, where their definitions and sources are;
- `overall` and the tasks' `figures`: the headline figures with 95 % intervals by patient (`resampling`);
- `baselines`: what is right without a scan, each with what it was fitted on (`baselines`).
"""

import warnings
from collections import Counter

from photon.evaluation.baselines import baselines
from photon.evaluation.benchmarks import BENCHMARKS
from photon.evaluation.measures import Closed
from photon.evaluation.predictions import matched
from photon.evaluation.resampling import Sums


def score(rows, predictions, *, train=None, bootstrap=1000, seed=0):
    """All figures of predictions, as a dict that JSON can hold. Shares, from 0 to 1.

    Args:
        rows: questions of one benchmark.
        predictions: {id: text}, one for each row.
        train: training questions of the same benchmark, on which blind baselines are fitted.
        bootstrap: draws of patients; 0 leaves intervals out.
        seed: of the draws.
    Raises: `ValueError` where predictions and questions do not match.
    """
    name, texts = matched(rows, predictions)
    benchmark = BENCHMARKS[name]
    train = _checked_train(train, rows, name)
    tasks = {}
    for label, chosen in task_groups(benchmark, rows).items():
        part = [rows[i] for i in chosen]
        tasks[label] = _task(benchmark, part, [texts[i] for i in chosen], bootstrap, seed)
        if part[0]["kind"] == "choice":
            learn = [r for r in train or () if r["task"] == part[0]["task"] and r["kind"] == "choice"]
            tasks[label]["baselines"] = baselines(part, learn)
    return {
        **header(name, rows, bootstrap, seed),
        "empty": sum(not text.strip() for text in texts),
        "authors": benchmark.authors(rows, texts),
        "overall": _overall(benchmark, rows, texts, bootstrap, seed),
        "tasks": tasks,
    }


def header(name, rows, bootstrap, seed):
    """What was scored, and how it was resampled."""
    return {
        "benchmark": name,
        "questions": len(rows),
        "patients": len({row["patient"] for row in rows}),
        "resampling": {"resamples": bootstrap, "seed": seed, "unit": "patient", "interval": 0.95},
    }


def task_groups(benchmark, rows):
    """{task: numbers of its rows}. A task with questions under several rules is several groups, "task (rule)"."""
    groups = {}
    for i, row in enumerate(rows):
        groups.setdefault((row["task"], benchmark.rule(row)), []).append(i)
    several = Counter(task for task, _ in groups)
    label = {key: key[0] if several[key[0]] == 1 else f"{key[0]} ({key[1]})".strip() for key in groups}
    return {label[key]: chosen for key, chosen in groups.items()}


def _task(benchmark, rows, texts, bootstrap, seed):
    measured = benchmark.measure(rows, texts)
    sums = Sums(rows, measured.parts, bootstrap, seed)
    entry = {
        "questions": len(rows),
        "patients": sums.patients,
        "figures": sums.figures(measured.figures),
        "subtasks": sums.by_subtask(measured.subtask_figures),
    }
    for subtask, count in Counter(row["subtask"] for row in rows).items():
        entry["subtasks"][subtask]["questions"] = count
    if isinstance(measured, Closed):
        entry["read"] = measured.read
        entry["f1"] = f"of {measured.yes} (yes)" if measured.yes else "mean over the letters that are true"
    return entry


def _overall(benchmark, rows, texts, bootstrap, seed):
    measured = benchmark.overall(rows, texts)
    if measured is None:
        return None
    keyed = [{**row, "subtask": f"{row['task']} / {row['subtask']}"} for row in rows]
    return Sums(keyed, measured.parts, bootstrap, seed).figures(measured.figures)


def _checked_train(train, rows, name):
    if train is None:
        return None
    other = sorted({row["benchmark"] for row in train} - {name})
    if other or not train:
        raise ValueError(f"train holds {', '.join(other) or 'no questions'}; expected questions of {name}.")
    shared = {row["id"] for row in train} & {row["id"] for row in rows}
    if shared:
        raise ValueError(f"{len(shared)} questions are in train and in rows: a baseline would know their answers.")
    scans = {str(v) for row in train for v in row["volumes"]} & {str(v) for row in rows for v in row["volumes"]}
    if scans:
        warnings.warn(f"{len(scans)} scans are in train and in rows.", stacklevel=3)
    return train
