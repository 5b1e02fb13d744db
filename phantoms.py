"""Synthetic torso CTs with known truth, and questions about them that no reader can answer without looking.

    python phantoms.py --one OUT.nii.gz --seed 3                    one scan; its facts are printed as JSON
    python phantoms.py --output DIR --patients 600 --workers 2      a data set: scans, label maps, questions, card

Organs are analytic shapes in the patient's own frame (mm; x to the left, y to the back, z to the head: LPS), so truth
does not depend on the voxel grid. Shapes use only + - * / and sqrt, which IEEE 754 fixes to the last bit, and each
patient and purpose has its own random stream: a seed means the same voxels, whatever the order or the workers.
The blind baseline (best answer from the text alone) is chance: each question text gets each answer equally often.
"""

import argparse
import itertools
import json
import math
import os
import shutil
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

try:
    import SimpleITK as sitk
except ImportError as error:
    raise ImportError("phantoms.py writes images with SimpleITK, which is missing: pip install SimpleITK") from error

LABELS = {
    "liver": 1, "spleen": 2, "left kidney": 3, "right kidney": 4, "left lung": 5, "right lung": 6,
    "stomach": 7, "aorta": 8, "spine": 9, "heart": 10,
}  # fmt: skip
LESION_ORGANS = ("liver", "spleen", "left kidney", "right kidney", "left lung", "right lung")
FOV_ORGANS = (*LESION_ORGANS, "stomach")
COUNT_ORGANS = ("liver", "left lung", "right lung")  # large enough for several lesions
LIMITED_FOVS = ("chest", "upper", "lower", "lumbar", "left side", "right side")
PRESETS = {  # in-plane spacing, slice spacing (mm, ranges) and noise (HU, range)
    "small": ((4.0, 5.5), (4.0, 6.0), (7.0, 14.0)),
    "full": ((1.0, 1.8), (1.5, 3.0), (14.0, 26.0)),
}
CHANGES = ("grown", "shrunk", "unchanged", "new")


@dataclass(frozen=True)
class PhantomConfig:
    """What varies from patient to patient; lengths in mm, attenuation in HU. Each field is a command-line flag too."""

    size: str = "small"  # voxel preset: small (4-6 mm) or full (1-2 mm in plane, 1.5-3 mm slices)
    lesion_probability: float = 0.5  # of each of the six organs
    max_lesions: int = 3  # in the liver and in each lung; the other organs have at most one
    diameters: tuple[float, ...] = (15.0, 20.0, 25.0, 30.0, 35.0)  # the answers of the size questions
    diameter_jitter: float = 1.5  # a diameter is at most this far from its class, so that rounding is never in doubt
    contrast: tuple[float, ...] = (55.0, 95.0)  # between a solid lesion and its organ, either sign
    ground_glass: float = 0.5  # share of the lung nodules that are ground glass; the others are solid
    follow_up: float = 0.4  # share of patients with a second scan
    growth: float = 1.4  # smallest ratio between the diameters' classes of a lesion that has grown or shrunk
    limited_fov: float = 0.5  # share of the other patients whose field of view leaves organs out
    roll: float = 6.0  # largest turn about the long axis, degrees
    tilt: float = 3.0  # largest turn about each of the other two axes, degrees
    orientations: tuple[str, ...] = ("LPS", "RAS", "LAI", "RAI", "LAS", "PSR", "SLP", "ILA")  # positive directions

    def __post_init__(self):
        if self.size not in PRESETS:
            raise ValueError(f"size is {self.size!r}; choose one of {', '.join(PRESETS)}")
        for name in ("lesion_probability", "follow_up", "limited_fov", "ground_glass"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a probability from 0 to 1")
        if self.max_lesions < 1 or self.max_lesions > 3:
            raise ValueError(f"max_lesions is {self.max_lesions}; the count questions know 1, 2 and 3")
        steps = [b - a for a, b in itertools.pairwise(self.diameters)]
        if not 2 <= len(self.diameters) <= 8 or self.diameters[0] < 10 or self.diameters[-1] > 42:
            raise ValueError(f"diameters are {self.diameters}; give two to eight, from 10 to 42 mm, ascending")
        if min(steps) < 2 * self.diameter_jitter + 1 or any(d != round(d) for d in self.diameters):
            raise ValueError(f"diameters {self.diameters} with jitter {self.diameter_jitter} overlap or are not whole")
        if len(self.contrast) != 2 or not 0 < self.contrast[0] <= self.contrast[1]:
            raise ValueError(f"contrast is {self.contrast}; give two positive numbers, low then high")
        if self.growth < 1.2 or not self.changed_diameters:
            raise ValueError(f"growth is {self.growth}; give 1.2 or more, and two diameters at least that far apart")
        for code in self.orientations:
            if sorted(_AXIS.get(letter, (9, 0))[0] for letter in code) != [0, 1, 2]:
                raise ValueError(f"orientation {code!r} needs one letter each of L/R, P/A and S/I, such as RAS")

    @property
    def changed_diameters(self):
        return [(a, b) for a, b in itertools.combinations(self.diameters, 2) if b / a >= self.growth]


_AXIS = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}


# === Shapes: signed distances in mm (below zero inside), float32 arrays that broadcast ===


def _ellipsoid(p, center, radii):
    """First-order signed distance |q| (|q| - 1) / |q / r| with q = p / r; exact on the surface."""
    q = [(a - np.float32(c)) / np.float32(r) for a, c, r in zip(p, center, radii, strict=True) if r is not None]
    slope = [a / np.float32(r) for a, r in zip(q, [r for r in radii if r is not None], strict=True)]
    norm = np.sqrt(sum(a * a for a in q))
    return norm * (norm - 1) / np.maximum(np.sqrt(sum(a * a for a in slope)), np.float32(1e-6))


def _capsule(p, start, end, radius):
    axis = [e - s for s, e in zip(start, end, strict=True)]
    length = max(sum(a * a for a in axis), 1e-6)
    offset = [a - np.float32(s) for a, s in zip(p, start, strict=True)]
    t = np.clip(sum(o * np.float32(a / length) for o, a in zip(offset, axis, strict=True)), 0, 1)
    return np.sqrt(sum((o - t * np.float32(a)) ** 2 for o, a in zip(offset, axis, strict=True))) - np.float32(radius)


