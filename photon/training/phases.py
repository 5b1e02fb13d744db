"""The phase of training (dense, soft, hard) as a function of the optimizer step."""

from dataclasses import dataclass

from photon.modeling_photon import PHASES


@dataclass
class Phases:
    """First optimizer steps of the phases; flips: the first step with flipped rows."""

    soft: int
    hard: int
    flip: int

    @classmethod
    def of(cls, config, args, max_steps):
        """From the arguments where they are given (below 1 a share of the run), otherwise from the config."""
        steps = []
        for given, default in (
            (args.soft_start, config.soft_start_step),
            (args.hard_start, config.hard_start_step),
            (args.flip_start, config.flip_start_step),
        ):
            value = default if given is None else given * max_steps if given < 1 else given
            steps.append(round(value))
        if not 0 <= steps[0] <= steps[1] <= steps[2]:
            raise ValueError(
                f"The phases start at steps {steps} (soft, hard, flip); expected them in ascending order."
            )
        return cls(*steps)

    def at(self, step):
        """One of `PHASES`."""
        return PHASES[(step >= self.soft) + (step >= self.hard)]
