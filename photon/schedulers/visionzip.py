"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467; github.com/dvlab-research/VisionZip), its form for Qwen2.5-VL.

Dominant tokens receive the most attention in the vision tower. Of the rest, contextual tokens are taken at even steps,
and every token that goes is averaged, by the cosine of its keys, into one of them. It reads no question. The attention
is taken slab by slab, as the tower computes it; the public code lets all patches compete, which the tower never does.
"""

import torch
from torch.nn import functional as F

from photon.schedulers.budget import BudgetScheduler
from photon.scheduling_photon import most_salient


class VisionZipScheduler(BudgetScheduler):
    """Keeps dominant and contextual tokens, and merges the others into the contextual ones.

    Contextual tokens are 5 % of all, as in the Qwen2.5-VL form, and at most 10 of 64 kept, as in the form for LLaVA.
    The original runs on the vision tower's output: set `scheduler_layer` to -1.
    """

    name = "visionzip"
    needs = frozenset({"vision", "hidden_states"})
    contextual_share, contextual_of_kept = 0.05, 10 / 64

    def select(self, inputs, count):
        return self.dominant_and_targets(inputs, count).any(0)

    def dominant_and_targets(self, inputs, count):
        """(2, B, V) bool: dominant tokens, contextual tokens."""
        total = inputs.visual.sum(-1)
        contextual = torch.minimum(self.contextual_share * total, self.contextual_of_kept * count).round().long()
        dominant = most_salient(inputs.vision_attention, inputs.visual, count - contextual)
        rest = inputs.visual & ~dominant
        order = rest.cumsum(-1) - 1  # a token's number among the rest
        many = rest.sum(-1, keepdim=True).clamp(min=1)
        step = (order * contextual[:, None]).div(many, rounding_mode="floor")
        before = ((order - 1) * contextual[:, None]).div(many, rounding_mode="floor")
        return torch.stack([dominant, rest & (step > before)])

    def merge(self, inputs, keep_mask):
        """A contextual token plus the mean of the tokens that join it: the sum, as in the authors' code."""
        dominant, targets = self.dominant_and_targets(inputs, keep_mask.sum(-1))
        states = inputs.hidden_states
        keys = F.normalize(inputs.vision_keys.float(), dim=-1)
        merged = states.clone()
        for row in range(len(states)):  # rows differ in how many tokens join
            target = targets[row].nonzero()[:, 0]
            going = (inputs.visual[row] & ~dominant[row] & ~targets[row]).nonzero()[:, 0]
            if len(target) and len(going):
                nearest = (keys[row, going] @ keys[row, target].T).argmax(-1)
                sums = torch.zeros_like(states[row, target]).index_add_(0, nearest, states[row, going])
                joined = torch.bincount(nearest, minlength=len(target)).clamp(min=1)[:, None]
                merged[row, target] = states[row, target] + sums / joined.to(states.dtype)
        return merged
