"""One set of weights as three models, and their inputs."""

from dataclasses import dataclass

import torch
from training import frame_patches, models, volume_patches

from photon.modeling_photon import PhotonForConditionalGeneration

from .counting import Work
from .presets import MARKS_BEHIND, prompt_of
from .timing import Clock


@dataclass
class Models:
    """Stock Qwen2.5-VL, and Photon with the cut at L/4 - 1 and before layer 0."""

    stock: torch.nn.Module
    quarter: torch.nn.Module
    front: torch.nn.Module


def build(settings, device, dtype, attention):
    quarter, stock = models(settings["config"], device, dtype, attention, checkpointing=False)
    config = type(quarter.config).from_dict(quarter.config.to_dict() | {"scheduler_layer": -1})
    with torch.device(device):
        front = PhotonForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    front.load_state_dict(quarter.state_dict(keep_vars=True), assign=True)
    for model in (stock, quarter, front):
        model.eval()
        model.generation_config.eos_token_id = None  # answers of equal length
        model.generation_config.pad_token_id = 0
    return Models(stock, quarter, front)


class Bench:
    """Models, a scan and prompts of a preset, and what each model's work is counted by."""

    def __init__(self, settings, device, dtype, attention, causal=None, clock="wall"):
        self.settings, self.device, self.clock = settings, device, Clock(device, clock)
        self.models = build(settings, device, dtype, attention)
        self.config = self.models.quarter.config
        volume = torch.rand(settings["volume"], generator=torch.Generator().manual_seed(0)).numpy()
        patches, grid = volume_patches(volume, self.config)
        frames, frame_grid = frame_patches(volume, self.models.stock.config)
        self.patches, self.frames = (torch.from_numpy(part).to(dtype) for part in (patches, frames))
        self.prompt, self.video = (prompt_of(settings, self.config, g) for g in (grid, frame_grid))
        options = {} if causal is None else {"causal": causal}
        self.work = {
            "video": Work(self.models.stock.config, **options),
            "quarter": Work(self.config, self.config.scheduler_layer, **options),
            "front": Work(self.config, **options),
        }

    def inputs(self, batch=1, prompt=None, patches=None):
        """A batch of questions of unlike words, each on its copy of the scan."""
        prompt, patches = prompt or self.prompt, self.patches if patches is None else patches
        config, words = self.config, self.config.text_config.vocab_size // 4
        generator = torch.Generator().manual_seed(0)
        lead = torch.randint(words, 2 * words, (prompt.lead,), generator=generator)
        ids = torch.randint(words, 2 * words, (batch, prompt.length), generator=generator)
        end = prompt.lead + prompt.visual
        ids[:, : prompt.lead], ids[:, prompt.lead : end] = lead, config.video_token_id
        marks = {
            prompt.lead - 4: config.im_start_token_id, prompt.lead - 3: config.user_token_id,
            prompt.lead - 1: config.vision_start_token_id, end: config.vision_end_token_id,
            prompt.length - MARKS_BEHIND: config.im_end_token_id,
            prompt.length - MARKS_BEHIND + 2: config.im_start_token_id,
        }  # fmt: skip
        for place, mark in marks.items():
            ids[:, place] = mark
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == config.video_token_id).int() * 2,
            "pixel_values_videos": patches.repeat(batch, 1),
            "video_grid_thw": torch.tensor([prompt.grid] * batch),
        }
        return {name: value.to(self.device) for name, value in inputs.items()}

    def video_inputs(self):
        return self.inputs(1, self.video, self.frames)


def text_of(inputs):
    """What a further question passes."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}
