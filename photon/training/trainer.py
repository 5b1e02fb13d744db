"""The Trainer of transformers with what Photon adds, and nothing else:

- the phase (dense, soft, hard) and each row's kind of loss follow from the global step, so that a resumed run goes on
  as if it had not stopped;
- a learning rate for each part of the model;
- a log of every loss term, the kept ratio, the threshold, tokens a second and peak memory;
- evaluation by answers that are written from the prompt alone.
"""

import sys
import time
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer

from photon.objectives_photon import Objective
from photon.training.data import ScanSampler
from photon.training.muon import MuonAdamW, by_muon
from photon.training.packing import pack_questions
from photon.training.perturbations import draw_rows, perturb_rows, stream
from photon.training.token_labels import evidence_losses

try:
    import resource
except ImportError:  # not on Windows
    resource = None

PHASES = ("dense", "soft", "hard")
GROUPS = ("decoder", "vision", "aligner", "scheduler")
SUMS = ("lm_loss", "band_loss", "token_loss", "evidence_loss", "tokens", "rows", "robust_rows", "flip_rows",
        "kept_sum", "kept_rows", "threshold_sum")  # fmt: skip
MINIMA, MAXIMA = ("kept_min",), ("kept_max", "peak_gib")


def group_of(name):
    """Which part of the model a parameter belongs to."""
    if ".scheduler." in name:
        return "scheduler"
    if ".visual." in name:
        return "aligner" if ".merger." in name else "vision"
    return "decoder"


@dataclass
class Phases:
    """First optimizer steps of the phases."""

    soft: int
    hard: int
    flip: int

    @classmethod
    def of(cls, config, args, max_steps):
        """From the arguments, where given (below 1 a share of the run), else from the config."""
        steps = []
        for given, default in (
            (args.soft_start, config.soft_start_step),
            (args.hard_start, config.hard_start_step),
            (args.flip_start, config.flip_start_step),
        ):
            value = default if given is None else given * max_steps if given < 1 else given
            steps.append(round(value))
        if not 0 <= steps[0] <= steps[1] <= steps[2]:
            raise ValueError(
                f"The phases start at steps {steps} (soft, hard, flip); expected them in ascending order."
            )
        return cls(*steps)

    def at(self, step):
        return PHASES[(step >= self.soft) + (step >= self.hard)]


class Terms:
    """Figures of the steps since the last log, on the device until they are asked for."""

    KINDS = (
        (SUMS, 0.0, torch.add, torch.sum),
        (MINIMA, torch.inf, torch.minimum, torch.amin),
        (MAXIMA, -torch.inf, torch.maximum, torch.amax),
    )

    def __init__(self):
        # all names from the start: a rank without scans must gather the same list
        self.values = {name: torch.tensor(start) for names, start, *_ in self.KINDS for name in names}
        self.clock = time.perf_counter()

    def add(self, **figures):
        for names, _, join, _ in self.KINDS:
            for name in names:
                if name in figures:
                    value = torch.as_tensor(figures[name], dtype=torch.float32).detach()
                    self.values[name] = join(self.values[name].to(value.device), value)

    def gathered(self, accelerator):
        """{name: float} over all ranks."""
        mine = torch.stack([value.cpu() for value in self.values.values()]).to(accelerator.device)
        table = dict(zip(self.values, accelerator.gather(mine[None]).T, strict=True))  # (ranks,) each
        return {name: float(over(table[name], 0)) for names, _, _, over in self.KINDS for name in names}


