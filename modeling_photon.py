"""Photon: Qwen2.5-VL on volumes, with visual tokens deleted after one decoder layer, in training and inference alike.

What differs from Qwen2.5-VL, and nothing else:
- `PhotonDecoderLayer`, at the scheduling layer: also returns the queries and keys by which tokens are scored;
- `PhotonTextModel.forward`: the branch that scores, cuts, and goes on with the short sequence;
- `PhotonModel`: positions in which text starts behind a volume's last depth step; the masks of scan and question;
- `PhotonForConditionalGeneration`: labels cut alike, the losses, the phases, what generation must refuse;
- `PhotonCache`: a `DynamicCache` that knows what was cut.
The method itself is in `scheduling_photon.py`, its objectives in `objectives_photon.py`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen2_5_VLTextModel,
    apply_rotary_pos_emb,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_photon import PhotonConfig
from .objectives_photon import Objective
from .objectives_photon import answer_losses
from .objectives_photon import band_losses
from .scheduling_photon import Float32Linear
from .scheduling_photon import TokenScheduler
from .scheduling_photon import cut_index
from .scheduling_photon import gather_places
from .scheduling_photon import masked_index
from .scheduling_photon import question_mask as find_question
from .scheduling_photon import soft_weight
from .scheduling_photon import surrogate_gather

PHASES = ("dense", "soft", "hard")


@dataclass
class PhotonModelOutputWithPast(BaseModelOutputWithPast):
    """
    `last_hidden_state` is (B, S', D), S' the longest row after the cut; B rows, V visual tokens of the richest row.

    Args:
        keep_mask (`torch.BoolTensor` of shape `(B, V)`): which visual tokens stayed, in the order of the prompt.
        keep_prob (`torch.FloatTensor` of shape `(B, V)`): their keep probabilities.
        threshold (`torch.FloatTensor` of shape `(B, 1)`): 0 to `config.threshold_max`; no meaning in a row without scan.
        saliency (`torch.FloatTensor` of shape `(B, V)`): 0 to 1 over a row's visual tokens.
        saliency_logits (`torch.FloatTensor` of shape `(B, V)`): the same before min-max scaling.
        visual_count (`torch.LongTensor` of shape `(B,)`): visual tokens of each row before the cut.
        keep_index (`torch.LongTensor` of shape `(B, S')`): place in the prompt of each place of the short sequence,
            -1 for padding. `None` where nothing was cut.
    """

    keep_mask: torch.BoolTensor | None = None
    keep_prob: torch.FloatTensor | None = None
    threshold: torch.FloatTensor | None = None
    saliency: torch.FloatTensor | None = None
    saliency_logits: torch.FloatTensor | None = None
    visual_count: torch.LongTensor | None = None
    keep_index: torch.LongTensor | None = None


@dataclass
class PhotonCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    As `PhotonModelOutputWithPast`, with `logits` (B, S', vocabulary), and the parts of `loss`.

    Args:
        lm_loss (`torch.FloatTensor` of shape `()`): mean over answer tokens; entropy or flip terms in rows of that kind.
        band_loss (`torch.FloatTensor` of shape `()`): before `config.band_weight`; 0 in the dense phase.
    """

    keep_mask: torch.BoolTensor | None = None
    keep_prob: torch.FloatTensor | None = None
    threshold: torch.FloatTensor | None = None
    saliency: torch.FloatTensor | None = None
    saliency_logits: torch.FloatTensor | None = None
    visual_count: torch.LongTensor | None = None
    keep_index: torch.LongTensor | None = None
    lm_loss: torch.FloatTensor | None = None
    band_loss: torch.FloatTensor | None = None


SCHEDULE_FIELDS = ("keep_mask", "keep_prob", "threshold", "saliency", "saliency_logits", "visual_count", "keep_index")


@dataclass
class Cut:
    """What a cache must remember of its cut."""

    mask: torch.Tensor  # (B, S') bool: which places of the short prompt are real
    dropped: int  # S - S': by how much the short prompt is shorter
    first_layer: int  # layers below hold the whole prompt
    keep_mask: torch.Tensor  # (B, V) bool: which visual tokens stayed
    visual_count: torch.Tensor  # (B,): of how many

    def attention_mask(self, attention_mask, stored, new):
        """(B, stored + new) for a layer that holds `stored` places of a short prompt and what followed it.

        attention_mask (B, S + ...) of the unpruned sequence, or `None` where nothing in it is padding.
        """
        short = self.mask[:, :stored]  # shorter than the prompt if candidates of prompt lookup were taken back
        if attention_mask is None:
            rest = self.mask.new_ones(short.shape[0], stored + new - short.shape[1])
        else:
            rest = attention_mask[:, short.shape[1] + self.dropped : stored + self.dropped + new].bool()
        return torch.cat([short, rest.to(short.device)], dim=-1)


class PhotonCache(DynamicCache):
    """A `DynamicCache` whose length is the number of tokens seen, also where some were cut from it.

    After a prompt with scans `cache.cut` tells which visual tokens stayed; `generate(..., return_dict_in_generate=True)`
    returns the cache as `past_key_values`.
    """

    cut: Cut | None = None
    rope_deltas: torch.Tensor | None = None

    def get_seq_length(self, layer_idx=0):
        stored = super().get_seq_length(layer_idx)
        return stored + self.cut.dropped if stored and self.cut and layer_idx >= self.cut.first_layer else stored

    def get_query_offset(self, layer_idx=0):
        return super().get_seq_length(layer_idx)

    def reset(self):
        super().reset()
        self.cut = self.rope_deltas = None


class PhotonDecoderLayer(Qwen2_5_VLDecoderLayer):
    """The scheduling layer. Scores are taken inside its forward, where sharded weights are at hand."""

    def forward(self, hidden_states, *args, look_at=None, look_only=False, position_embeddings=None, **kwargs):
        """
        Args: look_at: (question_index (B, Q), visual_index (B, V)), places whose queries and keys are wanted.
            look_only: without running the layer.
        Returns: hidden states (`None` if `look_only`), and with `look_at` queries (B, H, Q, d), question keys
            (B, G, Q, d), visual keys (B, G, V, d).
        """
        looks = () if look_at is None else self.look(hidden_states, position_embeddings, *look_at)
        if look_only:
            return None, *looks
        hidden_states = super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        return (hidden_states, *looks) if looks else hidden_states

    @torch.no_grad()
    def look(self, hidden_states, position_embeddings, question_index, visual_index):
        def project(linear, index):  # (B, S, D) -> (B, heads, N, d)
            normed = self.input_layernorm(gather_places(hidden_states, index))
            return linear(normed).unflatten(-1, (-1, self.self_attn.head_dim)).transpose(1, 2)

        def rotate(query, key, index):
            return apply_rotary_pos_emb(query, key, *(gather_places(part, index) for part in position_embeddings))

        attention = self.self_attn
        keys = project(attention.k_proj, visual_index)
        queries, question_keys = rotate(
            project(attention.q_proj, question_index), project(attention.k_proj, question_index), question_index
        )
        return queries, question_keys, rotate(keys, keys, visual_index)[1]


class PhotonPreTrainedModel(Qwen2_5_VLPreTrainedModel):
    config: PhotonConfig
    config_class = PhotonConfig
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "PhotonDecoderLayer", "Qwen2_5_VLVisionBlock"]
    _can_compile_fullgraph = False  # the length after the cut depends on the data

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Float32Linear):
            init.constant_(module.bias, module.bias_init)


