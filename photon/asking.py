"""Questions about one or more scans: the answers with counts and seconds, and pictures of what was kept.

processor, model = load(folder)
answer = result, inputs, keep_mask = ask(processor, model, ["ct.nii.gz"], "Is there a lesion in the liver?")
for shown in shown_scans(processor, ["ct.nii.gz"], [answer]):
    overlay.draw_rows(picture_rows(shown, [question], [result]), "kept.png", shown.window)
"""

import time
import warnings
from dataclasses import dataclass

import torch
from transformers import StoppingCriteria

from photon import overlay
from photon.pipeline_photon import finish_reason, selection_of
from photon.planes import choose_planes, question_window
from photon.read_options import reading_fields
from photon.scan_intensity_photon import find_modality, intensity_window
from photon.scan_reader_photon import read_volume
from photon.viewer.export import html_page
from photon.viewer.packing import PackedScan


def ask(processor, model, scans, question, **generate_options):
    """The answer to one question about one or more scans, with counts and times.

    Args:
        processor, model: as `photon.loading.load` returns them.
        scans: list of paths, of objects in memory, or of dicts {"volume": scan} with reading options beside it.
        question: text.
        generate_options: arguments of `generate` (`token_budget`, `use_scheduler`, `max_new_tokens`, ...);
            `grounding=True` also tells how much better the answer follows from the kept tokens than from others.
    Returns:
        a dict: `answer`; `tokens_kept` of `tokens_seen` visual tokens; `threshold` of the saliency, `None` where the
        number of tokens was given; `answer_tokens`; `finish_reason`, "length" where a limit cut the answer; `dtype` of
        the weights; `seconds` of reading, vision, prefill and decode;
        the processor's inputs; the keep mask (1, V), bool.
    Raises: `VolumeError` where a scan cannot be read; `ValueError` where the options exclude each other.
    """
    return ask_all(processor, model, scans, [question], **generate_options)[0]


@torch.inference_mode()
def ask_all(processor, model, scans, questions, grounding=False, **generate_options):
    """What `ask` returns for each of several questions about the same scans, which are read and encoded once."""
    device, parts = model.device, [*map(_volume_part, scans)]
    start = time.perf_counter()
    first = _prompt(processor, parts, questions[0])
    end_of_reading = time.perf_counter()
    geometry, first = first.scans, first.to(device)
    patches, start_of_vision = first.pop("pixel_values_videos"), _now(device)
    features = model.model.get_video_features(patches, first["video_grid_thw"], return_dict=True)
    end_of_vision = _now(device)
    encoded = {"mm_encoder_outputs": {"video": features}}
    seconds = {"reading": end_of_reading - start, "vision": end_of_vision - start_of_vision}
    if len(questions) > 1:  # the first pays for what they share
        encoded = {"scan": model.encode_scan(**first, **encoded)}
    answers, begin = [], end_of_vision
    for question in questions:
        grids = {"video_grid_thw": first["video_grid_thw"].cpu()}
        inputs = _prompt(processor, [{"type": "volume"}] * len(parts), question, processor_kwargs=grids).to(device)
        clock = _FirstTokenClock(device)
        output = model.generate(
            **inputs, **encoded, stopping_criteria=[clock], return_dict_in_generate=True, **generate_options
        )
        end = _now(device)
        times = seconds | {"prefill": clock.first_token - begin, "decode": end - clock.first_token}
        found = {}
        if grounding:
            how = selection_of(generate_options)
            found["grounding"] = float(model.grounding(output.sequences, **inputs, **encoded, **how))
        inputs["pixel_values_videos"], inputs.scans = patches, geometry
        result, *rest = _answer(processor, model, inputs, output, times, generate_options)
        answers.append((result | found, *rest))
        seconds, begin = {"reading": 0.0, "vision": 0.0}, _now(device)
    return answers


def _prompt(processor, parts, question, **options):
    conversation = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def _answer(processor, model, inputs, output, seconds, generate_options):
    """What `ask` returns, of one output of `generate`."""
    total = int((inputs["input_ids"] == model.config.video_token_id).sum())
    cut = output.past_key_values.cut
    keep_mask = torch.ones(1, total, dtype=torch.bool) if cut is None else cut.keep_mask
    answer = output.sequences[0, inputs["input_ids"].shape[1] :]
    stop_tokens = generate_options.get("eos_token_id", model.generation_config.eos_token_id)
    by_threshold = cut is not None and not {"token_budget", "keep_ratio"} & set(generate_options)
    result = {
        "answer": processor.decode(answer, skip_special_tokens=True).strip(),
        "tokens_kept": int(keep_mask.sum()),
        "tokens_seen": total,
        "threshold": float(cut.threshold[0]) if by_threshold else None,
        "answer_tokens": len(answer),
        "finish_reason": finish_reason(answer, stop_tokens),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": seconds,
    }
    return result, inputs, keep_mask


