"""A synthetic patient: its settings, its lesions, and one or two scans with their facts.

    image, organs, lesions, facts = make_patient(seed=3, patient=7)

Each patient and purpose has a separate random stream, so that a seed gives the same voxels in any order and with any
number of workers.
"""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np

from photon.phantoms.anatomy import COUNT_ORGANS, LABELS, LESION_ORGANS, Anatomy, paint_frame, paint_organs
from photon.phantoms.canvas import Canvas, Grid, check_orientation, rotation_matrix, store

LIMITED_FOVS = ("chest", "upper", "lower", "lumbar", "left side", "right side")
PRESETS = {  # in-plane spacing, slice spacing (mm, ranges) and noise (HU, range)
    "small": ((4.0, 5.5), (4.0, 6.0), (7.0, 14.0)),
    "full": ((1.0, 1.8), (1.5, 3.0), (14.0, 26.0)),
}
CHANGES = ("grown", "shrunk", "unchanged", "new")


def setting(default, help):
    """A dataclass field with a help text, which `python -m photon.phantoms --help` shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PhantomConfig:
    """What varies from patient to patient. Each field is also an option of `python -m photon.phantoms`."""

    size: str = setting("small", "voxels: small (4-6 mm) or full (1-2 mm in plane, 1.5-3 mm slices)")
    lesion_probability: float = setting(0.5, "of each of the six organs")
    max_lesions: int = setting(3, "in the liver and in each lung; the other organs have at most one")
    diameters: tuple[float, ...] = setting((15.0, 20.0, 25.0, 30.0, 35.0), "classes of the size questions, mm")
    diameter_jitter: float = setting(1.5, "largest distance of a diameter from its class, mm")
    contrast: tuple[float, ...] = setting((55.0, 95.0), "between a solid lesion and its organ, either sign, HU")
    ground_glass: float = setting(0.5, "share of lung nodules that are ground glass; the others are solid")
    follow_up: float = setting(0.4, "share of patients with a second scan")
    growth: float = setting(1.4, "smallest ratio between the classes of a lesion that has grown or shrunk")
    option_orders: int = setting(1, "times that each size is asked by letter, with the options in other orders")
    limited_fov: float = setting(0.5, "share of the other patients whose field of view leaves organs out")
    roll: float = setting(6.0, "largest turn about the long axis, degrees")
    tilt: float = setting(3.0, "largest turn about each of the other two axes, degrees")
    orientations: tuple[str, ...] = setting(
        ("LPS", "RAS", "LAI", "RAI", "LAS", "PSR", "SLP", "ILA"), "positive directions of the stored axes"
    )

    def __post_init__(self):
        if self.size not in PRESETS:
            raise ValueError(f"size is {self.size!r}; choose one of {', '.join(PRESETS)}")
        for name in ("lesion_probability", "follow_up", "limited_fov", "ground_glass"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a probability from 0 to 1")
        if self.option_orders < 1:
            raise ValueError(f"option_orders is {self.option_orders}; give 1 or more")
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
            check_orientation(code)

    @property
    def changed_diameters(self):
        return [(a, b) for a, b in itertools.combinations(self.diameters, 2) if b / a >= self.growth]


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


def stream(seed, *purpose):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=purpose)))


class Phantom:
    """Anatomy, lesions and one or two scans of patient number `patient` of seed `seed`.

    Args:
        seed, patient: name the patient; each pair has independent random streams.
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
        limited = rng.random() < self.config.limited_fov and self.scans == 1  # a comparison needs two complete scans
        drawn = LIMITED_FOVS[rng.integers(len(LIMITED_FOVS))] if limited else "full"
        self.fovs = [fov or drawn, "full"]
        self.anatomy = Anatomy(self._rng(1))
        self.lesions = self._plan_lesions(self._rng(2))

    def _rng(self, *purpose):
        return stream(self.seed, self.patient, *purpose)

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
        """A centre whose ball lies in the organ and clear of other lesions; `None` where there is no room. In a kidney
        the ball may bulge out."""
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
        rotation, shift = rotation_matrix(turn), np.round(rng.uniform([-8, -10, -40], [8, 10, 40]), 2)
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
        """One scan, painted.

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
        check_orientation(code)
        grid = self.grid(scan)
        canvas = Canvas(grid)
        paint_frame(canvas, self.anatomy)
        paint_organs(canvas, self.anatomy)
        present = [lesion for lesion in self.lesions if lesion.diameters[scan]]
        for label, lesion in enumerate(present, 1):
            self._paint_lesion(canvas, lesion, scan, label)
        rng = self._rng(5, scan)
        canvas.add_noise(rng, rng.uniform(*PRESETS[self.config.size][2]))
        voxels = np.rint(np.clip(canvas.hu, -1024, 3071)).astype(np.int16)
        images = [store(array, grid, code) for array in (voxels, canvas.organs, canvas.lesions)]
        facts = self._facts(scan, code, grid, canvas, present)
        return *images, facts

    def _paint_lesion(self, canvas, lesion, scan, label):
        reach = lesion.diameters[scan] / 2 + 10
        box = (np.array(lesion.center) - reach, np.array(lesion.center) + reach)
        soft = canvas.width + (3 if lesion.kind == "metastasis" else 0)
        canvas.paint(box, lambda p: lesion.distance(p, scan), lesion.hu, LABELS[lesion.organ], soft)
        region = canvas.region(*box)
        if region is not None:
            canvas.lesions[region[0]][lesion.distance(region[1], scan) < 0] = label

    def _facts(self, scan, code, grid, canvas, present):
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
        for label, lesion in enumerate(present, 1):
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


def make_patient(seed=0, patient=0, scan=0, config=None, orientation=None, fov=None):
    """One scan in memory: (image, organ labels, lesion labels, facts), as `Phantom.render` returns them."""
    return Phantom(seed, patient, config, fov).render(scan, orientation)
