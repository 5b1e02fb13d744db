"""What must not depend on how it is computed: batching, caching, attention kernel, beams, checkpointing, dtype."""

import pytest
import torch
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from conftest import (
    FIRST_WORD,
    IM_END,
    IM_START,
    NEWLINE,
    USER,
    VIDEO,
    collate,
    prompt,
    text_row,
    three_rows,
    tiny_model,
)  # fmt: skip

VARIANTS = [
    pytest.param({}, id="default"),
    pytest.param({"scheduler_layer": -1}, id="before-layer-0"),
    pytest.param({"scheduler_layer": 2, "saliency": "attention"}, id="layer-2-attention"),
    pytest.param({"scheduler_layer": 3}, id="after-last-layer"),
    pytest.param({"scheduler_layer": 1, "evict_early_layers": True}, id="evict"),
]
EXACT = pytest.mark.parametrize("fields", VARIANTS)


def singles(rows, **kwargs):
    return [collate([row], **kwargs) for row in rows]


def greedy(model, inputs, **kwargs):
    new = kwargs.pop("max_new_tokens", 6)
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
        )


def new_tokens(output, inputs):
    return output.sequences[:, inputs["input_ids"].shape[1] :]


@EXACT
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batch_equals_single(fields, attention):
    model = tiny_model(attention=attention, **fields)
    rows = [*three_rows(), text_row()]
    inputs = collate(rows)
    with torch.no_grad():
        together = model(**inputs)
    kept = together.keep_mask.sum(-1).tolist()
    assert len(set(kept)) == 4 and kept[3] == 0, kept  # four different counts, or the test shows nothing
    generated = greedy(model, inputs)
    for i, alone in enumerate(singles(rows)):
        with torch.no_grad():
            out = model(**alone)
        length = out.logits.shape[1]
        torch.testing.assert_close(together.logits[i, -length:], out.logits[0], atol=2e-4, rtol=1e-4)
        if out.keep_mask is not None:
            assert together.keep_mask[i].sum() == out.keep_mask.sum()
            assert torch.equal(together.keep_mask[i, : out.keep_mask.shape[1]], out.keep_mask[0])
        single = greedy(model, alone)
        assert torch.equal(new_tokens(generated, inputs)[i], new_tokens(single, alone)[0])
        for step in range(6):
            torch.testing.assert_close(generated.logits[step][i], single.logits[step][0], atol=3e-4, rtol=1e-4)


@EXACT
def test_batch_equals_single_in_double_precision(fields):
    model = tiny_model(dtype=torch.float64, **fields)
    rows = three_rows()
    together = greedy(model, collate(rows, dtype=torch.float64))
    for i, alone in enumerate(singles(rows, dtype=torch.float64)):
        for a, b in zip(together.logits, greedy(model, alone).logits, strict=True):
            torch.testing.assert_close(a[i], b[0], atol=1e-6, rtol=1e-6)


