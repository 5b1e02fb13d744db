"""`surrogate="gate"`: keep probabilities as gates of attention logits, beside deletion and weights by hand."""

import pytest
import torch
from test_equivalence import flash_like
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import collate, text_row, three_rows, tiny_model
from photon.objectives_photon import gate_mask

ROWS = [*three_rows(answers=True), text_row(answer=(75, 76))]


def run(phase, attention="sdpa", **fields):
    model = tiny_model(attention=attention, **fields).train()
    model.set_scheduler_phase(phase)
    return model, model(**collate(ROWS))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_a_closed_gate_is_a_deleted_token(layer, attention):
    """With a temperature at which every keep probability is 0 or 1 the soft phase gives what the hard one gives."""
    fields = {"scheduler_layer": layer, "attention": attention, "keep_temperature": 1e-4}
    _, soft = run("soft", surrogate="gate", **fields)
    _, hard = run("hard", surrogate="gate", **fields)
    _, taylor = run("hard", surrogate="taylor", **fields)
    kept = soft.keep_mask.sum(-1)[:3] / soft.visual_count[:3]
    assert (kept > 0.1).all() and (kept < 1).all()
    torch.testing.assert_close(soft.lm_loss, hard.lm_loss, atol=2e-5, rtol=0)
    torch.testing.assert_close(hard.lm_loss, taylor.lm_loss, atol=1e-6, rtol=0)
    real = hard.keep_index >= 0
    torch.testing.assert_close(hard.logits[real], taylor.logits[real], atol=1e-5, rtol=1e-5)
    assert soft.logits.shape[1] > hard.logits.shape[1]
    _, scaled = run("soft", surrogate="taylor", **fields)
    assert abs(scaled.lm_loss - hard.lm_loss) > 1e-3  # weights of hidden states: the norms undo much of them


@pytest.mark.parametrize("phase", ["soft", "hard"])
@pytest.mark.parametrize("learn", [False, True])
def test_which_parameters_the_gates_teach(phase, learn):
    model, out = run(phase, surrogate="gate", saliency_gradient=learn)
    other, other_out = run(phase, surrogate="gate", saliency_gradient=not learn)
    assert torch.equal(other_out.lm_loss, out.lm_loss)
    out.lm_loss.backward()
    other_out.lm_loss.backward()
    assert model.model.language_model.scheduler.predictor.mlp[-1].bias.grad.abs() > 1e-6
    queries = [m.model.language_model.layers[m.config.scheduler_layer].self_attn.q_proj for m in (model, other)]
    assert (queries[0].weight.grad - queries[1].weight.grad).abs().max() > 1e-5


def test_the_soft_gradient_is_the_slope_of_the_loss():
    model, out = run("soft", surrogate="gate")
    out.lm_loss.backward()
    bias = model.model.language_model.scheduler.predictor.mlp[-1].bias
    losses = []
    for step in (0.01, -0.01):
        with torch.no_grad():
            bias += step
            losses.append(float(model(**collate(ROWS)).lm_loss))
            bias -= step
    assert float(bias.grad) == pytest.approx((losses[0] - losses[1]) / 0.02, rel=0.02)


def test_a_gate_weighs_its_key():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 3, n, 4, generator=generator) for n in (5, 5, 5))
    weights = torch.rand(2, 5, generator=generator)
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    seen[1, 0, :, 0] = False  # padding on the left; its own row sees nothing
    for mask in (seen, torch.zeros(2, 1, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)):
        gated = gate_mask(mask, weights.log())
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=gated)
        scores = (query @ key.transpose(-1, -2) / 2).exp() * weights[:, None, None] * seen
        by_hand = scores / scores.sum(-1, keepdim=True) @ value
        torch.testing.assert_close(found[0], by_hand[0])
        torch.testing.assert_close(found[1, :, 1:], by_hand[1, :, 1:])
        assert found.isfinite().all()
    causal = gate_mask(None, weights.log())
    assert torch.equal(causal, gate_mask(torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(), weights.log()))


def test_flash_attention_is_refused():
    model = tiny_model(surrogate="gate")
    decoder = model.model.language_model
    decoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 does not take"):
        decoder._gated(None, torch.zeros(1, 3), torch.zeros(1, 3, 32), {})


@pytest.mark.parametrize("phase", ["soft", "hard"])
@pytest.mark.parametrize("surrogate", ["gate", "exact"])
def test_gated_flash_attention_is_gated_sdpa(monkeypatch, surrogate, phase):
    """The appended channel, through a stand-in for the kernel that takes what the kernel takes."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_like)
    fields = {"surrogate": surrogate, "saliency_gradient": True}
    if surrogate == "exact":
        fields |= {"saliency_scale": "standard", "keep_budget": 0.4}
    results = []
    for attention in ("sdpa", "gated_flash_attention_2"):
        model = tiny_model(**fields).train()
        model.config._attn_implementation = attention  # set_attn_implementation would look for a CUDA kernel
        model.set_scheduler_phase(phase)
        torch.manual_seed(2)
        out = model(**collate(ROWS))
        out.lm_loss.backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (sdpa, grads), (flash, flash_grads) = results
    assert torch.equal(sdpa.keep_mask, flash.keep_mask)
    torch.testing.assert_close(flash.lm_loss, sdpa.lm_loss, atol=1e-5, rtol=0)
    assert grads.keys() == flash_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(flash_grads[name], grad, atol=2e-5, rtol=1e-3, msg=name)
