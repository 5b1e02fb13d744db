"""The scheduler against plain loops over the formulas, and its gradients against their definition."""

import math

import pytest
import torch

from conftest import (
    IM_END,
    IM_START,
    NEWLINE,
    USER,
    V_END,
    V_START,
    VIDEO,
    tiny_config,
)  # fmt: skip
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.objectives_photon import surrogate_gather
from photon.prompt_photon import question_mask
from photon.scheduling_photon import (
    Schedule,
    SchedulerInputs,
    TokenScheduler,
    masked_index,
    padded_places,
    stays,
)

B, H, G, D, Q, V = 2, 6, 2, 8, 5, 11


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    question = torch.ones(B, Q, dtype=torch.bool)
    visual = torch.ones(B, V, dtype=torch.bool)
    question[1, 3:] = visual[1, 7:] = False
    return randn(B, H, Q, D), randn(B, G, Q, D), randn(B, G, V, D), question, visual, D**-0.5


def by_hand(queries, question_keys, visual_keys, question, visual, scaling, row, attention=False):
    """u_j of one row, literally as the method's definition reads."""
    n, v = int(question[row].sum()), int(visual[row].sum())
    groups = H // G
    central = []
    for t in range(n):
        heads = [
            sum(
                max(0.0, float(queries[row, h, t] @ question_keys[row, h // groups, s]) * scaling)
                for s in range(n)
                if s != t
            )
            for h in range(H)
        ]
        central.append(sum(heads) / H)
    total = sum(central) if attention else max(1.0, sum(central))
    weights = [c / total for c in central]
    u = torch.zeros(v)
    for h in range(H):
        for t in range(n):
            logits = visual_keys[row, h // groups, :v] @ queries[row, h, t] * scaling
            u += weights[t] * (logits.softmax(-1) if attention else logits) / H
    return u


@pytest.mark.parametrize("saliency", ["logits", "attention"])
def test_saliency_and_threshold_by_hand(tensors, saliency):
    config = tiny_config(saliency=saliency)
    scheduler = TokenScheduler(32, config)
    torch.nn.init.normal_(scheduler.predictor.mlp[0].weight, generator=torch.Generator().manual_seed(1))
    schedule = scheduler(SchedulerInputs(*tensors))
    visual = tensors[4]
    for row in range(B):
        v = int(visual[row].sum())
        u = by_hand(*tensors, row=row, attention=saliency == "attention")
        torch.testing.assert_close(schedule.saliency_logits[row, :v], u, atol=1e-5, rtol=1e-4)
        s = (u - u.min()) / (u.max() - u.min() + 1e-8)
        torch.testing.assert_close(schedule.saliency[row, :v], s, atol=1e-5, rtol=1e-4)
        slog = u.sign() * u.abs().log1p()
        z = torch.stack([
            s.mean(), s.std(correction=0), s.min(), s.max(), s.quantile(0.25), s.quantile(0.5),
            u.mean(), u.std(correction=0), u.min(), u.max(), slog.mean(), slog.max(),
        ])  # fmt: skip
        theta = 0.9 * scheduler.predictor.mlp(z).sigmoid()
        torch.testing.assert_close(schedule.threshold[row], theta, atol=1e-5, rtol=1e-4)
        p = ((s - theta) / 0.2).sigmoid()
        torch.testing.assert_close(schedule.keep_prob[row, :v], p, atol=1e-5, rtol=1e-4)
        assert torch.equal(schedule.keep_mask[row, :v], p > 0.5)
    assert not schedule.keep_mask[~visual].any() and not schedule.keep_prob[~visual].any()
    assert schedule.visual_count.tolist() == [11, 7]


@pytest.mark.parametrize("saliency", ["logits", "attention"])
def test_the_saliency_carries_a_gradient_only_when_asked(tensors, saliency):
    queries, question_keys, visual_keys, question, visual, scaling = tensors
    names = ("queries", "question_keys", "visual_keys")
    weight = torch.randn(B, V, generator=torch.Generator().manual_seed(5)).double()

    def keep_prob(scheduler, *scores):
        return (scheduler(SchedulerInputs(*scores, question, visual, scaling)).keep_prob.double() * weight).sum()

    scores = [tensor.clone().requires_grad_() for tensor in (queries, question_keys, visual_keys)]
    detached = TokenScheduler(32, tiny_config(saliency=saliency))
    keep_prob(detached, *scores).backward()
    assert all(tensor.grad is None for tensor in scores)
    assert detached.predictor.mlp[-1].bias.grad.abs() > 0

    scheduler = TokenScheduler(32, tiny_config(saliency=saliency, saliency_gradient=True))
    scheduler.load_state_dict(detached.state_dict())
    torch.nn.init.zeros_(scheduler.predictor.mlp[0].weight)  # a fixed threshold: its statistics carry no gradient
    schedule = scheduler(SchedulerInputs(*scores, question, visual, scaling))
    assert torch.equal(schedule.saliency, detached(SchedulerInputs(*scores, question, visual, scaling)).saliency)
    assert not schedule.saliency.requires_grad and not schedule.saliency_logits.requires_grad
    keep_prob(scheduler, *scores).backward()
    chance = torch.Generator().manual_seed(6)
    for name, tensor in zip(names, scores, strict=True):
        direction = torch.randn(tensor.shape, generator=chance)
        with torch.no_grad():
            ends = [
                keep_prob(scheduler, *(t + step * direction if t is tensor else t for t in scores))
                for step in (1e-3, -1e-3)
            ]
        slope = float(ends[0] - ends[1]) / 2e-3
        assert float((tensor.grad * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=2e-4), name
        assert tensor.grad.abs().max() > 1e-4, name


def test_initial_threshold_keeps_nearly_all():
    model = PhotonForConditionalGeneration(tiny_config())
    predictor = model.model.language_model.scheduler.predictor
    assert predictor.mlp[-1].bias.item() == -5.0
    assert predictor(torch.zeros(1, 12)).item() == pytest.approx(0.9 / (1 + math.exp(5)), rel=0.05)


def test_at_least_one_token_stays(tensors):
    scheduler = TokenScheduler(32, tiny_config(threshold_max=1.0))
    torch.nn.init.constant_(scheduler.predictor.mlp[-1].bias, 40.0)  # threshold 1: nothing is above it
    schedule = scheduler(SchedulerInputs(*tensors))
    assert schedule.keep_mask.sum(-1).tolist() == [1, 1]
    assert torch.equal(schedule.keep_mask.int().argmax(-1), schedule.saliency.argmax(-1))


def test_token_budget_and_ties(tensors):
    scheduler = TokenScheduler(32, tiny_config())
    schedule = scheduler(SchedulerInputs(*tensors, keep_count=torch.tensor([4, 99])))
    assert schedule.keep_mask.sum(-1).tolist() == [4, 7]  # no more than there are
    top = schedule.saliency[0].topk(4).indices
    assert schedule.keep_mask[0, top].all()
    queries, question_keys, visual_keys, *rest = tensors
    same = visual_keys[:, :, :1].expand(-1, -1, V, -1)
    schedule = scheduler(SchedulerInputs(queries, question_keys, same, *rest, keep_count=torch.tensor([3, 2])))
    assert schedule.keep_mask[0].nonzero().flatten().tolist() == [0, 1, 2]  # the first of equal ones


def test_flipped_rows_keep_the_others(tensors):
    scheduler = TokenScheduler(32, tiny_config())
    torch.nn.init.constant_(scheduler.predictor.mlp[-1].bias, 0.0)
    plain = scheduler(SchedulerInputs(*tensors))
    flipped = scheduler(SchedulerInputs(*tensors, flip=torch.tensor([False, True])))
    visual = tensors[4]
    assert torch.equal(flipped.keep_mask[0], plain.keep_mask[0])
    assert torch.equal(flipped.keep_mask[1], visual[1] & ~plain.keep_mask[1]) and flipped.keep_mask[1].any()


def test_no_gradient_reaches_the_saliency(tensors):
    queries, question_keys, visual_keys, *rest = tensors
    leaves = [t.clone().requires_grad_() for t in (queries, question_keys, visual_keys)]
    scheduler = TokenScheduler(32, tiny_config())
    scheduler(SchedulerInputs(*leaves, *rest)).keep_prob.sum().backward()
    assert all(leaf.grad is None for leaf in leaves)
    assert all(parameter.grad is not None for parameter in scheduler.parameters())


def gather_case(surrogate):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 9, 4, generator=generator).double().requires_grad_()
    visual_mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0, 0]]).bool()
    attention = torch.tensor([[1] * 9, [0] + [1] * 8]).bool()
    keep = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 0, 0]]).bool()
    keep_prob = torch.rand(2, 5, generator=generator).double().requires_grad_()
    index, visual = masked_index(visual_mask)
    places = padded_places(stays(visual_mask, keep, attention))
    schedule = Schedule(keep, keep_prob, None, None, None, visual.sum(-1))
    rule = tiny_config(surrogate=surrogate, surrogate_std_floor=1e-6)
    out = surrogate_gather(hidden, schedule, index, visual, places, rule)
    return hidden, keep_prob, keep, index, visual, places, out


