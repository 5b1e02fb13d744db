"""Voxel grids in the patient: a scan's, the model's, and one interpolation from the one to the other."""

from dataclasses import dataclass

import numpy as np

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None

OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))
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
            bleed into its neighbours.
        outside: value beyond the scan's outermost voxel faces.
        nearest: nearest voxel and the image's own type (labels) in place of linear and float32.
    """
    if window is not None:
        image = _clamp(image, *window)
    return sitk.Resample(
        image,
        grid.size,
        _rim_transform(Geometry.of(image)),
        sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear,
        grid.origin,
        grid.spacing,
        grid.direction,
        float(outside),
        image.GetPixelID() if nearest else sitk.sitkFloat32,
    )


def _clamp(image, lo: float, hi: float) -> "sitk.Image":
    """Clips in the image's own type, so that a 16-bit scan is copied as 16 bits; a fraction is rounded outwards."""
    dtype = sitk.GetArrayViewFromImage(image).dtype
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        lo, hi = max(float(np.floor(lo)), info.min), min(float(np.ceil(hi)), info.max)
    return sitk.Clamp(image, image.GetPixelID(), lo, hi)


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
