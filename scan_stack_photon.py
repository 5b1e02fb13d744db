"""From the headers of a DICOM series to one regular stack: where each slice lies, which frame, how even, how tilted.

Geometry comes from positions and orientations alone. Scanners and exporters get slice thickness, slice location, the
order of files and the gantry-tilt tag wrong, so none of these places a slice.
"""

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from .scan_faults_photon import Findings, VolumeError, VolumeFault
from .scan_files_photon import choose_frame
from .scan_grid_photon import even_distance, rounding_of

try:
    import pydicom
except ImportError:
    pydicom = None

UNEVEN_WARN, UNEVEN_REFUSE = 1e-3, 1e-2  # of the median slice distance
SAME_PLACE = 1e-2  # of the in-plane spacing: slices closer than this along the normal are one place
MIN_TILT = 0.1  # degrees
LOCALISER_TYPES = ("LOCALIZER", "SCOUT", "SCANOGRAM", "TOPOGRAM")  # words of ImageType
LOCALISER_COSINE = 0.87  # of the angle to the slices' plane: more than 30 degrees
MOST_LOCALISERS = 3  # without such a word; more could be a volume
HU_TYPES = ("", "HU", "US", "HU_MOD")  # of RescaleType; US is unspecified: then the values are checked
# The functional group of a multi-frame file that holds a tag. Private groups repeat names with other values.
MACROS = {
    "ImagePositionPatient": "PlanePositionSequence", "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence", "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence", "RescaleType": "PixelValueTransformationSequence",
    "TemporalPositionIndex": "FrameContentSequence", "StackID": "FrameContentSequence",
    "FrameAcquisitionNumber": "FrameContentSequence", "FrameAcquisitionDateTime": "FrameContentSequence",
    "NominalPercentageOfCardiacPhase": "CardiacSynchronizationSequence",
    "NominalCardiacTriggerDelayTime": "CardiacSynchronizationSequence", "EffectiveEchoTime": "MREchoSequence",
    "DiffusionBValue": "MRDiffusionSequence", "ComplexImageComponent": "MRImageFrameTypeSequence",
    "ConvolutionKernel": "CTReconstructionSequence",
}  # fmt: skip
# Tags that may tell apart slices in one place, in this order, and how a message names their values. Times come last,
# since they also differ by slice.
FRAME_TAGS = {
    "TemporalPositionIdentifier": "time {:g}", "TemporalPositionIndex": "time {:g}",
    "NominalPercentageOfCardiacPhase": "cardiac phase {:g} %", "NominalCardiacTriggerDelayTime": "trigger {:g} ms",
    "TriggerTime": "trigger {:g} ms", "EchoTime": "echo {:g} ms", "EffectiveEchoTime": "echo {:g} ms",
    "InversionTime": "inversion {:g} ms", "FlipAngle": "flip angle {:g}", "DiffusionBValue": "b-value {:g}",
    "DiffusionGradientOrientation": "direction", "ImageType": "type", "ComplexImageComponent": "type",
    "ConvolutionKernel": "kernel", "KVP": "{:g} kV", "StackID": "stack", "AcquisitionNumber": "acquisition {:g}",
    "FrameAcquisitionNumber": "acquisition {:g}", "AcquisitionTime": "time", "FrameAcquisitionDateTime": "time",
    "ContentTime": "time",
}  # fmt: skip
TEXT_TAGS = {name for name, form in FRAME_TAGS.items() if "{" not in form}
# Tags of which two values, slice by slice in turn, make two scans; and words that a message may quote.
SCAN_TAGS = [
    "ConvolutionKernel", "EchoTime", "EffectiveEchoTime", "InversionTime", "DiffusionBValue", "ImageType", "KVP",
    "AcquisitionNumber",
]  # fmt: skip
IMAGE_TYPES = set("ORIGINAL DERIVED PRIMARY SECONDARY M P R I MAGNITUDE PHASE REAL IMAGINARY ADC TRACEW FA".split())
KERNELS = re.compile(r"[A-Z][a-z]?\d{2}[a-z]?|FC\d{2}|STANDARD|SOFT|DETAIL|BONE|BONEPLUS|LUNG|CHEST|EDGE")


@dataclass
class Slice:
    """One plane of voxels: a classic file, one frame of a multi-frame file, or one tile of a mosaic."""

    path: Path
    frame: int | None
    position: np.ndarray  # (3,) LPS mm, centre of the first voxel
    orientation: np.ndarray  # (6,) cosines of a row, then of a column
    spacing: np.ndarray  # (2,) mm between rows, between columns
    shape: tuple[int, int]  # rows, columns
    slope: float
    intercept: float
    unscaled: tuple[bool, bool]  # whether slope, intercept are missing, and so 1, 0
    tags: dict  # of FRAME_TAGS, those that the header has
    tiles: int = 0  # tiles on a side of the mosaic that holds this slice


