"""The tiny model's table and pictures, from runs of `evaluate_hf.py` on held-out phantoms.

    python scripts/tiny_report.py --data data/test.jsonl --train data/train.jsonl \\
        --json benchmarks/results/tiny.json --run hard=runs/hard0,runs/hard1 --run dense=runs/dense0,runs/dense1 \\
        --pictures docs --state tune/trainer_state.json

Each `--run` is a condition and its run folders, one a seed. Accuracies are shares of questions answered as written,
averaged over seeds; "mean" is the mean over tasks. Intervals are 95 % percentiles of 2,000 draws of patients with
replacement. "blind" is the best answer that the question alone allows, learnt on the training questions.
"""

import argparse
import json
import os
import platform
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path

import numpy as np

DRAWS = 2000
TASKS = ("presence", "side", "fov", "attenuation", "count", "largest", "size_choice", "size_open", "comparison")


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def blind_hits(rows, train):
    """1 where an answer from the question alone is right: the commonest one in training to the same words, or of the
    task where these words never stood in training."""
    answers = defaultdict(Counter)
    for row in train:
        for key in (asked(row), row["task"]):
            answers[key][row["answer"]] += 1
    known = (answers.get(asked(row)) or answers[row["task"]] for row in rows)
    return np.array(
        [found.most_common(1)[0][0] == row["answer"] for found, row in zip(known, rows, strict=True)], float
    )


def asked(row):
    return row["task"], row["messages"][0]["content"][-1]["text"]


def hits_of(rows, folder):
    """(hits, kept shares or nan) of a run's predictions, in the order of the rows."""
    found = {line["id"]: line for line in read_lines(Path(folder) / "predictions.jsonl")}
    absent = sum(row["id"] not in found for row in rows)
    if absent:
        raise SystemExit(f"{folder}: {absent} of {len(rows)} questions are not answered yet.")
    lines = [found[row["id"]] for row in rows]
    hits = [a["prediction"].strip().casefold() == r["answer"].casefold() for a, r in zip(lines, rows, strict=True)]
    return np.array(hits, float), np.array([np.nan if a.get("kept") is None else a["kept"] for a in lines])


class Bootstrap:
    """Figures over draws of patients: all are sums over questions, so a draw is a vector of weights."""

    def __init__(self, rows, seed=0):
        patients = sorted({row["patient"] for row in rows})
        place = {patient: i for i, patient in enumerate(patients)}
        self.patient = np.array([place[row["patient"]] for row in rows])
        chance = np.random.default_rng(seed)
        counts = chance.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), DRAWS)
        self.weights = np.vstack([np.ones(len(patients)), counts])  # the first is the sample itself
        self.task = np.array([row["task"] for row in rows])
        self.count = len(patients)

    def ratio(self, values, chosen):
        sums, sizes = (np.zeros(self.count) for _ in range(2))
        np.add.at(sums, self.patient[chosen], values[chosen])
        np.add.at(sizes, self.patient[chosen], 1)
        return (self.weights @ sums) / (self.weights @ sizes)  # (1 + draws,)

    def figures(self, values):
        """{task or "mean": [value, low, high]} in per cent."""
        by_task = {task: self.ratio(values, self.task == task) for task in TASKS if (self.task == task).any()}
        by_task["mean"] = np.mean(list(by_task.values()), axis=0)
        return {
            task: [round(100 * float(x), 2) for x in (drawn[0], *np.nanpercentile(drawn[1:], [2.5, 97.5]))]
            for task, drawn in by_task.items()
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
    some = [line for line in lines if "kept" in line]
    at = [line["step"] for line in some]
    axes[1].fill_between(at, [r["kept_min"] for r in some], [r["kept_max"] for r in some], color="0.85")
    axes[1].plot(at, [r["kept"] for r in some], color="C2")
    axes[1].set(ylabel="share kept", ylim=(0, 1.02))
    axes[2].plot(at, [r["threshold"] for r in some], color="C4")
    axes[2].set(ylabel="threshold", xlabel="optimiser step")
    changes = [(a["step"], b["phase"]) for a, b in zip(some, some[1:], strict=False) if a["phase"] != b["phase"]]
    for axis in axes:
        for step, _ in changes:
            axis.axvline(step, color="0.4", linestyle=":")
    for step, phase in changes:
        axes[1].text(step, 0.9, " " + ("dense", "soft", "hard")[int(phase)])
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the questions, .jsonl")
    parser.add_argument("--train", type=Path, required=True, help="training questions, for the blind baseline")
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER,...", help="a condition's runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write device, date, rows and ratios here")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="kept.png of the first run, phases.png")
    parser.add_argument("--state", type=Path, metavar="FILE", help="trainer_state.json of the training for phases.png")
    args = parser.parse_args(argv)
    rows = read_lines(args.data)
    bootstrap, table = Bootstrap(rows), []
    table.append(
        {"run": "blind", "seeds": 1, "kept": None, **bootstrap.figures(blind_hits(rows, read_lines(args.train)))}
    )
    first_kept = None
    for run in args.run:
        name, _, folders = run.partition("=")
        results = [hits_of(rows, folder) for folder in folders.split(",")]
        hits, kept = (np.mean([r[i] for r in results], axis=0) for i in (0, 1))
        if first_kept is None:
            first_kept = results[0][1]
        share = None if np.isnan(kept).all() else round(100 * float(np.nanmean(kept)), 2)
        each = [bootstrap.figures(h)["mean"][0] for h, _ in results]
        table.append({"run": name, "seeds": len(results), "kept": share, "mean_by_seed": each,
                      **bootstrap.figures(hits)})  # fmt: skip
    names = [name for name in (*TASKS, "mean") if name in table[0]]
    print(f"{len(rows)} questions, {bootstrap.count} patients; per cent, 95 % interval over patients\n")
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
            "patients": bootstrap.count,
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
