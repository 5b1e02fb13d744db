"""Predictions of memory and time, from a configuration alone.

**Activations.** Checkpointing keeps the input of every block; beside these stands one block on its way back, whose
tensors are `WIDE` times the MLP's width and `NARROW` times the model's, for each token (read off `holders.py`). The
peak is the largest of three moments: at the top of the decoder, where the inputs of all layers are held; at the last
layer that sees the whole prompt; and at the top of the vision tower, on as many patches as it takes at a time. Stock
Qwen2.5-VL takes all at a time, and holds its logits in place of the first two.

**Time.** Operations over the rate of the part that does them, vision tower or decoder, and four costs beside:
- a fixed time for each pass through the decoder, to read its weights, which the short passes feel;
- a fixed time for each cut, and for the call that makes it;
- on a CPU, new memory: the C library gives blocks above `RETURNED` back to the system, so that each such tensor is new
  memory every time. A block makes `NEW_WIDE` tensors of the MLP's width and `NEW_NARROW` of the model's;
- products with adapters are thin and run at a rate of their own.
A step's operations run at the same rates, times one factor.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from training import configs, frame_patches, volume_patches

from photon.modeling_photon import PhotonForConditionalGeneration

from .counting import Work
from .presets import prompt_of

WIDE, NARROW = 6, 10
TOWER = 1.5  # patches' states that the vision tower holds beside its blocks' inputs
MERGER = 4  # that it holds if its merger is not checkpointed
LOGITS = 3  # float32 copies of all logits, in the loss and on its way back
FLOAT32 = 4  # bytes
NEW_WIDE, NEW_NARROW = 4, 10
RETURNED = 32 * 2**20  # bytes, the most that glibc's malloc lets its threshold for it grow to
STEP_RUNS = 4  # a step's passes, by the tensors they make: forward, again, and back by inputs and by weights


@dataclass
class Rates:
    """Operations a second of the vision tower, of the decoder and of adapters; seconds of a pass, of a cut and of a
    byte of new memory; a step's time over its operations'."""

    vision: float
    decoder: float
    adapters: float = math.inf
    fixed: float = 0.0
    cut: float = 0.0
    new: float = 0.0
    step: float = 1.0

    def seconds(self, work, vision, new=0.0, cut=False):
        """Of a pass of `work` operations, `vision` of them in the tower, and `new` bytes of memory."""
        return vision / self.vision + (work - vision) / self.decoder + self.passed(cut) + new * self.new

    def passed(self, cut):
        """Of a pass beside its operations."""
        return self.fixed + (self.cut if cut else 0.0)


class Plan:
    """settings: of a preset; size: bytes of a number."""

    def __init__(self, settings, size):
        self.settings, self.size = settings, size
        self.config, self.stock = configs(settings["config"])
        volume = np.zeros(settings["volume"], dtype=np.float32)
        self.grid = tuple(volume_patches(volume, self.config)[1])
        self.video_grid = tuple(frame_patches(volume, self.stock)[1])

    def of(self, kind, learned=False):
        """Configuration, prompt and `Work` of a kind: "video", "dense", "hard" or "front"."""
        config, grid = (self.stock, self.video_grid) if kind == "video" else (self.config, self.grid)
        cut = self.config.scheduler_layer if kind in ("dense", "hard") else -1
        return config, prompt_of(self.settings, self.config, grid, learned), Work(config, cut)

    # --- memory, in bytes

    def parameters(self, rank=0):
        """How many the model has, and how many of them train; with adapters of `rank` these alone, the patch embedding
        and the scheduler."""
        with torch.device("meta"):
            model = PhotonForConditionalGeneration(self.config)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        total = sum(sizes.values())
        if not rank:
            return total, total
        work = Work(self.config, rank=rank)
        adapters = int(work.layer(1).adapters) // 2 * (work.below + work.above)
        alone = sum(n for name, n in sizes.items() if ".patch_embed." in name or ".scheduler." in name)
        return total + adapters, adapters + alone

    def held(self, rank=0, states=2):
        """Weights, gradients, optimiser states (AdamW has two numbers for each weight)."""
        total, trained = (self.size * count for count in self.parameters(rank))
        return {"weights": total, "gradients": trained, "states": states * trained}

    def activations(self, kind, kept=None, scans=1, questions=1):
        """The most that a step holds beside `held`."""
        config, prompt, work = self.of(kind, learned=True)
        text, vision = config.text_config, config.vision_config
        below, above = (work.below, work.above) if kind == "hard" else (0, work.below + work.above)
        short = prompt.length - (prompt.visual - kept if kind == "hard" else 0)
        full = questions * prompt.length
        states = scans * prompt.grid[0] * prompt.grid[1] * prompt.grid[2] * vision.hidden_size
        tower = states * (vision.depth + TOWER)

        def block(tokens):
            return tokens * (WIDE * text.intermediate_size + NARROW * text.hidden_size)

        inputs = (below * full + above * questions * short) * text.hidden_size
        patches = states // vision.hidden_size
        at_once = patches if kind == "video" else min(patches, self.settings["patches"])
        first = states * vision.depth
        first += at_once * (WIDE * vision.intermediate_size + NARROW * vision.hidden_size)
        if kind == "video":
            logits = LOGITS * FLOAT32 / self.size + (self.size < FLOAT32)  # and as they came
            return max(first, tower + MERGER * states + inputs + full * text.vocab_size * logits) * self.size
        lowest = below * full * text.hidden_size + block(full if below else 0)
        return max(first, tower + max(inputs + block(questions * short), lowest)) * self.size

    # --- time

    def new_memory(self, kind, kept=None, scans=1, questions=1, learned=False):
        """Bytes of new memory that a pass takes: of tensors above `RETURNED`."""
        config, prompt, work = self.of(kind, learned)
        text, vision = config.text_config, config.vision_config
        patches = scans * prompt.grid[0] * prompt.grid[1] * prompt.grid[2]
        if learned and kind != "video":
            patches = min(patches, self.settings["patches"])  # at a time, and so none is large
        short = prompt.length - (prompt.visual - kept if kept is not None else 0)

        def blocks(tokens, tower, count):
            parts = (NEW_WIDE, tower.intermediate_size), (NEW_NARROW, tower.hidden_size)
            sizes = ((many, tokens * width * self.size) for many, width in parts)
            return count * sum(many * size for many, size in sizes if size > RETURNED)

        decoder = blocks(questions * prompt.length, text, work.below) + blocks(questions * short, text, work.above)
        return blocks(patches, vision, vision.depth) + decoder

    def step_seconds(self, rates, kind, kept=None, scans=1, questions=1, rank=0):
        config, prompt, work = self.of(kind, learned=True)
        work = Work(config, work.below - 1, rank=rank)
        kept = kept if kind == "hard" else None
        learned, stock = self.settings["learned"], kind == "video"
        total = work.step(prompt, kept, learned, scans, questions, stock)
        without = work.step(prompt, kept, learned, 0, questions, stock)
        adapters = STEP_RUNS * questions * work.decoder(prompt, kept).adapters
        new = STEP_RUNS * self.new_memory(kind, kept, scans, questions, learned=True)
        return (
            rates.step * rates.seconds(total - adapters, total - without) + adapters / rates.adapters + new * rates.new
        )

    def answer_seconds(self, rates, kind, kept=None, batch=1):
        """To the first token of questions, each on a scan of its own."""
        _, prompt, work = self.of(kind)
        new = self.new_memory(kind, kept, batch, batch)
        vision = batch * work.encoder(prompt.grid).total
        return rates.seconds(batch * work.whole(prompt, kept), vision, new, cut=kept is not None)

    def further_seconds(self, rates, kind, kept, reuse="exact", batch=1):
        """Of the encoding, and of further questions, all at once."""
        _, prompt, work = self.of(kind)
        encoding = rates.seconds(work.encode(prompt, reuse), work.encoder(prompt.grid).total)
        return encoding, rates.seconds(batch * work.further(prompt, kept, reuse), 0.0, cut=True)
