"""Models that answer a batch of questions on the same scans: Photon, or a 2D model that gets axial slices."""

import json
import math
from dataclasses import dataclass

import torch
from transformers import AutoProcessor, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from photon.configuration_photon import PhotonConfig
from photon.evaluation.slices import axial_slices
from photon.loading import adapter_base, load_config, load_processor
from photon.loading import load_model as load_weights
from photon.precision import choose_dtype
from photon.prompt_photon import join_outputs, question_mask
from photon.run_folder import RunError
from photon.scan_faults_photon import VolumeError
from photon.schedulers import load_method, use_scheduler


@dataclass
class Refused:
    """A scan that cannot be read."""

    fault: str


class Answerer:
    """A model and its processor. `read` may run in threads; `encode` and `answer` run in turn on the device.

    Args: processor; model; max_new_tokens: longest answer; options: further arguments of `generate`; grounding: tell
        of each written answer how much better it follows from the kept tokens than from as many others.
    """

    def __init__(self, processor, model, max_new_tokens=64, options=None, grounding=False):
        self.processor, self.model, self.grounding = processor, model, grounding
        self.max_new_tokens, self.options = max_new_tokens, options or {}
        self.processor.tokenizer.padding_side = "left"
        self.letter_ids = {}

    def read_or_refuse(self, key):
        """What `encode` takes, or `Refused`."""
        try:
            return self.read(json.loads(key))
        except VolumeError as error:
            return Refused(error.fault.value)

    def encode(self, scan):
        return scan

    @torch.inference_mode()
    def answer(self, rows, scans, by_letter=False):
        """Answers to questions on the same scans, in one batch.

        Args: rows: of one kind if `by_letter`; scans: what `encode` returned for each scan of the prompt; by_letter:
            take the likeliest of a row's `choices` as the next token after the prompt, in one forward.
        Returns: for each row a dict of `prediction`, `kept` (share of the visual tokens; `None` where nothing is cut),
            with `grounding` a number of that name, and with `by_letter` `choice_logprobs`.
        """
        chats = [prompt(row, scans, self.part) for row in rows]
        inputs = self.inputs(chats, scans)
        output = self.model.generate(
            **inputs,
            max_new_tokens=1 if by_letter else self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=by_letter,
            **self.options,
        )
        cut = getattr(output.past_key_values, "cut", None)
        kept = [None] * len(rows)
        if cut is not None:
            kept = (cut.keep_mask.sum(-1) / cut.visual_count.clamp(min=1)).tolist()
            kept = [round(ratio, 6) if count else None for ratio, count in zip(kept, cut.visual_count, strict=True)]
        if not by_letter:
            new = output.sequences[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.batch_decode(new, skip_special_tokens=True)
            answers = [{"prediction": t.strip(), "kept": k} for t, k in zip(texts, kept, strict=True)]
            if self.grounding:
                values = self.model.grounding(output.sequences, **inputs, **self.options).tolist()
                answers = [
                    answer | {"grounding": None if math.isnan(value) else round(value, 4)}
                    for answer, value in zip(answers, values, strict=True)
                ]
            return answers
        logprobs = output.logits[0].float().log_softmax(-1)  # (B, vocabulary)
        answers = []
        for row, chat, line, ratio in zip(rows, chats, logprobs, kept, strict=True):
            ids = self.tokens_of(tuple(row["choices"]), chat)
            by_choice = dict(zip(row["choices"], line[ids].tolist(), strict=True))
            best = max(by_choice, key=by_choice.get)
            rounded = {choice: round(value, 4) for choice, value in by_choice.items()}
            answers.append({"prediction": best, "kept": ratio, "choice_logprobs": rounded})
        return answers

    def tokens_of(self, choices, chat):
        """The token that each choice is when it follows a prompt. Raises `RunError` where it is several tokens."""
        if choices not in self.letter_ids:
            text, ids = self.text(chat), []
            encode = self.processor.tokenizer
            before = encode(text, add_special_tokens=False)["input_ids"]
            for choice in choices:
                after = encode(text + choice, add_special_tokens=False)["input_ids"]
                if after[:-1] != before:
                    raise RunError(
                        f"--choices logprob compares single tokens, but {choice!r} after this model's prompt is not "
                        "one; use --choices generate."
                    )
                ids.append(after[-1])
            self.letter_ids[choices] = ids
        return self.letter_ids[choices]

    def text(self, chat):
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


class VolumeModel(Answerer):
    """Photon: a scan is encoded once, and so is what its questions share of the decoder (`encode_scan`).

    Args: as `Answerer`; cache_dir: folder of preprocessed scans; reuse: as `encode_scan` takes it.
    """

    def __init__(self, *args, cache_dir=None, reuse="exact"):
        super().__init__(*args)
        self.cache_dir, self.reuse = cache_dir, reuse
        self.prefix, self.prefix_of = None, None  # the last one, and of which scans and text

    def read(self, scan):
        return self.processor.image_processor([scan], return_tensors="pt", cache_dir=self.cache_dir)

    @torch.inference_mode()
    def encode(self, scan):
        """The vision tower's output and the grid (1, 3)."""
        patches, grid = (scan[name].to(self.model.device) for name in ("pixel_values_videos", "video_grid_thw"))
        return self.model.model.get_video_features(patches, grid, return_dict=True), grid

    def part(self, scan, number, total):
        return [{"type": "volume"}]

    def inputs(self, chats, scans):
        """As the processor makes them of the same chats, but with a prefix of encoded scans in place of patches."""
        texts, grids = [self.text(chat) for chat in chats], {}
        if scans:
            grids = {"video_grid_thw": torch.cat([grid for _, grid in scans] * len(chats)).cpu()}
        inputs = self.processor(text=texts, padding=True, return_tensors="pt", **grids).to(self.model.device)
        return {**inputs, **self.encoded(texts, inputs, scans)} if scans else inputs

    def encoded(self, texts, inputs, scans):
        """The scans of prompts, as `generate` takes them: {"scan": prefix}."""
        visual = inputs["input_ids"] == self.model.config.video_token_id
        last = visual.cumsum(-1) == visual.sum(-1, keepdim=True)
        if (question_mask(inputs["input_ids"], visual, self.model.config) & ~last).any():
            # a question in front of its scan: nothing in the decoder can be shared
            return {"mm_encoder_outputs": {"video": join_outputs([output for output, _ in scans] * len(texts))}}
        fronts = [text[: text.rindex(self.processor.video_token)] for text in texts]
        unlike = list(dict.fromkeys(fronts))
        if self.prefix_of is None or self.prefix_of[1] != unlike or not _same(self.prefix_of[0], scans):
            rows = [fronts.index(front) for front in unlike]
            prompts = {name: inputs[name][rows] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
            grids = torch.cat([grid for _, grid in scans] * len(rows))
            features = {"video": join_outputs([output for output, _ in scans] * len(rows))}
            prompts |= {"video_grid_thw": grids, "mm_encoder_outputs": features}
            self.prefix = self.model.encode_scan(**prompts, reuse=self.reuse)
            self.prefix_of = scans, unlike
        return {"scan": self.prefix.rows([unlike.index(front) for front in fronts]) if unlike[1:] else self.prefix}


def _same(some, others):
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


class SliceModel(Answerer):
    """Any other model of images and text: it gets a scan as axial slices, through its own processor.

    Args: as `Answerer`; slices, window, modality: as `axial_slices` takes them.
    """

    def __init__(self, *args, slices=16, window=(-160.0, 240.0), modality="auto"):
        super().__init__(*args)
        self.slices, self.window, self.modality = slices, window, modality

    def read(self, scan):
        options = {"modality": self.modality} | {name: value for name, value in scan.items() if name != "path"}
        return axial_slices(scan["path"], self.slices, self.window, **options)

    def part(self, scan, number, total):
        label = [{"type": "text", "text": f"Scan {number}: "}] if total > 1 else []
        return label + [{"type": "image", "image": image} for image in scan]

    def inputs(self, chats, scans):
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        return inputs.to(self.model.device, self.model.dtype)


def prompt(row, scans, part):
    """A row's chat without its answer, each place of a scan filled by `part(scan, number, total)`."""
    numbered = iter(enumerate(scans, start=1))
    messages = []
    for message in row["messages"][:-1]:
        content, pieces = [], message["content"]
        for piece in [{"type": "text", "text": pieces}] if isinstance(pieces, str) else pieces:
            if piece["type"] == "volume":
                number, scan = next(numbered)
                content += part(scan, number, len(scans))
            else:
                content.append({"type": "text", "text": piece["text"]})
        messages.append({"role": message["role"], "content": content})
    return messages


def type_of_weights(source, device, revision=None):
    """The name of the type to load a model in: that of the checkpoint ("auto") on a GPU; on a CPU what `choose_dtype`
    says of Photon, and float32 for other models."""
    if device.type != "cpu":
        return "auto"
    base = adapter_base(source, revision)
    config, _ = PreTrainedConfig.get_config_dict(base or source, revision=None if base else revision)
    if config.get("model_type") != PhotonConfig.model_type:
        return "float32"
    return choose_dtype(load_config(source, revision), device)[0]


def load_model(source, device, *, revision=None, trust_remote_code=False, dtype="auto", modality="auto",
               scheduling=None, scheduler="on", scheduler_layer=None, seed=0, max_new_tokens=64, cache_dir=None,
               slices=16, window=(-160.0, 240.0), grounding=False, reuse="exact"):  # fmt: skip
    """A `VolumeModel` of a Photon checkpoint, a `SliceModel` of any other.

    Args:
        source: folder or Hub id. device: a `torch.device`. dtype: "auto" as `type_of_weights` says.
        scheduling: arguments of Photon's `generate`.
        scheduler: "on", "off" or a name of `photon.schedulers.SCHEDULERS`; seed: of what is drawn at random;
            scheduler_layer: cut after this layer and not after the one that the model was trained with.
        cache_dir: folder of preprocessed scans for Photon.
        slices, window: how other models get a scan.
        grounding: as `Answerer` takes it; of Photon alone.
        reuse: what Photon's questions on one scan share, as `encode_scan` takes it.
    Raises: `RunError` where the checkpoint is no model or lacks weights, or another model is given a scheduler.
    """
    base = adapter_base(source, revision)
    config, _ = PreTrainedConfig.get_config_dict(base or source, revision=None if base else revision)
    kind = config.get("model_type")
    if kind is None:
        raise RunError("--model has no config.json with a model_type; give a folder or Hub id of a model.")
    photon = kind == PhotonConfig.model_type
    if not photon and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and "auto_map" not in config:
        raise RunError(f"--model is a {kind}, which reads no pictures; give Photon or an image-text-to-text model.")
    given = [*(scheduling or ()), *(() if scheduler_layer is None else ("scheduler_layer",))]
    if given and not photon:
        raise RunError(f"{', '.join(given)}: only Photon has a scheduler, and --model is a {kind}; leave it out.")
    if grounding and not photon:
        raise RunError(f"--grounding compares sets of tokens, which a {kind} does not choose; leave it out.")
    if reuse != "exact" and not photon:
        raise RunError(f"--reuse {reuse}: only Photon shares work on a scan, and --model is a {kind}; leave it out.")
    options = {"revision": revision, "trust_remote_code": photon or trust_remote_code}
    if photon:
        fields = {"modality": modality} if modality != "auto" else {}
        processor = load_processor(source, revision=revision, **fields)
    else:
        processor = AutoProcessor.from_pretrained(base or source, **options | {"revision": None if base else revision})
    if scheduler_layer is not None:
        settings = load_config(source, revision).to_dict() | {"scheduler_layer": scheduler_layer}
        options["config"] = PhotonConfig.from_dict(settings)
    dtype = type_of_weights(source, device, revision) if dtype == "auto" else dtype
    model, loaded = load_weights(source, dtype=dtype, output_loading_info=True, **options)
    absent = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
    if absent:  # left at random, and its answers would be scored as if they were the model's
        raise RunError(f"--model lacks {len(absent)} of its weights, or has them in another shape, {absent[0]} first.")
    model = model.to(device).eval()
    if photon:
        if scheduler not in ("on", "off"):  # "on" is the model's own, "off" an argument of `generate`
            use_scheduler(model, scheduler, seed=seed)
            load_method(model, source, revision)
        options = {"cache_dir": cache_dir, "reuse": reuse}
        return VolumeModel(processor, model, max_new_tokens, scheduling, grounding, **options)
    return SliceModel(processor, model, max_new_tokens, slices=slices, window=window, modality=modality)
