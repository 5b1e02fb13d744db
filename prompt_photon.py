"""Where the parts of a prompt lie: scans, the question, padding; and what is known of each token beside its states.

Masks of the parts, three-axis positions, and the features that selection methods may ask for.

B rows, S places. Positions have three axes (depth, row, column); text advances all three together.
"""

import hashlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from .scheduling_photon import masked_index

NO_TOKEN_TYPES = (
    "mm_token_type_ids is missing, without which volume tokens would get the positions of plain text. Pass everything "
    "that the processor returns, model(**inputs) or model.generate(**inputs); a collator must keep mm_token_type_ids."
)
NO_MASKS = (
    "Got inputs_embeds without visual_mask and question_mask (B, S), which tell the scheduler where the scan and the "
    "question are. Pass them, pass input_ids, or set use_scheduler=False."
)


# === Masks ===========================================================================================================


def visual_places(input_ids, inputs_embeds, visual_mask, config):
    """Which tokens are visual, (B, S) bool; `None` where neither ids nor a mask tell."""
    if visual_mask is not None or input_ids is None:
        return grown_mask(visual_mask, inputs_embeds if input_ids is None else input_ids)
    return (input_ids == config.video_token_id) | (input_ids == config.image_token_id)


def check_scan(visual, fresh, given, position_ids, mm_token_type_ids):
    """Raises `ValueError` where a prompt with visual tokens lacks its scans or token types, or comes too late."""
    if not fresh:
        raise ValueError(
            "Volume tokens came with a cache that already holds a conversation; scans are read in the first call "
            "only. Start a fresh prompt with all its scans."
        )
    if not given:
        raise ValueError(
            f"The prompt has {int(visual.sum())} volume tokens but no volumes: pass pixel_values_videos and "
            "video_grid_thw, as the processor returns them."
        )
    if position_ids is None and mm_token_type_ids is None:
        raise ValueError(NO_TOKEN_TYPES)


def question_mask(input_ids, visual_mask, config):
    """Which tokens are the question, (B, S) bool: the text of the last user turn, after its last scan if text follows.

    Args: input_ids (B, S); visual_mask (B, S) bool; config with the ids of the chat's marks. Without the role word's
        id (`user_token_id`), or where the chat has none: what stands between the last `<|vision_end|>` and the next
        `<|im_end|>`, as in the release.
    Returns: (B, S) bool; rows without visual tokens are all False.
    Raises: `ValueError` where a row has visual tokens and no question.
    """
    mask = torch.zeros_like(visual_mask)
    vision_end, im_end = config.vision_end_token_id, config.im_end_token_id  # a config's fields are slow to read
    marks = {config.vision_start_token_id, vision_end}
    opening = config.im_start_token_id, config.user_token_id
    for row in visual_mask.any(-1).nonzero().flatten().tolist():
        ids, visual = input_ids[row].tolist(), visual_mask[row].tolist()
        begin, end = _last_user_turn(ids, opening, vision_end, im_end)
        after_scan = max((i + 1 for i in range(begin, end) if ids[i] == vision_end), default=begin)
        for first in (after_scan, begin):
            places = [i for i in range(first, end) if not visual[i] and ids[i] not in marks]
            if places:
                break
        else:
            raise ValueError(
                f"Row {row} has a scan but no question: expected text in the user turn, closed by the token "
                f"{im_end} (<|im_end|>). Use processor.apply_chat_template, or pass question_mask."
            )
        mask[row, places] = True
    return mask


def _last_user_turn(ids, opening, vision_end, im_end):
    """First place and end of the last user turn's content; an empty range where there is none.

    Args: ids: list of a row's tokens; opening: the ids of `<|im_start|>` and the role word, or `None` for either.
    """
    starts = []
    if None not in opening:  # after <|im_start|>, the role word, a line break
        mark, role = opening
        starts = [i + 3 for i, token in enumerate(ids[:-1]) if token == mark and ids[i + 1] == role]
    if not starts:
        starts = [i + 1 for i, token in enumerate(ids) if token == vision_end]
    begin = starts[-1] if starts else len(ids)
    return begin, next((i for i in range(begin, len(ids)) if ids[i] == im_end), begin)


def real_places(attention_mask, like):
    """(B, S) bool: places that are not padding; all of them where there is no mask.

    Raises: `ValueError` for a mask that is not two-dimensional.
    """
    if attention_mask is None:
        return torch.ones_like(like)
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.ndim} dimensions; the cut needs a 2D one (batch, sequence). Pass "
            "that, or use_scheduler=False."
        )
    return attention_mask.bool()


