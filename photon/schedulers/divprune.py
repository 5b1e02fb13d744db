"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): the most diverse tokens. Written from the paper's formula.

Taken: distance 1 - cosine between the vision tower's output tokens; first the token whose nearest neighbour is
farthest, then always the token that is farthest from those chosen. The authors' code (github.com/vbdi/divprune) is
under CC BY-NC, and nothing of it is used here. Different: a running minimum takes the place of the matrix of all
distances, so memory is O(V). It reads no question. The original runs on the tower's output: set `scheduler_layer` to
-1; elsewhere it compares the hidden states that enter the cut.
"""

import torch
from torch.nn import functional as F

from photon.schedulers.rows import RowScheduler

ROWS_AT_ONCE = 512


class DivPruneScheduler(RowScheduler):
    """Keeps tokens one by one, each the farthest from those kept before."""

    name = "divprune"
    needs = frozenset({"hidden_states"})

    def choose(self, row, count):
        keep = torch.zeros(len(row), dtype=torch.bool, device=row.hidden_states.device)
        if count in (0, len(row)):
            return keep | (count > 0), None
        states = F.normalize(row.hidden_states.detach(), dim=-1)
        place = int(_nearest_other(states).argmax())
        distance = torch.full_like(states[:, 0], torch.inf)
        for _ in range(count):
            keep[place] = True
            distance = torch.minimum(distance, 1 - states @ states[place]).masked_fill(keep, -torch.inf)
            place = int(distance.argmax())
        return keep, None


def _nearest_other(states):
    """(V,): each token's distance to its nearest neighbour; some rows of the matrix of distances at a time."""
    nearest = []
    for part in torch.arange(len(states), device=states.device).split(ROWS_AT_ONCE):
        distance = 1 - states[part] @ states.T
        distance[torch.arange(len(part), device=part.device), part] = torch.inf
        nearest.append(distance.amin(-1))
    return torch.cat(nearest)
