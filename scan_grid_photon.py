"""Voxel grids in the patient: a scan's, the model's, and one interpolation from the one to the other."""

import ctypes
from dataclasses import dataclass, replace

import numpy as np

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None

OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))
SLAB = 14  # planes of a grid that are interpolated at a time
RIM = 1e-4  # voxels: a grid point this close to the scan's outer face counts as inside it


@dataclass(frozen=True)
class Geometry:
    """A voxel grid in SimpleITK's LPS world: everything of a scan but its values. `dataclasses.asdict` is JSON.

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
        """The planes start ... stop - 1 along one index axis (0 x, 1 y, 2 z) as a grid of their own."""
        size = [stop - start if a == axis else n for a, n in enumerate(self.size)]
        origin = np.array(self.origin) + self.axes[:, axis] * (self.spacing[axis] * start)
        return replace(self, size=size, origin=origin)

    def image(self, array: np.ndarray) -> "sitk.Image":
        """SimpleITK image of an array in (z, y, x) on this grid."""
        if array.shape != self.size[::-1]:
            raise ValueError(f"an array in (z, y, x) of shape {self.size[::-1]} was expected, got {array.shape}")
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image


def nearest_rotation(axes: np.ndarray) -> np.ndarray:
    """The orthonormal axes closest to `axes` (3, 3), of the same handedness; a proper rotation is returned as it
    is."""
    if np.allclose(axes.T @ axes, np.eye(3), atol=1e-6):
        return axes
    u, _, vt = np.linalg.svd(axes)
    return u @ vt


def model_grid(geometry: Geometry, size=(140, 280, 280), spacing=(2.6, 1.3, 1.3), orientation="LAI") -> Geometry:
    """The model's grid over a scan: the centre of the scan's field of view, along the scan's own axes.

    Args:
        geometry: the scan's voxel grid.
        size: (D, H, W) voxels.
        spacing: (D, H, W) mm between voxels.
        orientation: where the grid's x (W), y (H) and z (D) indices grow to, as DICOMOrient names it. "LAI" is what
            the release's preprocessing comes to (RAI, then its last axis flipped).

    An oblique scan keeps its own axes, permuted and flipped to the closest match; a sheared one gets the nearest
    orthonormal axes.
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
        grid: where to; `sitk.GetArrayFromImage` of the result is (D, H, W). (A view of an image that nobody holds any
            more reads freed memory.)
        window: (lo, hi) the voxels are clipped to BEFORE they are interpolated, so that padding such as -3024 does not
            bleed into its neighbours; for integers a fraction is rounded outwards.
        outside: value beyond the scan's outermost voxel faces.
        nearest: nearest voxel and the image's own type (labels) in place of linear and float32.
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
    """`resample` to a new float32 array (D, H, W)."""
    job = LinearInterpolation(image, grid, window=window, outside=outside)
    for slab in job.slabs:
        job.do(slab)
    return job.out


@dataclass(frozen=True)
class Slab:
    """Planes start ... stop - 1 of a grid, and the scan's slices first ... last - 1 that surround them."""

    start: int
    stop: int
    first: int
    last: int


class LinearInterpolation:
    """One linear interpolation of a scan onto a grid in slabs, each from the few slices of the scan that it needs.

    So the scan is never copied as a whole to be clipped, and a slab can be done while later slices are still being
    inflated. `slabs` are in the order in which the scan's slices come; `out` is the float32 array (D, H, W). The cuts
    depend on the two geometries alone: whoever calls `do`, and when, the result is the same to the bit.

    Args: image: 3D SimpleITK image whose slices may still be written until `do` asks for them. window, outside: see
        `resample`. threads: for each slab; default all cores.
    """

    def __init__(self, image, grid: Geometry, *, window=None, outside: float = -1000.0, threads: int | None = None):
        self.image, self.grid, self.window, self.threads = image, grid, window, threads
        self.scan, self.outside = Geometry.of(image), float(outside)
        self.transform = _rim_transform(self.scan)
        self.axis, self.slabs = _slabs(self.scan, grid)
        self.out = np.empty(grid.size[::-1], np.float32)

    def do(self, slab: Slab) -> None:
        filter = sitk.ResampleImageFilter()
        filter.SetInterpolator(sitk.sitkLinear)
        filter.SetTransform(self.transform)
        filter.SetDefaultPixelValue(self.outside)
        filter.SetOutputPixelType(sitk.sitkFloat32)
        if self.threads is not None:
            filter.SetNumberOfThreads(self.threads)
        part = self.grid.part(self.axis, slab.start, slab.stop)
        filter.SetSize(part.size)
        filter.SetOutputOrigin(part.origin)
        filter.SetOutputSpacing(part.spacing)
        filter.SetOutputDirection(part.direction)
        done = filter.Execute(self._slices(slab))
        at = [slice(None)] * 3
        at[2 - self.axis] = slice(slab.start, slab.stop)
        self.out[tuple(at)] = sitk.GetArrayViewFromImage(done)

    def _slices(self, slab: Slab) -> "sitk.Image":
        """The slab's slices of the scan as an image of their own, clipped."""
        voxels = sitk.GetArrayViewFromImage(self.image)[slab.first : slab.last]
        image, memory = blank_image(voxels.shape[::-1], self.image.GetPixelID())
        if self.window is None:
            memory[...] = voxels
        else:
            np.clip(voxels, *_bounds(voxels.dtype, self.window), out=memory)
        part = self.scan.part(2, slab.first, slab.last)
        image.SetSpacing(part.spacing)
        image.SetOrigin(part.origin)
        image.SetDirection(part.direction)
        return image


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
        # a slice more on either side than the two that a point lies between: only the scan's own faces are faces
        first = max(min(int(np.floor(low + ends[0])) - 1, depth - 2), 0)
        last = min(max(int(np.ceil(high + ends[1])) + 2, 2), depth)
        slabs.append(Slab(start, stop, first, last))
    return axis, sorted(slabs, key=lambda slab: (slab.last, slab.first))


def blank_image(shape, pixel_id: int):
    """(new image of (x, y, z) voxels, its memory as a writable array in (z, y, x)); hold the one as long as the other.

    SimpleITK gives out its voxels for reading only, and copying a large scan into it costs as much as a third of
    inflating it. Nobody else holds this image yet, so it may be written where it lies.
    """
    image = sitk.Image([int(n) for n in shape], pixel_id)
    view = sitk.GetArrayViewFromImage(image)
    memory = (ctypes.c_char * view.nbytes).from_address(view.ctypes.data)
    return image, np.frombuffer(memory, view.dtype).reshape(view.shape)


def _rim_transform(scan: Geometry) -> "sitk.AffineTransform":
    """Draws the grid's points towards the scan's centre by RIM voxels at its faces.

    Grids and scans are centred on each other, so a grid point may lie exactly on the scan's outer face; whether it is
    inside would then hang on the last bit of the header, and the same scan as DICOM and as NIfTI would differ by
    a face of air.
    """
    shrink = np.diag(1 - 2 * RIM / np.array(scan.size))
    transform = sitk.AffineTransform(3)
    transform.SetMatrix((scan.axes @ shrink @ np.linalg.inv(scan.axes)).ravel().tolist())
    transform.SetCenter(scan.centre.tolist())
    return transform
