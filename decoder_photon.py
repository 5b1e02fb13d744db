"""Photon's decoder: Qwen2.5-VL's, with a cut.

- `CutDecoder`: the loop over a decoder's layers that scores, cuts, and goes on with the short sequence. It knows
  nothing of Qwen2.5-VL; a decoder of another family mixes it in and gives it a scoring layer;
- `PhotonDecoderLayer`: Qwen2.5-VL's layer, which also gives the queries and keys by which tokens are scored;
- `PhotonTextModel`: the two together.
"""

import inspect
from contextlib import nullcontext
from dataclasses import fields

import torch
import transformers
from transformers import initialization as init
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLPreTrainedModel,
    Qwen2_5_VLTextModel,
    rotate_half,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_photon import PhotonConfig
from .objectives_photon import CutLearning, PhotonModelOutputWithPast, other_tokens, packed_rows, padded_rows
from .prefix_photon import Cut, PhotonCache, layout_of
from .prompt_photon import real_places, recorded_outputs
from .scheduling_photon import (
    Float32Linear,
    ScanRequest,
    SchedulerInputs,
    TokenScheduler,
    gather_places,
    masked_index,
    padded_places,
    stays,
)

if "past_key_values" not in inspect.signature(Qwen2_5_VLTextModel.forward).parameters:
    found = f"transformers {transformers.__version__} names its caches in another way than 5.23, which Photon needs"
    raise ImportError(f'{found}: pip install "transformers>=5.23,<5.24"')

# === The cut =========================================================================================================


