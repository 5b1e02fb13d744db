"""Figures, table and plot of `peers.py`, from the lines that its runs wrote."""

import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from peers_arms import ALL, GROUPS, OURS
from photon.evaluation.resampling import Sums, interval

ALPHA = 0.05
BEGIN, END = "<!-- table of {} -->", "<!-- end of table -->"
SECONDS = ("selection", "prefill", "decode")
OWN_WEIGHTS = ("trained with", "on the weights of ours")  # in the names of lines with other weights than the dense
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c510a", "#606060", "#b2df8a")


def collected(lines):
    """{(line of the table, share): column}; a column has for each question and seed what was measured, by its id."""
    columns = {}
    for line in lines:
        for entry in line["arms"]:
            key = entry["arm"].partition(" #")[0], entry["share"]
            if key not in columns:
                columns[key] = {name: entry[name] for name in ("below", "layer_average")}
                columns[key] |= {"by_id": {}, "seconds": dict.fromkeys(SECONDS, 0.0), "asked": 0}
            column = columns[key]
            for name, result in zip(line["ids"], entry["results"], strict=True):
                column["by_id"].setdefault(name, []).append(result)
            for name in SECONDS:
                column["seconds"][name] += entry["seconds"][name]
            column["asked"] += len(line["ids"])
    return columns


def holm(values):
    """Holm's correction of p values, a list; in their order."""
    order, highest, corrected = sorted(range(len(values)), key=values.__getitem__), 0.0, [0.0] * len(values)
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = highest
    return corrected


def two_sided(differences):
    """p of a difference from its bootstrap draws: twice the smaller share on one side of 0, never 0 itself."""
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (beyond + 1) / (len(differences) + 1))


def figures(lines, rows, shares, resamples, seed=0):
    """Rows of the result, a dict for each method, axis and share, and what they rest on.

    Args: lines: of the runs; rows: questions; shares: of the visual tokens, for both axes; resamples: draws of whole
        patients, the same for all methods, so that differences are paired.
    """
    columns, ids = collected(lines), [row["id"] for row in rows]
    for column in columns.values():
        column["by_id"] = {name: column["by_id"][name] for name in ids}
    keys = list(columns)
    right = np.array([[np.mean([r[0] for r in columns[key]["by_id"][name]]) for key in keys] for name in ids])
    sums = Sums([row | {"subtask": ""} for row in rows], np.c_[right, np.ones(len(rows))], resamples, seed)
    whole = sums.all[0, :-1] / sums.all[0, -1]
    drawn = sums.drawn[:, 0, :-1] / sums.drawn[:, 0, -1:]
    place = {key: i for i, key in enumerate(keys)}

    def entry(name, share, axis, asked_for):
        column, i = columns[name, share], place[name, share]
        results = [result for some in column["by_id"].values() for result in some]
        recall = [r[2] for r in results if r[2] is not None]
        return {
            "method": name, "axis": axis, "share": asked_for, "kept": float(np.mean([r[1] for r in results])),
            "below": column["below"], "layer_average": column["layer_average"],
            "accuracy": float(whole[i]), **{n: interval(whole[i], drawn[:, i])[n] for n in ("low", "high")},
            "lesion_tokens_kept": float(np.mean(recall)) if recall else None,
            **{f"{n}_ms": 1e3 * column["seconds"][n] / column["asked"] for n in SECONDS},
        }  # fmt: skip

    table = [entry(name, share, "all" if share else "none", share) for name, share in keys if share in (0.0, 1.0)]
    for axis in ("kept", "layers"):
        for share in shares:
            block, own = [], _share_of(columns, OURS, axis, share)
            for name in dict.fromkeys(name for name, _ in keys):
                found = _share_of(columns, name, axis, share)
                if name != ALL and found is not None:
                    block.append((entry(name, found, axis, share), place[name, found]))
            _compare(block, place.get((OURS, own)), whole, drawn)
            table += [line for line, _ in block]
    facts = {"questions": len(rows), "patients": sums.patients, "resamples": resamples, "seconds_a_scan": {}}
    for name in dict.fromkeys(line["model"] for line in lines):
        some = [line["seconds"] for line in lines if line["model"] == name]
        facts["seconds_a_scan"][name] = {part: float(np.mean([s[part] for s in some])) for part in some[0]}
    return table, facts


