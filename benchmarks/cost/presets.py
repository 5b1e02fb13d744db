"""The sizes that `efficiency.py` and `plan.py` know."""

import json

from common import ROOT
from photon.conversion import RELEASE

from .counting import Prompt

# the release's: the share of tokens is given here, and other ways to score and to learn differ by less than a percent
SCHEDULER = RELEASE | {"band_weight": 0.0}
CPU = SCHEDULER | {
    "text_config": {
        "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_key_value_heads": 1,
        "intermediate_size": 2064, "vocab_size": 8000, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    },
    "vision_config": {
        "depth": 5, "hidden_size": 320, "intermediate_size": 1080, "num_heads": 4, "out_hidden_size": 384,
        "window_size": 112, "fullatt_block_indexes": [4],
    },
    "tie_word_embeddings": True, "image_token_id": 7991, "video_token_id": 7992, "vision_start_token_id": 7993,
    "vision_end_token_id": 7994, "im_start_token_id": 7995, "im_end_token_id": 7996, "user_token_id": 7997,
}  # fmt: skip


def size(name):
    """The fields of configs/photon_NAME.json."""
    fields = json.loads((ROOT / "configs" / f"photon_{name}.json").read_text(encoding="utf-8"))
    return SCHEDULER | {key: value for key, value in fields.items() if key != "model_type"}


# volume: voxels along depth, height, width; lead, rest, question: tokens in front of the scan, behind it, and of the
# question among these; learned: tokens of an answer in training; rank: of adapters; patches: that the vision tower
# takes at a time in training; repeats, few: rounds of what is quick and of what is slow; growth: visual tokens;
# measured: up to how many of them everything is timed, prefilled: prefill is; beyond it is counted
GPU = {
    "volume": (140, 280, 280), "lead": 15, "rest": 18, "question": 8, "learned": 4, "rank": 64, "patches": 2000,
    "repeats": 9, "few": 3, "growth": (1000, 2000, 4000, 8000, 16000, 32000), "measured": 32000, "prefilled": 32000,
}  # fmt: skip
PRESETS = {
    "cpu": {
        "config": CPU, "volume": (140, 280, 140), "lead": 8, "rest": 9, "question": 3, "learned": 2, "rank": 12,
        "patches": 500, "repeats": 6, "few": 1, "growth": (1000, 2000, 4000, 8000, 16000, 32000), "measured": 2000,
        "prefilled": 8000,
    },
    "3b": {"config": size("3b"), **GPU},
    "7b": {"config": size("7b"), **GPU},
}  # fmt: skip
MARKS_BEHIND = 5  # tokens behind the question: the turn's end, a line break, the assistant's three


def prompt_of(settings, config, grid, learned=False):
    """The prompt about a scan of `grid` (t, h, w) patches; learned: with the answer of a training step."""
    visual = grid[0] * grid[1] * grid[2] // config.vision_config.spatial_merge_size**2
    rest = settings["rest"] + (settings["learned"] if learned else 0)
    return Prompt(tuple(grid), visual, settings["lead"], rest, settings["question"])
