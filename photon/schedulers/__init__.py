"""Other ways to choose visual tokens, behind one seam: `SchedulerInputs` in, `Schedule` out.

    from photon.schedulers import use_scheduler
    use_scheduler(model, "fastv")                    # `evaluate_hf.py --scheduler fastv` does the same
    model.generate(**inputs, keep_ratio=0.1)

A method is one file with a subclass of `BudgetScheduler`, and one line that imports it below:

    class CentreScheduler(BudgetScheduler):
        \"\"\"Keeps the tokens nearest to the middle of the scan.\"\"\"

        name = "centre"
        needs = frozenset({"coordinates"})

        def score(self, inputs):
            places = inputs.coordinates[..., 1:].float()                    # (B, V, 3): depth, row, column
            middle = places.mean(1, keepdim=True)
            return -(places - middle).norm(dim=-1)                          # (B, V), the highest stay

`score` is enough where tokens are kept or deleted. A method that merges tokens overrides `merge` too (see
`visionzip.py`); one that has no budget of its own, or trains, subclasses `torch.nn.Module` and returns a `Schedule`.
It is given to the model by `model.set_scheduler(module)`.
"""

from photon.schedulers.budget import SCHEDULERS, BudgetScheduler

# an import registers the method of its file
from photon.schedulers.fastv import FastVScheduler
from photon.schedulers.flipped import FlippedScheduler
from photon.schedulers.random import RandomScheduler
from photon.schedulers.stride import StrideScheduler
from photon.schedulers.visionzip import VisionZipScheduler


def use_scheduler(model, name, **settings):
    """Lets a Photon model choose tokens by the method `name`; returns the scheduler it had, to set again.

    Args: model: `PhotonForConditionalGeneration`; name: one of `SCHEDULERS`; settings: of the method, such as `seed`.
    Raises: `ValueError` for an unknown name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"There is no scheduler {name!r}; known are {', '.join(SCHEDULERS)}.")
    return model.set_scheduler(SCHEDULERS[name](model.model.language_model.scheduler, **settings))


__all__ = ["SCHEDULERS", "BudgetScheduler", "use_scheduler"]
