"""How the cut learns, on tensors: surrogate gradient propagation (SGP, paper section 3.3), and gates.

Deleting a token is a step that has no slope, so the keep probabilities need a gradient from elsewhere:

- `surrogate_gather`: the gather of the kept tokens, with the release's backward rule for the keep probabilities;
- `soft_weight`: the soft phase, in which nothing is deleted and hidden states are weighted;
- `gate_mask`, `gated_flash_attention`: gates on attention logits; a key whose gate is 0 is as good as deleted.
B rows, S places of the prompt, S' places after the cut, V visual tokens, D channels.
"""

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .scheduling_photon import gather_places, scatter_places


def gate_mask(mask, gate):
    """An attention mask with a gate for each key: `gate` (B, S) is added to its logits.

    A gate of log(p) weighs a key by p against the others, so that p = 0 is the key's deletion. Scaling a hidden state
    by p is not: the norm in front of the next attention undoes it.
    mask (B, 1, S, S): bool, True where seen, or additive; `None` for a causal one. Returns (B, 1, S, S), additive.
    """
    if mask is None:
        mask = torch.ones(1, 1, gate.shape[1], gate.shape[1], dtype=torch.bool, device=gate.device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=gate.dtype).masked_fill(~mask, torch.finfo(gate.dtype).min)
    return (mask + gate[:, None, None, :]).clamp(min=torch.finfo(gate.dtype).min)


GATED_FLASH = "gated_flash_attention_2"  # a name for `attn_implementation`


def gated_flash_attention(module, query, key, value, attention_mask, scaling=None, key_gate=None, **kwargs):
    """Flash attention 2 with `key_gate` (B, K) added to each key's logits; without one, plain flash attention 2.

    Flash attention takes no bias, so query and key get channels more: 1 / scaling in the query and the gate in the key
    add up to the gate. The kernel wants multiples of eight, and values as wide as keys. query (B, H, Q, d), key and
    value (B, G, K, d); returns (B, Q, H, d) and the kernel's second result.
    """
    attend = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    if key_gate is None:
        return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    size = query.shape[-1]
    scaling = size**-0.5 if scaling is None else scaling
    more = 8 - size % 8
    one = F.pad(query.new_full((*query.shape[:-1], 1), 1 / scaling), (0, more - 1))
    gate = F.pad(key_gate[:, None, :, None].to(key.dtype).expand(*key.shape[:-1], 1), (0, more - 1))
    output, weights = attend(
        module,
        torch.cat([query, one], dim=-1),
        torch.cat([key, gate], dim=-1),
        F.pad(value, (0, more)),
        attention_mask,
        scaling=scaling,
        **kwargs,
    )
    return output[..., :size], weights


AttentionInterface.register(GATED_FLASH, gated_flash_attention)
AttentionMaskInterface.register(GATED_FLASH, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])


class SurrogateGather(torch.autograd.Function):
    """Delete tokens; on the way back, tell each visual token's keep probability which way the loss would like it."""

    @staticmethod
    def forward(ctx, hidden, keep_prob, visual_index, visual, index, rule, row_weight):
        ctx.save_for_backward(hidden, keep_prob, visual_index, visual, index, row_weight)
        ctx.rule = rule
        return gather_places(hidden, index)

    @staticmethod
    def backward(ctx, grad_output):
        hidden, keep_prob, visual_index, visual, index, row_weight = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        trailing = index.clamp(min=0)[..., None].expand_as(grad_output)
        # add, not set: padded places share index 0, and their gradient is zeroed first
        grad_hidden.scatter_add_(1, trailing, grad_output * (index >= 0)[..., None].to(grad_output.dtype))
        places = visual_index[..., None].expand(-1, -1, hidden.shape[-1])
        product = hidden.gather(1, places).float() * grad_hidden.gather(1, places).float()  # (B, V, D)
        if row_weight is not None:  # the row's own loss: the rule's floors hold for its scale, not for a share of it
            product = product / row_weight[:, None, None].clamp(min=torch.finfo(torch.float32).tiny)
        grad_keep = surrogate_gradient(product, keep_prob.float(), visual, ctx.rule)
        if row_weight is not None:
            grad_keep = grad_keep * row_weight[:, None]
        return grad_hidden, grad_keep.to(keep_prob.dtype), None, None, None, None, None


def surrogate_gradient(product, keep_prob, visual, rule):
    """The gradient that reaches the keep probabilities (paper section 3.3; constants of the release).

    Args: product (B, V, D), hidden state times its gradient, 0 where the token was deleted; keep_prob (B, V);
        visual (B, V) bool; rule: a config with the `surrogate*` fields.
    Returns: (B, V).

    With `surrogate="taylor"` a token whose deletion would raise the loss, to first order, is pushed up; with
    `"release"` it is pushed down (the direction that the authors' code takes by default).
    """
    count = visual.sum(-1, keepdim=True).clamp(min=1)

    def mean(x):
        return (x * visual).sum(-1, keepdim=True) / count

    taylor = rule.surrogate == "taylor"
    importance = product.sum(-1) * (-1 if taylor else 1)
    centred = importance - mean(importance)
    std = mean(centred**2).sqrt().clamp(min=rule.surrogate_std_floor)
    squashed = (centred / std).clamp(-rule.surrogate_clip, rule.surrogate_clip)
    direction = 0.5 - (0.5 + 0.5 * squashed.tanh())
    if not taylor:
        direction = direction - mean(direction)
    magnitude = product.abs().sum(-1)
    magnitude = magnitude / mean(magnitude).clamp(min=rule.surrogate_eps)
    magnitude = magnitude.clamp(rule.surrogate_magnitude_min, rule.surrogate_magnitude_max)
    slope = (keep_prob * (1 - keep_prob)).clamp(min=rule.surrogate_slope_floor)
    return rule.surrogate_scale * direction * magnitude * slope * visual


def surrogate_gather(hidden, schedule, visual_index, visual, index, rule, row_weight=None):
    """hidden (B, S, D) at index (B, S') -> (B, S', D), with the surrogate gradient for `schedule.keep_prob` (B, V);
    visual_index (B, V) and visual (B, V) as of `masked_index`; rule: a config with the `surrogate*` fields.

    row_weight (B,): each row's share of the loss, default 1. The rule normalises the gradients it is given, so a share
    that is only in the loss would not reach the keep probabilities, and a batch, its micro-batches and its ranks would
    train the threshold differently.
    """
    return SurrogateGather.apply(hidden, schedule.keep_prob, visual_index, visual, index, rule, row_weight)


def soft_weight(hidden, schedule, visual_index, visual):
    """The soft phase: visual hidden states times their keep probability, by ordinary autograd. Returns (B, S, D)."""
    weights = 1.0 + scatter_places(schedule.keep_prob - 1.0, visual_index, visual, hidden.shape[1])
    return hidden * weights[..., None].to(hidden.dtype)
