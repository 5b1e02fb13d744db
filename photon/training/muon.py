"""Muon for the matrices of the layers, AdamW for the rest, as one optimizer (`--muon-learning-rate`).

Muon gives each matrix an update whose singular values are all alike, so that directions with small gradients move too.
That is what a decoder needs to find the few visual tokens of a lesion among hundreds that differ in everything else:
see `dev/LOG.md` for the comparison with AdamW. It needs whole matrices: not with FSDP or ZeRO.
"""

import torch


def by_muon(name, parameter):
    """Whether a parameter is a matrix of a decoder layer or a block of the vision tower."""
    return parameter.ndim == 2 and (".layers." in name or ".blocks." in name)


class MuonAdamW(torch.optim.Optimizer):
    """
    Args: groups, as for any optimizer, each with `muon` (bool), `lr` and `weight_decay`; options of AdamW.

    Muon's rate is on AdamW's scale (`match_rms_adamw`).
    """

    def __init__(self, groups, **options):
        self.parts = {
            True: torch.optim.Muon([g for g in groups if g["muon"]], adjust_lr_fn="match_rms_adamw"),
            False: torch.optim.AdamW([g for g in groups if not g["muon"]], **options),
        }
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for muon, part in self.parts.items():
            # anew each time: loading a checkpoint puts other objects in the place of both
            part.param_groups, part.state = [g for g in self.param_groups if g["muon"] == muon], self.state
            part.step()
        return loss