def _join(a, b, k=12.0):
    """Union with a seam rounded over k mm."""
    h = np.maximum(np.float32(k) - np.abs(a - b), 0) / np.float32(k)
    return np.minimum(a, b) - h * h * np.float32(k / 4)


def _cut(a, b, gap=0.0, k=6.0):
    """a without b and without a gap around b."""
    return -_join(-a, b - np.float32(gap), k)


def _inside(a, b, k=6.0):
    return -_join(-a, -b, k)


class Anatomy:
    """One patient's organs. `distance(name, p)` is the signed distance in mm at patient coordinates p = (x, y, z)."""

    PARTS = {  # center, radii at scale 1; no radius along z: a column through the scan
        "liver": (((-70, 3, -54), (69, 75, 57)), ((-90, 12, -98), (42, 52, 46)), ((-6, -44, -36), (68, 33, 31))),
        "spleen": (((99, 34, -48), (31, 40, 44)),),
        "left kidney": (((65, 42, -116), (26, 24, 49)),),
        "right kidney": (((-65, 42, -126), (26, 24, 49)),),
        "left lung": (((73, 2, 45), (66, 86, 100)),),
        "right lung": (((-75, 2, 45), (68, 86, 102)),),
        "stomach": (((61, -8, -37), (35, 36, 34)), ((55, -44, -70), (26, 22, 42)), ((18, -50, -100), (34, 17, 18))),
        "aorta": (((17, 10, 0), (11, 11, None)),),
        "heart": (((22, -34, 38), (56, 47, 43)),),
        "left dome": (((70, -6, -62), (64, 72, 52)),),
        "vena cava": (((-20, 12, 0), (11, 9, None)),),
        "vertebra": (((0, 42, 0), (22, 17, None)),),
    }

    def __init__(self, rng):
        self.scale = np.array([rng.uniform(0.93, 1.03), rng.uniform(0.94, 1.06), rng.uniform(0.93, 1.03)])
        self.parts = {}
        for name, parts in self.PARTS.items():
            shift, grow = rng.uniform(-4, 4, 3), rng.uniform(0.94, 1.06, 3)
            grow = np.clip(grow, 0.97, 1.03) if "lung" in name else grow
            shift = shift * 0.4 if name in ("aorta", "vertebra", "vena cava") else shift
            grow = grow * self.scale
            self.parts[name] = [
                (self._round((np.array(c) + shift) * self.scale),
                 [None if r is None else self._round(r * g) for r, g in zip(radii, grow, strict=True)])
                for c, radii in parts
            ]  # fmt: skip
        self.fat, self.wall = self._round(rng.uniform(7, 20)), self._round(rng.uniform(9, 13))
        self.body_radii = [self._round(134 * self.scale[0] + self.fat + self.wall), self._round(
            84 * self.scale[1] + self.fat + self.wall)]  # fmt: skip
        self.disc, self.rib = (self._round(v) for v in rng.uniform(0, 30, 2))
        self.lean = self._round(rng.uniform(0.12, 0.2))  # kidneys: upper poles nearer to the spine
        hu = {"liver": 105, "spleen": 118, "left kidney": 165, "aorta": 160, "heart": 125,
              "stomach": 18, "spine": 175, "muscle": 58, "fat": -100, "left lung": -850}  # fmt: skip
        self.hu = {name: round(float(value + rng.uniform(-9, 9))) for name, value in hu.items()}
        self.hu |= {"right kidney": self.hu["left kidney"], "right lung": self.hu["left lung"]}
        low, high = [-95, -68, -235], [95, -8, -112]
        self.bowel = [
            (rng.uniform(low, high).round(2) * self.scale, rng.uniform(13, 24, 3).round(2), bool(rng.random() < 0.4))
            for _ in range(34)
        ]
        self.lattice = {name: self._lattice(name) for name in FOV_ORGANS}
        self.vessels = self._vessels(rng)

    @staticmethod
    def _round(value):
        return np.round(value, 3).tolist()

    def distance(self, name, p):
        shape = None
        if name in ("left kidney", "right kidney"):  # a kidney leans: shear x by z
            (c, r), side = self.parts[name][0], 1 if name[0] == "l" else -1
            return _ellipsoid((p[0] + np.float32(side * self.lean) * (p[2] - np.float32(c[2])), p[1], p[2]), c, r)
        for center, radii in self.parts[name]:
            part = _ellipsoid(p, center, radii)
            shape = part if shape is None else _join(shape, part)
        if name == "liver":
            shape = _cut(_inside(shape, self.cavity(p) + 4), self.distance("right kidney", p), 4)
        elif name == "spleen":
            shape = _cut(_inside(shape, self.cavity(p) + 4), self.distance("left kidney", p), 4)
        elif name == "stomach":
            shape = _cut(_cut(shape, self.distance("liver", p), 3), self.distance("spleen", p), 3)
        elif name.endswith("lung"):
            dome = self.distance("liver", p) if name[0] == "r" else self.distance("left dome", p)
            if name[0] == "l":
                dome = np.minimum(dome, self.distance("spleen", p))
            shape = _cut(_inside(shape, self.cavity(p) + 3), dome, 5)
            shape = _cut(_cut(shape, self.distance("heart", p), 4), self.distance("vertebra", p), 6)
            shape = _cut(shape, self.distance("aorta", p), 4)
        return shape

    def body(self, p):
        """The skin: between an ellipse and a squarer fourth-power curve; slightly narrower at the waist."""
        a, b = (np.float32(r) for r in self.body_radii)
        waist = 1 - np.minimum(((p[2] + np.float32(60)) / np.float32(260)) ** 2, 1) * np.float32(0.06)
        u, v = (p[0] / (a * waist)) ** 2, (p[1] / (b * waist)) ** 2
        norm = np.float32(0.55) * np.sqrt(u + v) + np.float32(0.45) * np.sqrt(np.sqrt(u * u + v * v))
        return (norm - 1) * (np.float32(0.5) * (a + b))

    def cavity(self, p):
        return self.body(p) + np.float32(self.fat + self.wall)

    def box(self, name, pad=4.0):
        """Patient box (low, high) that holds an organ."""
        low = [min(c[i] - (400 if r[i] is None else r[i]) for c, r in self.parts[name]) for i in range(3)]
        high = [max(c[i] + (400 if r[i] is None else r[i]) for c, r in self.parts[name]) for i in range(3)]
        lean = self.lean * 60 if "kidney" in name else 0.0
        return np.array(low) - [pad + lean, pad, pad], np.array(high) + [pad + lean, pad, pad]

    def hilum(self, kidney):
        """Where fat and urine enter a kidney, on the side of the spine."""
        x, y, z = self.parts[kidney][0][0]
        return np.array([x + (17 if kidney[0] == "r" else -17), y - 4, z])

    def _lattice(self, name, step=6.0):
        """(n, 3) points `step` mm apart inside the organ, (n,) their distances: its extent, and room for lesions."""
        axes = [np.arange(a, b, step, dtype=np.float32) for a, b in zip(*self.box(name), strict=True)]
        p = np.meshgrid(*axes, indexing="ij")
        distance = self.distance(name, p)
        return np.stack([a[distance < 0] for a in p], 1).astype(np.float64), distance[distance < 0]

    def _vessels(self, rng):
        """(organ, start, end, radius): trees of two generations in the liver and the lungs."""
        tubes = []
        for organ, count, radius in (("liver", 5, 3.6), ("left lung", 12, 2.8), ("right lung", 12, 2.8)):
            points = self.lattice[organ][0][self.lattice[organ][1] < -6]
            side = 1 if organ == "left lung" else -1
            root = np.array([side * 30, 4, -52 if organ == "liver" else 40]) * self.scale
            for _ in range(count):
                tip = points[rng.integers(len(points))]
                fork = root + (tip - root) * rng.uniform(0.45, 0.7)
                twig = points[rng.integers(len(points))]
                twig = fork + (twig - fork) * min(1.0, 55 / max(math.dist(twig, fork), 1e-6))
                root, fork, tip, twig = (point.round(2) for point in (root, fork, tip, twig))
                tubes += [(organ, root, fork, radius)] + [(organ, fork, end, radius * 0.6) for end in (tip, twig)]
        return tubes


