"""Scans of a data set per second against processes, beside what inflating alone allows; and memory over many scans.

    python benchmarks/archive.py --preset small                 # 24 scans of 256 x 256 x 60
    python benchmarks/archive.py --preset full --json out.json  # 24 scans of 512 x 512 x 150, as in a hospital
    python benchmarks/archive.py --preset memory                # 2,000 tiny scans

Every scan is read from .nii.gz, resampled, and kept in a new folder of preprocessed scans, as by prepare_hf.py.
Inflating alone uses the same library in as many processes. Times are from the first result to the last, so that the
start of the processes does not count. Memory is the sum over all processes.

ratios: share_of_inflating (1 is the limit), speedup_of_cores, memory_growth (over the second half of the scans; 0 is
flat).
"""

import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from common import arguments, report
from photon.archive.audit import Audit
from photon.archive.listing import list_scans
from photon.archive.pool import in_processes
from photon.processing_photon import PhotonVolumeProcessor
from photon.scan_files_photon import fast_gzip
from reading import phantom

PRESETS = {"small": (24, (60, 256, 256)), "full": (24, (150, 512, 512)), "memory": (2000, (16, 40, 48))}
TINY = {"grid": (28, 56, 56), "spacing": (6.0, 6.0, 6.0)}


def make_inflater(*_):
    """Inflates a scan and does nothing else."""

    def inflate(source):
        buffer = bytearray(1 << 20)
        with fast_gzip.open(source["path"], "rb") as stream:
            while stream.readinto(buffer):
                pass

    return inflate


def write_scans(folder, count, shape):
    """Scans of equal voxels except for one, so that each has its own entry; deflated once."""
    image = phantom(shape)
    for number in range(count):
        image[0, 0, 0] = -1000 + number % 1000
        image.SetOrigin((float(number), -170.0, -500.0))
        sitk.WriteImage(image, folder / f"{number:05d}.nii.gz", True, 1)


def rate(results, on_result=lambda number: None):
    """Results per second, from the first to the last."""
    times = []
    for number, _ in enumerate(results):
        times.append(time.perf_counter())
        on_result(number)
    return (len(times) - 1) / (times[-1] - times[0])


def memory():
    """Resident bytes of this process and its workers."""
    pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return total


def speed(scans, settings, folder, most):
    rows, counts = [], sorted({1, *(2**i for i in range(1, 8) if 2**i < most), most})
    for workers in counts:
        audit = Audit(scans, settings, folder / f"cache{workers}")
        ours = rate(audit.run(workers))
        limit = rate(in_processes(make_inflater, (), (scan.source for scan in scans), workers))
        rows.append(
            {"name": f"{workers} processes", "scans_per_s": round(ours, 3), "inflating_alone": round(limit, 3)}
        )
    last, first = rows[-1], rows[0]
    return rows, {
        "share_of_inflating": last["scans_per_s"] / last["inflating_alone"],
        "speedup_of_cores": last["scans_per_s"] / first["scans_per_s"],
    }


def growth(scans, settings, folder, workers):
    audit, rows, marks = Audit(scans, settings, folder / "cache"), [], np.linspace(0, len(scans), 11)[1:]

    def on_result(number):
        if number + 1 in marks:
            rows.append({"name": f"after {number + 1} scans", "megabytes": round(memory() / 1e6, 1)})

    per_second = rate(audit.run(workers), on_result)
    half, end = rows[len(rows) // 2 - 1]["megabytes"], rows[-1]["megabytes"]
    return rows, {"memory_growth": end / half - 1, "scans_per_s": per_second}


def main():
    args = arguments(__doc__, list(PRESETS), workers={"type": int, "default": os.cpu_count()})
    count, shape = PRESETS[args.preset]
    processor = PhotonVolumeProcessor(**(TINY if args.preset == "memory" else {}))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "scans").mkdir()
        write_scans(folder / "scans", count, shape)
        scans = list_scans(folder / "scans")
        run = growth if args.preset == "memory" else speed
        rows, ratios = run(scans, processor.settings, folder, args.workers)
    print(f"{count} scans of {shape[2]} x {shape[1]} x {shape[0]} int16")
    report(torch.device("cpu"), rows, ratios, args.json, inflater=fast_gzip.__name__, processes=args.workers)


if __name__ == "__main__":
    main()
