"""Conversion: from Qwen2.5-VL, and what it refuses."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import convert_photon
from conftest import (
    FIXTURE,
    IM_END,
    IMAGE,
    ROOT,
    V_END,
    V_START,
    VIDEO,
    VOCABULARY,
    collate,
    run_fresh,
    three_rows,
    tiny_config,
    tiny_model,
)
from photon.conversion import PATCH_EMBED

OFFICIAL = FIXTURE / "official_checkpoint"


def qwen(folder, tokenizer=False):
    """A tiny random Qwen2.5-VL as published: 2 frames, 3 channels, old key names."""
    config = tiny_config().to_dict()
    text = config["text_config"] | {"vocab_size": 512 if tokenizer else VOCABULARY}
    vision = config["vision_config"] | {"in_channels": 3, "temporal_patch_size": 2}
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": V_START,
        "vision_end_token_id": V_END,
    }
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1:].numel() ** -0.5)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
        )
    )
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / name, folder)
    return model.eval()


def test_a_constant_volume_answers_like_the_grey_image(tmp_path):
    stock = qwen(tmp_path / "qwen")
    convert_photon.main(["--qwen", str(tmp_path / "qwen"), "--output", str(tmp_path / "photon")])
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "photon", trust_remote_code=True, dtype=torch.float32
    ).eval()
    h, w = 4, 6
    plane = torch.randn(h * w, 14, 14, generator=torch.Generator().manual_seed(2))  # patches of one grey slice
    image = plane[:, None, None].expand(-1, 3, 2, -1, -1).reshape(h * w, -1)
    volume = plane[:, None].expand(-1, 14, -1, -1).reshape(h * w, -1)
    grid = torch.tensor([[1, h, w]])
    visual = [VIDEO] * (h * w // 4)
    ids = torch.tensor([[11, 12, V_START, *visual, V_END, 20, 21, 22, IM_END]])
    kinds = (ids == VIDEO).int() * 2
    position_ids, _ = model.model.get_rope_index(ids, kinds, video_grid_thw=grid)
    with torch.no_grad():
        ours = model(
            input_ids=ids, pixel_values_videos=volume, video_grid_thw=grid, mm_token_type_ids=kinds,
            position_ids=position_ids, use_scheduler=False,
        )  # fmt: skip
        theirs = stock(
            input_ids=ids.where(ids != VIDEO, IMAGE), pixel_values=image, image_grid_thw=grid,
            position_ids=position_ids,
        )  # fmt: skip
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    assert model.config.surrogate == "exact" and not model.config.evict_early_layers
    with torch.no_grad():
        asked = {"input_ids": ids, "pixel_values_videos": volume, "video_grid_thw": grid, "mm_token_type_ids": kinds}
        assert model(**asked).keep_mask.all()  # until it is trained, its scheduler keeps everything
    predictor = model.model.language_model.scheduler.predictor
    assert predictor.mlp[-1].bias.item() == -5.0


def test_random_patch_embedding(tmp_path):
    qwen(tmp_path / "qwen")
    for name, extra in (("a", []), ("b", ["--random-patch-embed"])):
        convert_photon.main(["--qwen", str(tmp_path / "qwen"), "--output", str(tmp_path / name), *extra])
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    different = {key for key in a if not torch.equal(a[key], b[key])}
    assert PATCH_EMBED in different
    assert all(key == PATCH_EMBED or "scheduler" in key for key in different)


def test_the_folder_is_complete(tmp_path):
    """Processor and all code, loaded in a fresh process; the scan's scaling follows the source's normalisation."""
    qwen(tmp_path / "qwen", tokenizer=True)
    convert_photon.main(["--qwen", str(tmp_path / "qwen"), "--output", str(tmp_path / "photon")])
    run_fresh(
        """
