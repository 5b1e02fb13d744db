"""Selection methods: budgets exact, keep-all equal to dense, batch equal to single, cached equal to uncached.

python -m pytest tests/test_schedulers.py
"""

import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from conftest import collate, three_rows, tiny_model
from photon.schedulers import SCHEDULERS, BudgetScheduler, use_scheduler

ROWS = three_rows()  # 12, 28 and 40 visual tokens; the second row has two scans


def with_scheduler(name, scheduler_layer=0, **fields):
    """A tiny model with this method; skips a layer at which it has nothing to read."""
    if name in SCHEDULERS and scheduler_layer < SCHEDULERS[name].lowest_layer:
        pytest.skip(f"{name} reads layers below the cut")
    torch.manual_seed(0)  # methods that learn start at random
    model = tiny_model(scheduler_layer=scheduler_layer, **fields)
    use_scheduler(model, name, seed=3)
    return model


@pytest.fixture(params=SCHEDULERS)
def name(request):
    return request.param


@pytest.fixture(params=[name for name, method in SCHEDULERS.items() if method.exact])
def exact(request):
    return request.param


@pytest.mark.parametrize("layer", [-1, 0, 2])
@torch.no_grad()
def test_keep_all_is_dense_to_the_bit(name, layer):
    inputs = collate(ROWS)
    model = with_scheduler(name, scheduler_layer=layer)
    whole, dense = model(**inputs, keep_ratio=1.0), model(**inputs, use_scheduler=False)
    assert whole.keep_mask.sum(-1).tolist() == whole.visual_count.tolist()
    real = inputs["attention_mask"].bool()
    assert torch.equal(whole.logits[real], dense.logits[real])


@pytest.mark.parametrize("layer", [-1, 1])
@torch.no_grad()
def test_budgets_are_exact(exact, layer):
    inputs, model = collate(ROWS), with_scheduler(exact, scheduler_layer=layer)
    for budget in (0, 1, 7, 11, 500):
        out = model(**inputs, token_budget=budget)
        assert out.keep_mask.sum(-1).tolist() == [min(budget, int(count)) for count in out.visual_count]
    out = model(**inputs, keep_ratio=0.3)
    assert out.keep_mask.sum(-1).tolist() == [round(0.3 * int(count)) for count in out.visual_count]


@torch.no_grad()
def test_without_a_budget_it_is_the_models_own(exact):
    inputs, model = collate(ROWS), tiny_model()
    plain = model(**inputs)
    reference = use_scheduler(model, exact)
    out = model(**inputs)
    assert out.keep_mask.sum(-1).tolist() == plain.keep_mask.sum(-1).tolist()
    assert not torch.equal(out.keep_mask, plain.keep_mask)
    model.set_scheduler(reference)
    assert torch.equal(model(**inputs).logits, plain.logits)


@pytest.mark.parametrize("layer", [-1, 1])
@torch.no_grad()
def test_batch_equals_single(name, layer):
    model = with_scheduler(name, scheduler_layer=layer)
    batch = model(**collate(ROWS), keep_ratio=0.4)
    for number, row in enumerate(ROWS):
        single = model(**collate([row]), keep_ratio=0.4)
        length = single.keep_mask.shape[1]
        assert torch.equal(batch.keep_mask[number, :length], single.keep_mask[0])
        assert not batch.keep_mask[number, length:].any()
        kept = single.logits.shape[1]
        torch.testing.assert_close(batch.logits[number, -kept:], single.logits[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [-1, 1])
def test_cached_equals_uncached_and_beams_are_encoded_alike(name, layer):
    inputs, model = collate(ROWS), with_scheduler(name, scheduler_layer=layer)
    options = {"keep_ratio": 0.4, "do_sample": False, "max_new_tokens": 6}
    cached = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), cached)
    twice = model.generate(**inputs, **(options | {"do_sample": True, "top_k": 1}), num_return_sequences=2)
    assert torch.equal(twice[0::2], cached) and torch.equal(twice[1::2], cached)


@torch.no_grad()
def test_random_follows_the_seed_and_the_words():
    inputs, masks = collate(ROWS), []
    for seed in (0, 0, 1):
        model = tiny_model()
        use_scheduler(model, "random", seed=seed)
        masks.append(model(**inputs, keep_ratio=0.5).keep_mask)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    other = dict(inputs, input_ids=inputs["input_ids"].masked_fill(inputs["input_ids"] == 22, 77))
    changed = model(**other, keep_ratio=0.5).keep_mask
    assert not torch.equal(changed[0], masks[2][0]) and torch.equal(changed[1:], masks[2][1:])


@torch.no_grad()
def test_stride_is_even():
    out = with_scheduler("stride")(**collate(ROWS), token_budget=7)
    for row, count in enumerate(out.visual_count.tolist()):
        gaps = out.keep_mask[row, :count].nonzero()[:, 0].diff()
        assert gaps.max() - gaps.min() <= 1 and gaps.sum() >= count - 2 * gaps.max()


@torch.no_grad()
def test_fastv_is_the_last_tokens_attention():
    """Against the attention weights of an eager model, read out by transformers."""
    row = ROWS[2]
    inputs = collate([row])
    model = with_scheduler("fastv", scheduler_layer=1, attention="eager")
    weights = model(**inputs, use_scheduler=False, output_attentions=True).attentions[1]  # (1, H, S, S)
    visual = inputs["mm_token_type_ids"][0] == 2
    expected = weights[0, :, -1, visual].mean(0)
    out = model(**inputs, token_budget=9)
    assert set(out.keep_mask[0].nonzero()[:, 0].tolist()) == set(expected.topk(9).indices.tolist())


