"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764; github.com/pkunlp-icler/FastV): the last token's attention."""

import torch

from photon.schedulers.budget import BudgetScheduler


class FastVScheduler(BudgetScheduler):
    """Keeps the tokens that the prompt's last token attends to most, mean over heads.

    FastV scores after layer K - 1 (K = 2 in the paper) and deletes before layer K: set `scheduler_layer` to K - 1.
    Here as there the softmax is over the whole prompt, and the earlier layers keep every key and value.
    """

    name = "fastv"
    needs = frozenset({"sequence"})

    def score(self, inputs):
        groups = inputs.keys.shape[1]
        query = inputs.last_query.float().unflatten(1, (groups, -1))[..., 0, :]  # (B, G, H / G, d)
        places = torch.arange(inputs.real.shape[1], device=inputs.real.device)
        visible = (inputs.real & (places <= inputs.last_index))[:, None, None]  # (B, 1, 1, S)
        logits = torch.einsum("bghd,bgsd->bghs", query, inputs.keys.float()) * inputs.scaling
        total = logits.masked_fill(~visible, -torch.inf).logsumexp(-1, keepdim=True)
        visual = torch.einsum("bghd,bgvd->bghv", query, inputs.visual_keys.float()) * inputs.scaling
        return (visual - total).exp().mean((1, 2))
