"""What `peers.py` compares: methods, each at the place in the model where it works, on the weights that suit it."""

from dataclasses import dataclass
from itertools import pairwise

from photon.schedulers.pyramid import cut_layers, stage_share

GROUPS = {
    "controls": ("random", "body", "stride", "grid", "pooling", "withdraw"),
    "attention within the vision tower": ("visionzip", "hiprune", "prumerge", "prumerge-plus", "medpruner", "ivtp"),
    "likeness of tokens": ("divprune", "cdpruner", "tome", "evs", "evs-centre", "omniv"),
    "within the decoder": ("photon's saliency", "fastv", "sparsevlm", "transprune", "pyramid"),
}
DRAWN, WITHOUT, DECODER = ("random",), ("withdraw",), ("sparsevlm", "transprune", "pyramid")
TOWER = tuple(
    name for names in [*GROUPS.values()][:3] for name in names if name not in (*DRAWN, *WITHOUT)
)  # the cut is before the first layer
OURS, ALL, SALIENCY = "photon, trained", "all tokens", "photon's saliency, untrained"
FASTV_LAYER = 1  # K = 2: scored in the second layer
PRECISION = 1e-9  # of a share


@dataclass(frozen=True)
class Arm:
    """One line of the table.

    Args: name; model: "dense", "trained" or the name of a `--peer`; method: of `SCHEDULERS`, `None` for the model's
        own scheduler; layer: `scheduler_layer`, `None` as the model was trained; seed: of draws; whole: keeps all
        tokens; nothing: keeps none, whatever the budget.
    """

    name: str
    model: str
    method: str | None = None
    layer: int | None = None
    seed: int = 0
    whole: bool = False
    nothing: bool = False

    @property
    def line(self):
        """The name of its line in the table, which several seeds share."""
        return self.name.partition(" #")[0]


def arms_of(seeds, layers, peers=(), original=0, methods=None):
    """All arms. layers: of the dense model's decoder; peers: names of methods with a model of their own; original: the
    layer after which the paper cuts, a quarter of the way up; methods: leave out others than these, except the model's
    own."""
    draws = range(seeds)
    arms = [Arm(ALL, "dense", whole=True), Arm(SALIENCY, "dense", layer=-1)]
    arms += [Arm(f"random #{seed}", "dense", "random", -1, seed) for seed in draws]
    arms += [Arm(name, "dense", name, -1) for name in TOWER]
    arms += [Arm(f"{SALIENCY}, after layer {original}", "dense", layer=original)]
    arms += [
        Arm(f"fastv, after layer {layer}", "dense", "fastv", layer)
        for layer in dict.fromkeys((min(FASTV_LAYER, layers - 2), original))
    ]
    arms += [Arm(f"{name}, after layer {original}", "dense", name, original) for name in DECODER]
    arms += [
        Arm(f"withdraw, after layer {layer}", "dense", "withdraw", layer, nothing=True) for layer in range(layers - 1)
    ]
    arms += [Arm(OURS, "trained")]
    arms += [Arm(f"random, on the weights of ours #{seed}", "trained", "random", seed=seed) for seed in draws]
    arms += [Arm(f"{name}, trained with it", name, name) for name in peers]
    return [arm for arm in arms if methods is None or arm.method is None or arm.method in methods]


def layer_average(share, layer, layers, method=None):
    """Share of the visual tokens that a layer of the decoder has on average, if `share` stays after the last cut, and
    the first is after `layer`."""
    cuts = cut_layers(layer, layers) if method == "pyramid" else [layer]
    stages = [high - low for low, high in pairwise([-1, *cuts, layers - 1])]
    return sum(size * stage_share(share, number, len(cuts)) for number, size in enumerate(stages)) / layers


def share_at(average, layer, layers, method=None):
    """The share to keep for this average over the layers, or `None` where it cannot be met."""
    low, high = 0.0, 1.0
    if layer_average(low, layer, layers, method) >= average:
        return None
    while high - low > PRECISION:
        middle = (low + high) / 2
        below = layer_average(middle, layer, layers, method) < average
        low, high = (middle, high) if below else (low, middle)
    return round(high, 6)


def shares_of(arm, layer, layers, shares):
    """Shares of the visual tokens at which an arm is run: `shares`, and those that meet them on average of layers."""
    if arm.whole:
        return [1.0]
    if arm.nothing:
        return [0.0]
    averages = [share_at(share, layer, layers, arm.method) for share in shares] if layer >= 0 else []
    return list(dict.fromkeys([*shares, *(share for share in averages if share is not None)]))