# === From headers to slices ==========================================================================================


def slices_of(file: Path, dataset) -> list[Slice]:
    """The slices of one file, from its header."""
    if "MOSAIC" in str(dataset.get("ImageType")).upper():
        return _mosaic_slices(file, dataset)
    if "PerFrameFunctionalGroupsSequence" in dataset:
        shared = (dataset.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
        frames = dataset.PerFrameFunctionalGroupsSequence
        if len(frames) != int(dataset.get("NumberOfFrames") or 1):
            raise VolumeError(
                VolumeFault.HEADER_LIES, "The multi-frame header describes another number of frames than it declares."
            )
        return [_slice(file, i, dataset, (frame, shared)) for i, frame in enumerate(frames)]
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise VolumeError(
            VolumeFault.NO_GEOMETRY,
            "A multi-frame file without functional groups does not tell where its frames lie. Export the series as "
            "Enhanced or as single slices.",
        )
    return [_slice(file, None, dataset)]


def localisers(headers: list) -> set[Path]:
    """Those of [(file, dataset)] that are localisers: by their type, or because their plane and their grid are others
    than those of the slices whose series UID they share."""
    found, series = set(), defaultdict(list)
    for file, dataset in headers:
        try:
            orientation = np.ravel(dataset.get("ImageOrientationPatient") or ()).astype(float)
        except ValueError:  # damaged; the stack refuses it by name
            continue
        if any(word in str(dataset.get("ImageType")).upper() for word in LOCALISER_TYPES):
            found.add(file)
        elif len(orientation) == 6:
            normal = np.cross(*orientation.reshape(2, 3))
            grid = dataset.Rows, dataset.Columns, str(dataset.get("PixelSpacing"))
            series[dataset.get("SeriesInstanceUID")].append((file, normal, grid))
    for slices in series.values():
        grids = Counter(grid for _, _, grid in slices)
        usual = grids.most_common(1)[0][0]
        normal = next(n for _, n, grid in slices if grid == usual)
        strays = {file for file, n, grid in slices if grid != usual and abs(n @ normal) < LOCALISER_COSINE}
        if len(strays) <= MOST_LOCALISERS and grids[usual] > MOST_LOCALISERS:
            found |= strays
    return found


def _slice(file: Path, frame: int | None, dataset, groups=()) -> Slice:
    def get(name):
        macros = [group.get(MACROS.get(name, "")) for group in groups]
        places = [macro[0] for macro in macros if macro] if groups else [dataset]
        return next((p[name].value for p in places if name in p and p[name].value is not None), None)

    def scale(name):  # secondary captures of many frames keep it outside the functional groups
        return get(name) if get(name) is not None or name not in dataset else dataset[name].value

    position, orientation = get("ImagePositionPatient"), get("ImageOrientationPatient")
    spacing = get("PixelSpacing")
    for value, length in ((position, 3), (orientation, 6), (spacing, 2)):
        if value is None or len(np.atleast_1d(value)) != length:
            raise VolumeError(
                VolumeFault.NO_GEOMETRY,
                "A slice does not tell where it lies (position, orientation or pixel spacing is missing). Export "
                "the series again from its source.",
            )
    slope, intercept = scale("RescaleSlope"), scale("RescaleIntercept")
    _check_scale(dataset, scale("RescaleType"))
    names = [*FRAME_TAGS, "SliceThickness"]
    values = {name: get(name) if get(name) is not None else dataset.get(name) for name in names}
    values["DiffusionBValue"] = _b_value(dataset) if values["DiffusionBValue"] is None else values["DiffusionBValue"]
    tags = {
        name: str(value) if name in TEXT_TAGS else number_of(value)
        for name, value in values.items()
        if value is not None
    }
    return Slice(
        file, frame, np.array(position, dtype=float), np.array(orientation, dtype=float), np.array(spacing,
        dtype=float), (int(dataset.Rows), int(dataset.Columns)), 1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept), (slope is None, intercept is None), tags,
    )  # fmt: skip


def number_of(value) -> float:
    """A value of a tag as a number, inf where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("inf")


def _b_value(dataset):
    """Diffusion's b-value where vendors kept it before the standard had a tag, or None."""
    for creator, name, tag in (
        ((0x0019, 0x0010), "SIEMENS MR HEADER", (0x0019, 0x100C)),
        ((0x0043, 0x0010), "GEMS_PARM_01", (0x0043, 0x1039)),
    ):
        if creator in dataset and str(dataset[creator].value) == name and tag in dataset:
            value = dataset[tag].value
            value = value.decode("ascii", "replace").strip("\0 ") if isinstance(value, bytes) else value
            value = str(value).split("\\")[0] if isinstance(value, str) else np.atleast_1d(value)[0]
            return number_of(value) % 1e9  # GE adds a flag of 1e9
    return None


