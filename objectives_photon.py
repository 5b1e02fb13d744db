"""What Photon trains on, row by row: next-token loss, band, robust, flip (paper section 3.4; numbers of the release).

A batch may mix kinds of rows. Every term is weighted by a row's answer tokens, so that one batch of four rows, and
four batches of one row with the same `num_items`, give the same loss.
"""

from enum import IntEnum

import torch
from torch.nn import functional as F


class Objective(IntEnum):
    """A row's kind of loss."""

    ANSWER = 0  # cross-entropy of the answer
    ROBUST = 1  # the scan was perturbed: be unsure
    FLIP = 2  # the row kept what it would drop: do not know the answer


def answer_losses(logits, target, objective=None, flip_eps=1e-6):
    """Sum over a row's answer tokens of its kind of loss, and how many there are.

    Args: logits (B, S, vocabulary); target (B, S), the token that each place predicts, -100 where there is nothing
        to learn; objective (B,) of `Objective`, default all `ANSWER`; flip_eps: guard of the flip objective's
        logarithm.
    Returns: (B,) float32 sums, (B,) counts. Cross-entropy for `ANSWER`; minus the entropy for `ROBUST`;
        -log(1 - p(token) + eps) for `FLIP`.
    """
    row, place = (target != -100).nonzero(as_tuple=True)
    log_prob = logits[row, place].float().log_softmax(-1)  # (N, vocabulary), answer tokens alone
    chosen = log_prob.gather(-1, target[row, place][:, None])[:, 0]  # (N,)
    losses = -chosen
    if objective is not None:
        kind = objective[row]
        entropy = -(log_prob.exp() * log_prob).sum(-1)
        flip = -torch.log(1 - chosen.exp() + flip_eps)
        losses = torch.where(kind == Objective.ROBUST, -entropy, torch.where(kind == Objective.FLIP, flip, losses))
    count = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
    sums = count.index_add(0, row, losses)
    return sums, count.index_add(0, row, torch.ones_like(losses))


def band_losses(keep_prob, visual, low, high):
    """relu(r - high) + relu(low - r), r the mean keep probability of a row's visual tokens.

    keep_prob (B, V), visual (B, V) bool. Returns (B,), 0 for a row without visual tokens.
    """
    ratio = (keep_prob * visual).sum(-1) / visual.sum(-1).clamp(min=1)
    return (F.relu(ratio - high) + F.relu(low - ratio)) * visual.any(-1)
