"""Scores of predictions, with what a blind guess would get and how sure a figure is.

    scores = score(rows, {id: text}, train=train_rows)      # rows of datasets_photon.load_benchmark
    print(table(scores))
    compare(rows, first, second)                            # two sets of predictions on the same questions
    swapped(rows, seed=0)                                   # the same questions on other patients' scans

- `authors`: the benchmark's own figures, from `metrics/` (definitions and their sources are there);
- `figures`: the same headline figures with 95 % intervals, and for closed questions balanced accuracy and F1;
- `baselines`: what is right without a scan, each with what it was fitted on.

Intervals are percentiles of a bootstrap that draws whole patients with replacement: questions about one patient are
not independent. All draws are one matrix of weights (resamples, patients); every figure is a function of sums over
questions, so that it is computed for all draws at once. The same seed and questions give the same interval, in
whatever order they stand. Baselines, balanced accuracy, F1 and intervals are ours; the authors report none.
"""

import json
import math
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

try:
    import evaluate
except ImportError:
    evaluate = None

METRICS = Path(__file__).resolve().parents[2] / "metrics"
MODULES = {
    "3d-rad": "rad3d", "deeptumorvqa-1-mc": "deeptumorvqa1", "deeptumorvqa-1-ft": "deeptumorvqa1",
    "deeptumorvqa-2": "deeptumorvqa2", "deeptumorvqa-2-ft": "deeptumorvqa2",
}  # fmt: skip
FORMATS = {
    "deeptumorvqa-1-mc": "mc", "deeptumorvqa-1-ft": "freetext",
    "deeptumorvqa-2": "mc", "deeptumorvqa-2-ft": "freeform",
}  # fmt: skip
HISTORY = re.compile(r"\[\s*([01](?:\s*,\s*[01])*)\s*\]")  # 3D-RAD prints what earlier scans showed
MAX_FAULTS = 20
LOADED = {}


# === Predictions =====================================================================================================


def read_predictions(path, rows=None):
    """{id: text} of a JSONL file with `id` and `prediction` in each line.

    Args: rows: the questions; then each must have exactly one prediction.
    Raises: `ValueError` that names the faulty lines.
    """
    found, first, faults = {}, {}, []
    known = None if rows is None else {row["id"] for row in rows}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            fault = None
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                record, fault = None, f"not JSON ({error.msg} at character {error.pos + 1})"
            if fault is None and not isinstance(record, dict):
                fault = "not a JSON object"
            elif fault is None:
                wrong = [key for key in ("id", "prediction") if not isinstance(record.get(key), str)]
                name = record.get("id")
                if wrong:
                    fault = f"no text under {' and '.join(map(repr, wrong))}"
                elif name in first:
                    fault = f"a second prediction of the question of line {first[name]}"
                elif known is not None and name not in known:
                    fault = "an id of no question"
            if fault:
                faults.append(f"line {number}: {fault}")
            else:
                first[name] = number
                found[name] = record["prediction"]
    if rows is not None:
        faults += [f"question {row['id']}: no prediction" for row in rows if row["id"] not in found]
    if faults:
        raise ValueError(_listed(f"{Path(path).name} has {len(faults)} faults", faults))
    return found


