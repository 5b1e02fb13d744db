"""How time grows with the scan's volume and with the questions on it."""

from .answers import FRONT, MAIN, REUSED
from .models import text_of
from .presets import prompt_of
from .timing import answer, prefill

PREFILLED = 0.10  # share of the tokens, cut at L/4 - 1
LINES = {"dense": ("quarter", None), "L/4-1": ("quarter", MAIN), "front": ("front", FRONT)}
COUNTS = (1, 2, 4, 8, 16, 32)
REPEATS = 3  # of what is quick


def by_volume(bench):
    """Seconds to the first token by the scan's visual tokens, of whole prompts and of further questions, of prefill,
    and their operations. Beyond `measured` tokens of the preset (prefill: `prefilled`) operations are counted, and
    nothing is timed."""
    rows, slab = [], len(bench.patches) // bench.prompt.grid[0]
    for tokens in bench.settings["growth"]:
        slabs = max(1, tokens * bench.prompt.grid[0] // bench.prompt.visual)
        prompt = prompt_of(bench.settings, bench.config, (slabs, *bench.prompt.grid[1:]))
        timing, row = prompt.visual <= bench.settings["measured"], {"tokens": prompt.visual}
        inputs = bench.inputs(1, prompt, bench.patches[:slab].repeat(slabs, 1)) if timing else None
        for name, (which, share) in LINES.items():
            kept, work = None if share is None else prompt.kept(share), bench.work[which]
            seconds = _seconds(getattr(bench.models, which), bench, inputs, kept) if timing else ("", "")
            row[f"{name} GFLOP"], row[f"{name} s"] = work.whole(prompt, kept) / 1e9, seconds[0]
            if kept is not None:
                row[f"{name} further GFLOP"], row[f"{name} further s"] = work.further(prompt, kept) / 1e9, seconds[1]
        for share in (1.0, PREFILLED):
            kept, name = None if share == 1 else prompt.kept(share), f"prefill {share:.0%}"
            row[f"{name} GFLOP"] = bench.work["quarter"].prefill(prompt, kept) / 1e9
            timing = prompt.visual <= bench.settings["prefilled"]
            row[f"{name} s"] = bench.clock.time(prefill(bench, prompt, kept)) if timing else ""
        rows.append(row)
    return rows


def _seconds(model, bench, inputs, kept):
    """Of a question on its own, and of a further one."""
    options = {"use_scheduler": False} if kept is None else {"token_budget": kept}
    alone = answer(model, bench.clock, 1, **inputs, **options)[0]
    if kept is None:
        return alone, ""
    options["scan"] = model.encode_scan(**inputs)
    return alone, min(answer(model, bench.clock, 1, **text_of(inputs), **options)[0] for _ in range(REPEATS))


def by_questions(answers):
    """Seconds a question by the questions on a scan, asked one after the other: from the measured encoding, further
    question and question on its own."""
    rows = []
    for count in COUNTS:
        row = {"questions": count}
        for name, (*_, alone) in REUSED.items():
            encoding, further = (answers.cases[f"{part} {name}"].seconds for part in ("encode", "further"))
            row[f"{name} s"], row[f"{name} apart s"] = encoding / count + further, answers.cases[alone].seconds
        rows.append(row)
    return rows


def plot(volumes, questions, file):
    """Both, as one picture. volumes, questions: rows of the two. What was not timed is drawn by its operations, at the
    rate of the largest volume that was."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_tokens, by_count = figure.subplots(1, 2)
    for name, style in (("dense", "k-"), ("L/4-1", "C0-"), ("front", "C1-"), ("L/4-1 further", "C0--"),
                        ("front further", "C1--"), ("prefill 100%", "k:"), ("prefill 10%", "C0:")):  # fmt: skip
        points = [(row["tokens"], row[f"{name} s"]) for row in volumes if row[f"{name} s"]]
        by_tokens.loglog(*zip(*points, strict=True), style, marker=".", label=name)
        last = next(row for row in reversed(volumes) if row[f"{name} s"])
        rate = last[f"{name} s"] / last[f"{name} GFLOP"]
        counted = [(row["tokens"], rate * row[f"{name} GFLOP"]) for row in volumes if not row[f"{name} s"]]
        if counted:
            by_tokens.loglog(*zip(*counted, strict=True), f"{style.rstrip('-:')}o", fillstyle="none")
    by_tokens.plot([], [], "ko", fillstyle="none", label="by operations, not measured")
    by_tokens.set(xlabel="visual tokens of the scan", ylabel="seconds to the first token")
    by_tokens.set_xticks([row["tokens"] for row in volumes], [f"{row['tokens']:,}" for row in volumes])
    by_tokens.minorticks_off()
    by_tokens.set_ylim(top=30 * by_tokens.get_ylim()[1])  # room for the legend
    counts = [row["questions"] for row in questions]
    for name, colour in (("exact", "C0"), ("front", "C1"), ("select", "C2")):
        by_count.loglog(counts, [row[f"{name} s"] for row in questions], f"{colour}-", marker=".", label=name)
        if name != "select":
            alone = [row[f"{name} apart s"] for row in questions]
            by_count.loglog(counts, alone, f"{colour}:", label=f"{name}, each on its own")
    by_count.set(xlabel="questions on one scan", ylabel="seconds a question")
    for axes, columns in ((by_tokens, 2), (by_count, 1)):
        axes.legend(fontsize=8, ncols=columns)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
