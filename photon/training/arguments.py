"""The arguments of `train_hf.py`, and which of them contradict each other."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from photon.schedulers import SCHEDULERS
from photon.training.losses import LossArguments
from photon.training.parts import GROUPS, LORA_TARGET, STAGES


def option(default, text):
    """A dataclass field with a default and a help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model: str = field(metadata={"help": "folder or Hub id of a Photon model; its code is run"})
    stage: str = field(metadata={"help": "align, tune or dense", "choices": STAGES})
    revision: str | None = option(None, "branch of a Hub id")
    photon: list[str] | None = option(None, "fields of PhotonConfig to set: name=value ...")
    parts: list[str] | None = option(
        None, "train only these: vision, aligner, decoder, scheduler; default: as the stage says"
    )
    scheduler: str | None = field(
        default=None,
        metadata={
            "help": "train with another method of choosing tokens (photon/schedulers/): the decoder learns with what "
            "it keeps, and the method where it has weights; stage tune",
            "choices": [*SCHEDULERS],
        },
    )
    keep_ratio: float | None = option(None, "with --scheduler: share of the visual tokens that training keeps")
    dtype: str | None = option(
        None, "type of frozen weights; default bfloat16 with --bf16 and --lora or align, else float32"
    )
    attn_implementation: str | None = option(None, "sdpa, eager or flash_attention_2")
    lora: bool = option(False, "train adapters of the decoder, and patch embedding and scheduler in full")
    lora_rank: int = option(64, "rank of the adapters")
    lora_alpha: int = option(128, "the adapters' scale is alpha / rank")
    lora_dropout: float = option(0.0, "dropout before the adapters")
    lora_target: str = option(LORA_TARGET, "regular expression of module names")
    load_in_4bit: bool = option(False, "with --lora: decoder in 4 bits (bitsandbytes)")
    merge_lora: bool | None = field(
        default=None,
        metadata={
            "help": "with --lora: false writes no final folder, only the adapters; default true",
            "nargs": "?",
            "const": True,
        },
    )
    save_dtype: str = option("auto", "type of the final weights; auto: that of --model")


@dataclass
class DataArguments:
    _argument_group_name = "data"

    train_data: str = field(
        metadata={"help": ".jsonl or .parquet file, folder of save_to_disk or of parquet files, or Hub id"}
    )
    eval_data: str | None = option(None, "the same, for evaluation")
    tasks: list[str] | None = option(None, "train only on rows of these tasks")
    train_split: str | None = option(None, "of a set with several; default train")
    eval_split: str | None = option(None, "of a set with several; default train")
    volume_root: str | None = option(None, "folder of the scans; default that of the .jsonl file")
    cache_dir: str | None = option(None, "keep preprocessed scans here, in float16")
    cache_features: bool = option(False, "keep a frozen vision tower's output in --cache-dir, and read no scan again")
    max_length: int = option(2048, "longest row in tokens; longer ones are refused, not cut")
    eval_rows: int | None = option(None, "evaluate on this many rows, drawn by the seed; default all")
    eval_max_new_tokens: int = option(32, "longest answer in evaluation")


@dataclass
class PhotonTrainingArguments(TrainingArguments):
    _argument_group_name = "arguments of the Hugging Face Trainer"

    resume: bool = option(False, "go on from the last checkpoint of output_dir")
    soft_start: float | None = option(None, "first soft step; below 1 a share of the run; default 0.125")
    hard_start: float | None = option(None, "first step with deletion; below 1 a share of the run; default 0.25")
    flip_start: float | None = option(None, "first step with flipped rows; below 1 a share of the run; default 0.281")
    budget_end: float | None = option(
        None,
        "with keep_budget: step at which it is reached; below 1 a share of the run; default 0.6",
    )
    questions_together: int = option(1, "how many questions on one scan follow one another; a batch encodes it once")
    pack_questions: bool = option(False, "questions of a batch on one scan share a row; only with --stage dense")
    vision_checkpointing: bool = option(True, "the vision tower makes its activations again on the way back")
    vision_patches: int = option(2000, "patches that the vision tower takes at a time, alike in result; 0: all")
    vision_learning_rate: float | None = option(None, "default learning_rate")
    aligner_learning_rate: float | None = option(None, "of the merger; default learning_rate")
    scheduler_learning_rate: float | None = option(None, "default learning_rate")
    muon_learning_rate: float | None = option(None, "train the matrices of the layers by Muon, at this rate")
    # other defaults than the parent's
    remove_unused_columns: bool = option(False, "must be False: the collator needs all columns")
    ddp_find_unused_parameters: bool | None = option(False, "every batch uses all parameters")
    logging_steps: float = option(10, "steps between two lines of the log")

    def __post_init__(self):
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the scans; leave it False.")
        if not self.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices=False would weigh ranks, not answers; leave it True.")
        if self.questions_together < 1:
            raise ValueError(f"questions_together is {self.questions_together}; expected 1 or more.")


