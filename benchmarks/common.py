"""Arguments, clocks, the table and the JSON of all benchmarks."""

import argparse
import json
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


# options of the benchmarks that put questions to a trained model
QUESTIONS = {
    "model": {"required": True, "metavar": "DIR", "help": "folder or Hub id of a Photon model"},
    "data": {"required": True, "metavar": "FILE", "help": "questions, .jsonl"},
    "limit": {"type": int, "help": "only so many questions"},
    "cache_dir": {"metavar": "FOLDER", "help": "keep preprocessed scans in this folder"},
}


def arguments(description, presets, **options):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=presets, default=presets[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write device, date, rows and ratios here too")
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    return parser.parse_args()


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    return f"{cpu}, {torch.get_num_threads()} threads"


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(functions, device, repeats):
    """{name: median seconds} of each function. They take turns, so that a slow moment of the machine slows all."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
        print(f"\r{repeat}/{repeats}", end="", file=sys.stderr)
    print("\r", end="", file=sys.stderr)
    return {name: statistics.median(values) for name, values in times.items()}


def report(device, rows, ratios, file=None, **facts):
    """Print rows (name to number of each) as a table, then the ratios; write both with device, date and facts."""
    columns = list(rows[0]) if rows else []
    widths = [max(len(column), *(len(_text(row[column])) for row in rows)) for column in columns]
    for line in (dict(zip(columns, columns, strict=True)), *rows) if rows else ():
        cells = zip(columns, widths, strict=True)
        print(
            "  ".join(_text(line[c]).ljust(w) if i == 0 else _text(line[c]).rjust(w) for i, (c, w) in enumerate(cells))
        )
    for name, value in ratios.items():
        print(f"{name} = {value:.3f}")
    if file:
        result = {"device": device_name(device), "date": date.today().isoformat(), **facts}
        result |= {"rows": rows, "ratios": ratios}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n")


def _text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
