"""A learning rate for each part of the model, and Muon for the matrices of the layers (`--muon-learning-rate`).

Muon gives each matrix an update with equal singular values, so that directions with small gradients move too. A
decoder needs this to find the few visual tokens of a lesion among hundreds of others: `dev/LOG.md` has the comparison
with AdamW. Muon needs complete matrices: not with FSDP or ZeRO.
"""

import torch

from photon.training.parts import GROUPS, group_of


def parameter_groups(model, args, decayed):
    """Groups of trained parameters for an optimizer: by part of the model, by weight decay, by optimizer.

    Args: args: with `learning_rate`, `vision_learning_rate`, ...; decayed: names of parameters with weight decay.
    """
    found, muon_rate = {}, args.muon_learning_rate
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            muon = muon_rate is not None and by_muon(name, parameter)
            found.setdefault((GROUPS.index(group_of(name)), name not in decayed, muon), []).append(parameter)
    groups = []
    for (part, plain, muon), parameters in sorted(found.items()):
        rate = muon_rate if muon else getattr(args, f"{GROUPS[part]}_learning_rate", None)
        groups.append(
            {
                "params": parameters,
                "weight_decay": 0.0 if plain else args.weight_decay,
                "lr": args.learning_rate if rate is None else rate,
                "name": f"{GROUPS[part]}_muon" if muon else GROUPS[part],
                **({} if muon_rate is None else {"muon": muon}),
            }
        )
    return groups


def by_muon(name, parameter):
    """Whether a parameter is a matrix of a decoder layer or a block of the vision tower."""
    return parameter.ndim == 2 and (".layers." in name or ".blocks." in name)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some groups and AdamW for the others, as one optimizer.

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
            # set at each step, because loading a checkpoint replaces both
            part.param_groups, part.state = [g for g in self.param_groups if g["muon"] == muon], self.state
            part.step()
        return loss
