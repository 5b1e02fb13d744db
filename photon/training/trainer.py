"""The Trainer of transformers, with what Photon adds:

- the phase (dense, soft, hard) and each row's objective depend only on the global step, so that a resumed run goes on
  as if it had not stopped;
- the losses of `photon/training/losses`, beside the model's own;
- a learning rate for each part of the model;
- a log of every loss, the kept ratio, the threshold, tokens a second and peak memory;
- evaluation by answers that are written from the prompt alone.
"""

import sys
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer

from photon.objectives_photon import Objective
from photon.training.batches import ScanSampler
from photon.training.figures import Figures, peak_memory
from photon.training.losses import LossBatch, row_shares
from photon.training.optimizer import MuonAdamW, parameter_groups
from photon.training.packing import pack_questions
from photon.training.perturbations import draw_rows, perturb_rows, stream
from photon.training.phases import Phases


class PhotonTrainer(Trainer):
    """Trains one stage of Photon.

    Args beyond the parent's:
        stage: "align", "tune" or "dense"; tokens are dropped in "tune" only.
        prompt_collator: rows to prompts without their answer, for evaluation.
        max_new_tokens: longest answer in evaluation.
        losses: list of `Loss`, beside the model's own. The module of one becomes a part of the model, so that
            wrapping, sharding and checkpoints include it.
        without_decoder: train the vision tower by those losses alone; the decoder is left out.
        features: `FeatureCache` of the collator, or `None`.
        keep_ratio: share of the visual tokens that another selection method keeps, or `None`.
    """

    def __init__(
        self, model, *args, stage, prompt_collator, max_new_tokens, losses=(), without_decoder=False, features=None,
        keep_ratio=None, **kwargs,
    ):  # fmt: skip
        for loss in losses:
            if loss.module is not None:
                model.add_module(loss.module_name, loss.module)
        super().__init__(model, *args, **kwargs)
        self.stage, self.prompt_collator, self.max_new_tokens = stage, prompt_collator, max_new_tokens
        self.losses, self.without_decoder, self.features = list(losses), without_decoder, features
        self.scheduling = {} if keep_ratio is None else {"keep_ratio": keep_ratio}
        volumes = self.processing_class.image_processor
        self.empty, self.full = -volumes.mean / volumes.std, (1 - volumes.mean) / volumes.std
        self.loss_names = ["lm_loss", "band_loss", *(loss.name for loss in self.losses)]
        self.phases, self.resumed = None, None
        self.sums, self.logged_step = Figures(self.loss_names), None

    # --- the run

    def train(self, resume_from_checkpoint=None, **kwargs):
        self.resumed = resume_from_checkpoint
        return super().train(resume_from_checkpoint, **kwargs)

    def start_phases(self):
        """At the first step, when the number of steps is known. A resumed run keeps its phases."""
        self.phases = Phases.load(self.resumed) if self.resumed else None
        self.phases = self.phases or Phases.of(self.args, self.state.max_steps)
        config = self.accelerator.unwrap_model(self.model).config
        config.soft_start_step = self.phases.soft  # the checkpoint tells how it was trained
        config.hard_start_step = self.phases.hard
        config.flip_start_step = self.phases.flip
        config.budget_end_step = self.phases.budget_end
        if self.is_world_process_zero():
            print(self.phases.describe(self.state.max_steps), file=sys.stderr)

    def _run_epoch(self, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # a finished run was resumed; the parent would add a step
            self.control.should_training_stop = True
            return
        if self.stage == "tune" and self.phases is None:
            self.start_phases()
        super()._run_epoch(**kwargs)

    def _save_checkpoint(self, *args):
        super()._save_checkpoint(*args)
        if self.phases is not None and self.args.should_save:
            self.phases.save(Path(self._get_output_dir(None), f"checkpoint-{self.state.global_step}"))

    # --- a step

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.questions_together == 1:
            return super()._get_train_sampler(rows)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ScanSampler(rows, self.args.questions_together, self.args.per_device_train_batch_size, seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        volume_count, examples = inputs.pop("volume_count").tolist(), inputs.pop("example").tolist()
        targets = inputs.pop("targets", {})
        objectives = [Objective.ANSWER] * len(examples)
        clean = list(range(int(inputs["volume_index"].max()) + 1)) if "volume_index" in inputs else []
        if self.logged_step is None:
            self.logged_step = self.state.global_step
        inputs["use_scheduler"] = self.stage == "tune"
        if self.stage == "tune":
            objectives, clean = self.set_objectives(model, inputs, volume_count, examples)
        # Gradients are averaged over ranks, but each rank's loss is a share of the step's. The parent makes up for
        # that by scaling the loss; here the model must know, since the surrogate gradient does not follow a scale.
        ranks = self.accelerator.num_processes
        items = None if num_items_in_batch is None else num_items_in_batch / ranks
        if self.without_decoder and model.training:
            scans = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw", "volume_index")}
            features = model.model.get_video_features(**scans).pooler_output
            outputs, loss, tokens = None, torch.zeros((), device=self.args.device), sum(map(len, features))
            self.sums.add(tokens=tokens, peak_gib=peak_memory(self.args.device))
        else:
            packed = self.packed(model, inputs, volume_count) if self.args.pack_questions else inputs
            if "features" in packed:
                packed = self.features.encoded(self.accelerator.unwrap_model(model), packed)
            skip = model.training and not any(loss.needs_logits for loss in self.losses)
            outputs = model(**packed, **self.scheduling, num_items_in_batch=items, skip_logits=skip)
            loss = outputs["loss"]
            self.note(inputs, outputs, objectives)
        if model.training:
            batch = LossBatch(inputs, outputs, objectives, volume_count, clean, targets)
            shares = row_shares(inputs["labels"], items)  # (B,)
            for term in self.losses:
                value = term(batch) @ shares
                loss = loss + term.factor * value
                self.sums.add(**{term.name: value / ranks})
        return (loss, outputs) if return_outputs else loss

    def set_objectives(self, model, inputs, volume_count, examples):
        """Phase, objectives and perturbed scans of one batch, into its inputs. Returns the objectives, and the numbers
        of the volumes that stay clean."""
        photon, step = self.accelerator.unwrap_model(model), self.state.global_step
        photon.set_scheduler_phase(self.phases.at(step))
        if photon.config.keep_budget is not None:
            photon.set_keep_budget(self.phases.budget_at(step, photon.config.keep_budget))
        seed, flips = self.args.seed, step >= self.phases.flip
        objectives, perturbations = draw_rows(photon.config, seed, step, examples, volume_count, flips)
        inputs["objective"] = torch.tensor(objectives, device=inputs["input_ids"].device)
        clean = []
        if "features" in inputs:  # nothing is perturbed
            clean = list(range(len(inputs["features"]["tokens"])))
        elif "pixel_values_videos" in inputs:
            inputs["pixel_values_videos"], inputs["volume_index"], clean = perturb_rows(
                inputs["pixel_values_videos"],
                inputs["video_grid_thw"],
                inputs["volume_index"],
                volume_count,
                perturbations,
                photon.config,
                [stream(seed, step, example) for example in examples],
                self.empty,
                self.full,
            )
        return objectives, clean

    def packed(self, model, inputs, volume_count):
        """A batch whose questions on one scan stand in one row."""
        photon = self.accelerator.unwrap_model(model)
        if hasattr(photon, "get_base_model"):  # within adapters
            photon = photon.get_base_model()
        positions, _ = photon.model.get_rope_index(**inputs)
        rows = {"volume_count": torch.tensor(volume_count), **inputs}
        return inputs | pack_questions(rows, positions, photon.config.vision_end_token_id)

    def note(self, inputs, outputs, objectives):
        """Figures of one batch for the log."""
        sums, count = self.sums, outputs.get("visual_count")
        ranks = self.accelerator.num_processes
        sums.add(lm_loss=outputs.lm_loss / ranks, band_loss=outputs.band_loss / ranks)
        sums.add(tokens=inputs["attention_mask"].sum())
        robust, flip = (objectives.count(kind) for kind in (Objective.ROBUST, Objective.FLIP))
        sums.add(rows=len(objectives), robust_rows=robust, flip_rows=flip)
        sums.add(peak_gib=peak_memory(self.args.device))
        if count is not None and bool((count > 0).any()):
            has_scan = count > 0
            kept = (outputs.keep_mask.sum(-1) / count.clamp(min=1))[has_scan]
            sums.add(kept_sum=kept.sum(), kept_rows=has_scan.sum(), kept_min=kept.min(), kept_max=kept.max())
            sums.add(threshold_sum=outputs.threshold[has_scan].sum())

    def log(self, logs, start_time=None):
        if "loss" in logs:  # on every rank, as the Trainer calls it
            logs |= self.figures()
        super().log(logs, start_time)

    def figures(self):
        """Figures since the last log: losses a step, the kept ratio over rows with scans."""
        seconds = time.perf_counter() - self.sums.clock
        values, steps = self.sums.gathered(self.accelerator), max(self.state.global_step - self.logged_step, 1)
        figures = {name: values[name] / steps for name in self.loss_names}
        phase = self.phases.at(self.state.global_step - 1) if self.phases else None
        if values["kept_rows"]:
            name = "kept" if phase == "hard" else "would_keep"  # before the hard phase nothing is deleted
            figures[name] = values["kept_sum"] / values["kept_rows"]
            figures |= {f"{name}_min": values["kept_min"], f"{name}_max": values["kept_max"]}
            figures["threshold"] = values["threshold_sum"] / values["kept_rows"]
        figures |= {name: values[name] / values["rows"] for name in ("robust_rows", "flip_rows") if self.phases}
        if phase is not None:
            figures["phase"] = phase
            if (final := self.accelerator.unwrap_model(self.model).config.keep_budget) is not None:
                figures["budget"] = self.phases.budget_at(self.state.global_step - 1, final)
        figures |= {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups if "name" in group}
        figures |= {"tokens_per_second": values["tokens"] / seconds, "peak_gib": values["peak_gib"]}
        self.sums, self.logged_step = Figures(self.loss_names), self.state.global_step
        return figures

    def create_optimizer(self, model=None):
        """As the parent's, with a learning rate for each part of the model."""
        model = self.model if model is None else model
        if self.optimizer is None:
            groups = parameter_groups(model, self.args, set(self.get_decay_parameter_names(model)))
            if self.args.muon_learning_rate is not None:
                betas = (self.args.adam_beta1, self.args.adam_beta2)
                self.optimizer = MuonAdamW(groups, betas=betas, eps=self.args.adam_epsilon)
            else:
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
                self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # --- evaluation

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Answers from the prompt alone. Returns the share of exact matches (without regard to case and outer blanks),
        of all rows and by task, and the mean kept ratio."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        start, model = time.perf_counter(), self.model
        model.eval()
        world, rank = self.args.world_size, self.args.process_index
        # every rank gets equally many, the last ones twice: sharded models generate in step
        mine = [(rank + world * i) % len(rows) for i in range(-(-len(rows) // world))]
        loader = DataLoader(
            rows.select(mine),
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.prompt_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        results = []
        for batch in tqdm(loader, desc=metric_key_prefix, disable=self.args.disable_tqdm or rank > 0, leave=False):
            results += self.answers(model, batch)
        if world > 1:
            results = gather_object(results)
        results = {example: result for example, *result in results}
        metrics = score(rows, results)
        metrics |= {"rows": len(rows), "runtime": round(time.perf_counter() - start, 2)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.sums.clock += time.perf_counter() - start  # not the training's time
        return metrics

    def answers(self, model, batch):
        """[(example, text, kept ratio or `None`)] of one batch of prompts."""
        examples = batch.pop("example").tolist()
        has_scan = (batch.pop("volume_count") > 0).tolist()
        batch = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            output = model.generate(
                **batch,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                use_scheduler=self.stage == "tune",
                **self.scheduling,
            )
        texts = self.processing_class.batch_decode(
            output.sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        cut = getattr(output.past_key_values, "cut", None)
        kept = [None] * len(texts)
        if cut is not None:
            ratios = (cut.keep_mask.sum(-1) / cut.visual_count.clamp(min=1)).tolist()
            kept = [ratio if scan else None for ratio, scan in zip(ratios, has_scan, strict=True)]
        return list(zip(examples, texts, kept, strict=True))

    def drop_loss_modules(self):
        """Before the last save: the losses have done their work."""
        photon = self.accelerator.unwrap_model(self.model)
        for loss in self.losses:
            if loss.module is not None:
                delattr(photon, loss.module_name)
        self.losses = []


def score(rows, results):
    """Exact-match accuracy of all rows and by task, mean kept ratio. results: {example: (text, kept ratio)}."""
    hits, kept = {}, []
    for row in rows.select_columns(["example", "task", "answer"]):
        text, ratio = results[row["example"]]
        hit = text.strip().casefold() == row["answer"].strip().casefold()
        for name in ("accuracy", *([f"accuracy_{row['task']}"] if row["task"] else ())):
            hits.setdefault(name, []).append(hit)
        kept += [] if ratio is None else [ratio]
    return {name: sum(found) / len(found) for name, found in hits.items()} | (
        {"kept": sum(kept) / len(kept)} if kept else {}
    )
