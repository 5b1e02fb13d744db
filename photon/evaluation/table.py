"""Scores as a table for people."""

import math


def table(scores):
    """Scores as markdown, in per cent: a line for each task, the baselines beneath, then the subtasks."""
    draws = scores["resampling"]
    lines = [
        f"{scores['benchmark']}: {scores['questions']} questions, {scores['patients']} patients, "
        f"{scores['empty']} empty answers. In brackets 95 % by {draws['resamples']} draws of patients.",
        "",
        "| task | questions | figure | value |",
        "|---|---|---|---|",
    ]
    for name, figure in (scores["overall"] or {}).items():
        lines.append(f"| all | {scores['questions']} | {name} | {_percent(figure)} |")
    for task, entry in scores["tasks"].items():
        lines += [
            f"| {task} | {entry['questions']} | {name} | {_percent(f)} |" for name, f in entry["figures"].items()
        ]
        if entry.get("read", 1) < 1:
            lines.append(f"| {task} | {entry['questions']} | answers read as a choice | {100 * entry['read']:.2f} |")
    closed = {task: entry["baselines"] for task, entry in scores["tasks"].items() if entry.get("baselines")}
    if closed:
        lines += [
            "",
            "| task | without a scan | fitted on | accuracy macro | micro | balanced |",
            "|---|---|---|---|---|---|",
        ]
    for task, found in closed.items():
        for b in found:
            values = [_percent({"value": b[k]}) for k in ("accuracy_macro", "accuracy_micro", "balanced_accuracy")]
            letter = f" ({b['letter']})" if "letter" in b else f" ({b['seen_by']})" if "seen_by" in b else ""
            lines.append(f"| {task} | {b['name']}{letter} | {b['fitted_on']} | {' | '.join(values)} |")
    lines += ["", "| task | subtask | questions | figures |", "|---|---|---|---|"]
    for task, entry in scores["tasks"].items():
        for subtask, part in entry["subtasks"].items():
            shown = ", ".join(f"{name} {_percent(f)}" for name, f in part.items() if name != "questions")
            lines.append(f"| {task} | {subtask} | {part['questions']} | {shown} |")
    for entry in ((scores["authors"] or {}).get("tasks") or {}).values():
        if entry.get("bertscore_left_out"):
            lines += ["", f"BERTScore was left out: {entry['bertscore_left_out']}."]
            break
    return "\n".join(lines)


def _percent(figure):
    if figure["value"] is None or math.isnan(figure["value"]):
        return "-"
    text = f"{100 * figure['value']:.2f}"
    if figure.get("low") is None:
        return text
    return f"{text} [{100 * figure['low']:.2f}, {100 * figure['high']:.2f}]"
