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
    `SchedulerInputs` that it uses beyond those that are always given.

    Args: reference: the model's own scheduler; seed: for methods that draw.
    """

    name = None
    needs = frozenset()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):  # what several methods share has none
            if cls.name in SCHEDULERS:
                raise ValueError(f"There are two selection methods of the name {cls.name!r}.")
            SCHEDULERS[cls.name] = cls

    def __init__(self, reference, seed=0):
        super().__init__()
        self.reference, self.seed = reference, seed
        self.needs = type(self).needs | reference.needs

    def forward(self, inputs):
        """`SchedulerInputs` to a `Schedule`, whose keep probabilities and threshold are the reference's."""
        schedule = self.reference(inputs)
        keep_mask = self.select(inputs, schedule.keep_mask.sum(-1))
        return replace(schedule, keep_mask=keep_mask, hidden_states=self.merge(inputs, keep_mask))

    def select(self, inputs, count):
        """(B, V) bool: which tokens stay, `count` (B,) of each row."""
        return most_salient(self.score(inputs), inputs.visual, count)

    def score(self, inputs):
        """(B, V): the tokens with the highest numbers stay."""
        raise TypeError(f"{type(self).__name__} has no score(); a method defines it, or select().")

    def merge(self, inputs, keep_mask):
        """(B, V, D): what tokens carry on above the cut, or `None` to leave them as they are."""
        return None
