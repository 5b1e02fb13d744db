"""IVTP-style (Huang et al., ECCV 2024): first what the vision tower attends to, then what the instruction does.

No code of the authors is public; this follows descriptions of the paper and is uncertain in its details. Taken: two
stages, one by the tower's attention without the question, one by the attention of a pseudo-CLS token that is pooled
from the instruction. Different: the original prunes within groups of three layers of tower and decoder by attention
rollout, which needs all pairs of tokens in each layer; here each stage has the attention of one layer (the tower's
last full-attention block, slab by slab; the scheduling layer), and the first stage keeps the geometric mean of the
budget and all tokens. The original pools the instruction tokens that CLIP finds like the picture, of which Qwen2.5-VL
has none; here Photon's own weights of the question's tokens pool them.
"""

import torch

from photon.schedulers.rows import RowScheduler, top
from photon.scheduling_photon import question_weights


class IVTPScheduler(RowScheduler):
    """Keeps, of the tokens with the most attention in the tower, those that the pooled question attends to most."""

    name = "ivtp"
    needs = frozenset({"vision"})

    def choose(self, row, count):
        first = top(row.vision_attention, round((count * len(row)) ** 0.5))
        return top(self.pooled_attention(row).masked_fill(~first, -1.0), count), None

    def pooled_attention(self, row):
        """(V,): attention of the weighted mean of the question's queries, mean over heads."""
        queries, keys = row.queries[None], row.question_keys[None]
        real = torch.ones(1, queries.shape[2], dtype=torch.bool, device=queries.device)
        tiny = torch.finfo(queries.dtype).tiny
        weights = question_weights(queries, keys, real, row.scaling, floor=tiny)[0]  # add up to 1, or are all 0
        weights = weights if weights.any() else torch.full_like(weights, 1 / len(weights))
        pooled = (row.queries * weights[:, None]).sum(1, keepdim=True)  # (H, 1, d)
        return row.attention(pooled).mean((0, 1))
