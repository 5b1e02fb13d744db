"""The weights of methods that learn, in a file of their own beside the model's."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

WEIGHTS = "scheduler_{}.safetensors"


def save_method(model, folder):
    """Writes the weights of a model's selection method beside the model, where the method has any."""
    method = model.model.language_model.scheduler
    weights = {name: weight.detach().cpu().contiguous() for name, weight in method.own_weights().items()}
    if weights:
        save_file(weights, Path(folder, WEIGHTS.format(method.name)), metadata={"format": "pt"})


def load_method(model, source, revision=None):
    """Reads into a model's selection method the weights that `save_method` wrote into a folder or a Hub id.

    Raises: `ValueError` where the method has weights and `source` has none of it.
    """
    method = model.model.language_model.scheduler
    if not method.learns:
        return
    name = WEIGHTS.format(method.name)
    file = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise ValueError(
            f"{method.name} has weights of its own, and --model has no {name}; expected a model that "
            f"train_hf.py --scheduler {method.name} has trained."
        )
    known, found = method.own_weights(), load_file(file)
    if {name: weight.shape for name, weight in known.items()} != {name: w.shape for name, w in found.items()}:
        raise ValueError(f"{name} does not fit the model: other names or shapes of weights.")
    for name, weight in known.items():
        weight.data.copy_(found[name])