class CutDecoder(CutLearning):
    """Runs a decoder's layers with a cut among them. Mixed into a text model of transformers.

    It uses the model's `config`, `layers`, `rotary_emb(states, position_ids)`, and
    - `photon`: the `PhotonConfig`, whose `scheduler_layer` is the last layer on the whole sequence;
    - `scheduler`: maps `SchedulerInputs` to a `Schedule`, which may name further cuts; in training
      `scheduler_phase`, "dense", "soft" or "hard", and `keep_budget`;
    - `layers[scoring_layer]`: also takes `score=` and `score_only=`, as `PhotonDecoderLayer` does.
    """

    @property
    def scoring_layer(self):
        return max(self.photon.scheduler_layer, 0)

    def run_layers(
        self, hidden_states, attention_mask, position_ids, text_positions, past_key_values, scan, prefix=None,
        **options,
    ):  # fmt: skip
        """The layers' output.

        Args: hidden_states (B, S, D) embeddings; attention_mask (B, S) or as the model takes it; position_ids
            (3, B, S) or what `rotary_emb` takes, places last; text_positions (B, S) or `None`; scan: `ScanRequest`, or
            `None` to cut nothing; prefix: `ScanPrefix` of B rows, or `None`: hidden_states (B, T, D) are then of the
            text behind it alone, and all else is of S = P + T places; options: of each layer.
        Returns: hidden states (B, S', D) before the last norm, `Schedule` or `None`, keep_index (B, S') or `None`.
        """
        cut_layer, length = self.photon.scheduler_layer + 1, position_ids.shape[-1]
        embeddings = self.rotary_emb(hidden_states, position_ids[..., -hidden_states.shape[1] :])
        below, above, scoring_layer = range(cut_layer), range(cut_layer, len(self.layers)), self.scoring_layer
        if prefix is not None:
            prefix.fill(past_key_values, below)

        def run(layer, hidden_states, **score):
            return layer(
                hidden_states, attention_mask=mask, position_embeddings=embeddings, position_ids=text_positions,
                past_key_values=past_key_values, **score, **options,
            )  # fmt: skip

        schedule, keep_index, fresh, held, packed, later = None, None, None, None, False, {}
        mask = self._mask(hidden_states, attention_mask, past_key_values, 0, text_positions, cut=prefix is None)
        for i, layer in enumerate(self.layers):
            if i and keep_index is None and layout_of(past_key_values, i) is not layout_of(past_key_values, i - 1):
                mask = self._mask(hidden_states, attention_mask, past_key_values, i)
            if i != scoring_layer or (scan is None and prefix is None):
                with later[i].reading(layer) if i in later else nullcontext():
                    hidden_states = run(layer, hidden_states)
                if i in later:  # cut again what is left of the scan
                    lead = None if prefix is None else prefix.tensors[f"keys.{i}"]
                    schedule.keep_mask, short = later[i].choose(scan, schedule.keep_mask, fresh, lead)
                    moved = (gather_places(states, short) for states in (hidden_states, fresh + 1, *position_ids))
                    hidden_states, fresh, *position_ids = moved
                    fresh, position_ids = fresh - 1, torch.stack(position_ids)
                    keep_index = fresh if held is None else torch.cat([held, fresh], dim=1)
                    if past_key_values is not None:
                        past_key_values.cut.narrow(keep_index, length, i + 1, schedule.keep_mask)
                    embeddings = self.rotary_emb(hidden_states, position_ids)
                    mask = self._mask(hidden_states, keep_index >= 0, past_key_values, i + 1, cut=False)
                continue
            # --- the cut: score with this layer, decide, go on with what stays
            scan = scan and scan.to(hidden_states.device)  # this layer's; masks and scheduler may live on others
            hidden_states, scores = self._score(run, layer, hidden_states, scan, prefix)
            if prefix is not None and (scan is not None or prefix.reuse == "exact"):
                hidden_states = prefix.joined(hidden_states)  # (B, S, D)
            gate = None
            if scan is not None:
                inputs = self.scheduler_inputs(scan, scores, hidden_states, layer)
                schedule = self.scheduler(inputs).to(hidden_states.device)
                if scan.others is not None:
                    schedule.keep_mask = other_tokens(schedule.keep_mask, scan.visual, scan.others)
                more = schedule.hidden_states is not None or schedule.later
                if prefix is not None and prefix.reuse == "select" and more:
                    raise ValueError('The scheduler merges tokens or cuts again, unlike reuse="select". Use "exact".')
                hidden_states, gate = self._weigh(hidden_states, scan, schedule)
            if scan is not None and self._phase == "hard":
                places, later = (scan.visual_index, scan.visual), schedule.later
                stay = stays(scan.visual_mask, schedule.keep_mask, scan.real, places)
                keep_index = fresh = padded_places(stay)  # (B, S')
                if prefix is not None:
                    held, fresh = prefix.held_and_fresh(stay)
                    keep_index = torch.cat([held, fresh], dim=1)
                    prefix.fill(past_key_values, above, held if prefix.reuse == "select" else None)
                hidden_states, gate = self._gather(hidden_states, scan, schedule, fresh, gate)  # (B, S', D)
                position_ids = gather_places(position_ids.permute(1, 2, 0), fresh).permute(2, 0, 1)  # (3, B, S')
                if past_key_values is not None:
                    self._cut_cache(past_key_values, keep_index, length, schedule)
                packed = past_key_values is None and not later and self._packs(keep_index)
                if packed:
                    *parts, rows, more = packed_rows(hidden_states, position_ids, gate, keep_index)
                    (hidden_states, position_ids, gate), options = parts, options | more
                embeddings, text_positions, mask = self.rotary_emb(hidden_states, position_ids), None, None
                if above:
                    real, rows = (None, rows) if packed else (keep_index >= 0, None)
                    mask = self._mask(hidden_states, real, past_key_values, cut_layer, rows, cut=False)
            elif prefix is not None:  # nothing is cut
                if prefix.reuse == "select":
                    prefix.fill(past_key_values, above)
                    keep_index = prefix.held_and_fresh(attention_mask)[1]  # the text's places
                embeddings = self.rotary_emb(hidden_states, position_ids[..., -hidden_states.shape[1] :])
                if above:
                    mask = self._mask(hidden_states, attention_mask, past_key_values, cut_layer, cut=False)
            if gate is not None and above:
                mask, options = self._gated(mask, gate, hidden_states, options)
            if cut_layer == 0:
                hidden_states = run(layer, hidden_states)
        if held is not None:
            hidden_states, keep_index = prefix.whole(hidden_states, held, fresh)
        return padded_rows(hidden_states, keep_index) if packed else hidden_states, schedule, keep_index

    def encode_prefix(self, hidden_states, real, position_ids, visual, reuse):
        """The tensors of a `ScanPrefix` that the decoder computes.

        Args: hidden_states (N, P, D) embeddings; real, visual (N, P) bool; position_ids (3, N, P); reuse: "exact" or
            "select".
        """
        cut_layer, cache = self.photon.scheduler_layer + 1, DynamicCache(config=self.config)

        def run(layers, states, real, position_ids, first, **score):
            embeddings = self.rotary_emb(states, position_ids)
            mask = self._mask(states, real, cache, first, cut=False)
            for layer in layers:
                states = layer(
                    states, attention_mask=mask, position_embeddings=embeddings, past_key_values=cache, **score
                )
            return states

        recorded = {}
        if cut_layer == 0:
            places = torch.arange(real.shape[1], device=hidden_states.device).expand(real.shape)
            score = {"score": ({}, {"keys": places}), "score_only": True}
            score_keys = run(self.layers[:1], hidden_states, real, position_ids, 0, **score)["keys"]
        else:
            with self.recording(recorded):
                hidden_states = run(self.layers[:cut_layer], hidden_states, real, position_ids, 0)
            score_keys = cache.layers[cut_layer - 1].keys
        lead = padded_places(real & (visual.cumsum(-1) == 0))
        lead_states, above = gather_places(hidden_states, lead), self.layers[cut_layer:]
        if reuse == "select":
            lead_states = gather_places(run(above, hidden_states, real, position_ids, cut_layer), lead)
        elif lead.shape[1]:
            positions = torch.stack([gather_places(axis, lead) for axis in position_ids])
            lead_states = run(above, lead_states, lead >= 0, positions, cut_layer)
        tensors = {"lead_index": lead, "lead_states": lead_states, "states": hidden_states, "score_keys": score_keys}
        index, _ = masked_index(visual)
        tensors |= {f"features.{name}": gather_places(states, index) for name, states in recorded.items()}
        for i, layer in enumerate(cache.layers):
            tensors[f"keys.{i}"] = layer.keys if layer.is_initialized else score_keys[:, :, :0]
            tensors[f"values.{i}"] = layer.values if layer.is_initialized else score_keys[:, :, :0]
        return tensors

    def _score(self, run, layer, hidden_states, scan, prefix):
        """Hidden states behind the scoring layer (in front of it where the cut is before layer 0), and its queries and
        keys by name."""
        first = self.photon.scheduler_layer < 0
        if scan is None:
            return hidden_states if first else run(layer, hidden_states), None
        queries, keys = self.score_places(scan)
        if prefix is not None:  # the text's are computed, the scan's are there
            del keys["visual_keys"]
            queries, keys = (
                {name: index - prefix.length for name, index in places.items()} for places in (queries, keys)
            )
            if "keys" in keys:
                keys["keys"] = keys["keys"][:, prefix.length :]
        if first:
            scores = run(layer, hidden_states, score=(queries, keys), score_only=True)
        else:
            hidden_states, scores = run(layer, hidden_states, score=(queries, keys))
        return hidden_states, scores if prefix is None else prefix.with_scores(scores, scan.visual_index)

    def recording(self, recorded):
        """A context in which the scheduler fills `recorded` with what it needs of the layers below the cut."""
        record = getattr(self.scheduler, "record_layers", None)
        return nullcontext() if record is None else record(recorded, self.layers[: self.photon.scheduler_layer + 1])

    @property
    def _phase(self):
        """Tokens are always deleted in evaluation."""
        return self.scheduler_phase if self.training else "hard"

    def score_places(self, scan):
        """Which queries and keys the scoring layer is to give: {name: index (B, N)} of each."""
        queries = {"queries": scan.question_index}
        keys = {"question_keys": scan.question_index, "visual_keys": scan.visual_index}
        if "sequence" in self.scheduler.needs:
            places = torch.arange(scan.real.shape[1], device=scan.real.device)
            queries["last_query"] = scan.features["last_index"]
            keys["keys"] = places.expand(scan.real.shape)
        return queries, keys

    def scheduler_inputs(self, scan, scores, hidden_states, layer):
        """What the scheduler sees: the scoring layer's queries and keys, and what it needs beside them."""
        features = dict(scan.features)
        features |= {name: gather_places(states, scan.visual_index) for name, states in scan.recorded.items()}
        if "sequence" in self.scheduler.needs:
            features["real"] = scan.real
        if "hidden_states" in self.scheduler.needs:
            features["hidden_states"] = gather_places(hidden_states, scan.visual_index) * scan.visual[..., None]
            features["question_states"] = gather_places(hidden_states, scan.question_index) * scan.question[..., None]
        known = {item.name for item in fields(SchedulerInputs)}
        return SchedulerInputs(
            question=scan.question, visual=scan.visual, scaling=layer.self_attn.scaling, keep_count=scan.keep_count,
            flip=scan.flip, deletes=self._phase != "dense", budget=self.keep_budget, **scores,
            **{name: value for name, value in features.items() if name in known},
            more={name: value for name, value in features.items() if name not in known},
        )  # fmt: skip

    def _mask(self, hidden_states, attention_mask, past_key_values, layer, positions=None, cut=True):
        """The causal mask for a layer, from the unpruned sequence's 2D mask, or from the layer's own if not `cut`."""
        layout = layout_of(past_key_values, layer) if cut else None
        if layout is not None:
            stored = past_key_values.layers[layer].get_seq_length()
            attention_mask = layout.attention_mask(attention_mask, stored, hidden_states.shape[1])
        return create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=positions, layer_idx=layer,
        )  # fmt: skip

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
        decided = {name: getattr(schedule, name) for name in ("keep_mask", "visual_count", "threshold")}
        cache.cut = Cut(keep_index >= 0, length - keep_index.shape[1], first, **decided)


