"""What is kept of a prompt, so that it need not be computed again: an answer's cache, and prefixes of scans.

- `PhotonCache`: a key-value cache that knows which places of the prompt its layers hold, and what was cut (`Cut`);
- `ScanPrefix`: the part of a prompt up to its last scan. Visual tokens precede the question, so vision and the layers
  below the cut do not depend on it, and are computed once for all questions;
- `PrefixModel`: what the model has for it.
B rows; S places of the prompt, P of the prefix, T of text behind it; V visual tokens, D channels, G key heads, size d.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from .prompt_photon import check_scan, features_of_scans, grids_of_volumes, real_places, visual_places
from .scheduling_photon import gather_places, padded_places

REUSE = ("exact", "select")
FORMAT = "photon scan prefix 1"
SCANS = ("pixel_values_videos", "video_grid_thw", "volume_index")


# === Caches ==========================================================================================================


@dataclass
class Layout:
    """Which places of a prompt some layers of a cache hold, where these are not all of them in the prompt's order."""

    mask: torch.Tensor  # (B, K) bool: which of the held places are real
    dropped: int  # S - K: by how much they are fewer
    first_layer: int  # holds for this layer and those above

    def attention_mask(self, attention_mask, stored, new):
        """(B, stored + new) for a layer that holds `stored` places of the prompt and what followed it.

        attention_mask (B, S + ...) of the whole sequence, or `None` where nothing in it is padding.
        """
        held = self.mask[:, :stored]  # fewer than it was if candidates of prompt lookup were taken back
        if attention_mask is None:
            rest = self.mask.new_ones(held.shape[0], stored + new - held.shape[1])
        else:
            rest = attention_mask[:, held.shape[1] + self.dropped : stored + self.dropped + new].bool()
        return torch.cat([held, rest.to(held.device)], dim=-1)


@dataclass
class Cut(Layout):
    """What a cache remembers of its cut."""

    keep_mask: torch.Tensor  # (B, V) bool: which visual tokens stayed
    visual_count: torch.Tensor  # (B,): of how many
    threshold: torch.Tensor  # (B, 1)
    later: list = field(default_factory=list)  # `Layout` of the layers above each further cut, from below

    def narrow(self, keep_index, length, first_layer, keep_mask):
        """Notes a further cut, after which layers from `first_layer` on hold keep_index (B, K) of `length` places."""
        self.later.append(Layout(keep_index >= 0, length - keep_index.shape[1], first_layer))
        self.keep_mask = keep_mask


def layout_of(cache, layer):
    """The `Layout` of a cache's layer, or `None` where it holds the whole prompt."""
    cut = getattr(cache, "cut", None)
    if cut is None or layer < cut.first_layer:
        return getattr(cache, "prompt", None)
    return next((layout for layout in reversed(cut.later) if layer >= layout.first_layer), cut)


class PhotonCache(DynamicCache):
    """A `DynamicCache` whose length is the number of tokens of the conversation, including those cut from it.

    After a prompt with scans `cache.cut` tells which visual tokens stayed; generation returns the cache as
    `past_key_values` with `return_dict_in_generate=True`.
    """

    cut: Cut | None = None
    prompt: Layout | None = None  # of the layers below the cut, after a prompt behind a prefix
    rope_deltas: torch.Tensor | None = None

    def get_seq_length(self, layer_idx=0):
        stored, layout = super().get_seq_length(layer_idx), layout_of(self, layer_idx)
        return stored + layout.dropped if stored and layout else stored

    def get_query_offset(self, layer_idx=0):
        return super().get_seq_length(layer_idx)

    def reset(self):
        super().reset()
        self.cut = self.prompt = self.rope_deltas = None


# === Prefixes ========================================================================================================