class PhotonTextModel(PhotonPreTrainedModel, Qwen2_5_VLTextModel):
    """Qwen2.5-VL's decoder with one cut. `scheduler` may be any module that returns a `Schedule`."""

    config_class = Qwen2_5_VLTextModel.config_class
    input_modalities = ("text",)

    def __init__(self, config, photon):
        super().__init__(config)
        self.photon = photon
        self.look_layer = max(photon.scheduler_layer, 0)
        self.layers[self.look_layer] = PhotonDecoderLayer(config, self.look_layer)
        self.scheduler = TokenScheduler(config.hidden_size, photon)
        self.scheduler_phase = "hard"
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        visual_mask: torch.BoolTensor | None = None,
        question_mask: torch.BoolTensor | None = None,
        keep_count: torch.LongTensor | None = None,
        flip: torch.BoolTensor | None = None,
        **kwargs,
    ) -> PhotonModelOutputWithPast:
        """
        Args beyond the parent's: visual_mask, question_mask (B, S) bool, places of visual tokens and of the question;
            without them nothing is scheduled. keep_count (B,): keep so many. flip (B,) bool: keep the others.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids or inputs_embeds.")
        if use_cache and past_key_values is None:
            past_key_values = PhotonCache(config=self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + length, device=inputs_embeds.device).expand(3, batch, -1)
        elif position_ids.ndim == 2:
            position_ids = position_ids.expand(3, *position_ids.shape)
        text_positions = None
        if len(position_ids) == 4:  # generation puts the text positions first, by which packed rows are told apart
            text_positions, position_ids = position_ids[0], position_ids[1:]
        embeddings = self.rotary_emb(inputs_embeds, position_ids)
        options = {"past_key_values": past_key_values, "use_cache": use_cache, **kwargs}

        def run(layer, hidden_states, **look):
            return layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=embeddings,
                position_ids=text_positions,
                **look,
                **options,
            )

        schedule = keep_index = None
        cut_layer = self.photon.scheduler_layer + 1
        hidden_states = inputs_embeds
        mask = self._mask(hidden_states, attention_mask, past_key_values, 0, text_positions)
        for i, layer in enumerate(self.layers):
            if i == cut_layer and getattr(past_key_values, "cut", None) is not None and keep_index is None:
                mask = self._mask(hidden_states, attention_mask, past_key_values, i)
            if i != self.look_layer or visual_mask is None:
                hidden_states = run(layer, hidden_states)
                continue
            # --- the cut: score with this layer, decide, go on with what stays
            question_index, question = masked_index(question_mask)
            visual_index, visual = masked_index(visual_mask)
            hidden_states_in = hidden_states
            hidden_states, *looks = run(
                layer, hidden_states, look_at=(question_index, visual_index), look_only=cut_layer == 0
            )
            schedule = self.scheduler(*looks, question, visual, layer.self_attn.scaling, keep_count, flip)
            if cut_layer == 0:
                hidden_states = hidden_states_in
            phase = self.scheduler_phase if self.training else "hard"
            if phase == "dense":
                hidden_states = hidden_states + 0.0 * schedule.keep_prob.sum().to(hidden_states.dtype)
            elif phase == "soft":
                hidden_states = soft_weight(hidden_states, schedule, visual_index, visual)
            else:
                keep_index = cut_index(visual_mask, schedule.keep, _real_places(attention_mask, visual_mask))
                hidden_states = surrogate_gather(
                    hidden_states, schedule, visual_index, visual, keep_index, self.photon
                )  # (B, S', D)
                position_ids = torch.stack([gather_places(axis, keep_index) for axis in position_ids])
                embeddings, text_positions = self.rotary_emb(hidden_states, position_ids), None
                if past_key_values is not None:
                    self._cut_cache(past_key_values, keep_index, length, schedule)
                if cut_layer < len(self.layers):
                    mask = self._mask(hidden_states, keep_index >= 0, past_key_values, cut_layer, cut=False)
            if cut_layer == 0:
                hidden_states = run(layer, hidden_states)
        if self.training and visual_mask is None:
            hidden_states = hidden_states + self._untouched().to(hidden_states.dtype)

        return PhotonModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            **_schedule_outputs(schedule, keep_index),
        )

    def _mask(self, hidden_states, attention_mask, past_key_values, layer, positions=None, cut=True):
        """The causal mask for a layer, from the unpruned sequence's 2D mask, or from the layer's own if not `cut`."""
        state = getattr(past_key_values, "cut", None) if cut else None
        if state is not None and layer >= state.first_layer:
            stored = past_key_values.layers[layer].get_seq_length()
            attention_mask = state.attention_mask(attention_mask, stored, hidden_states.shape[1])
        return create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=positions,
            layer_idx=layer,
        )

    def _cut_cache(self, cache, keep_index, length, schedule):
        """Note the cut in the cache; with `evict_early_layers` delete the keys and values of layers 0..l too."""
        cut_layer, evict = self.photon.scheduler_layer + 1, self.photon.evict_early_layers
        first = 0 if evict else cut_layer
        if first == 0 and not isinstance(cache, PhotonCache):
            raise ValueError(
                f"Got a {type(cache).__name__}; with evict_early_layers=True or scheduler_layer=-1 the cache must count "
                "tokens that it does not hold. Pass no past_key_values, or a PhotonCache."
            )
        for layer in cache.layers[:cut_layer] if evict else ():
            if not type(layer).__name__ == "DynamicLayer":
                raise ValueError(
                    f"evict_early_layers=True cannot delete from a {type(layer).__name__}; use the default dynamic "
                    "cache, or evict_early_layers=False."
                )
            layer.keys, layer.values = (
                gather_places(states.transpose(1, 2), keep_index).transpose(1, 2)
                for states in (layer.keys, layer.values)
            )
        dropped = length - keep_index.shape[1]
        cache.cut = Cut(keep_index >= 0, dropped, first, schedule.keep, schedule.visual_count)

    def _untouched(self):
        """0, but a gradient of 0 for the scheduler: a rank whose batch has no scan must take part in the reduction."""
        look, size = self.layers[self.look_layer].self_attn, 1
        zeros = self.norm.weight.new_zeros(size, look.num_key_value_heads, size, look.head_dim)
        queries = zeros.new_zeros(size, look.num_heads, size, look.head_dim)
        one = torch.ones(size, size, dtype=torch.bool, device=zeros.device)
        return 0.0 * self.scheduler(queries, zeros, zeros, one, one, look.scaling).keep_prob.sum()


def _real_places(attention_mask, like):
    """(B, S) bool: places that are not padding."""
    if attention_mask is None:
        return torch.ones_like(like)
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.ndim} dimensions; tokens can be cut with a 2D one (batch, sequence) "
            "alone. Pass that, or use_scheduler=False."
        )
    return attention_mask.bool()


def _schedule_outputs(schedule, keep_index):
    if schedule is None:
        return {}
    return {
        "keep_mask": schedule.keep,
        "keep_prob": schedule.keep_prob,
        "threshold": schedule.threshold,
        "saliency": schedule.saliency,
        "saliency_logits": schedule.saliency_logits,
        "visual_count": schedule.visual_count,
        "keep_index": keep_index,
    }


class PhotonModel(PhotonPreTrainedModel, Qwen2_5_VLModel):
    """Vision tower and decoder of Photon: volumes and text in, hidden states out."""

    def __init__(self, config):
        super(Qwen2_5_VLModel, self).__init__(config)  # the parent's own would build the stock decoder first
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = PhotonTextModel._from_config(config.text_config, photon=config)
        self.rope_deltas = None
        self.post_init()

    def set_scheduler_phase(self, phase):
        """In training: "dense" (nothing dropped), "soft" (visual states weighted by keep probability), "hard"
        (tokens deleted). In evaluation tokens are always deleted; `use_scheduler=False` turns that off by call."""
        if phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; expected one of {', '.join(map(repr, PHASES))}.")
        self.language_model.scheduler_phase = phase

    def get_video_features(self, pixel_values_videos, video_grid_thw=None, **kwargs):
        """As the parent's: patches of all volumes (N, voxels) and their grids (volumes, 3) to one tensor a volume."""
        patches = 0 if video_grid_thw is None else int(video_grid_thw.prod(-1).sum())
        if len(pixel_values_videos) != patches:
            raise ValueError(
                f"pixel_values_videos has {len(pixel_values_videos)} patches, but video_grid_thw counts {patches}; the "
                "two must match. Pass both as the processor returns them."
            )
        return super().get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    def get_rope_index(
        self, input_ids=None, mm_token_type_ids=None, image_grid_thw=None, video_grid_thw=None,
        second_per_grid_ts=None, attention_mask=None, **kwargs,
    ):  # fmt: skip
        """Three-axis positions (3, B, S) and what a row's next position differs from its length by, (B, 1).

        As the parent's, but text behind a volume starts after the largest position on any axis (the parent counts
        rows and columns alone, so that a deep volume's last slabs lie behind the text that follows them), and
        `second_per_grid_ts` defaults to the config's. input_ids are not looked at.
        """
        vision = self.config.vision_config
        grids = {1: iter(() if image_grid_thw is None else image_grid_thw),
                 2: iter(() if video_grid_thw is None else video_grid_thw)}  # fmt: skip
        seconds = None if second_per_grid_ts is None else iter(second_per_grid_ts)
        position_ids = torch.zeros(3, *mm_token_type_ids.shape, dtype=torch.long, device=mm_token_type_ids.device)
        real = _real_places(attention_mask, mm_token_type_ids.bool())
        deltas = []
        for row, kinds in enumerate(mm_token_type_ids):
            kinds = kinds[real[row]]
            values, counts = kinds.unique_consecutive(return_counts=True)
            parts, start = [], 0
            for kind, count in zip(values.tolist(), counts.tolist(), strict=True):
                if kind == 0:
                    part = torch.arange(start, start + count, device=kinds.device).expand(3, -1)
                else:
                    interval = 1
                    if kind == 2:
                        step = self.config.second_per_grid_ts if seconds is None else next(seconds)
                        interval = vision.tokens_per_second * step
                    part = self.get_vision_position_ids(
                        start, _next_grid(grids[kind], row), 1, vision.spatial_merge_size, interval, device=kinds.device
                    )
                    if part.shape[1] != count:
                        raise ValueError(
                            f"Row {row}: {count} volume tokens stand together where the grid gives {part.shape[1]}. "
                            "Volumes and volume tokens must match one to one; use the processor."
                        )
                parts.append(part)
                start = int(part.max()) + 1
            position_ids[:, row, real[row]] = torch.cat(parts, dim=1)
            deltas.append(start - len(kinds))
        return position_ids, torch.tensor(deltas, device=position_ids.device).unsqueeze(1)

    def compute_3d_position_ids(
        self, input_ids, image_grid_thw, video_grid_thw, inputs_embeds, attention_mask, past_key_values,
        second_per_grid_ts=None, mm_token_type_ids=None,
    ):  # fmt: skip
        """Positions of this call's tokens, (3, B, S). The parent's goes wrong with a cache and a 2D mask together."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        batch, length = inputs_embeds.shape[:2]
        if past == 0:
            self.rope_deltas = None
            if mm_token_type_ids is None:
                return None  # text alone
            position_ids, self.rope_deltas = self.get_rope_index(
                input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, second_per_grid_ts, attention_mask
            )
            return position_ids
        if attention_mask is None:
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device).expand(batch, -1)
        else:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        deltas = getattr(past_key_values, "rope_deltas", None)
        return (position_ids if deltas is None else position_ids + deltas.to(position_ids.device)).expand(3, -1, -1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        visual_mask: torch.BoolTensor | None = None,
        question_mask: torch.BoolTensor | None = None,
        token_budget: int | None = None,
        keep_ratio: float | None = None,
        use_scheduler: bool = True,
        flip: torch.BoolTensor | None = None,
        **kwargs,
    ) -> PhotonModelOutputWithPast:
        """
        Args beyond the parent's:
            visual_mask, question_mask (B, S) bool: found in input_ids by themselves; needed with inputs_embeds.
            token_budget: keep exactly so many of each row's visual tokens, the most salient.
            keep_ratio: the same as a share of each row's visual tokens.
            use_scheduler: False answers from all visual tokens.
            flip (B,) bool: rows that keep what they would drop.
        Raises: `ValueError` where masks, marks and volumes do not fit together; it says which row.
        """
        _refuse_static(attention_mask, past_key_values)
        fresh = past_key_values is None or past_key_values.get_seq_length() == 0
        if input_ids is not None:
            visual = (input_ids == self.config.video_token_id) | (input_ids == self.config.image_token_id)
        else:
            visual = _grown(visual_mask, inputs_embeds)
        if fresh and visual is None and use_scheduler:
            raise ValueError(
                "Got inputs_embeds without visual_mask and question_mask (B, S), which tell the scheduler where the "
                "scan and the question are. Pass them, pass input_ids, or set use_scheduler=False."
            )
        given = pixel_values_videos is not None or bool(mm_encoder_outputs) or kwargs.get("pixel_values") is not None
        # later on, the mark of a volume can only be a word that the model wrote
        has_scan = visual is not None and (fresh or given) and bool(visual.any())
        if has_scan and not fresh:
            raise ValueError(
                "Volume tokens came with a cache that already holds a conversation; scans are read in the first call "
                "alone. Start a fresh prompt with all its scans."
            )
        if has_scan and input_ids is not None and not given:
            raise ValueError(
                f"The prompt has {int(visual.sum())} volume tokens but no volumes: pass pixel_values_videos and "
                "video_grid_thw, as the processor returns them."
            )
        if has_scan and position_ids is None and mm_token_type_ids is None:
            raise ValueError(
                "mm_token_type_ids is missing, without which volume tokens would get the positions of plain text. "
                "Pass what the processor returns (a collator must keep mm_token_type_ids), or position_ids."
            )
        if pixel_values_videos is not None:
            # encoded here, so that the arguments of the decoder do not reach the vision tower's attention
            mm_encoder_outputs = dict(mm_encoder_outputs or {})
            mm_encoder_outputs["video"] = self.get_video_features(pixel_values_videos, video_grid_thw, return_dict=True)
        if self.training and not given:
            inputs_embeds = self._with_vision_touched(input_ids, inputs_embeds)
        schedule = {}
        if has_scan and use_scheduler:
            if question_mask is None:
                if input_ids is None:
                    raise ValueError("Got inputs_embeds with visual_mask but without question_mask; pass both.")
                question_mask = find_question(input_ids, visual, self.config)
            schedule = {
                "visual_mask": visual,
                "question_mask": _grown(question_mask, visual).bool(),
                "keep_count": _keep_count(visual.sum(-1), token_budget, keep_ratio),
                "flip": flip,
            }
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            **schedule,
            **kwargs,
        )
        if fresh and outputs.past_key_values is not None:
            # with the cache, not with the model alone: another scan may be asked about before this one goes on
            outputs.past_key_values.rope_deltas = self.rope_deltas
        return outputs


    def _with_vision_touched(self, input_ids, inputs_embeds):
        """The embeddings, unchanged, but with a gradient of 0 for the vision tower: as for the scheduler, a rank whose
        batch has no scan must take part in the reduction."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        vision, merge = self.config.vision_config, self.config.vision_config.spatial_merge_size
        voxels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, merge, merge]], device=inputs_embeds.device)
        nothing = inputs_embeds.new_zeros(merge**2, voxels)
        features = self.get_video_features(nothing, grid, return_dict=True).pooler_output[0]
        return inputs_embeds + 0.0 * features.sum().to(inputs_embeds.dtype)