# === On Qwen2.5-VL ===================================================================================================


class PhotonDecoderLayer(Qwen2_5_VLDecoderLayer):
    """Qwen2.5-VL's layer, which also gives the queries and keys by which tokens are scored.

    They are taken inside its forward, where sharded weights are at hand. With `score_gradient` they carry a gradient.
    """

    def __init__(self, config, layer_idx, score_gradient=False):
        super().__init__(config, layer_idx)
        self.score_gradient = score_gradient

    def forward(self, hidden_states, *args, score=None, score_only=False, position_embeddings=None, **kwargs):
        """
        Args: score: two dicts {name: index (B, N)}, places whose queries and whose keys are wanted; score_only: do
            not run the layer.
        Returns: hidden states; with `score` also {name: queries (B, H, N, d) or keys (B, G, N, d)}; with `score_only`
            these alone.
        """
        if score is None:
            return super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        states, found, attention = None, {}, self.self_attn
        if not score_only:
            with recorded_outputs(found, attention.q_proj, attention.k_proj):
                states = super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        with torch.set_grad_enabled(self.score_gradient and torch.is_grad_enabled()):
            scores = self.scores(hidden_states, position_embeddings, *score, found)
        return scores if score_only else (states, scores)

    def scores(self, hidden_states, position_embeddings, query_places, key_places, found=None):
        """Queries and keys at the places asked for, after rotary embedding, by name; found: {projection: its output}
        where the layer has run."""

        def project(linear, places):
            if not places:
                return {}
            index = torch.cat(list(places.values()), dim=1)  # (B, N)
            if found:
                states = gather_places(found[linear], index)
            else:
                states = linear(self.input_layernorm(gather_places(hidden_states, index)))  # (B, N, heads d)
            states = states.unflatten(-1, (-1, self.self_attn.head_dim)).transpose(1, 2)
            cos, sin = (gather_places(part, index)[:, None] for part in position_embeddings)
            parts = (states * cos + rotate_half(states) * sin).split([p.shape[1] for p in places.values()], dim=2)
            return dict(zip(places, parts, strict=True))

        return project(self.self_attn.q_proj, query_places) | project(self.self_attn.k_proj, key_places)