@dataclass
class ScanPrefix:
    """The part of N prompts up to their last scan, as `model.encode_scan` computes it for all questions behind it.

    Handle a saved prefix as you handle the scan: everything in it follows from the scan.

    Args:
        tensors: by name, a row for each prompt,
            - "input_ids", "real" (N, P): its tokens, short prompts padded on the left; "position_ids" (N, 3, P);
            - "grids" (N, scans, 3): patches of each scan along depth, height, width; zeros where a prompt has fewer;
            - "states" (N, P, D): hidden states that enter the cut; "score_keys" (N, G, P, d): of the scoring layer;
            - "keys.LAYER", "values.LAYER": below the cut (N, G, P, d); above it (N, G, A, d) of the A places in front
              of the first scan, which nothing behind them changes, or with `reuse="select"` (N, G, P, d);
            - "lead_index" (N, A): those places, -1 for padding; "lead_states" (N, A, D): after the last layer;
            - "features.NAME" (N, V, ...): what the scheduler needs beside, by the names of `SchedulerInputs`.
        scans: N digests of the scans' voxels, "" where the voxels were not at hand.
        model: digest of the weights and settings that decide all this.
        reuse: "exact" or "select", see `encode_scan`.
    """

    tensors: dict
    scans: list
    model: str
    reuse: str

    def __len__(self):
        return len(self.scans)

    def __getattr__(self, name):
        tensors = self.__dict__.get("tensors", {})
        if name not in tensors:
            raise AttributeError(f"a ScanPrefix has no {name}; it has {', '.join(sorted(tensors))}.")
        return tensors[name]

    @property
    def length(self):
        return self.input_ids.shape[1]

    @property
    def features(self):
        return {n.removeprefix("features."): t for n, t in self.tensors.items() if n.startswith("features.")}

    @property
    def video_grid_thw(self):
        return self.grids[self.grids.any(-1)]  # (scans of all rows, 3)

    def to(self, device):
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def rows(self, numbers):
        """The prefix of these prompts, a list of numbers, which may come more than once."""
        index = torch.tensor(numbers)
        tensors = {name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, scans=[self.scans[i] for i in numbers])

    def for_batch(self, batch):
        """The prefix of a batch's rows: those on one prompt follow one another, equally many on each."""
        times, rest = divmod(batch, len(self))
        if rest or not times:
            raise ValueError(
                f"The prefix has {len(self)} prompts, and there are {batch} questions; expected equally many, or a "
                "multiple. Choose with prefix.rows([0, 0, 1]), a number for each question."
            )
        if len(self) > 1:
            return self if times == 1 else self.rows([i // times for i in range(batch)])
        tensors = {name: t.expand(batch, *t.shape[1:]) for name, t in self.tensors.items()}  # no copy
        return replace(self, tensors=tensors, scans=self.scans * batch)

    def fill(self, cache, layers, index=None):
        """Puts the prefix into layers of a cache, its places `index` (B, K) if given."""
        for i in layers:
            states = [self.tensors[f"keys.{i}"], self.tensors[f"values.{i}"]]
            if index is not None:
                states = [gather_places(t.transpose(1, 2), index).transpose(1, 2) for t in states]
            if states[0].shape[2]:
                cache.update(*states, i)

    def joined(self, hidden_states):
        """The states that enter the cut, (B, P + T, D); hidden_states (B, T, D) of the text."""
        return torch.cat([self.states.to(hidden_states.device), hidden_states], dim=1)

    def with_scores(self, scores, visual_index):
        """The scoring layer's queries and keys by name, with those of the prefix; visual_index (B, V)."""
        keys = self.score_keys.to(scores["question_keys"].device)
        scores["visual_keys"] = gather_places(keys.transpose(1, 2), visual_index).transpose(1, 2)
        if "keys" in scores:
            scores["keys"] = torch.cat([keys, scores["keys"]], dim=2)
        return scores

    def held_and_fresh(self, stay):
        """Which of the places that stay (B, P + T) bool the layers above the cut hold already (B, K), and which they
        must compute (B, S'); -1 for padding."""
        if self.reuse == "select":
            held = padded_places(stay[:, : self.length])
        else:
            held = self.lead_index.to(stay.device)
        known = torch.zeros(len(stay), stay.shape[1] + 1, dtype=torch.bool, device=stay.device)
        known.scatter_(1, held.masked_fill(held < 0, stay.shape[1]), True)  # padding falls into the last column
        return held, padded_places(stay & ~known[:, :-1])

    def whole(self, hidden_states, held, fresh):
        """The decoder's output for all places that stay and their index, padded on the left; with "select" for the
        text alone."""
        if self.reuse == "select":
            return hidden_states, fresh
        hidden_states = torch.cat([self.lead_states.to(hidden_states.device), hidden_states], dim=1)
        index = torch.cat([held, fresh], dim=1)
        order = padded_places(index >= 0)
        return gather_places(hidden_states, order), index.gather(1, order.clamp(min=0)).masked_fill(order < 0, -1)

    def places(self, input_ids, real, visual):
        """(B, P + T): the place in the prompts (B, S) of each place of prefix and text, -1 for padding.

        Raises: `ValueError` where a prompt does not begin with the prefix, or has a scan behind it.
        """
        count = self.real.sum(-1, keepdim=True)
        front = real & (real.cumsum(-1) <= count)
        index = F.pad(padded_places(front), (self.length - int(front.sum(-1).max()), 0), value=-1)
        differ = (gather_places(input_ids, index) != self.input_ids) & self.real | ((index < 0) & self.real)
        if differ.any():
            row, place = differ.nonzero()[0].tolist()
            total = int(count[row])
            raise ValueError(
                f"Row {row}: the prompt and the prefix differ in token {place - self.length + total} of {total}. What "
                "stands in front of the scans must be equal, and their sizes. Call encode_scan with this prompt."
            )
        if (visual & ~front).any():
            raise ValueError("A prompt has a scan that the prefix lacks. Call encode_scan with all its scans.")
        return torch.cat([index, padded_places(real & ~front)], dim=1)

    def check_scans(self, pixel_values_videos, video_grid_thw, volume_index=None):
        """Raises `ValueError` where these patches (as the processor gives them) are not those of the prefix."""
        counts = self.grids.any(-1).sum(-1).tolist()
        given = scan_digests(pixel_values_videos, video_grid_thw, volume_index, counts)
        for row, (new, known) in enumerate(zip(given, self.scans, strict=True)):
            if new != known:
                raise ValueError(
                    f"Row {row}: pixel_values_videos is not the scan that the prefix was made of, or was processed "
                    "with other settings. Call encode_scan with this scan, or leave pixel_values_videos out."
                )

    def save(self, file, processor):
        """Writes a safetensors file that `model.load_scan` reads. processor: which made the scan's patches."""
        about = {"format": FORMAT, "model": self.model, "reuse": self.reuse, "scans": self.scans}
        about["processor"] = digest_of(processor.image_processor.settings)
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in self.tensors.items()}
        save_file(tensors, file, metadata={"prefix": json.dumps(about)})


# === Digests =========================================================================================================


def digest_of(*parts):
    """A short text that changes with any part; bytes, or what JSON takes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def scan_digests(patches, grids, volume_index, counts):
    """One digest for each prompt, of `counts` scans each. patches (N, voxels); grids of the places (P, 3)."""
    volumes = grids if volume_index is None else grids_of_volumes(grids, volume_index)
    rounded = patches.detach().to(torch.bfloat16).view(torch.int16).cpu()  # whatever type it was passed in
    parts = [digest_of(part.numpy().tobytes()) for part in rounded.split(volumes.prod(-1).tolist())]
    index = range(len(parts)) if volume_index is None else volume_index.tolist()
    places = iter(zip(index, grids.tolist(), strict=True))
    rows = [[next(places) for _ in range(count)] for count in counts]
    return [digest_of([[parts[i], grid] for i, grid in row]) for row in rows]


def digest_of_weights(module):
    """What changes with a module's weights, as JSON takes it: the sum of each tensor's bits, and a few in full, which
    takes a second for billions. Weights that are offloaded to disk count by shape alone."""
    parts = []
    for name, weights in module.named_parameters():
        parts.append([name, list(weights.shape), weights.dtype])
        if not weights.is_meta:
            raw = weights.detach().contiguous().flatten().view(torch.uint8)
            whole = len(raw) // 8 * 8
            bits = raw[:whole].clone().view(torch.int64) if raw.storage_offset() else raw[:whole].view(torch.int64)
            parts += [int(bits.sum()), bits[:: max(1, len(bits) // 64)].tolist(), raw[whole:].tolist()]
    return parts


def model_digest(model):
    """Of the weights of vision tower and decoder, and of the settings that decide what a prefix holds. It is kept with
    the model, and made again after the weights have changed."""
    modules = [model.visual, model.language_model.embed_tokens, model.language_model.layers]  # not the scheduler
    state = [(w.data_ptr(), w.dtype, w.is_inference() or w._version) for part in modules for w in _weights(part)]
    known = getattr(model, "_prefix_digest", None)
    if known is None or known[0] != state:
        towers = [part.to_dict() | {"dtype": None} for part in (model.config.vision_config, model.config.text_config)]
        fields = [model.config.scheduler_layer, model.config.second_per_grid_ts]
        model._prefix_digest = known = state, digest_of(*towers, *fields, *map(digest_of_weights, modules))
    return known[1]


def _weights(module):
    """The parameters of a module. `parameters()` also makes their names, which takes twenty times as long."""
    parts = [module]
    for part in parts:  # which grow meanwhile
        parts += filter(None, part._modules.values())
        yield from filter(lambda weight: weight is not None, part._parameters.values())


# === The model's methods =============================================================================================


class PrefixModel:
    """What `PhotonModel` has for prefixes of scans."""

    @torch.no_grad()
    def encode_scan(
        self, input_ids, attention_mask=None, pixel_values_videos=None, video_grid_thw=None, volume_index=None,
        mm_token_type_ids=None, mm_encoder_outputs=None, second_per_grid_ts=None, reuse="exact",
    ):  # fmt: skip
        """The `ScanPrefix` of prompts, to ask any question about their scans: `model.generate(**inputs, scan=prefix)`.

        Args:
            input_ids and the others: a prompt about the scans, as the processor returns it. What follows the last scan
                does not matter. Instead of pixel_values_videos encoded scans do, as `forward` takes them.
            reuse: "exact": answers are those of a whole prompt. "select": the scan also passes through the layers
                above the cut, once, and a question attends to the keys of the tokens that it keeps. These have then
                read tokens that it does not keep, so that answers may differ, and a question costs its text alone.
        Raises: `ValueError` where a prompt has no scan, or scans and prompts do not match.
        """
        if reuse not in REUSE:
            raise ValueError(f"reuse is {reuse!r}; expected one of {', '.join(map(repr, REUSE))}.")
        if self.training:
            raise ValueError("A prefix carries no gradient; call model.eval() before encode_scan.")
        visual = visual_places(input_ids, None, None, self.config)
        if not visual.any(-1).all():
            raise ValueError(f"Row {int((~visual.any(-1)).int().argmax())} has no scan, so there is nothing to keep.")
        encoded = (mm_encoder_outputs or {}).get("video")
        check_scan(visual, True, encoded is not None or pixel_values_videos is not None, None, mm_token_type_ids)
        position_ids, _ = self.get_rope_index(
            input_ids, mm_token_type_ids, None, video_grid_thw, second_per_grid_ts, attention_mask
        )
        ends = (video_grid_thw.prod(-1) // self.config.vision_config.spatial_merge_size**2).cumsum(0)
        last_scan = torch.searchsorted(ends, visual.sum(-1).cumsum(0)) + 1  # (N,) scans of this row and those before
        counts = last_scan.diff(prepend=last_scan.new_zeros(1)).tolist()
        scans = [""] * len(input_ids)
        if encoded is None:
            encoded = self.get_video_features(pixel_values_videos, video_grid_thw, volume_index, return_dict=True)
            scans = scan_digests(pixel_values_videos, video_grid_thw, volume_index, counts)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(visual, places, -1).amax(-1, keepdim=True)
        closing = (input_ids == self.config.vision_end_token_id) & (places == last + 1)
        index = padded_places(real_places(attention_mask, visual) & ((places <= last) | closing))  # (N, P)
        ids, visual = gather_places(input_ids, index), gather_places(visual, index)
        states = self.get_input_embeddings()(ids)
        features = torch.cat(list(encoded.pooler_output)).to(states.device, states.dtype)
        states = states.masked_scatter(visual[..., None].to(states.device), features)
        position_ids = torch.stack([gather_places(axis, index) for axis in position_ids])
        tensors = self.language_model.encode_prefix(states, index >= 0, position_ids, visual, reuse)
        grids = torch.nn.utils.rnn.pad_sequence(video_grid_thw.split(counts), batch_first=True)
        tensors |= {"input_ids": ids, "real": index >= 0, "position_ids": position_ids.transpose(0, 1), "grids": grids}
        if getattr(encoded, "deepstack_features", None) is not None:
            tensors |= {f"features.{name}": value for name, value in features_of_scans(encoded, visual).items()}
        return ScanPrefix(tensors, scans, model_digest(self), reuse)

    def load_scan(self, file, processor):
        """The `ScanPrefix` that `prefix.save(file, processor)` has written, on the model's device.

        Raises: `ValueError` where it was made with another model or another processor.
        """
        with safe_open(file, "pt", device=str(self.device)) as entry:
            about = json.loads((entry.metadata() or {}).get("prefix", "{}"))
            if about.pop("format", None) != FORMAT:
                raise ValueError("The file is no prefix of this version; expected one of ScanPrefix.save.")
            now = {"model": model_digest(self), "processor": digest_of(processor.image_processor.settings)}
            for name, digest in now.items():
                if about[name] != digest:
                    raise ValueError(
                        f"The prefix was made with another {name}: its weights or settings differ. Call encode_scan "
                        "with this one."
                    )
            tensors = {name: entry.get_tensor(name) for name in entry.keys()}
        return ScanPrefix(tensors, about["scans"], about["model"], about["reuse"])

    def prefix_for(self, input_ids, prefix, pixel_values_videos=None, *places, compare=True):
        """The prefix of a batch's rows; places: `video_grid_thw`, `volume_index`. Raises `ValueError` where it cannot
        serve: in training, without ids, after the weights have changed, or for another scan, if that is passed too."""
        if self.training:
            raise ValueError("scan= carries no gradient; call model.eval(), or pass pixel_values_videos.")
        if input_ids is None:
            raise ValueError("Got inputs_embeds; scan= needs input_ids, to compare the prompt with the prefix.")
        if compare and prefix.model != model_digest(self):
            raise ValueError(
                "The prefix was made with another model, or the weights have changed since. Call encode_scan again."
            )
        prefix = prefix.for_batch(len(input_ids))
        if pixel_values_videos is not None:
            prefix.check_scans(pixel_values_videos, *places)
        return prefix

    def with_prefix(self, input_ids, prefix, inputs):
        """Arguments of `generate` for prompts that begin with a prefix: without their scans, which were compared."""
        rows = self.prefix_for(input_ids, prefix, *map(inputs.get, SCANS), compare=False)  # `forward` compares models
        inputs = {name: value for name, value in inputs.items() if name not in SCANS}
        inputs["mm_token_type_ids"] = (input_ids == self.config.video_token_id).int() * 2
        return inputs | {"scan": prefix, "video_grid_thw": rows.video_grid_thw}

    def answer_behind(
        self, prefix, visual, schedule, input_ids, attention_mask=None, position_ids=None, past_key_values=None,
        use_cache=None, second_per_grid_ts=None, **kwargs,
    ):  # fmt: skip
        """What `forward` gives for prompts that begin with a prefix of as many rows; only their text is computed.
        visual (B, S) bool; schedule: the decoder's arguments for the cut, masks (B, S); empty for no cut."""
        real = real_places(attention_mask, visual)
        index = prefix.places(input_ids, real, visual)  # (B, P + T)
        if position_ids is None:
            position_ids, self.rope_deltas = self.get_rope_index(
                input_ids, visual.int() * 2, None, prefix.video_grid_thw, second_per_grid_ts, attention_mask
            )
        axes = position_ids.expand(3, -1, -1) if position_ids.ndim == 2 else position_ids[-3:]
        positions = torch.stack([gather_places(axis, index) for axis in axes])  # (3, B, P + T)
        known = positions[..., : prefix.length].transpose(0, 1)
        if not torch.equal(known, prefix.position_ids.to(known.device)):
            raise ValueError("The prompts' positions differ from the prefix's. Leave position_ids out.")
        length = input_ids.shape[1]
        new_place = index.new_full((len(index), length + 1), -1)  # the other way round
        order = torch.arange(index.shape[1], device=index.device).expand_as(index)
        new_place = new_place.scatter(1, index.masked_fill(index < 0, length), order)[:, :-1]
        if schedule:
            if (schedule["question_mask"] & (new_place < prefix.length) & real).any():
                raise ValueError("A question stands in front of its scan, which so depends on it. Ask without scan=.")
            schedule = schedule | {n: gather_places(schedule[n], index) for n in ("visual_mask", "question_mask")}
            features = dict(schedule["scheduler_features"])
            if "last_index" in features:
                features["last_index"] = new_place.gather(1, features["last_index"])
            schedule["scheduler_features"] = features
        outputs = self.language_model(
            inputs_embeds=self.get_input_embeddings()(gather_places(input_ids, index[:, prefix.length :])),
            attention_mask=index >= 0, position_ids=positions, past_key_values=past_key_values, use_cache=use_cache,
            prefix=prefix, **schedule, **kwargs,
        )  # fmt: skip
        kept, cache = outputs.keep_index, outputs.past_key_values
        if kept is None:  # nothing was cut: the prompt's own order
            outputs.last_hidden_state = gather_places(outputs.last_hidden_state, new_place)
        else:
            outputs.keep_index = index.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, -1)
        if cache is not None:
            cache.prompt = Layout(index >= 0, length - index.shape[1], 0)
            for layout in () if cache.cut is None else (cache.cut, *cache.cut.later):
                layout.dropped += length - index.shape[1]
        return outputs