def test_sdpa_equals_eager():
    inputs = collate(three_rows())
    with torch.no_grad():
        sdpa, eager = (tiny_model(attention=name)(**inputs) for name in ("sdpa", "eager"))
    assert torch.equal(sdpa.keep_mask, eager.keep_mask)
    real = sdpa.keep_index >= 0
    torch.testing.assert_close(sdpa.logits[real], eager.logits[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS[:4])
def test_cached_equals_uncached(fields):
    model = tiny_model(**fields)
    inputs = collate(three_rows())
    cached, uncached = greedy(model, inputs), greedy(model, inputs, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    for a, b in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS[:4])
def test_continuing_from_the_cache_equals_a_fresh_prompt(fields):
    model = tiny_model(**fields)
    rows = three_rows()[1:2]
    inputs = collate(rows)
    first = greedy(model, inputs)
    follow_up = [IM_END, NEWLINE, IM_START, USER, NEWLINE, 80, 81, 82, IM_END, NEWLINE, IM_START, 8, NEWLINE]
    whole = torch.cat([first.sequences, torch.tensor([follow_up])], dim=1)
    mask = torch.ones_like(whole)
    greedy(model, collate(three_rows()[:1]))  # another scan in between must not matter
    again = greedy(model, {"input_ids": whole, "attention_mask": mask}, past_key_values=first.past_key_values)

    # the cache holds what the first question kept, so the fresh prompt is told that question
    question = torch.zeros_like(whole, dtype=torch.bool)
    begin = rows[0][0].index(40)
    question[0, begin : begin + 2] = True
    fresh_inputs = inputs | {
        "input_ids": whole, "attention_mask": mask, "mm_token_type_ids": (whole == VIDEO).int() * 2,
        "question_mask": question,
    }  # fmt: skip
    fresh = greedy(model, fresh_inputs)
    assert torch.equal(again.sequences, fresh.sequences)
    for a, b in zip(again.logits, fresh.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@EXACT
def test_going_on_with_the_same_answer_needs_no_mask(fields):
    """Also where the early layers have forgotten tokens, and for a batch with padding."""
    model = tiny_model(**fields)
    inputs = collate([*three_rows(), text_row()])
    whole = greedy(model, inputs, max_new_tokens=9)
    part = greedy(model, inputs, max_new_tokens=4)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    rest = greedy(
        model,
        {"input_ids": part.sequences, "attention_mask": mask},
        past_key_values=part.past_key_values,
        max_new_tokens=5,
    )
    assert torch.equal(rest.sequences, whole.sequences)


def test_a_plain_dynamic_cache_serves_too():
    model = tiny_model()
    inputs = collate(three_rows())
    cache = DynamicCache(config=model.config.text_config)
    for rows in (three_rows(), three_rows()[:2]):  # emptied, it serves again
        inputs = collate(rows)
        given = greedy(model, inputs, past_key_values=cache)
        assert torch.equal(given.sequences, greedy(model, inputs).sequences)
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values, layer.is_initialized = None, None, False


@EXACT
@pytest.mark.parametrize("given", [False, True], ids=["positions-found", "positions-given"])
def test_a_loop_by_hand_equals_generate(fields, given):
    """Row positions, masks and caches without generate's help, on a volume deeper than it is wide."""
    model = tiny_model(**fields)
    inputs = collate(three_rows())
    expected = new_tokens(greedy(model, inputs), inputs)
    if given:
        inputs["position_ids"], _ = model.model.get_rope_index(**inputs)
        greedy(model, collate(three_rows()[:1]))  # leaves other positions behind
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        mask, tokens = inputs["attention_mask"], []
        for _ in range(6):
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
            out = model(input_ids=tokens[-1], attention_mask=mask, past_key_values=out.past_key_values)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


@EXACT
def test_beams_and_return_sequences_do_not_scramble_scans(fields):
    model = tiny_model(**fields)
    rows = three_rows()
    inputs = collate(rows)
    beams = greedy(model, inputs, num_beams=3, num_return_sequences=2)
    sampled = model.generate(**inputs, do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=6)
    best = greedy(model, inputs).sequences
    for i, alone in enumerate(singles(rows)):
        single = greedy(model, alone, num_beams=3, num_return_sequences=2)
        assert torch.equal(new_tokens(beams, inputs)[2 * i : 2 * i + 2], new_tokens(single, alone))
        assert torch.equal(sampled[2 * i], best[i]) and torch.equal(sampled[2 * i + 1], best[i])


@EXACT
def test_prompt_lookup_equals_greedy(fields):
    model = tiny_model(**fields)
    ids, answer = prompt((20, 21, 22, 20, 21, 22, 20, 21), [(3, 4, 6)])
    inputs = collate([(ids, answer, [(3, 4, 6)])])
    looked_up = model.generate(**inputs, prompt_lookup_num_tokens=3, max_new_tokens=12, do_sample=False)
    assert torch.equal(looked_up, greedy(model, inputs, max_new_tokens=12).sequences)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}])
def test_without_scheduler_equals_stock_qwen(fields):
    model = tiny_model(**fields)
    config = model.config.to_dict()
    config = {k: config[k] for k in Qwen2_5_VLConfig().to_dict() if k in config and k != "model_type"}
    stock = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval()
    left = stock.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys and all("scheduler" in key for key in left.unexpected_keys)
    inputs = collate([*three_rows(answers=True), text_row((60, 61))])
    position_ids, _ = model.model.get_rope_index(**inputs)
    with torch.no_grad():
        ours = model(**inputs, use_scheduler=False, output_hidden_states=True, use_cache=True)
        theirs = stock(**inputs, position_ids=position_ids, output_hidden_states=True, use_cache=True)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-6, rtol=1e-6)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    assert ours.keep_mask is None and ours.band_loss == 0