def _share_of(columns, name, axis, share):
    """The share that a method was run at for this budget, or `None`."""
    for (other, ran), column in columns.items():
        if other == name:
            is_at = ran if axis == "kept" else round(column["layer_average"], 4)
            if is_at == round(share, 4) and not (axis == "kept" and ran == 0):
                return ran
    return None


def _compare(block, ours, whole, drawn):
    """Adds to each entry by how much ours is ahead, with interval, p, and p after Holm over the block."""
    others = [(line, i) for line, i in block if ours is not None and i != ours]
    values = [two_sided(drawn[:, ours] - drawn[:, i]) for _, i in others]
    for line, _ in block:
        line |= {"ours_ahead": None, "ahead_low": None, "ahead_high": None, "p": None, "p_holm": None}
    for (line, i), p, corrected in zip(others, values, holm(values), strict=True):
        ahead = interval(whole[ours] - whole[i], drawn[:, ours] - drawn[:, i])
        line |= {"ours_ahead": ahead["value"], "ahead_low": ahead["low"], "ahead_high": ahead["high"]}
        line |= {"p": p, "p_holm": corrected}


# === Page and plot ===================================================================================================


def _cell(line):
    if line is None:
        return ""
    mark = ""
    if line.get("p_holm") is not None and line["p_holm"] < ALPHA:
        mark = " −" if line["ours_ahead"] > 0 else " +"
    return f"{100 * line['accuracy']:.1f}{mark}"


def page_table(table, facts, shares):
    """The tables of docs/peers.md, in Markdown."""
    whole = next(line for line in table if line["axis"] == "all")
    text = [
        f"{facts['questions']} questions, {facts['patients']} patients. All tokens, model trained dense: "
        f"{100 * whole['accuracy']:.1f} % right ({100 * whole['low']:.1f} to {100 * whole['high']:.1f})."
    ]
    text += [
        f"{line['method']}, which averages {100 * line['layer_average']:.0f} %: {100 * line['accuracy']:.1f} % right "
        f"({100 * line['low']:.1f} to {100 * line['high']:.1f})."
        for line in table if line["axis"] == "none"
    ]  # fmt: skip
    heads = [f"{100 * share:g} %" for share in shares]
    for axis, title in (("kept", "Equal kept tokens"), ("layers", "Equal layer-averaged tokens")):
        names = list(dict.fromkeys(line["method"] for line in table if line["axis"] == axis))
        found = {(line["method"], line["share"]): line for line in table if line["axis"] == axis}
        if axis == "layers":  # those that cut before the first layer keep as many on average as above
            names = list(dict.fromkeys(name for (name, _), line in found.items() if line["below"] or name == OURS))
        more = ("lesion tokens kept at 10 %", *(f"{name}, ms" for name in SECONDS)) if axis == "kept" else ()
        text += [
            "",
            f"{title}:",
            "",
            f"| | {' | '.join((*heads, *more))} |",
            "|---|" + "---|" * (len(heads) + len(more)),
        ]
        for name in names:
            cells = [_cell(found.get((name, share))) for share in shares]
            if more:
                tenth = found.get((name, 0.1)) or {}
                recall, spent = tenth.get("lesion_tokens_kept"), [tenth.get(f"{part}_ms") for part in SECONDS]
                cells.append("" if recall is None else f"{100 * recall:.0f} %")
                cells += ["" if value is None else f"{value:.1f}" for value in spent]
            text.append(f"| {name} | {' | '.join(cells)} |")
        text += ["", f"By how many points ours is ahead of the nearest: {nearest(found.values())}."]
    measured = f"{facts['clock']} clock, {facts['date']}, {facts['device']}"
    text += ["", f"Milliseconds are a question's, at 10 % ({measured}). Seconds a scan, for all its questions:", ""]
    for name, parts in facts["seconds_a_scan"].items():
        text.append(f"- {name}: " + ", ".join(f"{part} {value:.3f}" for part, value in parts.items()))
    return "\n".join(text) + "\n"


