"""Intervals: percentiles of a bootstrap that draws whole patients with replacement.

Questions about one patient are not independent, so a patient is drawn with all of his or her questions. All draws are
one matrix of weights (resamples, patients), and every figure is a function of sums over questions. So a figure of all
draws is one computation. The same seed and questions give the same interval, whatever the order of the questions.
"""

import numpy as np


class Sums:
    """Sums of questions' parts by subtask, over all questions and over each draw of patients.

    Args: rows; parts (questions, P) of a measure; resamples: number of draws, 0 for none; seed: of the draws.
    """

    def __init__(self, rows, parts, resamples, seed):
        self.subtasks = sorted({row["subtask"] for row in rows})
        patients = sorted({row["patient"] for row in rows})
        place = {name: i for i, name in enumerate(patients)}
        column = {name: i for i, name in enumerate(self.subtasks)}
        flat = np.array([place[row["patient"]] * len(self.subtasks) + column[row["subtask"]] for row in rows])
        by_patient = np.zeros((len(patients) * len(self.subtasks), parts.shape[1]))
        np.add.at(by_patient, flat, parts)
        by_patient = by_patient.reshape(len(patients), -1)  # (patients, subtasks x parts)
        shape = (len(self.subtasks), parts.shape[1])
        self.patients, self.all = len(patients), by_patient.sum(0).reshape(shape)
        self.drawn = None
        if resamples and len(patients) > 1:
            draws = np.random.default_rng(seed).multinomial(
                len(patients), np.full(len(patients), 1 / len(patients)), resamples
            )
            self.drawn = (draws @ by_patient).reshape(resamples, *shape)  # (resamples, subtasks, parts)

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
    return {"value": plain(value), "low": low, "high": high}


def plain(value):
    """A float that JSON can hold, or `None` for `nan`."""
    return None if np.isnan(value) else float(value)
