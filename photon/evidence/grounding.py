"""How well grounding tells right answers from wrong ones, and the right scan from another patient's."""

import numpy as np
from scipy.stats import rankdata

from photon.evaluation.resampling import interval

DRAWS = 1000


def auroc(values, positive):
    """The chance that a positive has a higher value than a negative, ties half; `nan` without one of either."""
    count, others = positive.sum(), (~positive).sum()
    if not count or not others:
        return np.nan
    return (rankdata(values)[positive].sum() - count * (count + 1) / 2) / (count * others)


def with_interval(values, positive, patients, seed=0):
    """[AUROC, low, high], 95 % over draws of patients with replacement."""
    values, positive = np.array(values, float), np.array(positive, bool)
    names = sorted(set(patients))
    members = {name: [] for name in names}
    for i, patient in enumerate(patients):
        members[patient].append(i)
    members, random, drawn = [np.array(members[name]) for name in names], np.random.default_rng(seed), []
    for _ in range(DRAWS):
        chosen = np.concatenate([members[i] for i in random.integers(len(members), size=len(members))])
        drawn.append(auroc(values[chosen], positive[chosen]))
    found = interval(auroc(values, positive), np.array(drawn))
    return [None if found[name] is None else round(found[name], 4) for name in ("value", "low", "high")]


def reliability(records):
    """{"right_or_wrong", "own_or_other_scan": [AUROC, low, high]} of records with grounding of "own" and "other"."""
    some = [record for record in records if None not in (record["grounding"].get(n) for n in ("own", "other"))]
    own, other = ([record["grounding"][name] for record in some] for name in ("own", "other"))
    patients = [record["patient"] for record in some]
    return {
        "right_or_wrong": with_interval(own, [record["right"]["own"] for record in some], patients),
        "own_or_other_scan": with_interval(own + other, [True] * len(own) + [False] * len(other), patients * 2),
    }
