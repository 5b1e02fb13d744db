"""What a run came to: scores, scans that were refused, and how much was kept."""

from photon.evaluation.benchmarks import BENCHMARKS
from photon.evaluation.dealing import scan_keys
from photon.evaluation.questions import load_benchmark
from photon.evaluation.scoring import score
from photon.evaluation.table import table


def summary(name, rows, records, *, train=None, tasks=None, bootstrap=1000, seed=0):
    """Scores of a benchmark's records, with what was refused and how much was kept, as JSON takes it.

    Args: records: {id: record}; train: source of the training questions, `tasks` of them for the baselines; bootstrap,
        seed: as `score` takes them.
    """
    if train is not None:
        train = load_benchmark(name, train, split=BENCHMARKS[name].train_split, tasks=tasks)
    predictions = {row_id: record["prediction"] for row_id, record in records.items()}
    scores = score(rows, predictions, train=train, bootstrap=bootstrap, seed=seed)
    refused = {}
    for row in rows:
        fault = records[row["id"]].get("refused")
        if fault:
            entry = refused.setdefault(fault, {"questions": 0, "scans": set()})
            entry["questions"] += 1
            entry["scans"].update(scan_keys(row))
    refused = {fault: {**entry, "scans": len(entry["scans"])} for fault, entry in sorted(refused.items())}
    kept = [records[row["id"]].get("kept") for row in rows]
    kept = [ratio for ratio in kept if ratio is not None]
    kept = {"mean": sum(kept) / len(kept), "min": min(kept), "max": max(kept)} if kept else None
    return {"benchmark": name, "questions": len(rows), "refused": refused, "kept": kept, "scores": scores}


def text_of(result):
    """The table of a summary, and beneath it what the table does not tell."""
    lines = [table(result["scores"])]
    if result["kept"]:
        line = "\nVisual tokens kept: {mean:.3f} of all, from {min:.3f} to {max:.3f} a question."
        lines.append(line.format(**result["kept"]))
    for fault, count in result["refused"].items():
        lines.append(
            f"Refused with {fault}: {count['scans']} scans, {count['questions']} questions, counted as wrong."
        )
    return "\n".join(lines)