def _next_grid(grids, row):
    grid = next(grids, None)
    if grid is None:
        raise ValueError(f"Row {row} has more groups of volume tokens than there are volumes; they must match.")
    return grid


def _grown(mask, like):
    """A prompt's mask for a sequence that has grown since, in generation without a cache: (B, S0) -> (B, S)."""
    if mask is None or mask.shape[1] == like.shape[1]:
        return mask
    return nn.functional.pad(mask, (0, like.shape[1] - mask.shape[1]))


def _keep_count(visual_count, token_budget, keep_ratio):
    """(B,) how many of each row's visual tokens (B,) to keep, or `None` to leave it to the threshold."""
    if token_budget is not None and keep_ratio is not None:
        raise ValueError("Pass token_budget or keep_ratio, not both.")
    if token_budget is not None:
        if token_budget < 0 or token_budget != int(token_budget):
            raise ValueError(f"token_budget is {token_budget}; expected a whole number of tokens, 0 or more.")
        return torch.full_like(visual_count, int(token_budget))
    if keep_ratio is not None:
        if not 0 <= keep_ratio <= 1:
            raise ValueError(f"keep_ratio is {keep_ratio}; expected a share from 0 to 1.")
        return (visual_count * keep_ratio).round().long()
    return None


def _refuse_static(attention_mask, cache):
    if isinstance(attention_mask, dict) or getattr(cache, "is_compileable", False):
        raise ValueError(
            "A static cache has a fixed length, but a prompt's length changes at the cut. Use the default dynamic cache "
            "(leave cache_implementation unset)."
        )


