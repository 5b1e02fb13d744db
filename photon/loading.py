"""Loads models and processors, and gives each shipped class one identity in a process.

Importing this module registers the classes of the repository's root with the Auto classes. From then on
`AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)` returns these very classes, whatever code
the checkpoint in FOLDER carries: in this repository's tools the root's code runs. A checkpoint whose own code differs
gets a warning; it runs its own code in any process that does not import `photon`.
"""

import json
import re
import warnings
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.utils import find_adapter_config_file

from photon.configuration_photon import PhotonConfig
from photon.modeling_photon import PhotonForConditionalGeneration, PhotonModel
from photon.precision import choose_dtype
from photon.processing_photon import PhotonProcessor, PhotonVolumeProcessor

ROOT = Path(__file__).resolve().parent.parent
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
MAX_NEW_TOKENS = 256
ADAPTED_CONFIG = "photon_config.json"  # beside adapters: a file config.json would make them look like a whole model
CHAT_TOKENS = {
    "im_start_token_id": "<|im_start|>",
    "im_end_token_id": "<|im_end|>",
    "user_token_id": "user",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}

AutoConfig.register(PhotonConfig.model_type, PhotonConfig)
AutoModel.register(PhotonConfig, PhotonModel)
AutoModelForImageTextToText.register(PhotonConfig, PhotonForConditionalGeneration)
AutoModelForMultimodalLM.register(PhotonConfig, PhotonForConditionalGeneration)
AutoProcessor.register(PhotonConfig, PhotonProcessor)
# so that `save_pretrained` puts the code beside the weights, as for a model that came with its own code
PhotonConfig.register_for_auto_class()
PhotonModel.register_for_auto_class("AutoModel")
PhotonForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
PhotonProcessor.register_for_auto_class("AutoProcessor")
PhotonVolumeProcessor.register_for_auto_class("AutoImageProcessor")


def usable_device(device):
    """A torch device that is there; "auto" takes the GPU where there is one. Raises `ValueError`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):  # what torch raises for an unknown word and for a build without CUDA
        raise ValueError(f"There is no device {device!r} here; --device takes auto, cpu, cuda, cuda:1, ...") from None


def warn_of_other_code(folder):
    """Warns where a checkpoint folder carries Photon code that differs from the root's, which is what runs."""
    files = sorted(Path(folder).glob("*_photon.py")) if Path(folder).is_dir() else ()
    other = [file.name for file in files if not _same_file(file, ROOT / file.name)]
    if other:
        warnings.warn(
            f"The checkpoint carries code that differs from this repository's ({', '.join(other[:4])}"
            f"{', ...' if len(other) > 4 else ''}). This repository's code runs. To run the checkpoint's own, load it "
            "with AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True) outside this repository.",
            stacklevel=2,
        )


def _same_file(file, root_file):
    return root_file.is_file() and file.read_bytes() == root_file.read_bytes()


def adapter_base(source, revision=None):
    """Folder or Hub id of the base model, where `source` holds only LoRA adapters; `None` where it holds a model.

    Raises: `ValueError` where the base is a folder that does not exist.
    """
    if Path(source, "config.json").is_file():
        return None
    file = find_adapter_config_file(str(source), revision=revision)
    if file is None:
        return None
    base = json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not Path(base).is_dir() and (Path(base).is_absolute() or not HUB_ID.fullmatch(base) or base == "."):
        raise ValueError(
            f"The adapters in {source} belong to the model {base}, and there is no such folder. Write the folder or "
            "Hub id of their base model into adapter_config.json, under base_model_name_or_path."
        )
    return base


def load_config(source, revision=None):
    """Configuration of a model, or of the model that adapters in `source` were trained in."""
    base, kept = adapter_base(source, revision), Path(source, ADAPTED_CONFIG)
    if base is not None and kept.is_file():
        return AutoConfig.from_pretrained(kept, trust_remote_code=True)
    revision = revision if base is None else None
    return AutoConfig.from_pretrained(base or source, revision=revision, trust_remote_code=True)


def load_model(source, revision=None, trust_remote_code=True, output_loading_info=False, **options):
    """As `AutoModelForImageTextToText.from_pretrained`, except that adapters are merged into their base.

    Args: source: folder or Hub id of a model, or of adapters; revision: of `source`.
    """
    base = adapter_base(source, revision)
    if base is not None and Path(source, ADAPTED_CONFIG).is_file():
        options.setdefault("config", load_config(source))
    model, info = AutoModelForImageTextToText.from_pretrained(
        source if base is None else base,
        revision=revision if base is None else None,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **options,
    )
    if base is not None:
        model = peft().PeftModel.from_pretrained(model, source, revision=revision).merge_and_unload()
    return (model, info) if output_loading_info else model


def peft():
    """The library of adapters. Raises `ImportError` with what to install."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft, which is missing: pip install peft") from error
    return peft


def load_processor(source, **volume_options):
    """The processor of a local folder or Hub id. volume_options: fields of the volume processor to override.

    Raises: `ValueError` where there is no such folder, or the model is not Photon.
    """
    local = Path(source).is_dir()
    if not local and not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"There is no folder {source}, and it is no Hub id (owner/name). Check --model.")
    if local and not Path(source, "config.json").is_file():
        base = adapter_base(source)
        if base is None:
            raise ValueError(
                "The folder of --model has no config.json; a complete one is what convert_photon.py writes."
            )
        source = source if Path(source, "processor_config.json").is_file() else base
    warn_of_other_code(source)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, **volume_options)
    if not isinstance(processor, PhotonProcessor):
        raise ValueError("--model is not a Photon model; convert_photon.py makes one of a Qwen2.5-VL checkpoint.")
    return processor


def load(source, device="auto", dtype="auto", **volume_options):
    """Processor and model of a local folder or Hub id.

    Args:
        dtype: "auto" chooses by processor and free memory on a CPU (see `choose_dtype`).
        volume_options: fields of the volume processor to override.
    """
    device = usable_device(device)
    processor = load_processor(source, **volume_options)
    if dtype == "auto":
        dtype, _ = choose_dtype(load_config(source), device)
    model = load_model(source, dtype=dtype)
    return processor, model.to(device).eval()


def complete_generation_config(model):
    """Gives a model that will be saved a limit for its answers, where it has none. The library's is 20 tokens."""
    settings = model.generation_config
    if settings.max_new_tokens is None:
        settings.max_new_tokens = MAX_NEW_TOKENS


def build_processor(tokenizer, config, volume_fields):
    """A PhotonProcessor around a tokenizer; sets the chat's ids in the config by it.

    Args: volume_fields: fields of `PhotonVolumeProcessor`. Raises: `ValueError` where the tokenizer lacks one of
        Qwen2.5-VL's special tokens.
    """
    tokenizer.padding_side = "left"
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CHAT_TOKENS.values() if token not in vocabulary]
    if missing:
        raise ValueError(f"The tokenizer lacks {', '.join(missing)}; expected that of Qwen2.5-VL.")
    for field, token in CHAT_TOKENS.items():
        setattr(config, field, vocabulary[token])
    template = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    return PhotonProcessor(PhotonVolumeProcessor(**volume_fields), tokenizer, chat_template=template)
