"""One picture of what each selection method keeps of a scan, for one question and at one budget.

    python scripts/peers_figure.py demo/phantom.nii.gz "Is there a lesion in the liver?" --output docs/peers_kept.png

A coronal plane through the middle of what the model's own scheduler keeps, once for each method. Methods that the
model cannot run are left out: those that must be trained first, and those that read layers below a cut that has none.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from matplotlib.figure import Figure

from photon import overlay
from photon.asking import ask, shown_scans
from photon.console import one_line_faults
from photon.loading import load
from photon.planes import choose_planes
from photon.schedulers import SCHEDULERS, use_scheduler

COLUMNS = 6
OWN = "photon"
PLANE = "coronal"  # shows all slabs


def kept_by_method(processor, model, scan, question, keep_ratio):
    """{method: what `ask` returns}, the model's own first."""
    answers = {OWN: ask(processor, model, [scan], question, keep_ratio=keep_ratio)}
    for name, method in SCHEDULERS.items():
        if not method.learns and method.exact and method.lowest_layer <= model.config.scheduler_layer:
            own = use_scheduler(model, name)
            answers[name] = ask(processor, model, [scan], question, keep_ratio=keep_ratio)
            model.set_scheduler(own)
    return answers


def draw(shown, answers, question, path):
    """Writes the picture of a `ShownScan` whose `kept` are in the order of the answers."""
    at, _ = choose_planes(shown.image, shown.kept[0], question, shown.ct)
    rows = -(-len(answers) // COLUMNS)
    figure = Figure(figsize=(2.2 * COLUMNS, 2.6 * rows), layout="constrained", facecolor="black")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, kept, (name, (result, _, _)) in zip(axes, shown.kept, answers.items(), strict=False):
        (plane,) = [view for view in overlay.views(shown.image, kept, at) if view.name == PLANE]
        height, width = (n * step for n, step in zip(plane.pixels.shape, plane.spacing, strict=True))
        low, high = shown.window
        axis.imshow(plane.pixels, cmap="gray", vmin=low, vmax=high, extent=(0, width, height, 0))
        axis.imshow(
            plane.kept, cmap="autumn", alpha=0.45 * plane.kept, extent=(0, width, height, 0), interpolation="nearest"
        )
        colour = "#ffb000" if name == OWN else "white"
        axis.set_title(f"{name}: {result['answer'] or '(empty)'}", color=colour, fontsize=9)
    count = next(iter(answers.values()))[0]
    text = f"{question}  {count['tokens_kept']} of {count['tokens_seen']} tokens each"
    figure.suptitle(text, color="white", fontsize=11)
    figure.savefig(path, dpi=100, facecolor="black")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan")
    parser.add_argument("question")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository's tiny model)")
    parser.add_argument(
        "--keep-ratio", type=float, default=0.1, metavar="R", help="share of the visual tokens to keep"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    args = parser.parse_args(argv)
    with one_line_faults():
        processor, model = load(args.model)
        answers = kept_by_method(processor, model, args.scan, args.question, args.keep_ratio)
        (shown,) = shown_scans(processor, [args.scan], list(answers.values()))
        draw(shown, answers, args.question, args.output)
    print(f"{args.output.name}: {', '.join(answers)}")


if __name__ == "__main__":
    main()
