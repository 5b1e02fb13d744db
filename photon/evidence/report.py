"""Figures of the arms with intervals over patients, as JSON, tables and a plot."""

import os
import platform
import re
from datetime import date

import numpy as np

from photon.evaluation.resampling import Sums
from photon.evidence.arms import ARMS
from photon.evidence.grounding import reliability
from photon.evidence.questions import question_effect
from photon.evidence.trainings import steps_of

TASKS = ("presence", "side", "attenuation", "fov", "count", "largest", "size_choice", "size_open", "comparison")
DRAWS = 2000
TOKENS = ("tokens", "kept_tokens", "organ", "organ_kept", "lesion", "lesion_kept")
LAYERS = 4  # of the root's decoder
MARK = "<!-- {}: begin -->\n{}\n<!-- {}: end -->"


def interval(records, parts, figure):
    """[value, low, high] of `figure(sums)`; records of one or several seeds, whose patients are drawn together.

    Args: parts: (records, P) numbers that add up; figure: maps sums (..., P) to (...).
    """
    sums = Sums([{**record, "subtask": ""} for record in records], parts, DRAWS, seed=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = sums.figures(lambda sums: {"": figure(sums[..., 0, :])})[""]
    return [None if found[name] is None else round(found[name], 4) for name in ("value", "low", "high")]


def accuracies(records, condition, less=None):
    """{task or "mean": [value, low, high]}, shares of questions answered right. less: records of another model about
    the same questions of the same seeds, whose shares are taken away; patients are drawn for both at once."""
    known = [task for task in TASKS if any(record["task"] == task for record in records)]
    parts = np.zeros((len(records), 2 * len(known)))
    for i, record in enumerate(records):
        column = known.index(record["task"])
        other = 0.0 if less is None else float(less[i]["right"][condition])
        parts[i, column], parts[i, len(known) + column] = record["right"][condition] - other, 1

    def shares(sums):
        return sums[..., : len(known)] / sums[..., len(known) :]

    found = {task: interval(records, parts, lambda sums, i=i: shares(sums)[..., i]) for i, task in enumerate(known)}
    return found | {"mean": interval(records, parts, lambda sums: np.nanmean(shares(sums), axis=-1))}


def evidence_found(records):
    """Recall and precision of the organ's tokens and recall of its lesions' tokens, each with what chance gives."""
    parts = np.array([[record[name] for name in TOKENS] for record in records], float)
    column = {name: i for i, name in enumerate(TOKENS)}

    def ratio(part, whole):
        return interval(records, parts, lambda sums: sums[..., column[part]] / sums[..., column[whole]])

    return {
        "kept": ratio("kept_tokens", "tokens"),
        "organ_recall": ratio("organ_kept", "organ"),
        "organ_precision": ratio("organ_kept", "kept_tokens"),
        "organ_precision_of_chance": ratio("organ", "tokens"),
        "lesion_recall": ratio("lesion_kept", "lesion"),
    }


def layer_averaged(arm, kept):
    """Share of the tokens that a decoder layer sees, the mean over its layers; kept: share after the cut."""
    full = 1 + arm.photon.get("scheduler_layer", -1)  # layers below the cut
    layers = LAYERS if arm.layers is None else arm.layers
    return round((full + (layers - full) * kept) / layers, 4)


def signals(records):
    """What one model keeps, whether the question decides it, and what grounding tells, as JSON takes it."""
    row = {"evidence": evidence_found(records), "question": question_effect(records)}
    return row | ({"grounding": reliability(records)} if records[0]["grounding"] else {})


def result_of(found, preset):
    """All figures as JSON takes them. found: {name of the arm: [(records, seconds of training) of each seed]}."""
    rows = []
    for arm in (arm for arm in ARMS if arm.name in found):
        seeds = found[arm.name]
        together = [record for records, _ in seeds for record in records]
        seconds = [s for _, s in seeds if s is not None]
        row = {"arm": arm.name, "says": arm.says, "table": arm.table, "seeds": len(seeds)}
        row["steps"] = steps_of(arm, preset)
        row["seconds"] = round(float(np.mean(seconds))) if seconds else None
        row["accuracy"] = accuracies(together, "own")
        row["mean_by_seed"] = [accuracies(records, "own")["mean"][0] for records, _ in seeds]
        if not arm.dense:
            row["evidence"] = evidence_found(together)
            if arm.table == "places":
                row["layer_averaged"] = layer_averaged(arm, row["evidence"]["kept"][0])
            row["recall_by_seed"] = [evidence_found(records)["organ_recall"][0] for records, _ in seeds]
            first = seeds[0][0]
            row["controls"] = {name: accuracies(first, name)["mean"] for name in first[0]["right"] if name != "own"}
            row |= {name: value for name, value in signals(first).items() if name != "evidence"}
        rows.append(row)
    by_name = {row["arm"]: row for row in rows}
    for name, row in by_name.items():
        pairs = list(zip(found[name], found.get("exact", []), strict=False))  # seeds that both have
        if pairs and name != "exact":
            mine, exact = ([record for pair in pairs for record in pair[i][0]] for i in (0, 1))
            row["minus_exact"] = accuracies(mine, "own", exact)
    ratios = {
        f"{name}_minus_dense": round(row["accuracy"]["mean"][0] - by_name["dense"]["accuracy"]["mean"][0], 4)
        for name, row in by_name.items()
        if "dense" in by_name and name != "dense"
    }
    questions, patients = len(seeds[0][0]), len({record["patient"] for record in seeds[0][0]})
    return {
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "questions": questions,
        "patients": patients,
        "rows": rows,
        "ratios": ratios,
    }


def percent(figure, bounds=True):
    if figure is None or figure[0] is None:
        return ""
    value, low, high = (100 * x for x in figure)
    return f"{value:.1f} ({low:.1f} to {high:.1f})" if bounds else f"{value:.1f}"


def arm_table(result, table="arms"):
    """One table of accuracies and found evidence, in Markdown. table: of `Arm.table`, `None`
    for all; the exact cut heads each."""
    tasks = [task for task in TASKS if task in result["rows"][0]["accuracy"]]
    rows = [row for row in result["rows"] if table in (None, row["table"]) or row["arm"] == "exact"]
    head = [
        "arm",
        "seeds",
        "seconds",
        "kept",
        "organ recall",
        "organ precision",
        "lesion recall",
        *tasks,
        "mean (95 %)",
        "less the exact cut's (95 %)",
    ]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        evidence = row.get("evidence", {})
        names = ("kept", "organ_recall", "organ_precision", "lesion_recall")
        cells = [row["says"], row["seeds"], row["seconds"] or ""]
        cells += [percent(evidence.get(name), bounds=False) for name in names]
        cells += [percent(row["accuracy"][task], bounds=False) for task in tasks]
        cells += [percent(row["accuracy"]["mean"]), percent(row.get("minus_exact", {}).get("mean"))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def place_table(result):
    """What a cut at each place of the deeper model costs, in Markdown."""
    head = ["cut", "steps", "seconds", "kept", "tokens a layer", "mean (95 %)", "no token left", "random, as many"]
    head += ["another patient's scan", "organ decides (p)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in (row for row in result["rows"] if row["table"] == "places"):
        cells = [row["says"], row["steps"], row["seconds"] or "", percent(row.get("evidence", {}).get("kept"), False)]
        cells += [f"{100 * row['layer_averaged']:.1f}" if "layer_averaged" in row else "100"]
        cells += [percent(row["accuracy"]["mean"])]
        cells += [percent(row.get("controls", {}).get(name), False) for name in ("none", "random", "other")]
        cells += ["{difference:.3f} ({p:.4f})".format(**row["question"]) if "question" in row else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def control_table(result):
    """Mean accuracy with the kept tokens replaced, seed 0, in Markdown."""
    names = {"none": "no token left", "random": "random, as many", "flipped": "least salient, as many",
             "other": "another patient's scan"}  # fmt: skip
    lines = ["| arm | as trained | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 2) + "|"]
    for row in result["rows"]:
        if "controls" in row and row["table"] == "arms":
            cells = [row["says"], f"{100 * row['mean_by_seed'][0]:.1f}"]
            cells += [percent(row["controls"].get(name), bounds=False) for name in names]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def signal_table(result):
    """Whether the question decides what is kept, and what grounding tells, seed 0, in Markdown."""
    lines = ["| arm | same organ | other organ | difference | p | right from wrong | own scan from another's |"]
    lines.append("|---" * 7 + "|")
    shipped = [{"says": "the model of this repository, nine tasks", **result["root"]}] if "root" in result else []
    for row in [*(row for row in result["rows"] if row["table"] not in ("methods", "places")), *shipped]:
        if "question" in row and row["question"]["difference"] is not None:
            effect, found = row["question"], row.get("grounding", {})
            cells = [row["says"], *(f"{effect[name]:.3f}" for name in ("same_organ", "other_organ", "difference"))]
            cells += [f"{effect['p']:.4f}"]
            for name in ("right_or_wrong", "own_or_other_scan"):
                figure = found.get(name)
                cells.append("" if figure is None or None in figure else "{:.3f} ({:.3f} to {:.3f})".format(*figure))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def surrogate_table(rows):
    """What each estimate says of a deletion's cost, of `benchmarks/surrogate.py`, in Markdown."""
    lines = ["| model | estimate | cases | Spearman (95 %) | right sign (95 %) | forwards |", "|---" * 6 + "|"]
    for row in rows:
        figures = (
            "{:.2f} ({:.2f} to {:.2f})".format(*(row[name + end] for end in ("", "_low", "_high")))
            for name in ("spearman", "sign")
        )
        cells = ["/".join(row["model"].split("/")[-2:]), row["estimate"], row["cases"], *figures, row["cost"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def organ_table(rows):
    """What questions about a real scan's organs keep of them, of `photon.evidence.organs`, in Markdown."""
    lines = ["| organ | its tokens | asked about it | asked about another | against chance |", "|---" * 5 + "|"]
    for row in rows:
        lines.append(
            f"| {row['organ']} | {row['tokens']} | {100 * row['own']:.0f} | {100 * row['other']:.0f} | "
            f"{row['enrichment']:.1f} times |"
        )
    return "\n".join(lines)


def tables_of(result, surrogate=None, organs=None):
    """{mark: table in Markdown}, of all arms. surrogate, organs: rows of `benchmarks/surrogate.py` and
    `photon.evidence.organs`."""
    tables = {name: arm_table(result, name) for name in ("arms", "methods", "constants")}
    tables |= {"places": place_table(result), "controls": control_table(result), "signal": signal_table(result)}
    tables |= {} if surrogate is None else {"surrogate": surrogate_table(surrogate)}
    return tables | ({} if organs is None else {"organs": organ_table(organs)})


def write_tables(tables, page):
    """Puts the tables between their marks in a Markdown page. Raises `ValueError` where the page has no such marks."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        pattern = re.compile(MARK.format(name, ".*?", name), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page.name} has no mark '<!-- {name}: begin -->'.")
        text = pattern.sub(lambda _, name=name, table=table: MARK.format(name, table, name), text)
    page.write_text(text, encoding="utf-8")


def plot(result, file):
    """Recall of the asked organ's tokens against mean accuracy, one point a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 6.8), constrained_layout=True)
    shown = [row for row in result["rows"] if "evidence" in row and row["table"] == "arms"]
    for number, row in enumerate(shown):
        means = [100 * value for value in row["mean_by_seed"]]
        recalls = [100 * value for value in row["recall_by_seed"]]
        axis.scatter(recalls, means, color=f"C{number % 10}", marker="os^D"[number // 10], label=row["says"])
    for row in result["rows"]:
        if row["arm"] == "dense":
            axis.axhline(100 * row["accuracy"]["mean"][0], color="0.5", linestyle=":", label=row["says"])
    axis.set(xlabel="recall of the tokens that hold the asked organ, %", ylabel="mean accuracy of the tasks, %")
    figure.legend(fontsize=7, ncols=2, loc="outside lower center")
    figure.savefig(file, dpi=110)
