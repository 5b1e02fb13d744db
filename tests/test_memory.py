"""What saves memory in training changes neither losses nor gradients."""

from types import SimpleNamespace

import pytest
import torch
from test_equivalence import flash_like
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import photon.objectives_photon as objectives
from conftest import collate, text_row, three_rows, tiny_model
from photon.objectives_photon import Objective
from photon.training.memory import save_memory


def gradients(model, inputs, **options):
    model.zero_grad()
    output = model(**inputs, use_cache=False, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(some, others):
    for name, gradient in some.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("phase", ["dense", "hard"])
@pytest.mark.parametrize("at_once", [1, 3, 128])
def test_losses_without_logits(phase, at_once, monkeypatch):
    """Rows of every kind, one of text alone; parts of one token, of some, and all at once."""
    monkeypatch.setattr(objectives, "TOKENS_AT_ONCE", at_once)
    model = tiny_model(scheduler_layer=1).train()
    model.set_scheduler_phase(phase)
    inputs = collate([*three_rows(answers=True), text_row((60, 61))])
    inputs["objective"] = torch.tensor([Objective.ANSWER, Objective.ROBUST, Objective.FLIP, Objective.ANSWER])
    whole, expected = gradients(model, inputs)
    few, found = gradients(model, inputs, skip_logits=True)
    assert few.logits is None and whole.logits is not None
    for name in ("loss", "lm_loss", "band_loss"):
        torch.testing.assert_close(few[name], whole[name], atol=1e-6, rtol=1e-6)
    assert_same_gradients(expected, found)
    with torch.no_grad():  # without labels there is nothing else to give
        inputs.pop("labels")
        assert model.eval()(**inputs, skip_logits=True).logits is not None


def test_logits_are_made_where_there_is_a_label(monkeypatch):
    model = tiny_model().train()
    inputs, made = collate(three_rows(answers=True)), []
    model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.shape[:-1].numel()))
    monkeypatch.setattr(objectives, "TOKENS_AT_ONCE", 4)
    model(**inputs, use_cache=False, skip_logits=True)
    assert made == [4, 4, 2] and sum(made) == int((inputs["labels"] != -100).sum())


def test_a_batch_without_answers_reaches_the_head():
    """A rank whose batch has nothing to learn must take part in the reduction."""
    model = tiny_model().train()
    inputs = collate(three_rows(answers=True))
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    model(**inputs, use_cache=False, skip_logits=True).loss.backward()
    assert model.lm_head.weight.grad is not None and not model.lm_head.weight.grad.any()


@pytest.mark.parametrize("limit", [1, 24, 40, 60, 1000])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_vision_in_parts(limit, checkpointed):
    """Volumes of unlike grids, one of them in two prompts."""
    inputs = collate([*three_rows(answers=True), text_row((60, 61))])
    inputs["volume_index"] = torch.arange(4)
    model = tiny_model().train()
    expected = gradients(model, inputs)
    sizes = []
    model.model.visual.patch_embed.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    options = {"vision_checkpointing": checkpointed, "gradient_checkpointing": False, "fsdp": None, "deepspeed": None}
    save_memory(model, SimpleNamespace(**options, vision_patches=limit))
    found = gradients(model, inputs)
    torch.testing.assert_close(found[0].loss, expected[0].loss, atol=1e-6, rtol=1e-6)
    assert_same_gradients(expected[1], found[1])
    slabs = [24, 24, 24, 24, 24, 48, 32, 32, 32, 32, 32]
    assert sum(sizes) == sum(slabs) and max(sizes) <= max(limit, 48)
    assert len(sizes) == {1: 11, 24: 11, 40: 11, 60: 9, 1000: 1}[limit]
    sizes.clear()
    with torch.no_grad():
        model.eval()(**inputs)
    assert len(sizes) == 1  # all at once where nothing is held for the way back


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("surrogate", ["taylor", "exact"])
def test_rows_of_unlike_length_are_packed(layer, surrogate, monkeypatch):
    """With flash attention (a stand-in) the layers above the cut see no padding; losses and gradients stay."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_like)
    fields = {"scheduler_layer": layer, "surrogate": surrogate}
    if surrogate == "exact":
        fields |= {"saliency_scale": "standard", "keep_budget": 0.4, "saliency_gradient": True}
    inputs, results, shapes = collate(three_rows(answers=True)), [], []
    for attention in ("sdpa", "gated_flash_attention_2"):
        model = tiny_model(**fields).train()
        model.config._attn_implementation = attention  # set_attn_implementation would look for a CUDA kernel
        model.set_scheduler_phase("hard")
        for decoder_layer in model.model.language_model.layers:
            decoder_layer.mlp.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
        torch.manual_seed(2)
        results.append(gradients(model, inputs))
    (padded, expected), (packed, found) = results
    assert torch.equal(padded.keep_index, packed.keep_index)
    kept = (padded.keep_index >= 0).sum(-1)
    assert len(set(kept.tolist())) == 3  # or the test shows less
    layers, width = len(shapes) // 2, model.config.text_config.hidden_size
    below, above = shapes[layers : layers + layer + 1], shapes[layers + layer + 1 :]
    assert below == shapes[: layer + 1] and above == [(1, int(kept.sum()), width)] * (layers - layer - 1)
    torch.testing.assert_close(packed.loss, padded.loss, atol=1e-5, rtol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-3, msg=name)


def test_rows_of_unlike_length_are_packed_for_flex_attention():
    """Forward alone: on a CPU flex attention has no way back."""
    inputs, results, shapes = collate(three_rows(answers=True)), [], []
    for attention in ("sdpa", "flex_attention"):
        model = tiny_model(scheduler_layer=0).train()
        model.model.language_model.set_attn_implementation(attention)
        model.set_scheduler_phase("hard")
        top = model.model.language_model.layers[-1].mlp
        top.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling takes a minute
            results.append(model(**inputs, use_cache=False))
    padded, packed = results
    assert torch.equal(padded.keep_index, packed.keep_index)
    kept = (padded.keep_index >= 0).sum(-1)
    assert len(set(kept.tolist())) == 3 and shapes[0][:2] == padded.keep_index.shape
    assert shapes[1] == (1, int(kept.sum()), shapes[0][-1])
    torch.testing.assert_close(packed.loss, padded.loss, atol=1e-5, rtol=0)


def test_attention_saliency_holds_one_head_at_a_time():
    """No tensor of the size of heads, question and visual tokens is held for the way back."""
    fields = {"saliency": "attention", "saliency_gradient": True, "scheduler_layer": 1}
    model = tiny_model(**fields).train()
    model.set_scheduler_phase("hard")
    inputs = collate(three_rows(answers=True))
    held = []
    scheduler = model.model.language_model.scheduler
    hooks = []

    def begin(module, args):
        hooks.append(torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t))
        hooks[-1].__enter__()

    def end(module, args, output):
        hooks[-1].__exit__(None, None, None)

    scheduler.register_forward_pre_hook(begin)
    scheduler.register_forward_hook(end)
    output = model(**inputs, use_cache=False)
    visual, question = output.keep_mask.shape[1], 11  # of the longest question
    heads = model.config.text_config.num_attention_heads
    pairs = 3 * question * visual
    assert sum(n for n in held if n % pairs == 0) < heads * pairs
    output.loss.backward()
