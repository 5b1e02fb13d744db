"""ToMe, token merging (Bolya et al., ICLR 2023, arXiv 2210.09461), in rounds behind the vision tower's merger.

Written from the paper's text: tokens alternate between two sets, each of the first set proposes the token of the
second whose key is most like its own, and the r best pairs merge into means weighted by how many tokens each holds.
The authors' code (github.com/facebookresearch/ToMe) is under CC BY-NC, and nothing of it is used here. Different: the
original merges in every layer of the tower, where Qwen2.5-VL's windows and its 2 x 2 merger stand in the way; here
rounds follow one another on the tower's output, each merging at most half, until the budget is met. A pair keeps the
place of its second token. The original also adds the logarithm of a token's size to attention, which is left out.
Set `scheduler_layer` to -1.
"""

import torch
from torch.nn import functional as F

from photon.schedulers.rows import RowScheduler


class ToMeScheduler(RowScheduler):
    """Merges the most similar pairs until `count` tokens are left."""

    name = "tome"
    needs = frozenset({"vision", "hidden_states"})

    def choose(self, row, count):
        keep = torch.ones(len(row), dtype=torch.bool, device=row.vision_keys.device)
        if count in (0, len(row)):
            return keep & (count > 0), None
        states, keys, place = row.hidden_states, row.vision_keys, torch.arange(len(row), device=keep.device)
        size = torch.ones(len(row), 1, device=keep.device)
        while len(place) > count:
            directions = F.normalize(keys, dim=-1)
            like, partner = (directions[::2] @ directions[1::2].T).max(-1)  # of each in the first set
            going = like.argsort(descending=True, stable=True)[: len(place) - count]
            source, target = 2 * going, 2 * partner[going] + 1
            total = size.index_add(0, target, size[source])
            states, keys = (
                (values * size).index_add(0, target, (values * size)[source]) / total for values in (states, keys)
            )
            stays = torch.ones(len(place), dtype=torch.bool, device=keep.device)
            stays[source] = False
            states, keys, size, place = (values[stays] for values in (states, keys, total, place))
        keep = torch.zeros_like(keep)
        keep[place] = True
        return keep, row.hidden_states.index_copy(0, place, states)
