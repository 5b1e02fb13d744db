"""From a .nii.gz on disk to the model's grid: this project, the release's pipeline, and what physics asks for.

    python benchmarks/reading.py --preset small                  # 256 x 256 x 120, seconds
    python benchmarks/reading.py --preset full --json out.json   # 512 x 512 x 300 int16, as in a hospital

Rows are best of `--repeats`, all in one process on one file, by turns. The limits: inflating the file once, with the
same library as the reader, and one linear interpolation of the target grid from voxels in memory. Memory is the
growth of the peak of a fresh process that reads the scan, over the size of the raw voxels.

ratios: speedup_vs_release (higher is better), time_vs_limit (1 is perfect), time_vs_whole (this project against the
same path without interpolating while inflating; lower is better), peak_vs_scan.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from common import arguments, report
from photon import scan_nifti_photon
from photon.scan_grid_photon import Geometry, interpolate_linear, model_grid
from photon.scan_intensity_photon import intensity_window, scale_in_place
from photon.scan_reader_photon import read_on_grid, read_volume

PRESETS = {"small": (120, 256, 256), "full": (300, 512, 512)}  # slices, rows, columns
SIZE, SPACING = (140, 280, 280), (364 / 140, 364 / 280, 364 / 280)
AIR = -1000


def phantom(shape) -> sitk.Image:
    """A body of organs with a scanner's noise, which deflates about as badly as a real CT."""
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in shape], indexing="ij", sparse=True)
    array = np.full(shape, AIR, np.float32)
    array[(x / 0.8) ** 2 + (y / 0.6) ** 2 + 0 * z < 1] = 40
    for _ in range(40):
        cx, cy, cz = rng.uniform(-0.5, 0.5, 3)
        array[(x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 < rng.uniform(0.05, 0.2) ** 2] = rng.uniform(-900, 900)
    array += rng.normal(0, 12, shape).astype(np.float32)
    image = sitk.GetImageFromArray(array.astype(np.int16))
    image.SetSpacing((0.75 * 512 / shape[2], 0.75 * 512 / shape[1], 1.0 * 300 / shape[0]))
    image.SetOrigin((-190.0, -170.0, -500.0))
    return image


def ours(path) -> np.ndarray:
    return read_on_grid(path, size=SIZE, spacing=SPACING, scaling="minmax")[0]


def whole(path) -> np.ndarray:
    """The same to the bit, with the whole scan inflated before it is interpolated."""
    image = read_volume(path)
    window = intensity_window(image)
    grid = model_grid(Geometry.of(image), size=SIZE, spacing=SPACING)
    return scale_in_place(interpolate_linear(image, grid, window=window, outside=window[0]), window, "minmax")


def release(path) -> np.ndarray:
    """Orient, 1 mm, crop or pad to 364^3, clip, resize, min-max, flip: the steps its README and template name."""
    image = sitk.DICOMOrient(sitk.Cast(sitk.ReadImage(path), sitk.sitkFloat32), "RAI")
    size = [max(1, round(n * s)) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    shift = np.array(image.GetDirection()).reshape(3, 3) @ [(1 - s) / 2 for s in image.GetSpacing()]
    origin = (np.array(image.GetOrigin()) + shift).tolist()
    image = sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, origin, (1, 1, 1), image.GetDirection(), float(AIR)
    )
    array = sitk.GetArrayFromImage(image)
    spare = [364 - n for n in array.shape]
    array = np.pad(array, [(max(0, s) // 2, max(0, s) - max(0, s) // 2) for s in spare], constant_values=AIR)
    array = array[tuple(slice(max(0, -s) // 2, max(0, -s) // 2 + 364) for s in spare)]
    x = torch.from_numpy(np.clip(array, -1000, 1000))[None, None]
    x = torch.nn.functional.interpolate(x, SIZE, mode="trilinear", align_corners=False)[0, 0]
    x = (x - x.min()) / (x.max() - x.min())
    return x.flip(-1).numpy()


def inflate(path, opener) -> None:
    """In a thread of its own: ISA-L leaves its thread in a state in which other libraries take twice as long."""

    def job() -> None:
        buffer = bytearray(1 << 20)
        with opener(path, "rb") as stream:
            while stream.readinto(buffer):
                pass

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()


def interpolate(image: sitk.Image, grid) -> None:
    """One linear interpolation of the target grid, and nothing else."""
    sitk.Resample(
        image, grid.size, sitk.AffineTransform(3), sitk.sitkLinear, grid.origin, grid.spacing, grid.direction,
        float(AIR), sitk.sitkFloat32,
    )  # fmt: skip


def best(jobs: dict, repeats: int) -> dict:
    times = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():  # by turns, so that a busy moment of the machine hits all
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def peak(path) -> int:
    """Bytes by which the peak of a fresh process grows when it reads the scan to the grid; 0 where not measured."""
    if not Path("/proc/self/status").exists():
        return 0
    command = [sys.executable, __file__, "--peak-of", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def print_peak(path) -> None:
    ours(_warm_up_file(path))
    before = _memory("VmRSS")
    ours(path)
    print(_memory("VmHWM") - before)


def _memory(name: str) -> int:
    """Of this process, in bytes. Not `ru_maxrss`: on Linux a child inherits that from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _warm_up_file(path) -> Path:
    """A small scan, so that libraries and threads are loaded before memory is measured; the target grid is too."""
    small = Path(path).with_name("warm.nii.gz")
    sitk.WriteImage(phantom((40, 48, 56)), small)
    return small


def main() -> None:
    args = arguments(__doc__, list(PRESETS), repeats={"type": int, "default": 3}, peak_of={"help": argparse.SUPPRESS})
    if args.peak_of:
        return print_peak(args.peak_of)
    shape = PRESETS[args.preset]
    with tempfile.TemporaryDirectory() as folder:
        path, image = Path(folder) / "scan.nii.gz", phantom(shape)
        sitk.WriteImage(image, path)
        grid = model_grid(Geometry.of(image), size=SIZE, spacing=SPACING)
        difference = np.abs(ours(path) - release(path)).mean()
        jobs = {
            "this project": lambda: ours(path),
            "this project, inflated first": lambda: whole(path),
            "the release": lambda: release(path),
            "limit: inflate once": lambda: inflate(path, scan_nifti_photon.fast_gzip.open),
            "limit: interpolate once": lambda: interpolate(image, grid),
        }
        seconds, memory, packed = best(jobs, args.repeats), peak(path), path.stat().st_size
    raw = int(np.prod(shape)) * 2
    limit = seconds["limit: inflate once"] + seconds["limit: interpolate once"]
    ratios = {
        "speedup_vs_release": seconds["the release"] / seconds["this project"],
        "time_vs_limit": seconds["this project"] / limit,
        "time_vs_whole": seconds["this project"] / seconds["this project, inflated first"],
        "peak_vs_scan": memory / raw,
    }
    rows = [{"name": name, "seconds": round(value, 4)} for name, value in seconds.items()]
    print(f"{shape[2]} x {shape[1]} x {shape[0]} int16, {raw / 1e6:.0f} MB, {packed / 1e6:.0f} MB deflated")
    inflater = scan_nifti_photon.fast_gzip.__name__
    report(torch.device("cpu"), rows, ratios, args.json, inflater=inflater)
    print(f"mean difference to the release {difference:.4f} of the input range; inflater: {inflater}")


if __name__ == "__main__":
    main()
