"""EVS, efficient video sampling (arXiv 2510.14624; vllm/multimodal/evs.py, Apache-2.0): what changes along the depth.

Taken: the vision tower's output of a slab is compared with the slab before at the same place; 1 - cosine is the score,
and the first slab is kept first. Different: the budget may be smaller than a slab, which the original keeps whole;
tokens keep their positions, and text follows them as in Photon. It reads no question. `evs-centre` starts from the
middle slab and compares with the neighbour on that side, since the first slab of a chest or an abdomen is mostly air.
Set `scheduler_layer` to -1.
"""

import torch
from torch.nn import functional as F

from photon.schedulers.rows import RowScheduler, top

FIRST = 3.0  # above any 1 - cosine


class EVSScheduler(RowScheduler):
    """Keeps the first slab and the tokens that differ most from the slab before."""

    name = "evs"
    needs = frozenset({"coordinates", "hidden_states"})
    centre = False

    def choose(self, row, count):
        return top(self.change(row), count), None

    def change(self, row):
        """(V,): how much each token differs from its neighbour in depth."""
        change = torch.full((len(row),), FIRST, device=row.coordinates.device)
        for scan in row.coordinates[:, 0].unique():
            inside = row.coordinates[:, 0] == scan
            places, states = row.coordinates[inside, 1:], row.hidden_states[inside]
            slabs = int(places[-1, 0]) + 1
            states = states.view(slabs, -1, states.shape[1])  # (slabs, tokens of a slab, D)
            between = 1 - F.cosine_similarity(states[1:], states[:-1], dim=-1)  # (slabs - 1, tokens of a slab)
            first = slabs // 2 if self.centre else 0
            whole = torch.full_like(states[:1, :, 0], FIRST)
            change[inside] = torch.cat([between[:first], whole, between[first:]]).flatten()
        return change


class EVSCentreScheduler(EVSScheduler):
    """EVS from the middle slab outwards."""

    name = "evs-centre"
    centre = True
