"""Puts questions to other patients' scans: what is answered without the right scan."""

import numpy as np


def swapped(rows, seed=0):
    """The same questions, each on the scan of another patient.

    All questions of a patient get the scans of one other patient, which the seed draws. Raises `ValueError` where
    there is no other patient among questions with as many scans.
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
        place = scans[count][row["patient"]].index(row["volumes"])
        out.append({**row, "volumes": list(given[place % len(given)])})
    return out
