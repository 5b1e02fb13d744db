"""One regular stack of parallel slices: which phase, where, how even, how tilted.

Geometry comes from positions and orientations alone. Scanners and exporters get slice thickness, slice location, the
order of files and the gantry-tilt tag wrong, so none of these is used.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .scan_faults_photon import Findings, VolumeError, VolumeFault
from .scan_files_photon import choose_frame

UNEVEN_WARN, UNEVEN_REFUSE = 1e-3, 1e-2  # of the median slice distance
SAME_PLACE = 1e-2  # of the in-plane spacing: slices closer than this along the normal are one place
MIN_TILT = 0.1  # degrees
# Tags that may tell apart slices in one place, in this order; times come last, since they also differ by slice.
PHASE_TAGS = [
    "TemporalPositionIdentifier", "TemporalPositionIndex", "NominalPercentageOfCardiacPhase", "TriggerTime",
    "EchoTime", "EffectiveEchoTime", "DiffusionBValue", "StackID", "AcquisitionNumber", "AcquisitionTime",
]  # fmt: skip


@dataclass
class Slice:
    """One plane of voxels: a classic file, or one frame of a multi-frame file."""

    path: Path
    frame: int | None
    position: np.ndarray  # (3,) LPS mm, centre of the first voxel
    orientation: np.ndarray  # (6,) cosines of a row, then of a column
    spacing: np.ndarray  # (2,) mm between rows, between columns
    shape: tuple[int, int]  # rows, columns
    slope: float
    intercept: float
    unscaled: tuple[bool, bool]  # whether slope, intercept are missing, and so 1, 0
    phases: dict


def one_phase(slices: list[Slice], frame: int | None, findings: Findings) -> list[Slice]:
    """The slices of one time, phase or echo, sorted along their normal."""
    normal = _normal(slices)
    heights = np.array([s.position @ normal for s in slices])
    slices = [slices[i] for i in np.argsort(heights, kind="stable")]
    places = _places(slices, normal)
    repeats = {len(p) for p in places}
    if repeats == {1}:
        choose_frame(1, frame)
        return slices
    slices = _without_copies(places, findings)
    places = _places(slices, normal)
    if {len(p) for p in places} == {1}:
        choose_frame(1, frame)
        return slices
    for name in PHASE_TAGS:
        phases = defaultdict(list)
        for item in slices:
            phases[item.phases.get(name)].append(item)
        complete = all(len(p) == len(places) == len(_places(p, normal)) for p in phases.values())
        if None not in phases and len(phases) > 1 and complete:
            return phases[sorted(phases)[choose_frame(len(phases), frame, name)]]
    raise VolumeError(
        VolumeFault.DUPLICATE_SLICES,
        f"{len(slices)} slices lie in {len(places)} places, and no tag divides them into complete scans. Keep one "
        "slice for each place in the folder.",
    )


def _normal(slices: list[Slice]) -> np.ndarray:
    first = slices[0].orientation
    row, column = first[:3], first[3:]
    if not np.isfinite(first).all() or max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column)) > 1e-2:
        raise VolumeError(
            VolumeFault.DEGENERATE_AFFINE, "The image orientation is no pair of perpendicular unit vectors."
        )
    if not all(np.isfinite(s.position).all() and np.isfinite(s.spacing).all() for s in slices):
        raise VolumeError(VolumeFault.DEGENERATE_AFFINE, "A slice's position or pixel spacing is not finite.")
    if min(s.spacing.min() for s in slices) <= 0:
        raise VolumeError(VolumeFault.DEGENERATE_AFFINE, "The pixel spacing is not positive.")
    if not all(np.abs(s.orientation - first).max() <= 1e-3 for s in slices):
        raise VolumeError(
            VolumeFault.IMAGE_ORIENTATION_INCONSISTENT,
            "The slices are not parallel (a localiser, or several planes in one series). Give one stack of "
            "parallel slices.",
        )
    normal = np.cross(row, column)
    return normal / np.linalg.norm(normal)


def _places(slices: list[Slice], normal: np.ndarray) -> list[list[Slice]]:
    places: list[list[Slice]] = []
    for item in slices:
        near = SAME_PLACE * item.spacing.min()
        if places and abs((item.position - places[-1][0].position) @ normal) < near:
            places[-1].append(item)
        else:
            places.append([item])
    return places


def _without_copies(places: list[list[Slice]], findings: Findings) -> list[Slice]:
    kept, copies = [], 0
    for place in places:
        contents = set()
        for item in place:
            content = (hashlib.sha256(item.path.read_bytes()).digest(), item.frame) if len(place) > 1 else None
            copies += content in contents
            if content not in contents:
                kept.append(item)
            contents.add(content)
    if copies:
        findings.warn(VolumeFault.DUPLICATE_SLICES, f"{copies} slices are copies, equal byte for byte; read once.")
    return kept


def place_stack(slices: list[Slice], gaps: str, findings: Findings):
    """(4 x 4 affine to LPS mm, number of slices, heights): heights in mm only where slices must be interpolated.

    Heights are measured along the normal. A movement of the positions across the normal is gantry tilt, and stays in
    the affine.
    """
    if len(slices) < 4:
        raise VolumeError(
            VolumeFault.TOO_FEW_SLICES,
            f"The series has {len(slices)} slices; a volume has at least 4. Localisers and single slices are no "
            "scans.",
        )
    normal, positions = _normal(slices), np.array([s.position for s in slices])
    heights = (positions - positions[0]) @ normal
    steps = np.diff(heights)
    median = float(np.median(steps))
    uneven = np.abs(steps / median - 1)
    worst = int(uneven.argmax())
    depth, interpolated = len(slices), False
    if uneven[worst] > UNEVEN_REFUSE:
        _refuse_gap(steps, median, worst, gaps, findings)
        depth, interpolated = round(heights[-1] / median) + 1, True
    elif uneven[worst] > UNEVEN_WARN:
        findings.warn(
            VolumeFault.SLICE_INCREMENT_INCONSISTENT,
            f"The slice distance varies by {100 * uneven[worst]:.2f} % of {median:.3f} mm; read as even.",
        )
    drift = (positions[-1] - positions[0]) / heights[-1]  # mm along the stack, one mm of height each
    off = np.linalg.norm(positions - positions[0] - heights[:, None] * drift, axis=1).max()
    if off > max(0.1, 0.1 * slices[0].spacing.min()):
        raise VolumeError(
            VolumeFault.SLICE_INCREMENT_INCONSISTENT,
            f"The slices are shifted against each other by up to {off:.2f} mm, off any straight line. Give one stack.",
        )
    tilt = np.degrees(np.arccos(np.clip(drift @ normal / np.linalg.norm(drift), -1, 1)))
    if tilt > MIN_TILT:
        findings.warn(
            VolumeFault.GANTRY_TILT, f"The slices are tilted by {tilt:.2f} degrees; resampled through the full affine."
        )
    affine, (row, column) = np.eye(4), slices[0].orientation.reshape(2, 3)
    affine[:3, 0], affine[:3, 1] = row * slices[0].spacing[1], column * slices[0].spacing[0]
    affine[:3, 2], affine[:3, 3] = (positions[-1] - positions[0]) / (depth - 1), positions[0]
    if abs(slices[0].spacing[0] / slices[0].spacing[1] - 1) > 1e-3:
        findings.note(VolumeFault.ANISOTROPIC_IN_PLANE, "Row and column spacing differ; both are used.")
    return affine, depth, heights if interpolated else None


def _refuse_gap(steps, median: float, worst: int, gaps: str, findings: Findings) -> None:
    missing = steps / median - np.rint(steps / median)
    whole = np.abs(missing).max() < 0.05 and steps[worst] > 1.5 * median
    fault = VolumeFault.MISSING_SLICES if whole else VolumeFault.SLICE_INCREMENT_INCONSISTENT
    gap = (
        f"Between slices {worst + 1} and {worst + 2} of {len(steps) + 1} (counted along the stack) the distance is "
        f"{steps[worst]:.3f} mm, elsewhere {median:.3f} mm"
    )
    if gaps == "refuse":
        raise VolumeError(
            fault, f'{gap}. Fetch the missing slices, or accept interpolated ones with gaps="interpolate".'
        )
    findings.warn(fault, f"{gap}; interpolated to even slices.")


def interpolate(volume: np.ndarray, heights: np.ndarray, depth: int) -> np.ndarray:
    """float32 (depth, rows, columns): slices at even heights, each from its two neighbours."""
    wanted = np.linspace(0, heights[-1], depth)
    above = np.clip(np.searchsorted(heights, wanted), 1, len(heights) - 1)
    part = np.clip((wanted - heights[above - 1]) / (heights[above] - heights[above - 1]), 0, 1)
    out = np.empty((len(wanted), *volume.shape[1:]), np.float32)
    for k, (a, t) in enumerate(zip(above, part, strict=True)):
        out[k] = (1 - t) * volume[a - 1] + t * volume[a].astype(np.float32)
    return out
