"""Do questions on a real scan keep the organ that they name? From the scan and masks of its organs.

    python -m photon.evidence.organs --scan ct.nii.gz --mask liver=liver.nii.gz --mask spleen=spleen.nii.gz \\
        --mask "left lung=lung_upper_lobe_left.nii.gz" --mask "left lung=lung_lower_lobe_left.nii.gz" --json FILE

Each wording of the phantoms' questions is asked of each organ. An organ's tokens are those of which a mask fills at
least a fiftieth of a patch. *Own* is the share of them that questions about the organ keep, *other* the share that the
same wordings keep when they name another organ of the list. The test draws anew, wording by wording, which organ each
question was about.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from photon.asking import ask_all
from photon.console import one_line_faults
from photon.evidence.trainings import ROOT
from photon.loading import load
from photon.phantoms.anatomy import FOV_ORGANS, LABELS
from photon.phantoms.questions import QUESTIONS
from photon.run_folder import write_whole
from photon.training.losses.evidence import evidence_tokens
from photon.training.losses.label_maps import TokenLabels

DRAWS = 2000
WORDINGS = tuple(text for task in ("presence", "attenuation", "count", "fov") for text in QUESTIONS[task])


def organ_tokens(processor, scan, masks):
    """{organ: (V,) bool}, which visual tokens of a scan hold it; organs without such a token are left out.

    Args: scan: path; masks: {organ of the phantoms: paths of masks on any grid of the scan's space}.
    """
    tokens = TokenLabels(processor.image_processor, max(LABELS.values()) + 1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for organ, paths in masks.items():
            whole = sum(sitk.Cast(sitk.ReadImage(str(path)) > 0, sitk.sitkUInt8) for path in paths)
            file = str(Path(folder) / "organ.nii.gz")
            sitk.WriteImage((whole > 0) * LABELS[organ], file)
            held = evidence_tokens([tokens({"volumes": [{"path": str(scan)}], "labels": [file], "lesions": []}, 0)],
                                   [LABELS[organ]])  # fmt: skip
            found |= {organ: held.numpy()} if held.any() else {}
    return found


def recalls(kept, held):
    """(W, O, O): the share of organ j's tokens that wording w keeps when it names organ i; kept (W, O, V), held (O, V)
    bool."""
    return (kept[:, :, None] & held).sum(-1) / held.sum(-1)


def own_and_other(table, order):
    """Own and other recall (O,), if question i of wording w was about organ order[w, i]. table: of `recalls`."""
    wordings, organs = order.shape
    place = np.argsort(order, axis=1)  # which question is about organ j
    own = np.stack([table[w, place[w], np.arange(organs)] for w in range(wordings)])  # (W, O)
    return own.mean(0), ((table.sum(1) - own) / (organs - 1)).mean(0)


def organ_effect(kept, held, seed=0):
    """Own and other recall of each organ, and how often as large a mean difference comes by chance.

    Args: kept (W, O, V) bool: what wording w about organ i keeps; held (O, V) bool: which tokens hold organ j.
    Returns: own (O,), other (O,), p.
    """
    table = recalls(kept, held)
    asked = np.tile(np.arange(held.shape[0]), (kept.shape[0], 1))
    own, other = own_and_other(table, asked)
    random = np.random.default_rng(seed)
    drawn = [own_and_other(table, random.permuted(asked, axis=1)) for _ in range(DRAWS)]
    as_large = sum((a - b).mean() >= (own - other).mean() for a, b in drawn)
    return own, other, (as_large + 1) / (DRAWS + 1)


def measure_organs(processor, model, scan, masks):
    """Rows and totals as JSON takes them. Raises `ValueError` where fewer than two organs are in the scan."""
    tokens = organ_tokens(processor, scan, masks)
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} of {len(masks)} organs are in the scan; expected two or more to compare.")
    questions = [text.format(key=organ) for text in WORDINGS for organ in tokens]
    answers = ask_all(processor, model, [str(scan)], questions, max_new_tokens=1)
    kept = np.stack([keep[0].cpu().numpy() for _, _, keep in answers]).reshape(len(WORDINGS), len(tokens), -1)
    held = np.stack(list(tokens.values()))
    own, other, p = organ_effect(kept, held)
    share = float(kept.mean())
    rows = [
        {"organ": organ, "tokens": int(held[i].sum()), "own": round(float(own[i]), 4),
         "other": round(float(other[i]), 4), "enrichment": round(float(own[i]) / share, 2)}
        for i, organ in enumerate(tokens)
    ]  # fmt: skip
    ratios = {"own": float(own.mean()), "other": float(other.mean()), "kept": share, "p": p}
    return rows, {name: round(float(value), 4) for name, value in ratios.items()}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, required=True, help="a scan, as ask.py takes it")
    parser.add_argument("--mask", action="append", required=True, metavar="ORGAN=FILE",
                        help=f"a mask of {', '.join(FOV_ORGANS)}; several files of one organ are joined")  # fmt: skip
    parser.add_argument("--model", default=str(ROOT), help="folder of a model; default the one of this repository")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write device, date, rows and ratios")
    args = parser.parse_args(argv)
    args.masks = {}
    for pair in args.mask:
        organ, _, file = pair.partition("=")
        if organ not in FOV_ORGANS or not Path(file).is_file():
            parser.error(f"--mask {pair}: expected ORGAN=FILE, a file that exists and one of {', '.join(FOV_ORGANS)}")
        args.masks.setdefault(organ, []).append(file)
    return args


def main(argv=None):
    args = parse(argv)
    with one_line_faults():
        run(args)


def run(args):
    processor, model = load(args.model)
    rows, ratios = measure_organs(processor, model, args.scan, args.masks)
    for row in rows:
        print("{organ}: {tokens} tokens, own {own:.1%}, other {other:.1%}, {enrichment} times chance".format(**row))
    print("all: own {own:.1%}, other {other:.1%}, kept {kept:.1%}, p {p}".format(**ratios))
    if args.json:
        device = f"{platform.machine()} CPU, {os.cpu_count()} cores"
        result = {"device": device, "date": date.today().isoformat(), "rows": rows, "ratios": ratios}
        write_whole(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