class PhotonTrainer(Trainer):
    """
    Args beyond the parent's:
        stage: "align", "tune" or "dense"; but for "tune" no token is dropped.
        prompt_collator: rows to prompts without their answer, for evaluation.
        max_new_tokens: longest answer in evaluation.
        token_head, token_weight: a `TokenHead` within the model, and the weight of its loss.
        tokens_alone: the vision tower learns from the token head, and the decoder is left out.
        evidence_weight: of the loss by which the scheduler learns to keep the labels a question is about; 0: none.
    """

    def __init__(
        self, *args, stage, prompt_collator, max_new_tokens, token_head=None, token_weight=1.0, tokens_alone=False,
        evidence_weight=0.0, **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.tokens_alone, self.evidence_weight = tokens_alone, evidence_weight
        self.stage, self.prompt_collator, self.max_new_tokens = stage, prompt_collator, max_new_tokens
        self.token_head, self.token_weight = token_head, token_weight
        self.objective = Objective
        volumes = self.processing_class.image_processor
        self.empty, self.full = -volumes.mean / volumes.std, (1 - volumes.mean) / volumes.std
        self.phases, self.terms, self.logged_step = None, Terms(), None

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
        targets = inputs.pop("token_targets", None)  # a list, one a volume
        evidence, shown = inputs.pop("evidence", None), inputs.get("volume_index")
        of_rows = None
        if self.evidence_weight and targets is not None:
            of_rows = [[targets[scan] for scan in scans.tolist()] for scans in shown.split(volume_count)]
        kinds = ["answer"] * len(examples)
        if self.logged_step is None:
            self.logged_step = self.state.global_step
        inputs["use_scheduler"] = self.stage == "tune"
        if self.stage == "tune":
            kinds, whole = self.set_objectives(model, inputs, volume_count, examples)
            targets = None if targets is None else [targets[volume] for volume in whole]
        # Gradients are averaged over ranks, but each rank's loss is a share of the whole. The parent makes up for that
        # by scaling the loss; here the model must know, since the surrogate gradient does not follow such a scale.
        ranks = self.accelerator.num_processes
        items = None if num_items_in_batch is None else num_items_in_batch / ranks
        if self.tokens_alone and model.training:
            scans = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw", "volume_index")}
            model.model.get_video_features(**scans)
            loss = self.token_weight * self.token_loss(inputs, volume_count, targets, items)
            self.terms.add(
                token_loss=loss, tokens=targets[0].shape[0] * len(targets), peak_gib=peak_memory(loss.device)
            )
            return loss
        given = inputs
        if self.args.pack_questions:
            given = self.packed(model, inputs, volume_count)
        outputs = model(**given, num_items_in_batch=items)
        loss, token_loss = outputs["loss"], self.token_loss(inputs, volume_count, targets, items)
        if token_loss is not None:
            loss = loss + self.token_weight * token_loss
            self.terms.add(token_loss=token_loss / ranks)
        if of_rows is not None:
            answer = torch.tensor([kind == "answer" for kind in kinds], device=loss.device)
            share = (inputs["labels"][:, 1:] != -100).sum(-1) * answer / items  # (B,), as every other term
            evidence_loss = evidence_losses(outputs.keep_prob, outputs.visual_count, of_rows, evidence) @ share.float()
            loss = loss + self.evidence_weight * evidence_loss
            self.terms.add(evidence_loss=evidence_loss / ranks)
        self.note(inputs, outputs, kinds)
        return (loss, outputs) if return_outputs else loss

    def set_objectives(self, model, inputs, volume_count, examples):
        """Phase, kinds of loss and spoilt scans of one batch, into its inputs. Returns the kinds, and the volumes that
        are whole."""
        photon, step = self.accelerator.unwrap_model(model), self.state.global_step
        if self.phases is None:
            self.phases = Phases.of(photon.config, self.args, self.state.max_steps)
            photon.config.soft_start_step = self.phases.soft  # the checkpoint tells how it was trained
            photon.config.hard_start_step = self.phases.hard
            photon.config.flip_start_step = self.phases.flip
        photon.set_scheduler_phase(self.phases.at(step))
        seed, flips = self.args.seed, step >= self.phases.flip
        kinds, perturbations = draw_rows(photon.config, seed, step, examples, volume_count, flips)
        codes = [self.objective[kind.upper()] for kind in kinds]
        inputs["objective"] = torch.tensor(codes, device=inputs["input_ids"].device)
        whole = []
        if "pixel_values_videos" in inputs:
            inputs["pixel_values_videos"], inputs["volume_index"], whole = perturb_rows(
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
        return kinds, whole

    def packed(self, model, inputs, volume_count):
        """A batch whose questions on one scan stand in one row."""
        photon = self.accelerator.unwrap_model(model)
        if hasattr(photon, "get_base_model"):  # within adapters
            photon = photon.get_base_model()
        positions, _ = photon.model.get_rope_index(**inputs)
        rows = {"volume_count": torch.tensor(volume_count), **inputs}
        return inputs | pack_questions(rows, positions, photon.config.vision_end_token_id)

    def token_loss(self, inputs, volume_count, targets, num_items):
        """The token head's loss on each scan, weighted by the answer tokens of the rows that show it, as every other
        term; not on spoilt scans."""
        if self.token_head is None or not self.model.training:
            return None
        losses = self.token_head.losses(targets)  # (volumes that are whole,)
        if targets is None:
            return losses.sum()
        answers = (inputs["labels"][:, 1:] != -100).sum(-1)
        counts = torch.tensor(volume_count, device=answers.device)
        weight = (answers / counts.clamp(min=1)).repeat_interleave(counts)  # (P,), a row's share over its scans
        index = inputs["volume_index"]
        weights = weight.new_zeros(int(index.max()) + 1).index_add(0, index, weight)
        return (losses * weights[: len(losses)]).sum() / num_items

    def note(self, inputs, outputs, kinds):
        """Figures of one batch for the log."""
        terms, count = self.terms, outputs.get("visual_count")
        ranks = self.accelerator.num_processes
        terms.add(lm_loss=outputs.lm_loss / ranks, band_loss=outputs.band_loss / ranks)
        terms.add(tokens=inputs["attention_mask"].sum())
        terms.add(rows=len(kinds), robust_rows=kinds.count("robust"), flip_rows=kinds.count("flip"))
        terms.add(peak_gib=peak_memory(self.args.device))
        if count is not None and bool((count > 0).any()):
            real = count > 0
            kept = (outputs.keep_mask.sum(-1) / count.clamp(min=1))[real]
            terms.add(kept_sum=kept.sum(), kept_rows=real.sum(), kept_min=kept.min(), kept_max=kept.max())
            terms.add(threshold_sum=outputs.threshold[real].sum())

    def log(self, logs, start_time=None):
        if "loss" in logs:  # on every rank, as the Trainer calls it
            logs |= self.figures()
        super().log(logs, start_time)

    def figures(self):
        """Figures since the last log: loss terms a step, the kept ratio over rows with scans."""
        seconds = time.perf_counter() - self.terms.clock
        values, steps = self.terms.gathered(self.accelerator), max(self.state.global_step - self.logged_step, 1)
        names = ["lm_loss", "band_loss", *(["token_loss"] if self.token_head else [])]
        names += ["evidence_loss"] if self.evidence_weight else []
        figures = {name: values[name] / steps for name in names}
        if values["kept_rows"]:
            figures["kept"] = values["kept_sum"] / values["kept_rows"]
            figures |= {"kept_min": values["kept_min"], "kept_max": values["kept_max"]}
            figures["threshold"] = values["threshold_sum"] / values["kept_rows"]
        figures |= {name: values[name] / values["rows"] for name in ("robust_rows", "flip_rows") if self.phases}
        if self.phases:
            figures["phase"] = PHASES.index(self.phases.at(self.state.global_step - 1))  # a number, for curves
        figures |= {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups if "name" in group}
        figures |= {"tokens_per_second": values["tokens"] / seconds, "peak_gib": values["peak_gib"]}
        self.terms, self.logged_step = Terms(), self.state.global_step
        return figures

    # --- learning rates

    def create_optimizer(self, model=None):
        """As the parent's, with a learning rate for each part of the model."""
        model = self.model if model is None else model
        if self.optimizer is None:
            decay = set(self.get_decay_parameter_names(model))
            groups, muon_rate = {}, self.args.muon_learning_rate
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    muon = muon_rate is not None and by_muon(name, parameter)
                    groups.setdefault((GROUPS.index(group_of(name)), name not in decay, muon), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            listed = []
            for (part, plain, muon), parameters in sorted(groups.items()):
                rate = muon_rate if muon else getattr(self.args, f"{GROUPS[part]}_learning_rate", None)
                listed.append(
                    {
                        "params": parameters,
                        "weight_decay": 0.0 if plain else self.args.weight_decay,
                        "lr": self.args.learning_rate if rate is None else rate,
                        "name": f"{GROUPS[part]}_muon" if muon else GROUPS[part],
                        **({} if muon_rate is None else {"muon": muon}),
                    }
                )
            if muon_rate is not None:
                betas = (self.args.adam_beta1, self.args.adam_beta2)
                self.optimizer = MuonAdamW(listed, betas=betas, eps=self.args.adam_epsilon)
            else:
                self.optimizer = optimizer_class(listed, **options)
        return self.optimizer

    # --- evaluation

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Answers from the prompt alone. Returns exact matches (case and outer blanks aside) in all and by task, and
        the mean kept ratio."""
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
        self.terms.clock += time.perf_counter() - start  # not the training's time
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

    def drop_token_head(self):
        """Before the last save: the head has done its work."""
        photon = self.accelerator.unwrap_model(self.model)
        if self.token_head is not None:
            self.token_head = None
            del photon.token_head


def score(rows, results):
    """Exact-match accuracy in all and by task, and the mean kept ratio. results: {example: (text, kept ratio)}."""
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


def peak_memory(device):
    """GiB, the most that this process has held: of the GPU where there is one, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
