"""Three upright planes of a scan, with outlines around what was kept.

Radiological convention: the patient's right on the picture's left in axial and coronal views, anterior on the left in
sagittal ones; anterior or superior up. Nothing but voxels is drawn: no name, no date, no path.
"""

import textwrap
from dataclasses import dataclass

import numpy as np

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None
try:
    from matplotlib import patheffects
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen
except ImportError:
    Figure = None

SOFT_TISSUE = (-160.0, 240.0)  # HU
OUTLINE = "#ffb000"
SIDES = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I"), "sagittal": ("A", "P", "S", "I")}
CAPTION_LINES = 8


@dataclass
class View:
    """One plane: rows from the top, columns from the left, as it is drawn."""

    name: str
    pixels: np.ndarray  # (rows, columns), the scan's own units
    kept: np.ndarray  # (rows, columns) bool
    spacing: tuple[float, float]  # mm between rows, between columns
    sides: tuple[str, str, str, str]  # letters at left, right, top, bottom


def views(scan, kept=None, at=None):
    """Axial, coronal and sagittal `View` of a SimpleITK image.

    Args:
        scan: 3D image of any orientation; an oblique one is shown along its own axes.
        kept: image on the same voxels, nonzero where kept.
        at: (x, y, z) voxel indices in LPS order of the three planes; by default the planes that cross most of the
            body's kept and dropped parts.
    """
    scan = sitk.DICOMOrient(scan, "LPS")  # array (z, y, x): to superior, posterior, left
    pixels = sitk.GetArrayFromImage(scan)
    mask = np.zeros(pixels.shape, bool) if kept is None else sitk.GetArrayFromImage(sitk.DICOMOrient(kept, "LPS")) > 0
    if at is None:
        body = sitk.GetArrayFromImage(sitk.OtsuThreshold(scan, 0, 1)) > 0
        at = telling_planes(mask & body, body & ~mask)
    x, y, z = at
    dx, dy, dz = scan.GetSpacing()
    up = slice(None, None, -1)  # superior is the last slice and belongs on top
    return [
        View("axial", pixels[z], mask[z], (dy, dx), SIDES["axial"]),
        View("coronal", pixels[up, y], mask[up, y], (dz, dx), SIDES["coronal"]),
        View("sagittal", pixels[up, :, x], mask[up, :, x], (dz, dy), SIDES["sagittal"]),
    ]


def upright_view(name, pixels, spacing):
    """`View` of a plane that is upright already, without outlines."""
    return View(name, pixels, np.zeros(pixels.shape, bool), spacing, SIDES[name])


def telling_planes(kept, dropped):
    """(x, y, z) of the three planes that cross most of both masks (z, y, x); among equals the plane nearest to the
    centre."""
    place = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        a, b = kept.sum(others), dropped.sum(others)
        score = np.minimum(a, b) if np.minimum(a, b).any() else a + b
        best = np.flatnonzero(score == score.max())
        place.append(int(best[np.abs(best - (len(score) - 1) / 2).argmin()]))
    return tuple(place[::-1])


def draw(planes, file, caption="", window=SOFT_TISSUE):
    """Write one picture of several views, side by side.

    Args:
        planes: list of `View`.
        file: path; its suffix decides the format (PNG, JPEG, PDF, SVG).
        caption: text below the views.
        window: (low, high) in the scan's units, drawn black and white.
    Raises: `ImportError` without matplotlib, `OSError` where the file cannot be written.
    """
    if Figure is None:
        raise ImportError("Drawing needs matplotlib: pip install matplotlib")
    widths = [plane.pixels.shape[1] * plane.spacing[1] for plane in planes]
    heights = [plane.pixels.shape[0] * plane.spacing[0] for plane in planes]
    scale = 14 / sum(widths)  # inches a mm
    lines = textwrap.wrap(caption, 150, max_lines=CAPTION_LINES, placeholder=" ...")
    above, below = 0.5, 0.5 + 0.2 * len(lines)  # inches for titles, marks and the caption
    figure = Figure(figsize=(14, max(heights) * scale + above + below), facecolor="black")
    axes = figure.subplots(1, len(planes), width_ratios=widths, squeeze=False)[0]
    for plane, axis, width, height in zip(planes, axes, widths, heights, strict=True):
        extent = (0, width, height, 0)  # mm, so that a voxel has its true shape
        axis.imshow(plane.pixels, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, interpolation="nearest")
        if plane.kept.any() and not plane.kept.all():
            closed = np.pad(plane.kept.astype(float), 1)  # outlines close at the scan's border
            rows = (np.arange(closed.shape[0]) - 0.5) * plane.spacing[0]
            columns = (np.arange(closed.shape[1]) - 0.5) * plane.spacing[1]
            axis.contour(columns, rows, closed, [0.5], colors=OUTLINE, linewidths=0.9)
        axis.set_xlim(-1, width + 1)
        axis.set_ylim(height + 1, -1)
        axis.set_axis_off()
        left, right, top, bottom = plane.sides
        for x, y, letter, where in (
            (0.015, 0.5, left, ("left", "center")),
            (0.985, 0.5, right, ("right", "center")),
            (0.5, 1.0, top, ("center", "bottom")),  # outside: a thin slab has no room for them
            (0.5, 0.0, bottom, ("center", "top")),
        ):
            text = axis.text(x, y, letter, color="white", fontsize=11, ha=where[0], va=where[1])
            text.set_transform(axis.transAxes)
            text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="black")])
        axis.set_title(plane.name, color="white", fontsize=10, loc="left")
    figure.text(
        0.5, 0.1 / figure.get_figheight(), "\n".join(lines), color="white", ha="center", va="bottom", fontsize=11,
        parse_math=False,  # an answer may hold dollar signs
    )  # fmt: skip
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - above / height, bottom=below / height, wspace=0.03)
    figure.savefig(file, dpi=110, facecolor="black")