@dataclass(frozen=True)
class Lesion:
    organ: str
    kind: str  # cyst, metastasis, hypervascular, solid nodule, ground-glass nodule
    attenuation: str  # hypodense or hyperdense, against its organ
    hu: float
    center: tuple[float, ...]  # patient frame, mm
    diameters: tuple[float, ...]  # mm, one a scan; 0 where the scan has no such lesion

    def distance(self, p, scan):
        return np.sqrt(sum((a - np.float32(c)) ** 2 for a, c in zip(p, self.center, strict=True))) - np.float32(
            self.diameters[scan] / 2
        )


# === The canvas: a grid of voxels in LPS order, painted organ by organ ===


class _Canvas:
    def __init__(self, grid):
        self.grid = grid
        self.axes = [
            (grid.origin[i] + grid.spacing[i] * np.arange(grid.shape[i])).astype(np.float32) for i in range(3)
        ]
        self.hu = np.full(grid.shape, -1000, np.float32)
        self.organs, self.lesions = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.uint8)
        self.width = float(np.round(np.mean(grid.spacing) + 0.8, 3))  # of an edge: a voxel and the scanner's blur

    def region(self, low, high):
        """Slices of the grid around a patient box, and patient coordinates there; None where the scan misses it."""
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
        """Blend `hu` (a number, or a function of p) over the voxels of a shape by the share of each that it covers.

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
        """Slow tissue texture, and noise correlated between in-plane neighbours, as a reconstruction leaves it."""
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


@dataclass(frozen=True)
class Grid:
    """Voxel centres origin + spacing * index in LPS order; the patient lies at rotation @ p + shift."""

    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    shape: tuple[int, ...]
    rotation: np.ndarray
    shift: np.ndarray

    def to_world(self, points):
        turned = [sum(self.rotation[i, j] * points[:, j] for j in range(3)) for i in range(3)]  # no BLAS: same bits
        return np.stack(turned, 1) + self.shift

    def holds(self, world):
        high = np.array(self.origin) + np.array(self.spacing) * (np.array(self.shape) - 1)
        return np.all((world >= self.origin) & (world <= high), 1)


def _rotation(angles):
    """Rounded to six decimals, since sin and cos may differ in the last bit between machines."""
    (cx, sx), (cy, sy), (cz, sz) = ((math.cos(math.radians(a)), math.sin(math.radians(a))) for a in angles)
    turn_x, turn_y = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]), np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.round(np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ turn_y @ turn_x, 6)


def _paint_frame(canvas, anatomy):
    """Table, skin, fat, muscle, ribs, spine and great vessels: everything that runs through the whole scan."""
    hu, everything = anatomy.hu, (np.full(3, -900.0), np.full(3, 900.0))
    back = anatomy.body_radii[1]

    def table(p):
        return np.abs(p[1] - np.float32(back + 12) + p[0] * p[0] * np.float32(0.0006)) - np.float32(5) + np.maximum(
            np.abs(p[0]) - np.float32(190), 0)  # fmt: skip

    canvas.paint(((-210, back - 30, -900), (210, back + 30, 900)), table, -650)
    canvas.paint(everything, anatomy.body, 20)
    canvas.paint(everything, lambda p: anatomy.body(p) + 2, hu["fat"])
    canvas.paint(everything, lambda p: anatomy.body(p) + np.float32(anatomy.fat), hu["muscle"])
    canvas.paint(everything, lambda p: anatomy.cavity(p), hu["fat"] + 4)

    def rib(p):
        phase = (p[2] - np.float32(0.45) * p[1] + np.float32(anatomy.rib)) / np.float32(29)
        along = np.abs(phase - np.floor(phase) - np.float32(0.5)) * np.float32(29) - np.float32(4.5)
        across = np.abs(anatomy.cavity(p) - np.float32(anatomy.wall / 2)) - np.float32(3.2)
        front = np.maximum(-p[1] * np.float32(0.5) - p[2] - np.float32(95), np.float32(22) - np.abs(p[0]))
        return np.maximum(np.maximum(along, across), front)

    canvas.paint(((-250, -200, -135), (250, 200, 900)), rib, 330)
    (cx, cy, _), (rx, ry, _) = anatomy.parts["vertebra"][0]
    for side in (-1, 1):  # erector spinae along the back, psoas below the diaphragm
        canvas.paint(((-90, 30, -900), (90, 130, 900)), lambda p, s=side: _ellipsoid(
            p, (cx + s * 33, cy + 34, 0), (27, 17, None)), hu["muscle"])  # fmt: skip
        canvas.paint(((-90, 0, -900), (90, 110, -50)), lambda p, s=side: _ellipsoid(
            p, (cx + s * 36, cy + 4, -260), (18, 20, 190)), hu["muscle"])  # fmt: skip
    _paint_spine(canvas, anatomy, (cx, cy), (rx, ry))
    canvas.paint(anatomy.box("aorta"), lambda p: anatomy.distance("aorta", p), hu["aorta"], LABELS["aorta"])
    canvas.paint(anatomy.box("vena cava"), lambda p: anatomy.distance("vena cava", p), hu["aorta"] - 25)


def _paint_spine(canvas, anatomy, center, radii):
    (cx, cy), hu = center, anatomy.hu["spine"]

    def level(p):  # mm above the middle of the nearest disc, from -15 to 15
        phase = (p[2] + np.float32(anatomy.disc)) / np.float32(30)
        return (phase - np.floor(phase + np.float32(0.5))) * np.float32(30)

    def processes(p):
        x, y, away = np.abs(p[0] - np.float32(cx)), p[1] - np.float32(cy), np.float32(15) - np.abs(level(p))
        spinous = np.maximum(x - 4, np.abs(y - np.float32(46)) - np.float32(14))
        transverse = np.maximum(x - np.float32(37), np.abs(y - np.float32(24)) - 5)
        lamina = np.abs(_ellipsoid(p, (cx, cy + 25, 0), (14, 12, None))) - np.float32(3.5)
        return np.minimum(np.maximum(np.minimum(spinous, transverse), away - 9), np.maximum(lamina, away - 12))

    def vertebra(p):
        return _ellipsoid(p, (cx, cy, 0), (*radii, None))

    def marrow(p):  # discs are soft tissue, end plates and the outer shell are dense
        disc, shell = np.abs(level(p)), vertebra(p)
        bone = np.where((shell > -3.5) | (disc < 7.5), np.float32(hu + 230), np.float32(hu))
        return np.where(disc < 4, np.float32(85), bone)

    box = ((cx - 45, cy - 25, -900), (cx + 45, cy + 70, 900))
    canvas.paint(box, processes, hu + 240, LABELS["spine"])
    canvas.paint(box, vertebra, marrow, LABELS["spine"])
    canvas.paint(box, lambda p: _ellipsoid(p, (cx, cy + 26, 0), (9.5, 8.5, None)), 30)


def _paint_organs(canvas, anatomy):
    hu = anatomy.hu
    for center, radii, gas in anatomy.bowel:
        box = (center - radii - 4, center + radii + 4)
        canvas.paint(box, lambda p, c=center, r=radii: _ellipsoid(p, c, r), 62)
        canvas.paint(box, lambda p, c=center, r=radii: _ellipsoid(p, c, r) + 3.5, 22)
        if gas:  # gas rises to the front of a patient on the back
            canvas.paint(box, lambda p, c=center, r=radii: np.maximum(
                _ellipsoid(p, c, r) + 4, p[1] - np.float32(c[1])), -930)  # fmt: skip
    for name in ("left lung", "right lung"):
        canvas.paint(anatomy.box(name), lambda p, n=name: anatomy.distance(n, p),
                     lambda p, n=name: np.float32(hu[n]) + p[1] * np.float32(0.45), LABELS[name])  # fmt: skip
    canvas.paint(((-12, -10, 70), (12, 20, 900)), lambda p: _capsule(p, (0, 6, 85), (0, 2, 900), 8), -960)
    canvas.paint(anatomy.box("heart"), lambda p: anatomy.distance("heart", p), hu["heart"] - 20, LABELS["heart"])
    (c, r), side = anatomy.parts["heart"][0], np.array([20.0, -2.0, 0.0])
    for shift, level in ((side, hu["heart"] + 45), (-side, hu["heart"] + 30)):  # the blood of the two sides
        canvas.paint(anatomy.box("heart"), lambda p, s=shift: _ellipsoid(
            p, np.array(c) + s, np.array(r) * [0.38, 0.6, 0.62]), level, width=12)  # fmt: skip
    canvas.paint(anatomy.box("stomach"), lambda p: anatomy.distance("stomach", p), 65, LABELS["stomach"])
    fluid = np.float32(anatomy.parts["stomach"][1][0][1] - 4)
    canvas.paint(anatomy.box("stomach"), lambda p: anatomy.distance("stomach", p) + 4,
                 lambda p: np.where(p[1] < fluid, np.float32(-940), np.float32(hu["stomach"])))  # fmt: skip
    for name in ("liver", "spleen", "left kidney", "right kidney"):
        canvas.paint(anatomy.box(name), lambda p, n=name: anatomy.distance(n, p), hu[name], LABELS[name])
    for name in ("left kidney", "right kidney"):
        hilum = anatomy.hilum(name)
        canvas.paint(anatomy.box(name), lambda p, c=hilum: _ellipsoid(p, c, (11, 6, 17)), -45)
    for organ, start, end, radius in anatomy.vessels:
        box = (np.minimum(start, end) - 6, np.maximum(start, end) + 6)
        blood = hu["liver"] + 40 if organ == "liver" else 30
        canvas.paint(box, lambda p, a=start, b=end, r=radius: _capsule(p, a, b, r), blood, within=LABELS[organ])


# === The patient ===


def _stream(seed, *purpose):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=purpose)))


class Phantom:
    """Anatomy, lesions and one or two scans of patient number `patient` of seed `seed`; nothing is drawn twice.

    Args:
        seed, patient: name the patient; each pair has its own independent random streams.
        config: what varies.
        fov: "full" or one of LIMITED_FOVS, for the first scan; drawn where None.
    """

    def __init__(self, seed=0, patient=0, config=None, fov=None):
        self.seed, self.patient, self.config = int(seed), int(patient), config or PhantomConfig()
        if self.seed < 0 or self.patient < 0:
            raise ValueError(f"seed is {seed} and patient is {patient}; give whole numbers from 0 up")
        if fov not in (None, "full", *LIMITED_FOVS):
            raise ValueError(f"fov is {fov!r}; choose full, {', '.join(LIMITED_FOVS)}")
        rng = self._rng(0)
        self.scans = 2 if rng.random() < self.config.follow_up else 1
        limited = rng.random() < self.config.limited_fov and self.scans == 1  # a comparison needs both scans whole
        drawn = LIMITED_FOVS[rng.integers(len(LIMITED_FOVS))] if limited else "full"
        self.fovs = [fov or drawn, "full"]
        self.anatomy = Anatomy(self._rng(1))
        self.lesions = self._plan_lesions(self._rng(2))

    def _rng(self, *purpose):
        return _stream(self.seed, self.patient, *purpose)

    def _diameters(self, rng, organ):
        """One organ's lesions: a list of diameters, one for each scan."""
        config, jitter = self.config, self.config.diameter_jitter
        if self.scans == 2:  # small and large are as likely on either scan, so that no single scan tells the change
            pairs = config.changed_diameters
            small, large = (d + rng.uniform(-jitter, jitter) for d in pairs[rng.integers(len(pairs))])
            same = (small, large)[rng.integers(2)]
            change = rng.integers(len(CHANGES))
            return [((small, large), (large, small), (same, same), (0.0, same))[change]]
        several = rng.random() < 0.8 and config.max_lesions > 1 and organ in COUNT_ORGANS  # else high counts are rare
        count = int(rng.integers(2, config.max_lesions + 1)) if several else 1
        sizes = config.diameters if count == 1 else config.diameters[: max(1, len(config.diameters) - 2)]
        return [(float(rng.choice(sizes)) + rng.uniform(-jitter, jitter),) for _ in range(count)]

    def _plan_lesions(self, rng):
        lesions = []
        for organ in LESION_ORGANS:
            sick, wanted = rng.random() < self.config.lesion_probability, self._diameters(rng, organ)
            for diameters in wanted if sick else ():
                center = self._place(rng, organ, max(diameters) / 2, lesions)
                if center is not None:
                    diameters = tuple(round(float(d), 2) for d in diameters)
                    lesions.append(Lesion(organ, *self._tissue(rng, organ), center, diameters))
        return tuple(lesions)

    def _tissue(self, rng, organ):
        contrast, kind = rng.uniform(*self.config.contrast), rng.integers(2)
        if "lung" in organ:
            if rng.random() < self.config.ground_glass:
                return "ground-glass nodule", "hyperdense", round(float(rng.uniform(-520, -420)))
            return "solid nodule", "hyperdense", round(float(rng.uniform(10, 60)))
        if rng.random() < 0.5:
            return "hypervascular", "hyperdense", round(float(self.anatomy.hu[organ] + contrast))
        if kind:
            return "cyst", "hypodense", round(float(rng.uniform(0, 15)))
        return "metastasis", "hypodense", round(float(self.anatomy.hu[organ] - contrast))

    def _place(self, rng, organ, radius, lesions):
        """A centre whose ball lies in the organ (from a kidney it may bulge), clear of others; None without room."""
        points, depth = self.anatomy.lattice[organ]
        free = depth < -(radius + 2)
        if "kidney" in organ:  # in the cortex; a large one bulges
            hilum = self.anatomy.hilum(organ)
            free = (depth < -min(radius + 1, 12)) & (((points - hilum) ** 2).sum(1) > (14 + radius / 2) ** 2)
        for other in lesions:
            gap = radius + max(other.diameters) / 2 + 6
            free &= ((points - other.center) ** 2).sum(1) > gap**2
        if not free.any():
            return None
        return tuple((points[free][rng.integers(free.sum())] + rng.uniform(-1, 1, 3)).round(2).tolist())

    def grid(self, scan=0):
        """The scan's grid in LPS order: pose, spacing and a field of view cut where the organs of this pose end."""
        rng, anatomy = self._rng(3, scan), self.anatomy
        (low, high), (thin, thick), _ = PRESETS[self.config.size]
        plane, slices = round(rng.uniform(low, high), 3), round(rng.uniform(thin, thick), 3)
        turn = rng.uniform(-1, 1, 3) * [self.config.tilt, self.config.tilt, self.config.roll]
        rotation, shift = _rotation(turn), np.round(rng.uniform([-8, -10, -40], [8, 10, 40]), 2)
        pose = Grid((1, 1, 1), (0, 0, 0), (1, 1, 1), rotation, shift)
        lain = {name: pose.to_world(points) for name, (points, _) in anatomy.lattice.items()}
        reach = {name: (points.min(0), points.max(0)) for name, points in lain.items()}
        margin = rng.uniform(7, 16, 6)  # above the 6 mm of the lattice
        start, end = ([pick(reach[n][i][a] for n in reach) for a in range(3)] for i, pick in ((0, min), (1, max)))
        half = anatomy.body_radii[0] + 8 + margin[0]  # a square field of view in plane, the patient near its middle
        start[0], end[0] = shift[0] - half, shift[0] + half
        start[1], end[1] = shift[1] - half + 12, shift[1] + half + 12
        start[2], end[2] = start[2] - margin[2], end[2] + margin[3]
        kidneys, lungs = ("left kidney", "right kidney"), ("left lung", "right lung")
        fov = self.fovs[scan]
        if fov in ("chest", "upper"):
            above = kidneys if fov == "upper" else (*kidneys, "liver", "spleen", "stomach")
            start[2] = max(reach[n][1][2] for n in above) + margin[4]
        elif fov in ("lower", "lumbar"):
            below = lungs if fov == "lower" else ("liver", "spleen", "stomach")
            end[2] = min(reach[n][0][2] for n in below) - margin[4]
            start[2] = min(start[2], end[2] - 110)
        elif fov == "left side":
            start[0] = max(reach[n][1][0] for n in ("right kidney", "right lung")) + margin[4]
        elif fov == "right side":
            end[0] = min(reach[n][0][0] for n in ("left kidney", "left lung", "spleen")) - margin[4]
        spacing, start = (plane, plane, slices), np.round(start, 2)
        shape = tuple(int((e - s) / h) + 1 for s, e, h in zip(start, end, spacing, strict=True))
        return Grid(spacing, tuple(start.tolist()), shape, rotation, shift)

    def orientation(self, scan=0):
        codes = self.config.orientations
        return codes[self._rng(4, scan).integers(len(codes))]

    def render(self, scan=0, orientation=None):
        """Paint one scan.

        Args:
            scan: 0, or 1 for the second scan of a patient with two.
            orientation: positive directions of the stored axes, such as "RAS"; drawn where None.
        Returns:
            image (int16, HU), organs (uint8, LABELS), lesions (uint8, facts' `label`): SimpleITK images on one grid;
            and facts, a dict with lengths in mm, volumes in ml and positions in LPS.
        """
        if not 0 <= scan < self.scans:
            raise ValueError(f"scan is {scan}, but this patient has {self.scans}; scans count from 0")
        code = orientation or self.orientation(scan)
        if sorted(_AXIS.get(letter, (9, 0))[0] for letter in code) != [0, 1, 2]:
            raise ValueError(f"orientation {code!r} needs one letter each of L/R, P/A and S/I, such as RAS")
        grid = self.grid(scan)
        canvas = _Canvas(grid)
        _paint_frame(canvas, self.anatomy)
        _paint_organs(canvas, self.anatomy)
        seen = [lesion for lesion in self.lesions if lesion.diameters[scan]]
        for label, lesion in enumerate(seen, 1):
            self._paint_lesion(canvas, lesion, scan, label)
        rng = self._rng(5, scan)
        canvas.add_noise(rng, rng.uniform(*PRESETS[self.config.size][2]))
        voxels = np.rint(np.clip(canvas.hu, -1024, 3071)).astype(np.int16)
        images = [_store(array, grid, code) for array in (voxels, canvas.organs, canvas.lesions)]
        facts = self._facts(scan, code, grid, canvas, seen)
        return *images, facts

    def _paint_lesion(self, canvas, lesion, scan, label):
        reach = lesion.diameters[scan] / 2 + 10
        box = (np.array(lesion.center) - reach, np.array(lesion.center) + reach)
        soft = canvas.width + (3 if lesion.kind == "metastasis" else 0)
        canvas.paint(box, lambda p: lesion.distance(p, scan), lesion.hu, LABELS[lesion.organ], soft)
        region = canvas.region(*box)
        if region is not None:
            canvas.lesions[region[0]][lesion.distance(region[1], scan) < 0] = label

    def _facts(self, scan, code, grid, canvas, seen):
        voxel = math.prod(grid.spacing) / 1000
        counts = np.bincount(canvas.organs.ravel(), minlength=len(LABELS) + 1)
        rim = np.concatenate([canvas.organs.take((0, -1), axis).ravel() for axis in range(3)])
        organs = {}
        for name, label in LABELS.items():
            organs[name] = {"label": label, "volume_ml": round(float(counts[label]) * voxel, 2)}
            organs[name]["touches_edge"] = bool((rim == label).any())
        for name, (points, _) in self.anatomy.lattice.items():
            organs[name]["coverage"] = round(float(grid.holds(grid.to_world(points)).mean()), 4)
        lesions = []
        for label, lesion in enumerate(seen, 1):
            world, diameter = grid.to_world(np.array([lesion.center]))[0], lesion.diameters[scan]
            lesions.append({
                "label": label, "organ": lesion.organ, "kind": lesion.kind, "attenuation": lesion.attenuation,
                "hu": lesion.hu, "diameter_mm": diameter, "volume_ml": round(math.pi * diameter**3 / 6000, 3),
                "center_lps": world.round(2).tolist(),
                "previous_mm": lesion.diameters[0] if scan else None,
            })  # fmt: skip
        return {
            "seed": self.seed, "patient": self.patient, "scan": scan, "fov": self.fovs[scan], "orientation": code,
            "spacing_lps": list(grid.spacing), "shape_lps": list(grid.shape), "organs": organs, "lesions": lesions,
        }  # fmt: skip