def test_keeping_everything_equals_not_scheduling():
    model = tiny_model()
    inputs = collate(three_rows())
    with torch.no_grad():
        all_kept, dense = model(**inputs, keep_ratio=1.0), model(**inputs, use_scheduler=False)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(all_kept.logits[real], dense.logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("phase", ["dense", "soft", "hard"])
@pytest.mark.parametrize(
    ("reentrant", "fields"),
    [(True, {}), (False, {}), (False, {"scheduler_layer": -1}), (False, VARIANTS[4].values[0])],
)
def test_checkpointed_equals_plain_gradients(phase, reentrant, fields):
    inputs = collate([*three_rows(answers=True), text_row((60, 61))])
    gradients = []
    for checkpointed in (False, True):
        model = tiny_model(**fields).train()
        model.set_scheduler_phase(phase)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**inputs, use_cache=bool(fields)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_batched_gradients_are_the_sum_of_single_ones():
    """Every loss term, weighted by answer tokens: accumulation over rows equals one batch."""
    rows = [*three_rows(answers=True), text_row((60, 61))]
    whole = collate(rows)
    items = int((whole["labels"] != -100).sum())
    batched, single = tiny_model().train(), tiny_model().train()
    together = batched(**whole, use_cache=False)
    together.loss.backward()
    parts = [single(**alone, use_cache=False, num_items_in_batch=items) for alone in singles(rows)]
    for part in parts:
        part.loss.backward()
    for term in ("loss", "lm_loss", "band_loss"):
        torch.testing.assert_close(together[term], sum(part[term] for part in parts), atol=1e-5, rtol=1e-5)
    assert together.band_loss > 0
    for (name, a), (_, b) in zip(batched.named_parameters(), single.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    inputs = collate(three_rows(answers=True))
    exact, half = tiny_model(), tiny_model(dtype=dtype)
    with torch.no_grad():
        a, b = exact(**inputs, token_budget=5), half(**inputs, token_budget=5)
    assert b.logits.dtype == dtype and b.threshold.dtype == torch.float32
    torch.testing.assert_close(b.saliency, a.saliency, atol=0.1, rtol=0.1)
    torch.testing.assert_close(b.loss, a.loss, atol=0.2, rtol=0.1)
    half.train()(**inputs, use_cache=False).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters())


def test_autocast_keeps_the_scheduler_in_float32():
    inputs = collate(three_rows())
    model = tiny_model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs)
    assert out.saliency_logits.dtype == out.threshold.dtype == torch.float32


def flash_like(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """What flash attention is given: a 2D mask or none, or lengths of packed pieces; computed by plain products."""
    lengths, causal = kwargs.get("cu_seq_lens_q"), kwargs.get("is_causal", module.is_causal)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(-1, -2) * scaling  # (B, H, Q, K)
    q, k = logits.shape[-2:]
    allowed = torch.ones(q, k, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(k - q)
    if lengths is not None:
        piece = torch.bucketize(torch.arange(k), lengths[1:], right=True)
        allowed = allowed & (piece[:, None] == piece[None])
    allowed = allowed.expand(len(query), 1, q, k)
    if attention_mask is not None:
        assert attention_mask.ndim == 2 and attention_mask.shape == (len(query), k)
        allowed = allowed & attention_mask[:, None, None, :].bool()
    weights = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2), None


@EXACT
def test_flash_attention_gets_masks_it_understands(fields):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register("flash_test", flash_like)
    AttentionMaskInterface.register("flash_test", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    inputs = collate([*three_rows(), text_row()])
    expected = greedy(tiny_model(**fields), inputs)
    model = tiny_model(**fields)
    model.config._attn_implementation = "flash_test"  # set_attn_implementation would look for a CUDA kernel
    assert (
        model.config.text_config._attn_implementation
        == model.config.vision_config._attn_implementation
        == "flash_test"
    )
    got = greedy(model, inputs)
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=3e-4, rtol=1e-4)


def test_weights_on_disk_give_the_same_answer(tmp_path):
    """accelerate moves each module's weights in for its forward alone; nothing may reach around it."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    inputs = collate(three_rows())
    device_map = {"model.visual": "cpu", "model.language_model": "disk", "lm_head": "cpu"}
    offloaded = type(model).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off", dtype=torch.float32
    )
    assert any(p.device.type == "meta" for p in offloaded.parameters())
    offloaded.generation_config = model.generation_config
    assert torch.equal(greedy(offloaded, inputs).sequences, greedy(model, inputs).sequences)


def test_hidden_states_show_the_cut():
    model = tiny_model(scheduler_layer=1)
    inputs = collate(three_rows()[:1])
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=False)
    length, short = inputs["input_ids"].shape[1], out.keep_index.shape[1]
    assert [h.shape[1] for h in out.hidden_states] == [length] * 3 + [short] * 2
    assert short == length - int(out.visual_count - out.keep_mask.sum())


def test_labels_are_cut_with_the_sequence():
    """The answer's loss by hand: from the logits and the unpruned ids, through keep_index."""
    inputs = collate(three_rows(answers=True))
    model = tiny_model()
    with torch.no_grad():
        out = model(**inputs)
    losses = []
    for row, index in enumerate(out.keep_index):
        for place, origin in enumerate(index[1:].tolist(), start=1):
            label = inputs["labels"][row, origin] if origin >= 0 else -100
            if label != -100:
                losses.append(-out.logits[row, place - 1].log_softmax(-1)[label])
    assert len(losses) == 10
    torch.testing.assert_close(out.lm_loss, torch.stack(losses).mean())


def test_kept_tokens_keep_their_positions():
    """The answer must depend on where the kept tokens were: shifting a scan's words by padding changes nothing, while
    other tokens kept do."""
    model = tiny_model()
    inputs = collate(three_rows()[2:])
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (7, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (7, 0)),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (7, 0)),
    }
    with torch.no_grad():
        plain, shifted = model(**inputs), model(**(inputs | padded))
        other = model(**inputs, token_budget=3)
    torch.testing.assert_close(plain.logits[:, -1], shifted.logits[:, -1], atol=1e-4, rtol=1e-4)
    assert (plain.logits[:, -1] - other.logits[:, -1]).abs().max() > 1e-2
    assert FIRST_WORD == 10