def grown_mask(mask, like):
    """A prompt's mask (B, S0) for the longer sequence `like` (B, S, ...), since generation appends tokens."""
    if mask is None or mask.shape[1] == like.shape[1]:
        return mask
    return nn.functional.pad(mask, (0, like.shape[1] - mask.shape[1]))


def refuse_static(attention_mask, cache):
    """Raises `ValueError` for a static cache."""
    if isinstance(attention_mask, dict) or getattr(cache, "is_compileable", False):
        raise ValueError(
            "A static cache has a fixed length, but a prompt's length changes at the cut. Use the default dynamic "
            "cache (leave cache_implementation unset)."
        )


# === Positions =======================================================================================================


def prompt_positions(kinds, grids, intervals, vision_position_ids, row):
    """Three-axis positions (3, N) of one row's N real tokens, and the position after the last.

    As Qwen2.5-VL's, except that text behind a volume starts after the largest position on any axis. The parent counts
    rows and columns only, so that the last slabs of a deep volume would lie behind the text that follows them.

    Args:
        kinds (N,): 0 text, 1 image, 2 volume, as `mm_token_type_ids`.
        grids: {kind: iterator over (t, h, w)}, in the order of the prompts; intervals: {kind: iterator over the
            positions from one slab to the next}.
        vision_position_ids: (start, grid, interval) -> (3, tokens), the parent's.
        row: its number, for messages.
    """
    values, counts = kinds.unique_consecutive(return_counts=True)
    parts, start = [], 0
    for kind, count in zip(values.tolist(), counts.tolist(), strict=True):
        if kind == 0:
            part = torch.arange(start, start + count, device=kinds.device).expand(3, -1)
        else:
            grid = next(grids[kind], None)
            if grid is None:
                raise ValueError(
                    f"Row {row} has more groups of volume tokens than there are volumes; they must match one to one. "
                    "Use the processor."
                )
            part = vision_position_ids(start, grid, next(intervals[kind]))
            if part.shape[1] != count:
                raise ValueError(
                    f"Row {row}: {count} volume tokens stand together where the grid gives {part.shape[1]}. "
                    "Volumes and volume tokens must match one to one; use the processor."
                )
        parts.append(part)
        start = int(part.max()) + 1
    return torch.cat(parts, dim=1), start


def rope_deltas(position_ids, attention_mask):
    """(B, 1): the position of a row's next token minus the row's length.

    position_ids (B, S), (3, B, S) or (4, B, S), whose last three are the axes.
    """
    last = (position_ids if position_ids.ndim == 2 else position_ids[-3:].amax(0)).amax(-1)
    real = real_places(attention_mask, position_ids[0] if position_ids.ndim == 3 else position_ids)
    return (last + 1 - real.sum(-1).to(last.device)).unsqueeze(1)


class PromptPositions:
    """The positions of a model's prompts; mixed into Qwen2.5-VL's model before its own methods."""

    def get_rope_index(
        self, input_ids=None, mm_token_type_ids=None, image_grid_thw=None, video_grid_thw=None,
        second_per_grid_ts=None, attention_mask=None, **kwargs,
    ):  # fmt: skip
        """Three-axis positions (3, B, S), and the position of each row's next token minus the row's length, (B, 1).

        Text behind a volume starts after the largest position on any axis (see `prompt_positions`), and
        `second_per_grid_ts` defaults to the config's. input_ids are not used.
        """
        vision = self.config.vision_config
        seconds = repeat(self.config.second_per_grid_ts) if second_per_grid_ts is None else iter(second_per_grid_ts)
        grids = {
            kind: iter(() if grids is None else grids) for kind, grids in ((1, image_grid_thw), (2, video_grid_thw))
        }
        intervals = {1: repeat(1), 2: (vision.tokens_per_second * step for step in seconds)}

        def of_volume(start, grid, interval):
            merge, device = vision.spatial_merge_size, mm_token_type_ids.device
            return self.get_vision_position_ids(start, grid, 1, merge, interval, device=device)

        position_ids = torch.zeros(3, *mm_token_type_ids.shape, dtype=torch.long, device=mm_token_type_ids.device)
        real = real_places(attention_mask, mm_token_type_ids.bool())
        deltas = []
        for row, kinds in enumerate(mm_token_type_ids):
            kinds = kinds[real[row]]
            position_ids[:, row, real[row]], following = prompt_positions(kinds, grids, intervals, of_volume, row)
            deltas.append(following - len(kinds))
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


