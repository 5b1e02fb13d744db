"""Training steps of a whole model and of adapters: seconds, memory, and whether grouping changes gradients."""

from functools import partial
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model

from photon.training.memory import save_memory
from photon.training.parts import LORA_TARGET

from .counting import Work
from .holders import MIB, Holders
from .presets import prompt_of

MEASURED, COMPARED = ("video", "dense", "hard"), ("apart", "grouped")  # whose memory is followed; whose gradients
MEMORY = ("activations MiB", "weights MiB", "gradients MiB", "states MiB")


def labelled(inputs, learned, config):
    """The inputs with an answer of `learned` tokens behind each prompt, and its labels."""
    ids, words = inputs["input_ids"], config.text_config.vocab_size // 4
    generator = torch.Generator().manual_seed(1)
    answer = torch.randint(words, 2 * words, (len(ids), learned), generator=generator).to(ids)
    whole = torch.cat([ids, answer], dim=1)
    labels = torch.full_like(whole, -100)
    labels[:, -learned:] = answer
    kinds = (whole == config.video_token_id).int() * 2
    return inputs | {
        "input_ids": whole, "attention_mask": torch.ones_like(whole), "mm_token_type_ids": kinds, "labels": labels
    }  # fmt: skip


def on_one_scan(inputs, patches):
    """The same questions with one encoding of the scan that they share."""
    index = torch.zeros(len(inputs["input_ids"]), dtype=torch.long, device=inputs["input_ids"].device)
    return inputs | {"pixel_values_videos": inputs["pixel_values_videos"][:patches], "volume_index": index}


