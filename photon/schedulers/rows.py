"""Methods that are written for one prompt: its inputs without padding, and without the batch's axis."""

from dataclasses import dataclass, field

import torch

from photon.schedulers.budget import BudgetScheduler

OF_TOKENS = ("hidden_states", "coordinates", "vision_attention", "vision_keys")


@dataclass
class Row:
    """One row of `SchedulerInputs`: V visual tokens and Q question tokens, all real; numbers in float32.

    queries (H, Q, d), question_keys (G, Q, d), visual_keys (G, V, d), scaling; what the method needs beside:
    hidden_states (V, D), question_states (Q, D), coordinates (V, 4), vision_attention (V,), vision_keys (V, d), and
    more {name: (V, ...)}.
    """

    queries: torch.Tensor
    question_keys: torch.Tensor
    visual_keys: torch.Tensor
    scaling: float
    hidden_states: torch.Tensor | None = None
    question_states: torch.Tensor | None = None
    coordinates: torch.Tensor | None = None
    vision_attention: torch.Tensor | None = None
    vision_keys: torch.Tensor | None = None
    more: dict = field(default_factory=dict)

    def __len__(self):
        return self.visual_keys.shape[1]

    def attention(self, queries):
        """(H, N, V): softmax over the visual tokens of queries (H, N, d)."""
        groups = self.visual_keys.shape[0]
        logits = torch.einsum("ghnd,gvd->ghnv", queries.unflatten(0, (groups, -1)), self.visual_keys) * self.scaling
        return logits.softmax(-1).flatten(0, 1)


def row_of(inputs, number, **of_tokens):
    """`Row` of a batch's row; of_tokens: further tensors (B, V, ...), for `more`."""
    visual, question = inputs.visual[number], inputs.question[number]
    parts = {name: getattr(inputs, name) for name in OF_TOKENS}
    parts = {name: _real(values[number][visual]) for name, values in parts.items() if values is not None}
    if inputs.question_states is not None:
        parts["question_states"] = _real(inputs.question_states[number][question])
    more = {name: _real(values[number][visual]) for name, values in {**inputs.more, **of_tokens}.items()}
    return Row(
        _real(inputs.queries[number][:, question]),
        _real(inputs.question_keys[number][:, question]),
        _real(inputs.visual_keys[number][:, visual]),
        inputs.scaling,
        **parts,
        more=more,
    )


def _real(values):
    return values.float() if values.is_floating_point() else values


def top(scores, count):
    """(V,) bool: the `count` highest of scores (V,). Where two are equal, the first is taken."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def evenly(among, count):
    """(V,) bool: `count` of the tokens `among` (V,) bool, at even steps in their order."""
    order, many = among.cumsum(0) - 1, max(int(among.sum()), 1)
    step = (order * count).div(many, rounding_mode="floor")
    return among & (step > ((order - 1) * count).div(many, rounding_mode="floor"))


class RowScheduler(BudgetScheduler):
    """A method for one row: `choose(row, count)` gives which tokens stay (V,) bool, exactly `count`, and what tokens
    carry on above the cut (V, D), `None` to leave them as they are."""

    def decide(self, inputs, count):
        keep, states = torch.zeros_like(inputs.visual), None
        for number, wanted in enumerate(count.tolist()):
            real = inputs.visual[number]
            keep[number, real], merged = self.choose(self.row(inputs, number), wanted)
            if merged is not None:
                states = inputs.hidden_states.clone() if states is None else states
                states[number, real] = merged.to(states.dtype)
        return keep, states

    def row(self, inputs, number):
        return row_of(inputs, number)

    def choose(self, row, count):
        raise TypeError(f"{type(self).__name__} has no choose().")
