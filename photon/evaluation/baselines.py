"""What answers without a scan get, for closed questions. The figures are ours; the benchmarks' authors report none."""

import re
from collections import Counter

from photon.evaluation.measures import Closed
from photon.evaluation.resampling import Sums, plain

HISTORY = re.compile(r"\[\s*([01](?:\s*,\s*[01])*)\s*\]")  # 3D-RAD prints what earlier scans showed


def baselines(rows, train=()):
    """A list of baselines for closed questions of one task, each with what it was fitted on.

    Args: rows; train: training questions of the same task; without them, only test answers can be fitted on.
    """
    answers, in_test = [row["answer"] for row in rows], "the answers of these test questions, which no model knows"
    common, subtasks = majority(answers), by_subtask(rows)
    constant = "one letter for all: the most frequent"
    each = "a letter for each subtask: the most frequent"
    found = [
        _baseline(f"{constant} in test", in_test, rows, [common] * len(rows), letter=common),
        _baseline(f"{each} in test", in_test, rows, [subtasks[row["subtask"]] for row in rows]),
    ]
    if train:
        fitted = f"the answers of {len(train)} training questions"
        common, subtasks = majority([row["answer"] for row in train]), by_subtask(train)
        found += [
            _baseline(f"{constant} in train", fitted, rows, [common] * len(rows), letter=common),
            _baseline(f"{each} in train", fitted, rows, [subtasks.get(row["subtask"], common) for row in rows]),
        ]
        blind = Blind(train)
        guesses = [blind(row) for row in rows]
        found.append(_baseline("the question's text alone", fitted, rows, guesses, seen_by=blind.level))
    if all(history(row) and set(row["choices"]) == set("ABCD") for row in rows):
        found.append(
            _baseline(
                "the history printed in the question: all 0 is D, last 1 is A, else B",
                "nothing; the rule is fixed (it was chosen among three with test answers in view)",
                rows, [history_rule(row) for row in rows],
            )
        )  # fmt: skip
    return found


def _baseline(name, fitted_on, rows, predicted, **more):
    measured = Closed(rows, predicted)
    figures = measured.figures(Sums(rows, measured.parts, 0, 0).all)
    return {"name": name, "fitted_on": fitted_on, **more, **{key: plain(value) for key, value in figures.items()}}


def majority(answers):
    """The most frequent answer; of equally frequent ones the first in the alphabet."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def commonest_answers(rows, train):
    """For each row the commonest training answer to the same words, or of its task where these words are new."""
    answers = {}
    for row in train:
        for key in ((row["task"], question_text(row)), row["task"]):
            answers.setdefault(key, Counter())[row["answer"]] += 1
    known = (answers.get((row["task"], question_text(row))) or answers[row["task"]] for row in rows)
    return [counts.most_common(1)[0][0] for counts in known]


def by_subtask(rows):
    """{subtask: its most frequent answer}"""
    groups = {}
    for row in rows:
        groups.setdefault(row["subtask"], []).append(row["answer"])
    return {subtask: majority(answers) for subtask, answers in groups.items()}


def history(row):
    """What earlier scans showed, as 3D-RAD prints it: "0,1,1"; "" where a question prints none."""
    found = HISTORY.search(question_text(row))
    return re.sub(r"\s", "", found[1]) if found else ""


def history_rule(row):
    past = history(row)
    return "D" if "1" not in past else "A" if past.endswith("1") else "B"


def question_text(row):
    if row.get("question"):
        return row["question"]
    content = row["messages"][-2]["content"]
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


class Blind:
    """The best answer from the question's text alone, learnt from training questions.

    A question is known by one of four keys: its words, the history printed in it, its subtask, or nothing. Under a key
    the answer is the option whose text was right most often. Where none was, the next coarser key decides. The key is
    chosen on the training questions, with each question left out of its own count.
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
            return " ".join(question_text(row).lower().split())
        return {"history": history(row), "subtask": row["subtask"], "nothing": None}[level]


def option_text(row, letter):
    return str(row["options"][letter]).strip().lower() if row["options"] else letter


def answer_text(row):
    return option_text(row, row["answer"])
