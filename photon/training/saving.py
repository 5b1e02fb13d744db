"""The result of a run: OUTPUT_DIR/final, a complete folder for `from_pretrained`; its way to the Hub.

With `--lora` the adapters are merged into final, and lie alone in OUTPUT_DIR/adapter.
"""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import HfApi

from photon.loading import ADAPTED_CONFIG, complete_generation_config, load_config, load_model
from photon.schedulers import save_method

CARD = """---
base_model: {base}
library_name: peft
---
LoRA adapters of a Photon model. Their base is `{base}`; if it lies elsewhere, write its folder or Hub id into
`adapter_config.json`, under `base_model_name_or_path`. The commands of the Photon repository take this folder as
`--model`. In other code:

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

config = AutoConfig.from_pretrained("{base}", trust_remote_code=True).from_json_file("FOLDER/{config}")
base = AutoModelForImageTextToText.from_pretrained("{base}", config=config, trust_remote_code=True)
model = PeftModel.from_pretrained(base, "FOLDER").merge_and_unload()
processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
```
"""


def save_result(trainer, model_args, output):
    """Writes the results of a run. Returns the folder that is one's result: `output`/final, or `output`/adapter.

    What a folder of that name held before is gone. A final folder is complete, or does not exist.
    """
    final, adapter, partial = output / "final", output / "adapter", output / "final.partial"
    source_dtype = load_config(model_args.model, model_args.revision).dtype
    dtype = getattr(torch, model_args.save_dtype) if model_args.save_dtype != "auto" else source_dtype
    trainer.drop_loss_modules()
    if trainer.is_world_process_zero():
        for folder in (final, adapter, partial):
            shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    saved = adapter if model_args.lora else partial
    if model_args.scheduler is not None:  # its weights lie beside the model's, whose own scheduler returns
        model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_world_process_zero():
            partial.mkdir(parents=True)
            save_method(model, partial)
        model.set_scheduler(model.model.language_model.scheduler.reference)
    complete_generation_config(trainer.accelerator.unwrap_model(trainer.model))
    trainer.save_model(str(saved), _internal_call=True)  # every rank takes part where weights are sharded
    trainer.accelerator.wait_for_everyone()
    merge = model_args.lora and model_args.merge_lora is not False
    if trainer.is_world_process_zero():
        (saved / "training_args.bin").unlink(missing_ok=True)  # a pickle, with this machine's paths
        if model_args.lora:
            complete_adapter(adapter, trainer.accelerator.unwrap_model(trainer.model))
        if merge:  # from disk, where no rank holds only a shard
            merged = load_model(adapter, dtype=dtype)
            complete_generation_config(merged)
            merged.save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
        if merge or not model_args.lora:
            cast_weights(partial, dtype)
            partial.rename(final)
    return final if merge or not model_args.lora else adapter


def complete_adapter(folder, model):
    """Adds to a folder of adapters the model's configuration, and a card that says how to load them."""
    config = model.config.to_dict()
    for name in ("use_cache", "quantization_config"):  # of training alone
        config.pop(name, None)
    (folder / ADAPTED_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    base = model.peft_config["default"].base_model_name_or_path
    (folder / "README.md").write_text(CARD.format(base=base, config=ADAPTED_CONFIG), encoding="utf-8")


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
    """Uploads the result to the Hub."""
    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    repo = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Trained Photon")