class _FirstTokenClock(StoppingCriteria):
    """Never stops generation; notes the time of the first token, where prefill ends and decoding begins."""

    def __init__(self, device):
        self.device, self.first_token = device, None

    def __call__(self, input_ids, scores, **kwargs):
        if self.first_token is None:
            self.first_token = _now(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _now(device):
    if device.type == "cuda":  # kernels run behind Python; wait, or the time belongs to another part
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _volume_part(scan):
    return {"type": "volume", **(scan if isinstance(scan, dict) else {"volume": scan})}


def describe(result):
    """Two lines for a person: the answer, then what was kept, the seconds and the type of the weights. A third one
    where a limit cut the answer."""
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in result["seconds"].items())
    threshold = "" if result["threshold"] is None else f" (threshold {result['threshold']:.3f})"
    cut = f"\nCut at {result['answer_tokens']} tokens; --max-new-tokens gives more."
    cut = cut if result["finish_reason"] == "length" else ""
    kept = f"{result['tokens_kept']} of {result['tokens_seen']} visual tokens kept"
    grounding = f", grounding {result['grounding']:+.2f}" if "grounding" in result else ""
    return f"{result['answer'] or '(empty answer)'}\n{kept}{threshold}{grounding}; {seconds}; {result['dtype']}{cut}"


def caption(question, result):
    """One line under a picture."""
    answer = result["answer"] or "(empty answer)"
    return f"{question}  {answer}  ({result['tokens_kept']} of {result['tokens_seen']} tokens kept)"


@dataclass
class ShownScan:
    """A scan with what was kept of it for each question, as pictures need it.

    Args: image: SimpleITK image; kept: an image a question on the same voxels, nonzero where kept; window: (low, high)
        in the scan's units, soft tissue in CT and the model's range in MR; ct: whether values are HU.
    """

    image: object
    kept: list
    window: tuple[float, float]
    ct: bool


def shown_scans(processor, scans, answers):
    """Yields a `ShownScan` for each scan. scans: as `ask` takes them; answers: what `ask` returned, one a question."""
    for number, scan in enumerate(scans):
        options = reading_fields(processor.image_processor)
        options |= {key: value for key, value in _volume_part(scan).items() if key != "type"}
        shown = {name: options.pop(name) for name in ("modality", "assume_hu") if name in options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given when the scan was read for the model
            image = read_volume(options.pop("volume"), **options)
        kept = [processor.keep_map(keep_mask, inputs, 0, number) for _, inputs, keep_mask in answers]
        yield ShownScan(image, kept, *display_window(processor, image, **shown))


def display_window(processor, image, modality="auto", assume_hu=None):
    """(low, high) in the scan's units for a person, and whether the scan is a CT. modality, assume_hu: as for the
    processor, whose fields are the default."""
    settings = processor.image_processor
    modality = settings.modality if modality == "auto" else modality
    assume_hu = settings.assume_hu if assume_hu is None else assume_hu
    modality = find_modality(image, modality, assume_hu=assume_hu)
    if modality == "ct":
        return overlay.SOFT_TISSUE, True
    return intensity_window(image, modality=modality, percentiles=settings.percentiles), False


def picture_rows(shown, questions, results, window=None):
    """A row of planes for each question on a `ShownScan`, as `overlay.draw_rows` takes them.

    Args: questions: texts; results: the first of what `ask` returned for each; window: (low, high) in the scan's
        units; by default what suits the question, else the scan.
    """
    rows = []
    for number, (question, result, kept) in enumerate(zip(questions, results, shown.kept, strict=True)):
        at, reason = choose_planes(shown.image, kept, question, shown.ct)
        others = [image for other, image in enumerate(shown.kept) if other != number]
        planes = overlay.views(shown.image, kept, at, others)
        grey = window or question_window(question, shown.ct)
        rows.append(overlay.Row(planes, f"{caption(question, result)}\n{reason}", number, grey))
    return rows


def html_of(shown, questions, results, window=None):
    """A `ShownScan` and its questions as one HTML page (text) that needs no network; arguments as above."""
    packed = PackedScan(shown.image, window or shown.window, shown.ct)
    items = []
    for question, result, kept in zip(questions, results, shown.kept, strict=True):
        more = {name: result[name] for name in ("tokens_kept", "tokens_seen")} | ({"window": window} if window else {})
        items.append(packed.question(kept, question, result["answer"], **more))
    return html_page(packed.scan, items)


def overlap(first, second):
    """Share of the tokens kept for either of two questions that were kept for both: 0 to 1."""
    either = int((first | second).sum())
    return int((first & second).sum()) / either if either else 1.0