def parse(argv, description=None):
    """Arguments from the command line, after those of a .yaml or .json file if one comes first."""
    classes = (ModelArguments, DataArguments, LossArguments, PhotonTrainingArguments)
    usage = "%(prog)s [RECIPE.yaml] --model MODEL --stage STAGE --train-data DATA --output-dir FOLDER [options]"
    parser = HfArgumentParser(classes, usage=usage, description=description)
    _put_first(parser, PhotonTrainingArguments.__annotations__, "photon's training")
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
    parsed = parser.parse_args_into_dataclasses(argv)
    for message, is_fault in contradictions(*parsed).items():
        if is_fault:
            parser.error(message)
    return parsed


def _put_first(parser, names, title):
    """Moves the options of these names to a group of their own, in front of the Trainer's hundred others in --help."""
    *others, last = parser._action_groups
    moved = [action for action in last._group_actions if action.dest in names]
    last._group_actions = [action for action in last._group_actions if action.dest not in names]
    group = parser.add_argument_group(title)
    group._group_actions = moved
    parser._action_groups = [*others, group, last]


def contradictions(model_args, data_args, loss_args, args):
    """{message: whether the arguments have this fault}."""
    return {
        "--lora trains adapters; --stage align trains the patch embedding alone. Choose one.": (
            model_args.lora and model_args.stage == "align"
        ),
        f"--parts {model_args.parts}: expected some of {', '.join(GROUPS)}.": (
            model_args.parts is not None and not set(model_args.parts) <= set(GROUPS)
        ),
        "--parts narrows --stage dense and tune; align and --lora train fixed parts. Choose one.": (
            model_args.parts is not None and (model_args.lora or model_args.stage == "align")
        ),
        "--parts scheduler needs --stage tune: the other stages drop nothing.": (
            "scheduler" in (model_args.parts or ()) and model_args.stage != "tune"
        ),
        "--scheduler needs --stage tune: the other stages drop nothing.": (
            model_args.scheduler is not None and model_args.stage != "tune"
        ),
        "--scheduler needs --keep-ratio, a share above 0 and at most 1.": (
            model_args.scheduler is not None and not 0 < (model_args.keep_ratio or 0) <= 1
        ),
        "--keep-ratio is for --scheduler; Photon's own learns how many tokens to keep.": (
            model_args.keep_ratio is not None and model_args.scheduler is None
        ),
        "--scheduler with --lora, FSDP or DeepSpeed: only whole models are trained with another method.": (
            model_args.scheduler is not None and (model_args.lora or bool(args.fsdp) or args.deepspeed is not None)
        ),
        "--evidence-weight teaches Photon's own scheduler, not another method. Leave out --scheduler.": (
            model_args.scheduler is not None and loss_args.evidence_weight > 0
        ),
        "--token-labels teaches the vision tower, which --parts leaves out.": (
            loss_args.token_labels and model_args.parts is not None and "vision" not in model_args.parts
        ),
        "--pack-questions needs --stage dense: each question deletes different tokens.": (
            args.pack_questions and model_args.stage != "dense"
        ),
        "--pack-questions needs the attention sdpa, which takes any mask.": (
            args.pack_questions and model_args.attn_implementation not in (None, "sdpa")
        ),
        "--muon-learning-rate needs whole matrices of full rank: not with --lora, FSDP or DeepSpeed.": (
            args.muon_learning_rate is not None and (model_args.lora or bool(args.fsdp) or args.deepspeed is not None)
        ),
        f"--optim {args.optim.value} has no part beside --muon-learning-rate, which brings AdamW. Choose one.": (
            args.muon_learning_rate is not None and args.optim != TrainingArguments.optim
        ),
        "--cache-features needs --cache-dir.": data_args.cache_features and data_args.cache_dir is None,
        "--merge-lora needs --lora.": model_args.merge_lora is not None and not model_args.lora,
        "--load-in-4bit needs --lora: weights of 4 bits cannot be trained.": (
            model_args.load_in_4bit and not model_args.lora
        ),
        "--token-labels-alone needs --token-labels, --stage dense and one process.": (
            loss_args.token_labels_alone
            and not (loss_args.token_labels and model_args.stage == "dense" and args.world_size == 1)
        ),
        "--evidence-weight teaches the scheduler: it needs --stage tune.": (
            loss_args.evidence_weight > 0 and model_args.stage != "tune"
        ),
        "--token-labels trains the vision tower, which --lora freezes. Choose one.": (
            loss_args.token_labels and model_args.lora
        ),
        "--fp16 scales the loss, which the surrogate gradient of --stage tune does not follow. Use --bf16.": (
            args.fp16 and model_args.stage == "tune"
        ),
        "--photon soft_start_step, hard_start_step and flip_start_step record a run. Set --soft-start, --hard-start "
        "and --flip-start.": any(setting.split("=")[0].endswith("_start_step") for setting in model_args.photon or ()),
        "--eval-strategy needs --eval-data.": args.eval_strategy != "no" and data_args.eval_data is None,
        "Adapters of a local model are of no use on the Hub: give the model's Hub id, or merge them.": (
            args.push_to_hub and model_args.merge_lora is False and Path(model_args.model).exists()
        ),
    }
