"""`pipeline("volume-question-answering", model=REPO, trust_remote_code=True)(scan, question)`."""

from itertools import groupby

from transformers import Pipeline

from .processing_photon import scan_name

INPUT = {"volume", "question"}
TEXT = {"input_ids", "attention_mask", "mm_token_type_ids"}
SELECTION = ("token_budget", "keep_ratio", "use_scheduler")  # arguments of `generate` that decide what is kept
TOGETHER = 16  # questions on one scan that are answered in one batch


class VolumeQuestionAnsweringPipeline(Pipeline):
    """Answers questions about CT and MR volumes.

    ```python
    pipe("ct.nii.gz", "Is there a lesion in the liver?")                 # one answer
    pipe("ct.nii.gz", ["Is ...?", "How many ...?"])                      # several questions on one scan
    pipe(["a.nii.gz", "b.nii.gz"], "Is ...?")                            # one question on several scans
    pipe([{"volume": "a.nii.gz", "question": "Is ...?"}, ...])           # anything else
    pipe({"volume": ["prior.nii.gz", "now.nii.gz"], "question": "Has ... grown?"})   # several scans in one prompt
    for answer in pipe(load_dataset(..., streaming=True)):               # rows with the columns volume and question
    ```
    A scan is anything that the processor reads: NIfTI, NRRD or MetaImage file, DICOM folder, SimpleITK or nibabel
    image, (array, affine), or a dict {"path": ...} or {"volume": ...} with reading options. Arguments of `generate`
    (`max_new_tokens`, `token_budget`, `keep_ratio`, `use_scheduler`, ...) may follow, by name.

    With `grounding=True` each answer also gets "grounding": how much better it follows from the tokens that were kept
    than from as many others, in nats (see `PhotonForConditionalGeneration.grounding`), at the cost of some forwards.

    Returns: {"answer": text, "tokens_kept": k, "tokens_seen": V, "finish_reason": reason}, k of V visual tokens;
        the reason is "stop", or "length" where `max_new_tokens` cut the answer. For several inputs a list of such
        dicts, in their order; for a `datasets` set an iterator. Questions on one scan that follow one another in a
        list share its reading and its encoding (`PhotonModel.encode_scan`).
    Raises: `ValueError` where scans and questions do not match, `VolumeError` where a scan cannot be read.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    def _sanitize_parameters(self, **kwargs):
        return {}, kwargs, {}

    def __call__(self, volume, question=None, **kwargs):
        if question is not None:
            if isinstance(volume, list) and isinstance(question, list) and len(volume) != len(question):
                raise ValueError(
                    f"Got {len(volume)} scans and {len(question)} questions. Pass equal numbers, one of either, or "
                    'dicts {"volume": ..., "question": ...}.'
                )
            if isinstance(volume, list) or isinstance(question, list):
                count = len(volume) if isinstance(volume, list) else len(question)
                volumes = volume if isinstance(volume, list) else [volume] * count
                questions = question if isinstance(question, list) else [question] * count
                volume = [{"volume": v, "question": q} for v, q in zip(volumes, questions, strict=True)]
            else:
                volume = {"volume": volume, "question": question}
        elif hasattr(volume, "features"):  # a set of `datasets`
            volume = (input_of(row) for row in volume)
        if isinstance(volume, list) and all(isinstance(row, dict) and set(row) == INPUT for row in volume):
            groups = [list(rows) for _, rows in groupby(volume, key=lambda row: scan_name(row["volume"]))]
            together = [{"volume": r[0]["volume"], "question": [row["question"] for row in r]} for r in groups]
            return [answer for answers in super().__call__(together, **kwargs) for answer in answers]
        return super().__call__(volume, **kwargs)

    def preprocess(self, inputs):
        if not isinstance(inputs, dict) or set(inputs) != INPUT:
            seen = f"a dict of {', '.join(inputs) or 'nothing'}" if isinstance(inputs, dict) else type(inputs).__name__
            raise ValueError(f'Got {seen}; expected a scan and a question, or {{"volume": ..., "question": ...}}.')
        volumes = inputs["volume"] if isinstance(inputs["volume"], list) else [inputs["volume"]]
        parts = [
            {"type": "volume", **(volume if isinstance(volume, dict) else {"volume": volume})} for volume in volumes
        ]
        questions = inputs["question"] if isinstance(inputs["question"], list) else [inputs["question"]]
        of_scan = self._prompts(parts, questions[:1])
        grids = {"video_grid_thw": of_scan["video_grid_thw"].repeat(len(questions), 1)} if parts else {}
        prompts = self._prompts([{"type": "volume"}] * len(parts), questions, **grids)
        return {"scan": of_scan, "prompts": prompts, "several": isinstance(inputs["question"], list)}

    def _prompts(self, parts, questions, **options):
        chats = [[{"role": "user", "content": [*parts, {"type": "text", "text": text}]}] for text in questions]
        return self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, **options},
        )  # fmt: skip

    def _forward(self, model_inputs, grounding=False, **generate_kwargs):
        scan, prompts, several = (model_inputs[name] for name in ("scan", "prompts", "several"))
        count = len(prompts["input_ids"])
        given = {name: value for name, value in scan.items() if name in ("pixel_values_videos", "video_grid_thw")}
        if given and count > 1:
            given = {"scan": self.model.encode_scan(**scan)}
        parts = []
        for begin in range(0, count, TOGETHER):
            part = {name: value[begin : begin + TOGETHER] for name, value in prompts.items() if name in TEXT}
            output = self.model.generate(**part, **given, **generate_kwargs, return_dict_in_generate=True)
            how = selection_of(generate_kwargs)
            found = self.model.grounding(output.sequences, **part, **given, **how) if grounding else None
            parts.append((output.sequences[:, part["input_ids"].shape[1] :], output.past_key_values.cut, found))
        return {
            "parts": parts,
            "several": several,
            "stop_tokens": generate_kwargs.get("eos_token_id", self.model.generation_config.eos_token_id),
            "visual_count": int((prompts["input_ids"][0] == self.model.config.video_token_id).sum()),
        }

    def postprocess(self, outputs):
        answers, total, stops = [], outputs["visual_count"], outputs["stop_tokens"]
        for sequences, cut, grounding in outputs["parts"]:
            first = len(answers)
            kept = [total] * len(sequences) if cut is None else cut.keep_mask.sum(-1).tolist()
            answers += [
                {
                    "answer": self.processor.decode(tokens, skip_special_tokens=True).strip(),
                    "tokens_kept": count,
                    "tokens_seen": total,
                    "finish_reason": finish_reason(without_padding(tokens, stops), stops),
                }
                for tokens, count in zip(sequences.tolist(), kept, strict=True)
            ]
            for answer, value in zip(answers[first:], [] if grounding is None else grounding.tolist(), strict=False):
                answer["grounding"] = value
        return answers if outputs["several"] else answers[0]


def input_of(row):
    """The columns of a set's row that the pipeline reads. Raises `ValueError` where they have other names."""
    if not INPUT <= set(row):
        raise ValueError(
            f"A row of the set has the columns {', '.join(row)}; expected volume and question. "
            'Rename them: set.rename_columns({"image": "volume"}).'
        )
    return {name: row[name] for name in sorted(INPUT)}


def selection_of(options):
    """Those of `generate`'s arguments that decide what is kept: `grounding` wants them too."""
    return {name: value for name, value in options.items() if name in SELECTION}


def without_padding(tokens, stop_tokens):
    """A row of a batch of answers, up to its first stop token."""
    stop_tokens = stop_tokens if isinstance(stop_tokens, list | tuple) else [stop_tokens]
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))]


def finish_reason(tokens, stop_tokens):
    """Why an answer ends: "stop" after one of the model's stop tokens (one id or several), "length" otherwise."""
    stop_tokens = stop_tokens if isinstance(stop_tokens, list | tuple) else [stop_tokens]
    return "stop" if len(tokens) and int(tokens[-1]) in stop_tokens else "length"


__all__ = ["VolumeQuestionAnsweringPipeline"]
