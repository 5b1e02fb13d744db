"""Tokens at even distances along all three axes: a control that covers the whole scan and reads no question."""

import torch

from photon.schedulers.boxes import box_of_tokens
from photon.schedulers.rows import RowScheduler


class GridScheduler(RowScheduler):
    """Keeps the middle token of each of `count` boxes into which the scan is split, exactly `count` of each row.

    A uniform stride along each axis meets few budgets; boxes that are halved until there are enough meet all.
    """

    name = "grid"
    needs = frozenset({"coordinates"})

    def choose(self, row, count):
        _, middles = box_of_tokens(row.coordinates, count)
        keep = torch.zeros(len(row), dtype=torch.bool, device=middles.device)
        keep[middles] = True
        return keep, None
