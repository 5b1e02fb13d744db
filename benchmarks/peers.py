"""Every selection method on the same questions, at equal kept tokens and at equal layer-averaged tokens.

    python benchmarks/peers.py                                  # smoke: the tiny model on a few phantoms, two minutes
    python benchmarks/peers.py --preset full --dense DIR --trained DIR --data test.jsonl --rows 400

    python benchmarks/peers.py --preset full ... --methods random fastv --tasks presence side    # a part of it

--dense is a model that was trained on all tokens: methods that need no training choose among its tokens. --trained is
ours, trained with the cut. --peer NAME=DIR adds a model that `train_hf.py --scheduler NAME` has trained. Answers go to
--output as they come, and the same command goes on where it was stopped. A scan is read and encoded once for all
methods of a model. At the end --json gets the figures, --page the table between its marks, and --plot the picture.
"""

import json
import random
from collections import Counter
from contextlib import ExitStack
from datetime import date
from itertools import zip_longest
from pathlib import Path

import torch
from cost.timing import CLOCKS, Clock

from common import ROOT, arguments, device_name, report
from peers_arms import arms_of
from peers_report import figures, plot, write_page
from peers_run import run_model
from photon.evaluation.questions import load_benchmark
from photon.evaluation.run import fingerprint
from photon.loading import load_config
from photon.phantoms.dataset import DataConfig, write_data_set
from photon.run_folder import RunError, open_run
from photon.schedulers import SCHEDULERS

FILE = "answers.jsonl"
FEW = 4  # questions of a patient: more patients make narrower intervals than more questions
PRESETS = {
    "smoke": {"shares": (0.3, 0.05), "seeds": 2, "rows": 6},
    "full": {"shares": (0.5, 0.3, 0.2, 0.1, 0.05, 0.03), "seeds": 5, "rows": 400},
}
SEED = 2026  # of patients that are made now: not those of the tiny model's training