class PhotonForConditionalGeneration(PhotonPreTrainedModel, Qwen2_5_VLForConditionalGeneration):
    """Photon with a language-model head: asks a question about CT or MR volumes, and learns to."""

    accepts_loss_kwargs = True  # every term is a sum over answer tokens, divided by num_items_in_batch

    def __init__(self, config):
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = PhotonModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def set_scheduler_phase(self, phase):
        self.model.set_scheduler_phase(phase)

    set_scheduler_phase.__doc__ = PhotonModel.set_scheduler_phase.__doc__

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,  # named: generation encodes once and expands for beams
        visual_mask: torch.BoolTensor | None = None,
        question_mask: torch.BoolTensor | None = None,
        token_budget: int | None = None,
        keep_ratio: float | None = None,
        use_scheduler: bool = True,
        objective: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> PhotonCausalLMOutputWithPast:
        """
        Args beyond those of `PhotonModel.forward`:
            labels (B, S): of the unpruned sequence; cut with it. -100 where there is nothing to learn.
            objective (B,) of `Objective`: each row's kind of loss, default all `ANSWER`. `FLIP` rows keep what they
                would drop. Rows of the other two kinds have no band loss.
            num_items_in_batch: answer tokens of the whole step, as the Trainer counts them over accumulated batches.
        """
        flip = None if objective is None else objective == Objective.FLIP
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            second_per_grid_ts=second_per_grid_ts,
            mm_encoder_outputs=mm_encoder_outputs,
            visual_mask=visual_mask,
            question_mask=question_mask,
            token_budget=token_budget,
            keep_ratio=keep_ratio,
            use_scheduler=use_scheduler,
            flip=flip,
            **kwargs,
        )
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, places])
        losses = {}
        if labels is not None:
            losses = self._losses(logits, labels, outputs, objective, num_items_in_batch)
        return PhotonCausalLMOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{name: outputs[name] for name in SCHEDULE_FIELDS if name in outputs},
            **losses,
        )

    def _losses(self, logits, labels, outputs, objective, num_items):
        config, keep_index = self.config, outputs.keep_index
        if keep_index is not None:
            labels = gather_places(labels, keep_index).masked_fill(keep_index < 0, -100)
        target = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # place s predicts the token at s + 1
        sums, count = answer_losses(logits, target, objective, config.flip_eps)  # (B,), (B,)
        total = count.sum().clamp(min=1) if num_items is None else num_items
        lm_loss, band_loss = sums.sum() / total, sums.new_zeros(())
        phase = self.model.language_model.scheduler_phase if self.training else "hard"
        if outputs.keep_prob is not None and phase != "dense":
            places = torch.arange(outputs.keep_prob.shape[1], device=labels.device)
            visual = places < outputs.visual_count[:, None].to(labels.device)
            band = band_losses(outputs.keep_prob, visual, config.band_low, config.band_high)
            if objective is not None:
                band = band * (objective == Objective.ANSWER)
            band_loss = (band * count).sum() / total
        return {"loss": lm_loss + config.band_weight * band_loss, "lm_loss": lm_loss, "band_loss": band_loss}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size is set, but a question must be seen whole, with its scan, to decide which tokens "
                "it needs. Leave prefill_chunk_size unset; the cut makes the prompt short by itself."
            )
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "offloaded", "quantized"):
            raise ValueError(
                f"cache_implementation is {implementation!r}; a static cache has a fixed length, but a prompt's length "
                "changes at the cut. Leave it unset."
            )
        given = model_kwargs.get("past_key_values") is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if not given and type(model_kwargs.get("past_key_values")) is DynamicCache:
            model_kwargs["past_key_values"] = PhotonCache(
                config=self.config.text_config, offloading=implementation == "offloaded"
            )

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            self.model.rope_deltas = getattr(cache, "rope_deltas", None)
        elif model_kwargs.get("mm_token_type_ids") is None and inputs_tensor.dtype == torch.long:
            if (inputs_tensor == self.config.video_token_id).any():
                raise ValueError(
                    "mm_token_type_ids is missing, without which volume tokens would get the positions of plain text. "
                    "Pass everything that the processor returns: model.generate(**inputs)."
                )
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)


__all__ = [
    "PhotonCache",
    "PhotonForConditionalGeneration",
    "PhotonModel",
    "PhotonPreTrainedModel",
    "PhotonTextModel",
]
