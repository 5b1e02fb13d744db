"""Compares two sets of predictions on the same questions."""

from photon.evaluation.benchmarks import BENCHMARKS
from photon.evaluation.predictions import matched
from photon.evaluation.resampling import Sums, interval, plain
from photon.evaluation.scoring import header, task_groups


def compare(rows, first, second, *, bootstrap=1000, seed=0):
    """Differences of two sets of predictions on the same questions, second minus first.

    Each task's figures come with a 95 % interval of the difference, from the same draws of patients for both. Closed
    questions also get McNemar's exact test: how many questions each alone got right, and the two-sided p. McNemar
    takes questions as independent, which those about one patient are not, so trust the interval.
    """
    name, one = matched(rows, first)
    _, two = matched(rows, second)
    benchmark, tasks = BENCHMARKS[name], {}
    for label, chosen in task_groups(benchmark, rows).items():
        part = [rows[i] for i in chosen]
        both = [benchmark.measure(part, [texts[i] for i in chosen]) for texts in (one, two)]
        tasks[label] = {"questions": len(part), **_difference(part, both, bootstrap, seed)}
        if part[0]["kind"] == "choice":
            tasks[label]["mcnemar"] = mcnemar(*(measured.right for measured in both))
    return {**header(name, rows, bootstrap, seed), "tasks": tasks}


def _difference(rows, both, bootstrap, seed):
    sums = [Sums(rows, measured.parts, bootstrap, seed) for measured in both]
    value = [measured.figures(s.all) for measured, s in zip(both, sums, strict=True)]
    drawn = [None if s.drawn is None else m.figures(s.drawn) for m, s in zip(both, sums, strict=True)]
    return {
        "figures": {
            name: {
                "first": plain(value[0][name]),
                "second": plain(value[1][name]),
                "difference": interval(
                    value[1][name] - value[0][name], None if drawn[0] is None else drawn[1][name] - drawn[0][name]
                ),
            }
            for name in value[0]
        }
    }


def mcnemar(first, second):
    """Exact McNemar of two arrays of right or wrong: how many each alone got right, and the two-sided p."""
    one, two = int((first & ~second).sum()), int((second & ~first).sum())
    total, few = one + two, min(one, two)
    term, tail = 1, 0
    for k in range(few + 1):  # whole numbers: exact, however many questions
        tail += term
        term = term * (total - k) // (k + 1)
    return {"first_alone": one, "second_alone": two, "p": min(1.0, 2 * tail / 2**total)}
