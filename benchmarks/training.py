"""A training step on a scan as a video of slices, against Photon without and with the cut, in one process.

    python benchmarks/training.py --preset cpu --json benchmarks/results/training_cpu.json
    python benchmarks/training.py --preset 3b                                       # on a GPU, bfloat16

Three steps of forward, backward and AdamW on the same voxels, questions and answers, random weights:

- video: stock Qwen2.5-VL, whose patches are 2 frames deep, on every slice of the volume as an RGB frame. 140 slices of
  280 x 280 are 70 x 10 x 10 = 7,000 tokens, the paper's 7.0K for a scan;
- dense: Photon, whose patches are 14 slices deep, on all of its 1,000 tokens;
- hard: Photon in its last phase, 39 % of the tokens kept in each row (the paper's mean; random weights would keep
  another share), scheduler and surrogate gradient at work.

`cpu` is `3b` with a quarter of the tokens (half the height and width, a quarter of the text), a quarter of each width,
half the window, and so few layers and words that vision tower, attention, MLP and head keep about the proportions of
3b.

Weights of one shape are shared by the three, that is all but the patch embeddings and the scheduler, and so are their
optimiser states. 3b has 3.8 G parameters, in bfloat16 at 2 bytes, their gradient at 2 and two moments at 4: 28 GiB,
once for all three instead of 84 GiB. With the recipes' gradient checkpointing (`--keep-activations`: without) the rest
is some 20 GiB by the same arithmetic, most of it the video's logits. The recipes' float32 weights would double the 28
and, alike in all variants, hide the difference even more; so the ratios of memory are two, with weights and without.

What is counted: time is of whole steps, taken in turns. Memory is a variant's weights and optimiser states, and the
most that one step has allocated at a time on top: of the GPU's allocator, or on a CPU of PyTorch's, as its profiler
records it (no scratch space of the matrix library, no voxels). Bounds are ratios of operations: twice the
multiply-adds of vision tower, causal attention, decoder at its length in each layer and head at every place, three
times for forward and backward, and the blocks' forward once more with checkpointing. `paper_speedup` and
`paper_memory` are the paper's: 0.85 against 0.15 steps a second, 34.8 against 128.9 to 134.2 GiB.
"""

import json
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from evaluation import vision_operations
from scheduler import operations
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from common import ROOT, arguments, interleaved, report
from photon.configuration_photon import PhotonConfig
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.processing_photon import PhotonVolumeProcessor

KEPT = 0.39
PAPER = {"paper_speedup": 5.7, "paper_memory": 0.26}
CPU = {
    "text_config": {
        "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 1,
        "intermediate_size": 2752, "vocab_size": 4224, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    },
    "vision_config": {
        "depth": 3, "hidden_size": 320, "intermediate_size": 855, "num_heads": 4, "out_hidden_size": 512,
        "window_size": 56, "fullatt_block_indexes": [2],
    },
    "tie_word_embeddings": True, "image_token_id": 4211, "video_token_id": 4212, "vision_start_token_id": 4213,
    "vision_end_token_id": 4214, "im_start_token_id": 4215, "im_end_token_id": 4216,
}  # fmt: skip
FULL = json.loads((ROOT / "configs" / "photon_3b.json").read_text())
PRESETS = {  # voxels of the volume (depth, height, width), tokens of text, fields of PhotonConfig
    "cpu": {"volume": (140, 140, 140), "text": 20, "config": CPU},
    "3b": {"volume": (140, 280, 280), "text": 80, "config": {k: v for k, v in FULL.items() if k != "model_type"}},
}


@dataclass
class Variant:
    """One of the three: a model, what it is called with, and the patches (t, h, w) of one scan."""

    model: torch.nn.Module
    inputs: dict
    grid: tuple

    @property
    def visual(self):
        return visual_tokens(self.model.config, self.grid)

    @property
    def text(self):
        return self.inputs["input_ids"].shape[1] - self.visual


# === Models and inputs ===============================================================================================


def configs(fields):
    """Photon's configuration, and stock Qwen2.5-VL's of the same towers."""
    photon = PhotonConfig(**json.loads(json.dumps(fields)))
    shared = {name: value for name, value in photon.to_dict().items() if name in Qwen2_5_VLConfig().to_dict()}
    shared.pop("model_type")
    for tower in ("text_config", "vision_config"):
        shared[tower] = {k: v for k, v in shared[tower].items() if k != "model_type"}
    shared["vision_config"] |= {"in_channels": 3, "temporal_patch_size": 2}
    return photon, Qwen2_5_VLConfig(**shared)