def test_the_cut_pads_on_the_left_and_keeps_order():
    hidden, *_, places, out = gather_case("taylor")
    assert places.tolist() == [[0, 1, 4, 5, 6, 7, 8], [-1, 1, 2, 4, 6, 7, 8]]
    assert torch.equal(out[0, 1], hidden[0, 1]) and not out[1, 0].any()


@pytest.mark.parametrize("surrogate", ["release", "taylor"])
def test_surrogate_gradient_by_hand(surrogate):
    hidden, keep_prob, keep, index, visual, places, out = gather_case(surrogate)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).double()
    out.backward(grad_out)
    for row in range(2):
        expected = torch.zeros(9, 4).double()
        for place, origin in enumerate(places[row].tolist()):
            if origin >= 0:
                expected[origin] = grad_out[row, place]
        torch.testing.assert_close(hidden.grad[row], expected)
        v = int(visual[row].sum())
        x, g = hidden[row, index[row, :v]].detach(), expected[index[row, :v]]
        eta = (x * g).sum(-1) * (-1 if surrogate == "taylor" else 1)
        z = ((eta - eta.mean()) / eta.std(correction=0).clamp(min=1e-6)).clamp(-1.5, 1.5)
        e = 0.5 - (0.5 + 0.5 * z.tanh())
        if surrogate == "release":
            e = e - e.mean()
        m = (x * g).abs().sum(-1)
        m = (m / m.mean()).clamp(0.5, 2)
        p = keep_prob[row, :v].detach()
        wanted = 0.8 * e * m * (p * (1 - p)).clamp(min=5e-3)
        torch.testing.assert_close(keep_prob.grad[row, :v], wanted, atol=1e-6, rtol=1e-5)
        assert not keep_prob.grad[row, v:].any()


CHATS = {
    # ids, places of the question
    "one turn": ([IM_START, USER, NEWLINE, V_START, VIDEO, VIDEO, V_END, 20, 21, IM_END], [7, 8]),
    "two scans": ([IM_START, USER, NEWLINE, 30, V_START, VIDEO, V_END, 31, V_START, VIDEO, V_END, 20, IM_END], [11]),
    "question first": ([IM_START, USER, NEWLINE, 20, 21, V_START, VIDEO, V_END, IM_END], [3, 4]),
    "last turn": (
        [IM_START, USER, NEWLINE, V_START, VIDEO, V_END, 20, IM_END, NEWLINE, IM_START, 8, NEWLINE, 40, IM_END,
         NEWLINE, IM_START, USER, NEWLINE, 22, 23, IM_END, NEWLINE, IM_START, 8, NEWLINE],
        [18, 19],
    ),
    "no role words": ([V_START, VIDEO, V_END, 20, 21, 22, IM_END, 8, 40, IM_END], [3, 4, 5]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_the_question_is_found(name):
    ids, places = CHATS[name]
    ids = torch.tensor([ids])
    found = question_mask(ids, ids == VIDEO, tiny_config())
    assert found[0].nonzero().flatten().tolist() == places
