"""ATP-LLaVA (Ye et al., CVPR 2025, arXiv 2412.00447) at one layer: two learned thresholds, soft masks in training.

No code of the authors is public; this follows the paper's formulas as described and a student's re-implementation,
and is uncertain in its details. Taken: a redundancy score, the mean of a token's visual and textual attention
(S_self, the mean logit of its query with all visual keys, computed as one product; S_cross, the text tokens'
attention to it); a spatial score, 1 - lambda R for tokens of an even grid of rate R and 0 for others; pooled scores
to two thresholds by a linear layer; masks sigmoid(10 (S - threshold)), of which the larger counts. In training all
tokens stay and the mask weighs their keys; in inference a token stays where either score is above its threshold
(`native=True`), or the highest margins stay where a call gives a budget. Different: one layer, `scheduler_layer`, in
place of three; both parts of the first score are scaled to 0..1 over a row, without which no sigmoid threshold fits
them; scores are pooled to 16 means along the prompt; the grid is in three dimensions. The paper's loss 0.2 |mean kept
- target| is the band loss with `band_low` = `band_high` = target and `band_weight` = 0.2; its penalty on deep layers
has nothing to choose from at one.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from photon.schedulers.boxes import box_of_tokens
from photon.schedulers.recorders import record_queries
from photon.schedulers.rows import RowScheduler, row_of, top
from photon.scheduling_photon import LOG_OF_NOTHING

RATE, LAMBDA = 0.25, 3.0
SHARPNESS = 10.0  # of the masks
POOLED = 16


class ATPScheduler(RowScheduler):
    """Keeps the tokens that are above one of two learned thresholds the most."""

    name = "atp"
    needs = frozenset({"coordinates"})
    lowest_layer, learns = 0, True  # it reads a layer's visual queries
    record_layers = staticmethod(record_queries)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.thresholds = nn.Linear(2 * POOLED, 2)
        nn.init.zeros_(self.thresholds.weight)
        nn.init.constant_(self.thresholds.bias, -3.0)  # nearly everything stays at first

    def forward(self, inputs):
        if not (self.training and inputs.deletes):
            return super().forward(inputs)
        schedule = self.reference(inputs)
        mask = torch.zeros_like(schedule.keep_prob.detach())
        for number in range(len(mask)):
            mask[number, inputs.visual[number]] = (SHARPNESS * self.margin(row_of(inputs, number))).sigmoid()
        log_gate = mask.clamp(min=torch.finfo(mask.dtype).tiny).log().clamp(min=LOG_OF_NOTHING)
        log_gate = log_gate.masked_fill(~inputs.visual, 0.0)
        mask = mask + 0.0 * schedule.keep_prob.sum()  # the reference takes part in the reduction over ranks
        return replace(schedule, keep_mask=inputs.visual, keep_prob=mask, log_gate=log_gate)

    def own_count(self, inputs):
        margins = [self.margin(row_of(inputs, number)) for number in range(len(inputs.visual))]
        return torch.tensor([int((margin > 0).sum()) for margin in margins], device=inputs.visual.device)

    def choose(self, row, count):
        return top(self.margin(row), count), None

    def margin(self, row):
        """(V,): by how much a token is above the nearer of its two thresholds."""
        redundancy, spatial = self.scores(row)
        pooled = [F.adaptive_avg_pool1d(score[None, None], POOLED)[0, 0] for score in (redundancy, spatial)]
        first, second = self.thresholds(torch.cat(pooled)).sigmoid()
        return torch.maximum(redundancy - first, spatial - second)

    def scores(self, row):
        """(V,) each: redundancy and spatial score."""
        queries = row.more["layer_queries"].transpose(0, 1)  # (H, V, d)
        keys = row.visual_keys.mean(1).repeat_interleave(len(queries) // len(row.visual_keys), dim=0)  # (H, d)
        own = torch.einsum("hvd,hd->v", queries, keys) * (row.scaling / len(queries))
        cross = row.attention(row.queries).mean((0, 1))
        redundancy = (scaled(own) + scaled(cross)) / 2
        _, middles = box_of_tokens(row.coordinates, max(round(RATE * len(row)), 1))
        spatial = torch.zeros_like(redundancy)
        spatial[middles] = 1 - LAMBDA * RATE
        return redundancy, spatial


def scaled(values):
    return (values - values.min()) / (values.max() - values.min()).clamp(min=torch.finfo(values.dtype).tiny)