def models(fields, device, dtype, attention="sdpa", checkpointing=True):
    """Photon and stock Qwen2.5-VL in training, with the same parameters wherever names and shapes are the same."""
    torch.manual_seed(0)
    options = {"dtype": dtype, "attn_implementation": attention}
    photon_config, stock_config = configs(fields)
    with torch.device(device):
        photon = PhotonForConditionalGeneration._from_config(photon_config, **options)
        stock = Qwen2_5_VLForConditionalGeneration._from_config(stock_config, **options)
    stock_state = stock.state_dict()
    shared = {
        name: parameter
        for name, parameter in photon.state_dict(keep_vars=True).items()
        if name in stock_state and stock_state[name].shape == parameter.shape
    }
    stock.load_state_dict(shared, strict=False, assign=True)
    for model in (photon, stock):
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
    photon.set_scheduler_phase("hard")
    return photon, stock


def frame_patches(volume, config):
    """Slices (D, H, W) as RGB frames -> (patches, channels * frames * pixels), as Qwen2-VL's video processor lays
    them out: (t, h/2, w/2, 2, 2) patches of (channel, frame, row, column). Returns patches and (t, h, w)."""
    vision = config.vision_config
    frames, p, m = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    t, h, w = volume.shape[0] // frames, volume.shape[1] // p, volume.shape[2] // p
    blocks = volume.reshape(t, frames, h // m, m, p, w // m, m, p).transpose(0, 2, 5, 3, 6, 1, 4, 7)
    grey = blocks.reshape(t * h * w, 1, -1).repeat(vision.in_channels, axis=1)
    return grey.reshape(t * h * w, -1), (t, h, w)


def volume_patches(volume, config):
    """The same for Photon, by its processor."""
    processor = PhotonVolumeProcessor(grid=volume.shape)
    return processor.patchify(volume), tuple(processor.grid_thw)


def visual_tokens(config, grid):
    t, h, w = grid
    return t * h * w // config.vision_config.spatial_merge_size**2


def prompts(config, visual, text, scans):
    """Ids and labels (scans, visual + text): a system turn, a scan, a question, an answer. The words depend on `text`
    alone."""
    vocabulary, generator = config.text_config.vocab_size, torch.Generator().manual_seed(0)
    answer, question = text // 5, text // 4
    system = text - question - answer - 11  # the marks
    if system < 0:
        raise ValueError(f"text is {text} tokens; expected 18 or more, for the marks, a question and an answer.")
    ids = torch.randint(vocabulary // 4, vocabulary // 2, (scans, text + visual), generator=generator)
    words = torch.randint(vocabulary // 4, vocabulary // 2, (scans, text), generator=generator.manual_seed(0))
    start = system + 4
    ids[:, :start], ids[:, start + visual :] = words[:, :start], words[:, start:]
    ids[:, system], ids[:, system + 1] = config.im_start_token_id, config.user_token_id
    ids[:, start - 1], ids[:, start + visual] = config.vision_start_token_id, config.vision_end_token_id
    ids[:, start : start + visual] = config.video_token_id
    end = start + visual + 1 + question
    ids[:, end], ids[:, end + 2], ids[:, -1] = config.im_end_token_id, config.im_start_token_id, config.im_end_token_id
    labels = ids.clone()
    labels[:, : -answer - 1] = -100
    return ids, labels


def variants(settings, device, dtype, scans=1, attention="sdpa", checkpointing=True):
    """{name: Variant} of a preset. All see the same voxels, words and labels."""
    photon, stock = models(settings["config"], device, dtype, attention, checkpointing)
    volumes = np.random.default_rng(0).random((scans, *settings["volume"]), dtype=np.float32)
    found = {}
    for name, model, patchify, options in (
        ("video", stock, frame_patches, {}),
        ("dense", photon, volume_patches, {"use_scheduler": False}),
        ("hard", photon, volume_patches, {"use_scheduler": True, "keep_ratio": KEPT}),
    ):
        patches, grids = zip(*(patchify(volume, model.config) for volume in volumes), strict=True)
        ids, labels = prompts(photon.config, visual_tokens(model.config, grids[0]), settings["text"], scans)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == photon.config.video_token_id).int() * 2,
            "pixel_values_videos": torch.from_numpy(np.concatenate(patches)).to(dtype),
            "video_grid_thw": torch.tensor(grids),
            "labels": labels,
        }
        inputs = {key: value.to(device) for key, value in inputs.items()}
        found[name] = Variant(model, inputs | options | {"use_cache": False}, grids[0])
    return found


# === A step, its memory, its operations ==============================================================================


def adamw(found):
    """One optimiser for all: parameters without a gradient, which the step's model does not have, stay as they are."""
    parameters = {id(p): p for variant in found.values() for p in variant.model.parameters()}
    return torch.optim.AdamW(parameters.values(), lr=1e-5, weight_decay=0.1, fused=True)  # the Trainer's default


def train_step(variant, optimizer):
    """Returns the loss and, with the cut, which visual tokens stayed (rows, V)."""
    output = variant.model(**variant.inputs)
    loss, keep_mask = output.loss, output.get("keep_mask")
    del output  # as in the Trainer, logits live on only where backward needs them
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), keep_mask


