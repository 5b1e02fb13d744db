"""The trainings that are compared. All begin with one fresh decoder and the root's vision tower, which stays as it is.

An arm is what `train_hf.py` is told beyond `configs/recipe_tiny_exact.yaml`. Arms of one table have equal steps,
except where an arm names its own. The tables:
- "arms": the rules and budgets;
- "methods": other ways to choose, with which a decoder trains as long;
- "constants": the exact cut with one thing changed;
- "places": a deeper model that is trained on all tokens first, and then cut after one layer or another.
"""

from dataclasses import dataclass, field

DENSE = ("--stage", "dense", "--parts", "decoder", "--pack-questions", "--questions-together", "8")
GO_ON = ("--learning-rate", "7e-4", "--muon-learning-rate", "1e-3")  # lower, for a model that is trained
KEPT = 0.1  # of the tokens, by other methods
DEPTH, DEEP_STEPS, PLACE_STEPS = 12, 1.0, 0.2  # layers; multiples of the preset's steps
NOTHING_LEARNT = {"surrogate": "release", "saliency_gradient": False}  # of Photon's scheduler
MINMAX = {"saliency_scale": "minmax", "keep_budget": None}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args: name; says: what it is, for the table; photon: fields of `PhotonConfig`; options: of `train_hf.py`; labelled:
        share of patients whose label maps teach what to keep; seeds: how many; dense: keeps all tokens; table: in
        which it is shown; question_first: the question stands before the scan; layers: of the decoder; begins: the arm
        whose trained model it goes on with; steps: instead of the preset's, as a multiple of them; method: of
        `photon.schedulers`, which chooses in place of Photon's scheduler; kept: the share of tokens that it keeps.
    """

    name: str
    says: str
    photon: dict = field(default_factory=dict)
    options: tuple = ()
    labelled: float = 0.0
    seeds: int = 3
    dense: bool = False
    table: str = "arms"
    question_first: bool = False
    layers: int | None = None
    begins: str | None = None
    steps: float = 1.0
    method: str | None = None
    kept: float = KEPT


def surrogate(name, rule, says, **more):
    """An arm whose ranking is trained by another surrogate, at the same saliency and budget as the exact cut."""
    return Arm(name, says, {"surrogate": rule, **more})


def chosen_by(method, says, *, name=None, layer=-1, seeds=1, **more):
    """An arm whose tokens another method chooses, after a layer, and whose name is the method's unless it has one."""
    photon = NOTHING_LEARNT | {"scheduler_layer": layer}
    return Arm(name or method, says, photon, table="methods", seeds=seeds, method=method, **more)


ARMS = (
    Arm("dense", "all tokens", options=DENSE, dense=True, seeds=3),
    Arm("exact", "exact cut, 10 %"),
    surrogate("release", "release", "release's sign, with a gradient to the ranking, 10 %"),
    surrogate("taylor", "taylor", "first-order sign, with a gradient to the ranking, 10 %"),
    surrogate("gate", "gate", "gates on the logits, zero after the soft phase, 10 %"),
    Arm(
        "untaught", "no gradient to the ranking, but what attention in layer 0 learns, 10 %", NOTHING_LEARNT, seeds=1
    ),
    Arm("drawn", "no gradient to the ranking, with the exact cut's random gates, 10 %", {"saliency_gradient": False}),
    Arm("labels100", "exact cut, label maps of all patients", labelled=1.0),
    Arm("labels10", "exact cut, label maps of 10 % of patients", labelled=0.1, seeds=1),
    Arm("labels1", "exact cut, label maps of 1 % of patients", labelled=0.01),
    Arm("exact30", "exact cut, 30 %", {"keep_budget": 0.3}, seeds=1),
    Arm("exact3", "exact cut, 3 %", {"keep_budget": 0.03}),
    Arm(
        "published",
        "release as published: the threshold alone learns, band 0.3 to 0.8",
        {"surrogate": "release", "saliency": "logits", "saliency_gradient": False, "band_weight": 1.0} | MINMAX,
        seeds=1,
    ),
    chosen_by("random", "random tokens", seeds=3),
    chosen_by("stride", "every tenth token"),
    chosen_by("pooling", "3D average pooling (M3D)"),
    chosen_by("perceiver", "latents of a perceiver (RadFM)"),
    chosen_by("divprune", "DivPrune", seeds=3),
    chosen_by("divprune", "DivPrune, 3 %", name="divprune3", seeds=3, kept=0.03),
    chosen_by("pyramid", "PyramidDrop, from layer 0 on", layer=0),
    chosen_by("atp", "ATP-LLaVA, after layer 0", layer=0),
    *(
        Arm(name, says, photon, options, table="constants", **{"seeds": 1} | more)
        for name, says, photon, options, more in (
            ("robust", "15 % of rows with a perturbed scan", {"robust_probability": 0.15}, (), {}),
            ("flip", "5 % of rows keep what they would drop", {"flip_probability": 0.05}, (), {}),
            ("question_first", "the question before the scan", {}, (), {"question_first": True}),
            ("gain_quarter", "`gate_gradient` 0.25", {"gate_gradient": 0.25}, (), {"seeds": 3}),
            ("gain_four", "`gate_gradient` 4", {"gate_gradient": 4.0}, (), {}),
            ("gain_hundredth", "`gate_gradient` 0.01", {"gate_gradient": 0.01}, (), {}),
            ("slope_half", "`gate_slope` 1.5", {"gate_slope": 1.5}, (), {}),
            ("slope_twice", "`gate_slope` 6", {"gate_slope": 6.0}, (), {}),
            ("temperature_half", "`gate_temperature` 0.25", {"gate_temperature": 0.25}, (), {}),
            ("temperature_twice", "`gate_temperature` 1", {"gate_temperature": 1.0}, (), {}),
            ("stretch_half", "gates from −0.05 to 1.05", {"gate_low": -0.05, "gate_high": 1.05}, (), {}),
            ("stretch_twice", "gates from −0.2 to 1.2", {"gate_low": -0.2, "gate_high": 1.2}, (), {}),
            ("budget_early", "budget reached at half the step", {}, ("--budget-end", "0.125"), {}),
            ("budget_late", "budget reached at twice the step", {}, ("--budget-end", "0.5"), {}),
        )
    ),
    Arm("deep", "all tokens", options=DENSE, dense=True, table="places", seeds=1, layers=DEPTH, steps=DEEP_STEPS),
    Arm(
        "deep_on", "all tokens, trained on", options=(*DENSE, *GO_ON), dense=True, table="places", seeds=1,
        layers=DEPTH, begins="deep", steps=PLACE_STEPS,
    ),
    *(
        Arm(
            f"deep_{name}", says, {"scheduler_layer": layer}, GO_ON, table="places", seeds=1, layers=DEPTH,
            begins="deep", steps=PLACE_STEPS,
        )
        for name, says, layer in (
            ("front", "before layer 0", -1),
            ("eighth", "after layer 1, L/8", DEPTH // 8),
            ("quarter", "after layer 2, L/4 − 1 (the paper)", DEPTH // 4 - 1),
            ("half", "after layer 6, L/2", DEPTH // 2),
        )
    ),
)  # fmt: skip
