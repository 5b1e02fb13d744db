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
`visionzip.py`). One that is easier written for a single prompt subclasses `RowScheduler` (`rows.py`) and has one
method, `choose`. One that cuts again further up overrides `later` (`pyramid.py`). What the seam does not offer, a
method records itself, of the vision tower or of the layers below the cut (`recorders.py`). Any other
`torch.nn.Module` that returns a `Schedule` is given to the model by `model.set_scheduler(module)`.
"""

# an import registers the method of its file
from photon.schedulers.atp import ATPScheduler
from photon.schedulers.body import BodyScheduler
from photon.schedulers.budget import SCHEDULERS, BudgetScheduler
from photon.schedulers.cdpruner import CDPrunerScheduler
from photon.schedulers.divprune import DivPruneScheduler
from photon.schedulers.evs import EVSScheduler
from photon.schedulers.fastv import FastVScheduler
from photon.schedulers.flipped import FlippedScheduler
from photon.schedulers.grid import GridScheduler
from photon.schedulers.hiprune import HiPruneScheduler
from photon.schedulers.ivtp import IVTPScheduler
from photon.schedulers.medpruner import MedPrunerScheduler
from photon.schedulers.omniv import OmniVScheduler
from photon.schedulers.perceiver import PerceiverScheduler
from photon.schedulers.pooling import PoolingScheduler
from photon.schedulers.prumerge import PruMergeScheduler
from photon.schedulers.pyramid import PyramidScheduler
from photon.schedulers.random import RandomScheduler
from photon.schedulers.sparsevlm import SparseVLMScheduler
from photon.schedulers.stride import StrideScheduler
from photon.schedulers.tome import ToMeScheduler
from photon.schedulers.transprune import TransPruneScheduler
from photon.schedulers.visionzip import VisionZipScheduler
from photon.schedulers.weights import load_method, save_method
from photon.schedulers.withdraw import WithdrawScheduler


def use_scheduler(model, name, **settings):
    """Lets a Photon model choose tokens by the method `name`; returns the scheduler it had, to set again.

    Args: model: `PhotonForConditionalGeneration`; name: one of `SCHEDULERS`; settings: of the method, such as `seed`.
    Raises: `ValueError` for an unknown name, or where the model cuts below what the method reads.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"There is no scheduler {name!r}; known are {', '.join(SCHEDULERS)}.")
    method, layer = SCHEDULERS[name], model.config.scheduler_layer
    if layer < method.lowest_layer:
        raise ValueError(
            f"{name} reads decoder layers below the cut, but the model cuts after layer {layer} (scheduler_layer); "
            f"expected {method.lowest_layer} or more."
        )
    before = model.model.language_model.scheduler
    own = before.reference if isinstance(before, BudgetScheduler) else before  # one method does not count by another
    scheduler = method(own, **settings)
    return model.set_scheduler(scheduler.to(model.device).train(model.training))


__all__ = ["SCHEDULERS", "BudgetScheduler", "load_method", "save_method", "use_scheduler"]