def _store(array, grid, code):
    """(x, y, z) LPS array -> SimpleITK image whose index axes run towards `code`; every voxel stays where it is."""
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


def make_patient(seed=0, patient=0, scan=0, config=None, orientation=None, fov=None):
    """One scan in memory: (image, organ labels, lesion labels, facts), as `Phantom.render` returns them."""
    return Phantom(seed, patient, config, fov).render(scan, orientation)


# === Questions ===

ANSWERS = {
    "presence": ("yes", "no"),
    "side": ("left", "right"),
    "count": ("0", "1", "2", "3"),
    "largest": ("liver", "spleen", "kidney", "lung"),
    "size_open": None,  # the diameters' classes
    "size_choice": None,
    "attenuation": ("hypodense", "hyperdense"),
    "fov": ("yes", "no"),
    "comparison": CHANGES,
}
QUESTIONS = {
    "presence": ("Is there a lesion in the {key}?", "Does the {key} contain a lesion?"),
    "side": ("Which {key} has a lesion, left or right?", "On which side is the {key} lesion, left or right?"),
    "count": ("How many lesions are in the {key}?", "Count the lesions in the {key}."),
    "largest": ("Which organ has the largest lesion: liver, spleen, kidney or lung?",),
    "size_open": ("What is the diameter of the lesion in the {key}, in mm to the nearest {step}?",),
    "size_choice": ("What is the diameter of the lesion in the {key}? {options}",),
    "attenuation": ("Is the lesion in the {key} hypodense or hyperdense?",),
    "fov": ("Is the {key} outside the field of view?", "Has the field of view left out the {key}?"),
    "comparison": ("From the first scan to the second, is the lesion in the {key} grown, shrunk, unchanged or new?",),
}


