"""What the readers of all formats share: reading options, a scan's header, checks of shapes, files and numbers.

Each format opens a source as a `ScanHeader`. Sizes are checked against the file before memory is taken, so that a
wrong header costs nothing. NRRD and MetaImage are read here too, by SimpleITK.
"""

import gzip
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .scan_faults_photon import Findings, VolumeError, VolumeFault
from .scan_grid_photon import Geometry

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None
try:  # inflates two to three times as fast as zlib, same interface
    from isal import igzip as fast_gzip
    from isal.isal_zlib import error as fast_error
except ImportError:
    fast_gzip, fast_error = gzip, zlib.error

INFLATE_ERRORS = (EOFError, OSError, zlib.error, fast_error)
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MAX_INFLATION = 1040  # deflate packs at most 1032 : 1
UNDECLARED_SLICES = (
    "The file holds more slices than its header says, so that part of the scan would be lost. Repair the header."
)
NRRD_SPACES = {"left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las"}
SUFFIXES = {"nifti": (".nii", ".nii.gz"), "nrrd": (".nrrd", ".nhdr"), "meta": (".mha", ".mhd")}


@dataclass(frozen=True)
class ReadOptions:
    """Choices of the reader, with their defaults.

    series: which DICOM series of a folder: its number in the list that the error gives, or its SeriesInstanceUID.
    frame: which frame (time, phase, echo) of a 4D scan, from 0.
    max_voxels: larger scans are refused from the header alone.
    tilt: "resample" (with a warning) or "refuse" a sheared scan.
    gaps: "refuse" or "interpolate" (with a warning) missing or unevenly spaced slices.
    monochrome1: "refuse", or what the stored values of a MONOCHROME1 series mean: "as_stored" or "invert".
    fill_nonfinite: value for NaN and inf, which are refused without it.
    """

    series: int | str | None = None
    frame: int | None = None
    max_voxels: int = 2**31
    tilt: str = "resample"
    gaps: str = "refuse"
    monochrome1: str = "refuse"
    fill_nonfinite: float | None = None

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, got {getattr(self, name)!r}")


CHOICES = {
    "tilt": ("resample", "refuse"),
    "gaps": ("refuse", "interpolate"),
    "monochrome1": ("refuse", "as_stored", "invert"),
}


@dataclass(frozen=True)
class ScanHeader:
    """A scan before its voxels are read: where they lie, DICOM's modality ("" where unknown), and how to read them.

    `read(progress)` gives the scalar 3D image on the geometry, with rescaled values and without metadata. `progress`
    is `None`, or a function that a format may call with the image and the number of its slices that are in place,
    again and again while the others are being read.
    """

    geometry: Geometry
    read: Callable
    modality: str = ""


def sniff(path: Path) -> str:
    """Format by content: "nifti", "nrrd", "meta", "dicom", "numpy", or "unknown"."""
    with open(path, "rb") as stream:
        head = stream.read(4096)
    if head[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path, "rb") as stream:
                head = stream.read(544)
        except INFLATE_ERRORS:
            raise damaged("the gzip stream cannot be inflated") from None
        return "nifti" if _is_nifti(head) else "unknown"
    if head[128:132] == b"DICM":
        return "dicom"
    if head[:6] == b"\x93NUMPY" or head[:4] == b"PK\x03\x04" and path.suffix == ".npz":
        return "numpy"
    if head[:4] == b"NRRD":
        return "nrrd"
    if re.match(rb"\s*(ObjectType|NDims)\s*=", head):
        return "meta"
    return "nifti" if _is_nifti(head) else "unknown"


def _is_nifti(head: bytes) -> bool:
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")


def damaged(what: str) -> VolumeError:
    return VolumeError(
        VolumeFault.DAMAGED_FILE, f"The file is damaged: {what}. Fetch it again from where it came from."
    )


def count(shape) -> int:
    """Number of voxels, in Python's integers: the sizes in a damaged header overflow int64."""
    return math.prod(int(n) for n in shape)


def check_file_size(shape, itemsize: int, file_size: int, begin: int, packed: bool) -> None:
    """Refuses a header with more voxels than the file can hold after byte `begin`, or than deflate can pack."""
    if (file_size * MAX_INFLATION if packed else file_size - begin) < count(shape) * itemsize:
        raise VolumeError(
            VolumeFault.HEADER_LIES,
            f"The header says {tuple(shape)} voxels of {itemsize} bytes, which cannot be in a file of {file_size} "
            "bytes.",
        )


