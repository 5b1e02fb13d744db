"""Voxel grids in the patient: a scan's, the model's, and one interpolation from a scan to the model's grid."""

import ctypes
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from .scan_faults_photon import Findings, VolumeError, VolumeFault

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None

OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))
SLAB = 14  # planes of a grid that are interpolated at a time
RIM = 1e-4  # voxels: a grid point this close to the scan's outer face counts as inside it


@dataclass(frozen=True)
class Geometry:
    """A voxel grid in SimpleITK's LPS world: everything of a scan except its values. `dataclasses.asdict` is JSON.

    size, spacing (mm) and origin (mm) are in (x, y, z); direction holds the nine cosines by rows, as SimpleITK does.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]

    def __post_init__(self):  # lists, as JSON gives them, become tuples
        for name, kind in (("size", int), ("spacing", float), ("origin", float), ("direction", float)):
            object.__setattr__(self, name, tuple(kind(v) for v in getattr(self, name)))

    @classmethod
    def of(cls, image: "sitk.Image") -> "Geometry":
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    @classmethod
    def from_affine(cls, size, affine: np.ndarray) -> "Geometry":
        """The grid of `size` (x, y, z) voxels with a 4 x 4 affine from voxel (x, y, z) to LPS mm.

        Raises: VolumeError (DEGENERATE_AFFINE) where the affine is not finite or its axes lie in a plane.
        """
        affine = np.asarray(affine, dtype=np.float64)
        axes = affine[:3, :3]
        spacing = np.linalg.norm(axes, axis=0)
        if not np.isfinite(affine).all() or spacing.min() < 1e-6 or abs(np.linalg.det(axes / spacing)) < 1e-3:
            raise VolumeError(
                VolumeFault.DEGENERATE_AFFINE,
                "The affine is not finite, or its axes lie in a plane: it places no voxel. Repair the header.",
            )
        axes = np.where(np.abs(axes) < 1e-12 * spacing, 0.0, axes)  # ITK's SVD does not converge on denormal numbers
        return cls(size, spacing, affine[:3, 3], (axes / spacing).ravel())

    @property
    def axes(self) -> np.ndarray:
        """(3, 3): column a is the unit vector of index axis a in LPS."""
        return np.array(self.direction).reshape(3, 3)

    @property
    def centre(self) -> np.ndarray:
        """(3,): centre of the field of view in LPS mm."""
        return np.array(self.origin) + self.axes @ (np.array(self.spacing) * (np.array(self.size) - 1) / 2)

    @property
    def orientation(self) -> str:
        """Three letters for x, y, z: where each index grows to, as SimpleITK's DICOMOrient names it."""
        return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(
            nearest_rotation(self.axes).ravel().tolist()
        )

    @property
    def oblique_degrees(self) -> float:
        """Largest angle between an index axis and the patient's axis closest to it."""
        return float(np.degrees(np.arccos(np.clip(np.abs(self.axes).max(axis=0), 0, 1))).max())

    def part(self, axis: int, start: int, stop: int) -> "Geometry":
        """The grid of planes start ... stop - 1 along one index axis (0 x, 1 y, 2 z)."""
        size = [stop - start if a == axis else n for a, n in enumerate(self.size)]
        origin = np.array(self.origin) + self.axes[:, axis] * (self.spacing[axis] * start)
        return replace(self, size=size, origin=origin)

    def image(self, voxels) -> "sitk.Image":
        """SimpleITK image on this grid: of an array in (z, y, x), or an image that is moved here."""
        image = voxels if isinstance(voxels, sitk.Image) else sitk.GetImageFromArray(voxels)
        if image.GetSize() != self.size:
            raise ValueError(f"voxels in (z, y, x) of {self.size[::-1]} were expected, got {image.GetSize()[::-1]}")
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image


def nearest_rotation(axes: np.ndarray) -> np.ndarray:
    """The orthonormal axes closest to `axes` (3, 3), of the same handedness; a proper rotation is returned
    unchanged."""
    if np.allclose(axes.T @ axes, np.eye(3), atol=1e-6):
        return axes
    u, _, vt = np.linalg.svd(axes)
    return u @ vt