def nearest(lines):
    """Text: for each share the other method that is right most often, and by how much ours is ahead, with interval."""
    others = {}
    for line in lines:
        if line["ours_ahead"] is not None:
            others.setdefault(line["share"], []).append(line)
    found = {share: min(some, key=lambda line: line["ours_ahead"]) for share, some in others.items()}
    return "; ".join(
        f"at {100 * share:g} % {line['method']} by {100 * line['ours_ahead']:.1f} ({100 * line['ahead_low']:.1f} to "
        f"{100 * line['ahead_high']:.1f})"
        for share, line in found.items()
    )  # fmt: skip


def write_page(page, table, facts, shares, name):
    """Puts the tables between the marks of this name in a page."""
    text, begin = Path(page).read_text(encoding="utf-8"), BEGIN.format(name)
    if begin not in text or END not in text:
        raise ValueError(f"--page has no lines {begin} and {END}, between which the table goes.")
    new = f"{begin}\n{page_table(table, facts, shares)}{END}"
    text = re.sub(re.escape(begin) + ".*?" + re.escape(END), lambda _: new, text, flags=re.S)
    Path(page).write_text(text, encoding="utf-8")


def panels(names):
    """{title: names of lines}: methods on the dense model by `GROUPS`, then those with weights of their own."""
    found = {title: [] for title in (*GROUPS, "other weights")}
    for name in names:
        method = name.partition(",")[0]
        own = any(mark in name for mark in OWN_WEIGHTS)
        title = next((title for title, some in GROUPS.items() if method in some and not own), "other weights")
        found[title].append(name)
    return {title: some for title, some in found.items() if some}


def plot(path, table):
    """Accuracy against layer-averaged tokens with intervals: a panel for each group, a line for each method, and ours
    and all tokens in every panel."""
    points = {}
    for line in table:
        name = "withdraw, after each layer" if line["method"].startswith("withdraw") else line["method"]
        points.setdefault(name, {})[round(line["layer_average"], 4)] = line
    groups = panels(name for name in points if name not in (ALL, OURS))
    columns = min(3, len(groups))
    figure = Figure(figsize=(5 * columns, 4.2 * -(-len(groups) // columns)), layout="constrained")
    axes = [*figure.subplots(-(-len(groups) // columns), columns, sharex=True, sharey=True, squeeze=False).flat]
    for axis, (title, names) in zip(axes, groups.items(), strict=False):
        shift = 0.94 ** (len(names) / 2)  # bars of one budget stand side by side
        for name, colour in zip(names, COLOURS, strict=False):
            _line(axis, name, points[name], colour, shift, linewidth=1.2, elinewidth=0.8)
            shift /= 0.94
        _line(axis, OURS, points[OURS], "#c1121f", 1.0, linewidth=2.5, zorder=3)
        if ALL in points:
            (whole,) = points[ALL].values()
            axis.axhline(100 * whole["accuracy"], color="0.3", linestyle=":", label=f"{ALL} (trained dense)")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 100)  # room for the legend
        axis.set_xscale("log")
        ticks = [3, 5, 10, 20, 30, 50, 100]
        axis.set_xticks(ticks, [f"{tick} %" for tick in ticks])
        axis.minorticks_off()
        axis.tick_params(labelbottom=True)
        axis.legend(fontsize=7, loc="lower right")
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    figure.supxlabel("visual tokens, mean over the decoder's layers")
    figure.supylabel("questions answered right, %")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _line(axis, name, at_shares, colour, shift, **style):
    shares = sorted(at_shares)
    value, low, high = ([100 * at_shares[share][n] for share in shares] for n in ("accuracy", "low", "high"))
    sides = [[v - x for v, x in zip(value, low, strict=True)], [x - v for v, x in zip(value, high, strict=True)]]
    axis.errorbar(
        [100 * share * shift for share in shares], value, sides, color=colour, capsize=2, label=name, **style
    )