def select_frame(shape, options: ReadOptions) -> tuple[tuple, int]:
    """((x, y, z), index of the frame to read) of an image of shape (x, y, z) or (x, y, z, frames), after checks."""
    check_shape(shape, options.max_voxels)
    return tuple(shape[:3]), choose_frame(shape[3] if len(shape) == 4 else 1, options.frame)


def check_shape(shape, max_voxels: int) -> None:
    """Refuses planes, absurd sizes and scans beyond `max_voxels`; `shape` is (x, y, z) or (x, y, z, frames)."""
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise VolumeError(
            VolumeFault.NOT_THREE_DIMENSIONAL,
            f"The image has {len(shape)} dimensions of sizes {tuple(shape)}; a scan has three (x, y, z), or four with "
            "frames. Give a volume.",
        )
    if min(shape[:3]) < 4:
        raise VolumeError(
            VolumeFault.TOO_FEW_SLICES,
            f"The image is {tuple(shape[:3])} voxels; a volume has at least 4 on each axis. Give the whole scan.",
        )
    voxels = count(shape)
    if voxels > max_voxels:
        raise VolumeError(
            VolumeFault.TOO_LARGE,
            f"The header says {tuple(shape)} voxels, {voxels:.3g} in all; at most {max_voxels} are read. "
            "Crop the scan, or raise max_voxels if memory allows.",
        )


def choose_frame(frames: int, frame: int | None, how: str = "the fourth axis") -> int:
    """Index of the one frame to read, from 0; never guessed where a scan has several."""
    if frame is None:
        if frames > 1:
            raise VolumeError(
                VolumeFault.SEVERAL_FRAMES,
                f"The scan has {frames} frames (times, phases or echoes, by {how}): choose one with frame=0 ... "
                f"frame={frames - 1}.",
            )
        return 0
    if not 0 <= frame < frames:
        raise VolumeError(
            VolumeFault.SEVERAL_FRAMES, f"frame={frame} was asked for, but the scan has {frames} (counted from 0)."
        )
    return frame


