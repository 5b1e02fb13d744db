"""`surrogate="exact"`: the short graph's gradient is that of the full sequence with random gates.

python -m pytest tests/test_exact.py
"""

import math

import pytest
import torch

from conftest import collate, text_row, three_rows, tiny_config, tiny_model
from photon.scheduling_photon import budget_level, gate_offset, hard_concrete

ROWS = [*three_rows(answers=True), text_row(answer=(75, 76))]
EXACT = {
    "surrogate": "exact",
    "saliency_scale": "standard",
    "keep_budget": 0.3,
    "saliency_gradient": True,
    "band_low": 0.02,
}


def exact_model(attention="sdpa", **fields):
    model = tiny_model(attention=attention, **(EXACT | fields)).train()
    return model


def step(model, phase, seed=0, rows=ROWS):
    torch.manual_seed(seed)
    model.zero_grad()
    model.set_scheduler_phase(phase)
    out = model(**collate(rows))
    out.lm_loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("saliency", ["logits", "attention"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_the_cut_sequence_is_the_gated_one(layer, attention, saliency):
    """Loss, logits and every gradient, with the same noise: full length with gates, and with closed ones deleted."""
    model = exact_model(attention, scheduler_layer=layer, saliency=saliency)
    full, full_grad = step(model, "soft")
    cut, cut_grad = step(model, "hard")
    assert torch.equal(full.keep_mask, cut.keep_mask)
    share = cut.keep_mask.sum() / cut.visual_count.sum()
    assert 0.1 < share < 0.5
    torch.testing.assert_close(full.lm_loss, cut.lm_loss, atol=1e-5, rtol=0)
    index = cut.keep_index.clamp(min=0)[..., None].expand(-1, -1, full.logits.shape[-1])
    real = cut.keep_index >= 0
    torch.testing.assert_close(full.logits.gather(1, index)[real], cut.logits[real], atol=2e-5, rtol=1e-5)
    assert full_grad.keys() == cut_grad.keys()
    for name, grad in full_grad.items():
        scale = max(float(grad.abs().max()), 1e-3)
        assert float((grad - cut_grad[name]).abs().max()) < 1e-5 * max(scale, 1.0), name
    gates = model.model.language_model.layers[max(layer, 0)].self_attn.k_proj.weight
    assert gates.grad.abs().max() > 1e-5


@pytest.mark.parametrize("layer", [-1, 0])
def test_the_gradient_is_the_slope_of_the_loss(layer):
    """With the noise held the loss is continuous in the weights, so a central difference is a draw's gradient, and the
    mean over draws is the slope of the expected loss. The threshold's statistics and the level take part."""
    model = exact_model(scheduler_layer=layer).double()
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)).double() * 0.1
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in collate(ROWS).items()}
    model.set_scheduler_phase("hard")

    @torch.no_grad()
    def loss(offset, seed):
        torch.manual_seed(seed)
        weight.add_(offset * direction)
        value = float(model(**inputs).lm_loss)
        weight.sub_(offset * direction)
        return value

    slopes, gradients = [], []
    for seed in range(16):
        model.zero_grad()
        torch.manual_seed(seed)
        model(**inputs).lm_loss.backward()
        gradients.append(float((weight.grad * direction).sum()))
        slopes.append((loss(2e-3, seed) - loss(-2e-3, seed)) / 4e-3)
    slopes, gradients = torch.tensor(slopes), torch.tensor(gradients)
    assert slopes.abs().mean() > 0.01
    assert (slopes - gradients).abs().max() < 0.02 * slopes.abs().max()
    error = (slopes - gradients).std() / 16**0.5
    assert (slopes - gradients).mean().abs() < 3 * error + 1e-4


