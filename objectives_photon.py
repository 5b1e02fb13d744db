"""What Photon trains on, row by row: next-token loss, band, robust, flip (paper section 3.4; numbers of the release).

A batch may mix kinds of rows. Every term is weighted by a row's answer tokens, so that one batch of four rows, and
four batches of one row with the same `num_items`, give the same loss.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from .scheduling_photon import ScheduleFields, gather_places


@dataclass
class PhotonCausalLMOutputWithPast(ScheduleFields, CausalLMOutputWithPast):
    """
    As `PhotonModelOutputWithPast`, with `logits` (B, S', vocabulary), and the parts of `loss`.

    Args:
        keep_index (`torch.LongTensor` of shape `(B, S')`): as of `PhotonModelOutputWithPast`.
        lm_loss (`torch.FloatTensor` of shape `()`): mean over answer tokens; entropy or flip in rows of that kind.
        band_loss (`torch.FloatTensor` of shape `()`): before `config.band_weight`; 0 in the dense phase.
    """

    keep_index: torch.LongTensor | None = None
    lm_loss: torch.FloatTensor | None = None
    band_loss: torch.FloatTensor | None = None


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


def all_losses(logits, labels, outputs, objective, row_weight, total, config, band=True):
    """The model's loss and its two parts, as fields of the output.

    Args: logits (B, S', vocabulary); labels (B, S) of the unpruned sequence, cut here as the logits are; outputs: of
        `PhotonModel`; objective (B,) or `None`; row_weight (B,), each row's share of the loss; total: answer tokens of
        the whole step; band: whether the band loss counts.
    """
    keep_index = outputs.keep_index
    if keep_index is not None:
        labels = gather_places(labels, keep_index).masked_fill(keep_index < 0, -100)
    target = F.pad(labels, (0, 1), value=-100)[:, 1:]  # place s predicts the token at s + 1
    sums, _ = answer_losses(logits, target, objective, config.flip_eps)  # (B,)
    lm_loss, band_loss = sums.sum() / total, sums.new_zeros(())
    if outputs.keep_prob is not None and band:
        places = torch.arange(outputs.keep_prob.shape[1], device=labels.device)
        visual = places < outputs.visual_count[:, None].to(labels.device)
        rows = band_losses(outputs.keep_prob, visual, config.band_low, config.band_high)
        if objective is not None:
            rows = rows * (objective == Objective.ANSWER)
        band_loss = (rows * row_weight).sum()
    return {"loss": lm_loss + config.band_weight * band_loss, "lm_loss": lm_loss, "band_loss": band_loss}


def full_length(values, keep_index, length):
    """Logits or hidden states (B, S, X) at the places of the prompt, with zeros where a token was deleted.

    values (B, S', X) of the cut sequence; keep_index (B, S'), or `None` where nothing was cut; length: S.
    """
    if keep_index is None:
        return values
    places = keep_index.clamp(min=0)[..., None].expand_as(values)
    kept = torch.where(keep_index[..., None] >= 0, values, 0)  # padded places share place 0
    return values.new_zeros(len(values), length, values.shape[-1]).scatter_add(1, places, kept)
