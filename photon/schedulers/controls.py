"""Selections to compare the scheduler's with: other tokens, as many (`evaluate_hf.py --scheduler`).

A model that answers as well from them does not owe its answers to the tokens that its scheduler chose. The third
control needs no code: `--token-budget 0` withdraws all visual tokens after the scheduling layer.
"""

from dataclasses import replace

import torch
from torch import nn

from photon.scheduling_photon import most_salient

CONTROLS = ("random", "flipped")


class ControlScheduler(nn.Module):
    """A scheduler that asks another one how many visual tokens a row keeps, and keeps other ones.

    Args: scheduler: the model's own; control: "random", drawn anew from the seed for each batch, or "flipped", the
        least salient; seed.
    """

    def __init__(self, scheduler, control, seed=0):
        super().__init__()
        if control not in CONTROLS:
            raise ValueError(f"control is {control!r}; expected one of {', '.join(CONTROLS)}.")
        self.scheduler, self.control, self.seed = scheduler, control, seed
        self.most_salient = most_salient

    def forward(self, *args, **kwargs):
        """As `TokenScheduler.forward`."""
        schedule = self.scheduler(*args, **kwargs)
        visual = torch.arange(schedule.keep.shape[1], device=schedule.keep.device) < schedule.visual_count[:, None]
        score = -schedule.saliency
        if self.control == "random":
            chance = torch.Generator().manual_seed(self.seed)
            score = torch.rand(score.shape, generator=chance).to(score.device)
        return replace(schedule, keep=self.most_salient(score, visual, schedule.keep.sum(-1)))
