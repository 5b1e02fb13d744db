"""Make a complete Photon repository from the authors' checkpoints, or from a Qwen2.5-VL checkpoint.

    python convert_photon.py --official Alibaba-DAMO-Academy/Photon-S2 --revision BRANCH --output photon-s2
    python convert_photon.py --qwen Qwen/Qwen2.5-VL-3B-Instruct --output photon-3b-start

`--official` (a folder or a Hub id; Photon-S2 has one branch a benchmark) gives the release's behaviour: keys and
values of the early layers evicted too, its surrogate gradient, its min-max scaling. `--qwen` gives a model to train:
the 3D patch embedding is inflated from the 2D one, so that a volume constant in depth answers like the grey image, or
random with `--random-patch-embed`, as the authors begin. Every key of a checkpoint must find its place: a missing or
unexpected one stops the conversion. Weights keep their type; as much memory is needed as they take.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoTokenizer

from photon.configuration_photon import PhotonConfig
from photon.loading import build_processor
from photon.modeling_photon import PhotonForConditionalGeneration

PATCH_EMBED = "model.visual.patch_embed.proj.weight"
# names of transformers 4.51 (and of the release) -> ours; applied one after the other
OFFICIAL_NAMES = {
    r"^visual\.vision_patch_embed\.": "model.visual.patch_embed.",
    r"^model\.layers\.\d+\.atp\.predictor\.": "model.language_model.scheduler.predictor.",
}
QWEN_NAMES = {
    r"^visual\.": "model.visual.",
    r"^model\.(?!language_model\.|visual\.)": "model.language_model.",
}
UNUSED = re.compile(r"^model\.(language_model\.)?layers\.\d+\.atp\.pos_proj\.weight$")  # in the release, never read
NEW = re.compile(r"^model\.language_model\.scheduler\.predictor\.")  # not in Qwen, nor in the release's first stage
DROPPED_FIELDS = {"model_type", "architectures", "transformers_version", "auto_map", "custom_pipelines"}


def local_folder(source, revision=None):
    """A folder as it is; a Hub id downloaded."""
    if Path(source).is_dir():
        if revision:
            raise SystemExit(f"--revision {revision} is for Hub ids; a folder was given.")
        return Path(source)
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


def checkpoint_index(folder):
    """{tensor name: file} of a folder's safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit("The checkpoint has no .safetensors file. Convert pickled weights to safetensors first.")
    index = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            index |= dict.fromkeys(tensors.keys(), file)
    return index


def read_tensor(index, name):
    with safe_open(index[name], "pt") as tensors:
        return tensors.get_tensor(name)


def photon_config(folder, **fields):
    """PhotonConfig of a Qwen2.5-VL config.json, flat (transformers 4) or nested (5)."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("model_type") != "qwen2_5_vl":
        raise SystemExit(
            f"config.json names model_type {config.get('model_type')!r}; expected 'qwen2_5_vl', that of Qwen2.5-VL "
            "and of the release."
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
    if (text or config)["vocab_size"] <= 151644:  # not Qwen's vocabulary: a tokenizer tells, or the scan's marks do
        fields |= {"im_start_token_id": None, "user_token_id": None}
    return PhotonConfig(**(kept | {"vision_config": vision} | fields))


def load(folder, config, names):
    """The model and what did not fit, as transformers reports it."""
    model_class = PhotonForConditionalGeneration
    return model_class.from_pretrained(
        folder,
        config=config,
        key_mapping=names,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are reported, for `refuse_misfits` to name them
        dtype="auto",
    )


def refuse_misfits(info, missing, unexpected=UNUSED, mismatched=()):
    """Stop unless each key has its place; `missing`, `unexpected` are the documented exceptions."""
    faults = {
        "missing": [key for key in info["missing_keys"] if not missing.match(key)],
        "unexpected": [key for key in info["unexpected_keys"] if not unexpected.match(key)],
        "of another shape": [key for key, *_ in info["mismatched_keys"] if key not in mismatched],
    }
    for kind, keys in faults.items():
        if keys:
            raise SystemExit(
                f"{len(keys)} weights are {kind}, so this is not the checkpoint that was expected: "
                f"{', '.join(sorted(keys)[:8])}{', ...' if len(keys) > 8 else ''}. Nothing was written."
            )


def from_official(folder):
    """The release's model: its keys renamed, its behaviour set."""
    index = checkpoint_index(folder)
    layers = {int(found[1]) for key in index if (found := re.match(r"model\.layers\.(\d+)\.atp\.predictor\.", key))}
    if len(layers) > 1:
        raise SystemExit(f"The checkpoint has schedulers at layers {sorted(layers)}; Photon has one.")
    stage_one = not layers  # Photon-S1 has no scheduler yet
    config = photon_config(
        folder,
        scheduler_layer=None if stage_one else layers.pop(),
        evict_early_layers=True,
        surrogate="release",
        saliency="logits",
    )
    model, info = load(folder, config, OFFICIAL_NAMES | QWEN_NAMES)
    refuse_misfits(info, missing=NEW if stage_one else re.compile("(?!)"))
    return model, {"scaling": "minmax"}


def from_qwen(folder, random_patch_embed=False):
    """A Qwen2.5-VL model with volumes for images, and a scheduler that keeps nearly everything at first."""
    index = checkpoint_index(folder)
    model, info = load(folder, photon_config(folder), QWEN_NAMES)
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
    """(out, 3, 2, h, w) of a colour image shown twice -> (out, 1, depth, h, w): summed over channels and frames,
    spread evenly over depth. A volume whose slices are all x then gives what the image gives whose channels are all
    x."""
    flat = weight.double().sum(dim=(1, 2), keepdim=True)  # (out, 1, 1, h, w)
    return (flat / depth).expand(-1, -1, depth, -1, -1).to(weight.dtype)


def save_processor(folder, output, config, volume_fields):
    """The processor, if the source has a tokenizer. Returns whether it has."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return False
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    build_processor(tokenizer, config, volume_fields).save_pretrained(output)
    return True


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--official", metavar="DIR|HUB_ID", help="a checkpoint of the authors' release")
    source.add_argument("--qwen", metavar="DIR|HUB_ID", help="a Qwen2.5-VL checkpoint")
    parser.add_argument("--revision", metavar="BRANCH", help="branch of a Hub id")
    parser.add_argument("--random-patch-embed", action="store_true", help="with --qwen: do not inflate")
    parser.add_argument("--output", metavar="DIR", required=True, type=Path)
    args = parser.parse_args(argv)
    if args.official and args.random_patch_embed:
        parser.error("--random-patch-embed is for --qwen; the release's checkpoints have a 3D patch embedding.")
    if args.output.exists() and any(args.output.iterdir()):
        parser.error("--output is not empty; name a new folder.")
    folder = local_folder(args.official or args.qwen, args.revision)
    if args.official:
        model, volume_fields = from_official(folder)
    else:
        model, volume_fields = from_qwen(folder, args.random_patch_embed)
    args.output.mkdir(parents=True, exist_ok=True)
    with_processor = save_processor(folder, args.output, model.config, volume_fields)
    model.save_pretrained(args.output, save_original_format=False)  # under our names, not those of the source
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e6:.1f} M parameters, scheduling layer {model.config.scheduler_layer}.", file=sys.stderr)
    if not with_processor:
        print("The source has no tokenizer, so no processor was written.", file=sys.stderr)


if __name__ == "__main__":
    main()