# === Features for selection methods ==================================================================================


@dataclass
class PhotonVisionOutput(BaseModelOutputWithPooling):
    """
    The vision tower's output for P places of scans in the prompts.

    Args:
        pooler_output (`list[torch.FloatTensor]`): P tensors (tokens, D).
        deepstack_features (`list[list[torch.Tensor]]`, *optional*):
            What the scheduler needs of each token, of `scheduler_features`: lists of P tensors
            (tokens, ...). Generation expands lists of this name for beams, as it does the pooler output.
        feature_names (`tuple[str]`, *optional*): of these lists.
    """

    deepstack_features: list | None = None
    feature_names: tuple | None = None


def join_outputs(outputs):
    """One `PhotonVisionOutput` of several, their places one after the other."""
    features = [output.deepstack_features for output in outputs]
    joined = None if None in features else [sum(lists, []) for lists in zip(*features, strict=True)]
    return PhotonVisionOutput(
        pooler_output=[part for output in outputs for part in output.pooler_output],
        deepstack_features=joined,
        feature_names=outputs[0].feature_names,
    )


def grids_of_volumes(grids, volume_index):
    """Grids of the places (P, 3) -> grids of the volumes (volumes, 3) that volume_index (P,) names."""
    volumes = int(volume_index.max()) + 1 if len(volume_index) else 0
    places = [(volume_index == volume).nonzero()[:, 0] for volume in range(volumes)]
    if len(volume_index) != len(grids) or not all(len(place) for place in places):
        raise ValueError(
            f"volume_index names the volumes {volume_index.tolist()} for {len(grids)} places; expected one number a "
            "place, and each volume from 0 on in at least one. Pass it as the processor returns it."
        )
    of_volumes = torch.stack([grids[place[0]] for place in places])
    if not torch.equal(of_volumes[volume_index], grids):
        raise ValueError("Places that volume_index gives one volume have unlike rows in video_grid_thw.")
    return of_volumes


