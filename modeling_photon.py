"""Photon: Qwen2.5-VL on volumes, with visual tokens deleted after one decoder layer, in training and inference alike.

What differs from Qwen2.5-VL, and nothing else:
- `PhotonModel`: positions in which text starts behind a volume's last depth step (`prompt_photon.py`); the masks of
  scan and question;
- `PhotonForConditionalGeneration`: labels cut alike, the losses, the phases, what generation must refuse;
- `PhotonTextModel` (`decoder_photon.py`): the cut;
- `PhotonCache` (`prefix_photon.py`): a `DynamicCache` that knows what was cut;
- `ScanPrefix` (`prefix_photon.py`): a scan that was read once, for many questions.
The method itself is in `scheduling_photon.py` (which tokens stay) and `objectives_photon.py` (how it learns).
"""

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
)
from transformers.utils import can_return_tuple

from .decoder_photon import PhotonModelOutputWithPast, PhotonPreTrainedModel, PhotonTextModel
from .objectives_photon import (
    Objective,
    PhotonCausalLMOutputWithPast,
    all_losses,
    encode_in_parts,
    full_length,
    grounding_of_answers,
)
from .prefix_photon import PhotonCache, PrefixModel
from .prompt_photon import (
    NO_MASKS,
    NO_TOKEN_TYPES,
    PhotonVisionOutput,
    PromptFeatures,
    PromptPositions,
    check_scan,
    grids_of_volumes,
    grown_mask,
    record_features,
    refuse_static,
    rope_deltas,
    scan_features,
    visual_places,
)
from .prompt_photon import question_mask as find_question
from .scheduling_photon import NEEDS, ScheduleFields, keep_counts

if TYPE_CHECKING:  # never run; `save_pretrained` copies the files that a module imports, and these belong to a folder
    from .pipeline_photon import VolumeQuestionAnsweringPipeline  # noqa: F401
    from .processing_photon import PhotonProcessor  # noqa: F401

PHASES = ("dense", "soft", "hard")
SCAN_INPUTS = (
    "pixel_values_videos", "video_grid_thw", "volume_index", "mm_encoder_outputs", "mm_token_type_ids", "scan"
)  # fmt: skip


