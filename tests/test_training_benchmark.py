"""benchmarks/training.py at a tiny size: the three steps do the same task, and what it counts is what is done."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from conftest import ROOT

CPU, NAMES = torch.device("cpu"), ["video", "dense", "hard"]
LAYERS, WIDTH, WORDS, TEXT = 4, 48, 128, 23
# windows of 4 x 4 patches that the grid fills: 14 x 8 x 4 patches as a video, 2 x 8 x 4 as a volume
SETTINGS = {
    "volume": (28, 112, 56),
    "text": TEXT,
    "config": {
        "text_config": {
            "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 6, "num_key_value_heads": 2,
            "intermediate_size": 80, "vocab_size": WORDS, "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "out_hidden_size": WIDTH,
            "window_size": 56, "fullatt_block_indexes": [1],
        },
        "tie_word_embeddings": True, "image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102,
        "vision_end_token_id": 103, "im_start_token_id": 104, "im_end_token_id": 105, "user_token_id": 3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def training():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("training")


def variants(training, **options):
    return training.variants(SETTINGS, CPU, torch.float32, **options)


def test_same_question_same_labels(training):
    """Except for the number of scan tokens; two scans, each with a question of its own."""
    found = variants(training, scans=2)
    assert list(found) == NAMES
    assert {name: (v.visual, v.text) for name, v in found.items()} == {
        "video": (14 * 8 * 4 // 4, TEXT), "dense": (16, TEXT), "hard": (16, TEXT),
    }  # fmt: skip
    words, answers = [], []
    for variant in found.values():
        ids, labels = variant.inputs["input_ids"], variant.inputs["labels"]
        assert ((ids == 101).sum(-1) == variant.visual).all()
        words.append(ids[ids != 101].view(2, TEXT))
        learned = labels != -100
        assert torch.equal(labels[learned], ids[learned])
        answers.append(labels[learned].view(2, -1))
    assert all(torch.equal(words[0], other) for other in words[1:])
    assert all(torch.equal(answers[0], other) for other in answers[1:])
    assert answers[0].shape == (2, TEXT // 5 + 1) and (answers[0][:, -1] == 105).all()
    assert not torch.equal(words[0][0], words[0][1])
    with pytest.raises(ValueError, match="text is 17 tokens; expected 18 or more"):
        training.prompts(found["hard"].model.config, 16, 17, 1)


def test_same_voxels(training):
    found = variants(training, scans=2)
    frames, patches = (found[name].inputs["pixel_values_videos"] for name in ("video", "hard"))
    assert torch.equal(patches, found["dense"].inputs["pixel_values_videos"])
    red, green, blue = frames.view(2, -1, 3, 2 * 14 * 14).unbind(2)
    assert torch.equal(red, green) and torch.equal(red, blue)
    for scan in range(2):  # each voxel once; random voxels, so hardly two alike
        assert torch.equal(red[scan].flatten().sort().values, patches.view(2, -1)[scan].sort().values)
    assert not torch.equal(patches.view(2, -1)[0], patches.view(2, -1)[1])


def test_frames_lie_as_qwens_processor_lays_them(training):
    _, config = training.configs(SETTINGS["config"])
    picture = np.random.default_rng(1).integers(0, 256, (112, 56), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False)
    wanted = processor(np.repeat(picture[..., None], 3, axis=-1), return_tensors="np")  # one picture is two frames
    patches, grid = training.frame_patches(np.stack([picture, picture]).astype(np.float32), config)
    np.testing.assert_array_equal(patches, wanted["pixel_values"])
    assert [grid] == [tuple(row) for row in wanted["image_grid_thw"].tolist()]
    slices = np.broadcast_to(np.arange(6, dtype=np.float32)[:, None, None], (6, 112, 56))
    patches, grid = training.frame_patches(slices, config)
    assert grid == (3, 8, 4)
    depth = patches.reshape(3, 8 * 4, 3, 2, 14 * 14)  # t, place, channel, frame, pixel
    np.testing.assert_array_equal(depth, np.broadcast_to(np.arange(6).reshape(3, 1, 1, 2, 1), depth.shape))


def test_steps_train_what_is_theirs(training):
    found = variants(training)
    optimizer = training.adamw(found)
    named = {name: dict(v.model.named_parameters()) for name, v in found.items()}
    photon, stock = named["hard"], named["video"]
    shared = {name for name in photon if photon[name] is stock.get(name)}
    patch = "model.visual.patch_embed.proj.weight"
    scheduler = {name for name in photon if ".scheduler." in name}
    assert len(scheduler) == 4 and photon.keys() - shared == {patch} | scheduler and stock.keys() - shared == {patch}
    everything = {f"photon {n}": p for n, p in photon.items()} | {f"stock {patch}": stock[patch]}
    gradients = {}

    @optimizer.register_step_pre_hook
    def note(*_):
        gradients.update({n: 0 if p.grad is None else p.grad.abs().max() for n, p in everything.items()})

    for name, variant in found.items():
        before = {n: p.detach().clone() for n, p in everything.items()}
        loss, mask = training.train_step(variant, optimizer)
        assert loss.isfinite() and abs(float(loss) - np.log(WORDS)) < 1.5  # an untrained model knows nothing
        changed = {n for n, p in everything.items() if not torch.equal(p, before[n])}
        idle = {f"photon {n}" for n in scheduler | {patch}} if name == "video" else {f"stock {patch}"}
        assert not changed & idle
        learning = {n for n, gradient in gradients.items() if gradient > 0}
        assert learning <= changed
        # the patch embedding of the variant and most of what is shared: not all, for a bias of keys has no say
        assert {f"stock {patch}" if name == "video" else f"photon {patch}"} <= learning
        assert len(learning & {f"photon {n}" for n in shared}) > 0.9 * len(shared)
        assert ({f"photon {n}" for n in scheduler} <= learning) == (name == "hard")
        assert all(p.grad is None for p in everything.values())
        if name == "hard":
            assert mask.shape == (1, 16) and mask.sum() == round(training.KEPT * 16)
        else:
            assert mask is None
        # float32: the weights and two moments; a count of steps each
        model = variant.model
        if name == "video":
            numbers = sum(p.numel() for p in model.parameters())
            assert training.held_bytes(model, optimizer) == 12 * numbers + 4 * len(list(model.parameters()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_done(training, checkpointing):
    """Against PyTorch's own count. Eager attention does the whole square, of which the bound counts the causal half.
    Not in the bound: what the scheduler does, here 2 thousandths of the step."""
    found = variants(training, attention="eager", checkpointing=checkpointing)
    optimizer, config = training.adamw(found), found["hard"].model.config
    for name, variant in found.items():
        with FlopCounterMode(display=False) as counter:
            _, mask = training.train_step(variant, optimizer)
        kept = variant.visual if mask is None else int(mask.sum())
        lengths = training.layer_lengths(config, variant.visual + TEXT, kept + TEXT)
        assert lengths == [variant.visual + TEXT] + [kept + TEXT] * 3
        *forward, whole = training.step_operations(variant.model.config, variant.grid, lengths, checkpointing)
        half = sum(2 * n * n * WIDTH for n in lengths)
        runs = 4 if checkpointing else 3
        ratio = counter.get_total_flops() / (whole + runs * half)
        assert abs(ratio - 1) < (0.01 if name == "hard" else 1e-4), (name, ratio)
        assert 2 * sum(forward) < whole


def test_the_full_size_is_the_papers(training):
    """7.0K tokens for a scan as a video, 1.0K for Photon; operations of one forward in 10^12."""
    full = training.PRESETS["3b"]
    photon, stock = training.configs(full["config"])
    depth, height, width = full["volume"]
    grids = {"video": (depth // 2, height // 14, width // 14), "dense": (depth // 14, height // 14, width // 14)}
    grids["hard"] = grids["dense"]
    wanted = {"video": (7000, 35, 47), "dense": (1000, 5.0, 6.2), "hard": (1000, 5.0, 3.5)}
    assert photon.scheduler_layer == 8 and stock.text_config.num_hidden_layers == 36
    for name, (tokens, vision, decoder) in wanted.items():
        config = stock if name == "video" else photon
        assert training.visual_tokens(config, grids[name]) == tokens
        short = round(training.KEPT * tokens) if name == "hard" else tokens
        lengths = training.layer_lengths(photon, tokens + full["text"], short + full["text"])
        found = training.step_operations(config, grids[name], lengths, True)
        assert np.allclose(np.array(found[:2]) / 1e12, (vision, decoder), rtol=0.05), (name, found)
    small, tiny = (training.PRESETS["cpu"][key] for key in ("volume", "text"))
    assert np.prod(small) * 4 == np.prod(full["volume"]) and tiny * 4 == full["text"]  # a quarter of the tokens


def test_memory_is_the_most_at_a_time(training):
    def function():
        first = torch.empty(1 << 20)  # 4 MiB
        second = torch.empty(2 << 20)  # 8 MiB
        del first
        return second, torch.empty(3 << 18)  # 3 MiB: 12 at first, 11 at last

    assert training.allocated_bytes(function, CPU) == 12 << 20


def test_table_and_json(training, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results" / "training.json"
    monkeypatch.setitem(training.PRESETS, "tiny", SETTINGS)
    options = ["--preset", "tiny", "--repeats", "1", "--scans", "2", "--keep-activations", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["training.py", *options])
    training.main()
    result = json.loads(file.read_text(encoding="utf-8"))
    assert {"device", "date", "rows", "ratios"} == result.keys() and "threads" in result["device"]
    rows = {row["step"]: row for row in result["rows"]}
    assert list(rows) == NAMES
    assert {name: row["visual tokens"] for name, row in rows.items()} == {"video": 112, "dense": 16, "hard": 16}
    assert {name: row["after the cut"] - TEXT for name, row in rows.items()} == {"video": 112, "dense": 16, "hard": 6}
    for row in rows.values():
        assert row["text tokens"] == TEXT
        assert row["peak MiB"] > row["weights and states MiB"] * 4 / 3  # the gradients at least
        assert row["tokens/s"] == pytest.approx(2 * (row["visual tokens"] + TEXT) * row["it/s"])
    video, hard, ratios = rows["video"], rows["hard"], result["ratios"]
    assert ratios["step_speedup_vs_video"] == pytest.approx(video["s"] / hard["s"])
    assert ratios["step_speedup_vs_dense"] == pytest.approx(rows["dense"]["s"] / hard["s"])
    assert ratios["step_memory_vs_video"] == pytest.approx(hard["peak MiB"] / video["peak MiB"])
    assert ratios["step_memory_vs_video_without_weights"] < ratios["step_memory_vs_video"] < 1
    assert ratios["step_speedup_vs_video_bound"] > ratios["step_speedup_vs_dense_bound"] > 1
    assert ratios["paper_speedup"] == 5.7 and ratios["paper_memory"] == 0.26
    assert "step_speedup_vs_video = " in capsys.readouterr().out
