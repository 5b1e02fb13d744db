"""What methods with a fixed budget share: a score for each token, of which the highest stay."""

from dataclasses import replace

from torch import nn

from photon.scheduling_photon import most_salient

SCHEDULERS = {}  # {name: class}, as photon/schedulers/__init__.py imports them


class BudgetScheduler(nn.Module):
    """Keeps the tokens of the highest score, as many as the call asks for.

    Without `token_budget` or `keep_ratio` a row keeps as many tokens as the reference scheduler would keep of it, so
    that two methods are compared at an equal budget, row by row.

    A subclass is registered in `SCHEDULERS` under its `name` when its file is imported; `needs` are the names of the
    `SchedulerInputs` that it uses beyond those that are always given. `exact`: whether it keeps just as many tokens as
    asked; `learns`: whether it has weights, which training moves; `draws`: whether the seed matters; `lowest_layer`:
    the least `scheduler_layer` at which it has something to read; `own_count(inputs)`, where it has one: (B,) tokens
    that it keeps by its own rule.

    Args: reference: the model's own scheduler; seed: for methods that draw; native: where a call gives no budget, keep
        as many as the method's own rule says.
    """

    name = None
    needs = frozenset()
    exact, learns, draws, lowest_layer = True, False, False, -1
    own_count = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):  # what several methods share has none
            if cls.name in SCHEDULERS:
                raise ValueError(f"There are two selection methods of the name {cls.name!r}.")
            SCHEDULERS[cls.name] = cls

    def __init__(self, reference, seed=0, native=False):
        super().__init__()
        if native and self.own_count is None:
            raise ValueError(f"{self.name} has no rule of its own for how many tokens stay; leave native out.")
        self.reference, self.seed, self.native = reference, seed, native
        self.needs = type(self).needs | reference.needs
        self.train(reference.training)

    def forward(self, inputs):
        """`SchedulerInputs` to a `Schedule`, whose keep probabilities and threshold are the reference's.

        In training the keep probabilities are the selection itself, so that nothing teaches the reference; where
        nothing is deleted yet, nothing is selected.
        """
        schedule = self.reference(inputs)
        if self.training:  # all weights take part in the reduction over ranks, with a gradient of 0
            nothing = 0.0 * (schedule.keep_prob.sum() + sum(weight.sum() for weight in self.own_weights().values()))
            schedule = replace(schedule, log_gate=None, keep_prob=inputs.visual + nothing)
            if not inputs.deletes:
                return schedule
        by_rule = self.native and inputs.keep_count is None
        count = self.own_count(inputs) if by_rule else schedule.keep_mask.sum(-1)
        keep_mask, hidden_states = self.decide(inputs, count)
        if self.training:
            schedule = replace(schedule, keep_prob=keep_mask + nothing)
        later = self.later(inputs, count)
        return replace(schedule, keep_mask=keep_mask, hidden_states=hidden_states, later=later)

    @property
    def config(self):
        """The model's `PhotonConfig`."""
        return self.reference.config

    def train(self, mode=True):
        """The reference only counts here: it neither draws gates nor follows the budget."""
        super().train(mode)
        self.reference.eval()
        return self

    def own_weights(self):
        """{name: weight} of the method, without the reference's."""
        return {name: weight for name, weight in self.named_parameters() if not name.startswith("reference.")}

    def decide(self, inputs, count):
        """Which tokens stay, (B, V) bool, `count` (B,) of each row, and what `merge` makes of them."""
        keep_mask = self.select(inputs, count)
        return keep_mask, self.merge(inputs, keep_mask)

    def select(self, inputs, count):
        """(B, V) bool: which tokens stay, `count` (B,) of each row."""
        return most_salient(self.score(inputs), inputs.visual, count)

    def score(self, inputs):
        """(B, V): the tokens with the highest numbers stay."""
        raise TypeError(f"{type(self).__name__} has no score(); a method defines it, or select().")

    def merge(self, inputs, keep_mask):
        """(B, V, D): what tokens carry on above the cut, or `None` to leave them as they are."""
        return None

    def later(self, inputs, count):
        """{layer: what cuts again after it}, see `pyramid.py`."""
        return {}
