"""A report on one scan without patient data: what it is, its faults, and what the model sees of it."""

from dataclasses import asdict, dataclass, field

import numpy as np

from photon.scan_faults_photon import Findings, VolumeError
from photon.scan_files_photon import ReadOptions
from photon.scan_grid_photon import Geometry, model_grid, resample
from photon.scan_intensity_photon import find_modality, intensity_window, scale_intensity
from photon.scan_reader_photon import check_geometry, open_scan, read_voxels, system_errors
from photon.whole_file import whole_file

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None
try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

PERCENTILES = (1, 50, 99)


@dataclass(frozen=True)
class VolumeReport:
    """Outcome of `inspect_volume`; `as_dict()` is JSON, `str()` is for people, `picture(path)` shows three planes."""

    readable: bool  # whether the model gets a volume
    faults: list[dict] = field(default_factory=list)  # fault, level ("refused", "warning" or "note"), message
    geometry: dict | None = None  # of the scan
    intensity: dict | None = None  # of the scan
    model: dict | None = None  # of what the model sees
    planes: dict = field(default_factory=dict, repr=False)  # name: (uint8 (rows, columns), (row mm, column mm))

    def as_dict(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "planes"}

    def __str__(self) -> str:
        lines = ["readable: " + ("yes" if self.readable else "no")]
        for title in ("geometry", "intensity", "model"):
            part = getattr(self, title) or {}
            lines += [f"{title}: "] if part else []
            lines += [f"  {name}: {_short(value)}" for name, value in part.items()]
        lines += [f"{f['level']}: [{f['fault']}] {f['message']}" for f in self.faults] or ["faults: none"]
        return "\n".join(lines)

    def picture(self, path) -> None:
        """PNG of the axial, coronal and sagittal plane through the middle, as the model sees them, upright."""
        if Figure is None:
            raise ImportError("the picture needs matplotlib: pip install matplotlib")
        if not self.planes:
            raise ValueError("the scan was refused, so that there is nothing to show; see faults")
        figure = Figure(figsize=(12, 4.5), facecolor="black", layout="constrained")
        for axis, (name, (plane, (row, column))) in zip(figure.subplots(1, 3), self.planes.items(), strict=True):
            axis.imshow(plane, cmap="gray", vmin=0, vmax=255, aspect=row / column)
            axis.set_title(name, color="white")
            axis.set_axis_off()
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=100)


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_short, value)) if isinstance(value, (list, tuple)) else str(value)


def inspect_volume(
    source,
    *,
    modality: str = "auto",
    window=(-1000.0, 1000.0),
    percentiles=(0.5, 99.5),
    assume_hu: bool = False,
    size=(140, 280, 280),
    spacing=(2.6, 1.3, 1.3),
    orientation: str = "LAI",
    scaling: str = "window",
    **options,
) -> VolumeReport:
    """Reads a scan as the processor would, and reports faults instead of raising them.

    Arguments are those of `read_on_grid`. For a scan that is refused `readable` is False, `faults` holds the code
    and the message, and the other parts hold what was read before.
    """
    options, findings, parts, refused = ReadOptions(**options), Findings(), {}, []
    try:
        with system_errors():
            header = open_scan(source, options, findings)
            scan = header.geometry
            parts["geometry"] = _geometry(scan)
            check_geometry(scan, options, findings)
            image, values = read_voxels(header, options, findings)
        parts["intensity"] = _intensity(image, values)
        hu = {"assume_hu": assume_hu, "values": values}
        found = find_modality(image, modality, **hu)
        lo_hi = intensity_window(image, modality=found, window=window, percentiles=percentiles, **hu)
        parts["intensity"] |= {"modality": found, "window": list(lo_hi)}
        grid = model_grid(scan, size, spacing, orientation)
        scaled = scale_intensity(resample(image, grid, window=lo_hi, outside=lo_hi[0]), window=lo_hi, scaling=scaling)
        parts["model"] = asdict(grid) | _overlap(scan, grid)
        parts["planes"] = three_planes(grid.image(scaled))
    except VolumeError as error:
        message = str(error).removeprefix(f"[{error.fault.value}] ")
        refused = [{"fault": error.fault.value, "level": "refused", "message": message}]
    faults = refused + [{"fault": f.fault.value, "level": f.level, "message": f.message} for f in findings]
    return VolumeReport(readable=not refused, faults=faults, **parts)


def _geometry(scan: Geometry) -> dict:
    return asdict(scan) | {
        "orientation": scan.orientation,
        "oblique_degrees": round(scan.oblique_degrees, 3),
        "extent_mm": [n * s for n, s in zip(scan.size, scan.spacing, strict=True)],
    }


def _intensity(image, values: tuple[float, float]) -> dict:
    array = sitk.GetArrayViewFromImage(image)
    sample = array[:: 1 + array.shape[0] // 128, :: 1 + array.shape[1] // 128, :: 1 + array.shape[2] // 128]
    shares = {
        f"percentile_{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(sample, PERCENTILES), strict=True)
    }
    return {"type": array.dtype.name, "min": values[0], "max": values[1]} | shares


def _overlap(scan: Geometry, grid: Geometry) -> dict:
    """How much of the scan the model sees, and how much of the model's grid the scan fills, from a coarse lattice."""
    return {"share_of_scan_seen": _inside(scan, grid), "share_of_grid_filled": _inside(grid, scan)}


def _inside(inner: Geometry, outer: Geometry, steps: int = 24) -> float:
    ticks = (np.arange(steps) + 0.5) / steps
    unit = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij")).reshape(3, -1)  # (3, N) in the unit cube
    index = unit * np.array(inner.size)[:, None] - 0.5
    world = np.array(inner.origin)[:, None] + inner.axes @ (np.array(inner.spacing)[:, None] * index)
    other = np.linalg.solve(outer.axes, world - np.array(outer.origin)[:, None]) / np.array(outer.spacing)[:, None]
    inside = (other >= -0.5) & (other <= np.array(outer.size)[:, None] - 0.5)
    return float(inside.all(axis=0).mean())


def three_planes(image) -> dict:
    """{"axial", "coronal", "sagittal"}: middle plane (rows, columns) uint8 of an image in [0, 1], and its mm a pixel.

    Upright, as in radiology: anterior or superior at the top, the patient's right on the left of the axial
    and coronal plane, anterior on the left of the sagittal plane.
    """
    image = sitk.DICOMOrient(
        image, "LPI"
    )  # x to the left, y to the back, z to the feet: rows and columns as displayed
    x, y, z = image.GetSpacing()
    array = np.round(255 * np.clip(sitk.GetArrayViewFromImage(image), 0, 1)).astype(np.uint8)
    depth, height, width = array.shape
    return {
        "axial": (array[depth // 2], (y, x)),
        "coronal": (array[:, height // 2], (z, x)),
        "sagittal": (array[:, :, width // 2], (z, y)),
    }