def _check_scale(dataset, kind) -> None:
    if dataset.get("ModalityLUTSequence"):
        raise VolumeError(
            VolumeFault.NOT_HU,
            "The slices' numbers go through a table (Modality LUT) instead of slope and intercept. Export the series "
            "with its values applied.",
        )
    if dataset.get("Modality") == "CT" and str(kind or "").strip().upper() not in HU_TYPES:
        raise VolumeError(
            VolumeFault.NOT_HU,
            "The CT's numbers are of another kind than HU by its header, such as a concentration or an electron "
            "density. Give the series in HU.",
        )


def _mosaic_slices(file: Path, dataset) -> list[Slice]:
    """The tiles of a Siemens mosaic, placed by nibabel from the private header."""
    whole = _slice(file, 0, dataset)
    try:  # here, because it warns when it is imported
        from nibabel.nicom import dicomwrappers
    except ImportError:
        raise ImportError("reading a Siemens mosaic needs nibabel: pip install nibabel") from None
    try:
        mosaic = dicomwrappers.wrapper_from_data(pydicom.dcmread(file, stop_before_pixels=True, force=True))
        first, normal = np.array(mosaic.image_position), np.array(mosaic.slice_normal)
        count, tiles, distance = int(mosaic.n_mosaic), int(mosaic.mosaic_size), float(mosaic.voxel_sizes[2])
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, dicomwrappers.WrapperError):
        raise VolumeError(
            VolumeFault.NO_GEOMETRY,
            "The file is a Siemens mosaic (all slices of a volume as tiles of one image) without the private header "
            "that places its tiles. Convert the original series with dcm2niix.",
        ) from None
    if tiles**2 < count or any(n % tiles for n in whole.shape):
        raise VolumeError(VolumeFault.HEADER_LIES, "The tiles of the Siemens mosaic do not fit its rows and columns.")
    shape = whole.shape[0] // tiles, whole.shape[1] // tiles
    return [
        Slice(file, k, first + normal * (k * distance), whole.orientation, whole.spacing, shape, whole.slope,
              whole.intercept, whole.unscaled, whole.tags, tiles)
        for k in range(count)
    ]  # fmt: skip


# === From slices to one frame ========================================================================================


def one_frame(slices: list[Slice], frame: int | None, modality: str, findings: Findings) -> list[Slice]:
    """The slices of one time, phase, echo or acquisition, sorted along their normal."""
    normal = _normal(slices)
    heights = np.array([s.position @ normal for s in slices])
    slices = [slices[i] for i in np.argsort(heights, kind="stable")]
    places = _places(slices, normal)
    frames = []
    if len(places) < len(slices):
        slices, copies = _without_copies(places, _file_content)
        places = _places(slices, normal)
        frames = _frames_by_tags(slices, len(places), normal) if len(places) < len(slices) else []
        if len(places) < len(slices) and not frames:
            slices, same = _without_copies(places, _voxel_content)
            places, copies = _places(slices, normal), copies + same
        if copies:
            findings.warn(VolumeFault.DUPLICATE_SLICES, f"{copies} slices are copies, with equal voxels; read once.")
        if len(places) < len(slices) and not frames:
            raise VolumeError(
                VolumeFault.DUPLICATE_SLICES,
                f"{len(slices)} slices lie in {len(places)} places, and no tag divides them into complete scans. Keep "
                "one slice for each place in the folder.",
            )
    frames = frames or _interleaved(slices, modality)
    index = choose_frame(len(frames) or 1, frame, [name for name, _ in frames])
    return frames[index][1] if frames else slices


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


def _without_copies(places: list[list[Slice]], content_of) -> tuple[list[Slice], int]:
    """(slices, number of those left out): of slices in one place with equal content the first is kept."""
    kept, copies = [], 0
    for place in places:
        contents = set()
        for item in place:
            content = content_of(item) if len(place) > 1 else None
            copies += content in contents
            if content not in contents:
                kept.append(item)
            contents.add(content)
    return kept, copies


def _file_content(item: Slice):
    return hashlib.sha256(item.path.read_bytes()).digest(), item.frame


def _voxel_content(item: Slice):
    """Equal for a slice that was sent twice under two instance UIDs."""
    if item.frame is not None:
        return item.path, item.frame
    voxels = pydicom.dcmread(item.path, force=True).get("PixelData", b"")
    return hashlib.sha256(voxels).digest(), item.slope, item.intercept, tuple(np.round(item.position, 3))


