"""How Photon learns: the losses of a row, and the gradient that tells the scheduler what a deletion costs.

- Losses (paper section 3.4; numbers of the release): next-token loss, band, robust, flip. A batch may mix kinds of
  rows. Every term is weighted by a row's answer tokens, so that one batch of four rows, and four batches of one row
  with the same `num_items`, give the same loss.
- Grounding: how much better an answer follows from the kept tokens than from others.
- The cut (SGP, surrogate gradient propagation, section 3.3): deleting a token is a step without a slope, so the keep
  probabilities need a gradient from elsewhere. `surrogate_gather` gathers the kept tokens with the release's backward
  rule; `soft_weight` weights hidden states in the soft phase, in which nothing is deleted; `gate_mask` and
  `gated_flash_attention` put gates on attention logits, and a key whose gate is 0 is as good as deleted. `CutLearning`
  is what a decoder does with them.
- `encode_in_parts` holds the vision tower's activations of a part of the scans at a time; `packed_rows` drops the
  padding of rows that keep unlike numbers of tokens.
B rows, S places of the prompt, S' places after the cut, V visual tokens, D channels.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .scheduling_photon import ScheduleFields, SchedulerInputs, gather_places

# === Losses ==========================================================================================================

TOKENS_AT_ONCE = 128  # whose logits are held at a time


@dataclass
class PhotonModelOutputWithPast(ScheduleFields, BaseModelOutputWithPast):
    """
    `last_hidden_state` is (B, S', D), S' the longest row after the cut; B rows, V visual tokens of the richest row.
    The fields of `ScheduleFields` tell what the scheduler decided.

    Args:
        keep_index (`torch.LongTensor` of shape `(B, S')`): place in the prompt of each place of the short sequence,
            -1 for padding. `None` where nothing was cut.
    """

    keep_index: torch.LongTensor | None = None


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


def answer_losses(logits, target, objective=None, flip_eps=1e-6, head=None):
    """Sum over a row's answer tokens of its kind of loss, and how many there are.

    Args: logits (B, S, vocabulary); target (B, S), the token that each place predicts, -100 where there is nothing
        to learn; objective (B,) of `Objective`, default all `ANSWER`; flip_eps: guard of the flip objective's
        logarithm; head: makes logits of hidden states (N, D), which then stand in place of logits, (B, S, D).
    Returns: (B,) float32 sums, (B,) counts. Cross-entropy for `ANSWER`; minus the entropy for `ROBUST`;
        -log(1 - p(token) + eps) for `FLIP`.
    """
    row, place = (target != -100).nonzero(as_tuple=True)
    kind = torch.zeros_like(row) if objective is None else objective[row]
    parts = logits[row, place], target[row, place], kind  # answer tokens alone
    if head is None:
        losses = token_losses(*parts, flip_eps)  # (N,)
    else:  # logits of a few tokens at a time, made again on the way back
        parts = zip(*(part.split(TOKENS_AT_ONCE) for part in parts), strict=True)

        def of_states(states, target, kind):
            return token_losses(head(states), target, kind, flip_eps)

        losses = torch.cat([checkpoint(of_states, *part, use_reentrant=False) for part in parts])
    count = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
    sums = count.index_add(0, row, losses)
    return sums, count.index_add(0, row, torch.ones_like(losses))


def token_losses(logits, target, kind, flip_eps):
    """(N,) float32: each token's loss of its kind. logits (N, vocabulary); target, kind (N,)."""
    log_prob = logits.float().log_softmax(-1)
    chosen = log_prob.gather(-1, target[:, None])[:, 0]
    losses = -chosen
    if (kind != Objective.ANSWER).any():
        entropy = -(log_prob.exp() * log_prob).sum(-1)
        flip = -torch.log(1 - chosen.exp() + flip_eps)
        losses = torch.where(kind == Objective.ROBUST, -entropy, torch.where(kind == Objective.FLIP, flip, losses))
    return losses


def band_losses(keep_prob, visual, low, high):
    """relu(r - high) + relu(low - r), r the mean keep probability of a row's visual tokens.

    keep_prob (B, V), visual (B, V) bool. Returns (B,), 0 for a row without visual tokens.
    """
    ratio = (keep_prob * visual).sum(-1) / visual.sum(-1).clamp(min=1)
    return (F.relu(ratio - high) + F.relu(low - ratio)) * visual.any(-1)


def all_losses(logits, labels, outputs, objective, row_weight, total, config, band=True, head=None):
    """The model's loss and its two parts, as fields of the output.

    Args: logits (B, S', vocabulary); labels (B, S) of the unpruned sequence, cut here as the logits are; outputs: of
        `PhotonModel`; objective (B,) or `None`; row_weight (B,), each row's share of the loss; total: answer tokens of
        the whole step; band: whether the band loss counts; head: as of `answer_losses`.
    """
    target = targets_of(labels, outputs.keep_index)
    sums, _ = answer_losses(logits, target, objective, config.flip_eps, head)  # (B,)
    lm_loss, band_loss = sums.sum() / total, sums.new_zeros(())
    if outputs.keep_prob is not None and band:
        places = torch.arange(outputs.keep_prob.shape[1], device=labels.device)
        visual = places < outputs.visual_count[:, None].to(labels.device)
        rows = band_losses(outputs.keep_prob, visual, config.band_low, config.band_high)
        if objective is not None:
            rows = rows * (objective == Objective.ANSWER)
        band_loss = (rows * row_weight).sum()
    return {"loss": lm_loss + config.band_weight * band_loss, "lm_loss": lm_loss, "band_loss": band_loss}


def targets_of(labels, keep_index):
    """(B, S'): the token that each place predicts, -100 where there is none. labels (B, S) of the unpruned sequence;
    keep_index (B, S') or `None` where nothing was cut."""
    if keep_index is not None:
        labels = gather_places(labels, keep_index).masked_fill(keep_index < 0, -100)
    return F.pad(labels, (0, 1), value=-100)[:, 1:]  # place s predicts the token at s + 1


def full_length(values, keep_index, length):
    """Logits or hidden states (B, S, X) at the places of the prompt, with zeros where a token was deleted.

    values (B, S', X) of the cut sequence; keep_index (B, S'), or `None` where nothing was cut; length: S.
    """
    if keep_index is None:
        return values
    places = keep_index.clamp(min=0)[..., None].expand_as(values)
    kept = torch.where(keep_index[..., None] >= 0, values, 0)  # padded places share place 0
    return values.new_zeros(len(values), length, values.shape[-1]).scatter_add(1, places, kept)


# === Vision in parts =================================================================================================


def encode_in_parts(encode, patches, grids, limit):
    """The vision tower's output for volumes, of which it gets at most about `limit` patches at a time.

    It attends within one depth slab only, so that parts of whole slabs give the same output and gradients, and need
    less memory: a block's intermediate results are held for one part.

    Args: encode: (patches, grids) -> output with `pooler_output`, a list of one tensor a volume; patches (N, voxels);
        grids (volumes, 3).
    """
    pieces = []  # (volume, slabs of it, h, w)
    for volume, (t, h, w) in enumerate(grids.tolist()):
        step = max(1, limit // (h * w))
        pieces += [(volume, min(step, t - first), h, w) for first in range(0, t, step)]
    parts, held = [[]], 0
    for piece in pieces:
        size = piece[1] * piece[2] * piece[3]
        if parts[-1] and held + size > limit:
            parts, held = [*parts, []], 0
        parts[-1].append(piece)
        held += size
    states, pooled, begin = [], [[] for _ in grids], 0
    for part in parts:
        end = begin + sum(slabs * h * w for _, slabs, h, w in part)
        output = encode(patches[begin:end], grids.new_tensor([piece[1:] for piece in part]))
        states.append(output.last_hidden_state)
        for (volume, *_), tokens in zip(part, output.pooler_output, strict=True):
            pooled[volume].append(tokens)
        begin = end
    return BaseModelOutputWithPooling(torch.cat(states), [torch.cat(tokens) for tokens in pooled])


# === Grounding =======================================================================================================


def other_tokens(keep, visual, seed):
    """As many tokens as are kept, drawn of those that are not (all of these, where they are fewer).

    keep, visual (B, V) bool. The draw of a row does not depend on the other rows. Returns (B, V) bool.
    """
    chance = torch.rand(visual.shape[1], generator=torch.Generator().manual_seed(seed)).to(visual.device)
    order = chance.masked_fill(~(visual & ~keep), -1.0).argsort(dim=-1, descending=True)
    chosen = torch.arange(visual.shape[1], device=visual.device) < keep.sum(-1, keepdim=True)
    return torch.zeros_like(visual).scatter(1, order, chosen) & visual & ~keep


@torch.no_grad()
def grounding_of_answers(model, sequences, draws=4, **inputs):
    """How much better an answer follows from the tokens that were kept than from others:
    log p(answer | kept) - log p(answer | as many others), in nats, the second a mean over `draws` random sets.

        output = model.generate(**inputs)
        model.grounding(output, **inputs)

    Near 0 the kept tokens told the model no more than any others would have; that says nothing about why.

    Args: sequences (B, S + T): what `generate` returned for these inputs; inputs: as of `generate`.
    Returns: (B,) float32; `nan` for a row without visual tokens.
    Raises: `ValueError` where the sequences do not begin with the prompts.
    """
    prompt, stops = inputs.pop("input_ids"), model.generation_config.eos_token_id
    length = prompt.shape[1]
    if sequences.shape[1] <= length or not torch.equal(sequences[:, :length], prompt):
        raise ValueError("The sequences must begin with the prompts; pass what `generate` returned for them.")
    answers = sequences[:, length:]
    stop = torch.isin(answers, torch.tensor(stops, device=answers.device)).long()
    real = stop.cumsum(-1) - stop == 0  # up to the first stop, with it
    mask = inputs.pop("attention_mask", torch.ones_like(prompt))
    labels = torch.cat([torch.full_like(prompt, -100), answers.masked_fill(~real, -100)], dim=1)
    if (types := inputs.pop("mm_token_type_ids", None)) is not None:
        inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(answers, dtype=types.dtype)], dim=1)
    given = {"input_ids": sequences, "attention_mask": torch.cat([mask, real.to(mask.dtype)], dim=1), **inputs}

    def log_prob(others=None):
        outputs = model.model(**given, others=others, use_cache=False, output_full_length=False)
        target = targets_of(labels, outputs.keep_index)
        return -answer_losses(outputs.last_hidden_state, target, head=model.lm_head)[0], outputs.visual_count

    kept, count = log_prob()
    others = sum(log_prob(others=seed)[0] for seed in range(draws)) / draws
    nothing = torch.ones_like(kept, dtype=torch.bool) if count is None else count == 0
    return (kept - others).masked_fill(nothing, torch.nan)


