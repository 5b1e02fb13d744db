"""The authors' numbers: their tiny checkpoint converted by `convert_photon.py`, loaded through Auto classes.

`fixtures/official_a` holds the checkpoint and what the release (commit 88c3755) computed from it in float32.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from conftest import FIXTURE, ROOT, run_fresh
from photon.objectives_photon import answer_losses, band_losses
from photon.processing_photon import PhotonVolumeProcessor

META = json.loads((FIXTURE / "meta.json").read_text())
PROMPT = META["prompt_length"]
FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
n = int(sys.argv.pop())
folder, fixture, out = sys.argv[1:]
e = load_file(fixture)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
scan = {k: e[k] for k in ("pixel_values_videos", "video_grid_thw")}
kinds = (e["input_ids"] == config.video_token_id).int() * 2
with torch.no_grad():
    position_ids, deltas = model.model.get_rope_index(e["input_ids"], kinds, video_grid_thw=e["video_grid_thw"])
    prompt = {"input_ids": e["input_ids"][:, :n], "mm_token_type_ids": kinds[:, :n], **scan}
    out1 = model(**prompt, output_hidden_states=True)
    hidden = base(**prompt).last_hidden_state
    g = model.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
                       output_logits=True, return_dict_in_generate=True)
    visual = model.model.get_video_features(**scan).pooler_output[0]
save_file({
    "position_ids": position_ids, "rope_deltas": deltas, "visual_embeds": visual, "infer.logits": out1.logits,
    "infer.saliency_logits": out1.saliency_logits, "infer.threshold": out1.threshold,
    "infer.keep_prob": out1.keep_prob, "infer.keep": out1.keep_mask,
    "infer.hidden_after_schedule_layer": out1.hidden_states[config.scheduler_layer + 1].contiguous(),
    "generate.tokens": g.sequences[:, n:].contiguous(), "generate.logits": torch.stack(g.logits, 1),
    "base": (hidden @ model.lm_head.weight.T).contiguous(),
}, out)
"""


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official") / "photon"
    source = FIXTURE / "official_checkpoint"
    command = [sys.executable, str(ROOT / "convert_photon.py"), "--official", str(source), "--output", str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder.parent)
    return folder


def test_inference_and_generation_in_a_fresh_process(converted, expected, tmp_path):
    run_fresh(FRESH, converted, FIXTURE / "expected.safetensors", tmp_path / "got.safetensors", PROMPT)
    got = load_file(tmp_path / "got.safetensors")
    for name in ("position_ids", "rope_deltas", "infer.keep", "generate.tokens"):
        assert torch.equal(got[name].long(), expected[name].long()), name
    for name in ("visual_embeds", "infer.logits", "infer.saliency_logits", "infer.threshold", "infer.keep_prob",
                 "infer.hidden_after_schedule_layer"):  # fmt: skip
        torch.testing.assert_close(got[name], expected[name], atol=1e-4, rtol=0, msg=name)
    torch.testing.assert_close(got["generate.logits"], expected["generate.logits"], atol=1e-3, rtol=0)
    torch.testing.assert_close(got["base"], expected["infer.logits"], atol=1e-4, rtol=0)


def our_name(name):
    return (
        name.replace("visual.vision_patch_embed", "model.visual.patch_embed")
        .replace("model.layers.1.atp.predictor", "model.language_model.scheduler.predictor")
        .replace("model.layers", "model.language_model.layers")
        .replace("model.embed_tokens", "model.language_model.embed_tokens")
    )


@pytest.mark.parametrize("phase", ["dense", "soft", "hard", "hard_taylor"])
def test_losses_and_gradients(converted, expected, phase):
    surrogate = "taylor" if phase == "hard_taylor" else "release"
    model = AutoModelForImageTextToText.from_pretrained(
        converted, trust_remote_code=True, dtype=torch.float32, surrogate=surrogate
    ).train()
    model.set_scheduler_phase(phase.split("_")[0])
    ids = expected["input_ids"]
    out = model(
        input_ids=ids,
        labels=expected["labels"],
        mm_token_type_ids=(ids == model.config.video_token_id).int() * 2,
        pixel_values_videos=expected["pixel_values_videos"],
        video_grid_thw=expected["video_grid_thw"],
        use_cache=False,
    )
    out.loss.backward()
    prefix = f"train.{phase}."
    for name in ("loss", "lm_loss", "band_loss"):
        torch.testing.assert_close(out[name], expected[prefix + name], atol=1e-4, rtol=0)
    assert torch.equal(out.keep_mask, expected[prefix + "keep"])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    listed = [name for name in expected if name.startswith(prefix + "grad.")]
    assert len(listed) >= 2
    for name in listed:
        got = gradients[our_name(name.removeprefix(prefix + "grad."))]
        error = (got - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-3, f"{name}: {error:.1e}"


def test_the_two_surrogates_push_the_threshold_apart(expected):
    name = "grad.model.layers.1.atp.predictor.mlp.2.bias"
    assert expected[f"train.hard.{name}"] < 0 < expected[f"train.hard_taylor.{name}"]


def test_regularisers(expected):
    """The release's functions take logits and labels in step, so nothing is shifted here."""
    losses = answer_losses
    band = band_losses
    for kind, name in ((1, "reg.robust"), (2, "reg.flip")):
        total, count = losses(expected["reg.logits"], expected["reg.labels"], torch.tensor([kind]))
        torch.testing.assert_close((total / count)[0], expected[name], atol=1e-5, rtol=1e-5)
    for i in range(3):
        margin = expected[f"reg.band.{i}.margin"]
        got = band((margin / 0.2).sigmoid(), torch.ones_like(margin, dtype=torch.bool), 0.3, 0.8).mean()
        torch.testing.assert_close(got, expected[f"reg.band.{i}.loss"], atol=1e-6, rtol=1e-5)


def test_patches_are_cut_as_the_release_cuts_them(expected):
    processor = PhotonVolumeProcessor(grid=list(expected["volume"].shape))
    got = torch.from_numpy(processor.patchify(expected["volume"].numpy()))
    assert torch.equal(got, expected["pixel_values_videos"])