def test_a_part_of_the_gradient():
    """`gate_gradient` leaves draws and loss as they are; what learns from the gates alone gets that part."""
    found = []
    for part in (1.0, 0.25):
        model = exact_model(scheduler_layer=-1, gate_gradient=part)
        model.set_scheduler_phase("hard")
        torch.manual_seed(0)
        loss = model(**collate(ROWS)).lm_loss
        loss.backward()
        found.append((loss, [weight.grad for weight in model.model.language_model.scheduler.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    assert max(float(grad.abs().max()) for grad in found[0][1]) > 0
    for whole, part in zip(*(grads for _, grads in found), strict=True):
        torch.testing.assert_close(part, whole / 4, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("budget", [0.05, 0.3, 0.9])
def test_the_level_holds_the_budget(budget):
    config = tiny_config(**EXACT)
    scores = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    visual = torch.arange(300) < torch.tensor([300, 120, 7, 0])[:, None]
    level = budget_level(scores, visual, budget, config)
    kept = (config.gate_slope * (scores - level) - gate_offset(config)).sigmoid()[visual].mean()
    assert float(kept) == pytest.approx(budget, abs=1e-5)
    torch.manual_seed(0)
    logits = config.gate_slope * (scores - level)
    drawn = torch.stack([(hard_concrete(logits, config) > 0)[visual].float().mean() for _ in range(200)])
    assert float(drawn.mean()) == pytest.approx(budget, abs=4 * math.sqrt(budget * (1 - budget) / (427 * 200)))


def test_a_gate_is_open_as_often_as_its_probability_says():
    config = tiny_config(**EXACT)
    torch.manual_seed(3)
    for logit in (-3.0, 0.0, 1.5):
        gates = hard_concrete(torch.full((200_000,), logit), config)
        expected = 1 / (1 + math.exp(-(logit - 0.5 * math.log(0.1 / 1.1))))
        assert float((gates > 0).float().mean()) == pytest.approx(expected, abs=5e-3)
        assert float(gates.min()) >= 0 and float(gates.max()) <= 1


def test_a_key_has_its_gate_as_the_weight():
    """What is added to a visual key's logits is the gate's logarithm, so that its attention is multiplied by the gate:
    another function of the gate would be as exact, and of another objective."""
    model, schedules = exact_model(scheduler_layer=-1), []
    scheduler = model.model.language_model.scheduler

    def same_noise(*_):
        torch.manual_seed(5)

    scheduler.register_forward_pre_hook(same_noise)
    scheduler.register_forward_hook(lambda module, args, schedule: schedules.append(schedule))
    step(model, "soft")
    (schedule,) = schedules
    torch.manual_seed(5)
    gate = hard_concrete(schedule.keep_prob.logit() + gate_offset(model.config), model.config)  # (B, V)
    drawn = schedule.keep_mask & (gate > 0)  # a token that stays against its gate has none
    assert 20 < drawn.sum() < schedule.visual_count.sum() and ((gate > 0.1) & (gate < 0.9))[drawn].any()
    torch.testing.assert_close(schedule.log_gate[drawn].exp(), gate[drawn], atol=1e-4, rtol=1e-3)


def test_a_step_moves_which_tokens_are_kept_not_how_many():
    """The level's gradient is taken out: the expected share of the batch has none."""
    model = exact_model(scheduler_layer=-1)
    model.set_scheduler_phase("hard")
    torch.manual_seed(0)
    out = model(**collate(ROWS))
    total = out.keep_prob.sum()
    total.backward(retain_graph=True)
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    flat = float(weight.grad.abs().max())
    model.zero_grad()
    (out.keep_prob * torch.randn(out.keep_prob.shape)).sum().backward()
    assert flat < 1e-4 * float(weight.grad.abs().max())


def test_the_running_level_is_saved_and_serves_inference(tmp_path):
    model = exact_model(scheduler_layer=-1, keep_budget=0.25)
    for seed in range(6):
        step(model, "hard", seed)
    scheduler = model.model.language_model.scheduler
    assert int(scheduler.level_updates) == 6 and scheduler.running_level != 0
    model.eval()
    with torch.no_grad():
        inputs = collate(ROWS)
        out, again = model(**inputs), model(**inputs)
    assert torch.equal(out.logits, again.logits)  # no noise
    expected = (0.5 < out.keep_prob) & (torch.arange(out.keep_prob.shape[1]) < out.visual_count[:, None])
    floor = expected.sum(-1) == 0
    assert torch.equal(out.keep_mask[~floor], expected[~floor])
    share = float(out.keep_mask.sum() / out.visual_count.sum())
    assert 0.1 < share < 0.4
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(other(**inputs).keep_mask, out.keep_mask)
    scheduler.running_level += 1
    with torch.no_grad():
        assert model(**inputs).keep_mask.sum() < out.keep_mask.sum()


def test_the_budget_is_the_trainers():
    model = exact_model(scheduler_layer=-1)
    shares = []
    for budget in (1.0, 0.5, 0.1):
        model.set_keep_budget(budget)
        out, _ = step(model, "hard")
        shares.append(float(out.keep_prob.sum() / out.visual_count.sum()))
    assert shares == pytest.approx([1.0, 0.5, 0.1], abs=1e-4)
    with pytest.raises(ValueError, match="share is 0"):
        model.set_keep_budget(0)


@pytest.mark.parametrize("surrogate", ["release", "taylor", "gate"])
def test_the_budget_serves_the_other_surrogates(surrogate):
    model = exact_model(surrogate=surrogate, scheduler_layer=0)
    out, gradients = step(model, "hard")
    share = float(out.keep_prob.sum() / out.visual_count.sum())
    assert share == pytest.approx(0.3, abs=1e-4)
    assert torch.equal(out.keep_mask, out.keep_prob > 0.5)
    assert gradients["model.language_model.layers.0.self_attn.q_proj.weight"].abs().max() > 0


def test_dense_phase_and_text_alone_leave_the_level():
    model = exact_model(scheduler_layer=-1)
    out, _ = step(model, "dense")
    assert out.keep_index is None and int(model.model.language_model.scheduler.level_updates) == 0
    _, gradients = step(model, "hard", rows=[text_row(answer=(75, 76))])
    assert int(model.model.language_model.scheduler.level_updates) == 0
    assert "model.language_model.scheduler.predictor.mlp.2.bias" in gradients


def test_flipped_rows_and_checkpointing():
    model = exact_model(scheduler_layer=-1)
    plain, grad = step(model, "hard")
    model.gradient_checkpointing_enable()
    same, checkpointed = step(model, "hard")
    assert torch.equal(same.lm_loss, plain.lm_loss)
    for name, value in grad.items():
        torch.testing.assert_close(checkpointed[name], value, atol=1e-6, rtol=1e-5)
    torch.manual_seed(0)
    flipped = model(**collate(ROWS), objective=torch.tensor([0, 2, 0, 0]))
    assert torch.equal(flipped.keep_mask[0], plain.keep_mask[0])
    count = int(plain.visual_count[1])
    assert torch.equal(flipped.keep_mask[1, :count], ~plain.keep_mask[1, :count])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_budget": None}, "needs keep_budget"),
        ({"keep_budget": 0.0}, "expected a share above 0"),
        ({"saliency_scale": "minmax"}, 'needs saliency_scale="standard"'),
        ({"scheduler_layer": 3}, "Take a lower one"),
        ({"band_low": 0.5, "band_high": 0.6}, "Set band_weight=0"),
        ({"gate_low": 0.1}, "gates of exactly 0 and 1"),
        ({"budget_end_step": 10}, "hard_start_step or more, 8000"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    from huggingface_hub.errors import StrictDataclassError

    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**(EXACT | fields))
