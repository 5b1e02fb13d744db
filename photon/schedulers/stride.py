"""Evenly spaced tokens: a control that covers the whole scan and reads no question."""

import torch

from photon.schedulers.budget import BudgetScheduler


class StrideScheduler(BudgetScheduler):
    """Keeps tokens at even distances in the order of the prompt, exactly `count` of each row.

    Tokens stand in the order depth, row, column, so even steps along the prompt are an even, slanted grid in the scan.
    """

    name = "stride"

    def select(self, inputs, count):
        place = torch.arange(inputs.visual.shape[1], device=inputs.visual.device)
        total = inputs.visual.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
        # token j is the first of its step where floor(j k / V) rises: k steps over V tokens
        step = (place * count[:, None]).div(total, rounding_mode="floor")
        before = ((place - 1) * count[:, None]).div(total, rounding_mode="floor")
        return (step > before) & inputs.visual
