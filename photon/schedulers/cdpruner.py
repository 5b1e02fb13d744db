"""CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967; github.com/Theia-4869/CDPruner), with Photon's saliency.

Taken: a determinantal point process with the kernel diag(r) S diag(r), S the cosines between tokens and r their
relevance to the question, and its greedy maximum. Different: the original's relevance is a cosine between CLIP's
picture and text embeddings, of which Qwen2.5-VL has none; here it is the model's own saliency between 0 and 1, as the
scheduling layer scores it. The rank of S is at most the width of a token: once no gain is left, the rest of the budget
are the most relevant tokens. The original runs on the vision tower's output: set `scheduler_layer` to -1.
"""

import torch
from torch.nn import functional as F

from photon.schedulers.rows import RowScheduler, row_of, top

LEAST_RELEVANCE = 1e-3  # the least relevant token may still be chosen
LEAST_GAIN = 1e-9


class CDPrunerScheduler(RowScheduler):
    """Keeps tokens one by one, each that which adds most to relevance and diversity together."""

    name = "cdpruner"
    needs = frozenset({"hidden_states"})

    def decide(self, inputs, count):
        self.saliency = self.reference(inputs).saliency
        return super().decide(inputs, count)

    def row(self, inputs, number):
        return row_of(inputs, number, saliency=self.saliency)

    def choose(self, row, count):
        relevance = row.more["saliency"].clamp(min=LEAST_RELEVANCE)
        if count in (0, len(row)):
            return top(relevance, count), None
        states = F.normalize(row.hidden_states.detach(), dim=-1).double() * relevance.double()[:, None]  # K = x x^T
        gain = (states * states).sum(-1)
        keep = torch.zeros(len(row), dtype=torch.bool, device=states.device)
        factors = states.new_zeros(count, len(row))  # of the Cholesky decomposition, a row for each chosen token
        for number in range(count):
            place = int(gain.masked_fill(keep, -torch.inf).argmax())
            if gain[place] < LEAST_GAIN:
                break
            keep[place] = True
            factor = (states @ states[place] - factors[:number].T @ factors[:number, place]) / gain[place].sqrt()
            factors[number] = factor
            gain = gain - factor**2
        return keep | top(relevance.masked_fill(keep, -torch.inf), count - int(keep.sum())), None