def _scan_questions(facts, config):
    """(task, key, answer) of everything that one scan can be asked without doubt about the answer."""
    coverage = {name: facts["organs"][name]["coverage"] for name in FOV_ORGANS}
    whole = {name for name, share in coverage.items() if share == 1 and not facts["organs"][name]["touches_edge"]}
    found = defaultdict(list)
    for lesion in facts["lesions"]:
        found[lesion["organ"]].append(lesion)
    for name in FOV_ORGANS:  # an organ that is cut through is neither in nor out: it is not asked about
        if name in whole or (coverage[name] == 0 and facts["organs"][name]["volume_ml"] == 0):
            yield "fov", name, "no" if name in whole else "yes"
    for name in LESION_ORGANS:
        if name in whole:
            yield "presence", name, "yes" if found[name] else "no"
        if name in whole and name in COUNT_ORGANS:
            yield "count", name, str(len(found[name]))
        if name in whole and len(found[name]) == 1:
            diameter = found[name][0]["diameter_mm"]
            nearest = min(config.diameters, key=lambda d, wanted=diameter: abs(d - wanted))
            if abs(nearest - diameter) <= config.diameter_jitter:
                yield "size_open", name, f"{nearest:g}"
                yield "size_choice", name, f"{nearest:g}"
            if "lung" not in name:
                yield "attenuation", name, found[name][0]["attenuation"]
    for pair in ("kidney", "lung"):
        sides = [side for side in ("left", "right") if found[f"{side} {pair}"]]
        if len(sides) == 1 and {f"left {pair}", f"right {pair}"} <= whole:
            yield "side", pair, sides[0]
    ranked = sorted(facts["lesions"], key=lambda lesion: -lesion["diameter_mm"])
    if ranked and set(LESION_ORGANS) <= whole:
        if len(ranked) == 1 or ranked[0]["diameter_mm"] - ranked[1]["diameter_mm"] >= 4:
            yield "largest", "", ranked[0]["organ"].split()[-1]


