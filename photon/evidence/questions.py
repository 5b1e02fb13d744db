"""Whether the question decides what is kept: pairs of questions on one scan.

Two questions about one organ should keep more alike tokens than two about different organs. Only pairs of different
tasks count, whose words differ either way: on one scan a task asks about an organ once. The test draws which organ
each question of a scan is about anew, many times: if the question made no difference, the pairs would differ as much.
"""

import itertools
from collections import defaultdict

import numpy as np

DRAWS = 2000


def jaccard(first, second):
    """Shared part of two sets of places; 1 for two empty ones."""
    first, second = set(first), set(second)
    return len(first & second) / max(len(first | second), 1) if first | second else 1.0


def question_effect(records, seed=0):
    """Mean Jaccard index of what is kept for two questions on the same scans, of one organ and of different ones;
    their difference, and how often as large a one comes by chance.

    Args: records: of `measure`, with `scans`, `evidence` and `places`.
    Returns: dict; `None` in place of figures that need pairs which are not there.
    """
    scans = defaultdict(list)
    for record in records:
        scans[tuple(record["scans"])].append(record)
    pairs, organs = [], []  # (scan, i, j, Jaccard index); the organs asked about on each scan
    for number, group in enumerate(scans.values()):
        organs.append([tuple(sorted(record["evidence"])) for record in group])
        for i, j in itertools.combinations(range(len(group)), 2):
            if group[i]["task"] == group[j]["task"]:
                continue
            pairs.append((number, i, j, jaccard(group[i]["places"], group[j]["places"])))
    if not pairs:
        return {"pairs": 0, "same_organ": None, "other_organ": None, "difference": None, "p": None}
    number, first, second, values = (np.array(column) for column in zip(*pairs, strict=True))
    starts = np.cumsum([0, *map(len, organs)])[:-1][number]
    names = {organ: i for i, organ in enumerate(sorted({organ for asked in organs for organ in asked}))}
    flat = [np.array([names[organ] for organ in asked]) for asked in organs]

    def difference(asked):
        joined = np.concatenate(asked)
        same = joined[starts + first] == joined[starts + second]
        if same.all() or not same.any():
            return np.nan, np.nan, np.nan
        return values[same].mean(), values[~same].mean(), values[same].mean() - values[~same].mean()

    same, other, found = difference(flat)
    random = np.random.default_rng(seed)
    drawn = [difference([random.permutation(asked) for asked in flat])[2] for _ in range(DRAWS)]
    as_large = (np.sum(np.array(drawn) >= found) + 1) / (DRAWS + 1)
    figures = {"same_organ": same, "other_organ": other, "difference": found, "p": as_large}
    return {"pairs": len(pairs)} | {n: None if np.isnan(found) else round(float(v), 4) for n, v in figures.items()}
