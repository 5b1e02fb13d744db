"""OUTPUT_DIR/final: a complete folder for `from_pretrained`, and its way to the Hub."""

import json
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForImageTextToText


def save_final(trainer, model_args, folder):
    """OUTPUT_DIR/final: weights (or adapters), configuration, code, processor."""
    source_dtype = AutoConfig.from_pretrained(
        model_args.model, revision=model_args.revision, trust_remote_code=True
    ).dtype
    dtype = getattr(torch, model_args.save_dtype) if model_args.save_dtype != "auto" else source_dtype
    trainer.drop_loss_modules()
    adapter = folder.parent / "adapter" if model_args.merge_lora else folder
    trainer.save_model(str(adapter), _internal_call=True)  # every rank takes part where weights are sharded
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    (adapter / "training_args.bin").unlink(missing_ok=True)  # a pickle, with this machine's paths
    if model_args.merge_lora:
        merge_lora(model_args, adapter, folder, trainer.accelerator.unwrap_model(trainer.model).config)
        trainer.processing_class.save_pretrained(folder)
    if not model_args.lora or model_args.merge_lora:
        cast_weights(folder, dtype)


def merge_lora(model_args, adapter, folder, config):
    """Saves the base model with the adapters merged in. Both come from disk, where no rank holds only a shard."""
    from peft import PeftModel

    names = {"revision": model_args.revision, "trust_remote_code": True}
    config = type(config).from_dict(config.to_dict())
    base = AutoModelForImageTextToText.from_pretrained(model_args.model, config=config, dtype=torch.float32, **names)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)


def cast_weights(folder, dtype):
    """Floating-point weights of a saved folder in another type."""
    from safetensors.torch import load_file, save_file

    for file in sorted(folder.glob("model*.safetensors")):
        tensors = load_file(file)
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("use_cache", None)  # the Trainer turns it off, for training alone
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def push(folder, args):
    """Upload the final folder to the Hub."""
    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    repo = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Trained Photon")
