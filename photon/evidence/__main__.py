"""Trains the arms of `arms.py` from answers alone, measures them, and writes the tables of docs/evidence.md.

    python -m photon.evidence --output evidence                       everything; hours on a CPU (make evidence)
    python -m photon.evidence --output evidence --arms exact release  some arms
    python -m photon.evidence --output /tmp/smoke --preset smoke      the same in small, two minutes

Stopped, it goes on where it was: data, trainings and measures that are there are not made again. Each arm's records
lie in OUTPUT/ARM-SEED/records.json, those of the preset nine in OUTPUT/nine/ARM-SEED. Without `--report` nothing
outside OUTPUT is written.
"""

import argparse
import json
import sys
from pathlib import Path

from photon.evidence.arms import ARMS
from photon.evidence.measuring import CONTROLS, measure
from photon.evidence.report import arm_table, plot, result_of, signals, tables_of, write_tables
from photon.evidence.trainings import PRESETS, ROOT, make_data, run_folder, seconds_of, test_rows, train, turned
from photon.run_folder import write_whole

REPORTS = {"full": "evidence.json", "nine": "evidence_nine.json"}  # presets, and where their figures go
ROOT_ROWS = 1000  # questions of all tasks, for the model of this repository


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of data, trainings and records")
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], metavar="ARM", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="only these of each arm")
    parser.add_argument("--finished", action="store_true", help="only what has been trained and measured")
    parser.add_argument(
        "--report", action="store_true", help="write the figures to benchmarks/results and docs/evidence.md"
    )
    args = parser.parse_args(argv)
    if args.report and args.preset not in REPORTS:
        parser.error(f"--report is for the presets {' and '.join(REPORTS)}; {args.preset} is too small to tell")
    return args


def jobs(args, preset):
    """(arm, seed) in turn: first one seed of every arm, then the next."""
    chosen = [arm for arm in ARMS if arm.name in (args.arms or preset.arms or [a.name for a in ARMS])]
    seeds = range(max((min(arm.seeds, preset.seeds) for arm in chosen), default=0))
    return [
        (arm, seed)
        for seed in seeds
        for arm in chosen
        if seed < arm.seeds and (args.seeds is None or seed in args.seeds)
        if not args.finished or (run_folder(args.output, arm.name, seed, preset) / "records.json").is_file()
    ]


def rows_of(name):
    """The rows of a committed result, or `None`."""
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else None


def report(result, name, folder):
    """Writes the result and the tables of a preset, and of "full" also the plot and the model of this repository."""
    results, page = ROOT / "benchmarks" / "results", ROOT / "docs" / "evidence.md"
    if name == "full":
        rows = test_rows(folder, ROOT_ROWS)
        result["root"] = signals(measure(ROOT, rows, folder / "cache", folder / "root" / "records.json", ("other",)))
        plot(result, ROOT / "docs" / "evidence.png")
        tables = tables_of(result, rows_of("surrogate"), rows_of("organs"))
    else:
        tables = {name: arm_table(result, None)}
    write_whole(results / REPORTS[name], json.dumps(result, indent=1) + "\n")
    write_tables(tables, page)


def main(argv=None):
    args = parse(argv)
    preset, folder = PRESETS[args.preset], args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make_data(folder, preset)
    rows, found, asked = test_rows(folder, preset.rows, preset.tasks), {}, jobs(args, preset)
    for number, (arm, seed) in enumerate(asked, start=1):
        print(f"{number} of {len(asked)}: {arm.name}, seed {seed}", file=sys.stderr)
        final = train(folder, arm, seed, preset)
        controls = CONTROLS if seed == 0 and arm.method is None else ()
        asked_rows = [turned(row) for row in rows] if arm.question_first else rows
        file = final.parent / "records.json"
        records = measure(final, asked_rows, folder / "cache", file, controls, arm.dense, arm.method, arm.kept)
        found.setdefault(arm.name, []).append((records, seconds_of(final.parent)))
    result = result_of(found, preset)
    write_whole(folder / preset.runs / "evidence.json", json.dumps(result, indent=1) + "\n")
    print("\n\n".join(tables_of(result).values()))
    if args.report:
        report(result, args.preset, folder)


if __name__ == "__main__":
    main()
