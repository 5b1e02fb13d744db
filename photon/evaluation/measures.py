"""Measures of answers. Each is a function of sums over questions, so that resampling computes all draws at once.

A measure has `parts` (questions, P), the numbers of each question that add up; `figures(sums)` of sums (..., subtasks,
P) to {name: (...)}; and `subtask_figures(sums)` to {name: (..., subtasks)}. Shares, from 0 to 1; `nan` where there is
nothing to measure.
"""

from functools import cache
from pathlib import Path

import numpy as np

try:
    import evaluate
except ImportError:
    evaluate = None

MAX_ANSWERS = 20  # different ones, up to which balanced accuracy tells something
METRICS = Path(__file__).resolve().parents[2] / "metrics"


def check_installed():
    """Raises `ImportError` with what to install where scores cannot be computed."""
    if evaluate is None:
        raise ImportError("Scoring needs evaluate and datasets: pip install -r requirements-train.txt")


@cache
def metric(name):
    """A module of `metrics/`, loaded by `evaluate` from this repository without network. Raises `ImportError`."""
    check_installed()
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


class Closed:
    """Closed questions of a task: accuracy, balanced accuracy, F1.

    Parts of a question: 1, and for each letter whether it is true, predicted, and both.

    Args: rows; predicted: for each row one of its `choices`, or `None` where none was read.
    """

    def __init__(self, rows, predicted):
        self.letters = sorted({letter for row in rows for letter in row["choices"]})
        place = {letter: i for i, letter in enumerate(self.letters)}
        count = len(self.letters)
        self.parts = np.zeros((len(rows), 1 + 3 * count))  # questions, true, predicted, both
        for i, (row, letter) in enumerate(zip(rows, predicted, strict=True)):
            self.parts[i, 0] = 1
            self.parts[i, 1 + place[row["answer"]]] = 1
            if letter is not None:
                self.parts[i, 1 + count + place[letter]] = 1
            if letter == row["answer"]:
                self.parts[i, 1 + 2 * count + place[letter]] = 1
        self.yes = letter_of_yes(rows)

    @property
    def read(self):
        """The share of answers in which a choice was read."""
        return float(self._split(self.parts)[2].sum(1).mean())

    @property
    def right(self):
        """(questions,) bool"""
        return self._split(self.parts)[3].sum(1) > 0

    def figures(self, sums):
        questions, true, predicted, both = self._split(sums)
        accuracy = ratio(both.sum(-1), questions)
        recall = ratio(both.sum(-2), true.sum(-2))
        return {
            "accuracy_macro": mean_of(accuracy, axis=-1),
            "accuracy_micro": ratio(both.sum((-1, -2)), questions.sum(-1)),
            "balanced_accuracy": mean_of(recall, axis=-1),
            "f1_macro": mean_of(self._f1(true, predicted, both), axis=-1),
        }

    def subtask_figures(self, sums):
        questions, true, predicted, both = self._split(sums)
        return {
            "accuracy": ratio(both.sum(-1), questions),
            "balanced_accuracy": mean_of(ratio(both, true), axis=-1),
            "f1_yes" if self.yes else "f1": self._f1(true, predicted, both),
        }

    def _f1(self, true, predicted, both):
        """F1 of a subtask: of "yes" where all of a task's questions are yes or no, else the mean over the letters that
        are true in it. `nan` where nothing is true or predicted."""
        f1 = ratio(2 * both, true + predicted)  # (..., subtasks, letters)
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


class Short(Open):
    """Open questions with short answers: also exact match (`same_answer`), and balanced accuracy where answers repeat.

    Balanced accuracy is the mean over the different reference answers of the share that was answered exactly. It is
    left out where there are more than `MAX_ANSWERS` of them, or fewer than two questions for each.
    """

    def __init__(self, rows, texts):
        super().__init__(rows, texts)
        references = [normalised(row["answer"]) for row in rows]
        exact = np.array([normalised(text) == answer for text, answer in zip(texts, references, strict=True)], float)
        self.answers = sorted(set(references))
        if len(self.answers) > min(MAX_ANSWERS, len(rows) // 2):
            self.answers = []
        true = np.array([[answer == reference for answer in self.answers] for reference in references], float)
        self.parts = np.concatenate([self.parts, exact[:, None], true, true * exact[:, None]], axis=1)

    def subtask_figures(self, sums):
        figures = {"exact_match": ratio(sums[..., 5], sums[..., 0])}
        if self.answers:
            figures["balanced_accuracy"] = mean_of(ratio(*self._right_and_all(sums)), axis=-1)
        return figures | super().subtask_figures(sums)

    def figures(self, sums):
        figures = super().figures(sums)
        if self.answers:  # over the task as a whole: a subtask may lack an answer
            right, asked = self._right_and_all(sums)
            figures["balanced_accuracy"] = mean_of(ratio(right.sum(-2), asked.sum(-2)), axis=-1)
        return figures

    def _right_and_all(self, sums):
        """(..., subtasks, answers): questions answered exactly, and all."""
        return sums[..., 6 + len(self.answers) :], sums[..., 6 : 6 + len(self.answers)]


class Scored:
    """Questions with a score each, such as exact match or mean relative accuracy.

    Args: scores: a number for each question; `None` leaves it out of its subtask's mean.
    """

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


def same_answer(prediction, reference):
    """Whether two short answers are equal, whatever their case, white space and full stop at the end."""
    return normalised(prediction) == normalised(reference)


def normalised(text):
    return " ".join(text.split()).removesuffix(".").casefold()


def ratio(part, whole):
    """part / whole, `nan` where `whole` is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def mean_of(values, axis):
    """Mean of the values that are not `nan`; `nan` where none is left."""
    valid = ~np.isnan(values)
    return ratio(np.where(valid, values, 0).sum(axis), valid.sum(axis))


def letter_of_yes(rows):
    """The letter of "yes" where all questions are yes or no and the letter is always the same; else `None`."""
    found = set()
    for row in rows:
        options = {letter: str(text).strip().lower() for letter, text in (row["options"] or {}).items()}
        if sorted(options.values()) != ["no", "yes"]:
            return None
        found.add(next(letter for letter, text in options.items() if text == "yes"))
    return found.pop() if len(found) == 1 else None
