"""Train Photon with the Hugging Face Trainer.

    python train_hf.py --model . --stage tune --train-data data/train.jsonl --eval-data data/val.jsonl --output-dir run
    python train_hf.py recipe.yaml --learning-rate 2e-5            # a file of the same arguments; the line wins
    torchrun --nproc-per-node 8 train_hf.py recipe.yaml            # or accelerate launch; settings in configs/

Stages: `align` trains the 3D patch embedding alone; `dense` trains without pruning; `tune` trains with the scheduler,
in three phases by optimizer step: dense, soft (tokens weighted), hard (tokens deleted). `--lora` trains adapters of
the decoder, with the scheduler and the patch embedding in full. All arguments of `transformers.TrainingArguments` are
there too. The result is OUTPUT_DIR/final, a complete folder for `from_pretrained`.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import yaml
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from photon.conversion import PATCH_EMBED
from photon.run_folder import open_run
from photon.training.data import Collator, check_files, check_rows, load_rows
from photon.training.token_labels import TokenHead, TokenLabels
from photon.training.trainer import GROUPS, PhotonTrainer, group_of

STAGES = ("align", "tune", "dense")
PATCH_MODULE = PATCH_EMBED.removesuffix(".proj.weight")
SCHEDULER_MODULE = "model.language_model.scheduler"
LORA_TARGET = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# arguments of the Trainer that make a run what it is; the rest (logging, saving, workers) may change on a resume
RUN_FIELDS = (
    "learning_rate", "vision_learning_rate", "aligner_learning_rate", "scheduler_learning_rate", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "bf16",
    "fp16", "soft_start", "hard_start", "flip_start", "train_sampling_strategy", "questions_together",
    "pack_questions", "muon_learning_rate",
)  # fmt: skip


@dataclass
class ModelArguments:
    model: str = field(metadata={"help": "folder or Hub id of a Photon model; its code is run"})
    stage: str = field(metadata={"help": "align, tune or dense", "choices": STAGES})
    revision: str | None = field(default=None, metadata={"help": "branch of a Hub id"})
    photon: list[str] | None = field(default=None, metadata={"help": "fields of PhotonConfig to set: name=value ..."})
    parts: list[str] | None = field(
        default=None, metadata={"help": "train these alone: vision, aligner, decoder, scheduler; default the stage's"}
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "weights that do not train; default bfloat16 with --bf16 and --lora or align, else float32"},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flash_attention_2"})
    lora: bool = field(default=False, metadata={"help": "adapters of the decoder; patch embedding, scheduler in full"})
    lora_rank: int = field(default=64, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=128, metadata={"help": "their scale is alpha / rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapters"})
    lora_target: str = field(default=LORA_TARGET, metadata={"help": "regular expression of module names"})
    load_in_4bit: bool = field(default=False, metadata={"help": "with --lora: decoder in 4 bits (bitsandbytes)"})
    merge_lora: bool = field(default=False, metadata={"help": "final folder with the adapters merged in"})
    save_dtype: str = field(default="auto", metadata={"help": "of the final weights; auto: as the model came"})


@dataclass
class DataArguments:
    train_data: str = field(metadata={"help": ".jsonl file or Hub id"})
    eval_data: str | None = field(default=None, metadata={"help": ".jsonl file or Hub id"})
    tasks: list[str] | None = field(default=None, metadata={"help": "train on rows of these tasks alone"})
    train_split: str | None = field(default=None, metadata={"help": "of a Hub id; default train"})
    eval_split: str | None = field(default=None, metadata={"help": "of a Hub id; default train"})
    volume_root: str | None = field(default=None, metadata={"help": "folder of the scans; default the .jsonl's own"})
    cache_dir: str | None = field(default=None, metadata={"help": "keep preprocessed scans here, in float16"})
    max_length: int = field(default=2048, metadata={"help": "longest row in tokens; longer ones are refused, not cut"})
    eval_rows: int | None = field(default=None, metadata={"help": "so many rows, drawn by the seed; default all"})
    eval_max_new_tokens: int = field(default=32, metadata={"help": "longest answer in evaluation"})
    token_labels: bool = field(
        default=False, metadata={"help": "learn each token's organs and lesions beside answers"}
    )
    token_label_classes: int = field(default=11, metadata={"help": "labels 0 (background) to this - 1"})
    token_labels_alone: bool = field(
        default=False, metadata={"help": "learn nothing else: the decoder is left out; one process"}
    )
    evidence_weight: float = field(
        default=0.0,
        metadata={"help": "learn to keep the tokens that hold a row's `evidence` labels, so heavily; stage tune"},
    )
    token_label_weight: float = field(default=1.0, metadata={"help": "weight of that loss"})


@dataclass
class PhotonTrainingArguments(TrainingArguments):
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint of output_dir"})
    soft_start: float | None = field(default=None, metadata={"help": "first soft step; below 1 a share of the run"})
    hard_start: float | None = field(default=None, metadata={"help": "first step with deletion; likewise"})
    flip_start: float | None = field(default=None, metadata={"help": "first step with flipped rows; likewise"})
    questions_together: int = field(
        default=1, metadata={"help": "so many questions on one scan follow one another; a batch encodes it once"}
    )
    pack_questions: bool = field(
        default=False, metadata={"help": "questions of a batch on one scan share its row; --stage dense alone"}
    )
    vision_learning_rate: float | None = field(default=None, metadata={"help": "default learning_rate"})
    aligner_learning_rate: float | None = field(
        default=None, metadata={"help": "of the merger; default learning_rate"}
    )
    scheduler_learning_rate: float | None = field(default=None, metadata={"help": "default learning_rate"})
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "train the matrices of the layers by Muon, at this rate"}
    )
    # our own defaults
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be False: the collator needs them all"})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "every batch uses all"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two lines of the log"})

    def __post_init__(self):
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the scans; leave it False.")
        if not self.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices=False would weigh ranks, not answers; leave it True.")
        if self.questions_together < 1:
            raise ValueError(f"questions_together is {self.questions_together}; expected 1 or more.")


# === Arguments =======================================================================================================


def parse(argv):
    """Arguments from the command line, after those of a .yaml or .json file if one comes first."""
    classes = (ModelArguments, DataArguments, PhotonTrainingArguments)
    parser = HfArgumentParser(classes, description=__doc__.split("\n")[0])
    if argv and not argv[0].startswith("-"):
        path, argv = Path(argv[0]), argv[1:]
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            parser.error(f"{path.name} holds no arguments; expected lines such as 'stage: tune'.")
        known = {f.name for kind in classes for f in fields(kind) if f.init}
        unknown = sorted(set(values) - known)
        if unknown:
            parser.error(f"{path.name} has unknown arguments: {', '.join(unknown)}.")
        if isinstance(values.get("photon"), dict):
            values["photon"] = [f"{name}={json.dumps(value)}" for name, value in values["photon"].items()]
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
    model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    faults = {
        "--lora trains adapters; --stage align trains the patch embedding alone. Choose one.": (
            model_args.lora and model_args.stage == "align"
        ),
        f"--parts {model_args.parts}: expected some of {', '.join(GROUPS)}.": (
            model_args.parts is not None and not set(model_args.parts) <= set(GROUPS)
        ),
        "--parts narrows --stage dense and tune; align and --lora train what they train. Choose one.": (
            model_args.parts is not None and (model_args.lora or model_args.stage == "align")
        ),
        "--parts scheduler needs --stage tune: the other stages drop nothing.": (
            "scheduler" in (model_args.parts or ()) and model_args.stage != "tune"
        ),
        "--token-labels teaches the vision tower, which --parts leaves out.": (
            data_args.token_labels and model_args.parts is not None and "vision" not in model_args.parts
        ),
        "--pack-questions needs --stage dense: each question deletes tokens of its own.": (
            args.pack_questions and model_args.stage != "dense"
        ),
        "--pack-questions needs the attention sdpa, which takes any mask.": (
            args.pack_questions and model_args.attn_implementation not in (None, "sdpa")
        ),
        "--muon-learning-rate needs whole matrices of full rank: not with --lora, FSDP or DeepSpeed.": (
            args.muon_learning_rate is not None and (model_args.lora or bool(args.fsdp) or args.deepspeed is not None)
        ),
        f"--optim {args.optim.value} has no part beside --muon-learning-rate, whose rest is AdamW's. Choose one.": (
            args.muon_learning_rate is not None and args.optim != TrainingArguments.optim
        ),
        "--merge-lora needs --lora.": model_args.merge_lora and not model_args.lora,
        "--load-in-4bit needs --lora: weights of 4 bits cannot be trained.": (
            model_args.load_in_4bit and not model_args.lora
        ),
        "--token-labels-alone needs --token-labels, --stage dense and one process.": (
            data_args.token_labels_alone
            and not (data_args.token_labels and model_args.stage == "dense" and args.world_size == 1)
        ),
        "--evidence-weight teaches the scheduler: it needs --stage tune.": (
            data_args.evidence_weight > 0 and model_args.stage != "tune"
        ),
        "--token-labels trains the vision tower, which --lora freezes. Choose one.": (
            data_args.token_labels and model_args.lora
        ),
        "--fp16 scales the loss, which the surrogate gradient of --stage tune does not follow. Use --bf16.": (
            args.fp16 and model_args.stage == "tune"
        ),
        "--eval-strategy needs --eval-data.": args.eval_strategy != "no" and data_args.eval_data is None,
        "an adapter on a local model is of no use on the Hub: give the model's Hub id, or --merge-lora.": (
            args.push_to_hub and model_args.lora and not model_args.merge_lora and Path(model_args.model).exists()
        ),
    }
    for message, is_fault in faults.items():
        if is_fault:
            parser.error(message)
    return model_args, data_args, args


# === The run's folder ================================================================================================


def fingerprint(model_args, data_args, args, rows):
    """What makes a run what it is, as JSON."""
    digest = hashlib.blake2b(digest_size=16)
    unseen = ["where", "volumes", "labels", "lesions", *([] if data_args.evidence_weight else ["evidence"])]
    for row in rows.remove_columns(unseen):
        digest.update(json.dumps(row, sort_keys=True).encode())
    data = {key: value for key, value in asdict(data_args).items() if key == "max_length"} | {
        "cached": bool(data_args.cache_dir)
    }
    data |= {key: value for key, value in asdict(data_args).items() if key.startswith(("token_label", "evidence"))}
    model = {key: value for key, value in asdict(model_args).items() if key not in ("merge_lora", "save_dtype")}
    settings = {name: getattr(args, name, None) for name in RUN_FIELDS}
    return json.loads(json.dumps({"rows": digest.hexdigest(), **model, **data, **settings}, default=str))


def claim_folder(folder, run, resume):
    """Takes a folder for this run, or finds this run in it. Returns the checkpoint to resume from, or `None`."""
    folder = Path(folder)
    begun = folder.is_dir() and any(folder.iterdir())
    begun = open_run(folder, run, begun=begun, resume=resume, option="--output-dir")
    return get_last_checkpoint(folder) if begun else None


def check_checkpoint(model, folder):
    """Raise `ValueError` where a checkpoint's weights have other sizes than the model's."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                shape = tuple(tensors.get_slice(name).get_shape())
                if wanted.get(name, shape) != shape:
                    raise ValueError(
                        f"The checkpoint is of another size: {name} is {shape} there, {wanted[name]} in the model. "
                        "Resume with the model that the run began with."
                    )