# === The gradient of the cut =========================================================================================


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


def scatter_places(values, index, real, length):
    """values (B, N, ...) to their places in (B, length, ...), 0 elsewhere; index, real (B, N) as of `masked_index`."""
    shape = (*index.shape, *(1 for _ in values.shape[2:]))
    out = values.new_zeros(values.shape[0], length, *values.shape[2:])
    return out.scatter_add(1, index.view(shape).expand_as(values), torch.where(real.view(shape), values, 0.0))


def soft_weight(hidden, schedule, visual_index, visual):
    """The soft phase: visual hidden states times their keep probability, by ordinary autograd. Returns (B, S, D)."""
    weights = 1.0 + scatter_places(schedule.keep_prob - 1.0, visual_index, visual, hidden.shape[1])
    return hidden * weights[..., None].to(hidden.dtype)


def packed_rows(hidden_states, position_ids, gate, keep_index):
    """Rows of unlike length one behind the other, without the padding of keep_index (B, S').

    hidden_states (B, S', D) -> (1, N, D), position_ids (3, B, S') -> (3, 1, N), gate (B, S') -> (1, N) or `None`, N
    places in all; places within their rows (1, N), of which masks are made; and by name what flash attention takes.
    """
    real = keep_index >= 0
    lengths, rows = real.sum(-1), (real.cumsum(-1) - 1)[real][None]
    starts, longest = F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())
    options = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    gate = None if gate is None else gate[real][None]
    return hidden_states[real][None], position_ids[:, real][:, None], gate, rows, options