@torch.no_grad()
def test_vision_attention_is_that_of_the_tower():
    """Against attention weights of an eager tower, slab by slab; and coordinates by hand."""
    record = {}

    class Probe(BudgetScheduler):
        needs = frozenset({"vision", "coordinates"})

        def score(self, inputs):
            record["inputs"] = inputs
            return inputs.vision_attention

    model = tiny_model(attention="eager")
    model.set_scheduler(Probe(model.model.language_model.scheduler))
    inputs = collate(ROWS)
    model(**inputs, token_budget=3)
    grids = inputs["video_grid_thw"].tolist()
    patches = inputs["pixel_values_videos"].split([t * h * w for t, h, w in grids])
    places = [(0, 0), (1, 0), (1, 1), (2, 0)]  # row, scan of the row
    attention, held = model.model.visual.blocks[1].attn, []
    begin = {row: 0 for row, _ in places}
    for (row, scan), (t, h, w), part in zip(places, grids, patches, strict=True):
        hook = attention.register_forward_pre_hook(lambda *call: held.append(call[1:]), with_kwargs=True)
        model.model.visual(part, grid_thw=torch.tensor([(t, h, w)]))
        hook.remove()
        (hidden,), kwargs = held.pop()
        by_slab = []
        for slab in range(t):  # one slab alone gives the same, since the tower attends within it only
            block = slice(slab * h * w, (slab + 1) * h * w)
            qkv = attention.qkv(hidden[block]).view(h * w, 3, attention.num_heads, -1)
            cos, sin = (part[block][:, None].float() for part in kwargs["position_embeddings"])
            half = qkv.shape[-1] // 2
            q, k = (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in (qkv[:, 0], qkv[:, 1]))
            probability = (q.transpose(0, 1) @ k.permute(1, 2, 0) * attention.scaling).softmax(-1)  # (heads, n, n)
            by_slab.append(probability.mean(0).sum(0))
        windows = torch.cat(by_slab).view(-1, 4).mean(1)  # in the order of the tower's windows
        tokens = t * h * w // 4
        found = record["inputs"].vision_attention[row, begin[row] : begin[row] + tokens]
        torch.testing.assert_close(found.sort().values, windows.sort().values, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.view(t, -1).mean(1), torch.ones(t), atol=1e-4, rtol=0)
        coordinates = record["inputs"].coordinates[row, begin[row] : begin[row] + tokens]
        by_hand = [(scan, z, y, x) for z in range(t) for y in range(h // 2) for x in range(w // 2)]
        assert coordinates.tolist() == [list(place) for place in by_hand]
        begin[row] += tokens


@torch.no_grad()
def test_vision_features_are_in_the_order_of_the_tokens():
    """A windowed block that changes nothing leaves only the order to differ between small windows and whole slabs."""
    recorded = []

    class Probe(BudgetScheduler):
        needs = frozenset({"vision"})

        def score(self, inputs):
            recorded.append((inputs.vision_attention, inputs.vision_keys))
            return inputs.vision_attention

    model = tiny_model()
    visual = model.model.visual
    for linear in (visual.blocks[0].attn.proj, visual.blocks[0].mlp.down_proj):
        linear.weight.zero_()
        linear.bias.zero_()
    model.set_scheduler(Probe(model.model.language_model.scheduler))
    for window in (56, 56 * 4):
        visual.window_size = window
        model(**collate(ROWS), token_budget=3)
    for small, whole in zip(*recorded, strict=True):
        torch.testing.assert_close(small, whole, atol=1e-5, rtol=1e-5)
    grid = torch.tensor([ROWS[1][2][0]])
    order, _ = get_vision_window_index(grid, 2, 56, 14)
    assert order.tolist() != sorted(order.tolist())  # the small windows do reorder


@torch.no_grad()
def test_visionzip_merges_by_hand():
    inputs = collate([ROWS[2]])
    model = with_scheduler("visionzip", scheduler_layer=-1)
    method = model.model.language_model.scheduler
    held = []
    method.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    model(**inputs, token_budget=13)  # of 40: 2 contextual (5 %), 11 dominant
    (seen,) = held
    attention, states, keys = (getattr(seen, n)[0] for n in ("vision_attention", "hidden_states", "vision_keys"))
    dominant = attention.topk(11).indices.tolist()
    rest = [j for j in range(40) if j not in dominant]
    targets = [rest[0], rest[15]]  # 29 tokens in two steps
    keep = method.select(seen, torch.tensor([13]))
    assert set(keep[0].nonzero()[:, 0].tolist()) == {*dominant, *targets}
    merged = method.merge(seen, keep)[0]
    for target in targets:
        joined = [
            j for j in rest if j not in targets
            and max(targets, key=lambda t: float(torch.cosine_similarity(keys[j], keys[t], dim=0))) == target
        ]  # fmt: skip
        assert joined
        torch.testing.assert_close(merged[target], states[target] + states[joined].mean(0), atol=1e-5, rtol=1e-5)
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[targets] = False
    assert torch.equal(merged[untouched], states[untouched])


def test_what_a_method_needs_is_checked():
    model = tiny_model()

    class Odd(BudgetScheduler):
        needs = frozenset({"tea"})

    with pytest.raises(ValueError, match="needs tea; expected some of coordinates"):
        model.set_scheduler(Odd(model.model.language_model.scheduler))
    with pytest.raises(ValueError, match=f"There is no scheduler 'fastest'; known are {', '.join(SCHEDULERS)}."):
        use_scheduler(model, "fastest")
    inputs = collate(ROWS)
    patches = inputs.pop("pixel_values_videos")
    encoded = model.model.get_video_features(patches, inputs["video_grid_thw"], return_dict=True)
    use_scheduler(model, "visionzip")
    with pytest.raises(ValueError, match="after set_scheduler"):
        model(**inputs, mm_encoder_outputs={"video": encoded}, token_budget=3)
