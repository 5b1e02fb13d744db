"""A scan that was encoded once answers as the whole prompt does: batches, chats, several scans, after saving."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from test_equivalence import EXACT, flash_like, greedy, new_tokens

from conftest import (
    ASSISTANT,
    IM_END,
    IM_START,
    NEWLINE,
    ROOT,
    USER,
    V_END,
    VIDEO,
    collate,
    prompt,
    three_rows,
    tiny_model,
)
from photon import asking
from photon.evaluation.models import VolumeModel
from photon.loading import load_processor
from photon.prefix_photon import ScanPrefix
from photon.prompt_photon import join_outputs
from photon.schedulers import SCHEDULERS, use_scheduler

QUESTIONS = [(20, 21, 22, 23, 24, 25, 26), (40, 41), (50, 51, 52, 53)]  # of unlike lengths
SCANS = [(3, 4, 6), (2, 8, 4)]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def asked(questions=QUESTIONS, grids=SCANS, seed=0):
    """Inputs with several questions on the same scans, each of which is passed once."""
    inputs = collate([(*prompt(question, grids), grids) for question in questions])
    sizes = [t * h * w for t, h, w in grids]
    generator = torch.Generator().manual_seed(seed)
    inputs["pixel_values_videos"] = torch.randn(sum(sizes), 14**3, generator=generator)
    inputs["volume_index"] = torch.arange(len(grids)).repeat(len(questions))
    return inputs


def text_of(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def encoded(model, question=(70, 71, 72), **options):
    return model.encode_scan(**asked([question]), **options)


def assert_same(plain, behind, inputs):
    """Two outputs of a forward: decisions, places, and logits where nothing is padding."""
    for name in ("keep_mask", "keep_index", "visual_count"):
        a, b = plain.get(name), behind.get(name)
        assert (a is None and b is None) or torch.equal(a, b), name
    real = inputs["attention_mask"].bool() if plain.keep_index is None else plain.keep_index >= 0
    torch.testing.assert_close(behind.logits[real], plain.logits[real], **CLOSE)


def assert_same_answers(plain, behind):
    assert torch.equal(plain.sequences, behind.sequences)
    for a, b in zip(plain.logits, behind.logits, strict=True):
        torch.testing.assert_close(b, a, **CLOSE)


@EXACT
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_questions_behind_a_prefix_equal_whole_prompts(fields, attention):
    model = tiny_model(attention=attention, **fields)
    inputs, prefix = asked(), encoded(model)
    with torch.no_grad():
        plain, behind = model(**inputs), model(**text_of(inputs), scan=prefix)
    assert len({tuple(row) for row in plain.keep_mask.tolist()}) == 3  # or the test shows less
    assert_same(plain, behind, inputs)
    torch.testing.assert_close(behind.saliency, plain.saliency, **CLOSE)
    assert_same_answers(greedy(model, inputs), greedy(model, text_of(inputs), scan=prefix))
    for i in range(3):  # alone, without padding
        alone = {
            name: value[i : i + 1, inputs["attention_mask"][i].argmax() :] for name, value in text_of(inputs).items()
        }
        assert torch.equal(
            new_tokens(greedy(model, alone, scan=prefix), alone)[0], new_tokens(greedy(model, inputs), inputs)[i]
        )


@EXACT
def test_several_prefixes_in_one_batch(fields):
    """Prompts with other scans, in number and size, and questions that follow one another on each."""
    model = tiny_model(**fields)
    rows = three_rows()
    prefix = model.encode_scan(**collate(rows))
    inputs = collate(rows)
    with torch.no_grad():
        assert_same(model(**inputs), model(**text_of(inputs), scan=prefix), inputs)
    assert_same_answers(greedy(model, inputs), greedy(model, text_of(inputs), scan=prefix))
    twice = {name: value.repeat_interleave(2, 0) for name, value in text_of(inputs).items()}
    expected = greedy(model, inputs).sequences.repeat_interleave(2, 0)
    assert torch.equal(greedy(model, twice, scan=prefix).sequences, expected)
    turned = {name: value[[2, 0, 1, 0]] for name, value in text_of(inputs).items()}
    assert torch.equal(greedy(model, turned, scan=prefix.rows([2, 0, 1, 0])).sequences, expected[[4, 0, 2, 0]])
    with pytest.raises(ValueError, match="3 prompts, and there are 4 questions"):
        model(**turned, scan=prefix)


@EXACT
def test_each_turn_of_a_chat_schedules_anew(fields):
    model = tiny_model(**fields)
    prefix, ids = encoded(model), asked([(20, 21, 22)])["input_ids"]
    kept = []
    for question in ((80, 81, 82), (60, 61), (44, 45, 46, 47)):
        inputs = asked([(20, 21, 22)]) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["mm_token_type_ids"] = (ids == VIDEO).int() * 2
        plain, behind = greedy(model, inputs), greedy(model, text_of(inputs), scan=prefix)
        assert_same_answers(plain, behind)
        kept.append(behind.past_key_values.cut.keep_mask)
        assert torch.equal(kept[-1], plain.past_key_values.cut.keep_mask)
        turn = [IM_END, NEWLINE, IM_START, USER, NEWLINE, *question, IM_END, NEWLINE, IM_START, ASSISTANT, NEWLINE]
        ids = torch.cat([behind.sequences, torch.tensor([turn])], dim=1)
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])
    with pytest.raises(ValueError, match="leave out scan"):
        greedy(model, {"input_ids": ids}, scan=prefix, past_key_values=behind.past_key_values)


@EXACT
def test_going_on_from_the_cache_of_an_answer(fields):
    """The cache that an answer behind a prefix leaves serves as that of a whole prompt."""
    model = tiny_model(**fields)
    inputs, prefix = asked(), encoded(model)
    outputs = []
    for given in (inputs, text_of(inputs) | {"scan": prefix}):
        mask = inputs["attention_mask"]
        with torch.no_grad():
            out, logits = model(**given, use_cache=True), []
            for step in range(4):
                new = torch.full((3, 2), 30 + step)
                mask = torch.cat([mask, torch.ones_like(new)], dim=1)
                out = model(input_ids=new, attention_mask=mask, past_key_values=out.past_key_values)
                logits.append(out.logits)
        assert out.past_key_values.get_seq_length() == mask.shape[1]
        outputs.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)


@EXACT
def test_beams_lookup_and_no_cache(fields):
    model = tiny_model(**fields)
    inputs, prefix = asked(), encoded(model)
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}):
        if options == {"use_cache": False} and fields.get("evict_early_layers"):
            continue  # decoding differs from a fresh prompt by construction
        expected = greedy(model, inputs, **options).sequences
        assert torch.equal(greedy(model, text_of(inputs), scan=prefix, **options).sequences, expected)
    one = asked([(20, 21, 22, 20, 21, 22, 20, 21)])
    options = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 3}
    expected = model.generate(**one, **options)
    assert torch.equal(model.generate(**text_of(one), scan=prefix, **options), expected)


@EXACT
@pytest.mark.parametrize("budget", [{"use_scheduler": False}, {"keep_ratio": 0.0}, {"token_budget": 4}])
def test_budgets_and_no_cut(fields, budget):
    model = tiny_model(**fields)
    inputs, prefix = asked(), encoded(model)
    with torch.no_grad():
        assert_same(model(**inputs, **budget), model(**text_of(inputs), scan=prefix, **budget), inputs)
    assert_same_answers(greedy(model, inputs, **budget), greedy(model, text_of(inputs), scan=prefix, **budget))


@pytest.mark.parametrize("method", sorted(SCHEDULERS))
@pytest.mark.parametrize("layer", [-1, 1])
def test_every_selection_method(method, layer):
    if layer < SCHEDULERS[method].lowest_layer:
        pytest.skip(f"{method} reads layers below the cut")
    model = tiny_model(scheduler_layer=layer)
    use_scheduler(model, method)
    inputs, prefix = asked(), encoded(model)
    with torch.no_grad():
        plain, behind = model(**inputs, keep_ratio=0.4), model(**text_of(inputs), scan=prefix, keep_ratio=0.4)
        assert_same(plain, behind, inputs)


def test_a_method_that_needs_more_than_the_prefix_holds():
    model = tiny_model()
    prefix = encoded(model)
    use_scheduler(model, "visionzip")
    with pytest.raises(ValueError, match="encode_scan after set_scheduler"):
        model(**text_of(asked()), scan=prefix)


@EXACT
def test_flash_attention_behind_a_prefix(fields):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register("flash_test", flash_like)
    AttentionMaskInterface.register("flash_test", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    expected = greedy(tiny_model(**fields), asked())
    model = tiny_model(**fields)
    model.config._attn_implementation = "flash_test"
    behind = greedy(model, text_of(asked()), scan=encoded(model))
    assert torch.equal(behind.sequences, expected.sequences)


def test_padding_on_the_right_behind_a_prefix():
    model = tiny_model(scheduler_layer=1)
    inputs, prefix = asked(), encoded(model)
    order = inputs["attention_mask"].argsort(dim=-1, descending=True, stable=True)
    right = {name: inputs[name].gather(1, order) for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    with torch.no_grad():
        for options in ({}, {"use_scheduler": False}):
            plain = model(**(inputs | right), **options)
            behind = model(**text_of(right), scan=prefix, **options)
            real = right["attention_mask"].bool() if plain.keep_index is None else plain.keep_index >= 0
            torch.testing.assert_close(behind.logits[real], plain.logits[real], **CLOSE)


@pytest.mark.parametrize("reuse", ["exact", "select"])
@EXACT
def test_saved_and_loaded(fields, reuse, tmp_path):
    model, processor = tiny_model(**fields), load_processor(str(ROOT))
    inputs, prefix = asked(), encoded(model, reuse=reuse)
    prefix.save(tmp_path / "scan.safetensors", processor)
    loaded = model.load_scan(tmp_path / "scan.safetensors", processor)
    a, b = (greedy(model, text_of(inputs), scan=scan) for scan in (prefix, loaded))
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))
    if reuse == "exact":
        assert_same_answers(greedy(model, inputs), b)
    with pytest.raises(ValueError, match="another model"):
        tiny_model(seed=1, **fields).load_scan(tmp_path / "scan.safetensors", processor)
    with pytest.raises(ValueError, match="another processor"):
        model.load_scan(tmp_path / "scan.safetensors", load_processor(str(ROOT), modality="mr"))


def test_another_scan_model_or_prompt_is_refused():
    model, inputs = tiny_model(), asked()
    prefix = encoded(model)
    text = text_of(inputs)
    assert torch.equal(  # the same voxels may be passed, and are compared
        greedy(model, inputs, scan=prefix, num_beams=2).sequences, greedy(model, inputs, num_beams=2).sequences
    )
    with torch.no_grad():
        model(**(inputs | {"pixel_values_videos": inputs["pixel_values_videos"].bfloat16()}), scan=prefix)
    for call in (model, lambda **given: greedy(model, given)):
        with pytest.raises(ValueError, match="not the scan that the prefix was made of"):
            call(**asked(seed=1), scan=prefix)
    other = asked(grids=[(3, 4, 6), (2, 4, 8)])  # as many tokens on another grid
    other["pixel_values_videos"] = inputs["pixel_values_videos"]
    with pytest.raises(ValueError, match="not the scan that the prefix was made of"):
        model(**other, scan=prefix)
    words = text["input_ids"].clone()
    words[words == 11] = 13
    with pytest.raises(ValueError, match="differ in token 3"):
        model(**(text | {"input_ids": words}), scan=prefix)
    with pytest.raises(ValueError, match="a scan that the prefix lacks"):
        model(**text_of(asked()), scan=model.encode_scan(**asked([(70,)], grids=SCANS[:1])))
    with pytest.raises(ValueError, match="prefix differ in token"):
        model(**text_of(asked(grids=SCANS[:1])), scan=prefix)
    with pytest.raises(ValueError, match="another model"):
        tiny_model(seed=1)(**text, scan=prefix)
    with pytest.raises(ValueError, match="carries no gradient"):
        model.train()(**text, scan=prefix)
    with pytest.raises(ValueError, match="carries no gradient"):
        encoded(model)
    model.eval()
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="weights have changed"):
        model(**text, scan=prefix)
    with pytest.raises(ValueError, match="reuse is 'all'"):
        encoded(model, reuse="all")
    with pytest.raises(ValueError, match="no scan"):
        model.encode_scan(**collate([(*prompt((20, 21), []), [])]))


def test_a_question_in_front_of_its_scan_is_refused():
    model, inputs = tiny_model(), asked([(20, 21)])
    ids = inputs["input_ids"]
    place = int((ids[0] == V_END).nonzero()[-1]) + 1
    ids = torch.cat([ids[:, :10], torch.tensor([[20, 21]]), ids[:, 10:place], ids[:, place + 2 :]], dim=1)
    inputs |= {"input_ids": ids, "mm_token_type_ids": (ids == VIDEO).int() * 2}
    with torch.no_grad():
        assert model(**inputs).keep_mask.any()
        with pytest.raises(ValueError, match="stands in front of its scan"):
            model(input_ids=ids, scan=model.encode_scan(**inputs))


@EXACT
def test_select_that_keeps_everything_equals_whole_prompts(fields):
    """Keys that have read tokens which a question does not keep are the only difference."""
    model = tiny_model(**fields)
    inputs, prefix = asked(), encoded(model, reuse="select")
    for options in ({"keep_ratio": 1.0}, {"use_scheduler": False}):
        assert_same_answers(greedy(model, inputs, **options), greedy(model, text_of(inputs), scan=prefix, **options))
        with torch.no_grad():
            plain, behind = model(**inputs, **options), model(**text_of(inputs), scan=prefix, **options)
        for row in range(3):
            index = behind.keep_index[row]
            text = plain.logits[row, index[index >= 0]]
            torch.testing.assert_close(behind.logits[row, index >= 0], text, **CLOSE)
    exact, select = (
        greedy(model, text_of(inputs), scan=scan).past_key_values.cut.keep_mask for scan in (encoded(model), prefix)
    )
    assert torch.equal(exact, select)


def test_select_attends_to_what_a_question_keeps():
    model = tiny_model(scheduler_layer=1)
    inputs, prefix = asked(), encoded(model, reuse="select")
    with torch.no_grad():
        few, other = (model(**text_of(inputs), scan=prefix, token_budget=n).logits[:, -1] for n in (4, 30))
        exact = model(**inputs, token_budget=4).logits[:, -1]
    assert (few - other).abs().max() > 1e-2  # the budget reaches the layers above
    assert (few - exact).abs().max() > 1e-4  # an approximation it is
    use_scheduler(model, "visionzip")
    with pytest.raises(ValueError, match="merges"), torch.no_grad():
        model(**text_of(inputs), scan=encoded(model, reuse="select"), token_budget=20)


def test_a_prefix_moves_and_is_chosen_from():
    model = tiny_model()
    prefix = model.encode_scan(**asked())
    assert isinstance(prefix.to("cpu"), ScanPrefix) and len(prefix) == 3 and len(prefix.rows([1])) == 1


# === In use ==========================================================================================================

ASKED = ["Is there a lesion in the liver?", "Which kidney is larger?", "Is it?", "How many lesions are in the spleen?"]


@pytest.fixture
def encodings(pipe, monkeypatch):
    """Counts how often a scan passes through the vision tower."""
    counted, encode = [], type(pipe.model.model).get_video_features
    monkeypatch.setattr(
        type(pipe.model.model), "get_video_features", lambda *a, **k: counted.append(1) or encode(*a, **k)
    )
    return counted


def test_the_pipeline_encodes_a_scan_once(pipe, scans, encodings):
    alone = [pipe(scan, question) for scan in scans for question in ASKED]
    assert len(encodings) == 8 and len({answer["tokens_kept"] for answer in alone}) > 2
    encodings.clear()
    asked = [{"volume": scan, "question": question} for scan in scans for question in ASKED]
    assert pipe(asked) == alone and pipe(scans[0], ASKED) == alone[:4]
    assert len(encodings) == 3
    mixed = [{"volume": scans, "question": ASKED[0]}, asked[0], {"volume": scans, "question": ASKED[1]}]
    assert pipe(mixed)[1] == alone[0]
    assert pipe({"volume": scans, "question": ASKED[:2]}) == [pipe(mixed[0]), pipe(mixed[2])]
    few = [answer["finish_reason"] for answer in pipe(scans[0], ASKED, max_new_tokens=1)]
    assert few == ["length"] * 4 and {answer["finish_reason"] for answer in alone} == {"stop"}


def test_asking_several_questions_reads_once(pipe, scans, encodings):
    alone = [asking.ask(pipe.processor, pipe.model, scans[:1], question) for question in ASKED]
    encodings.clear()
    together = asking.ask_all(pipe.processor, pipe.model, scans[:1], ASKED)
    assert len(encodings) == 1
    for (one, inputs, kept), (other, others_inputs, others_kept) in zip(alone, together, strict=True):
        assert one | {"seconds": None} == other | {"seconds": None}
        assert torch.equal(kept, others_kept) and inputs.keys() == others_inputs.keys()
        assert all(torch.equal(inputs[name], others_inputs[name]) for name in inputs)
        a, b = (pipe.processor.keep_map(mask, given) for mask, given in ((kept, inputs), (others_kept, others_inputs)))
        assert np.array_equal(sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b))
    assert together[1][0]["seconds"]["reading"] == 0 < together[0][0]["seconds"]["reading"]


def test_evaluation_shares_what_questions_share(pipe, scans, encodings):
    """Also with unlike text in front of a scan, and where a question stands in front of it."""
    model = VolumeModel(pipe.processor, pipe.model, 4)
    encoded = [model.encode(model.processor.image_processor([scan], return_tensors="pt")) for scan in scans[:1]]
    scan_part = [{"type": "volume"}]
    texts = [{"type": "text", "text": text} for text in ASKED]
    rows = [{"messages": [{"role": "user", "content": [*scan_part, text]}, None]} for text in texts]
    rows[1]["messages"].insert(0, {"role": "system", "content": "Answer with one word."})
    rows[2]["messages"][0]["content"] = [
        {"type": "text", "text": "Look. "},
        *scan_part,
        {"type": "text", "text": "Is it?"},
    ]
    plain = []
    for row in rows:
        inputs = dict(model.inputs([prompt_of(row)], encoded))
        inputs.pop("scan")
        features = {"video": join_outputs([encoded[0][0]])}
        plain.append(greedy(pipe.model, inputs, mm_encoder_outputs=features, max_new_tokens=4))
    encodings.clear()
    answers = model.answer(rows, encoded)
    texts = [model.processor.batch_decode(out.sequences[:, -4:], skip_special_tokens=True)[0] for out in plain]
    assert [answer["kept"] for answer in answers] == pytest.approx(
        [float(out.past_key_values.cut.keep_mask.float().mean()) for out in plain], abs=1e-6
    )
    assert all(text.endswith(answer["prediction"]) for text, answer in zip(texts, answers, strict=True))
    made = model.prefix
    model.answer(rows[:1], encoded)
    assert model.prefix is not made and len(made) == 3 and len(model.prefix) == 1
    made = model.prefix
    model.answer(rows[3:], encoded)
    assert model.prefix is made and not encodings
    rows[0]["messages"][0]["content"].reverse()
    assert "scan" not in model.inputs([prompt_of(rows[0])], encoded)
    select = VolumeModel(pipe.processor, pipe.model, 4, reuse="select")
    assert select.inputs([prompt_of(rows[3])], encoded)["scan"].reuse == "select"
    assert model.answer(rows[:1], encoded)[0]["kept"] > 0


def prompt_of(row):
    return row["messages"][:-1]


def test_prompts_about_encoded_scans(pipe, scans):
    chat = [{"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": ASKED[0]}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    with pytest.raises(ValueError, match="expected as many"):
        grids = {"video_grid_thw": torch.tensor([[4, 4, 4]] * 2)}
        pipe.processor.apply_chat_template(chat, processor_kwargs=grids, **options)
    chat[0]["content"][0]["volume"] = scans[0]
    with pytest.raises(ValueError, match="no scans beside it"):
        grids = {"video_grid_thw": torch.tensor([[4, 4, 4]])}
        pipe.processor.apply_chat_template(chat, processor_kwargs=grids, **options)
