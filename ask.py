"""Ask a question about a scan.

    python ask.py SCAN "question" [--model DIR] [--overlay out.png] [--keep-map out.nii.gz] [--dense] [--json]
    python ask.py PRIOR NOW "Has the lesion grown?"
    python ask.py SCAN "question" --compare "another question" --overlay both.png --html both.html
    python ask.py --inspect SCAN [--overlay out.png]

SCAN is a NIfTI, NRRD or MetaImage file, or a DICOM folder. Prints the answer, how many of the
scan's visual tokens were kept, and the seconds for reading, vision, prefill and decoding. `--overlay` draws three
planes with the kept tokens outlined, and says below them how the planes were chosen; `--html` writes one file that
scrolls through all slices in a browser, without network. `--compare` asks further questions about the same scan and
puts them into the same picture. `--keep-map` writes the kept tokens as an image on the scan's voxels, which a viewer
can lay over the scan. `--inspect` reports how a scan is read and draws what the model gets of it.
Not a medical device.
"""

import argparse
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see evaluate_hf.py

from photon import overlay
from photon.asking import ask_all, describe, html_of, overlap, picture_rows, shown_scans
from photon.console import one_line_faults
from photon.loading import ROOT, load, load_processor
from photon.read_options import add_read_argument, reading_fields
from photon.scan_report import inspect_volume
from photon.schedulers import SCHEDULERS, load_method, use_scheduler
from photon.whole_file import whole_file, write_image

PICTURES = {".png", ".jpg", ".jpeg", ".pdf", ".svg"}
PAGES = {".html", ".htm"}
IMAGES = (".nii", ".nii.gz", ".nrrd", ".mha")


