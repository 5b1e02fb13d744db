"""3D average pooling, as the projector of M3D (Bai et al. 2024, arXiv 2404.00578; github.com/BAAI-DCAI/M3D).

Taken: tokens are averaged over boxes of neighbours. M3D pools its patches 2 x 2 x 2 in front of a projector that is
trained with it. Here the boxes are as many as the budget asks for, and the vision tower's output is averaged behind
its projector, so that it also works without training (`train_hf.py --scheduler pooling` trains with it). A mean keeps
the place of its box's middle token, since places are whole numbers. The original works on the tower's output: set
`scheduler_layer` to -1.
"""

import torch

from photon.schedulers.boxes import box_of_tokens
from photon.schedulers.rows import RowScheduler


class PoolingScheduler(RowScheduler):
    """Keeps the middle token of each of `count` boxes, and gives it the mean of its box."""

    name = "pooling"
    needs = frozenset({"coordinates", "hidden_states"})

    def choose(self, row, count):
        label, middles = box_of_tokens(row.coordinates, count)
        keep = torch.zeros(len(row), dtype=torch.bool, device=middles.device)
        keep[middles] = True
        if not count:
            return keep, None
        inside = label >= 0
        sums = row.hidden_states.new_zeros(count, row.hidden_states.shape[1])
        sums = sums.index_add(0, label[inside], row.hidden_states[inside])
        means = sums / label[inside].bincount(minlength=count)[:, None]
        return keep, row.hidden_states.index_copy(0, middles, means)
