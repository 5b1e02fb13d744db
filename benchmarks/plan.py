"""What training and answering will need: memory and time for a model, a batch and a number of GPUs.

    python benchmarks/plan.py --preset 3b --batch 4 --scans 1 --gpus 8 --vision-rate 200 --decoder-rate 300
    python benchmarks/plan.py --preset cpu --measured benchmarks/results/efficiency_cpu.json

The rates are TFLOP/s that a GPU reaches. With `--measured` they are those of six rows of `efficiency.py`'s JSON
(`CALIBRATED` says what each gives), all other rows are predicted, and the table says by how much each is missed. No
figure of memory is calibrated. `cost/planning.py` has the rules.
Each GPU takes `--batch` questions a step; with `--shard` the GPUs share out weights, gradients and states (ZeRO-3,
FSDP). The exchange of gradients is not counted: it runs beside the way back where the link is fast enough.
"""

import json
import math
from pathlib import Path

import torch
from cost.counting import Work
from cost.planning import STEP_RUNS, Plan, Rates
from cost.presets import PRESETS

from common import arguments, report

CALIBRATED = {  # row of the result: what is taken from it
    "prefill 100%": "the decoder's rate",
    "dense": "the vision tower's rate; from a further token, the time of a pass",
    "further select": "the time of a cut and of a call, of which this row has the largest share",
    "dense x16": "the time of new memory",
    "full dense": "a step's time over its operations'",
    "lora dense": "the adapters' rate",
}
KINDS = {"video": "video", "dense": "dense", "L/4-1": "hard", "front": "front"}
REUSED = {"exact": ("hard", 0.39, "exact"), "front": ("front", 0.10, "exact"), "select": ("hard", 0.39, "select")}
GIB, MIB = 2**30, 2**20
CLOSE = 0.15


def rates_of(plan, result):
    """`Rates` from the calibrated rows of a result of efficiency.py."""
    rows, steps = ({row[key]: row for row in result[name]} for key, name in (("case", "rows"), ("step", "training")))
    first = {name: row["first token s"] for name, row in rows.items()}
    _, prompt, work = plan.of("dense")
    fixed, batch = 1 / rows["dense"]["tokens/s"], rows["dense x16"]["batch"]
    vision = work.encoder(prompt.grid).total / (first["dense"] - first["prefill 100%"])
    rates = Rates(vision, work.prefill(prompt) / (first["prefill 100%"] - fixed), fixed=fixed)
    _, further = plan.further_seconds(rates, "hard", rows["further select"]["kept"], "select")
    rates.cut = max(first["further select"] - further, 0.0)
    new = plan.new_memory("dense", None, batch, batch)
    if new:
        rates.new = max(first["dense x16"] - plan.answer_seconds(rates, "dense", batch=batch), 0.0) / new
    rates.step = steps["full dense"]["s"] / plan.step_seconds(rates, "dense")
    rank = plan.settings["rank"]
    over = steps["lora dense"]["s"] - plan.step_seconds(
        rates, "dense", rank=rank
    )  # adapters without time of their own
    operations = STEP_RUNS * Work(plan.config, work.below - 1, rank=rank).decoder(plan.of("dense", True)[1]).adapters
    rates.adapters = operations / over if over > 0 else math.inf
    return rates


