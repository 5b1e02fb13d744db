"""Ask a question about a scan.

    python ask.py SCAN "question" [--model DIR] [--overlay out.png] [--keep-map out.nii.gz] [--dense] [--json]
    python ask.py PRIOR NOW "Has the lesion grown?"
    python ask.py --inspect SCAN [--overlay out.png]

SCAN is a NIfTI, NRRD or MetaImage file, or a DICOM folder. Prints the answer, how many visual tokens were kept of how
many seen, and the seconds for reading, vision, prefill and decoding. `--overlay` draws three planes with the kept
tokens outlined; `--keep-map` writes them as an image on the scan's own voxels, for a viewer to lay over it.
Not a medical device.
"""

import argparse
import json
import os
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import StoppingCriteria

from photon import overlay
from photon.console import one_line_faults
from photon.loading import ROOT, load, load_processor
from photon.scan_intensity_photon import find_modality, intensity_window
from photon.scan_reader_photon import read_volume
from photon.scan_report_photon import inspect_volume

PICTURES = {".png", ".jpg", ".jpeg", ".pdf", ".svg"}
IMAGES = (".nii", ".nii.gz", ".nrrd", ".mha")


class Clock(StoppingCriteria):
    """Never stops; notes when the first token was there."""

    def __init__(self, device):
        self.device, self.first = device, None

    def __call__(self, input_ids, scores, **kwargs):
        if self.first is None:
            self.first = now(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def ask(processor, model, scans, question, **generate_options):
    """Answer one question about one or more scans.

    Args: scans: paths, objects in memory, or dicts with reading options; generate_options: `token_budget`,
        `use_scheduler`, `max_new_tokens`, ...
    Returns: a dict of the answer, counts, the threshold of saliency (`None` where the count was given) and seconds;
        the processor's inputs; the keep mask (1, V).
    """
    device = model.device
    start = time.perf_counter()
    parts = [{"type": "volume", **(scan if isinstance(scan, dict) else {"volume": scan})} for scan in scans]
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    read = time.perf_counter()
    inputs = inputs.to(device)
    rest = {key: value for key, value in inputs.items() if key != "pixel_values_videos"}
    begin = now(device)
    features = model.model.get_video_features(
        inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
    )
    seen = now(device)
    clock = Clock(device)
    output = model.generate(
        **rest,
        mm_encoder_outputs={"video": features},
        stopping_criteria=[clock],
        return_dict_in_generate=True,
        **generate_options,
    )
    end = now(device)
    total = int((inputs["input_ids"] == model.config.video_token_id).sum())
    cut = output.past_key_values.cut
    keep = torch.ones(1, total, dtype=torch.bool) if cut is None else cut.keep_mask
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    by_threshold = cut is not None and not {"token_budget", "keep_ratio"} & set(generate_options)
    result = {
        "answer": processor.decode(tokens, skip_special_tokens=True).strip(),
        "tokens_kept": int(keep.sum()),
        "tokens_seen": total,
        "threshold": float(cut.threshold[0]) if by_threshold else None,
        "answer_tokens": len(tokens),
        "seconds": {
            "reading": read - start,
            "vision": seen - begin,
            "prefill": clock.first - seen,
            "decode": end - clock.first,
        },
    }
    return result, inputs, keep


def outlined(processor, inputs, keep, scans, file, caption, window=None):
    """Write the overlay of each scan, a dict with "volume"; later ones get _2, _3 in their name."""
    for number, scan in enumerate(scans):
        source, options = (scan["volume"], {k: v for k, v in scan.items() if k != "volume"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given when the scan was read for the model
            image = read_volume(source, **options)
        planes = overlay.views(image, processor.keep_map(keep, inputs, 0, number))
        with writing("--overlay"):
            overlay.draw(planes, numbered(file, number), caption, window or display_window(processor, image))


def display_window(processor, image):
    """Soft tissue in CT, what the model sees in MR."""
    settings = processor.image_processor
    modality = find_modality(image, settings.modality, assume_hu=settings.assume_hu)
    if modality == "ct":
        return overlay.SOFT_TISSUE
    return intensity_window(image, modality=modality, percentiles=settings.percentiles)


def numbered(file, number):
    """out.nii.gz -> out_2.nii.gz for the second scan."""
    suffix = ".nii.gz" if file.name.lower().endswith(".nii.gz") else file.suffix
    return (
        file if number == 0 else file.with_name(f"{file.name[: -len(suffix)]}_{number + 1}{file.name[-len(suffix) :]}")
    )


@contextmanager
def writing(option):
    """What writers raise, as one error that names the option: SimpleITK's has several lines and another type."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "is the folder writable, and the disk not full?"
        raise OSError(f"Could not write the file of {option}: {reason}") from None


def inspect(args):
    """Report on a scan as the processor of --model would read it; the weights are not loaded."""
    options = {} if args.modality is None else {"modality": args.modality}
    settings = load_processor(args.model, **options).image_processor
    names = "modality window percentiles scaling assume_hu spacing orientation max_voxels tilt gaps monochrome1"
    fields = {name: getattr(settings, name) for name in [*names.split(), "fill_nonfinite"]}
    read = {"series": args.series, "frame": args.frame, "size": settings.grid}
    report = inspect_volume(args.scans[0], **fields, **read)
    print(json.dumps(report.as_dict()) if args.json else report)
    if args.overlay and report.planes:
        views = [overlay.seen(name, *plane) for name, plane in report.planes.items()]
        with writing("--overlay"):
            overlay.draw(views, args.overlay, "What the model sees of the scan", (0, 255))
    if not report.readable:
        raise ValueError("The scan was refused, so there is nothing to draw; the report says why.")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", metavar="SCAN ... QUESTION", help="one or more scans, then the question")
    parser.add_argument("--inspect", action="store_true", help="report how one scan is read; no question, no model")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository's tiny model)")
    parser.add_argument("--overlay", type=Path, metavar="PNG", help="draw three planes with the kept tokens outlined")
    parser.add_argument("--keep-map", type=Path, metavar="NII", help="write the kept tokens on the scan's voxels")
    parser.add_argument("--dense", action="store_true", help="keep all tokens")
    parser.add_argument("--token-budget", type=int, metavar="K", help="keep exactly the K most salient tokens")
    parser.add_argument("--keep-ratio", type=float, metavar="R", help="keep this share of the tokens")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="length limit of the answer")
    parser.add_argument("--series", type=int, help="which DICOM series of a folder")
    parser.add_argument("--frame", type=int, help="which frame of a 4D scan")
    parser.add_argument("--modality", choices=["auto", "ct", "mr"], help="what the scan is (default: the model's)")
    parser.add_argument("--window", type=float, nargs=2, metavar=("LO", "HI"), help="grey levels of the overlay")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    scans = args.scans if args.inspect else args.scans[:-1]
    wrong = wrong_question(args) or wrong_reading(args, scans) or wrong_output(args, scans)
    if wrong:
        parser.error(wrong)
    return args


def wrong_question(args):
    """What is wrong with what is asked and how, or `None`."""
    if args.inspect:
        if len(args.scans) != 1:
            return "--inspect takes one scan and no question."
        asked = ("dense", "token_budget", "keep_ratio", "max_new_tokens", "keep_map", "window")
        given = ["--" + name.replace("_", "-") for name in asked if getattr(args, name) not in (None, False)]
        return f"--inspect asks nothing; leave out {', '.join(given)}." if given else None
    if len(args.scans) < 2 or os.path.exists(args.scans[-1]):  # a path is no question, and would be drawn
        return "Give one or more scans, then the question in quotes."
    if not args.scans[-1].strip():
        return "The question is empty."
    if sum((args.dense, args.token_budget is not None, args.keep_ratio is not None)) > 1:
        return "--dense, --token-budget and --keep-ratio exclude each other."
    return None


def wrong_reading(args, scans):
    if args.series is not None and any(os.path.isfile(scan) for scan in scans):
        return "--series chooses in a DICOM folder, but a scan is a file."
    if args.window and not args.window[0] < args.window[1]:
        return "--window takes two numbers, the lower one first."
    return None


def wrong_output(args, scans):
    """Found before the model runs: minutes of work must not end at a mistyped name, nor a scan be overwritten."""
    if args.overlay and args.overlay.suffix.lower() not in PICTURES:
        return f"--overlay needs one of the suffixes {', '.join(sorted(PICTURES))}."
    if args.keep_map and not args.keep_map.name.lower().endswith(IMAGES):
        return f"--keep-map needs one of the suffixes {', '.join(IMAGES)}."
    for option, file in (("--overlay", args.overlay), ("--keep-map", args.keep_map)):
        for target in [numbered(file, number) for number in range(len(scans))] if file else ():
            if not target.resolve().parent.is_dir():
                return f"The folder of {option} does not exist."
            if target.is_dir():
                return f"{option} names a folder; a file was expected."
            if any(os.path.exists(scan) and target.exists() and target.samefile(scan) for scan in scans):
                return f"{option} would overwrite a scan; choose another name."
            if any(os.path.isdir(scan) and target.resolve().is_relative_to(Path(scan).resolve()) for scan in scans):
                return f"{option} lies in a scan's folder, where it would be read as part of it; choose another one."
    return None


def run(args):
    if args.inspect:
        return inspect(args)
    *scans, question = args.scans
    reading = {k: v for k, v in (("series", args.series), ("frame", args.frame)) if v is not None}
    scans = [{"volume": scan, **reading} for scan in scans]
    volume_options = {} if args.modality is None else {"modality": args.modality}
    processor, model = load(args.model, args.device, args.dtype, **volume_options)
    options = {
        "token_budget": args.token_budget,
        "keep_ratio": args.keep_ratio,
        "use_scheduler": False if args.dense else None,
        "max_new_tokens": args.max_new_tokens,
    }
    options = {key: value for key, value in options.items() if value is not None}
    result, inputs, keep = ask(processor, model, scans, question, **options)
    if args.keep_map:
        import SimpleITK as sitk

        for number in range(len(scans)):
            kept = processor.keep_map(keep, inputs, 0, number)
            with writing("--keep-map"):
                sitk.WriteImage(kept, str(numbered(args.keep_map, number)), useCompression=True)
    if args.overlay:
        outlined(processor, inputs, keep, scans, args.overlay, caption(question, result), args.window)
    if args.token_budget is not None and args.token_budget > result["tokens_seen"]:
        print("warning: --token-budget is more than there are visual tokens; all were kept.", file=sys.stderr)
    print(json.dumps(result) if args.json else described(result))


def caption(question, result):
    answer = result["answer"] or "(empty answer)"
    return f"{question}  {answer}  ({result['tokens_kept']} of {result['tokens_seen']} tokens kept)"


def described(result):
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in result["seconds"].items())
    threshold = "" if result["threshold"] is None else f" (threshold {result['threshold']:.3f})"
    return (
        f"{result['answer'] or '(empty answer)'}\n"
        f"{result['tokens_kept']} of {result['tokens_seen']} visual tokens kept{threshold}; {seconds}"
    )


def main(argv=None):
    args = parse(argv)
    with one_line_faults():
        run(args)


if __name__ == "__main__":
    main()
