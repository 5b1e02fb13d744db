"""A Photon model and processor from the authors' release or from a Qwen2.5-VL checkpoint.

    model, volume_fields = from_official(folder)
    model, volume_fields = from_qwen(folder)

Every key of a checkpoint must find its place; a missing, unexpected or misshapen one raises `ValueError`.
"""

import json
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoTokenizer

from photon.configuration_photon import PhotonConfig
from photon.loading import build_processor
from photon.modeling_photon import PhotonForConditionalGeneration

PATCH_EMBED = "model.visual.patch_embed.proj.weight"
# names of transformers 4.51 and of the release -> ours; applied one after the other
OFFICIAL_NAMES = {
    r"^visual\.vision_patch_embed\.": "model.visual.patch_embed.",
    r"^model\.layers\.\d+\.atp\.predictor\.": "model.language_model.scheduler.predictor.",
}
QWEN_NAMES = {
    r"^visual\.": "model.visual.",
    r"^model\.(?!language_model\.|visual\.)": "model.language_model.",
}
UNUSED = re.compile(r"^model\.(language_model\.)?layers\.\d+\.atp\.pos_proj\.weight$")  # in the release, never read
# not in Qwen, nor in the release's first stage
NEW = re.compile(r"^model\.language_model\.scheduler\.(predictor\.|running_level|level_updates)")
RELEASE = {
    "surrogate": "release", "saliency": "logits", "saliency_scale": "minmax", "saliency_gradient": False,
    "keep_budget": None, "band_weight": 1.0,
}  # fmt: skip
DROPPED_FIELDS = {"model_type", "architectures", "transformers_version", "auto_map", "custom_pipelines"}


def local_folder(source, revision=None):
    """The path of a checkpoint: a folder as it is, a Hub id downloaded."""
    if Path(source).is_dir():
        if revision:
            raise ValueError(f"--revision {revision} is for Hub ids; a folder was given.")
        return Path(source)
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


def checkpoint_index(folder):
    """{tensor name: file} of a folder's safetensors files. Raises `ValueError` where there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError("The checkpoint has no .safetensors file. Convert pickled weights to safetensors first.")
    index = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            index |= dict.fromkeys(tensors.keys(), file)
    return index


def read_tensor(index, name):
    with safe_open(index[name], "pt") as tensors:
        return tensors.get_tensor(name)


def photon_config(folder, **fields):
    """The PhotonConfig for a Qwen2.5-VL config.json, flat (transformers 4) or nested (5); `fields` are set in it.

    Raises: `ValueError` where the folder holds another kind of model.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("model_type") != "qwen2_5_vl":
        raise ValueError(
            f"config.json names model_type {config.get('model_type')!r}; expected 'qwen2_5_vl', which Qwen2.5-VL "
            "and the release have."
        )
    kept = {key: value for key, value in config.items() if key not in DROPPED_FIELDS}
    vision = {key: value for key, value in kept.pop("vision_config", {}).items() if key not in DROPPED_FIELDS}
    vision.pop("in_chans", None)
    vision |= {"in_channels": 1, "temporal_patch_size": 14}
    text = kept.get("text_config")
    if text is not None:
        kept["text_config"] = {key: value for key, value in text.items() if key not in DROPPED_FIELDS}
    eos = (text or config).get("eos_token_id", config.get("eos_token_id"))
    if isinstance(eos, int):
        fields.setdefault("im_end_token_id", eos)
    if (text or config)["vocab_size"] <= 151644:  # not Qwen's vocabulary, so not Qwen's ids
        fields |= {"im_start_token_id": None, "user_token_id": None}
    return PhotonConfig(**(kept | {"vision_config": vision} | fields))


def load_renamed(folder, config, names):
    """The model with its weights renamed by `names`, and what did not fit, as transformers reports it."""
    return PhotonForConditionalGeneration.from_pretrained(
        folder,
        config=config,
        key_mapping=names,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are reported, for `refuse_misfits` to name them
        dtype="auto",
    )


def refuse_misfits(info, missing, unexpected=UNUSED, mismatched=()):
    """Raises `ValueError` unless each key has its place.

    Args:
        info: as `load_renamed` returns it.
        missing, unexpected: patterns of the keys that may be so.
        mismatched: names that may have another shape.
    """
    faults = {
        "missing": [key for key in info["missing_keys"] if not missing.match(key)],
        "unexpected": [key for key in info["unexpected_keys"] if not unexpected.match(key)],
        "of another shape": [key for key, *_ in info["mismatched_keys"] if key not in mismatched],
    }
    for kind, keys in faults.items():
        if keys:
            raise ValueError(
                f"{len(keys)} weights are {kind}, so this is not the checkpoint that was expected: "
                f"{', '.join(sorted(keys)[:8])}{', ...' if len(keys) > 8 else ''}. Nothing was written."
            )


def from_official(folder):
    """The release's model with our names and the release's behaviour, and the fields of its volume processor."""
    index = checkpoint_index(folder)
    layers = {int(found[1]) for key in index if (found := re.match(r"model\.layers\.(\d+)\.atp\.predictor\.", key))}
    if len(layers) > 1:
        raise ValueError(f"The checkpoint has schedulers at layers {sorted(layers)}; Photon has one.")
    stage_one = not layers  # Photon-S1 has no scheduler yet
    config = photon_config(
        folder,
        scheduler_layer=None if stage_one else layers.pop(),
        evict_early_layers=True,
        **RELEASE,
    )
    model, info = load_renamed(folder, config, OFFICIAL_NAMES | QWEN_NAMES)
    refuse_misfits(info, missing=NEW if stage_one else re.compile("(?!)"))
    return model, {"scaling": "minmax"}


def from_qwen(folder, random_patch_embed=False):
    """A Qwen2.5-VL model that takes volumes in place of images, and the fields of its volume processor.

    Its scheduler keeps nearly every token at first.
    """
    index = checkpoint_index(folder)
    model, info = load_renamed(folder, photon_config(folder), QWEN_NAMES)
    refuse_misfits(info, missing=NEW, unexpected=re.compile("(?!)"), mismatched={PATCH_EMBED})
    preprocessor = folder / "preprocessor_config.json"
    normalise = json.loads(preprocessor.read_text(encoding="utf-8")) if preprocessor.is_file() else {}
    if random_patch_embed:
        return model, {}
    name = next(key for key in index if key.endswith("visual.patch_embed.proj.weight"))
    inflated = inflate(read_tensor(index, name), model.config.vision_config.temporal_patch_size)
    with torch.no_grad():
        model.get_parameter(PATCH_EMBED).copy_(inflated)
    # one number for Qwen's three channels: they differ by 0.04 (mean) and 0.007 (std)
    return model, {
        key: sum(values) / len(values)
        for key, values in (("mean", normalise.get("image_mean")), ("std", normalise.get("image_std")))
        if values
    }


def inflate(weight, depth):
    """A patch embedding for volumes, (out, 1, depth, h, w), from one for colour frames, (out, 3, 2, h, w).

    The sum over channels and frames is spread evenly over depth, so that a volume of equal slices gives the same
    output as the grey image that its slices show.
    """
    flat = weight.double().sum(dim=(1, 2), keepdim=True)  # (out, 1, 1, h, w)
    return (flat / depth).expand(-1, -1, depth, -1, -1).to(weight.dtype)


def save_processor(folder, output, config, volume_fields):
    """Write the processor into `output` if the source has a tokenizer; returns whether it has."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return False
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    build_processor(tokenizer, config, volume_fields).save_pretrained(output)
    return True
