"""Photon's decoder: Qwen2.5-VL's, with one cut.

- `PhotonDecoderLayer`, at the scheduling layer: also returns the queries and keys by which tokens are scored;
- `PhotonTextModel.forward`: the branch that scores, cuts, and goes on with the short sequence;
- `PhotonCache`: a key-value cache that knows what was cut from it.
"""

from dataclasses import dataclass

import torch
from transformers import initialization as init
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLPreTrainedModel,
    Qwen2_5_VLTextModel,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_photon import PhotonConfig
from .scheduling_photon import (
    Float32Linear,
    TokenScheduler,
    cut_index,
    gate_mask,
    gather_places,
    masked_index,
    scatter_places,
    soft_weight,
    surrogate_gather,
)


@dataclass
class Cut:
    """What a cache must remember of its cut."""

    mask: torch.Tensor  # (B, S') bool: which places of the short prompt are real
    dropped: int  # S - S': by how much the short prompt is shorter
    first_layer: int  # layers below hold the whole prompt
    keep_mask: torch.Tensor  # (B, V) bool: which visual tokens stayed
    visual_count: torch.Tensor  # (B,): of how many
    threshold: torch.Tensor  # (B, 1)

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

    After a prompt with scans `cache.cut` tells which visual tokens stayed; generation returns the cache as
    `past_key_values` with `return_dict_in_generate=True`.
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


