"""MedPruner (MICCAI 2026, arXiv 2603.11625; github.com/Saint-lsy/MedPruner): slices that change, a nucleus of each.

Taken: a slab stays where it differs from its anchor, the last slab that stayed, by more than 0.05 in mean absolute
value (voxels between 0 and 1); slabs that go keep their first token. In each slab that stays the attention that
tokens receive in the tower's last block, softmax(attention / 2), is summed from the highest until it reaches tau =
0.9; 5 % of the slab's tokens are targets at even steps among the rest, into which all others of their slab are merged
by the cosine of their keys, as in VisionZip. `native=True` keeps as many as this rule says. With a budget tau is what
meets it: whether a token is in the nucleus depends on the sum of those before it, so the tokens with the least such
sums stay. Different: slices are slabs, as deep as a patch; targets are at most 10 of 64 kept. The attention averages
1 over a slab, so the softmax is nearly even unless a few tokens draw most of it. All slabs pass through the tower. It
reads no question. Set `scheduler_layer` to -1.
"""

import torch
from torch.nn import functional as F

from photon.schedulers.recorders import SLAB_CHANGE, VOXELS, record_voxels
from photon.schedulers.rows import RowScheduler, evenly, row_of, top

TEMPERATURE, TAU = 2.0, 0.9
TARGETS, TARGETS_OF_KEPT = 0.05, 10 / 64
ANCHOR = 2  # column of "voxels"
LAST = 2.0  # above any sum of probabilities


class MedPrunerScheduler(RowScheduler):
    """Keeps the nucleus of each slab that changes, and merges the rest of the slab into a few targets."""

    name = "medpruner"
    needs = frozenset({"coordinates", "vision", "hidden_states"})
    scan_records = VOXELS
    record_scan = staticmethod(record_voxels)

    def own_count(self, inputs):
        counts = []
        for number in range(len(inputs.visual)):
            row = row_of(inputs, number)
            slab, stays = slabs_of(row)
            nucleus = int(((sum_before(row, slab) < TAU) & stays).sum())
            gone, rest = len(slab[~stays].unique()), int(stays.sum()) - nucleus
            counts.append(nucleus + gone + min(round(TARGETS * int(stays.sum())), rest))
        return torch.tensor(counts, device=inputs.visual.device)

    def choose(self, row, count):
        slab, stays = slabs_of(row)
        before = sum_before(row, slab)
        gone = ~stays & (torch.cat([slab[:1] - 1, slab[:-1]]) != slab)  # the first token of each slab that goes
        targets = 0 if count == len(row) else round(min(TARGETS * int(stays.sum()), TARGETS_OF_KEPT * count))
        order = torch.where(stays, before, before + LAST)  # slabs that go are for budgets that they are needed for
        order = torch.where(gone, -1.0, order)
        nucleus = top(-order, count - targets)
        target = evenly(~nucleus & stays, targets)
        missing = count - int((nucleus | target).sum())
        nucleus = nucleus | top(torch.where(nucleus | target, -torch.inf, -order), missing)
        states = row.hidden_states
        keys = F.normalize(row.vision_keys, dim=-1)
        chosen, going = target.nonzero()[:, 0], (stays & ~nucleus & ~target).nonzero()[:, 0]
        if len(chosen) and len(going):
            like = (keys[going] @ keys[chosen].T).masked_fill(slab[going, None] != slab[chosen], -torch.inf)
            cosine, nearest = like.max(-1)
            going, nearest = going[cosine > -torch.inf], nearest[cosine > -torch.inf]  # of slabs with a target
            sums = torch.zeros_like(states[chosen]).index_add(0, nearest, states[going])
            states = states.index_add(0, chosen, sums / nearest.bincount(minlength=len(chosen)).clamp(min=1)[:, None])
        return nucleus | target, states


def slabs_of(row):
    """(V,) long: a number for each slab of each scan, rising in the prompt's order; (V,) bool: whether it changes."""
    depth = int(row.coordinates[:, 1].max()) + 1
    return row.coordinates[:, 0] * depth + row.coordinates[:, 1], row.more["voxels"][:, ANCHOR] > SLAB_CHANGE


def sum_before(row, slab):
    """(V,): the probability of all tokens of the slab that receive more attention than this one."""
    before = torch.zeros_like(row.vision_attention)
    for number in slab.unique():
        inside = (slab == number).nonzero()[:, 0]
        probability = (row.vision_attention[inside] / TEMPERATURE).softmax(0)
        order = probability.argsort(descending=True, stable=True)
        before[inside[order]] = probability[order].cumsum(0) - probability[order]
    return before
