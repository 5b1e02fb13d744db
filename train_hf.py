"""Train Photon with the Hugging Face Trainer.

    python train_hf.py --model . --stage tune --train-data data/train.jsonl --eval-data data/val.jsonl --output-dir run
    python train_hf.py recipe.yaml --learning-rate 2e-5            # a file of arguments; the command line wins
    torchrun --nproc-per-node 8 train_hf.py recipe.yaml            # or accelerate launch; settings in configs/

Stages: `align` trains only the 3D patch embedding; `dense` trains without deletion of tokens; `tune` trains with the
scheduler, in three phases by optimizer step: dense, soft (tokens weighted), hard (tokens deleted). `--lora` trains
adapters of the decoder, and the scheduler and the patch embedding in full. All arguments of
`transformers.TrainingArguments` work too. The result is OUTPUT_DIR/final, a complete folder for `from_pretrained`;
with `--lora` the adapters are merged into it, and lie alone in OUTPUT_DIR/adapter.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see evaluate_hf.py

from photon.console import named_requirements, one_line_faults

with named_requirements("requirements-train.txt"):
    from accelerate.utils import broadcast_object_list
    from transformers import set_seed

    from photon.training.arguments import parse
    from photon.training.batches import Collator
    from photon.training.data import check_files, check_rows, load_rows
    from photon.training.losses import loss_weights, used_losses
    from photon.training.memory import FeatureCache
    from photon.training.parts import trained_counts, trained_model
    from photon.training.run import check_checkpoint, claim_folder, run_settings
    from photon.training.saving import push, save_result
    from photon.training.trainer import PhotonTrainer


def load_data(data_args, args, processor, losses, without_decoder=False):
    """Training rows and evaluation rows (or `None`), checked."""
    columns = {name: feature for loss in losses for name, feature in loss.columns.items()}
    options = {"volume_root": data_args.volume_root}
    if data_args.cache_dir is not None:
        options["embedded"] = Path(data_args.cache_dir) / "embedded"
    train = load_rows(data_args.train_data, data_args.train_split, columns=columns, **options)
    evaluation = None
    if data_args.eval_data is not None:
        evaluation = load_rows(data_args.eval_data, data_args.eval_split, **options)
        if data_args.eval_rows is not None and data_args.eval_rows < len(evaluation):
            evaluation = evaluation.shuffle(seed=args.seed).select(range(data_args.eval_rows))
    if data_args.tasks is not None:
        known = set(train["task"])
        if unknown := sorted(set(data_args.tasks) - known):
            raise ValueError(f"--tasks {' '.join(unknown)}: the data has {', '.join(sorted(map(str, known)))}.")
        train = train.filter(lambda task: task in data_args.tasks, input_columns="task")
    if without_decoder:
        train = train.filter(len, input_columns="volumes")  # a row without a scan has no tokens to label
    check_files(train, losses)
    for loss in losses:
        loss.check_rows(train)
    train = train.add_column("length", check_rows(train, processor, data_args.max_length))
    if evaluation is not None:
        check_files(evaluation)
        check_rows(evaluation, processor, data_args.max_length)
    return train, evaluation


def train(argv, train_data=None, eval_data=None):
    """Trains as the arguments say. Returns the trainer. train_data, eval_data: sets in memory (`datasets.Dataset`,
    `IterableDataset`, list of dicts), in place of the arguments of these names."""
    # --- Args
    held = {"train_data": train_data, "eval_data": eval_data}
    held = {name: data for name, data in held.items() if data is not None}
    parsed = parse([*argv, *(part for name in held for part in (f"--{name}", "memory"))], __doc__.split("\n")[0])
    model_args, data_args, loss_args, args = parsed
    for name, data in held.items():
        setattr(data_args, name, data)
    push_to_hub, args.push_to_hub = args.push_to_hub, False  # the final folder alone
    set_seed(args.seed)

    # --- Model
    model, processor = trained_model(model_args, args)
    losses = [loss(loss_args, model, processor, data_args.cache_dir) for loss in used_losses(loss_args)]
    without_decoder = loss_args.token_labels_alone

    # --- Data
    with args.main_process_first(desc="reading rows"):
        rows, evaluation = load_data(data_args, args, processor, losses, without_decoder)
    run = run_settings(*parsed, rows)
    checkpoint = [claim_folder(args.output_dir, run, args.resume) if args.process_index == 0 else None]
    checkpoint = broadcast_object_list(checkpoint)[0] if args.world_size > 1 else checkpoint[0]
    if checkpoint is not None:
        check_checkpoint(model, checkpoint)

    # --- Train
    features = None
    if data_args.cache_features:
        if model_args.stage == "tune" and model.config.robust_probability:
            raise ValueError("--cache-features cannot keep perturbed scans: set --photon robust_probability=0.")
        features = FeatureCache(Path(data_args.cache_dir) / "features", processor, model)
    collator = {"processor": processor, "max_length": data_args.max_length, "cache_dir": data_args.cache_dir}
    trainer = PhotonTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=evaluation,
        data_collator=Collator(**collator, losses=losses, features=features),
        processing_class=processor,
        stage=model_args.stage,
        prompt_collator=Collator(**collator, answers=False),
        max_new_tokens=data_args.eval_max_new_tokens,
        losses=losses,
        without_decoder=without_decoder,
        features=features,
        keep_ratio=model_args.keep_ratio,
    )
    if trainer.is_world_process_zero():
        counts = ", ".join(f"{group} {count:,}" for group, count in trained_counts(model).items())
        weights = ", ".join(f"{name} {weight:g}" for name, weight in loss_weights(model.config, losses).items())
        print(f"{len(rows)} rows; parameters that train: {counts}; weights of losses: {weights}", file=sys.stderr)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()  # the whole log, beside the checkpoints
    if evaluation is not None:
        trainer.save_metrics("eval", trainer.evaluate())

    # --- Save
    result = save_result(trainer, model_args, Path(args.output_dir))
    if push_to_hub and trainer.is_world_process_zero():
        push(result, args)
    return trainer


def main(argv=None):
    out_of_memory = "Out of memory. Lower --per-device-train-batch-size, or add --gradient-checkpointing or --lora."
    interrupted = "Stopped. Run the same command again with --resume to go on from the last checkpoint."
    with one_line_faults(out_of_memory, interrupted):
        train(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