@dataclass
class PhotonModelOutputWithPast(BaseModelOutputWithPast):
    """
    `last_hidden_state` is (B, S', D), S' the longest row after the cut; B rows, V visual tokens of the richest row.

    Args:
        keep_mask (`torch.BoolTensor` of shape `(B, V)`): which visual tokens stayed, in the order of the prompt.
        keep_prob (`torch.FloatTensor` of shape `(B, V)`): their keep probabilities.
        threshold (`torch.FloatTensor` of shape `(B, 1)`): 0 to `config.threshold_max`.
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


class PhotonDecoderLayer(Qwen2_5_VLDecoderLayer):
    """The scheduling layer. Scores are taken inside its forward, where sharded weights are at hand; with
    `look_gradient` they carry one."""

    def __init__(self, config, layer_idx, look_gradient=False):
        super().__init__(config, layer_idx)
        self.look_gradient = look_gradient

    def forward(self, hidden_states, *args, look_at=None, look_only=False, position_embeddings=None, **kwargs):
        """
        Args: look_at: (question_index (B, Q), visual_index (B, V)), places whose queries and keys are wanted.
            look_only: without running the layer.
        Returns: hidden states (`None` if `look_only`), and with `look_at` queries (B, H, Q, d), question keys
            (B, G, Q, d), visual keys (B, G, V, d).
        """
        with torch.set_grad_enabled(self.look_gradient and torch.is_grad_enabled()):
            looks = () if look_at is None else self.look(hidden_states, position_embeddings, *look_at)
        if look_only:
            return None, *looks
        hidden_states = super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        return (hidden_states, *looks) if looks else hidden_states

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
        self.layers[self.look_layer] = PhotonDecoderLayer(config, self.look_layer, photon.saliency_gradient)
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
        row_weight: torch.FloatTensor | None = None,
        **kwargs,
    ) -> PhotonModelOutputWithPast:
        """
        Args beyond the parent's: visual_mask, question_mask (B, S) bool, places of visual tokens and of the question;
            without them nothing is scheduled. keep_count (B,): keep so many. flip (B,) bool: keep the others.
            row_weight (B,): each row's share of the loss.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids or inputs_embeds.")
        if use_cache and past_key_values is None:
            past_key_values = PhotonCache(config=self.config)
        if past_key_values is not None and past_key_values.get_seq_length() == 0:
            past_key_values.cut = None  # a cache that was emptied may still carry its last cut
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
        if visual_mask is not None and attention_mask is None and text_positions is not None:
            if (text_positions.diff(dim=-1) < 0).any():
                raise ValueError(
                    "The text positions start anew within a row, so it holds several packed samples; the scheduler "
                    "takes a row for one. Pad the samples in rows of their own, or set use_scheduler=False."
                )
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
            if cut_layer == 0:
                hidden_states = hidden_states_in
            device = hidden_states.device  # of this layer; masks and scheduler may live on others
            schedule = self.scheduler(*looks, question, visual, layer.self_attn.scaling, keep_count, flip).to(device)
            visual_index, visual = visual_index.to(device), visual.to(device)
            phase = self.scheduler_phase if self.training else "hard"
            gate = None  # (B, S): what is added to the attention logits of each key above the cut
            if self.training and phase != "dense" and self.photon.surrogate == "gate":
                gate = scatter_places(schedule.log_prob, visual_index, visual, length)
            if phase == "dense":
                hidden_states = hidden_states + 0.0 * schedule.keep_prob.sum().to(hidden_states.dtype)
            elif phase == "soft" and gate is not None:
                mask = self._gated(mask, gate, hidden_states)
            elif phase == "soft":
                hidden_states = soft_weight(hidden_states, schedule, visual_index, visual)
            else:
                real = real_places(attention_mask, visual_mask)
                keep_index = cut_index(visual_mask.to(device), schedule.keep, real.to(device))
                if gate is not None:
                    gate = gather_places(gate - gate.detach(), keep_index)  # 0, with the gradient of the gates
                    hidden_states = gather_places(hidden_states, keep_index)
                else:
                    hidden_states = surrogate_gather(
                        hidden_states, schedule, visual_index, visual, keep_index, self.photon,
                        None if row_weight is None else row_weight.to(device),
                    )  # (B, S', D)  # fmt: skip
                position_ids = torch.stack([gather_places(axis, keep_index) for axis in position_ids])
                embeddings, text_positions = self.rotary_emb(hidden_states, position_ids), None
                if past_key_values is not None:
                    self._cut_cache(past_key_values, keep_index, length, schedule)
                if cut_layer < len(self.layers):
                    mask = self._mask(hidden_states, keep_index >= 0, past_key_values, cut_layer, cut=False)
                    mask = mask if gate is None else self._gated(mask, gate, hidden_states)
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

    def _gated(self, mask, gate, hidden_states):
        """A layer's mask with the gates (B, S) of its keys."""
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f'surrogate="gate" adds to attention logits, which {self.config._attn_implementation} does not take. '
                'Train with attn_implementation="sdpa" or "eager", or with another surrogate.'
            )
        return gate_mask(mask, gate.to(hidden_states.dtype))

    def _cut_cache(self, cache, keep_index, length, schedule):
        """Note the cut in the cache; with `evict_early_layers` delete the keys and values of layers 0..l too."""
        cut_layer, evict = self.photon.scheduler_layer + 1, self.photon.evict_early_layers
        first = 0 if evict else cut_layer
        if first == 0 and not isinstance(cache, PhotonCache):
            raise ValueError(
                f"Got a {type(cache).__name__}; with evict_early_layers=True or scheduler_layer=-1 the cache must "
                "count tokens that it does not hold. Pass no past_key_values, or a PhotonCache."
            )
        for layer in cache.layers[:cut_layer] if evict else ():
            if not layer.is_initialized:
                continue  # gradient checkpointing has turned the cache off
            if type(layer) is not DynamicLayer:
                raise ValueError(
                    f"evict_early_layers=True cannot delete from a {type(layer).__name__}; use the default dynamic "
                    "cache, or evict_early_layers=False."
                )
            layer.keys, layer.values = (
                gather_places(states.transpose(1, 2), keep_index).transpose(1, 2)
                for states in (layer.keys, layer.values)
            )
        dropped = length - keep_index.shape[1]
        cache.cut = Cut(
            mask=keep_index >= 0,
            dropped=dropped,
            first_layer=first,
            keep_mask=schedule.keep,
            visual_count=schedule.visual_count,
            threshold=schedule.threshold,
        )

    def _untouched(self):
        """0, but a gradient of 0 for the scheduler: a rank whose batch has no scan must take part in the reduction."""
        look = self.layers[self.look_layer].self_attn  # one row of one question token and one visual token
        keys = self.norm.weight.new_zeros(1, look.num_key_value_heads, 1, look.head_dim)
        queries = keys.new_zeros(1, look.num_heads, 1, look.head_dim)
        real = torch.ones(1, 1, dtype=torch.bool, device=keys.device)
        return 0.0 * self.scheduler(queries, keys, keys, real, real, look.scaling).keep_prob.sum()


def real_places(attention_mask, like):
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