def padded_rows(hidden_states, keep_index):
    """The other way round: (1, N, D) -> (B, S', D), with zeros in place of padding."""
    padded = hidden_states.new_zeros(*keep_index.shape, hidden_states.shape[-1])
    return padded.masked_scatter((keep_index >= 0)[..., None], hidden_states)


class CutLearning:
    """What `CutDecoder` does at its cut so that training reaches the keep probabilities."""

    def _weigh(self, hidden_states, scan, schedule):
        """The states as merged by the scheduler, or weighted in the soft phase; and the gates (B, S) or `None`."""
        if self._phase == "dense":
            return hidden_states + 0.0 * schedule.keep_prob.sum().to(hidden_states.dtype), None
        length = hidden_states.shape[1]
        if schedule.hidden_states is not None:
            merged = scatter_places(
                schedule.hidden_states.to(hidden_states.dtype), scan.visual_index, scan.visual, length
            )
            hidden_states = torch.where(scan.visual_mask[..., None], merged, hidden_states)
        if schedule.log_gate is not None:
            return hidden_states, scatter_places(schedule.log_gate, scan.visual_index, scan.visual, length)
        if self._phase == "soft":
            return soft_weight(hidden_states, schedule, scan.visual_index, scan.visual), None
        return hidden_states, None

    def _gather(self, hidden_states, scan, schedule, keep_index, gate):
        """The kept tokens' states (B, S', D), and the gates (B, S') or `None`."""
        if gate is not None:
            if self.photon.surrogate == "gate":  # 0, with the gradient of the gates
                gate = gate - gate.detach()
            return gather_places(hidden_states, keep_index), gather_places(gate, keep_index)
        return surrogate_gather(
            hidden_states, schedule, scan.visual_index, scan.visual, keep_index, self.photon, scan.row_weight
        ), None

    def _gated(self, mask, gate, hidden_states, options):
        """A layer's mask and options with the gates (B, S) of its keys."""
        attention = self.config._attn_implementation
        if attention == GATED_FLASH:
            return mask, options | {"key_gate": gate}
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"surrogate={self.photon.surrogate!r} adds to attention logits, which {attention} does not take. "
                f'Train with attn_implementation="sdpa", "eager" or "{GATED_FLASH}", or with another surrogate.'
            )
        return gate_mask(mask, gate.to(hidden_states.dtype)), options

    def _packs(self, keep_index):
        """Whether rows go on without padding: in training, with attention that leaves out what rows do not share."""
        packing = any(name in self.config._attn_implementation for name in ("flash", "flex"))
        return self.training and packing and bool((keep_index < 0).any())

    def _touch_scheduler(self):
        """0, with a gradient of 0 for the scheduler, since a rank without a scan must take part in the reduction."""
        attention = self.layers[self.scoring_layer].self_attn  # one row of one question token and one visual token
        keys = self.norm.weight.new_zeros(1, attention.num_key_value_heads, 1, attention.head_dim)
        queries = keys.new_zeros(1, attention.num_heads, 1, attention.head_dim)
        real = torch.ones(1, 1, dtype=torch.bool, device=keys.device)
        inputs = SchedulerInputs(queries, keys, keys, real, real, attention.scaling, deletes=False)
        return 0.0 * self.scheduler(inputs).keep_prob.sum()
