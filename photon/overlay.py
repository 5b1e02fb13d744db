"""Three upright planes of a scan, with outlines around what was kept, for one question or several.

Radiological convention: the patient's right on the picture's left in axial and coronal views, anterior on the left in
sagittal ones; anterior or superior up. Nothing but voxels is drawn: no name, no date, no path.
"""

import textwrap
from dataclasses import dataclass

import numpy as np

from photon.planes import choose_planes
from photon.whole_file import whole_file

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
OUTLINES = ("#ffb000", "#4cc9f0", "#f15bb5", "#9ef01a")  # one a question; told apart by colour-blind readers too
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
    others: tuple[np.ndarray, ...] = ()  # (rows, columns) bool each: kept for other questions


@dataclass
class Row:
    """The planes of one question, and the text below them."""

    planes: list[View]
    caption: str = ""
    number: int = 0  # which colour of `OUTLINES` its kept tokens have
    window: tuple[float, float] | None = None  # (low, high) in the scan's units, where it differs from the picture's


def views(scan, kept=None, at=None, others=()):
    """Axial, coronal and sagittal `View` of a SimpleITK image.

    Args:
        scan: 3D image of any orientation; an oblique one is shown along its own axes.
        kept: image on the same voxels, nonzero where kept.
        at: (x, y, z) voxel indices in LPS order of the three planes; by default as `choose_planes` finds them.
        others: images like `kept`, of other questions on the scan.
    """
    if at is None:
        at, _ = choose_planes(scan, kept)
    scan = sitk.DICOMOrient(scan, "LPS")  # array (z, y, x): to superior, posterior, left
    pixels = sitk.GetArrayFromImage(scan)
    masks = [sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS")) > 0 for image in (kept, *others) if image]
    masks = masks if kept else [np.zeros(pixels.shape, bool), *masks]
    x, y, z = at
    dx, dy, dz = scan.GetSpacing()
    up = slice(None, None, -1)  # superior is the last slice and belongs on top
    parts = {
        "axial": ((z,), (dy, dx)),
        "coronal": ((up, y), (dz, dx)),
        "sagittal": ((up, slice(None), x), (dz, dy)),
    }
    planes = []
    for name, (part, spacing) in parts.items():
        first, *rest = (mask[part] for mask in masks)
        planes.append(View(name, pixels[part], first, spacing, SIDES[name], tuple(rest)))
    return planes


def upright_view(name, pixels, spacing):
    """`View` of a plane that is upright already, without outlines."""
    return View(name, pixels, np.zeros(pixels.shape, bool), spacing, SIDES[name])


def draw(planes, file, caption="", window=SOFT_TISSUE):
    """Write one picture of several views, side by side; the arguments are those of `draw_rows` for one row."""
    draw_rows([Row(planes, caption)], file, window)


def draw_rows(rows, file, window=SOFT_TISSUE):
    """Write one picture with a row of views for each question, so that kept tokens can be compared.

    Args:
        rows: list of `Row`, all of the same scan. In each row its own kept tokens are outlined strongly, those of
            the other rows thinly.
        file: path; its suffix decides the format (PNG, JPEG, PDF, SVG).
        window: (low, high) in the scan's units, drawn black and white.
    Raises: `ImportError` without matplotlib, `OSError` where the file cannot be written.
    """
    if Figure is None:
        raise ImportError("Drawing needs matplotlib: pip install matplotlib")
    width, gap, title, mark = 14.0, 0.3, 0.5, 0.3  # inches: figure, between planes, above and below each plane
    heights, scales, texts = [], [], []
    for row in rows:
        wide = sum(plane.pixels.shape[1] * plane.spacing[1] for plane in row.planes)
        scales.append((width - gap * (len(row.planes) + 1)) / wide)  # inches a mm
        lines = []
        for line in row.caption.splitlines():
            lines += textwrap.wrap(line, 150, max_lines=CAPTION_LINES, placeholder=" ...")
        tall = max(plane.pixels.shape[0] * plane.spacing[0] for plane in row.planes) * scales[-1]
        heights.append((tall, 0.2 * len(lines) + 0.2))
        texts.append("\n".join(lines))
    total = sum(tall + text + title + mark for tall, text in heights)
    figure = Figure(figsize=(width, total), facecolor="black")
    top = total
    for row, scale, (tall, below), text in zip(rows, scales, heights, texts, strict=True):
        left = gap
        for plane in row.planes:
            w, h = (plane.pixels.shape[i] * plane.spacing[i] * scale for i in (1, 0))
            bottom = top - title - (tall + h) / 2  # planes stand on one middle line
            axis = figure.add_axes((left / width, bottom / total, w / width, h / total))
            _draw_plane(axis, plane, row, row.window or window)
            left += w + gap
        top -= title + tall + mark + below
        colour = OUTLINES[row.number % len(OUTLINES)] if len(rows) > 1 else "white"
        figure.text(
            0.5, (top + 0.15) / total, text, color=colour, ha="center", va="bottom", fontsize=11,
            parse_math=False,  # an answer may hold dollar signs
        )  # fmt: skip
    with whole_file(file) as partial:
        figure.savefig(partial, dpi=110, facecolor="black")


def _draw_plane(axis, plane, row, window):
    height, width = (n * step for n, step in zip(plane.pixels.shape, plane.spacing, strict=True))
    extent = (0, width, height, 0)  # mm, so that a voxel has its true shape
    axis.imshow(
        plane.pixels, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, interpolation="nearest",
        aspect="auto",  # the axes have the plane's shape
    )  # fmt: skip
    numbers = [number for number in range(len(plane.others) + 1) if number != row.number]
    for mask, number in zip(plane.others, numbers, strict=True):
        _outline(axis, mask, plane.spacing, number, 0.7)
    _outline(axis, plane.kept, plane.spacing, row.number, 1.6)
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


def _outline(axis, mask, spacing, number, strength):
    """Draws the border of a mask (rows, columns)."""
    if not mask.any() or mask.all():
        return
    closed = np.pad(mask.astype(float), 1)  # outlines close at the scan's border
    rows = (np.arange(closed.shape[0]) - 0.5) * spacing[0]
    columns = (np.arange(closed.shape[1]) - 0.5) * spacing[1]
    axis.contour(columns, rows, closed, [0.5], colors=OUTLINES[number % len(OUTLINES)], linewidths=strength)
