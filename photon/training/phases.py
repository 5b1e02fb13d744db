"""The phase of training (dense, soft, hard) and the kept share as functions of the optimizer step."""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from photon.modeling_photon import PHASES

# shares of the run: those of the release's 4,000, 8,000 and 9,000 steps in its run of 32,000
DEFAULTS = {"soft_start": 0.125, "hard_start": 0.25, "flip_start": 0.28125}
BUDGET_END = 0.6  # the release has no budget; this share of the run is that of the runs in docs/evidence.md
FILE = "phases.json"


@dataclass
class Phases:
    """First optimizer steps of the phases; `flip`: the first step with flipped rows; `budget_end`: the step at which
    the kept share has fallen to `config.keep_budget`, where there is one."""

    soft: int
    hard: int
    flip: int
    budget_end: int = 0

    @classmethod
    def of(cls, args, max_steps):
        """From the arguments (below 1 a share of the run, otherwise a step). What is not given follows the release,
        but never breaks the order. Raises `ValueError` where the given ones are not in ascending order."""
        given = [getattr(args, name) for name in DEFAULTS]
        shares = [default if value is None else value for value, default in zip(given, DEFAULTS.values(), strict=True)]
        soft, hard, flip = (round(value * max_steps) if value < 1 else round(value) for value in shares)
        if given[1] is None:
            hard = max(hard, soft)
        if given[0] is None:
            soft = min(soft, hard)
        if given[2] is None:
            flip = max(flip, hard)
        if not 0 <= soft <= hard <= flip:
            raise ValueError(
                f"The phases start at steps {[soft, hard, flip]} (soft, hard, flip); expected them in ascending order."
            )
        end = BUDGET_END if args.budget_end is None else args.budget_end
        end = round(end * max_steps) if end < 1 else round(end)
        if args.budget_end is not None and end < hard:
            raise ValueError(f"The budget ends at step {end}; expected {hard}, where the hard phase starts, or later.")
        return cls(soft, hard, flip, max(end, hard))

    @classmethod
    def load(cls, folder):
        """Those of a checkpoint, so that a run keeps them when it is extended; `None` where it has none."""
        file = Path(folder, FILE)
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def save(self, folder):
        Path(folder, FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def at(self, step):
        """One of `PHASES`."""
        return PHASES[(step >= self.soft) + (step >= self.hard)]

    def budget_at(self, step, final):
        """The share of visual tokens to keep: 1 until the hard phase, then falling geometrically to `final`."""
        if step < self.hard:
            return 1.0
        return final ** min(1.0, (step + 1 - self.hard) / max(self.budget_end - self.hard, 1))

    def describe(self, max_steps):
        """One line for a person. Warns where the run ends before tokens are deleted."""
        if self.hard >= max_steps:
            warnings.warn(
                f"The run ends at step {max_steps}, before its hard phase (step {self.hard}): training never "
                "deletes a token. Set --hard-start, or choose --stage dense.",
                stacklevel=2,
            )
        return (
            f"phases: dense from step 0, soft (tokens weighted) from {self.soft}, hard (tokens deleted) from "
            f"{self.hard}, flipped rows from {self.flip}; the run has {max_steps} steps"
        )
