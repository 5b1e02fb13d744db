"""A clean folder of a model: weights, settings, code, requirements, and nothing else."""

import hashlib
import json
import re
import shutil
from pathlib import Path

from photon.loading import ROOT

# what belongs to a model beside its code; anything else in the folder stays at home
SETTINGS = (
    "config.json", "generation_config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
COMMANDS = ("convert_photon.py",)  # named alike, but no part of the model
AUTO_MAP = {
    "AutoConfig": "configuration_photon.PhotonConfig",
    "AutoModel": "modeling_photon.PhotonModel",
    "AutoModelForImageTextToText": "modeling_photon.PhotonForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_photon.PhotonForConditionalGeneration",
}
PIPELINES = {
    "volume-question-answering": {
        "impl": "pipeline_photon.VolumeQuestionAnsweringPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}
OF_ONE_MACHINE = ("_name_or_path", "use_cache")
# a place on somebody's disk, in JSON; a Hub id has no slash in front
LOCAL_PATH = re.compile(
    r'"(/(home|Users|mnt|data|root|tmp|scratch|work|media|private|var|opt)\b[^"]*|[A-Za-z]:\\\\[^"]*)"'
)


def build_model(source, output, card):
    """Writes the clean folder of a model.

    Args: source: a complete folder, as train_hf.py, convert_photon.py and `save_pretrained` write it; output: a new
        folder; card: the text of README.md.
    Raises: `ValueError` where the source is incomplete, holds pickled weights alone, or names a place on this disk.
    """
    source, output = Path(source), Path(output)
    weights = complete_weights(source)
    output.mkdir(parents=True)
    for file in [*weights, *(source / name for name in SETTINGS if (source / name).is_file())]:
        shutil.copy(file, output / file.name)
    for file in code_files():
        shutil.copy(file, output / file.name)
    for name in ("LICENSE", "NOTICE", "requirements.txt"):
        shutil.copy(ROOT / name, output / name)
    path = output / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in OF_ONE_MACHINE:
        config.pop(name, None)
    config |= {"auto_map": AUTO_MAP, "custom_pipelines": PIPELINES}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (output / "README.md").write_text(card, encoding="utf-8")
    refuse_local_paths(output)
    return output


def complete_weights(source):
    """The files of weights of a complete folder. Raises `ValueError` where it is not complete."""
    source = Path(source)
    if not (source / "config.json").is_file():
        raise ValueError(
            "The folder has no config.json. Give a whole model: the folder final of train_hf.py, or what "
            "convert_photon.py wrote. Adapters alone are merged by train_hf.py --lora --merge-lora."
        )
    weights = [file for pattern in WEIGHTS for file in sorted(source.glob(pattern))]
    if not any(file.suffix == ".safetensors" for file in weights):
        raise ValueError("The folder has no model*.safetensors. Save the model with save_pretrained.")
    missing = [name for name in ("processor_config.json", "tokenizer.json", "generation_config.json")
               if not (source / name).is_file()]  # fmt: skip
    if missing:
        raise ValueError(f"The folder lacks {', '.join(missing)}. Save the processor and the model into it.")
    return weights


def code_files():
    """The files of this repository that run with a checkpoint."""
    return [file for file in sorted(ROOT.glob("*_photon.py")) if file.name not in COMMANDS]


def refuse_local_paths(folder):
    """Raises `ValueError` where a JSON file or the card names a place on this disk; it says which file."""
    for file in [*sorted(folder.glob("*.json")), folder / "README.md"]:
        if file.is_file() and file.name != "tokenizer.json":
            text = file.read_text(encoding="utf-8")
            found = LOCAL_PATH.search(text) or str(Path.home()) + "/" in text
            if found:
                raise ValueError(f"{file.name} names a folder of this machine. Write a Hub id, or take it out.")


def listing(folder):
    """[(path, bytes, sha256)] of all files of a folder, in order."""
    files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    return [(file.relative_to(folder).as_posix(), file.stat().st_size, file_sha256(file)) for file in files]


def file_sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