# === The model =======================================================================================================


def load_model(model_args, args):
    """Model with the parameters that the stage trains, and its processor."""
    names = {"revision": model_args.revision, "trust_remote_code": True}
    config = AutoConfig.from_pretrained(model_args.model, **names)
    if config.model_type != "photon":
        raise ValueError(f"--model is a {config.model_type} model; expected photon. convert_photon.py makes one.")
    config = with_fields(config, model_args.photon or ())
    half = args.bf16 or args.fp16
    default = "bfloat16" if half and (model_args.lora or model_args.stage == "align") else "float32"
    options = {"dtype": getattr(torch, model_args.dtype or default), **names}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    if model_args.load_in_4bit:
        options["quantization_config"] = four_bit()
    model = AutoModelForImageTextToText.from_pretrained(model_args.model, config=config, **options)
    processor = AutoProcessor.from_pretrained(model_args.model, **names)
    if model_args.stage != "align":  # answers then come from what the model was trained on
        model.config.use_scheduler = model_args.stage == "tune"
    model = select_parameters(model, model_args)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model, processor


def with_fields(config, settings):
    """A config with fields set from `name=value` texts, validated anew."""
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
    """Only the stage's parameters get gradients. They are float32: small steps vanish in bfloat16."""
    scheduled = model_args.stage == "tune"
    if model_args.lora:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError("--lora needs peft: pip install peft") from error
        model = get_peft_model(
            model,
            LoraConfig(
                r=model_args.lora_rank,
                lora_alpha=model_args.lora_alpha,
                lora_dropout=model_args.lora_dropout,
                target_modules=model_args.lora_target,
                modules_to_save=[PATCH_MODULE, SCHEDULER_MODULE] if scheduled else [PATCH_MODULE],
            ),
        )
    else:
        for name, parameter in model.named_parameters():
            trained = name == PATCH_EMBED if model_args.stage == "align" else scheduled or SCHEDULER_MODULE not in name
            if model_args.parts is not None:
                trained = trained and group_of(name) in model_args.parts
            parameter.requires_grad_(trained)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def trained_counts(model):
    """{group: parameters that train}."""
    counts = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[group_of(name)] = counts.get(group_of(name), 0) + parameter.numel()
    return counts