def questions(file, count, tasks=None, seed=0):
    """`count` rows of a file, with the paths of label maps: at most `FEW` of a patient, on the same scans, and of all
    tasks as evenly as patients have them; drawn by the seed."""
    rows, few = load_benchmark("jsonl", file), max(1, min(FEW, count // 2))  # of two patients at least
    rows = [row for row in rows if tasks is None or row["task"] in tasks]
    extra = {}
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        paths = {n: [str(Path(file).parent / p) for p in record.get(n) or ()] for n in ("labels", "lesions")}
        extra[record["id"]] = paths | {"evidence": record.get("evidence")}
    patients, chosen, taken = {}, [], Counter()
    for row in random.Random(seed).sample(rows, len(rows)):
        patients.setdefault(row["patient"], []).append(row)
    for asked in patients.values():
        for _ in range(min(few, count - len(chosen))):
            row = min(asked, key=lambda row: taken[row["task"]], default=None)
            if row is not None:
                asked = [other for other in asked if other["volumes"] == row["volumes"] and other is not row]
                taken[row["task"]] += 1
                chosen.append(row)
    known = [row | extra[row["id"]] for row in chosen if row["id"] in extra]
    if len(known) < len(chosen):
        raise RunError("--data has rows without an id; expected the form of python -m photon.phantoms.")
    return sorted(known, key=lambda row: (row["patient"], row["id"]))


def finished(file):
    """{id of a line's first question}; a line that was cut short is taken out of the file."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        file.write_text("".join(whole), encoding="utf-8")
    return {json.loads(line)["ids"][0] for line in whole}


def main():
    options = arguments(
        __doc__,
        [*PRESETS],
        dense={"default": str(ROOT), "metavar": "DIR", "help": "model that was trained on all tokens"},
        trained={"default": str(ROOT), "metavar": "DIR", "help": "our model, trained with the cut"},
        peer={"action": "append", "default": [], "metavar": "NAME=DIR", "help": "model trained with a method"},
        data={"metavar": "FILE", "help": "questions of python -m photon.phantoms, .jsonl; default: made"},
        rows={"type": int, "help": "how many questions"},
        shares={"type": float, "nargs": "+", "metavar": "SHARE", "help": "of the visual tokens, for both budgets"},
        methods={"nargs": "+", "metavar": "NAME", "help": "leave out others than these (a model's own stays)"},
        tasks={"nargs": "+", "metavar": "TASK", "help": "leave out questions of other tasks"},
        output={"type": Path, "metavar": "FOLDER", "help": "answers as they come; default outputs/peers-PRESET"},
        cache_dir={"metavar": "FOLDER", "help": "keep preprocessed scans in this folder"},
        resamples={"type": int, "default": 2000, "help": "draws of patients for intervals"},
        clock={"choices": [*CLOCKS], "default": "wall", "help": "processor: on a CPU that others use too"},
        report={"action": "store_true", "help": "ask nothing more: figures of the questions that all have answered"},
        page={"type": Path, "metavar": "FILE", "help": "write the table between its marks in this page"},
        table={"default": "peers", "metavar": "NAME", "help": "of the marks in --page"},
        plot={"type": Path, "metavar": "PNG", "help": "draw accuracy against layer-averaged tokens"},
    )
    preset = PRESETS[options.preset]
    shares = options.shares or preset["shares"]
    output = options.output or ROOT / "outputs" / f"peers-{options.preset}"
    if options.data is None:
        patients = -(-(options.rows or preset["rows"]) // FEW) + 1  # balancing the answers leaves some questions out
        made, *_ = write_data_set(output / "data", patients, DataConfig(seed=SEED, val=0, test=0))
        options.data = output / "data" / "rows.jsonl"
        options.data.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    rows = questions(options.data, options.rows or preset["rows"], options.tasks)
    sources = {"dense": options.dense, "trained": options.trained, **dict(p.split("=", 1) for p in options.peer)}
    layers = load_config(options.dense).text_config.num_hidden_layers
    original, peers = max(layers // 4 - 1, 0), [*sources][2:]
    unknown = set(options.methods or ()) | set(peers)
    if unknown - set(SCHEDULERS):
        raise RunError(f"There is no method {min(unknown - set(SCHEDULERS))!r}; known are {', '.join(SCHEDULERS)}.")
    arms = arms_of(preset["seeds"], layers, peers, original, options.methods and {*options.methods, *peers})
    digests, files = {name: fingerprint(source, None) for name, source in sources.items()}, {}
    with ExitStack() as stack:
        runs = []
        for name, source in sources.items():  # a folder each: another dense model leaves the answers of ours alone
            mine = [arm for arm in arms if arm.model == name]
            file = files[name] = output / name / FILE
            settings = {
                "model": digests[name],
                "questions": [row["id"] for row in rows],
                "arms": [[arm.name, str(arm.method), str(arm.layer), arm.seed] for arm in mine],
                "shares": shares,
            }
            open_run(file.parent, settings, begun=file.is_file())
            done = finished(file)
            if not options.report:
                stream = stack.enter_context(open(file, "a", encoding="utf-8"))
                clock = Clock(torch.device("cpu"), options.clock)
                runs.append(run_model(name, source, mine, rows, shares, done, stream, options.cache_dir, clock))
        for _ in zip_longest(*runs):
            pass
    texts = [file.read_text(encoding="utf-8") for file in files.values() if file.is_file()]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    of_models = [{i for line in lines if line["model"] == name for i in line["ids"]} for name in sources]
    rows = [row for row in rows if all(row["id"] in answered for answered in of_models)]
    if len({row["patient"] for row in rows}) < 2:
        raise RunError("All models have answered about fewer than two patients yet; leave --report out to go on.")
    table, facts = figures(lines, rows, shares, options.resamples)
    facts |= {"models": digests, "clock": options.clock}
    report(torch.device("cpu"), table, {}, options.json, **facts)
    if options.page:
        facts |= {"date": date.today().isoformat(), "device": device_name(torch.device("cpu"))}
        write_page(options.page, table, facts, shares, options.table)
    if options.plot:
        plot(options.plot, table)


if __name__ == "__main__":
    main()