def test_padding_on_the_right_equals_padding_on_the_left():
    """As a training collator may pad."""
    model = tiny_model()
    left = collate([*three_rows(answers=True), text_row((60, 61))])
    right = dict(left)
    order = left["attention_mask"].argsort(dim=-1, descending=True, stable=True)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
        right[name] = left[name].gather(1, order)
    assert right["attention_mask"][:, 0].all() and not right["attention_mask"][:, -1].all()
    with torch.no_grad():
        a, b = model(**left), model(**right)
    assert torch.equal(a.keep_mask, b.keep_mask)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=1e-5)
    real = a.keep_index >= 0
    assert torch.equal(real, b.keep_index >= 0)
    torch.testing.assert_close(a.logits[real], b.logits[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_a_shared_scan_equals_a_repeated_one(training):
    """Four places, two volumes: rows 0 and 2 show the first, row 1 shows both, in the other order."""
    a, b = (2, 6, 4), (3, 4, 6)
    grids = [[a], [b, a], [a]]
    questions = [(20, 21, 22), (40, 41), (50, 51, 52, 53)]
    rows = [
        (*prompt(q, g, answer), g) for q, g, answer in zip(questions, grids, [(30,), (31, 32), (33,)], strict=True)
    ]
    repeated = collate(rows)
    first, second = torch.randn(48, 14**3), torch.randn(72, 14**3)
    repeated["pixel_values_videos"] = torch.cat([first, second, first, first])
    shared = repeated | {
        "pixel_values_videos": torch.cat([first, second]),
        "volume_index": torch.tensor([0, 1, 0, 0]),
    }
    model = tiny_model().train(training)
    model.set_scheduler_phase("hard")
    losses, gradients = [], []
    for inputs in (repeated, shared):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.model.visual.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    model.eval()
    for inputs in (repeated, shared):
        inputs.pop("labels")
    for how in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        one, other = (greedy(model, inputs, **how).sequences for inputs in (repeated, shared))
        assert torch.equal(one, other)
    for index in ([0, 1, 0], [0, 2, 0, 0], [1, 1, 0, 0]):
        with pytest.raises(ValueError, match="volume_index"):
            model(**(shared | {"volume_index": torch.tensor(index)}))


@pytest.mark.parametrize("layer", [-1, 1])
def test_full_length_logits_are_the_cut_ones_in_their_places(layer):
    """What trainers that compare logits with labels get: same loss and gradients, the prompt's length."""
    rows = three_rows(answers=True)
    inputs = collate(rows)
    model = tiny_model(scheduler_layer=layer)
    short, full = model(**inputs), model(**inputs, output_full_length=True)
    assert short.logits.shape[1] < full.logits.shape[1] == inputs["input_ids"].shape[1]
    assert torch.equal(full.loss, short.loss)
    for row, index in enumerate(short.keep_index):
        real = index >= 0
        assert torch.equal(full.logits[row, index[real]], short.logits[row, real])
        gone = torch.ones(full.logits.shape[1], dtype=torch.bool)
        gone[index[real]] = False
        assert gone.any() and not full.logits[row, gone].any()
    shifted = full.logits[:, :-1].reshape(-1, full.logits.shape[-1])
    stock = torch.nn.functional.cross_entropy(shifted, inputs["labels"][:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(stock, short.lm_loss)
    grads = [torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in (stock, short.lm_loss)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)
    model.config.output_full_length = True
    assert torch.equal(model(**inputs).logits, full.logits)
    del inputs["labels"]
    with_field = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.config.output_full_length = False
    assert torch.equal(with_field, model.generate(**inputs, max_new_tokens=4, do_sample=False))
