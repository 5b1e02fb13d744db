"""The Photon method on tensors: which visual tokens a question needs (ITS), and how the cut learns (SGP).

Tensors in, tensors out; nothing here knows about layers, caches or files. B rows, H query heads, G key heads, d head
size, Q question tokens, V visual tokens (rows with fewer are padded on the right, `visual` tells which are real).

- `saliency_logits`: one number a visual token, how much the question looks at it (paper section 3.2);
- `ThresholdPredictor`: twelve statistics of those numbers to one threshold a row;
- `TokenScheduler`: both together, to a `Schedule`. Any other token-reduction method that returns a `Schedule` from the
  same arguments can take its place;
- `cut_index`: which places of the sequence stay;
- `surrogate_gather`: the gather, with a backward rule for the keep probabilities (paper section 3.3).
"""

from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Schedule:
    """What a token-reduction method decides. (B, V) where not said otherwise; padding is False or 0."""

    keep: torch.Tensor  # bool
    keep_prob: torch.Tensor  # float32, differentiable with respect to the threshold
    threshold: torch.Tensor  # float32
    saliency: torch.Tensor  # float32, 0..1
    saliency_logits: torch.Tensor  # float32
    visual_count: torch.Tensor  # (B,) long, visual tokens of each row

    @property
    def log_prob(self):
        return self.keep_prob.clamp(min=torch.finfo(torch.float32).tiny).log()

    def to(self, device):
        return Schedule(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def question_weights(query, key, question, scaling, floor):
    """How central each question token is to its question.

    Args: query (B, H, Q, d), key (B, G, Q, d) of the question tokens after rotary embedding, float32; question (B, Q)
        bool, real ones; scaling 1/sqrt(d); floor of the sum by which the weights are divided (1.0 in the release, so
        that the weights of a question whose tokens ignore each other do not add up to 1).
    Returns: (B, Q).
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    query = query.view(batch, groups, heads // groups, length, size)
    logits = torch.einsum("bghqd,bgkd->bghqk", query, key).mul_(scaling).relu_()  # negative looks do not count
    others = ~torch.eye(length, dtype=torch.bool, device=query.device) & question[:, None, :]  # (B, Q, Q)
    centrality = (logits * others[:, None, None]).sum(-1).mean((1, 2)) * question  # (B, Q)
    return centrality / centrality.sum(-1, keepdim=True).clamp(min=floor)


def saliency_logits(query, key, weights, scaling):
    """u_j = mean_h sum_t w_t q_ht.k_hj / sqrt(d), in O(G V d): the weights do not depend on the head, so the question
    becomes one query a head, and heads that share a key head are added up.

    Args: query (B, H, Q, d) of the question; key (B, G, V, d) of the visual tokens; weights (B, Q); all float32.
    Returns: (B, V).
    """
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    question = torch.einsum("bhqd,bq->bhd", query, weights).view(batch, groups, heads // groups, size).sum(2)
    return torch.einsum("bgd,bgvd->bv", question, key) * (scaling / heads)


def saliency_attention(query, key, weights, question, visual, scaling):
    """As `saliency_logits`, with each head's softmax over the row's visual tokens in place of the logits.

    The weights are made to add up to 1 (evenly where no question token looks at another), so that the result is a
    distribution over the visual tokens. question (B, Q), visual (B, V) bool: real tokens. Returns: (B, V).
    """
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    total, even = weights.sum(-1, keepdim=True), question / question.sum(-1, keepdim=True).clamp(min=1)
    weights = torch.where(total > 0, weights / total.clamp(min=torch.finfo(total.dtype).tiny), even)
    attention = key.new_zeros(batch, key.shape[2])
    for head, part in enumerate(query.unbind(1)):  # one head at a time: (B, Q, V) is the largest tensor
        logits = torch.einsum("bqd,bvd->bqv", part, key[:, head * groups // heads]) * scaling
        logits = logits.masked_fill(~visual[:, None], torch.finfo(logits.dtype).min)
        attention += torch.einsum("bqv,bq->bv", logits.softmax(-1), weights)
    return attention / heads * visual


def scale_saliency(logits, visual, eps):
    """Min-max over a row's visual tokens. logits (B, V), visual (B, V) bool. Returns (B, V) in 0..1, padding 0."""
    low = logits.masked_fill(~visual, torch.inf).amin(-1, keepdim=True)
    high = logits.masked_fill(~visual, -torch.inf).amax(-1, keepdim=True)
    return ((logits - low) / (high - low + eps)).masked_fill(~visual, 0.0)


def saliency_statistics(saliency, logits, visual):
    """The threshold predictor's input, over a row's visual tokens, in the release's order. Returns (B, 12).

    Of the saliency: mean, population std, min, max, 25 % quantile, median; of its logits: mean, std, min, max; of
    sign(u) log(1 + |u|): mean, max. A row without visual tokens gives zeros.
    """
    count = visual.sum(-1).clamp(min=1)

    def mean(x):
        return (x * visual).sum(-1) / count

    def std(x):
        return mean((x - mean(x)[:, None]) ** 2).sqrt()

    def low(x):
        return x.masked_fill(~visual, torch.inf).amin(-1)

    def high(x):
        return x.masked_fill(~visual, -torch.inf).amax(-1)

    quantiles = saliency.masked_fill(~visual, torch.nan).nanquantile(saliency.new_tensor([0.25, 0.5]), dim=-1)
    squashed = logits.sign() * logits.abs().log1p()
    statistics = [
        mean(saliency), std(saliency), low(saliency), high(saliency), *quantiles,
        mean(logits), std(logits), low(logits), high(logits),
        mean(squashed), high(squashed),
    ]  # fmt: skip
    return torch.stack(statistics, dim=-1).masked_fill(~visual.any(-1, keepdim=True), 0.0)


class Float32Linear(nn.Linear):
    """Computes in float32 whatever its weights' type: a threshold rounded to bfloat16 moves tens of tokens."""

    def __init__(self, in_features, out_features, bias_init=0.0):
        super().__init__(in_features, out_features)
        self.bias_init = bias_init  # for the model's `_init_weights`

    def forward(self, input):
        return F.linear(input.float(), self.weight.float(), self.bias.float())


class ThresholdPredictor(nn.Module):
    """Statistics of one row's saliency (B, 12) to its threshold (B, 1), in 0..threshold_max."""

    def __init__(self, hidden_size, config):
        super().__init__()
        width = hidden_size // config.threshold_hidden_divisor
        self.threshold_max = config.threshold_max
        self.mlp = nn.Sequential(
            Float32Linear(12, width), nn.GELU(), Float32Linear(width, 1, bias_init=config.threshold_bias_init)
        )

    def forward(self, statistics):
        return self.threshold_max * self.mlp(statistics).sigmoid()


class TokenScheduler(nn.Module):
    """Instruction-conditioned token scheduling (ITS): a row's question decides which of its visual tokens stay.

    The threshold carries a gradient, through `Schedule.keep_prob`; the saliency does with `saliency_gradient` alone.
    """

    def __init__(self, hidden_size, config):
        super().__init__()
        self.config = config
        self.predictor = ThresholdPredictor(hidden_size, config)

    def forward(self, queries, question_keys, visual_keys, question, visual, scaling, keep_count=None, flip=None):
        """
        Args:
            queries (B, H, Q, d), question_keys (B, G, Q, d), visual_keys (B, G, V, d): of the scheduling layer, after
                rotary embedding.
            question (B, Q), visual (B, V): bool, which of them are real.
            scaling: 1/sqrt(d).
            keep_count (B,) long, optional: keep exactly the so many most salient tokens of each row instead of those
                above the threshold (at most as many as the row has).
            flip (B,) bool, optional: rows that keep what they would drop (the flip objective).
        Returns: `Schedule`.
        """
        config = self.config
        learn = config.saliency_gradient and torch.is_grad_enabled()
        with torch.autocast(queries.device.type, enabled=False), torch.set_grad_enabled(learn):
            queries, question_keys, visual_keys = queries.float(), question_keys.float(), visual_keys.float()
            queries = queries * question[:, None, :, None]
            weights = question_weights(queries, question_keys, question, scaling, config.centrality_floor)
            if config.saliency == "attention":
                logits = saliency_attention(queries, visual_keys, weights, question, visual, scaling)
            else:
                logits = saliency_logits(queries, visual_keys, weights, scaling) * visual
            saliency = scale_saliency(logits, visual, config.saliency_eps)
            statistics = saliency_statistics(saliency.detach(), logits.detach(), visual)
        with torch.autocast(queries.device.type, enabled=False):
            threshold = self.predictor(statistics)  # (B, 1)
            keep_prob = ((saliency - threshold) / config.keep_temperature).sigmoid() * visual
        if keep_count is None:
            keep = (keep_prob > config.keep_cutoff) & visual
            if flip is not None:
                keep = torch.where(flip[:, None], visual & ~keep, keep)
            floor = visual.sum(-1).clamp(max=config.min_kept_tokens)
            keep |= most_salient(saliency, visual, floor) & (keep.sum(-1) < floor)[:, None]
        else:
            keep = most_salient(saliency, visual, torch.minimum(keep_count.clamp(min=0), visual.sum(-1)))
        return Schedule(keep, keep_prob, threshold, saliency.detach(), logits.detach(), visual.sum(-1))


def most_salient(saliency, visual, count):
    """(B, V) bool: each row's `count` (B,) tokens of highest saliency; of equals the first."""
    order = saliency.masked_fill(~visual, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.zeros_like(visual).scatter(1, order, chosen)


def question_mask(input_ids, visual_mask, config):
    """Which tokens are the question: the text of the last user turn, after its last scan where text follows one.

    Args: input_ids (B, S); visual_mask (B, S) bool; config with the ids of the chat's marks. Without the role word's
        id (`user_token_id`), or where the chat has none: what stands between the last `<|vision_end|>` and the next
        `<|im_end|>`, as in the release.
    Returns: (B, S) bool; rows without visual tokens are all False.
    Raises: `ValueError` where a row has visual tokens and no question.
    """
    found = torch.zeros_like(visual_mask)
    for row in visual_mask.any(-1).nonzero().flatten().tolist():
        ids, visual = input_ids[row].tolist(), visual_mask[row].tolist()
        begin, end = _last_user_turn(ids, config)
        marks = {config.vision_start_token_id, config.vision_end_token_id}
        after_scan = max((i + 1 for i in range(begin, end) if ids[i] == config.vision_end_token_id), default=begin)
        for first in (after_scan, begin):
            places = [i for i in range(first, end) if not visual[i] and ids[i] not in marks]
            if places:
                break
        else:
            raise ValueError(
                f"Row {row} has a scan but no question: expected text in the user turn, closed by the token "
                f"{config.im_end_token_id} (<|im_end|>). Use processor.apply_chat_template, or pass question_mask."
            )
        found[row, places] = True
    return found


def _last_user_turn(ids, config):
    """First place and end of the last user turn's content; an empty range where there is none."""
    starts = [
        i + 3  # <|im_start|>, the role word, a line break
        for i in range(len(ids) - 1)
        if ids[i] == config.im_start_token_id and ids[i + 1] == config.user_token_id
    ]
    if config.im_start_token_id is None or config.user_token_id is None or not starts:
        starts = [i + 1 for i, token in enumerate(ids) if token == config.vision_end_token_id]
    begin = starts[-1] if starts else len(ids)
    return begin, next((i for i in range(begin, len(ids)) if ids[i] == config.im_end_token_id), begin)


def masked_index(mask):
    """Places of a mask's True entries: (B, S) bool -> index (B, N) long, padded with 0, and real (B, N) bool."""
    count = mask.sum(-1)
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[:, : int(count.max())]
    real = torch.arange(order.shape[1], device=mask.device) < count[:, None]
    return order * real, real


def cut_index(visual_mask, keep, attention_mask):
    """Which places of the sequence stay, short rows padded on the left, where generation wants its padding.

    Args: visual_mask (B, S) bool, places of visual tokens; keep (B, V) bool, V as `masked_index(visual_mask)` counts;
        attention_mask (B, S) bool, places that are not padding.
    Returns: (B, S') long, -1 where padded.
    """
    index, real = masked_index(visual_mask)
    kept = torch.zeros_like(visual_mask, dtype=torch.int32).scatter_add(1, index, (keep & real).int()) > 0
    stay = attention_mask & (kept | ~visual_mask)
    count = stay.sum(-1)
    order = stay.to(torch.uint8).argsort(dim=-1, stable=True)[:, stay.shape[1] - int(count.max()) :]
    real = torch.arange(order.shape[1], device=stay.device) >= order.shape[1] - count[:, None]
    return order.masked_fill(~real, -1)


def gather_places(tensor, index):
    """tensor (B, S, ...) at index (B, S'), zeros where the index is -1. Returns (B, S', ...)."""
    index, trailing = index.to(tensor.device), tensor.shape[2:]
    shape = (*index.shape, *(1 for _ in trailing))
    places = index.clamp(min=0).view(shape).expand(*index.shape, *trailing)
    return tensor.gather(1, places) * (index >= 0).view(shape).to(tensor.dtype)


def scatter_places(values, index, real, length):
    """values (B, N) to their places in (B, length), 0 elsewhere; index (B, N), real (B, N) as of `masked_index`."""
    out = values.new_zeros(values.shape[0], length)
    return out.scatter_add(1, index, torch.where(real, values, 0.0))


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