def rescale(array: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """slope * array + intercept, in integers where all three are (HU from a scanner are), else float32."""
    if slope == 1 and intercept == 0:
        return array
    out = array.astype(np.float32) if array.dtype.kind == "f" else None
    if out is None and float(slope).is_integer() and float(intercept).is_integer():
        ends = [int(slope) * int(v) + int(intercept) for v in (array.min(), array.max())]
        for dtype in (np.int16, np.int32):
            if np.iinfo(dtype).min <= min(ends) and max(ends) <= np.iinfo(dtype).max:
                # overflow on the way is undone by wrapping, since the end result fits
                scale = np.array([int(slope) % 2**32, int(intercept) % 2**32]).astype(dtype)
                out = array.astype(dtype)
                out *= scale[0]
                out += scale[1]
                return out
    out = array.astype(np.float32) if out is None else out
    out *= np.float32(slope)
    out += np.float32(intercept)
    return out


def as_scalar(array: np.ndarray) -> np.ndarray:
    """Native byte order and a type SimpleITK has: integers stay, 64-bit integers shrink if they fit, else float32."""
    dtype = array.dtype
    if dtype.kind == "b":
        return array.astype(np.uint8)
    if dtype.kind not in "iuf":
        raise VolumeError(
            VolumeFault.NOT_SCALAR, f"The voxels are of type {dtype.name}; a scan has one real number a voxel."
        )
    if dtype.kind in "iu" and dtype.itemsize == 8:
        small = array.size and -(2**31) <= int(array.min()) and int(array.max()) < 2**31
        return array.astype(np.int32 if small else np.float32)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # what overflows becomes inf and is refused as such
            return array.astype(np.float32, copy=False)
    return array.astype(dtype.newbyteorder("="), copy=False)


# === NRRD and MetaImage ==============================================================================================


def open_itk(path: Path, kind: str, options: ReadOptions, findings: Findings) -> ScanHeader:
    """NRRD (.nrrd, .nhdr) or MetaImage (.mha, .mhd) by SimpleITK, after a check of what the header points to."""
    data_file, packed, begin = _check_text_header(path, kind)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if kind == "nrrd" else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # ITK's message holds the path
        raise damaged(f"its {kind} header cannot be understood") from None
    if reader.GetNumberOfComponents() != 1:
        raise VolumeError(
            VolumeFault.NOT_SCALAR, f"There are {reader.GetNumberOfComponents()} numbers a voxel; a scan has one."
        )
    shape = tuple(int(n) for n in reader.GetSize())
    check_shape(shape, options.max_voxels)
    itemsize = sitk.GetArrayViewFromImage(sitk.Image([1, 1, 1], reader.GetPixelID())).itemsize
    size, wanted = data_file.stat().st_size, count(shape) * itemsize
    check_file_size(shape, itemsize, size, begin, packed)
    if not packed and size - begin >= wanted + wanted // shape[-1]:
        raise VolumeError(VolumeFault.HEADER_LIES, UNDECLARED_SLICES)
    _, index = select_frame(shape, options)

    def read(progress=None) -> "sitk.Image":
        try:
            image = reader.Execute()
        except RuntimeError:
            raise damaged("its voxels cannot be read") from None
        if image.GetDimension() == 4:
            image = image[:, :, :, index]
        try:
            for key in image.GetMetaDataKeys():  # comments and names of the writer: nothing that the model needs
                image.EraseMetaData(key)
        except (TypeError, UnicodeError):
            raise damaged(f"its {kind} header holds bytes that are no text") from None
        return image

    return ScanHeader(_itk_geometry(reader), read)


def _itk_geometry(reader) -> Geometry:
    """The first three axes of an ITK header, as `image[:, :, :, index]` gives them."""
    dimension, axes = reader.GetDimension(), np.array(reader.GetDirection())
    direction = axes.reshape(dimension, dimension)[:3, :3]
    if dimension == 4 and np.linalg.det(direction) == 0:
        direction = np.eye(3)
    return Geometry(reader.GetSize()[:3], reader.GetSpacing()[:3], reader.GetOrigin()[:3], direction.ravel())


def _check_text_header(path: Path, kind: str) -> tuple[Path, bool, int]:
    """(file of the voxels, whether they are compressed, bytes of header before them); refuses what ITK would guess."""
    with open(path, "rb") as stream:
        head = stream.read(1 << 16)
    text = head.decode("latin-1")
    if kind == "nrrd":
        end = re.search(r"\r?\n\r?\n", text)
        begin = end.end() if end else 0
        fields = dict(re.findall(r"(?m)^([a-z ]+?)\s*:=?\s*(.*?)\s*$", text[:begin] if end else text))
        target = fields.get("data file", fields.get("datafile", ""))
        packed = fields.get("encoding", "raw").lower() != "raw"
        known = fields.get("space", "").lower().removesuffix("-time") in NRRD_SPACES and "space directions" in fields
        unit = fields.get("space units", '"mm"').replace('"', "").split()
        if any(u.lower() not in ("mm", "millimeter", "none", "???") for u in unit[:3]):
            raise VolumeError(VolumeFault.UNIT_NOT_MILLIMETRE, "The NRRD header is not in mm. Convert it to mm first.")
    else:
        end = re.search(r"ElementDataFile\s*=\s*(.*?)\s*?\r?\n", text + "\n")
        begin = end.end() if end else 0
        fields = dict(re.findall(r"(?m)^\s*(\w+)\s*=\s*(.*?)\s*$", text[:begin]))
        target = "" if fields.get("ElementDataFile", "").upper() == "LOCAL" else fields.get("ElementDataFile", "?")
        packed = fields.get("CompressedData", "false").lower() in ("true", "1")
        known = not {"TransformMatrix", "Rotation", "Orientation"}.isdisjoint(fields) and "ElementSpacing" in fields
        _check_meta_scale(fields)
    if not known:
        raise VolumeError(
            VolumeFault.NO_GEOMETRY,
            f"The {kind} header has no orientation or no spacing, so left and right are unknown. "
            "Write it again with both, or pass (array, affine).",
        )
    return (_data_file(path, target), packed, 0) if target else (path, packed, begin)


def _check_meta_scale(fields: dict) -> None:
    # ITK ignores these two fields
    scale = (fields.get("ElementToIntensityFunctionSlope", "1"), fields.get("ElementToIntensityFunctionOffset", "0"))
    if [s.strip("0").rstrip(".") for s in scale] != ["1", ""]:
        raise VolumeError(
            VolumeFault.NOT_HU,
            "The MetaImage header holds a scale for its numbers. Apply it and write the file again.",
        )


def _data_file(path: Path, target: str) -> Path:
    """The file of voxels beside a detached header: same folder, same stem, no link. Otherwise a header could name any
    file of the machine."""
    data = path.parent / target
    plain = target == Path(target).name and Path(target).stem == path.stem
    if not plain or data.is_symlink():
        raise VolumeError(
            VolumeFault.EXTERNAL_DATA_FILE,
            "The header names another file for its voxels than the one of the same stem beside it. Such a link is not "
            "followed: put both in one folder under one stem, or write the scan into a single file.",
        )
    if not data.is_file():
        raise VolumeError(VolumeFault.NO_SUCH_FILE, "The file of voxels that the header names is not beside it.")
    return data
