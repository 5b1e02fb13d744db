"""The voxels of a phantom's scan: a grid in LPS order, paint that blends at edges, noise, and the stored image."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

try:
    import SimpleITK as sitk
except ImportError as error:
    raise ImportError("Phantoms are stored with SimpleITK, which is missing: pip install SimpleITK") from error

_AXIS = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}


def check_orientation(code):
    """Raises `ValueError` unless `code` has one letter for each of the three axes, such as "RAS"."""
    if sorted(_AXIS.get(letter, (9, 0))[0] for letter in code) != [0, 1, 2]:
        raise ValueError(f"orientation {code!r} needs one letter each of L/R, P/A and S/I, such as RAS")


@dataclass(frozen=True)
class Grid:
    """A scan's grid. Voxel centres are origin + spacing * index (mm, LPS order); a point p of the patient is at
    rotation @ p + shift."""

    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    shape: tuple[int, ...]
    rotation: np.ndarray
    shift: np.ndarray

    def to_world(self, points):
        """Points (n, 3) of the patient in the scanner's coordinates, mm."""
        turned = [sum(self.rotation[i, j] * points[:, j] for j in range(3)) for i in range(3)]  # no BLAS: same bits
        return np.stack(turned, 1) + self.shift

    def holds(self, world):
        """(n,) bool: which points (n, 3) lie between the first and the last voxel centres."""
        high = np.array(self.origin) + np.array(self.spacing) * (np.array(self.shape) - 1)
        return np.all((world >= self.origin) & (world <= high), 1)


def rotation_matrix(angles):
    """Rotation about x, y, z by degrees (3,), rounded to six decimals: sin and cos differ between machines in the last
    bit."""
    (cx, sx), (cy, sy), (cz, sz) = ((math.cos(math.radians(a)), math.sin(math.radians(a))) for a in angles)
    turn_x, turn_y = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]), np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.round(np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ turn_y @ turn_x, 6)


class Canvas:
    """HU, organ and lesion labels of one scan, painted shape by shape; arrays (x, y, z)."""

    def __init__(self, grid):
        self.grid = grid
        self.axes = [
            (grid.origin[i] + grid.spacing[i] * np.arange(grid.shape[i])).astype(np.float32) for i in range(3)
        ]
        self.hu = np.full(grid.shape, -1000, np.float32)
        self.organs, self.lesions = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.uint8)
        self.width = float(np.round(np.mean(grid.spacing) + 0.8, 3))  # of an edge: a voxel and the scanner's blur

    def region(self, low, high):
        """The grid's slices around a box of the patient, and the patient's coordinates in it; `None` off the scan."""
        corners = np.array(list(itertools.product(*zip(low, high, strict=True))))
        world = self.grid.to_world(corners)
        slices = []
        for axis, a, b in zip(self.axes, world.min(0), world.max(0), strict=True):
            slices.append(slice(int(np.searchsorted(axis, a)), int(np.searchsorted(axis, b, side="right"))))
        if any(s.start >= s.stop for s in slices):
            return None
        x, y, z = (
            (axis[s] - np.float32(t)).reshape([-1 if i == j else 1 for j in range(3)])
            for i, (axis, s, t) in enumerate(zip(self.axes, slices, self.grid.shift, strict=True))
        )
        r = self.grid.rotation.astype(np.float32)  # its transpose takes the world to the patient
        return tuple(slices), tuple(r[0, i] * x + r[1, i] * y + r[2, i] * z for i in range(3))

    def paint(self, box, distance, hu, label=0, width=None, within=None):
        """Blends `hu` (a number, or a function of p) over a shape's voxels, by the share of a voxel that it covers.

        `label` marks the voxels whose centre lies in the shape; `within` keeps the paint to voxels of that label.
        """
        region = self.region(*box)
        if region is None:
            return
        where, p = region
        d = distance(p)
        cover = np.clip(np.float32(0.5) - d / np.float32(width or self.width), 0, 1)
        if within is not None:
            cover *= self.organs[where] == within
        target = self.hu[where]
        target += cover * ((hu(p) if callable(hu) else np.float32(hu)) - target)
        if label:
            self.organs[where][d < 0] = label

    def add_noise(self, rng, sigma):
        """Adds slow tissue texture, and noise correlated between in-plane neighbours as after a reconstruction."""
        shape = self.grid.shape
        fine = rng.standard_normal([n + (2 if i < 2 else 0) for i, n in enumerate(shape)], dtype=np.float32)
        fine = (fine[2:] + fine[1:-1] + fine[:-2] * np.float32(0.5)) / np.float32(1.5)
        fine = (fine[:, 2:] + fine[:, 1:-1] + fine[:, :-2] * np.float32(0.5)) / np.float32(1.5)
        coarse = rng.standard_normal([int(n * s / 14) + 2 for n, s in zip(shape, self.grid.spacing, strict=True)])
        coarse = coarse.astype(np.float32)
        for i, (n, spacing) in enumerate(zip(shape, self.grid.spacing, strict=True)):
            place = np.arange(n, dtype=np.float32) * np.float32(spacing / 14)
            index = place.astype(np.int64)
            weight = (place - index).reshape([-1 if i == j else 1 for j in range(3)])
            coarse = coarse.take(index, i) * (1 - weight) + coarse.take(index + 1, i) * weight
        self.hu += np.float32(sigma) * fine
        self.hu += np.float32(5) * coarse * (self.hu > -300)


def store(array, grid, code):
    """A SimpleITK image whose index axes run towards `code`, from an LPS array (x, y, z). No voxel moves in space."""
    axes, signs = zip(*(_AXIS[letter] for letter in code), strict=True)
    origin, direction = list(grid.origin), np.zeros((3, 3))
    for i, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        direction[axis, i] = sign
        if sign < 0:
            origin[axis] += grid.spacing[axis] * (grid.shape[axis] - 1)
    stored = array.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]
    image = sitk.GetImageFromArray(np.ascontiguousarray(stored.transpose(2, 1, 0)))  # SimpleITK arrays are (k, j, i)
    image.SetSpacing([grid.spacing[axis] for axis in axes])
    image.SetOrigin(origin)
    image.SetDirection(direction.ravel().tolist())
    return image
