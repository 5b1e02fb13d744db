"""The tiny model's table and pictures, from runs of `evaluate_hf.py` on held-out phantoms.

    python scripts/tiny_report.py --data data/test.jsonl --train data/train.jsonl \\
        --json benchmarks/results/tiny.json --run hard=runs/hard0,runs/hard1 --run dense=runs/dense0,runs/dense1 \\
        --pictures docs --state tune/trainer_state.json

Each `--run` is a condition and its run folders, one a seed. Accuracies are shares of questions answered as written,
averaged over seeds; "mean" is the mean over tasks. Intervals are 95 % percentiles of 2,000 draws of patients with
replacement. "blind" is the commonest training answer to the same question.
"""

import argparse
import json
import os
import platform
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from photon.evaluation.baselines import commonest_answers
from photon.evaluation.measures import Scored, same_answer
from photon.evaluation.predictions import PREDICTIONS, read_records
from photon.evaluation.questions import load_benchmark
from photon.evaluation.resampling import Sums

DRAWS = 2000
TASKS = ("presence", "side", "fov", "attenuation", "count", "largest", "size_choice", "size_open", "comparison")


def hits_of(rows, folder):
    """(hits, kept shares or nan) of a run's predictions, in the order of the rows."""
    records = read_records(Path(folder) / PREDICTIONS, rows)
    records = [records[row["id"]] for row in rows]
    hits = [same_answer(record["prediction"], row["answer"]) for record, row in zip(records, rows, strict=True)]
    return np.array(hits, float), np.array([np.nan if r.get("kept") is None else r["kept"] for r in records])


def figures(rows, hits):
    """{task or "mean": [value, low, high]} in per cent."""
    measure = Scored(hits)
    sums = Sums([{**row, "subtask": row["task"]} for row in rows], measure.parts, DRAWS, seed=0)
    by_task = sums.by_subtask(measure.subtask_figures)
    found = {task: by_task[task]["score"] for task in TASKS if task in by_task}
    found["mean"] = sums.figures(measure.figures)["score_macro"]
    return {
        task: [round(100 * figure[bound], 2) for bound in ("value", "low", "high")] for task, figure in found.items()
    }


def histogram(rows, kept, path):
    """Kept share by task, and its spread over the questions on one scan."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    bins = np.linspace(0, max(0.5, float(np.nanmax(kept))), 41)
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    parts = [kept[[row["task"] == task for row in rows]] for task in tasks]
    left.hist(parts, bins=bins, stacked=True, label=tasks)
    left.set(xlabel="share of visual tokens kept", ylabel="questions", title=f"All questions, mean {kept.mean():.3f}")
    left.legend(fontsize=7)
    scans = defaultdict(list)
    for row, share in zip(rows, kept, strict=True):
        scans[tuple(row["volumes"])].append(share)
    order = sorted(scans.values(), key=np.mean)
    for place, shares in enumerate(order):
        right.plot([place, place], [min(shares), max(shares)], color="0.75", linewidth=0.6)
    right.plot([np.mean(shares) for shares in order], color="C3", linewidth=1.2)
    right.set(xlabel="scans, by mean", ylabel="share kept", title="Lowest to highest question on each scan")
    figure.savefig(path, dpi=110)


def phases(state, path):
    """Loss terms, kept share and threshold against the step, from a `trainer_state.json`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in json.loads(Path(state).read_text())["log_history"] if "loss" in line]
    figure, axes = plt.subplots(3, 1, figsize=(9, 6.4), sharex=True, constrained_layout=True)
    steps = [line["step"] for line in lines]
    axes[0].plot(steps, [line["lm_loss"] for line in lines], label="answer, robust and flip rows")
    axes[0].plot(steps, [line["band_loss"] for line in lines], label="band")
    if all("evidence_loss" in line for line in lines):
        axes[0].plot(steps, [line["evidence_loss"] for line in lines], label="evidence")
    axes[0].set(ylabel="loss")
    axes[0].legend()
    some = [line for line in lines if "kept" in line or "would_keep" in line]
    at = [line["step"] for line in some]

    def kept(suffix=""):
        return [line.get("kept" + suffix, line.get("would_keep" + suffix)) for line in some]

    axes[1].fill_between(at, kept("_min"), kept("_max"), color="0.85")
    axes[1].plot(at, kept(), color="C2")
    axes[1].set(ylabel="share kept", ylim=(0, 1.02))
    axes[2].plot(at, [r["threshold"] for r in some], color="C4")
    axes[2].set(ylabel="threshold", xlabel="optimiser step")
    changes = [(a["step"], b["phase"]) for a, b in zip(some, some[1:], strict=False) if a["phase"] != b["phase"]]
    for axis in axes:
        for step, _ in changes:
            axis.axvline(step, color="0.4", linestyle=":")
    for step, phase in changes:
        axes[1].text(step, 0.9, f" {phase}")
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the questions, .jsonl")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions, as in the runs")
    parser.add_argument("--train", type=Path, required=True, help="training questions, for the blind baseline")
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER,...", help="a condition's runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write device, date, rows and ratios here")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="kept.png of the first run, phases.png")
    parser.add_argument("--state", type=Path, metavar="FILE", help="trainer_state.json of the training for phases.png")
    args = parser.parse_args(argv)
    rows, train = load_benchmark("jsonl", args.data, limit=args.limit), load_benchmark("jsonl", args.train)
    blind = commonest_answers(rows, train)
    hits = [same_answer(answer, row["answer"]) for answer, row in zip(blind, rows, strict=True)]
    table = [{"run": "blind", "seeds": 1, "kept": None, **figures(rows, hits)}]
    first_kept = None
    for run in args.run:
        name, _, folders = run.partition("=")
        results = [hits_of(rows, folder) for folder in folders.split(",")]
        hits, kept = (np.mean([r[i] for r in results], axis=0) for i in (0, 1))
        if first_kept is None:
            first_kept = results[0][1]
        share = None if np.isnan(kept).all() else round(100 * float(np.nanmean(kept)), 2)
        each = [figures(rows, h)["mean"][0] for h, _ in results]
        table.append({"run": name, "seeds": len(results), "kept": share, "mean_by_seed": each, **figures(rows, hits)})
    names = [name for name in (*TASKS, "mean") if name in table[0]]
    patients = len({row["patient"] for row in rows})
    print(f"{len(rows)} questions, {patients} patients; per cent, 95 % interval over patients\n")
    print("| | kept | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    for line in table:
        cells = [f"{line[n][0]:.1f} ({line[n][1]:.1f} to {line[n][2]:.1f})" for n in names]
        print(f"| {line['run']} | {'' if line['kept'] is None else line['kept']} | " + " | ".join(cells) + " |")
    if args.json:
        by_name = {line["run"]: line for line in table}
        ratios = {
            f"{name}_minus_blind": round(line["mean"][0] - by_name["blind"]["mean"][0], 2)
            for name, line in by_name.items() if name != "blind"
        }  # fmt: skip
        result = {
            "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
            "date": date.today().isoformat(),
            "questions": len(rows),
            "patients": patients,
            "rows": table,
            "ratios": ratios,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.pictures:
        histogram(rows, first_kept, args.pictures / "kept.png")
        if args.state:
            phases(args.state, args.pictures / "phases.png")


if __name__ == "__main__":
    main()
