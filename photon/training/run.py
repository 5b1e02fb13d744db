"""What makes a run of training what it is, and the folder that holds it."""

import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from transformers.trainer_utils import get_last_checkpoint

from photon.run_folder import open_run
from photon.training.losses import used_losses

# arguments of the Trainer that make a run what it is; the rest (logging, saving, workers) may change on a resume
RUN_FIELDS = (
    "learning_rate", "vision_learning_rate", "aligner_learning_rate", "scheduler_learning_rate", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "bf16",
    "fp16", "soft_start", "hard_start", "flip_start", "budget_end", "train_sampling_strategy", "questions_together",
    "pack_questions", "muon_learning_rate",
)  # fmt: skip

LENGTH = ("max_steps", "num_train_epochs")  # may grow on a resume


def run_settings(model_args, data_args, loss_args, args, rows):
    """What makes a run what it is, as JSON; the content of run.json."""
    digest = hashlib.blake2b(digest_size=16)
    needed = {name for loss in used_losses(loss_args) for name in loss.columns}
    left_out = {"where", "volumes", "labels", "lesions", *({"evidence"} - needed)}
    for row in rows.remove_columns(sorted(left_out)):
        digest.update(json.dumps(row, sort_keys=True).encode())
    data = {"max_length": data_args.max_length, "cached": bool(data_args.cache_dir)}
    model = {key: value for key, value in asdict(model_args).items() if key not in ("merge_lora", "save_dtype")}
    settings = {name: getattr(args, name, None) for name in RUN_FIELDS}
    return json.loads(
        json.dumps({"rows": digest.hexdigest(), **model, **data, **asdict(loss_args), **settings}, default=str)
    )


def claim_folder(folder, run, resume):
    """Takes a folder for this run, or finds this run in it. Returns the checkpoint to resume from, or `None`."""
    folder = Path(folder)
    begun = folder.is_dir() and any(folder.iterdir())
    begun = open_run(folder, run, begun=begun, resume=resume, extend=LENGTH, option="--output-dir")
    checkpoint = get_last_checkpoint(folder) if begun else None
    if begun and checkpoint is None:
        warnings.warn("The run has no checkpoint yet: it starts at step 0 again.", stacklevel=2)
    return checkpoint


def check_checkpoint(model, folder):
    """Raises `ValueError` where a checkpoint's weights have other sizes than the model's."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                shape = tuple(tensors.get_slice(name).get_shape())
                if wanted.get(name, shape) != shape:
                    raise ValueError(
                        f"The checkpoint is of another size: {name} is {shape} in it and {wanted[name]} in the model. "
                        "Resume with the model that the run began with."
                    )
