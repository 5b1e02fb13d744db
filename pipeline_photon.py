"""`pipeline("volume-question-answering", model=REPO, trust_remote_code=True)(scan, question)`."""

from transformers import Pipeline


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

    Returns: {"answer": text, "tokens_kept": k, "tokens_seen": V, "finish_reason": reason}, k of V visual tokens;
        the reason is "stop", or "length" where `max_new_tokens` cut the answer. For several inputs a list of such
        dicts, in their order; for a `datasets` set an iterator.
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
            volume = ({name: row[name] for name in ("volume", "question")} for row in volume)
        return super().__call__(volume, **kwargs)

    def preprocess(self, inputs):
        if not isinstance(inputs, dict) or set(inputs) != {"volume", "question"}:
            raise ValueError('Expected a scan and a question, or a dict {"volume": ..., "question": ...}.')
        volumes = inputs["volume"] if isinstance(inputs["volume"], list) else [inputs["volume"]]
        parts = [
            {"type": "volume", **(volume if isinstance(volume, dict) else {"volume": volume})} for volume in volumes
        ]
        conversation = [{"role": "user", "content": [*parts, {"type": "text", "text": inputs["question"]}]}]
        return self.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def _forward(self, model_inputs, **generate_kwargs):
        output = self.model.generate(**model_inputs, **generate_kwargs, return_dict_in_generate=True)
        return {
            "sequences": output.sequences[:, model_inputs["input_ids"].shape[1] :],
            "cut": output.past_key_values.cut,
            "stop_tokens": generate_kwargs.get("eos_token_id", self.model.generation_config.eos_token_id),
            "visual_count": int((model_inputs["input_ids"] == self.model.config.video_token_id).sum()),
        }

    def postprocess(self, outputs):
        cut = outputs["cut"]
        return {
            "answer": self.processor.decode(outputs["sequences"][0], skip_special_tokens=True).strip(),
            "tokens_kept": outputs["visual_count"] if cut is None else int(cut.keep_mask.sum()),
            "tokens_seen": outputs["visual_count"],
            "finish_reason": finish_reason(outputs["sequences"][0], outputs["stop_tokens"]),
        }


def finish_reason(tokens, stop_tokens):
    """Why an answer ends: "stop" after one of the model's stop tokens (one id or several), "length" otherwise."""
    stop_tokens = stop_tokens if isinstance(stop_tokens, list | tuple) else [stop_tokens]
    return "stop" if len(tokens) and int(tokens[-1]) in stop_tokens else "length"


__all__ = ["VolumeQuestionAnsweringPipeline"]
