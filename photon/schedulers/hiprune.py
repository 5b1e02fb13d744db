"""HiPrune (arXiv 2508.00553; github.com/Danielement321/HiPrune): anchors, their neighbours, and registers.

Taken: anchors receive the most attention in the vision tower's middle block (block 16 of 32 in the authors' Qwen2.5-VL
form, the middle here for any depth); their neighbours stay with them; the rest of the budget are the tokens that
receive the most in the last block. Different: this is a 3D variant with six neighbours and alpha / 7 anchors, where
the original has four in the plane and alpha / 5; neighbours do not wrap around a row's end; attention is taken slab by
slab, as the tower computes it. The original runs on the tower's output: set `scheduler_layer` to -1.
"""

import torch

from photon.schedulers.recorders import MIDDLE, record_middle
from photon.schedulers.rows import RowScheduler, top

ALPHA = 0.1  # share of the budget for anchors with their neighbours


class HiPruneScheduler(RowScheduler):
    """Keeps anchors, their six neighbours, and then the tokens with the most attention in the last block."""

    name = "hiprune"
    needs = frozenset({"coordinates", "vision"})
    scan_records = MIDDLE
    record_scan = staticmethod(record_middle)

    def choose(self, row, count):
        anchors = top(row.more["middle_attention"], round(ALPHA * count / 7))
        scan, place = row.coordinates[:, 0], row.coordinates[:, 1:]
        distance = (place[:, None] - place[anchors]).abs().sum(-1)  # (V, anchors)
        near = ((distance == 1) & (scan[:, None] == scan[anchors])).any(-1)
        rank = row.vision_attention.argsort(descending=True, stable=True).argsort()  # 0: the most attention
        score = 2.0 * anchors + (near & ~anchors) - rank / len(row)
        return top(score.to(torch.float64), count), None
