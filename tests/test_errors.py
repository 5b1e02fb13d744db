"""Wrong input to the model: each with its own error."""

import subprocess
import sys

import pytest
import torch
from transformers import StaticCache

from conftest import IM_END, ROOT, VIDEO, collate, prompt, text_row, three_rows, tiny_model

GRIDS = [(2, 6, 4)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def inputs():
    return collate(three_rows()[:1])


def without(inputs, *names):
    return {key: value for key, value in inputs.items() if key not in names}


def test_missing_token_types(model, inputs):
    bad = without(inputs, "mm_token_type_ids")
    with pytest.raises(ValueError, match="mm_token_type_ids is missing"):
        model(**bad)
    with pytest.raises(ValueError, match="mm_token_type_ids is missing"):
        model.generate(**bad, max_new_tokens=2)


def test_volume_tokens_without_volumes(model, inputs):
    bad = without(inputs, "pixel_values_videos", "video_grid_thw")
    with pytest.raises(ValueError, match="12 volume tokens but no volumes"):
        model(**bad)


def test_more_or_fewer_volumes_than_tokens(model, inputs):
    ids, answer = prompt((20, 21), GRIDS * 2)
    two_marks = collate([(ids, answer, GRIDS)])
    with pytest.raises(ValueError, match="(?i)match"):
        model(**two_marks)
    one_mark = without(collate([(*prompt((20, 21), GRIDS), GRIDS * 2)]), "attention_mask")
    with pytest.raises(ValueError, match="(?i)match"):
        model(**one_mark)
    with pytest.raises(ValueError, match="(?i)match"):
        model(**(inputs | {"video_grid_thw": torch.tensor([[2, 4, 4]])}))


def test_prompt_without_a_question(model):
    ids, answer = prompt((), GRIDS)
    with pytest.raises(ValueError, match="Row 1 has a scan but no question"):
        model(**collate([three_rows()[0], (ids, answer, GRIDS)]))
    open_turn = [token for token in prompt((20, 21), GRIDS)[0] if token != IM_END]
    with pytest.raises(ValueError, match="no question"):
        model(**collate([(open_turn, [], GRIDS)]))


def test_embeddings_need_the_masks(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    bad = without(inputs, "input_ids", "pixel_values_videos", "video_grid_thw") | {"inputs_embeds": embeds}
    with pytest.raises(ValueError, match="visual_mask and question_mask"):
        model(**bad)
    visual = inputs["input_ids"] == VIDEO
    with pytest.raises(ValueError, match="without question_mask"):
        model(**bad, video_grid_thw=inputs["video_grid_thw"], visual_mask=visual)


def test_embeddings_with_masks_equal_ids(model, inputs):
    with torch.no_grad():
        expected = model(**inputs)
        ids, visual = inputs["input_ids"], inputs["input_ids"] == VIDEO
        scan = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        embeds = model.get_input_embeddings()(ids).masked_scatter(visual[..., None], scan.pooler_output[0])
        question = torch.zeros_like(visual)
        question[0, ids[0].tolist().index(20) :][:5] = True
        got = model(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            video_grid_thw=inputs["video_grid_thw"],
            visual_mask=visual,
            question_mask=question,
        )
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_static_cache(model, inputs):
    with pytest.raises(ValueError, match="static"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    cache = StaticCache(config=model.config.text_config, max_cache_len=99)
    with pytest.raises(ValueError, match="static"):
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
    with pytest.raises(ValueError, match="static"):
        model(**inputs, past_key_values=cache)


def test_chunked_prefill(model, inputs):
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)


def test_scan_into_a_running_conversation(model, inputs):
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    with pytest.raises(ValueError, match="already holds a conversation"):
        model(**inputs, past_key_values=out.past_key_values)


def test_budgets(model, inputs):
    for options, named in [
        ({"token_budget": 3, "keep_ratio": 0.5}, "not both"),
        ({"token_budget": -1}, "token_budget is -1"),
        ({"token_budget": 2.5}, "token_budget is 2.5"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5"),
        ({"use_scheduler": False, "token_budget": 3}, "keeps all tokens"),
    ]:
        with pytest.raises(ValueError, match=named):
            model(**inputs, **options)
    with torch.no_grad():
        rows = collate(three_rows())
        assert model(**rows, token_budget=5).keep_mask.sum(-1).tolist() == [5, 5, 5]
        assert model(**rows, keep_ratio=0.25).keep_mask.sum(-1).tolist() == [3, 8, 10]
        assert model(**rows, token_budget=0).keep_mask.sum() == 0


def test_phase_names(model):
    with pytest.raises(ValueError, match="'dense', 'soft', 'hard'"):
        model.set_scheduler_phase("warm")


def test_a_four_dimensional_mask(model, inputs):
    length = inputs["input_ids"].shape[1]
    mask = torch.zeros(1, 1, length, length)
    position_ids, _ = model.model.get_rope_index(**without(inputs, "attention_mask"))
    with pytest.raises(ValueError, match="2D"):
        model(**(inputs | {"attention_mask": mask, "position_ids": position_ids}))


def test_evicting_needs_a_cache_that_counts():
    from transformers import DynamicCache

    model = tiny_model(evict_early_layers=True)
    inputs = collate(three_rows()[:1])
    with pytest.raises(ValueError, match="PhotonCache"), torch.no_grad():
        model(**inputs, past_key_values=DynamicCache(config=model.config.text_config))


def test_rows_without_a_scan_are_right(model):
    """In evaluation and in training, alone and in a batch; every parameter gets a gradient."""
    trained = tiny_model().train()
    inputs = collate([text_row((60, 61)), text_row((62,))])
    out = trained(**inputs, use_cache=False)
    out.loss.backward()
    assert out.keep_mask is None and out.band_loss == 0
    assert all(parameter.grad is not None for parameter in trained.parameters())
    assert not any(p.grad.any() for n, p in trained.named_parameters() if "scheduler" in n or "visual" in n)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).loss)


def test_packed_rows(model):
    rows = collate(three_rows()[:1])
    length = rows["input_ids"].shape[1]
    two = {name: torch.cat([rows[name]] * 2, dim=1) for name in ("input_ids", "mm_token_type_ids")}
    scans = {name: torch.cat([rows[name]] * 2) for name in ("pixel_values_videos", "video_grid_thw")}
    positions, _ = model.model.get_rope_index(**without(rows, "attention_mask"))
    text = torch.arange(length).expand(1, 1, -1)
    packed = torch.cat([torch.cat([text, positions])] * 2, dim=-1)  # (4, 1, 2 S)
    with pytest.raises(ValueError, match="several packed samples"):
        model(**two, **scans, position_ids=packed)


def test_an_assistant_model_is_refused_by_name():
    model = tiny_model()
    with pytest.raises(ValueError, match="assistant_model is not supported.*prompt_lookup_num_tokens"):
        model.generate(**collate(three_rows()[:1]), assistant_model=model, max_new_tokens=2)


def test_scans_beside_a_filled_cache_are_named():
    model, inputs = tiny_model(), collate(three_rows()[:1])
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([out.sequences, torch.tensor([[20, 21]])], dim=1)
    again = dict(inputs, input_ids=longer, attention_mask=torch.ones_like(longer))
    with pytest.raises(ValueError, match="leave out pixel_values_videos, video_grid_thw, mm_token_type_ids"):
        model.generate(**again, past_key_values=out.past_key_values, max_new_tokens=2)
    going_on = {name: again[name] for name in ("input_ids", "attention_mask")}
    model.generate(**going_on, past_key_values=out.past_key_values, max_new_tokens=2)


def test_a_transformers_that_names_its_caches_in_another_way():
    """As 5.24 does: one line that tells what to install, not wrong shapes in the middle of a forward pass."""
    code = """
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
qwen.Qwen2_5_VLTextModel.forward = lambda self, input_ids=None, cache=None: None
import photon.modeling_photon
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode and 'pip install "transformers>=5.23,<5.24"' in done.stderr.splitlines()[-1]