def _comparisons(first, second):
    """(task, key, answer) of a pair of scans: each organ that has one lesion on the second scan."""
    for lesion in second["lesions"]:
        if sum(other["organ"] == lesion["organ"] for other in second["lesions"]) == 1:
            before, now = lesion["previous_mm"], lesion["diameter_mm"]
            change = "new" if not before else "grown" if now > before else "shrunk" if now < before else "unchanged"
            yield "comparison", lesion["organ"], change


def _candidates(folder, scans, config):
    """Rows without text of one patient; `scans` are the facts of its scans, `folder` where their files lie."""
    split, patient = split_of(scans[0]["patient"], config), f"p{scans[0]['patient']:05d}"
    asked = [((facts["scan"],), entry) for facts in scans for entry in _scan_questions(facts, config.phantom)]
    asked += [((0, 1), entry) for entry in _comparisons(*scans)] if len(scans) == 2 else []
    for which, (task, key, answer) in asked:
        name = "-".join([patient, "".join(str(s) for s in which), task, *key.split()])
        files = [[f"{folder}/scan{s}{kind}.nii.gz" for s in which] for kind in ("", "_organs", "_lesions")]
        yield {"id": name, "patient": patient, "split": split, "task": task, "key": key, "answer": answer,
               "volumes": files[0], "labels": files[1], "lesions": files[2]}  # fmt: skip


