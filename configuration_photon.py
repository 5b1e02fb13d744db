"""PhotonConfig: Qwen2.5-VL's configuration with one-channel volumes and every constant of the Photon method.

What differs from `Qwen2_5_VLConfig`:
- its own `model_type`, so that a load without `trust_remote_code=True` refuses instead of building the stock model;
- the vision tower reads one channel in patches of 14 x 14 x 14 voxels;
- the scheduler (ITS), its surrogate gradient (SGP), the objectives and the training phases are fields.
Numbers and names follow the paper (arXiv 2603.25155) and the authors' release.
"""

import copy
import difflib

from huggingface_hub.dataclasses import strict, validated_field
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

AUTO_MAP = {
    "AutoConfig": "configuration_photon.PhotonConfig",
    "AutoModel": "modeling_photon.PhotonModel",
    "AutoModelForImageTextToText": "modeling_photon.PhotonForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_photon.PhotonForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "volume-question-answering": {
        "impl": "pipeline_photon.VolumeQuestionAnsweringPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}
UNUSED = "vision_token_id"  # in the files of Qwen's models, where nothing reads it


def one_of(*values, default):
    """A field with one of these values, whenever it is set."""

    def check(value):
        if value not in values:
            raise ValueError(f"is {value!r}; expected one of {', '.join(map(repr, values))}.")

    return validated_field(check, default=default)


def above_zero(default):
    """A field with a number above 0, whenever it is set."""

    def check(value):
        if not value > 0:
            raise ValueError(f"is {value}; expected a number above 0.")

    return validated_field(check, default=default)


def share(default):
    """A field with a share from 0 to 1, whenever it is set."""

    def check(value):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"is {value}; expected a share from 0 to 1.")

    return validated_field(check, default=default)


def refuse_misspelt(names, config_class):
    """Raises `ValueError` for a name that is nearly that of a field: the parent would keep it, without effect."""
    known = {*config_class.__dataclass_fields__, UNUSED}
    for name in names:
        if name not in known and (close := difflib.get_close_matches(name, known, n=1, cutoff=0.85)):
            raise ValueError(f"unknown field {name!r} of {config_class.__name__}; did you mean {close[0]!r}?")


@strict
class PhotonVisionConfig(Qwen2_5_VLVisionConfig):
    """Vision tower of Qwen2.5-VL on volumes: `temporal` means depth here, one patch is 14 slices deep."""

    in_channels: int = 1
    temporal_patch_size: int | list[int] | tuple[int, int] = 14
    tokens_per_second: int = 2