def model_grid(geometry: Geometry, size=(140, 280, 280), spacing=(2.6, 1.3, 1.3), orientation="LAI") -> Geometry:
    """The model's grid over a scan: around the centre of the scan's field of view, along the scan's axes.

    Args:
        geometry: the scan's voxel grid.
        size: (D, H, W) voxels.
        spacing: (D, H, W) mm between voxels.
        orientation: where the grid's x (W), y (H) and z (D) indices grow to, as DICOMOrient names it. "LAI" is what
            the release's preprocessing comes to (RAI, then its last axis flipped).

    The grid of an oblique scan follows the scan's axes, permuted and flipped to the closest match; that of a sheared
    scan follows the nearest orthonormal axes.
    """
    letters = sorted("".join(min(c, OPPOSITE.get(c, "?")) for c in orientation))
    if letters != ["A", "I", "L"]:
        raise ValueError(f"orientation has one letter of each pair LR, PA, SI, in any order; got {orientation!r}")
    if len(size) != 3 or len(spacing) != 3 or min(size) < 1 or min(spacing) <= 0:
        raise ValueError(f"size and spacing are three positive numbers (D, H, W); got {size} and {spacing}")
    have, rotation, columns = geometry.orientation, nearest_rotation(geometry.axes), []
    for letter in orientation:
        if letter in have:
            columns.append(rotation[:, have.index(letter)])
        else:
            columns.append(-rotation[:, have.index(OPPOSITE[letter])])
    axes = np.stack(columns, axis=1)
    size, spacing = tuple(size)[::-1], tuple(spacing)[::-1]  # (W, H, D) = (x, y, z)
    origin = geometry.centre - axes @ (np.array(spacing) * (np.array(size) - 1) / 2)
    return Geometry(size, spacing, origin, axes.ravel())


def resample(image, grid: Geometry, *, window=None, outside: float = -1000.0, nearest: bool = False) -> "sitk.Image":
    """One interpolation of a scan onto a grid, on all cores.

    Args:
        image: 3D SimpleITK image, sheared or not.
        grid: where to; `sitk.GetArrayFromImage` of the result is (D, H, W). (Keep the image while you use a view of
            it: a view of a deleted image reads freed memory.)
        window: (lo, hi) that voxels are clipped to BEFORE they are interpolated, so that padding such as -3024 does
            not bleed into its neighbours; for integers a fraction is rounded outwards.
        outside: value beyond the scan's outermost voxel faces.
        nearest: nearest voxel and the image's pixel type (labels) instead of linear and float32.
    """
    if not nearest:
        return grid.image(interpolate_linear(image, grid, window=window, outside=outside))
    if window is not None:
        bounds = _bounds(sitk.GetArrayViewFromImage(image).dtype, window)
        image = sitk.Clamp(image, image.GetPixelID(), *map(float, bounds))
    transform, value = _rim_transform(Geometry.of(image)), float(outside)
    return sitk.Resample(
        image, grid.size, transform, sitk.sitkNearestNeighbor, grid.origin, grid.spacing, grid.direction, value,
        image.GetPixelID(),
    )  # fmt: skip


def interpolate_linear(image, grid: Geometry, *, window=None, outside: float = -1000.0) -> np.ndarray:
    """float32 array (D, H, W): `resample` without the image around it."""
    job = SlabInterpolation(grid, window=window, outside=outside)
    job.advance(image, image.GetSize()[2])
    return job.out


def interpolate_slices(volume: np.ndarray, heights: np.ndarray, depth: int) -> np.ndarray:
    """float32 (depth, rows, columns): slices at even heights, each from its two neighbours; `heights` in mm."""
    even = np.linspace(0, heights[-1], depth)
    above = np.clip(np.searchsorted(heights, even), 1, len(heights) - 1)
    part = np.clip((even - heights[above - 1]) / (heights[above] - heights[above - 1]), 0, 1)
    out = np.empty((depth, *volume.shape[1:]), np.float32)
    for k, (a, t) in enumerate(zip(above, part, strict=True)):
        out[k] = (1 - t) * volume[a - 1] + t * volume[a].astype(np.float32)
    return out