def write_questions(candidates, config):
    """Balance and word the questions: within a split, each text gets each of its answers equally often.

    Args:
        candidates: rows of `_candidates`, of all patients.
        config: DataConfig.
    Returns:
        rows in the training format, and a Counter of the candidates left over by task.
    """
    cells, rows, left = defaultdict(lambda: defaultdict(list)), [], Counter()
    for row in candidates:
        cells[row["split"], row["task"], row["key"]][row["answer"]].append(row)
    sizes = tuple(f"{d:g}" for d in config.phantom.diameters)
    for number, (cell, by_answer) in enumerate(sorted(cells.items())):
        rng = _stream(config.seed, 2**31, number)
        answers = ANSWERS[cell[1]] or sizes
        kept = min(len(by_answer[answer]) for answer in answers)
        left[cell[1]] += sum(len(group) for group in by_answer.values()) - kept * len(answers)
        orders = [rng.permutation(len(answers)) for _ in range(kept)]
        for answer in answers:
            group = by_answer[answer]
            for i, pick in enumerate(rng.permutation(len(group))[:kept]):  # the i-th of each answer gets the same text
                rows.append(_word(group[pick], i, [answers[j] for j in orders[i]], answers, config))
    return sorted(rows, key=lambda row: row["id"]), left


def _word(row, i, options, answers, config):
    row, task = dict(row), row["task"]
    key, answer, wordings = row.pop("key"), row.pop("answer"), QUESTIONS[task]
    step = min(b - a for a, b in itertools.pairwise(config.phantom.diameters))
    letters = "ABCDEFGH"[: len(options)]
    listed = " ".join(f"{letter}) {option} mm" for letter, option in zip(letters, options, strict=True))
    text = wordings[i % len(wordings)].format(key=key, options=listed, step=f"{step:g}")
    if task == "size_choice":
        answer, answers = letters[options.index(answer)], tuple(letters)
    prompt = [*({"type": "volume"} for _ in row["volumes"]), {"type": "text", "text": text}]
    reply = [{"type": "text", "text": answer}]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return {**row, "messages": messages, "answer": answer, "choices": None if task == "size_open" else list(answers)}


def blind_baseline(train, test):
    """Best answer from the text alone, fitted on train, scored on test.

    Returns:
        {task: (rows in train, rows in test, chance, accuracy)}; accuracy is nan for a task without test rows.
    """
    seen, overall, table = defaultdict(Counter), defaultdict(Counter), {}
    for row in train:
        seen[row["task"], question_text(row)][row["answer"]] += 1
        overall[row["task"]][row["answer"]] += 1
    for task in ANSWERS:
        rows = [row for row in test if row["task"] == task]
        guesses = [seen.get((task, question_text(row))) or overall[task] for row in rows]
        hits = sum(bool(g) and g.most_common(1)[0][0] == row["answer"] for g, row in zip(guesses, rows, strict=True))
        chance = 1 / max(len({row["answer"] for row in rows}), 1)
        table[task] = (sum(overall[task].values()), len(rows), chance, hits / len(rows) if rows else math.nan)
    return table


def question_text(row):
    return row["messages"][0]["content"][-1]["text"]


# === The data set ===


@dataclass(frozen=True)
class DataConfig:
    """A data set: its seed, its splits' shares and its patients."""

    seed: int = 0
    val: float = 0.1
    test: float = 0.2
    phantom: PhantomConfig = PhantomConfig()

    def __post_init__(self):
        if self.seed < 0 or self.val < 0 or self.test < 0 or self.val + self.test > 1:
            seen = f"seed {self.seed}, val {self.val}, test {self.test}"
            raise ValueError(f"{seen}: none may be below 0, and the two shares are at most 1 together")


def split_of(patient, config):
    """The split of patient number `patient`. Multiples of the golden ratio fill the unit interval evenly: the shares
    hold at any number of patients, and a data set that grows never moves a patient."""
    place = (patient + 1) * 0.6180339887498949 % 1
    return "test" if place < config.test else "val" if place < config.test + config.val else "train"