import sys
import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert abs(processor.image_processor.mean - 0.4491643) < 1e-6 and abs(processor.image_processor.std - 0.2685697) < 1e-6
assert processor.image_processor.grid == [140, 280, 280] and processor.image_processor.scaling == "window"
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = processor.tokenizer
assert model.config.im_end_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
assert model.config.user_token_id == tokenizer.convert_tokens_to_ids("user")
assert model.config.video_token_id == tokenizer.convert_tokens_to_ids("<|video_pad|>")
z, y, x = np.mgrid[:20, :30, :40]
array = np.where((z - 10) ** 2 + (y - 15) ** 2 + (x - 20) ** 2 < 80, 40, -1000).astype("int16")
ask = pipeline("volume-question-answering", model=sys.argv[1], trust_remote_code=True)
answer = ask((array, np.diag([9, 8, 7, 1.0])), "Where?", max_new_tokens=2)
assert answer["tokens_seen"] == 1000, answer
""",
        tmp_path / "photon",
    )


def test_the_release_sets_its_behaviour(tmp_path):
    convert_photon.main(["--official", str(OFFICIAL), "--output", str(tmp_path / "photon")])
    config = json.loads((tmp_path / "photon" / "config.json").read_text())
    assert config["evict_early_layers"] is True and config["surrogate"] == "release"
    assert config["saliency"] == "logits" and config["scheduler_layer"] == 1
    assert config["im_end_token_id"] == 501 and config["user_token_id"] is None
    assert (tmp_path / "photon" / "pipeline_photon.py").exists()
    assert not (tmp_path / "photon" / "convert_photon.py").exists()


def damaged(tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(OFFICIAL, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return ["--official", str(folder), "--output", str(tmp_path / "out")]


def refused(capsys, arguments, message):
    """The command ends with exit code 2 and one line that matches."""
    with pytest.raises(SystemExit) as stopped:
        convert_photon.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message, error) and "Traceback" not in error


CHANGES = {
    "missing": (lambda w: w.pop("model.layers.3.mlp.up_proj.weight"), "1 weights are missing.*layers.3.mlp.up_proj"),
    "missing vision": (
        lambda w: w.pop("visual.blocks.0.norm1.weight"),
        "1 weights are missing.*visual.blocks.0.norm1",
    ),
    "half a scheduler": (
        lambda w: w.pop("model.layers.1.atp.predictor.mlp.2.bias"),
        "1 weights are missing.*mlp.2.bias",
    ),
    "unexpected": (lambda w: w.update({"model.extra.weight": torch.zeros(2)}), "1 weights are unexpected.*extra"),
    "two schedulers": (
        lambda w: w.update({"model.layers.2.atp.predictor.mlp.2.bias": torch.zeros(1)}),
        r"schedulers at layers \[1, 2\]",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_out_of_place_stops_it(tmp_path, capsys, name):
    change, message = CHANGES[name]
    refused(capsys, damaged(tmp_path, change), message)
    assert not (tmp_path / "out").exists()


def test_another_shape_stops_it(tmp_path, capsys):
    def change(weights):
        weights["model.norm.weight"] = torch.ones(5)

    refused(capsys, damaged(tmp_path, change), "1 weights are of another shape.*language_model.norm.weight")


def test_the_first_stage_has_no_scheduler_yet(tmp_path):
    def change(weights):
        for key in [key for key in weights if ".atp." in key]:
            del weights[key]

    convert_photon.main(damaged(tmp_path, change))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["model.language_model.scheduler.predictor.mlp.2.bias"].item() == -5.0


def test_arguments(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in [
        (["--official", str(OFFICIAL), "--output", str(tmp_path / "full")], "not empty"),
        (["--official", str(OFFICIAL), "--random-patch-embed", "--output", str(tmp_path / "x")], "is for --qwen"),
        (["--official", "a", "--qwen", "b", "--output", "c"], "not allowed with"),
    ]:
        with pytest.raises(SystemExit):
            convert_photon.main(arguments)
        assert message in capsys.readouterr().err
    refused(capsys, ["--official", str(OFFICIAL), "--revision", "x", "--output", str(tmp_path / "y")], "--revision")
    (tmp_path / "empty").mkdir()
    refused(capsys, ["--qwen", str(tmp_path / "empty"), "--output", str(tmp_path / "z")], "no .safetensors")
    refused(capsys, ["--qwen", str(ROOT), "--output", str(tmp_path / "z")], "model_type 'photon'")


def as_released(model, folder):
    """A model in the layout of the release: its names, a flat config, two files."""
    folder.mkdir()
    config = model.config.to_dict()
    text, vision = config["text_config"], config["vision_config"]
    layer = config["scheduler_layer"]
    renamed = {f"model.layers.{layer}.atp.pos_proj.weight": torch.zeros(text["hidden_size"], 1)}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.scheduler.", f"model.layers.{layer}.atp.")
        name = name.replace("model.visual.patch_embed", "visual.vision_patch_embed")
        renamed[name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")] = tensor.clone()
    names = sorted(renamed)
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = folder / f"model-0000{number}-of-00002.safetensors"
        save_file({name: renamed[name] for name in part}, file, metadata={"format": "pt"})
    index = {name: f"model-0000{1 if i < half else 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    rope = text["rope_parameters"]
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "eos_token_id")  # fmt: skip
    tower = {key: value for key, value in vision.items() if key not in ("in_channels", "model_type", "dtype")}
    tower.pop("rope_parameters")
    ids = {
        key: config[key]
        for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    flat = {key: text[key] for key in kept} | ids | {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": config["tie_word_embeddings"],
        "use_sliding_window": False,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_config": tower | {"in_chans": 1, "model_type": "qwen2_5_vl"},
        "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(flat))


@pytest.mark.parametrize("fields", [{"layers": 8}, {"layers": 4, "scheduler_layer": 2, "tie_word_embeddings": True}])
def test_another_checkpoint_of_the_release(tmp_path, fields):
    """Other sizes, untied output weights, several files, a scheduler at another layer."""
    model = tiny_model(evict_early_layers=True, surrogate="release", **fields)
    as_released(model, tmp_path / "released")
    convert_photon.main(["--official", str(tmp_path / "released"), "--output", str(tmp_path / "photon")])
    again = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "photon", trust_remote_code=True, dtype=torch.float32
    ).eval()
    assert again.config.scheduler_layer == model.config.scheduler_layer
    inputs = collate(three_rows()[2:])
    with torch.no_grad():
        ours, theirs = again(**inputs), model(**inputs)
    assert torch.equal(ours.keep_mask, theirs.keep_mask) and torch.equal(ours.logits, theirs.logits)