def rounding_of(positions: np.ndarray, heights: np.ndarray, normal: np.ndarray) -> float:
    """The unit in mm of positions written with one or two decimals, where the slices are even otherwise; else 0."""
    distance, off = heights[-1] / (len(heights) - 1), np.abs(heights - np.linspace(0, heights[-1], len(heights))).max()
    for unit in (0.1, 0.01):
        if unit < 0.2 * distance and np.abs(positions / unit - np.rint(positions / unit)).max() < 1e-4:
            return unit if off <= unit * np.abs(normal).sum() else 0.0  # half a unit here, half at the ends
    return 0.0


def even_distance(steps, median: float, gaps: str, findings: Findings) -> float:
    """The distance to interpolate to, in mm, where `gaps` allows it; otherwise refuses with the gap's place."""
    worst = int(np.abs(steps - median).argmax())
    parts = np.split(steps, 1 + np.flatnonzero(np.abs(np.diff(steps)) > 0.02 * steps[:-1]))
    planned = [part.mean() for part in parts if len(part) >= 3]
    between = [step for part in parts if len(part) < 3 for step in part]
    changes = len(planned) > 1 and np.abs(np.diff(planned)).min() > 0.02 * min(planned)
    if changes and len(between) < len(planned) and all(min(planned) < step < max(planned) for step in between):
        fault, distance, way = VolumeFault.SLICE_INCREMENT_INCONSISTENT, min(planned), "resample"
        gap = f"The slice distance changes along the stack ({', then '.join(f'{d:.3f} mm' for d in planned)})"
    else:
        missing = np.abs(steps / median - np.rint(steps / median)).max() < 0.05 and steps[worst] > 1.5 * median
        fault = VolumeFault.MISSING_SLICES if missing else VolumeFault.SLICE_INCREMENT_INCONSISTENT
        distance, way = median, "interpolate" if missing else "resample"
        gap = (
            f"Between slices {worst + 1} and {worst + 2} of {len(steps) + 1} (counted along the stack) the distance "
            f"is {steps[worst]:.3f} mm, elsewhere {median:.3f} mm"
        )
    if gaps not in (way, "interpolate"):
        advice = (
            "Fetch the missing slices, or accept interpolated ones with" if way == "interpolate" else "Read it with"
        )
        raise VolumeError(fault, f'{gap}. {advice} gaps="{way}".')
    findings.warn(fault, f"{gap}; interpolated to an even distance of {distance:.3f} mm.")
    return distance


class SlabInterpolation:
    """Interpolates a scan linearly onto a grid, slab by slab, each slab from the few slices of the scan that it needs.

    So the scan is never copied as a whole to be clipped, and a slab can be interpolated while later slices are still
    being inflated. The slabs depend on the two geometries alone: the result is the same to the bit, whenever the
    slices come.

    Args: window, outside: see `resample`. Result: `out`, float32 (D, H, W), once `complete`.
    """

    def __init__(self, grid: Geometry, *, window=None, outside: float = -1000.0):
        self.grid, self.window, self.outside = grid, window, float(outside)
        self.image, self.slabs, self.out = None, deque(), np.empty(grid.size[::-1], np.float32)

    @property
    def complete(self) -> bool:
        return self.image is not None and not self.slabs

    def advance(self, image, slices: int, threads: int | None = None) -> None:
        """Interpolates every slab that the first `slices` slices of the image suffice for.

        `image` is the same in every call; its later slices may still be written. threads: default all cores.
        """
        if self.image is None:
            self.image, self.scan = image, Geometry.of(image)
            self.transform = _rim_transform(self.scan)
            self.axis, slabs = _slabs(self.scan, self.grid)
            self.slabs.extend(slabs)
        while self.slabs and self.slabs[0].last <= slices:
            self._interpolate(self.slabs.popleft(), threads)

    def _interpolate(self, slab: "Slab", threads: int | None) -> None:
        filter = sitk.ResampleImageFilter()
        filter.SetInterpolator(sitk.sitkLinear)
        filter.SetTransform(self.transform)
        filter.SetDefaultPixelValue(self.outside)
        filter.SetOutputPixelType(sitk.sitkFloat32)
        if threads is not None:
            filter.SetNumberOfThreads(threads)
        part = self.grid.part(self.axis, slab.start, slab.stop)
        filter.SetSize(part.size)
        filter.SetOutputOrigin(part.origin)
        filter.SetOutputSpacing(part.spacing)
        filter.SetOutputDirection(part.direction)
        done = filter.Execute(self._clipped(slab))
        index = [slice(None)] * 3
        index[2 - self.axis] = slice(slab.start, slab.stop)
        self.out[tuple(index)] = sitk.GetArrayViewFromImage(done)

    def _clipped(self, slab: "Slab") -> "sitk.Image":
        """The slab's slices of the scan as a separate image, clipped to the window."""
        voxels = sitk.GetArrayViewFromImage(self.image)[slab.first : slab.last]
        image, memory = blank_image(voxels.shape[::-1], self.image.GetPixelID())
        if self.window is None:
            memory[...] = voxels
        else:
            np.clip(voxels, *_bounds(voxels.dtype, self.window), out=memory)
        return self.scan.part(2, slab.first, slab.last).image(image)