class PhotonPreTrainedModel(Qwen2_5_VLPreTrainedModel):
    config: PhotonConfig
    config_class = PhotonConfig
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "PhotonDecoderLayer", "Qwen2_5_VLVisionBlock"]
    _can_compile_fullgraph = False  # the length after the cut depends on the data

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Float32Linear):
            init.constant_(module.bias, module.bias_init)
        if isinstance(module, TokenScheduler) and module.config.keep_budget is not None:
            init.constant_(module.running_level, module.first_level)
            init.zeros_(module.level_updates)


class PhotonTextModel(CutDecoder, PhotonPreTrainedModel, Qwen2_5_VLTextModel):
    """Qwen2.5-VL's decoder with a cut."""

    config_class = Qwen2_5_VLTextModel.config_class
    input_modalities = ("text",)
    _supports_flex_attn = True  # the parent's vision tower does not

    def __init__(self, config, photon):
        super().__init__(config)
        self.photon = photon
        self.layers[self.scoring_layer] = PhotonDecoderLayer(config, self.scoring_layer, photon.saliency_gradient)
        self.scheduler = TokenScheduler(config.hidden_size, photon)
        self.scheduler_phase = "hard"
        self.keep_budget = photon.keep_budget  # of the training step; a trainer lowers it from 1
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
        scheduler_features: dict | None = None,
        others: int | None = None,
        prefix=None,
        **kwargs,
    ) -> PhotonModelOutputWithPast:
        """
        Args beyond the parent's: visual_mask, question_mask (B, S) bool, places of visual tokens and of the question;
            without them nothing is scheduled. keep_count (B,): keep so many. flip (B,) bool: keep the others.
            row_weight (B,): each row's share of the loss. scheduler_features, others: see `ScanRequest`. prefix:
            see `run_layers`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Pass exactly one of input_ids or inputs_embeds.")
        if past_key_values is None and (use_cache or prefix is not None):
            past_key_values = PhotonCache(config=self.config)
        if past_key_values is not None and past_key_values.get_seq_length() == 0:
            past_key_values.cut = past_key_values.prompt = None  # an emptied cache may still carry its last prompt's
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device).expand(3, batch, -1)
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
        scan = None
        if visual_mask is not None:
            real = real_places(attention_mask, visual_mask)
            scan = ScanRequest(
                visual_mask, question_mask, real, keep_count, flip, row_weight, scheduler_features or {}, others
            )
        with nullcontext() if scan is None or prefix is not None else self.recording(scan.recorded):
            hidden_states, schedule, keep_index = self.run_layers(
                inputs_embeds, attention_mask, position_ids, text_positions, past_key_values, scan, prefix,
                use_cache=use_cache, **kwargs,
            )  # fmt: skip
        if self.training and scan is None:
            hidden_states = hidden_states + self._touch_scheduler().to(hidden_states.dtype)
        return PhotonModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache or prefix is None else None,
            keep_index=keep_index,
            **({} if schedule is None else schedule.outputs()),
        )
