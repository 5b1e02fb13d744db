"""A synthetic patient's organs as analytic shapes, and the order in which their tissues are painted.

Organs are shapes in the patient's frame (mm; x to the left, y to the back, z to the head: LPS), so that the truth does
not depend on the voxel grid. Shapes use only + - * / and sqrt, which IEEE 754 fixes to the last bit.
"""

import math

import numpy as np

LABELS = {
    "liver": 1, "spleen": 2, "left kidney": 3, "right kidney": 4, "left lung": 5, "right lung": 6,
    "stomach": 7, "aorta": 8, "spine": 9, "heart": 10,
}  # fmt: skip
LESION_ORGANS = ("liver", "spleen", "left kidney", "right kidney", "left lung", "right lung")
FOV_ORGANS = (*LESION_ORGANS, "stomach")
COUNT_ORGANS = ("liver", "left lung", "right lung")  # large enough for several lesions


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


# === Painting: later shapes lie over earlier ones ===


def paint_frame(canvas, anatomy):
    """Paints what runs through the scan from end to end: table, skin, fat, muscle, ribs, spine and great vessels."""
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


def paint_organs(canvas, anatomy):
    """Paints bowel, lungs, heart, stomach, liver, spleen, kidneys and their vessels."""
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