class PhotonModel(PrefixModel, PromptPositions, PromptFeatures, PhotonPreTrainedModel, Qwen2_5_VLModel):
    """Vision tower and decoder of Photon: volumes and text in, hidden states out.

    patches_at_once: how many patches the vision tower takes at a time in training; `None` for all.
    """

    patches_at_once = None

    def __init__(self, config):
        config.validate()  # fields may have been set one by one since it was made
        super(Qwen2_5_VLModel, self).__init__(config)  # the parent's would build the stock decoder first
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

    def set_keep_budget(self, share):
        """In training, with `config.keep_budget`: the share of visual tokens that batches keep from now on."""
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; expected a number above 0, at most 1.")
        self.language_model.keep_budget = share

    def set_scheduler(self, scheduler):
        """Selects tokens by another method from now on, and returns the one before.

        Args: scheduler: a module that maps `SchedulerInputs` to a `Schedule`, and lists in `needs` what it uses beside
            the scoring layer's queries and keys.
        Raises: `ValueError` where it needs something that is not known.
        """
        unknown = sorted(set(scheduler.needs) - NEEDS)
        if unknown:
            raise ValueError(f"the scheduler needs {', '.join(unknown)}; expected some of {', '.join(sorted(NEEDS))}.")
        previous, self.language_model.scheduler = self.language_model.scheduler, scheduler.train(self.training)
        return previous

    def get_video_features(self, pixel_values_videos, video_grid_thw=None, volume_index=None, **kwargs):
        """As the parent's: patches of all volumes (N, voxels) and the grids of their places (P, 3) to one tensor a
        place. With volume_index (P,) a volume that stands in several places is encoded once."""
        grids = video_grid_thw
        if volume_index is not None and grids is not None:
            grids = grids_of_volumes(grids, volume_index)
        patches = 0 if grids is None else int(grids.prod(-1).sum())
        if len(pixel_values_videos) != patches:
            raise ValueError(
                f"pixel_values_videos has {len(pixel_values_videos)} patches, but video_grid_thw counts {patches}; "
                "the two must match. Pass both as the processor returns them."
            )
        scheduler, encode = self.language_model.scheduler, partial(super().get_video_features, **kwargs)
        needed = {*scan_features(scheduler)}
        with record_features(scheduler, self.visual, pixel_values_videos, grids) as recorded:
            if self.training and not needed - {"coordinates"} and self.patches_at_once is not None:
                outputs = encode_in_parts(encode, pixel_values_videos, grids, self.patches_at_once)
            else:
                outputs = encode(pixel_values_videos, grids)
        lists = [list(outputs.pooler_output)]
        lists += [list(values.split([len(part) for part in lists[0]])) for values in recorded.values()]
        if volume_index is not None:
            lists = [[part[i] for i in volume_index.tolist()] for part in lists]
        return PhotonVisionOutput(
            outputs.last_hidden_state, lists[0], deepstack_features=lists[1:] or None, feature_names=(*recorded,)
        )

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
        volume_index: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        visual_mask: torch.BoolTensor | None = None,
        question_mask: torch.BoolTensor | None = None,
        token_budget: int | None = None,
        keep_ratio: float | None = None,
        use_scheduler: bool | None = None,
        flip: torch.BoolTensor | None = None,
        row_weight: torch.FloatTensor | None = None,
        others: int | None = None,
        scan=None,
        output_full_length: bool | None = None,
        **kwargs,
    ) -> PhotonModelOutputWithPast:
        """
        Args beyond the parent's:
            volume_index (P,): which volume of pixel_values_videos each place in the prompts shows, so that questions
                on one scan share its encoding; video_grid_thw has a row for each place. Default: all in turn.
            visual_mask, question_mask (B, S) bool: default from input_ids (see `question_mask`); needed with
                inputs_embeds.
            token_budget: keep exactly so many of each row's visual tokens, the most salient.
            keep_ratio: the same as a share of each row's visual tokens.
            use_scheduler: False answers from all visual tokens; default `config.use_scheduler`, or True with a budget.
            flip (B,) bool: rows that keep what they would drop.
            row_weight (B,): each row's share of the loss, for the surrogate gradient.
            others: a seed by which as many others are drawn, of those that would be dropped; see `grounding`.
            scan: `ScanPrefix` of `encode_scan`, with which the prompts begin; vision and the layers below the cut are
                not run on it again. With it, pixel_values_videos need not be passed; if it is, it must be the same.
            output_full_length: give `last_hidden_state` of the prompt's length (B, S, D), with zeros where a token was
                deleted; default `config.output_full_length`.
        Raises: `ValueError` where masks, marks and volumes do not fit together; it says which row.
        """
        refuse_static(attention_mask, past_key_values)
        budget = token_budget is not None or keep_ratio is not None
        if use_scheduler is None:
            use_scheduler = self.config.use_scheduler or budget
        if not use_scheduler and budget:
            raise ValueError("use_scheduler=False keeps all tokens; drop it, or token_budget and keep_ratio.")
        fresh = past_key_values is None or past_key_values.get_seq_length() == 0
        visual = visual_places(input_ids, inputs_embeds, visual_mask, self.config)
        scan = scan if fresh else None
        if scan is not None:
            scan = self.prefix_for(input_ids, scan, pixel_values_videos, video_grid_thw, volume_index)
            pixel_values_videos = mm_encoder_outputs = None
        given = scan is not None or pixel_values_videos is not None or bool(mm_encoder_outputs)
        given = given or kwargs.get("pixel_values") is not None
        # in later calls the mark of a volume can only be a word that the model wrote
        has_scan = visual is not None and (fresh or given) and bool(visual.any())
        if fresh and visual is None and use_scheduler:
            raise ValueError(NO_MASKS)
        if has_scan and scan is None:
            check_scan(visual, fresh, given or input_ids is None, position_ids, mm_token_type_ids)
        if pixel_values_videos is not None:
            # encoded here, so that the arguments of the decoder do not reach the vision tower's attention
            mm_encoder_outputs = dict(mm_encoder_outputs or {})
            mm_encoder_outputs["video"] = self.get_video_features(
                pixel_values_videos, video_grid_thw, volume_index, return_dict=True
            )
        if self.training and not given:
            inputs_embeds = self._with_vision_touched(input_ids, inputs_embeds)
        schedule = {}
        if has_scan and use_scheduler:
            if question_mask is None:
                if input_ids is None:
                    raise ValueError("Got inputs_embeds with visual_mask but without question_mask; pass both.")
                question_mask = find_question(input_ids, visual, self.config)
            question_mask = grown_mask(question_mask, visual).bool()
            schedule = {
                "visual_mask": visual,
                "question_mask": question_mask,
                "keep_count": keep_counts(visual.sum(-1), token_budget, keep_ratio),
                "flip": flip,
                "row_weight": row_weight,
                "others": others,
                "scheduler_features": self.scheduler_features(
                    input_ids, visual, question_mask, mm_encoder_outputs, scan
                ),
            }
        shared = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        if scan is None:
            outputs = super().forward(
                inputs_embeds=inputs_embeds,
                video_grid_thw=video_grid_thw,
                mm_token_type_ids=mm_token_type_ids,
                mm_encoder_outputs=mm_encoder_outputs,
                **shared,
                **schedule,
            )
        else:
            outputs = self.answer_behind(scan, visual, schedule, **shared)
        if fresh and outputs.past_key_values is not None:
            if position_ids is not None and (attention_mask is None or attention_mask.ndim == 2):
                self.rope_deltas = rope_deltas(position_ids, attention_mask)
            # with the cache, not with the model alone: another scan may be asked about before this one goes on
            outputs.past_key_values.rope_deltas = self.rope_deltas
        if self.config.output_full_length if output_full_length is None else output_full_length:
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            outputs.last_hidden_state = full_length(outputs.last_hidden_state, outputs.get("keep_index"), length)
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

    def set_keep_budget(self, share):
        self.model.set_keep_budget(share)

    def set_scheduler(self, scheduler):
        return self.model.set_scheduler(scheduler)

    def encode_scan(self, *args, **kwargs):
        return self.model.encode_scan(*args, **kwargs)

    def load_scan(self, file, processor):
        return self.model.load_scan(file, processor)

    set_scheduler_phase.__doc__ = PhotonModel.set_scheduler_phase.__doc__
    set_keep_budget.__doc__ = PhotonModel.set_keep_budget.__doc__
    set_scheduler.__doc__ = PhotonModel.set_scheduler.__doc__
    encode_scan.__doc__, load_scan.__doc__ = PhotonModel.encode_scan.__doc__, PhotonModel.load_scan.__doc__

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
        volume_index: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,  # named: generation encodes once and expands for beams
        visual_mask: torch.BoolTensor | None = None,
        question_mask: torch.BoolTensor | None = None,
        token_budget: int | None = None,
        keep_ratio: float | None = None,
        use_scheduler: bool | None = None,
        objective: torch.LongTensor | None = None,
        output_full_length: bool | None = None,
        skip_logits: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        scan=None,
        **kwargs,
    ) -> PhotonCausalLMOutputWithPast:
        """
        Args beyond those of `PhotonModel.forward`:
            labels (B, S): of the unpruned sequence; cut with it. -100 where there is nothing to learn.
            objective (B,) of `Objective`: each row's kind of loss, default all `ANSWER`. `FLIP` rows keep what they
                would drop. Rows of the other two kinds have no band loss.
            output_full_length: give logits of the prompt's length (B, S, vocabulary), as other models do, with zeros
                where a token was deleted; default `config.output_full_length`. Without it they have the length after
                the cut (B, S', vocabulary), and `keep_index` tells which place each belongs to. Without effect where
                logits_to_keep chooses logits.
            skip_logits: with labels give the losses alone. Logits are then made where there is a label, a few at a
                time, which saves their memory everywhere else.
            num_items_in_batch: answer tokens of the whole step, as the Trainer counts them over accumulated batches.
        """
        flip = None if objective is None else objective == Objective.FLIP
        row_weight = total = None
        if labels is not None:
            count = (labels[:, 1:] != -100).sum(-1)  # no answer token is ever cut
            total = count.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            row_weight = count / total  # (B,) each row's share of the loss
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            volume_index=volume_index,
            mm_token_type_ids=mm_token_type_ids,
            second_per_grid_ts=second_per_grid_ts,
            mm_encoder_outputs=mm_encoder_outputs,
            visual_mask=visual_mask,
            question_mask=question_mask,
            token_budget=token_budget,
            keep_ratio=keep_ratio,
            use_scheduler=use_scheduler,
            flip=flip,
            row_weight=row_weight,
            scan=scan,
            output_full_length=False,  # the head runs on the short sequence
            **kwargs,
        )
        skip_logits, logits, losses = skip_logits and labels is not None, None, {}
        if not skip_logits:
            places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, places])
        if labels is not None:
            dense = self.training and self.model.language_model.scheduler_phase == "dense"
            states, head = (outputs.last_hidden_state, self.lm_head) if skip_logits else (logits, None)
            share = row_weight, total
            losses = all_losses(states, labels, outputs, objective, *share, self.config, band=not dense, head=head)
        whole = logits is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0
        if whole and (self.config.output_full_length if output_full_length is None else output_full_length):
            prompt = input_ids if inputs_embeds is None else inputs_embeds
            logits = full_length(logits, outputs.keep_index, prompt.shape[1])
        return PhotonCausalLMOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{item.name: outputs.get(item.name) for item in fields(ScheduleFields)},
            keep_index=outputs.get("keep_index"),
            **losses,
        )

    def generate(self, inputs=None, *args, assistant_model=None, past_key_values=None, scan=None, **kwargs):
        """As of `GenerationMixin`, without `assistant_model`; a cache with a conversation takes no more scans.

        scan: `ScanPrefix` of `encode_scan`, with which the prompts begin.
        """
        if assistant_model is not None:
            raise ValueError(
                "assistant_model is not supported: it would need a cut of its own. Leave it out; "
                "prompt_lookup_num_tokens=N speculates without a second model."
            )
        if past_key_values is not None and past_key_values.get_seq_length():
            again = [name for name in SCAN_INPUTS if (kwargs | {"scan": scan}).get(name) is not None]
            if again:
                raise ValueError(
                    f"past_key_values holds a conversation with its scans already; leave out {', '.join(again)} and "
                    "pass the whole conversation's input_ids and attention_mask. For other scans start a fresh prompt."
                )
        if scan is not None:
            kwargs = self.model.with_prefix(kwargs.get("input_ids", inputs), scan, kwargs)
        return super().generate(inputs, *args, past_key_values=past_key_values, **kwargs)

    grounding = grounding_of_answers

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size is set, but a question must be seen whole, with its scan, to decide which tokens "
                "it needs. Leave prefill_chunk_size unset; the cut makes the prompt short by itself."
            )
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "offloaded", "quantized"):
            raise ValueError(
                f"cache_implementation is {implementation!r}; a static cache has a fixed length, but a prompt's "
                "length changes at the cut. Leave it unset."
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
                raise ValueError(NO_TOKEN_TYPES)
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)


__all__ = [
    "PhotonCache",
    "PhotonForConditionalGeneration",
    "PhotonModel",
    "PhotonPreTrainedModel",
    "PhotonTextModel",
]