# === The result ======================================================================================================


def save_final(trainer, model_args, folder):
    """OUTPUT_DIR/final: weights (or adapters), configuration, code, processor."""
    source_dtype = AutoConfig.from_pretrained(
        model_args.model, revision=model_args.revision, trust_remote_code=True
    ).dtype
    dtype = getattr(torch, model_args.save_dtype) if model_args.save_dtype != "auto" else source_dtype
    trainer.drop_token_head()
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
    """The model that the adapters were trained on, with them merged in; from disk, whole on each kind of cluster."""
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


# === Main ============================================================================================================


def load_data(data_args, args, processor):
    """Training rows and evaluation rows (or `None`), checked."""
    train = load_rows(data_args.train_data, data_args.train_split, data_args.volume_root)
    evaluation = None
    if data_args.eval_data is not None:
        evaluation = load_rows(data_args.eval_data, data_args.eval_split, data_args.volume_root)
        if data_args.eval_rows is not None and data_args.eval_rows < len(evaluation):
            evaluation = evaluation.shuffle(seed=args.seed).select(range(data_args.eval_rows))
    if data_args.tasks is not None:
        known = set(train["task"])
        if unknown := sorted(set(data_args.tasks) - known):
            raise ValueError(f"--tasks {' '.join(unknown)}: the data has {', '.join(sorted(map(str, known)))}.")
        train = train.filter(lambda task: task in data_args.tasks, input_columns="task")
    if data_args.token_labels_alone:
        train = train.filter(len, input_columns="volumes")  # text alone has no tokens to label
    if data_args.evidence_weight:
        highest = max(max(labels, default=0) for labels in train["evidence"])
        if not 0 < highest < data_args.token_label_classes:
            raise ValueError(
                f"--evidence-weight: the highest label in the training rows' 'evidence' is {highest or 'none'}; "
                f"expected labels from 1 to {data_args.token_label_classes - 1} (--token-label-classes)."
            )
    check_files(train, data_args.token_labels or data_args.evidence_weight > 0)
    train = train.add_column("length", check_rows(train, processor, data_args.max_length))
    if evaluation is not None:
        check_files(evaluation)
        check_rows(evaluation, processor, data_args.max_length)
    return train, evaluation


