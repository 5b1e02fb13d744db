"""The trainings that are compared. All begin with one fresh decoder and the root's vision tower, which stays as it is.

An arm is what `train_hf.py` is told beyond `configs/recipe_tiny_exact.yaml`. Arms of one table have equal steps.
"""

from dataclasses import dataclass, field

DENSE = ("--stage", "dense", "--parts", "decoder", "--pack-questions", "--questions-together", "8")
MINMAX = {"saliency_scale": "minmax", "keep_budget": None}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args: name; says: what it is, for the table; photon: fields of `PhotonConfig`; options: of `train_hf.py`; labelled:
        share of patients whose label maps teach what to keep; seeds: how many; dense: keeps all tokens.
    """

    name: str
    says: str
    photon: dict = field(default_factory=dict)
    options: tuple = ()
    labelled: float = 0.0
    seeds: int = 3
    dense: bool = False


def surrogate(name, rule, says, **more):
    """An arm whose ranking is trained by another surrogate, at the same saliency and budget as the exact cut."""
    return Arm(name, says, {"surrogate": rule, **more})


ARMS = (
    Arm("dense", "all tokens", options=DENSE, dense=True, seeds=3),
    Arm("exact", "exact cut, 10 %"),
    surrogate("release", "release", "release's sign, with a gradient to the ranking, 10 %"),
    surrogate("taylor", "taylor", "first-order sign, with a gradient to the ranking, 10 %"),
    surrogate("gate", "gate", "gates on the logits, zero after the soft phase, 10 %"),
    Arm(
        "random",
        "random tokens, 10 %",
        {"surrogate": "release", "saliency_gradient": False},
        ("--scheduler", "random"),
    ),
    Arm(
        "stride",
        "every tenth token",
        {"surrogate": "release", "saliency_gradient": False},
        ("--scheduler", "stride"),
        seeds=1,
    ),
    Arm("labels100", "exact cut, label maps of all patients", labelled=1.0),
    Arm("labels10", "exact cut, label maps of 10 % of patients", labelled=0.1, seeds=1),
    Arm("labels1", "exact cut, label maps of 1 % of patients", labelled=0.01, seeds=1),
    Arm("exact30", "exact cut, 30 %", {"keep_budget": 0.3}, seeds=1),
    Arm("exact3", "exact cut, 3 %", {"keep_budget": 0.03}, seeds=1),
    Arm(
        "published",
        "release as published: the threshold alone learns, band 0.3 to 0.8",
        {"surrogate": "release", "saliency": "logits", "saliency_gradient": False, "band_weight": 1.0} | MINMAX,
        seeds=1,
    ),
)
