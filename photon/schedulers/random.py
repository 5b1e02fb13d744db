"""Random tokens: the control that every method has to beat (UniPruneBench, arXiv 2511.02650, finds that few do)."""

import torch

from photon.schedulers.budget import BudgetScheduler


class RandomScheduler(BudgetScheduler):
    """Keeps random tokens, drawn from the seed and the words of the prompt.

    The draw of a row does not depend on the other rows of its batch, nor on the answer written so far.
    """

    name = "random"
    needs = frozenset({"row_number"})
    draws = True

    def score(self, inputs):
        scores = []
        for number in inputs.row_number.tolist():
            generator = torch.Generator().manual_seed((number + self.seed) % 2**63)
            scores.append(torch.rand(inputs.visual.shape[1], generator=generator))  # a prefix of a longer row's
        return torch.stack(scores).to(inputs.visual.device)