def _frames_by_tags(slices: list[Slice], places: int, normal: np.ndarray) -> list[tuple[str, list[Slice]]]:
    """[(what it is, slices)] of the fewest tags that part the slices into scans of one slice a place, else []."""
    varying = [name for name in FRAME_TAGS if len({s.tags.get(name) for s in slices}) > 1]
    for least in (places, 4):  # complete scans, or else parts of the stack
        for names in (c for size in (1, 2, 3) for c in combinations(varying, size)):
            groups = _grouped(slices, names)
            if all(least <= len(g) == len(_places(g, normal)) for g in groups.values()):
                return _named(groups, varying)
    return []


def _grouped(slices: list[Slice], names) -> dict:
    groups = defaultdict(list)
    for item in slices:  # a missing value (the direction of a b-value of 0) comes first
        groups[tuple((name in item.tags, item.tags.get(name, 0)) for name in names)].append(item)
    return dict(sorted(groups.items()))


def _named(groups: dict, names) -> list[tuple[str, list[Slice]]]:
    """Frames named by what differs between them and not within them."""
    words = [[] for _ in groups]
    for name in names:
        values = [{s.tags.get(name) for s in group} for group in groups.values()]
        if max(map(len, values)) == 1:
            values = [value for (value,) in values]
            numbers = {value: 1 + i for i, value in enumerate(dict.fromkeys(values))}
            for i, value in enumerate(values):
                words[i].append(_word(name, value, numbers[value]))
    return [
        (", ".join(dict.fromkeys([*w, f"{len(group)} slices"])), group)
        for w, group in zip(words, groups.values(), strict=True)
    ]


def _word(name: str, value, number: int) -> str:
    """A value in the words of physics; of a text only what cannot be a person's."""
    form = FRAME_TAGS[name]
    if value is None:
        return f"no {form.replace(' {:g}', '')}"
    if name not in TEXT_TAGS:
        return form.format(value)
    if name == "ImageType":
        known = [word for word in re.findall(r"\w+", value.upper()) if word in IMAGE_TYPES]
        return f"type {number} ({' '.join(known)})"
    if name == "ConvolutionKernel" and KERNELS.fullmatch(value):
        return f"kernel {value}"
    return f"{form} {number}"


def _interleaved(slices: list[Slice], modality: str) -> list[tuple[str, list[Slice]]]:
    """Two or more scans whose slices lie between each other's, as of two kernels at half the distance; else []."""
    for name in SCAN_TAGS:
        groups = _grouped(slices, [name])
        if len(groups) < 2 or min(map(len, groups.values())) < 4:
            continue
        order = [s.tags.get(name) for s in slices]
        changes = sum(a != b for a, b in zip(order, order[1:], strict=False))
        if changes < len(groups) + 1:  # one after the other, as of two stations
            continue
        if name == "AcquisitionNumber" and modality == "MR" and _touching(slices):
            continue  # one stack in two passes: its slices do not overlap
        return _named(groups, [name])
    return []


def _touching(slices: list[Slice]) -> bool:
    thickness = slices[0].tags.get("SliceThickness", 0)
    return np.median(np.linalg.norm(np.diff([s.position for s in slices], axis=0), axis=1)) > 0.8 * thickness > 0


# === From slices to a stack ==========================================================================================


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
    uneven = np.abs(steps / median - 1).max()
    depth, interpolated = len(slices), False
    unit = rounding_of(positions, heights, normal)
    if unit:
        if uneven > UNEVEN_REFUSE:
            findings.note(
                VolumeFault.SLICE_INCREMENT_INCONSISTENT, "The positions are rounded in the header; read as even."
            )
    elif uneven > UNEVEN_REFUSE:
        distance = even_distance(steps, median, gaps, findings)
        depth, interpolated = round(heights[-1] / distance) + 1, True
    elif uneven > UNEVEN_WARN:
        findings.warn(
            VolumeFault.SLICE_INCREMENT_INCONSISTENT,
            f"The slice distance varies by {100 * uneven:.2f} % of {median:.3f} mm; read as even.",
        )
    along = positions[-1] - positions[0]
    along = normal * heights[-1] if np.linalg.norm(along - normal * heights[-1]) < 2 * unit else along
    drift = along / heights[-1]  # mm along the stack, one mm of height each
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
    affine[:3, 2], affine[:3, 3] = along / (depth - 1), positions[0]
    if abs(slices[0].spacing[0] / slices[0].spacing[1] - 1) > 1e-3:
        findings.note(VolumeFault.ANISOTROPIC_IN_PLANE, "Row and column spacing differ; both are used.")
    return affine, depth, heights if interpolated else None