def grid_coordinates(grid, merge):
    """Depth, row and column of each visual token of one scan, (tokens, 3); grid (t, h, w) in patches."""
    t, h, w = (int(n) for n in grid)
    axes = (torch.arange(n, device=grid.device) for n in (t, h // merge, w // merge))
    return torch.cartesian_prod(*axes).view(-1, 3)


def features_of_scans(output, visual_mask):
    """{name: (B, V, ...)} of what a `PhotonVisionOutput` carries of each token of P scans, for `SchedulerInputs`.

    Args: output: its first list is the coordinates (tokens, 3); visual_mask (B, S) bool.
    """
    index, visual = masked_index(visual_mask)
    lists = output.deepstack_features
    coordinates = torch.cat(lists[0]).to(visual.device)
    place = torch.cat([torch.full((len(part),), number) for number, part in enumerate(lists[0])]).to(visual.device)

    def by_row(values):  # (tokens of all rows, ...) -> (B, V, ...)
        out = values.new_zeros(*visual.shape, *values.shape[1:])
        out[visual] = values
        return out

    place = by_row(place)
    first = place.masked_fill(~visual, len(lists[0])).amin(-1, keepdim=True)
    scan = torch.where(visual, place - first, 0)  # a row's scans count from 0
    features = {"coordinates": torch.cat([scan[..., None], by_row(coordinates)], dim=-1)}
    for name, part in zip(output.feature_names[1:], lists[1:], strict=True):
        features[name] = by_row(torch.cat(list(part)).to(visual.device))
    return features


def last_of_prompt(input_ids, question_mask, config):
    """Place of each prompt's last token, (B, 1): the end of the line that opens the answer, or of the question.

    Tokens of an answer, in training or in generation without a cache, do not count.
    """
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    end = torch.where(question_mask, places, 0).amax(-1, keepdim=True)  # (B, 1)
    if config.im_start_token_id is None:
        return end
    opens = (input_ids == config.im_start_token_id) & (places > end)  # "<|im_start|>", the role word, a line break
    first = torch.where(opens, places, input_ids.shape[1]).amin(-1, keepdim=True)
    return torch.where(first + 2 < input_ids.shape[1], first + 2, end)


def row_numbers(input_ids, visual_mask, last_index):
    """(B,) long: a number for each row that follows from its prompt's words, whatever its padding and its batch.

    Args: input_ids (B, S); visual_mask (B, S) bool; last_index (B, 1), each prompt's last place.
    """
    numbers = []
    for ids, visual, last in zip(input_ids, visual_mask, last_index[:, 0].tolist(), strict=True):
        first = int(visual.int().argmax())
        words = ids[first : last + 1][~visual[first : last + 1]].tolist()
        digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
        numbers.append(int.from_bytes(digest, "big") >> 2)
    return torch.tensor(numbers, device=input_ids.device)


class PromptFeatures:
    """What `PhotonModel` has for selection methods."""

    def scheduler_features(self, input_ids, visual, question_mask, mm_encoder_outputs, scan):
        """What the scheduler needs beside the scoring layer, by the names of `SchedulerInputs`; (B, V, ...) each."""
        scheduler = self.language_model.scheduler
        needs, features = scheduler.needs, {} if scan is None else dict(scan.features)
        video = (mm_encoder_outputs or {}).get("video")
        if not features and getattr(video, "deepstack_features", None) is not None:
            features = features_of_scans(video, visual)
        missing = [name for name in scan_features(scheduler) if name not in features]
        if missing:
            raise ValueError(
                f"The scheduler needs {', '.join(missing)} of the scan, but the encoded scan does not carry them. "
                "Encode it with get_video_features or encode_scan after set_scheduler, and pass the whole output."
            )
        if needs & {"row_number", "sequence"}:
            if input_ids is None:
                raise ValueError("The scheduler needs the prompt's words; pass input_ids, not inputs_embeds.")
            features["last_index"] = last_of_prompt(input_ids, question_mask, self.config)
            features["row_number"] = row_numbers(input_ids, visual, features["last_index"])
        return features


def scan_features(scheduler):
    """Names of what a scheduler needs of each token of a scan."""
    vision = ("vision_attention", "vision_keys") if "vision" in scheduler.needs else ()
    names = (*vision, *getattr(scheduler, "scan_records", ()))
    return ("coordinates", *names) if names or "coordinates" in scheduler.needs else ()


@contextmanager
def record_features(scheduler, visual, patches, grids):
    """Yields a dict that holds afterwards what a scheduler needs of each token of the scans that the tower encodes."""
    names, recorded, own = scan_features(scheduler), {}, getattr(scheduler, "record_scan", None)
    with ExitStack() as stack:
        if names:
            coordinates = [grid_coordinates(grid, visual.spatial_merge_size) for grid in grids]
            recorded["coordinates"] = torch.cat(coordinates)
        if "vision" in scheduler.needs:
            stack.enter_context(record_attention(recorded, visual, grids))
        if own is not None:
            stack.enter_context(own(recorded, visual, patches, grids))
        yield recorded


@contextmanager
def record_attention(recorded, visual, grids, block=None, names=("vision_attention", "vision_keys")):
    """Records the attention that tokens receive in a block of the vision tower, while it runs.

    The block attends within one depth slab or a window of it, so the attention is computed part by part, never for all
    pairs of patches. `recorded` holds afterwards, under the two names, the attention received (tokens,), mean over
    heads and over a token's patches, 1 on average, and the keys (tokens, d), mean likewise. block: default the last
    with full attention.
    """
    attention = visual.blocks[max(visual.fullatt_block_indexes) if block is None else block].attn
    merge = visual.spatial_merge_unit

    @torch.no_grad()
    def record(module, args, kwargs):
        hidden_states = args[0]
        states = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1))  # (patches, 3, heads, d)
        query, key = apply_rotary_pos_emb_vision(states[:, 0], states[:, 1], *kwargs["position_embeddings"])
        lengths = kwargs["cu_seqlens"].diff().tolist()
        received = []
        for q, k in zip(query.float().split(lengths), key.float().split(lengths), strict=True):  # one slab
            logits = torch.einsum("qhd,khd->hqk", q, k) * module.scaling
            received.append(logits.softmax(-1).sum(1).mean(0))  # (patches of the slab,)
        sizes = (visual.spatial_merge_size, visual.window_size, visual.patch_size)
        window_index, _ = get_vision_window_index(grids, *sizes)
        order = window_index.to(hidden_states.device).argsort()
        recorded[names[0]] = torch.cat(received).view(-1, merge).mean(1)[order]
        recorded[names[1]] = key.float().mean(1).view(len(order), merge, -1).mean(1)[order]

    handle = attention.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recorded_outputs(recorded, *modules):
    """A context in which `recorded` gets {module: its last output}."""

    def record(module, _, output):
        recorded[module] = output

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(record).remove)
        yield