def _write_json(path, value):
    partial = path.with_name(path.name + ".partial")
    partial.write_text(value if isinstance(value, str) else json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_patient(task):
    """Write one patient's scans, label maps and facts, and return the facts; the folder is named when all is in it."""
    root, patient, config = task
    folder, partial = Path(root) / "scans" / f"p{patient:05d}", Path(root) / "scans" / f".p{patient:05d}.partial"
    if folder.exists():
        return json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    phantom, scans = Phantom(config.seed, patient, config.phantom), []
    for scan in range(phantom.scans):
        *images, facts = phantom.render(scan)
        for image, kind in zip(images, ("", "_organs", "_lesions"), strict=True):
            sitk.WriteImage(image, str(partial / f"scan{scan}{kind}.nii.gz"), True, 1)  # noise packs no better
        scans.append(facts)
    _write_json(partial / "facts.json", scans)
    os.replace(partial, folder)
    return scans


def _stamp(root, config):
    """Keep the settings beside the data, so that a second run completes this data set or refuses to mix in another."""
    settings, stamp = json.loads(json.dumps(asdict(config))), root / "settings.json"
    settings |= settings.pop("phantom")
    if stamp.exists():
        held = json.loads(stamp.read_text(encoding="utf-8"))
        other = [name for name in settings if held.get(name) != settings[name]]
        if other:
            seen = ", ".join(f"{name} {held.get(name)} (asked for {settings[name]})" for name in other)
            raise ValueError(f"the folder holds a data set with {seen}; choose another folder, or remove it")
    elif any(root.iterdir()):
        raise ValueError("the folder is not empty and holds no settings.json of phantoms; choose another folder")
    else:
        _write_json(stamp, settings)


def write_data_set(root, patients, config, workers=1):
    """Write or complete a data set of `patients` patients; returns its rows and its blind baseline."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    _stamp(root, config)
    tasks = [(str(root), patient, config) for patient in range(patients)]
    with ProcessPoolExecutor(workers) if workers > 1 else _Serial() as pool:
        facts = list(tqdm(pool.map(write_patient, tasks), total=patients, desc="patients", unit="patient"))
    candidates = [row for scans in facts for row in _candidates(f"scans/p{scans[0]['patient']:05d}", scans, config)]
    rows, left = write_questions(candidates, config)
    by_split = {split: [row for row in rows if row["split"] == split] for split in ("train", "val", "test")}
    for split, group in by_split.items():
        _write_json(root / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in group))
    table = blind_baseline(by_split["train"], by_split["test"])
    lines = ["| task | train | test | chance | blind baseline | left out to balance |", "|---|---|---|---|---|---|"]
    for task, (seen, scored, chance, blind) in table.items():
        lines.append(f"| {task} | {seen} | {scored} | {chance:.3f} | {blind:.3f} | {left[task]} |")
    report = "\n".join(lines)
    _write_json(root / "README.md", _card(config, patients, by_split, report))
    return rows, table, report


class _Serial:
    map = staticmethod(map)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def _card(config, patients, by_split, report):
    rows = ", ".join(f"{split} {len(group)}" for split, group in by_split.items())
    return f"""---
license: cc0-1.0
task_categories: [visual-question-answering]
tags: [medical, ct, synthetic, 3d]
configs:
- config_name: default
  data_files:
{chr(10).join(f"  - {{split: {'validation' if s == 'val' else s}, path: {s}.jsonl}}" for s in by_split)}
---
# Phantom torso CTs

{patients} synthetic patients made by `phantoms.py` from seed {config.seed}: analytic organs and lesions, no real
person's data. Voxels are Hounsfield units (int16). They teach and test a method; they say nothing about clinical use.

Questions: {rows}. Splits are by patient. Within a split, each question text has each
answer equally often, so that the blind baseline (the best answer from the text alone, fitted on train, scored on test)
is chance:

{report}

Files: `scans/pNNNNN/scanK.nii.gz`, `scanK_organs.nii.gz` ({", ".join(f"{v} {k}" for k, v in LABELS.items())}),
`scanK_lesions.nii.gz` (the `label` of each lesion in `facts.json`), `facts.json` (mm, ml, LPS); `settings.json`.
A row holds `id`, `patient`, `split`, `task`, `volumes`, `labels`, `lesions` (paths from this folder), `messages`,
`answer`, `choices` (null for an open answer). A size is the sphere's diameter to the nearest class; an organ that the
field of view cuts through is not asked about. Orientation, spacing, pose and field of view differ from scan to scan.
"""


def _parse(argv=None):
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=defaults)
    parser.add_argument("--one", metavar="OUT.nii.gz", help="write one scan and print its facts")
    parser.add_argument("--output", metavar="DIR", help="write a data set here, or complete the one that is here")
    parser.add_argument("--patients", type=int, default=600)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--fov", choices=("full", *LIMITED_FOVS), default="full", help="field of view of --one")
    for field in [f for f in (*fields(DataConfig), *fields(PhantomConfig)) if f.name != "phantom"]:
        if field.default is MISSING:
            raise TypeError(f"{field.name} needs a default")
        many = isinstance(field.default, tuple)
        kind = type(field.default[0] if many else field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, nargs="+" if many else None,
                            default=field.default, help=" ")  # fmt: skip
    args = parser.parse_args(argv)
    if bool(args.one) == bool(args.output):
        parser.error("give either --one OUT.nii.gz or --output DIR")
    if args.patients < 1 or args.workers < 1:
        parser.error(f"--patients {args.patients} and --workers {args.workers} must be at least 1")
    values = {f.name: getattr(args, f.name) for f in fields(PhantomConfig)}
    try:
        phantom = PhantomConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        return args, DataConfig(args.seed, args.val, args.test, phantom)
    except ValueError as error:
        parser.error(str(error))


def main(argv=None):
    args, config = _parse(argv)
    if args.one:
        image, _, _, facts = make_patient(config.seed, config=config.phantom, fov=args.fov)
        sitk.WriteImage(image, args.one, True, 1)
        print(json.dumps(facts, indent=1))
    else:
        _, _, report = write_data_set(args.output, args.patients, config, args.workers)
        print(report)


if __name__ == "__main__":
    main()
