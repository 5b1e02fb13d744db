"""LLaVA-PruMerge and PruMerge+ (Shang et al., ICCV 2025, arXiv 2403.15388; github.com/42Shawn/LLaVA-PruMerge).

Taken: the tokens with the most attention stay; each of them adds the 32 tokens whose keys are most like its own,
weighted by their attention (not normalised, as in the authors' code); one more token is the sum of all that went,
weighted likewise. PruMerge+ keeps three tokens at even steps for each of these. The number of outliers (attention
above Q3 + 1.5 IQR) is the method's own count (`native=True`); with a budget the highest are taken, and the one token
of the sum is among them, at the place of the first that went. Different: Qwen2.5-VL's tower has no CLS token, so
attention is what a token receives from its slab, mean over queries; keys are means over heads, where the authors do
not split heads. The authors report results after tuning with the method. Set `scheduler_layer` to -1.
"""

import torch
from torch.nn import functional as F

from photon.schedulers.rows import RowScheduler, evenly, row_of, top

CLUSTER = 32  # tokens that a kept one adds
OUTLIER = 1.5  # times the interquartile range above the third quartile
GRID_SHARE = 0.75  # of PruMerge+'s tokens: three at even steps for each outlier


class PruMergeScheduler(RowScheduler):
    """Keeps the tokens with the most attention, merges like tokens into them, and adds one token of all the others."""

    name = "prumerge"
    needs = frozenset({"vision", "hidden_states"})
    grid_share = 0.0

    def own_count(self, inputs):
        """Outliers of each row by their attention, with their grid, and the token of the sum."""
        counts = []
        for number in range(len(inputs.visual)):
            attention = row_of(inputs, number).vision_attention
            low, high = attention.quantile(attention.new_tensor([0.25, 0.75]))
            outliers = int((attention > high + OUTLIER * (high - low)).sum())
            counts.append(min(round(outliers / (1 - self.grid_share)) + 1, len(attention)))
        return torch.tensor(counts, device=inputs.visual.device)

    def choose(self, row, count):
        if count in (0, len(row)):
            return top(row.vision_attention, count), None
        chosen = self.chosen(row, count - 1)
        weight = row.vision_attention / len(row)  # adds up to 1
        keys = F.normalize(row.vision_keys, dim=-1)
        kept = chosen.nonzero()[:, 0]
        like = keys[kept] @ keys.T  # (kept, V)
        like[torch.arange(len(kept), device=like.device), kept] = -torch.inf  # not itself
        nearest = like.topk(min(CLUSTER, len(row) - 1)).indices
        states = row.hidden_states
        added = (weight[nearest][..., None] * states[nearest]).sum(1)
        merged = states.index_add(0, kept, added)
        rest = (~chosen).nonzero()[:, 0]
        merged = merged.index_copy(0, rest[:1], (weight[rest, None] * states[rest]).sum(0, keepdim=True))
        keep = chosen.clone()
        keep[rest[0]] = True
        return keep, merged

    def chosen(self, row, count):
        """(V,) bool: `count` tokens into which the others are merged."""
        grid = round(self.grid_share * count)
        outliers = top(row.vision_attention, count - grid)
        return outliers | evenly(~outliers, grid)


class PruMergePlusScheduler(PruMergeScheduler):
    """PruMerge with three tokens at even steps for each token of the most attention."""

    name = "prumerge-plus"
    grid_share = GRID_SHARE
