"""The model with the parameters that a stage trains."""

import json
from pathlib import Path

import torch

from photon.conversion import PATCH_EMBED
from photon.loading import adapter_base, load_config, load_model, load_processor, peft
from photon.schedulers import use_scheduler
from photon.training.memory import save_memory

SCHEDULER = "model.language_model.scheduler"
GROUPS = ("decoder", "vision", "aligner", "scheduler")
STAGES = ("align", "tune", "dense")
LORA_TARGET = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def group_of(name):
    """Which part of the model a parameter belongs to; one of `GROUPS`."""
    if ".scheduler." in name:
        return "scheduler"
    if ".visual." in name:
        return "aligner" if ".merger." in name else "vision"
    return "decoder"


def trained_model(model_args, args):
    """Model with the parameters that the stage trains, and its processor. Raises `ValueError`, `ImportError`."""
    if model_args.lora and adapter_base(model_args.model, model_args.revision) is not None:
        raise ValueError("--model holds adapters, and --lora would add more. Give the merged model, folder final.")
    processor = load_processor(model_args.model, revision=model_args.revision)
    config = load_config(model_args.model, model_args.revision)
    if config.model_type != "photon":
        raise ValueError(f"--model is a {config.model_type} model; expected photon. convert_photon.py makes one.")
    config = with_fields(config, model_args.photon or ())
    half = args.bf16 or args.fp16
    default = "bfloat16" if half and (model_args.lora or model_args.stage == "align") else "float32"
    options = {"dtype": getattr(torch, model_args.dtype or default), "revision": model_args.revision}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    if model_args.load_in_4bit:
        options["quantization_config"] = four_bit()
    model = load_model(model_args.model, config=config, **options)
    if model_args.stage != "align":  # answers then come from the tokens that the model was trained on
        model.config.use_scheduler = model_args.stage == "tune"
    if model_args.scheduler is not None:
        use_scheduler(model, model_args.scheduler, seed=args.seed)
    model = select_parameters(model, model_args)
    save_memory(model, args)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model, processor


def with_fields(config, settings):
    """The config with fields set from `name=value` texts, validated again. Raises `ValueError`."""
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not hasattr(config, name):
            raise ValueError(f"--photon {setting!r}: expected name=value with a field of PhotonConfig.")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value  # a word
    return type(config).from_dict(config.to_dict() | values) if values else config


def four_bit():
    """Quantization of the decoder for `--load-in-4bit`. Raises `ImportError` without bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError("--load-in-4bit needs bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["visual", "lm_head", "scheduler"],
    )


def select_parameters(model, model_args):
    """The model in which only the stage's parameters have gradients. These are float32: small steps vanish in
    bfloat16."""
    scheduled, patch_module = model_args.stage == "tune", PATCH_EMBED.removesuffix(".proj.weight")
    if model_args.lora:
        model = peft().get_peft_model(
            model,
            peft().LoraConfig(
                r=model_args.lora_rank,
                lora_alpha=model_args.lora_alpha,
                lora_dropout=model_args.lora_dropout,
                target_modules=model_args.lora_target,
                modules_to_save=[patch_module, SCHEDULER] if scheduled else [patch_module],
            ),
        )
        adapters, local = model.peft_config["default"], Path(model_args.model).is_dir()
        # so that the adapters find their base from any folder
        adapters.base_model_name_or_path = str(Path(model_args.model).resolve()) if local else model_args.model
        adapters.revision = model_args.revision
    else:
        for name, parameter in model.named_parameters():
            trained = name == PATCH_EMBED if model_args.stage == "align" else scheduled or SCHEDULER not in name
            if model_args.parts is not None:
                trained = trained and group_of(name) in model_args.parts
            parameter.requires_grad_(trained)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def trained_counts(model):
    """{group: how many parameters train}."""
    counts = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[group_of(name)] = counts.get(group_of(name), 0) + parameter.numel()
    return counts