@strict
class PhotonConfig(Qwen2_5_VLConfig):
    r"""
    Args:
        scheduler_layer (`int`, *optional*, defaults to `num_hidden_layers // 4 - 1`, at least 0):
            Tokens are scored with this decoder layer's queries and keys and deleted after it. -1: scored with layer
            0's, deleted before it.
        saliency (`str`, defaults to `"attention"`):
            `"logits"`: scaled dot products, as the release. `"attention"`: their softmax over the visual tokens.
        saliency_scale (`str`, defaults to `"standard"`):
            What the threshold is compared with: the saliency between 0 and 1 over a row's visual tokens (`"minmax"`),
            as in the release, or its standard score (mean 0, deviation 1; of the logarithm of attention).
        saliency_gradient (`bool`, defaults to `True`):
            Whether gradients pass from the keep probabilities through the saliency into the scheduling layer's
            queries and keys, so that training moves the ranking of the tokens. Without it, as in the release, it
            learns one number for a scan and a question, the threshold.
        evict_early_layers (`bool`, defaults to `False`):
            Whether deleted tokens also leave the caches of layers 0..`scheduler_layer`. The release does so, which
            makes decoding differ from training; a conversation then answers from the kept tokens alone.
        use_scheduler (`bool`, defaults to `True`):
            Whether calls that do not say it themselves delete tokens. `False` in a model that was trained without:
            its threshold has learned nothing.
        output_full_length (`bool`, defaults to `False`):
            Whether logits have the length of the prompt, with zeros where tokens were deleted, which trainers that
            compare logits with labels expect; otherwise they have the length after the cut.
        threshold_max, threshold_bias_init (`float`):
            The threshold is `threshold_max * sigmoid(MLP(statistics))`; the MLP's last bias starts at
            `threshold_bias_init`, so that nearly everything is kept at first.
        threshold_hidden_divisor (`int`): the MLP is `hidden_size // threshold_hidden_divisor` wide.
        keep_temperature, keep_cutoff (`float`):
            Keep probability `sigmoid((saliency - threshold) / keep_temperature)`; kept where above `keep_cutoff`.
        min_kept_tokens (`int`): at least so many visual tokens stay in a row that has any.
        saliency_eps, centrality_floor (`float`): guards of the min-max scaling and of the question weights.
        surrogate (`str`, defaults to `"exact"`):
            The gradient that reaches the keep probabilities p. `"release"` or `"taylor"`: the paper's rule with one
            sign or the other; the two push the threshold in opposite directions. `"gate"`: log p of each token is
            added to the attention logits of its key above the cut, in the hard phase less its own value, so that
            nothing but a gradient is added. `"exact"`: the exact cut. Keep probabilities become random gates with an
            atom at 0 (hard concrete, Louizos et al. 2018), and the logarithm of a gate is added to the attention
            logits of its key in every layer above the cut. A token whose gate is 0 has no weight for anyone and is
            deleted, so that the short sequence gives the exact gradient of the full one. Both need sdpa, eager or
            `"gated_flash_attention_2"` attention in training.
        surrogate_scale, surrogate_std_floor, surrogate_clip, surrogate_magnitude_min, surrogate_magnitude_max,
        surrogate_slope_floor, surrogate_eps (`float`): constants of that gradient.
        keep_budget (`float`, *optional*, defaults to 0.1):
            Share of visual tokens that training keeps, held over each process's batch by one threshold that is solved
            for; the predictor's threshold is an offset to it by row. Inference uses a running mean of it, which is
            saved with the weights. Needs `saliency_scale="standard"`. With `None` a row's threshold is the
            predictor's alone, as in the release.
        budget_end_step (`int`):
            Optimizer step at which the budget is reached; it falls geometrically from 1 at `hard_start_step`.
        budget_momentum (`float`): of the running mean of the threshold.
        gate_slope, gate_temperature, gate_low, gate_high (`float`):
            The gates of `"exact"`: `clamp(sigmoid((logit(u) + slope * margin) / temperature) * (high - low) + low)`
            between 0 and 1, u uniform. `gate_slope`, and the probability of a gate above 0, hold for every surrogate
            with `keep_budget`.
        gate_gradient (`float`, defaults to 1.0): factor on the gradient that reaches the gates of `"exact"`.
        band_low, band_high, band_weight (`float`): the mean keep probability is pushed into [band_low, band_high]; in
            the release with a weight of 1. The default weight is 0, since the budget holds the share.
        robust_probability (`float`): share of training rows whose volume is perturbed.
        robust_shares (`list[float]`):
            How often each perturbation is drawn: shuffled patches; shuffled patches and voxels; patches zeroed;
            voxels zeroed; uniform noise; all zero.
        robust_patch_drop, robust_voxel_drop (`float`): share of patches or voxels zeroed by the third and fourth.
        flip_probability, flip_eps (`float`): share of training rows that keep what they would drop; its log's guard.
        soft_start_step, hard_start_step, flip_start_step (`int`):
            Optimizer steps at which tokens are first weighted, first deleted, first flipped.
        second_per_grid_ts (`float`, defaults to 14.0):
            `temporal_patch_size / fps` with one slice a second; a depth step advances the rotary position by
            `tokens_per_second * second_per_grid_ts` = 28.
        im_start_token_id, im_end_token_id, user_token_id (`int`, *optional*):
            Ids of `<|im_start|>`, `<|im_end|>` and the role word `user`, by which the question is found.

    Raises:
        `StrictDataclassError` (of huggingface_hub) on a wrong type or value, `ValueError` on a misspelt field.
    """

    model_type = "photon"
    sub_configs_defaults = {"vision_config": PhotonVisionConfig, "text_config": Qwen2_5_VLTextConfig}
    keys_to_ignore_at_inference = [
        "past_key_values", "keep_mask", "keep_index", "keep_prob", "threshold", "saliency", "saliency_logits",
        "visual_count", "lm_loss", "band_loss",
    ]  # fmt: skip

    # --- ITS: instruction-conditioned token scheduling
    scheduler_layer: int | None = None
    saliency: str = one_of("logits", "attention", default="attention")
    saliency_scale: str = one_of("minmax", "standard", default="standard")
    saliency_gradient: bool = True
    evict_early_layers: bool = False
    use_scheduler: bool = True
    output_full_length: bool = False
    threshold_max: float | int = share(0.9)
    threshold_bias_init: float | int = -5.0
    threshold_hidden_divisor: int = above_zero(8)
    keep_temperature: float | int = above_zero(0.2)
    keep_cutoff: float | int = share(0.5)
    min_kept_tokens: int = above_zero(1)
    saliency_eps: float | int = above_zero(1e-8)
    centrality_floor: float | int = above_zero(1.0)
    # --- SGP: surrogate gradient propagation
    surrogate: str = one_of("release", "taylor", "gate", "exact", default="exact")
    surrogate_scale: float | int = 0.8
    surrogate_std_floor: float | int = above_zero(3e-3)
    surrogate_clip: float | int = above_zero(1.5)
    surrogate_magnitude_min: float | int = 0.5
    surrogate_magnitude_max: float | int = 2.0
    surrogate_slope_floor: float | int = 5e-3
    surrogate_eps: float | int = above_zero(1e-6)
    # --- the budget, and the gates of the exact cut
    keep_budget: float | int | None = share(0.1)
    budget_end_step: int = 12000
    budget_momentum: float | int = share(0.9)
    gate_slope: float | int = above_zero(3.0)
    gate_temperature: float | int = above_zero(0.5)
    gate_low: float | int = -0.1
    gate_high: float | int = 1.1
    gate_gradient: float | int = above_zero(1.0)
    # --- objectives
    band_low: float | int = 0.3
    band_high: float | int = 0.8
    band_weight: float | int = 0.0
    robust_probability: float | int = share(0.15)
    robust_shares: list[float] | tuple[float, ...] = (0.16, 0.16, 0.16, 0.16, 0.16, 0.20)
    robust_patch_drop: float | int = share(0.8)
    robust_voxel_drop: float | int = share(0.9)
    flip_probability: float | int = share(0.05)
    flip_eps: float | int = above_zero(1e-6)
    # --- phases, by optimizer step
    soft_start_step: int = 4000
    hard_start_step: int = 8000
    flip_start_step: int = 9000
    # --- positions and the question's place
    second_per_grid_ts: float | int = above_zero(14.0)
    im_start_token_id: int | None = 151644
    im_end_token_id: int = 151645
    user_token_id: int | None = 872

    def __post_init__(self, **kwargs):
        for name, part in self.sub_configs_defaults.items():
            if isinstance(given := getattr(self, name), dict):
                refuse_misspelt(given, part.config_class)
        # whoever saves: the folder names all its classes and its pipeline
        kwargs |= copy.deepcopy(
            {"auto_map": AUTO_MAP, "custom_pipelines": CUSTOM_PIPELINES}
        )  # a pipeline writes in them
        super().__post_init__(**kwargs)
        if self.scheduler_layer is None:
            self.scheduler_layer = max(self.text_config.num_hidden_layers // 4 - 1, 0)

    def __setattr__(self, name, value):
        if not name.startswith("_"):
            refuse_misspelt([name], type(self))
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # transformers only warns; but with Qwen's key names the whole decoder would stay random
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"This checkpoint is of type {config_dict['model_type']!r}, not {cls.model_type!r}. Convert it first: "
                "python convert_photon.py --qwen DIR|HUB_ID --output DIR (or --official for the authors' release)."
            )
        refuse_misspelt(kwargs, cls)
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.validate()  # once more, since kwargs were set one by one
        return loaded

    def validate_scheduler(self):
        layers = self.text_config.num_hidden_layers
        if self.scheduler_layer is not None and not -1 <= self.scheduler_layer < layers:
            raise ValueError(
                f"scheduler_layer is {self.scheduler_layer}; expected -1 (before the first layer) to {layers - 1} "
                f"(the decoder has {layers} layers)."
            )
        if self.text_config.use_sliding_window:
            raise ValueError(
                "use_sliding_window is True; a window of places has no meaning once tokens are deleted. "
                "Set text_config.use_sliding_window=False."
            )

    def validate_budget(self):
        if self.surrogate == "exact" and self.keep_budget is None:
            raise ValueError('surrogate="exact" needs keep_budget, the share of the visual tokens to keep.')
        if self.keep_budget is not None and not 0 < self.keep_budget:
            raise ValueError(f"keep_budget is {self.keep_budget}; expected a share above 0.")
        if self.keep_budget is not None and self.saliency_scale != "standard":
            raise ValueError('keep_budget needs saliency_scale="standard", so that one threshold fits every row.')
        if self.keep_budget is not None and self.band_weight > 0 and not self.band_low <= self.keep_budget:
            raise ValueError(
                f"keep_budget is {self.keep_budget}, but the band loss pushes the kept share above band_low, "
                f"{self.band_low}. Set band_weight=0, or a lower band_low."
            )
        layers = self.text_config.num_hidden_layers
        if self.surrogate == "exact" and self.scheduler_layer == layers - 1:
            raise ValueError(
                f'surrogate="exact" gates the layers above scheduler_layer {self.scheduler_layer}, and the decoder '
                f"has {layers} layers, so there is none. Take a lower one."
            )
        if not self.gate_low < 0 < 1 < self.gate_high:
            raise ValueError(
                f"gate_low, gate_high are {self.gate_low}, {self.gate_high}; expected gate_low < 0 and gate_high > 1, "
                "so that gates of exactly 0 and 1 occur."
            )
        if self.keep_budget is not None and self.budget_end_step < self.hard_start_step:
            raise ValueError(
                f"budget_end_step is {self.budget_end_step}; expected hard_start_step or more, {self.hard_start_step}."
            )

    def validate_ranges(self):
        if not 0 <= self.band_low <= self.band_high <= 1:
            raise ValueError(
                f"band_low, band_high are {self.band_low}, {self.band_high}; expected 0 <= low <= high <= 1."
            )
        if not 0 < self.surrogate_magnitude_min <= self.surrogate_magnitude_max:
            raise ValueError("expected 0 < surrogate_magnitude_min <= surrogate_magnitude_max.")
        if len(self.robust_shares) != 6 or min(self.robust_shares) < 0 or abs(sum(self.robust_shares) - 1) > 1e-6:
            raise ValueError(f"robust_shares is {self.robust_shares}; expected six shares that add up to 1.")
        if not 0 <= self.soft_start_step <= self.hard_start_step <= self.flip_start_step:
            raise ValueError(
                "expected 0 <= soft_start_step <= hard_start_step <= flip_start_step; got "
                f"{self.soft_start_step}, {self.hard_start_step}, {self.flip_start_step}."
            )


__all__ = ["PhotonConfig", "PhotonVisionConfig"]