def predictions(plan, rates, result):
    """[(what, unit, predicted, measured)] of every row that the rates were not taken from."""
    found = []
    for row in result["rows"]:
        name, batch = row["case"], row["batch"]
        if name in CALIBRATED:
            continue
        first, *rest = name.split()
        if first == "prefill":
            _, prompt, work = plan.of("hard")
            seconds = rates.seconds(work.prefill(prompt, row["kept"]), 0.0, cut=True)
        elif first in KINDS:
            kept = None if first in ("video", "dense") else row["kept"]
            seconds = plan.answer_seconds(rates, KINDS[first], kept, batch)
        else:
            kind, _, reuse = REUSED[rest[0]]
            encoding, further = plan.further_seconds(rates, kind, row["kept"], reuse, batch)
            seconds = {"encode": encoding, "further": further, "sixteen": encoding + further}[first]
        found.append((name, "s", seconds, row["first token s"]))
    for row in result["training"]:
        part, name = row["step"].split()
        rank = plan.settings["rank"] if part == "lora" else 0
        kind = name if name in ("video", "dense") else "hard"
        prompt = plan.of(kind)[1]
        many = {"apart": (row["questions"], row["questions"]), "grouped": (1, row["questions"])}.get(name, (1, 1))
        options = {"kept": prompt.kept(0.39), "scans": many[0], "questions": many[1]}
        if row["step"] not in CALIBRATED:
            seconds = plan.step_seconds(rates, kind, rank=rank, **options)
            found.append((row["step"], "s", seconds, row["s"]))
        if row["activations MiB"]:
            found.append((row["step"], "MiB", plan.activations(kind, **options) / MIB, row["activations MiB"]))
    return found


def check(plan, file, json_file):
    """Prints predicted beside measured."""
    result = json.loads(Path(file).read_text(encoding="utf-8"))
    found = predictions(plan, rates_of(plan, result), result)
    rows = [
        {"what": what, "unit": unit, "predicted": predicted, "measured": measured, "off": predicted / measured - 1}
        for what, unit, predicted, measured in found
    ]
    ratios = {}
    for unit, name in (("s", "time"), ("MiB", "memory")):
        off = [abs(row["off"]) for row in rows if row["unit"] == unit]
        ratios |= {f"{name}_within_15": sum(value <= CLOSE for value in off) / len(off), f"{name}_worst": max(off)}
    facts = {"measured_on": result["device"], "measured": result["date"], "calibrated": CALIBRATED}
    report(torch.device("cpu"), rows, ratios, json_file, **facts)


def forecast(plan, options, rates):
    """Prints what a step and answers need."""
    scans, kept = options.scans or options.batch, plan.of("hard")[1].kept(options.keep)
    rows = []
    for kind, rank in (("full", 0), ("lora", plan.settings["rank"])):
        share = options.gpus if options.shard else 1
        memory = {name: value / share / GIB for name, value in plan.held(rank).items()}
        memory["activations"] = plan.activations("hard", kept, scans, options.batch) / GIB
        seconds = plan.step_seconds(rates, "hard", kept, scans, options.batch, rank)
        rows.append(
            {"training": kind, **{f"{name} GiB": value for name, value in memory.items()},
             "GiB a GPU": sum(memory.values()), "s a step": seconds,
             "questions/s": options.batch * options.gpus / seconds}
        )  # fmt: skip
    report(torch.device("cpu"), rows, {})
    encoding, further = plan.further_seconds(rates, "hard", kept)
    alone = plan.answer_seconds(rates, "hard", kept)
    report(torch.device("cpu"), [{"answers": "s", "a question": alone, "encoding": encoding, "further": further}], {})


def main():
    options = arguments(
        __doc__,
        list(PRESETS),
        measured={"type": Path, "metavar": "FILE", "help": "JSON of efficiency.py of this preset"},
        batch={"type": int, "default": 1, "help": "questions a GPU and step"},
        scans={"type": int, "help": "on so many scans; default: each on its own"},
        gpus={"type": int, "default": 1},
        shard={"action": "store_true", "help": "weights, gradients and states are shared out over the GPUs"},
        keep={"type": float, "default": 0.39, "help": "share of the visual tokens"},
        vision_rate={"type": float, "default": 150.0, "help": "TFLOP/s of the vision tower"},
        decoder_rate={"type": float, "default": 300.0, "help": "TFLOP/s of the decoder"},
        bytes={"type": int, "default": 2, "help": "of a number: 2 for bfloat16, 4 for float32"},
    )
    if options.measured:
        size = 2 if json.loads(options.measured.read_text(encoding="utf-8"))["dtype"] == "bfloat16" else 4
        return check(Plan(PRESETS[options.preset], size), options.measured, options.json)
    rates = Rates(options.vision_rate * 1e12, options.decoder_rate * 1e12)
    forecast(Plan(PRESETS[options.preset], options.bytes), options, rates)


if __name__ == "__main__":
    main()
