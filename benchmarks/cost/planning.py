"""Predictions of memory and time, from a configuration alone.

**Activations.** Checkpointing keeps the input of every block; beside these stands one block on its way back, whose
tensors are `WIDE` times the MLP's width and `NARROW` times the model's, for each token (read off `holders.py`). The
peak is the larger of two moments: at the top of the decoder, where the inputs of all layers are held, and at the last
layer that sees the whole prompt. Stock Qwen2.5-VL peaks at its logits.

**Time.** Operations over the rate of the part that does them, vision tower or decoder, and a fixed time for each pass
through the decoder, which the short passes feel. A step's operations run at the same rates, times one factor.
"""

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


@dataclass
class Rates:
    """Operations a second of the vision tower and of the decoder; seconds of a pass; a step's time over theirs."""

    vision: float
    decoder: float
    step: float = 1.0
    fixed: float = 0.0

    def seconds(self, work, vision):
        """Of a pass of `work` operations, `vision` of them in the tower."""
        return vision / self.vision + (work - vision) / self.decoder + self.fixed


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
        if kind == "video":
            logits = LOGITS * FLOAT32 / self.size + (self.size < FLOAT32)  # and as they came
            return (tower + MERGER * states + inputs + full * text.vocab_size * logits) * self.size
        lowest = below * full * text.hidden_size + block(full if below else 0)
        return (tower + max(inputs + block(questions * short), lowest)) * self.size

    # --- time

    def step_seconds(self, rates, kind, kept=None, scans=1, questions=1, rank=0):
        config, prompt, work = self.of(kind, learned=True)
        work = Work(config, work.below - 1, rank=rank)
        kept = kept if kind == "hard" else None
        learned, stock = self.settings["learned"], kind == "video"
        total = work.step(prompt, kept, learned, scans, questions, stock)
        without = work.step(prompt, kept, learned, 0, questions, stock)
        return rates.step * rates.seconds(total, total - without)

    def answer_seconds(self, rates, kind, kept=None):
        """To the first token of a question on a scan of its own."""
        _, prompt, work = self.of(kind)
        return rates.seconds(work.whole(prompt, kept), work.encoder(prompt.grid).total)

    def further_seconds(self, rates, kind, kept, reuse="exact"):
        """Of the encoding, and of each further question."""
        _, prompt, work = self.of(kind)
        vision = work.encoder(prompt.grid).total
        return rates.seconds(work.encode(prompt, reuse), vision), rates.seconds(work.further(prompt, kept, reuse), 0.0)
