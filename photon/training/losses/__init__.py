"""The losses of training, and the one place of their weights.

| in the log | what it teaches | weight | where |
|---|---|---|---|
| `lm_loss` | the answer; in robust rows doubt, in flipped rows not to know | 1 | `objectives_photon.py` |
| `band_loss` | to keep a share of the tokens between `band_low` and `band_high` | `--photon band_weight=1.0` | same |
| `token_loss` | what each visual token holds, from label maps | `--token-label-weight` | `token_labels.py` |
| `evidence_loss` | to keep the tokens that a question is about | `--evidence-weight` | `evidence.py` |

How many rows are robust or flipped: `--photon robust_probability=0.15 flip_probability=0.05`. `loss_weights` returns
the weights of a run; `train_hf.py` prints them when it starts.

To add a loss: one new file in this folder, and one line with its import below. This one asks for confident answers:

    from dataclasses import dataclass, field
    import torch
    from photon.training.losses.base import Loss

    @dataclass
    class SharpnessArguments:
        sharpness_weight: float = field(default=0.0, metadata={"help": "learn to keep or drop without doubt"})

    class SharpnessLoss(Loss):
        name, weight, Arguments = "sharpness_loss", "sharpness_weight", SharpnessArguments

        def __call__(self, batch):  # a `LossBatch`; returns (B,), one value a row
            prob = batch.outputs.keep_prob  # (B, V)
            return (prob * (1 - prob)).mean(-1)

`train_hf.py --sharpness-weight 0.1` then trains with it and logs `sharpness_loss`. What else a loss can have (targets
from the rows, columns, a module that learns with the model) is in `base.py`.
"""

from dataclasses import make_dataclass

from photon.training.losses.base import LOSSES, Loss, LossBatch, row_shares

# the registered losses: a new one is one more line here
from photon.training.losses.evidence import EvidenceLoss
from photon.training.losses.token_labels import TokenLabelLoss

LossArguments = make_dataclass("LossArguments", [], bases=tuple(loss.Arguments for loss in LOSSES.values()))
LossArguments._argument_group_name = "losses"
LossArguments.__doc__ = "Weights and settings of the losses, each from its loss's file."


def used_losses(arguments):
    """Classes of the losses that the arguments ask for."""
    return [loss for loss in LOSSES.values() if loss.used(arguments)]


def loss_weights(config, losses):
    """{name in the log: weight} of all losses of a run; losses: list of `Loss`."""
    return {"lm_loss": 1.0, "band_loss": config.band_weight} | {loss.name: loss.factor for loss in losses}


__all__ = [
    "LOSSES",
    "EvidenceLoss",
    "Loss",
    "LossArguments",
    "LossBatch",
    "TokenLabelLoss",
    "loss_weights",
    "row_shares",
    "used_losses",
]