@dataclass(frozen=True)
class Slab:
    """Planes start ... stop - 1 of a grid, and the scan's slices first ... last - 1 that surround them."""

    start: int
    stop: int
    first: int
    last: int


def _bounds(dtype: np.dtype, window) -> tuple:
    """The window in the type of the voxels, so that a 16-bit scan stays one; a fraction is rounded outwards."""
    lo, hi = window
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        lo, hi = np.clip(np.floor(lo), info.min, info.max), np.clip(np.ceil(hi), info.min, info.max)
        return dtype.type(int(lo)), dtype.type(int(hi))
    return dtype.type(lo), dtype.type(hi)


def _slabs(scan: Geometry, grid: Geometry) -> tuple[int, list[Slab]]:
    """(the grid's index axis that runs along the scan's slices, slabs across it by their first slice)."""
    shrink = 1 - 2 * RIM / np.array(scan.size)
    to_index = np.linalg.inv(scan.axes * np.array(scan.spacing))
    matrix = shrink[:, None] * (to_index @ (grid.axes * np.array(grid.spacing)))  # grid index -> scan index
    middle = (np.array(scan.size) - 1) / 2
    offset = shrink * (to_index @ (np.array(grid.origin) - scan.centre)) + middle
    across = matrix[2] * (np.array(grid.size) - 1)  # slices that the whole grid spans along each of its axes
    axis, depth = int(np.abs(matrix[2] * np.array(grid.size)).argmax()), scan.size[2]
    others = [across[other] for other in range(3) if other != axis]
    low, high = (offset[2] + sum(pick(0.0, span) for span in others) for pick in (min, max))
    slabs = []
    for start in range(0, grid.size[axis], SLAB):
        stop = min(start + SLAB, grid.size[axis])
        ends = sorted((matrix[2, axis] * start, matrix[2, axis] * (stop - 1)))
        # one slice more on either side than the two around a point, so that a slab has no faces within the scan
        first = max(min(int(np.floor(low + ends[0])) - 1, depth - 2), 0)
        last = min(max(int(np.ceil(high + ends[1])) + 2, 2), depth)
        slabs.append(Slab(start, stop, first, last))
    return axis, sorted(slabs, key=lambda slab: (slab.last, slab.first))


def blank_image(shape, pixel_id: int):
    """(new image of (x, y, z) voxels, its memory as a writable array in (z, y, x)); keep the image while you write.

    SimpleITK gives its voxels for reading only, and copying a large scan into it costs a third of the time of
    inflating it. Nobody else holds this image yet, so its memory may be written.
    """
    image = sitk.Image([int(n) for n in shape], pixel_id)
    view = sitk.GetArrayViewFromImage(image)
    memory = (ctypes.c_char * view.nbytes).from_address(view.ctypes.data)
    return image, np.frombuffer(memory, view.dtype).reshape(view.shape)


def _rim_transform(scan: Geometry) -> "sitk.AffineTransform":
    """Moves the grid's points towards the scan's centre, by RIM voxels at its faces.

    Grids and scans share their centre, so a grid point may lie exactly on the scan's outer face. Whether it is inside
    would then depend on the last bit of the header, and the same scan as DICOM and as NIfTI would differ by a face
    of air.
    """
    shrink = np.diag(1 - 2 * RIM / np.array(scan.size))
    transform = sitk.AffineTransform(3)
    transform.SetMatrix((scan.axes @ shrink @ np.linalg.inv(scan.axes)).ravel().tolist())
    transform.SetCenter(scan.centre.tolist())
    return transform