class Step:
    """One training step of a model on a batch. `options` are arguments of its forward."""

    def __init__(self, model, inputs, work, **options):
        self.model, self.inputs, self.work = model, inputs | options | {"use_cache": False}, work
        self.optimizer = None

    def backward(self, turned=lambda: None):
        """Forward and back; `turned` is called between the two."""
        output = self.model(**self.inputs)
        loss = output.loss
        del output  # logits live on only where backward needs them
        turned()
        loss.backward()

    def update(self):
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self):
        for parameter in self.trained():
            parameter.grad = None

    def gradients(self):
        """Copies of the gradients, by name."""
        named = self.model.named_parameters()
        return {name: p.grad.to("cpu", torch.float32, copy=True) for name, p in named if p.grad is not None}

    def trained(self):
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def held(self):
        """MiB of weights, of gradients, of optimiser states."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        gradients = sum(p.numel() * p.element_size() for p in self.trained())
        states = [t for p in self.trained() for t in self.optimizer.state.get(p, {}).values()]
        states = sum(t.numel() * t.element_size() for t in states)
        return {"weights MiB": weights / MIB, "gradients MiB": gradients / MIB, "states MiB": states / MIB}

    def holders(self):
        """`Holders` of a forward and backward."""
        holders = Holders(self.model)
        with holders:
            self.backward(turned=lambda: setattr(holders, "way", "back"))
        self.drop_gradients()
        return holders


def gradient_difference(some, others):
    """The largest difference of two sets of gradients, as a share of the largest gradient of its tensor."""
    largest = {name: float(gradient.abs().max()) for name, gradient in some.items()}
    floor = 1e-6 * max(largest.values())  # a bias of keys has no say: its gradient is rounding
    return max(float((g - others[n]).abs().max()) / max(largest[n], floor) for n, g in some.items())


def with_adapters(model, rank):
    """Adapters of the decoder; patch embedding and scheduler train in full, as with `train_hf.py --lora`."""
    saved = ["patch_embed"] + (["scheduler"] if hasattr(model.model.language_model, "scheduler") else [])
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": LORA_TARGET, "modules_to_save": saved}
    return get_peft_model(model, LoraConfig(**options))


def trainable(bench):
    """Stock Qwen2.5-VL and Photon in training, with checkpointing, Photon as `train_hf.py` sets it up."""
    models = bench.models.stock, bench.models.quarter
    for model in models:
        model.train().activation_checkpointing_enable({"use_reentrant": False})
    options = {"vision_checkpointing": True, "gradient_checkpointing": True, "fsdp": None, "deepspeed": None}
    save_memory(models[1], SimpleNamespace(**options, vision_patches=bench.settings["patches"]))
    return models


def steps_of(bench, models, share, questions, rank=0):
    """{name: Step}: a video, a dense and a cut prompt, and questions on as many scans or on one.

    models: stock Qwen2.5-VL and Photon; share: of the visual tokens that stay; rank: of the adapters they have.
    """
    settings, config = bench.settings, bench.config
    (stock, photon), learned = models, settings["learned"]
    prompt, video = (prompt_of(settings, config, p.grid, learned=True) for p in (bench.prompt, bench.video))
    one, many = (labelled(bench.inputs(batch), learned, config) for batch in (1, questions))
    frames = labelled(bench.video_inputs(), learned, config)
    kept, causal = prompt.kept(share), bench.work["quarter"].causal
    hard = {"token_budget": kept, "skip_logits": True}
    of_video = Work(bench.models.stock.config, causal=causal, rank=rank)
    work = partial(Work(config, config.scheduler_layer, causal, rank).step, prompt, labels=learned)
    alike = on_one_scan(many, len(bench.patches))
    return {
        "video": Step(stock, frames, of_video.step(video, None, learned, stock=True)),
        "dense": Step(photon, one, work(None), use_scheduler=False, skip_logits=True),
        "hard": Step(photon, one, work(kept), **hard),
        "apart": Step(photon, many, work(kept, scans=questions, questions=questions), **hard),
        "grouped": Step(photon, alike, work(kept, questions=questions), **hard),
    }


def training(bench, share, questions):
    """Rows of training steps, their ratios, and tables of who holds memory. It leaves the bench's models with
    adapters."""
    models = trainable(bench)
    rows, ratios, held = [], {}, {}
    for kind in ("full", "lora"):
        rank = 0
        if kind == "lora":
            rank = bench.settings["rank"]
            models = [with_adapters(model, rank) for model in models]
        steps = steps_of(bench, models, share, questions, rank)
        measured = measure(bench, steps)
        for name, step in steps.items():
            seconds, work = measured[name]["s"], step.work / 1e9
            asked = len(step.inputs["input_ids"])
            row = {
                "step": f"{kind} {name}",
                "questions": asked,
                "GFLOP": work,
                "s": seconds,
                "GFLOP/s": work / seconds,
            }
            rows.append(row | {column: measured[name].get(column, "") for column in MEMORY})
        difference = gradient_difference(*(measured[name].pop("gradients") for name in COMPARED))
        more = compare(steps, measured) | {"training_grouped_gradient_difference": difference}
        ratios |= {f"{name}_lora" if kind == "lora" else name: value for name, value in more.items()}
        for name in MEASURED:
            held[f"{kind} {name}"] = measured[name]["holders"]
    return rows, ratios, held


def measure(bench, steps):
    """{step: seconds and MiB, or gradients}. What is quick is warmed up and timed twice more; the fastest counts.

    The learning rate is 0, so that all steps start from the same weights, and the optimizer does all its work.
    """
    parameters = {id(p): p for step in steps.values() for p in step.trained()}
    optimizer, measured = torch.optim.AdamW(parameters.values(), lr=0.0, fused=True), {}
    for name, step in steps.items():
        step.optimizer, seconds = optimizer, []
        for _ in range(1 if name in COMPARED or name == "video" else 3):
            seconds.append(bench.clock.time(step.backward))
            gradients = step.gradients() if name in COMPARED else None
            seconds[-1] += bench.clock.time(step.update)
        measured[name] = {"s": min(seconds), "gradients": gradients, **step.held()}
        if name in MEASURED:
            holders = step.holders()
            measured[name] |= {"activations MiB": holders.peak / MIB, "holders": holders.table()}
    return measured


def compare(steps, measured):
    """Ratios of time, with their bounds, and of memory."""
    ratios = {}
    for name, slow, fast in (
        ("step_vs_video", "video", "hard"),
        ("step_vs_dense", "dense", "hard"),
        ("training_grouped", "apart", "grouped"),
    ):  # fmt: skip
        ratios[name] = measured[slow]["s"] / measured[fast]["s"]
        ratios[f"{name}_bound"] = steps[slow].work / steps[fast].work
    activations = {name: measured[name]["activations MiB"] for name in MEASURED}
    whole = {name: sum(measured[name][column] for column in MEMORY) for name in MEASURED}
    ratios["step_activation_memory_vs_video"] = activations["hard"] / activations["video"]
    ratios["step_memory_vs_video"] = whole["hard"] / whole["video"]
    ratios["step_hard_memory_vs_dense"] = activations["hard"] / activations["dense"]
    return ratios