def _listed(head, faults):
    more = [f"... and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
    return "\n  ".join([f"{head}:", *faults[:MAX_FAULTS], *more])


def _matched(rows, predictions):
    """The benchmark's name, and the predictions in the order of the rows."""
    names = sorted({row["benchmark"] for row in rows})
    if len(names) != 1:
        raise ValueError(f"Rows are of {', '.join(names) or 'no benchmark'}; score one benchmark at a time.")
    ids = Counter(row["id"] for row in rows)
    faults = [f"question {name}: {count} rows have this id" for name, count in ids.items() if count > 1]
    faults += [f"question {name}: no prediction" for name in ids if name not in predictions]
    faults += [f"prediction {name}: no question" for name in predictions if name not in ids]
    if faults:
        raise ValueError(_listed(f"Predictions and questions do not match in {len(faults)} places", faults))
    return names[0], [predictions[row["id"]] for row in rows]


# === Figures =========================================================================================================


def metric(name):
    """A module of `metrics/`, loaded by `evaluate` from this folder; no network is used."""
    if evaluate is None:
        raise ImportError("Scoring needs evaluate; install it with: pip install evaluate")
    if name not in LOADED:
        LOADED[name] = evaluate.load(str(METRICS / name), keep_in_memory=True)
    return LOADED[name]


def read_letter(text, choices, benchmark):
    """The choice that a prediction names, or `None`.

    3D-RAD and DeepTumorVQA by their authors' rules (`metrics/`); else the text is a choice, but for case and a full
    stop, or it begins with a letter and one of ". : )", as in "B", "(b)" and "B. No", but not "A lesion".
    """
    if benchmark == "deeptumorvqa-2":
        found = metric("deeptumorvqa2").letter(text)
    elif benchmark == "deeptumorvqa-1-mc":
        found = text
    elif benchmark == "3d-rad":
        found = " ".join(text.split()).upper()
    elif word := {c.casefold(): c for c in choices}.get(text.strip().removesuffix(".").casefold()):
        found = word  # choices may be words
    else:
        match = re.match(r"\s*\(?([A-Za-z])\s*(?:[.:)]|$)", text)
        found = match[1].upper() if match else None
    return found if found in choices else None


class Closed:
    """Closed questions of a task: figures as functions of sums over questions.

    Parts of a question: 1, and for each letter whether it is true, said, and both.
    """

    def __init__(self, rows, said):
        self.letters = sorted({letter for row in rows for letter in row["choices"]})
        place = {letter: i for i, letter in enumerate(self.letters)}
        count = len(self.letters)
        self.parts = np.zeros((len(rows), 1 + 3 * count))  # questions, true, said, both
        for i, (row, letter) in enumerate(zip(rows, said, strict=True)):
            self.parts[i, 0] = 1
            self.parts[i, 1 + place[row["answer"]]] = 1
            if letter is not None:
                self.parts[i, 1 + count + place[letter]] = 1
            if letter == row["answer"]:
                self.parts[i, 1 + 2 * count + place[letter]] = 1
        self.yes = positive(rows)

    def figures(self, sums):
        """{name: (...)} of sums (..., subtasks, parts)."""
        questions, true, said, both = self._split(sums)
        accuracy = ratio(both.sum(-1), questions)
        pooled_true, pooled_both = true.sum(-2), both.sum(-2)
        recall = ratio(pooled_both, pooled_true)
        out = {
            "accuracy_macro": mean_of(accuracy, axis=-1),
            "accuracy_micro": ratio(both.sum((-1, -2)), questions.sum(-1)),
            "balanced_accuracy": mean_of(recall, axis=-1),
            "f1_macro": mean_of(self._f1(true, said, both), axis=-1),
        }
        return out

    def subtask_figures(self, sums):
        """{name: (..., subtasks)}"""
        questions, true, said, both = self._split(sums)
        return {
            "accuracy": ratio(both.sum(-1), questions),
            "balanced_accuracy": mean_of(ratio(both, true), axis=-1),
            self.f1_name: self._f1(true, said, both),
        }

    @property
    def f1_name(self):
        return "f1_yes" if self.yes else "f1"

    def _f1(self, true, said, both):
        """F1 of a subtask: of "yes" where all of a task's questions are yes or no, else the mean over the letters that
        are true in it. `nan` where nothing is true or said."""
        f1 = ratio(2 * both, true + said)  # (..., subtasks, letters)
        if self.yes:
            return f1[..., self.letters.index(self.yes)]
        return mean_of(np.where(true > 0, f1, np.nan), axis=-1)

    def _split(self, sums):
        count = len(self.letters)
        return sums[..., 0], *(sums[..., 1 + i * count : 1 + (i + 1) * count] for i in range(3))


class Open:
    """Open questions: BLEU-1 of each subtask as a corpus, and the mean of ROUGE-1, as defined in metrics/rad3d."""

    def __init__(self, rows, texts):
        self.metric = metric("rad3d")
        pairs = [(text, row["answer"]) for row, text in zip(rows, texts, strict=True)]
        self.parts = np.array(
            [(1, *self.metric.bleu1_parts(*pair), self.metric.rouge1(*pair)) for pair in pairs], float
        )

    def subtask_figures(self, sums):
        bleu = np.where(sums[..., 0] > 0, self.metric.bleu1(*(sums[..., i] for i in (1, 2, 3))), np.nan)
        return {"bleu1": bleu, "rouge1": ratio(sums[..., 4], sums[..., 0])}

    def figures(self, sums):
        return {name: mean_of(value, axis=-1) for name, value in self.subtask_figures(sums).items()}


class Scored:
    """Questions with a score each (exact match, mean relative accuracy); `None` has no part in its subtask's mean."""

    def __init__(self, scores):
        self.parts = np.array([(0 if s is None else 1, s or 0, 1) for s in scores], float)

    def subtask_figures(self, sums):
        return {"score": ratio(sums[..., 1], sums[..., 0])}

    def figures(self, sums):
        score = self.subtask_figures(sums)["score"]
        weight = np.where(np.isnan(score), 0, sums[..., 2])
        return {
            "score_macro": mean_of(score, axis=-1),
            "score_micro": ratio((np.nan_to_num(score) * weight).sum(-1), weight.sum(-1)),
        }


def ratio(part, whole):
    """part / whole, `nan` where there is nothing."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def mean_of(values, axis):
    """Mean of what is not `nan`; `nan` where nothing is left."""
    there = ~np.isnan(values)
    return ratio(np.where(there, values, 0).sum(axis), there.sum(axis))


def positive(rows):
    """The letter of "yes" where all questions are yes or no, and the letter is one; else `None`."""
    found = set()
    for row in rows:
        options = {letter: str(text).strip().lower() for letter, text in (row["options"] or {}).items()}
        if sorted(options.values()) != ["no", "yes"]:
            return None
        found.add(next(letter for letter, text in options.items() if text == "yes"))
    return found.pop() if len(found) == 1 else None


# === Resampling ======================================================================================================


class Sums:
    """Sums of questions' parts by subtask, over all and over draws of patients."""

    def __init__(self, rows, parts, resamples, seed):
        self.subtasks = sorted({row["subtask"] for row in rows})
        patients = sorted({row["patient"] for row in rows})
        place = {name: i for i, name in enumerate(patients)}
        column = {name: i for i, name in enumerate(self.subtasks)}
        flat = np.array([place[row["patient"]] * len(self.subtasks) + column[row["subtask"]] for row in rows])
        by_patient = np.zeros((len(patients) * len(self.subtasks), parts.shape[1]))
        np.add.at(by_patient, flat, parts)
        self.by_patient = by_patient.reshape(len(patients), -1)  # (patients, subtasks x parts)
        self.patients, self.shape = len(patients), (len(self.subtasks), parts.shape[1])
        self.all = self.by_patient.sum(0).reshape(self.shape)
        self.drawn = None
        if resamples and len(patients) > 1:
            draws = np.random.default_rng(seed).multinomial(
                len(patients), np.full(len(patients), 1 / len(patients)), resamples
            )
            self.drawn = (draws @ self.by_patient).reshape(resamples, *self.shape)  # (resamples, subtasks, parts)

    def figures(self, function):
        """{name: figure with interval} of a function of sums."""
        drawn = {} if self.drawn is None else function(self.drawn)
        return {name: interval(value, drawn.get(name)) for name, value in function(self.all).items()}

    def by_subtask(self, function):
        """{subtask: {name: figure with interval}} of a function that keeps subtasks apart."""
        values, drawn = function(self.all), {} if self.drawn is None else function(self.drawn)
        return {
            subtask: {
                name: interval(value[i], drawn[name][..., i] if drawn else None) for name, value in values.items()
            }
            for i, subtask in enumerate(self.subtasks)
        }


def interval(value, drawn=None):
    """{"value", "low", "high"}: a 95 % percentile interval; `None` where there is none."""
    low = high = None
    if drawn is not None and not np.isnan(drawn).all():
        low, high = (float(x) for x in np.nanpercentile(drawn, [2.5, 97.5]))
    return {"value": None if np.isnan(value) else float(value), "low": low, "high": high}


# === Scores ==========================================================================================================


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
    name, texts = _matched(rows, predictions)
    train = _checked_train(train, rows, name)
    tasks = {}
    for label, chosen in _groups(name, rows).items():
        part = [rows[i] for i in chosen]
        tasks[label] = _task(name, part, [texts[i] for i in chosen], bootstrap, seed)
        if part[0]["kind"] == "choice":
            learn = [r for r in train or () if r["task"] == part[0]["task"] and r["kind"] == "choice"]
            tasks[label]["baselines"] = baselines(part, learn)
    return {
        "benchmark": name,
        "questions": len(rows),
        "patients": len({row["patient"] for row in rows}),
        "empty": sum(not text.strip() for text in texts),
        "resampling": {"resamples": bootstrap, "seed": seed, "unit": "patient", "interval": 0.95},
        "authors": authors(name, rows, texts),
        "overall": _overall(name, rows, texts, bootstrap, seed),
        "tasks": tasks,
    }


def _groups(name, rows):
    """{task: numbers of its rows}; a task with questions of several kinds is as many groups, "task (kind)"."""
    groups = {}
    for i, row in enumerate(rows):
        kind = row["kind"] if row["kind"] == "choice" or name not in FORMATS else "text"  # scored by one rule there
        groups.setdefault((row["task"], kind), []).append(i)
    several = Counter(task for task, _ in groups)
    label = {key: key[0] if several[key[0]] == 1 else f"{key[0]} ({key[1]})".strip() for key in groups}
    return {label[key]: chosen for key, chosen in groups.items()}


def authors(name, rows, texts):
    """The benchmark's own figures, from its module in `metrics/`; `None` where it has none here."""
    if name not in MODULES:
        return None
    given = {"predictions": texts, "references": [row["answer"] for row in rows]}
    kinds, subtasks = [row["task"] for row in rows], [row["subtask"] for row in rows]
    if name == "3d-rad":
        closed = ["closed" if row["kind"] == "choice" else "open" for row in rows]
        return metric("rad3d").compute(**given, tasks=kinds, subtasks=subtasks, kinds=closed)
    return metric(MODULES[name]).compute(**given, types=kinds, subtypes=subtasks, answer_format=FORMATS[name])


def _scores(name, rows, texts):
    """Each question's score by the benchmark's rule."""
    if name in FORMATS:
        one = metric(MODULES[name]).score
        return [one(text, r["answer"], r["subtask"], FORMATS[name]) for r, text in zip(rows, texts, strict=True)]
    mra = metric("deeptumorvqa1").mra
    return [mra(text, row["answer"]) for row, text in zip(rows, texts, strict=True)]


def _measured(name, rows, texts):
    """The figures of questions of one kind."""
    if rows[0]["kind"] == "choice":
        return Closed(rows, [read_letter(t, row["choices"], name) for row, t in zip(rows, texts, strict=True)])
    if name in FORMATS or all(row["kind"] == "number" for row in rows):
        return Scored(_scores(name, rows, texts))
    return Open(rows, texts)


def _task(name, rows, texts, bootstrap, seed):
    measured = _measured(name, rows, texts)
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
        entry["read"] = float(
            measured.parts[:, 1 + len(measured.letters) : 1 + 2 * len(measured.letters)].sum(1).mean()
        )
        entry["f1"] = f"of {measured.yes} (yes)" if measured.yes else "mean over the letters that are true"
    return entry


def _overall(name, rows, texts, bootstrap, seed):
    """DeepTumorVQA's totals over all tasks, with intervals: 1.0 macro over subtypes, 2.0 by questions."""
    if name not in FORMATS:
        return None
    keyed = [{**row, "subtask": f"{row['task']} / {row['subtask']}"} for row in rows]
    measured = Scored(_scores(name, rows, texts))
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


# === Baselines =======================================================================================================


def baselines(rows, train=()):
    """What answers without a scan get, for closed questions of one task; a list, each with what it was fitted on."""
    answers, here = [row["answer"] for row in rows], "the answers of these test questions, which no model knows"
    common, subtasks = majority(answers), by_subtask(rows)
    constant = "one letter for all: the most frequent"
    each = "a letter for each subtask: the most frequent"
    found = [
        _baseline(f"{constant} in test", here, rows, [common] * len(rows), letter=common),
        _baseline(f"{each} in test", here, rows, [subtasks[row["subtask"]] for row in rows]),
    ]
    if train:
        fitted = f"the answers of {len(train)} training questions"
        common, subtasks = majority([row["answer"] for row in train]), by_subtask(train)
        found += [
            _baseline(f"{constant} in train", fitted, rows, [common] * len(rows), letter=common),
            _baseline(f"{each} in train", fitted, rows, [subtasks.get(row["subtask"], common) for row in rows]),
        ]
        blind = Blind(train)
        said = [blind(row) for row in rows]
        found.append(_baseline("the question's text alone", fitted, rows, said, seen_by=blind.level))
    if all(history(row) and set(row["choices"]) == set("ABCD") for row in rows):
        found.append(
            _baseline(
                "the history printed in the question: all 0 is D, last 1 is A, else B",
                "nothing; the rule is fixed (it was chosen among three with test answers in view)",
                rows, [history_rule(row) for row in rows],
            )
        )  # fmt: skip
    return found


def _baseline(name, fitted_on, rows, said, **more):
    measured = Closed(rows, said)
    figures = measured.figures(Sums(rows, measured.parts, 0, 0).all)
    return {"name": name, "fitted_on": fitted_on, **more, **{key: _plain(value) for key, value in figures.items()}}


def _plain(value):
    return None if np.isnan(value) else float(value)


def majority(answers):
    """The most frequent; the first in the alphabet of those that are equally so."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def by_subtask(rows):
    groups = {}
    for row in rows:
        groups.setdefault(row["subtask"], []).append(row["answer"])
    return {subtask: majority(answers) for subtask, answers in groups.items()}


def history(row):
    """What earlier scans showed, as 3D-RAD prints it: "0,1,1"; "" where a question prints none."""
    found = HISTORY.search(_asked(row))
    return re.sub(r"\s", "", found[1]) if found else ""


def history_rule(row):
    past = history(row)
    return "D" if "1" not in past else "A" if past.endswith("1") else "B"


def _asked(row):
    if row.get("question"):
        return row["question"]
    content = row["messages"][-2]["content"]
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


class Blind:
    """The best answer from the question's text alone, learnt from training questions.

    A question is known by one of four keys: its words, the history printed in it, its subtask, or nothing. Under a key
    the answer is the option whose text was right most often; where none was, the next coarser key is asked. Which key
    is used is decided on the training questions, by leaving each out of its own count.
    """

    LEVELS = ("words", "history", "subtask", "nothing")

    def __init__(self, train):
        self.counts = {level: {} for level in self.LEVELS}
        for row in train:
            for level in self.LEVELS:
                self.counts[level].setdefault(self._key(level, row), Counter())[answer_text(row)] += 1
        right = {
            level: sum(self._answer(row, level, without=True) == row["answer"] for row in train)
            for level in self.LEVELS
        }
        self.level = max(self.LEVELS, key=lambda level: (right[level], self.LEVELS.index(level)))  # coarser if equal

    def __call__(self, row):
        return self._answer(row, self.level)

    def _answer(self, row, level, without=False):
        options = {letter: option_text(row, letter) for letter in row["choices"]}
        for key in self.LEVELS[self.LEVELS.index(level) :]:
            counts = self.counts[key].get(self._key(key, row), Counter())
            known = {letter: counts[text] - (without and letter == row["answer"]) for letter, text in options.items()}
            if max(known.values()) > 0:
                return max(known, key=known.get)
        return row["choices"][0]

    def _key(self, level, row):
        if level == "words":
            return " ".join(_asked(row).lower().split())
        return {"history": history(row), "subtask": row["subtask"], "nothing": None}[level]


def option_text(row, letter):
    return str(row["options"][letter]).strip().lower() if row["options"] else letter


def answer_text(row):
    return option_text(row, row["answer"])


# === Two sets of predictions, and other patients' scans ==============================================================


def compare(rows, first, second, *, bootstrap=1000, seed=0):
    """Differences of two sets of predictions on the same questions, second minus first.

    Each task's figures with a 95 % interval of the difference (the same draws of patients for both); for closed
    questions McNemar's exact test as well: questions that one alone got right, and the two-sided p of so uneven a
    split. McNemar takes questions as independent, which those about one patient are not: go by the interval.
    """
    name, one = _matched(rows, first)
    _, two = _matched(rows, second)
    tasks = {}
    for label, chosen in _groups(name, rows).items():
        part = [rows[i] for i in chosen]
        both = [_measured(name, part, [texts[i] for i in chosen]) for texts in (one, two)]
        tasks[label] = {"questions": len(part), **_difference(part, both, bootstrap, seed)}
        if part[0]["kind"] == "choice":
            tasks[label]["mcnemar"] = mcnemar(*(_right(measured) for measured in both))
    return {
        "benchmark": name,
        "questions": len(rows),
        "patients": len({row["patient"] for row in rows}),
        "resampling": {"resamples": bootstrap, "seed": seed, "unit": "patient", "interval": 0.95},
        "tasks": tasks,
    }


def _difference(rows, both, bootstrap, seed):
    sums = [Sums(rows, measured.parts, bootstrap, seed) for measured in both]
    value = [measured.figures(s.all) for measured, s in zip(both, sums, strict=True)]
    drawn = [None if s.drawn is None else m.figures(s.drawn) for m, s in zip(both, sums, strict=True)]
    return {
        "figures": {
            name: {
                "first": _plain(value[0][name]),
                "second": _plain(value[1][name]),
                "difference": interval(
                    value[1][name] - value[0][name], None if drawn[0] is None else drawn[1][name] - drawn[0][name]
                ),
            }
            for name in value[0]
        }
    }


def _right(measured):
    return measured.parts[:, 1 + 2 * len(measured.letters) :].sum(1) > 0


def mcnemar(first, second):
    """Exact McNemar of two arrays of right or wrong: how many each alone got right, and the two-sided p."""
    one, two = int((first & ~second).sum()), int((second & ~first).sum())
    total, few = one + two, min(one, two)
    term, tail = 1, 0
    for k in range(few + 1):  # whole numbers: exact, however many questions
        tail += term
        term = term * (total - k) // (k + 1)
    return {"first_alone": one, "second_alone": two, "p": min(1.0, 2 * tail / 2**total)}


def swapped(rows, seed=0):
    """The same questions, each on the scan of another patient: what is answered without the right scan.

    A patient's questions go to one other patient's scans, never to the own; which is drawn by the seed. Raises
    `ValueError` where there is no other patient (among questions with as many scans).
    """
    scans = {}  # number of scans of a question -> patient -> its scans, in order
    for row in rows:
        held = scans.setdefault(len(row["volumes"]), {}).setdefault(row["patient"], [])
        if row["volumes"] not in held:
            held.append(row["volumes"])
    other = {}
    for count, patients in scans.items():
        if count and len(patients) < 2:
            raise ValueError(f"Questions on {count} scans are about one patient alone; swapping needs two or more.")
        names = sorted(patients)
        order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
        other |= {(count, order[i]): patients[order[i - 1]] for i in range(len(order))}
    out = []
    for row in rows:
        count = len(row["volumes"])
        given = other[count, row["patient"]]
        own = scans[count][row["patient"]].index(row["volumes"])
        out.append({**row, "volumes": list(given[own % len(given)])})
    return out


# === Table ===========================================================================================================


def table(scores):
    """Scores as markdown, in per cent: a line a task, its baselines beneath, then subtasks."""
    draws = scores["resampling"]
    lines = [
        f"{scores['benchmark']}: {scores['questions']} questions, {scores['patients']} patients, "
        f"{scores['empty']} empty answers. In brackets 95 % by {draws['resamples']} draws of patients.",
        "",
        "| task | questions | figure | value |",
        "|---|---|---|---|",
    ]
    for name, figure in (scores["overall"] or {}).items():
        lines.append(f"| all | {scores['questions']} | {name} | {_percent(figure)} |")
    for task, entry in scores["tasks"].items():
        lines += [
            f"| {task} | {entry['questions']} | {name} | {_percent(f)} |" for name, f in entry["figures"].items()
        ]
        if entry.get("read", 1) < 1:
            lines.append(f"| {task} | {entry['questions']} | answers read as a choice | {100 * entry['read']:.2f} |")
    closed = {task: entry["baselines"] for task, entry in scores["tasks"].items() if entry.get("baselines")}
    if closed:
        lines += [
            "",
            "| task | without a scan | fitted on | accuracy macro | micro | balanced |",
            "|---|---|---|---|---|---|",
        ]
    for task, found in closed.items():
        for b in found:
            values = [_percent({"value": b[k]}) for k in ("accuracy_macro", "accuracy_micro", "balanced_accuracy")]
            letter = f" ({b['letter']})" if "letter" in b else f" ({b['seen_by']})" if "seen_by" in b else ""
            lines.append(f"| {task} | {b['name']}{letter} | {b['fitted_on']} | {' | '.join(values)} |")
    lines += ["", "| task | subtask | questions | figures |", "|---|---|---|---|"]
    for task, entry in scores["tasks"].items():
        for subtask, part in entry["subtasks"].items():
            shown = ", ".join(f"{name} {_percent(f)}" for name, f in part.items() if name != "questions")
            lines.append(f"| {task} | {subtask} | {part['questions']} | {shown} |")
    for entry in ((scores["authors"] or {}).get("tasks") or {}).values():
        if entry.get("bertscore_left_out"):
            lines += ["", f"BERTScore was left out: {entry['bertscore_left_out']}."]
            break
    return "\n".join(lines)


def _percent(figure):
    if figure["value"] is None or math.isnan(figure["value"]):
        return "-"
    text = f"{100 * figure['value']:.2f}"
    if figure.get("low") is None:
        return text
    return f"{text} [{100 * figure['low']:.2f}, {100 * figure['high']:.2f}]"