@contextmanager
def writing(option):
    """Turns what writers raise into one `OSError` that names the option; SimpleITK raises several lines of text."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "is the folder writable, and the disk not full?"
        raise OSError(f"Could not write the file of {option}: {reason}") from None


def inspect(args):
    """Prints how the processor of --model reads a scan; the weights are not loaded."""
    options = {} if args.modality is None else {"modality": args.modality}
    settings = load_processor(args.model, **options).image_processor
    names = "modality window percentiles scaling assume_hu spacing orientation"
    fields = {name: getattr(settings, name) for name in names.split()} | {"size": settings.grid}
    report = inspect_volume(args.scans[0], **(fields | reading_fields(settings) | reading(args)))
    print(json.dumps(report.as_dict()) if args.json else report)
    if args.overlay and report.planes:
        views = [overlay.upright_view(name, *plane) for name, plane in report.planes.items()]
        with writing("--overlay"):
            overlay.draw(views, args.overlay, "What the model sees of the scan", (0, 255))
    if not report.readable:
        raise ValueError("The scan was refused, so there is nothing to draw; the report says why.")


def reading(args):
    """Reading options of the command line: those of --read, and --series and --frame."""
    given = {"series": args.series, "frame": args.frame}
    return dict(args.read) | {name: value for name, value in given.items() if value is not None}


def numbered(file, number):
    """The path itself for scan 0; out.nii.gz -> out_2.nii.gz for scan 1."""
    if number == 0:
        return file
    suffix = ".nii.gz" if file.name.lower().endswith(".nii.gz") else file.suffix
    return file.with_name(f"{file.name[: -len(suffix)]}_{number + 1}{file.name[-len(suffix) :]}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", metavar="SCAN ... QUESTION", help="one or more scans, then the question")
    parser.add_argument("--inspect", action="store_true", help="report how one scan is read; no question, no model")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository's tiny model)")
    parser.add_argument("--overlay", type=Path, metavar="PNG", help="draw three planes with the kept tokens outlined")
    parser.add_argument("--html", type=Path, metavar="HTML", help="write a page that scrolls, one file, no network")
    parser.add_argument("--compare", action="append", metavar="QUESTION", help="ask this too; may be given again")
    parser.add_argument("--keep-map", type=Path, metavar="NII", help="write the kept tokens on the scan's voxels")
    parser.add_argument("--dense", action="store_true", help="keep all tokens")
    parser.add_argument("--scheduler", choices=SCHEDULERS, metavar="NAME",
                        help=f"choose tokens by another method: {', '.join(SCHEDULERS)}")  # fmt: skip
    parser.add_argument("--token-budget", type=int, metavar="K", help="keep exactly the K most salient tokens")
    parser.add_argument("--keep-ratio", type=float, metavar="R", help="keep this share of the tokens")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="length limit of the answer")
    parser.add_argument(
        "--grounding",
        action="store_true",
        help="tell how much better the answer follows from the kept tokens than from as many others",
    )
    parser.add_argument("--series", type=int, help="which DICOM series of a folder")
    parser.add_argument("--frame", type=int, help="which frame of a 4D scan")
    add_read_argument(parser)
    parser.add_argument("--modality", choices=["auto", "ct", "mr"], help="what the scan is (default: the model's)")
    parser.add_argument("--window", type=float, nargs=2, metavar=("LO", "HI"), help="grey levels of the overlay")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights; auto: the checkpoint's on a GPU, else by size, processor and free memory",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    scans = args.scans if args.inspect else args.scans[:-1]
    wrong = wrong_question(args) or wrong_reading(args, scans) or wrong_output(args, scans)
    if wrong:
        parser.error(wrong)
    return args


def wrong_question(args):
    """What is wrong with the question and its options, or `None`."""
    if args.inspect:
        if len(args.scans) != 1:
            return "--inspect takes one scan and no question."
        asked = (
            "dense",
            "scheduler",
            "token_budget",
            "keep_ratio",
            "max_new_tokens",
            "keep_map",
            "window",
            "html",
            "compare",
            "grounding",
        )
        given = ["--" + name.replace("_", "-") for name in asked if getattr(args, name) not in (None, False)]
        return f"--inspect asks no question; leave out {', '.join(given)}." if given else None
    if len(args.scans) < 2 or os.path.exists(args.scans[-1]):  # a path is no question, and would be drawn
        return "Give one or more scans, then the question in quotes."
    if not all(question.strip() for question in [args.scans[-1], *(args.compare or ())]):
        return "The question is empty."
    if sum((args.dense, args.token_budget is not None, args.keep_ratio is not None)) > 1:
        return "--dense, --token-budget and --keep-ratio exclude each other."
    if args.grounding and args.dense:
        return "--grounding compares the kept tokens with others, but --dense keeps all; choose one."
    if args.dense and args.scheduler:
        return "--dense keeps all tokens, so there is nothing for --scheduler to choose; leave out one."
    return None


def wrong_reading(args, scans):
    """What is wrong with the options of reading, or `None`."""
    if "series" in reading(args) and any(os.path.isfile(scan) for scan in scans):
        return "--series chooses in a DICOM folder, but a scan is a file."
    if args.window and not args.window[0] < args.window[1]:
        return "--window takes two numbers, the lower one first."
    return None


def wrong_output(args, scans):
    """What is wrong with the files to write, or `None`. Checked before the model runs, which may take minutes."""
    if args.overlay and args.overlay.suffix.lower() not in PICTURES:
        return f"--overlay needs one of the suffixes {', '.join(sorted(PICTURES))}."
    if args.keep_map and not args.keep_map.name.lower().endswith(IMAGES):
        return f"--keep-map needs one of the suffixes {', '.join(IMAGES)}."
    if args.html and args.html.suffix.lower() not in PAGES:
        return f"--html needs one of the suffixes {', '.join(sorted(PAGES))}."
    for option, file in (("--overlay", args.overlay), ("--keep-map", args.keep_map), ("--html", args.html)):
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
    scans = [{"volume": scan, **reading(args)} for scan in scans]
    volume_options = {} if args.modality is None else {"modality": args.modality}
    processor, model = load(args.model, args.device, args.dtype, **volume_options)
    if args.scheduler:
        use_scheduler(model, args.scheduler)
        load_method(model, args.model)
    options = {
        "token_budget": args.token_budget,
        "keep_ratio": args.keep_ratio,
        "use_scheduler": False if args.dense else None,
        "max_new_tokens": args.max_new_tokens,
        "grounding": args.grounding or None,
    }
    options = {key: value for key, value in options.items() if value is not None}
    questions = [question, *(args.compare or ())]
    answers = ask_all(processor, model, scans, questions, **options)
    result, inputs, keep_mask = answers[0]
    if args.keep_map:
        for number in range(len(scans)):
            kept = processor.keep_map(keep_mask, inputs, 0, number)
            with writing("--keep-map"):
                write_image(kept, numbered(args.keep_map, number))
    if args.overlay or args.html:
        draw(args, processor, scans, questions, answers)
    if args.token_budget is not None and args.token_budget > result["tokens_seen"]:
        print("warning: --token-budget is more than there are visual tokens; all were kept.", file=sys.stderr)
    report(args, questions, answers)


def draw(args, processor, scans, questions, answers):
    """Writes the files of --overlay and --html, one a scan."""
    results = [result for result, _, _ in answers]
    for number, shown in enumerate(shown_scans(processor, scans, answers)):
        if args.overlay:
            rows = picture_rows(shown, questions, results, args.window)
            with writing("--overlay"):
                overlay.draw_rows(rows, numbered(args.overlay, number), shown.window)
        if args.html:
            page = html_of(shown, questions, results, args.window)
            with writing("--html"), whole_file(numbered(args.html, number)) as partial:
                partial.write_text(page, encoding="utf-8")


def report(args, questions, answers):
    """Prints the answers; with --compare also how much of what was kept is the same."""
    (result, _, keep_mask), *others = answers
    compared = [
        {"question": question, **other, "shared": overlap(keep_mask, mask)}
        for question, (other, _, mask) in zip(questions[1:], others, strict=True)
    ]
    if args.json:
        print(json.dumps(result | ({"compared": compared} if compared else {})))
        return
    print(describe(result))
    for other in compared:
        print(f"\n{other['question']}\n{describe(other)}")
        print(f"{other['shared']:.0%} of the tokens kept for either question were kept for both")


def main(argv=None):
    args = parse(argv)
    with one_line_faults():
        run(args)


if __name__ == "__main__":
    main()
