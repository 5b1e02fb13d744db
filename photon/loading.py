"""Loads models and processors, and gives each shipped class one identity in a process.

Importing this module registers the classes of the repository's root with the Auto classes. From then on
`AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)` returns these very classes, whatever code
the checkpoint in FOLDER carries: in this repository's tools the root's code runs. A checkpoint whose own code differs
gets a warning; it runs its own code in any process that does not import `photon`.
"""

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

from photon.configuration_photon import PhotonConfig
from photon.modeling_photon import PhotonForConditionalGeneration, PhotonModel
from photon.processing_photon import PhotonProcessor, PhotonVolumeProcessor

ROOT = Path(__file__).resolve().parent.parent
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
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


def load_processor(source, **volume_options):
    """The processor of a local folder or Hub id. volume_options: fields of the volume processor to override.

    Raises: `ValueError` where there is no such folder, or the model is not Photon.
    """
    local = Path(source).is_dir()
    if local and not Path(source, "config.json").is_file():
        raise ValueError("The folder of --model has no config.json; a complete one is what convert_photon.py writes.")
    if not local and not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"There is no folder {source}, and it is no Hub id (owner/name). Check --model.")
    warn_of_other_code(source)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, **volume_options)
    if not isinstance(processor, PhotonProcessor):
        raise ValueError("--model is not a Photon model; convert_photon.py makes one of a Qwen2.5-VL checkpoint.")
    return processor


def load(source, device="auto", dtype="auto", **volume_options):
    """Processor and model of a local folder or Hub id. volume_options: fields of the volume processor to override."""
    device = usable_device(device)
    processor = load_processor(source, **volume_options)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"  # bfloat16 is slower there
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True, dtype=dtype)
    return processor, model.to(device).eval()


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