def held_bytes(model, optimizer):
    """Bytes of the weights and of their optimiser states."""
    total = 0
    for parameter in model.parameters():
        tensors = (parameter, *optimizer.state.get(parameter, {}).values())
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def allocated_bytes(function, device):
    """The most bytes that the function has allocated at a time, beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def layer_lengths(config, length, short):
    """Tokens in each decoder layer; `short` behind the cut."""
    cut = config.scheduler_layer + 1
    return [length] * cut + [short] * (config.text_config.num_hidden_layers - cut)


def step_operations(config, grid, lengths, checkpointing):
    """Multiply-adds times two of one scan's step: (vision forward, decoder forward, whole step)."""
    text, vision = config.text_config, config.vision_config
    tower, decoder = vision_operations(config, grid), operations(config, lengths)
    head = 2 * lengths[-1] * text.hidden_size * text.vocab_size
    patches = grid[0] * grid[1] * grid[2]
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    embedding = 2 * patches * pixels * vision.hidden_size
    whole = 3 * (tower + decoder + head) - embedding  # voxels have no gradient
    if checkpointing:
        merged = vision.hidden_size * vision.spatial_merge_size**2
        merger = 2 * patches // vision.spatial_merge_size**2 * (merged**2 + merged * vision.out_hidden_size)
        # a block's second run ends before its last product, which backward does not need
        last = patches * vision.hidden_size * vision.intermediate_size * vision.depth
        last += sum(lengths) * text.hidden_size * text.intermediate_size
        whole += tower - embedding - merger + decoder - 2 * last
    return tower, decoder, whole


# === Main ============================================================================================================


def measure(found, device, repeats, checkpointing):
    """Rows of the table, and seconds, operations, memory by name."""
    optimizer, photon = adamw(found), found["hard"].model.config
    steps = {name: partial(train_step, variant, optimizer) for name, variant in found.items()}
    masks = {name: step()[1] for name, step in steps.items()}  # optimiser states come into being
    extra = {name: allocated_bytes(step, device) for name, step in steps.items()}
    seconds = interleaved(steps, device, repeats)
    rows = []
    for name, variant in found.items():
        visual, text, scans = variant.visual, variant.text, len(variant.inputs["input_ids"])
        kept = visual if masks[name] is None else int(masks[name].sum()) // scans
        lengths = layer_lengths(photon, visual + text, kept + text)
        vision, decoder, whole = step_operations(variant.model.config, variant.grid, lengths, checkpointing)
        held = held_bytes(variant.model, optimizer)
        rows.append(
            {"step": name, "visual tokens": visual, "text tokens": text, "after the cut": kept + text,
             "vision GFLOP": scans * vision / 1e9, "decoder GFLOP": scans * decoder / 1e9,
             "step GFLOP": scans * whole / 1e9, "s": seconds[name], "it/s": 1 / seconds[name],
             "tokens/s": scans * (visual + text) / seconds[name], "GFLOP/s": scans * whole / 1e9 / seconds[name],
             "weights and states MiB": held / 2**20, "peak MiB": (held + extra[name]) / 2**20}
        )  # fmt: skip
    return rows


def ratios_of(rows):
    video, dense, hard = rows

    def on_top(row):
        return row["peak MiB"] - row["weights and states MiB"]

    return {
        "step_speedup_vs_video": video["s"] / hard["s"],
        "step_speedup_vs_video_bound": video["step GFLOP"] / hard["step GFLOP"],
        "step_speedup_vs_dense": dense["s"] / hard["s"],
        "step_speedup_vs_dense_bound": dense["step GFLOP"] / hard["step GFLOP"],
        "step_memory_vs_video": hard["peak MiB"] / video["peak MiB"],
        "step_memory_vs_video_without_weights": on_top(hard) / on_top(video),
        **PAPER,
    }


def main():
    options = arguments(
        __doc__,
        list(PRESETS),
        repeats={"type": int, "default": 5},
        scans={"type": int, "default": 1, "help": "with a question each, a step"},
        dtype={"choices": ["float32", "bfloat16"]},
        attention={"choices": ["sdpa", "flash_attention_2", "eager"], "default": "sdpa"},
        keep_activations={"action": "store_true", "help": "no gradient checkpointing"},
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    checkpointing = not options.keep_activations
    found = variants(PRESETS[options.preset], device, dtype, options.scans, options.attention, checkpointing)
    rows = measure(found, device, options.repeats, checkpointing)
    report(device, rows, ratios_of(rows), options.json)


if __name__ == "__main__":
    main()
