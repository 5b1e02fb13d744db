"""PhotonConfig: what it refuses, what it keeps, and the configurations that ship."""

import json
from dataclasses import fields

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.modeling_outputs import CausalLMOutputWithPast

from conftest import ROOT, tiny_config
from photon.configuration_photon import PhotonConfig
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.objectives_photon import PhotonCausalLMOutputWithPast

BAD = [
    ({"saliency": "softmax"}, "saliency"),
    ({"surrogate": "ste"}, "surrogate"),
    ({"scheduler_layer": 4}, "scheduler_layer"),
    ({"scheduler_layer": -2}, "scheduler_layer"),
    ({"scheduler_layer": 1.5}, "scheduler_layer"),
    ({"evict_early_layers": "yes"}, "evict_early_layers"),
    ({"keep_temperature": 0.0}, "keep_temperature"),
    ({"keep_temperature": "hot"}, "keep_temperature"),
    ({"min_kept_tokens": 0}, "min_kept_tokens"),
    ({"threshold_max": 1.2}, "threshold_max"),
    ({"band_low": 0.9}, "band_low"),
    ({"robust_shares": [0.5, 0.5]}, "robust_shares"),
    ({"flip_probability": -0.1}, "flip_probability"),
    ({"soft_start_step": 9, "hard_start_step": 3}, "soft_start_step"),
    ({"surrogate_magnitude_min": 3.0}, "surrogate_magnitude_min"),
    ({"second_per_grid_ts": 0.0}, "second_per_grid_ts"),
]


@pytest.mark.parametrize(("fields", "named"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_wrong_values_are_refused_by_name(fields, named):
    with pytest.raises(StrictDataclassError, match=named):
        tiny_config(**fields)


def test_values_are_checked_wherever_they_enter(tmp_path):
    """At construction, as arguments of from_pretrained, by assignment, and when a model is made of the config."""
    config = tiny_config()
    for name, value in (("saliency", "attn"), ("surrogate", "gat"), ("keep_temperature", 0), ("flip_probability", 2)):
        with pytest.raises(StrictDataclassError, match=name):
            setattr(config, name, value)
    config.save_pretrained(tmp_path)
    for wrong in ({"saliency": "attn"}, {"surrogate": "gat"}, {"band_low": 0.9}, {"soft_start_step": 9000}):
        with pytest.raises(StrictDataclassError, match=next(iter(wrong))):
            PhotonConfig.from_pretrained(tmp_path, **wrong)
    assert PhotonConfig.from_pretrained(tmp_path, band_low=0.85, band_high=0.9).band_low == 0.85
    config.band_low = 0.9  # above band_high, which may be next
    with pytest.raises(StrictDataclassError, match="band_low"):
        PhotonForConditionalGeneration(config)


def test_what_inference_leaves_out_is_every_extra_output():
    """The Trainer gathers all other outputs over an evaluation."""
    extra = {f.name for f in fields(PhotonCausalLMOutputWithPast)} - {f.name for f in fields(CausalLMOutputWithPast)}
    assert set(PhotonConfig.keys_to_ignore_at_inference) == extra | {"past_key_values"}


def test_a_misspelt_field_is_refused(tmp_path):
    """At construction, within a part, as an argument of from_pretrained, and by assignment."""
    config = tiny_config()
    parts = {name: getattr(config, name).to_dict() for name in ("text_config", "vision_config")}
    for wrong, right in (("num_hiden_layers", "num_hidden_layers"), ("hidden_sizes", "hidden_size")):
        with pytest.raises(ValueError, match=f"{wrong!r} of Qwen2_5_VLTextConfig; did you mean {right!r}"):
            PhotonConfig(**parts | {"text_config": parts["text_config"] | {wrong: 2}})
    with pytest.raises(ValueError, match="'intermediate_sise' of PhotonVisionConfig"):
        PhotonConfig(**parts | {"vision_config": parts["vision_config"] | {"intermediate_sise": 2}})
    for wrong, right in (("keep_temprature", "keep_temperature"), ("tie_word_embedings", "tie_word_embeddings")):
        with pytest.raises(ValueError, match=f"did you mean {right!r}"):
            tiny_config(**{wrong: 1})
        with pytest.raises(ValueError, match=f"did you mean {right!r}"):
            setattr(config, wrong, 1)
    with pytest.raises(ValueError, match="did you mean 'text_config'"):
        PhotonConfig(text_confg=parts["text_config"])
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'saliency'"):
        PhotonConfig.from_pretrained(tmp_path, salency="attention")


def test_sliding_windows_are_refused():
    config = tiny_config()
    text = config.text_config.to_dict() | {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}
    with pytest.raises(StrictDataclassError, match="use_sliding_window"):
        type(config)(text_config=text, vision_config=config.vision_config.to_dict())


def test_defaults_follow_the_method():
    config = tiny_config(layers=8)
    assert config.scheduler_layer == 1 and tiny_config(layers=2).scheduler_layer == 0
    assert (config.threshold_max, config.keep_temperature, config.threshold_bias_init) == (0.9, 0.2, -5.0)
    assert config.vision_config.tokens_per_second * config.second_per_grid_ts == 28
    assert not config.evict_early_layers
    assert config.vision_config.in_channels == 1 and config.vision_config.temporal_patch_size == 14


def test_round_trip(tmp_path):
    config = tiny_config(scheduler_layer=-1, saliency="attention", surrogate="release", band_low=0.1)
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "config.json").read_text() == (tmp_path / "twice" / "config.json").read_text()


@pytest.mark.parametrize(("name", "layers", "billions"), [
    ("photon_3b", 36, 3.75), ("photon_7b", 28, 8.29), ("photon_32b", 64, 33.5), ("photon_72b", 80, 73.4),
])  # fmt: skip
def test_shipped_configurations_build_on_meta(name, layers, billions):
    fields = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    fields.pop("model_type")
    config = PhotonConfig(**fields)
    with torch.device("meta"):
        model = PhotonForConditionalGeneration(config)
    assert len(model.model.language_model.layers) == layers
    assert config.scheduler_layer == layers // 4 - 1
    assert model.get_parameter("model.visual.patch_embed.proj.weight").shape[1:] == (1, 14, 14, 14)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e9 == pytest.approx(billions, rel=0.02)


def test_root_configuration_is_a_full_one():
    """config.json equals PhotonConfig of itself, with every field written out."""
    fields = json.loads((ROOT / "config.json").read_text())
    config_class = PhotonConfig
    written = config_class.from_pretrained(ROOT).to_dict()
    assert set(config_class.__annotations__) <= set(fields)
    for name in config_class.__annotations__:
        assert written[name] == fields[name], name


def test_a_checkpoint_of_another_type_is_refused(tmp_path):
    """transformers would warn, load the vision tower, and leave the decoder random."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "hidden_size": 64}))
    with pytest.raises(ValueError, match="convert_photon.py --qwen"):
        PhotonForConditionalGeneration.from_pretrained(tmp_path)
