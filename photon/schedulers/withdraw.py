"""No visual token above the cut: what is still answered, text tokens have read of the scan in the layers below.

The control of every method that scores after some layers: VTW (Lin et al., AAAI 2025, arXiv 2405.05803) found that a
language model can lose all its visual tokens in the middle of its layers. Taken: all tokens go after the layer
`scheduler_layer`. VTW chooses that layer by a small calibration set; here it is given.
"""

import torch

from photon.schedulers.budget import BudgetScheduler


class WithdrawScheduler(BudgetScheduler):
    """Keeps nothing, unless a call asks for all tokens."""

    name = "withdraw"
    exact = False

    def select(self, inputs, count):
        everything = count >= inputs.visual.sum(-1)
        return inputs.visual & everything[:, None] if everything.any() else torch.zeros_like(inputs.visual)