def build_trainer(model_args, data_args, args, model, processor, train, evaluation):
    token_labels = token_head = None
    classes = data_args.token_label_classes
    if data_args.token_labels or data_args.evidence_weight:
        token_labels = TokenLabels(processor.image_processor, classes, data_args.cache_dir)
    if data_args.token_labels:
        patches = processor.image_processor.merge_size**2
        token_head = TokenHead(model.config.text_config.hidden_size, patches, classes)
        token_head.attach(model.model.visual)
        model.token_head = token_head  # within the model, so that wrapping, sharding and checkpoints include it
    data = {"processor": processor, "max_length": data_args.max_length, "cache_dir": data_args.cache_dir}
    return PhotonTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=Collator(**data, token_labels=token_labels),
        processing_class=processor,
        stage=model_args.stage,
        prompt_collator=Collator(**data, answers=False),
        max_new_tokens=data_args.eval_max_new_tokens,
        token_head=token_head,
        token_weight=data_args.token_label_weight,
        tokens_alone=data_args.token_labels_alone,
        evidence_weight=data_args.evidence_weight,
    )


def main(argv=None):
    model_args, data_args, args = parse(sys.argv[1:] if argv is None else argv)
    push_to_hub, args.push_to_hub = args.push_to_hub, False  # the final folder alone
    set_seed(args.seed)
    model, processor = load_model(model_args, args)
    with args.main_process_first(desc="reading rows"):
        train, evaluation = load_data(data_args, args, processor)
    run = fingerprint(model_args, data_args, args, train)
    checkpoint = [claim_folder(args.output_dir, run, args.resume) if args.process_index == 0 else None]
    checkpoint = broadcast_object_list(checkpoint)[0] if args.world_size > 1 else checkpoint[0]
    if checkpoint is not None:
        check_checkpoint(model, checkpoint)
    trainer = build_trainer(model_args, data_args, args, model, processor, train, evaluation)
    if trainer.is_world_process_zero():
        counts = ", ".join(f"{group} {count:,}" for group, count in trained_counts(model).items())
        print(f"{len(train)} rows; parameters that train: {counts}", file=sys.stderr)
    trainer.train(resume_from_checkpoint=checkpoint)
    if evaluation is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    final = Path(args.output_dir) / "final"
    save_final(trainer, model_args, final)
    if push_to_hub and trainer.is_world_process_zero():
        push(final, args)
    return trainer


if __name__ == "__main__":
    main()
