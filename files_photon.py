"""One file -> one image: NIfTI by nibabel's header, NRRD and MetaImage by SimpleITK, always header first.

Every reader here returns a scalar 3D SimpleITK image in its LPS world, mm, without metadata. Sizes are checked against
the file before memory is taken, so that a header which lies costs nothing.
"""

import contextlib
import gzip
import logging
import math
import re
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, Queue

import numpy as np

from .faults_photon import Findings, VolumeError, VolumeFault
from .grid_photon import blank_image

try:
    import nibabel as nib
    from nibabel.spatialimages import HeaderDataError
except ImportError:
    nib, HeaderDataError = None, ValueError
try:
    import SimpleITK as sitk
except ImportError:
    sitk = None
try:  # two to three times faster than zlib at inflating, same interface; pip install isal
    from isal import igzip as fast_gzip
    from isal.isal_zlib import error as fast_error
except ImportError:
    fast_gzip, fast_error = gzip, zlib.error

INFLATE_ERRORS = (EOFError, OSError, zlib.error, fast_error)
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MAX_INFLATION = 1040  # deflate cannot do better than 1032 : 1
FATAL_REPAIRS = ("sizeof_hdr", "bitpix", "vox offset 0", "sform_code", "qform_code")
SITK_TYPES = {
    "i1": "sitkInt8", "u1": "sitkUInt8", "i2": "sitkInt16", "u2": "sitkUInt16", "i4": "sitkInt32", "u4": "sitkUInt32",
    "f4": "sitkFloat32",
}  # fmt: skip
CHUNK = 1 << 20  # bytes
AHEAD = 48  # chunks that may be inflated and not yet used
MORE_THAN_SAID = "The file holds more slices than its header says: part of the scan would be lost. Repair the header."
MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's xyzt_units & 7: metre, millimetre, micrometre
NRRD_SPACES = {"left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las"}
SUFFIXES = {"nifti": (".nii", ".nii.gz"), "nrrd": (".nrrd", ".nhdr"), "meta": (".mha", ".mhd")}


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


def to_image(array, affine: np.ndarray) -> "sitk.Image":
    """Image of an array in (z, y, x), or the image given, with a 4 x 4 affine from voxel (x, y, z) to LPS mm."""
    axes = np.asarray(affine, dtype=np.float64)[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or spacing.min() < 1e-6 or abs(np.linalg.det(axes / spacing)) < 1e-3:
        raise VolumeError(
            VolumeFault.DEGENERATE_AFFINE,
            "The affine is not finite, or its axes lie in a plane: it places no voxel. Repair the header.",
        )
    axes = np.where(np.abs(axes) < 1e-12 * spacing, 0.0, axes)  # ITK's SVD does not converge on denormal numbers
    image = array if isinstance(array, sitk.Image) else sitk.GetImageFromArray(as_scalar(array))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((axes / spacing).ravel().tolist())
    image.SetOrigin(np.asarray(affine, dtype=np.float64)[:3, 3].tolist())
    return image


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
    """Index of the one frame to read, from 0; never guessed where there are several."""
    if frame is None:
        if frames > 1:
            raise VolumeError(
                VolumeFault.SEVERAL_FRAMES,
                f"The scan has {frames} frames (times, phases or echoes, by {how}): choose one with frame=0 ... "
                f"frame={frames - 1}.",
            )
        return 0
    if not 0 <= frame < frames:
        raise VolumeError(VolumeFault.SEVERAL_FRAMES, f"frame={frame} was asked for, but there are {frames} (from 0).")
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


# === NIfTI ===========================================================================================================


def read_nifti(path: Path, findings: Findings, *, frame: int | None, max_voxels: int, early=None) -> "sitk.Image":
    """NIfTI-1 or -2 in one file, gzipped or not, inflated once and straight into the image.

    early: called with the image before its voxels are there, unless they have to be rescaled; what it returns is
    called with the number of slices that are there, again and again while others come.
    """
    if nib is None:
        raise ImportError("reading NIfTI needs nibabel: pip install nibabel")
    with open(path, "rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    try:
        with (fast_gzip.open if packed else open)(path, "rb") as stream:
            header = _nifti_header(stream)
            return _nifti_voxels(stream, header, path.stat().st_size, packed, frame, max_voxels, findings, early)
    except INFLATE_ERRORS:
        raise damaged("it ends too early, or its checksum fails") from None


class _Repairs(logging.Logger):
    """What nibabel would repair in a header while only a log line tells of it."""

    def __init__(self):
        super().__init__("nifti")
        self.told = []

    def handle(self, record):
        self.told.append(record.getMessage())


def _nifti_header(stream):
    """The fixed part of the header; extensions, which may hold a whole DICOM header, are never looked at."""
    repairs, head = _Repairs(), stream.read(540)
    kind = nib.Nifti2Header if head[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Header
    if len(head) < kind.template_dtype.itemsize:
        raise damaged("it ends within its header")
    try:
        header = kind(head[: kind.template_dtype.itemsize], check=False)
        header.check_fix(logger=repairs, error_level=40)
    except (HeaderDataError, ValueError, OverflowError):
        raise damaged("its NIfTI header breaks the format's rules") from None
    if any(told.startswith(FATAL_REPAIRS) for told in repairs.told) or float(header["vox_offset"]) % 1:
        raise damaged("its NIfTI header contradicts itself")
    if bytes(header["magic"].tobytes()[:3]) in (b"ni1", b"ni2"):
        raise VolumeError(
            VolumeFault.EXTERNAL_DATA_FILE,
            "The NIfTI header keeps its voxels in a second file (.img). Convert the pair to a single .nii first.",
        )
    return header


def nifti_affine(header, findings: Findings) -> np.ndarray:
    """RAS+ affine of a NIfTI header in mm: sform, else qform, never the fallback that guesses."""
    try:
        sform, scode = header.get_sform(coded=True)
        qform, qcode = header.get_qform(coded=True)
    except (HeaderDataError, ValueError):
        raise VolumeError(VolumeFault.DEGENERATE_AFFINE, "The NIfTI qform is no rotation. Repair it.") from None
    if not scode and not qcode:
        raise VolumeError(
            VolumeFault.NO_GEOMETRY,
            "The NIfTI header has neither sform nor qform, so left and right are unknown. "
            "Set one, or pass (array, affine).",
        )
    if scode and qcode:
        _compare_forms(sform, qform, header.get_data_shape(), findings)
    affine = np.array(sform if scode else qform, dtype=np.float64)
    norms, zooms = np.linalg.norm(affine[:3, :3], axis=0), np.abs(header["pixdim"][1:4])
    if scode and not np.allclose(norms, zooms, rtol=0.01):
        findings.warn(
            VolumeFault.QFORM_SFORM_DISAGREE,
            "The voxel sizes of the NIfTI header (pixdim) are not those of its sform.",
        )
    if nifti_unit(header) != 1.0:
        findings.warn(VolumeFault.UNIT_NOT_MILLIMETRE, f"The header's unit is {nifti_unit(header):g} mm; converted.")
        affine[:3] *= nifti_unit(header)
    return affine


def nifti_unit(header) -> float:
    """Millimetres in the header's unit of length; an unknown unit is taken as mm, as everybody does."""
    return MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)


def _compare_forms(sform, qform, shape, findings: Findings) -> None:
    if not (np.isfinite(sform).all() and np.isfinite(qform).all()):
        return  # refused where the affine is checked
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[:3]])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    shift = np.linalg.norm(((sform - qform) @ corners)[:3], axis=0).max()
    axes = [a[:3, :3] / np.maximum(np.linalg.norm(a[:3, :3], axis=0), 1e-12) for a in (sform, qform)]
    angle = np.degrees(np.arccos(np.clip((axes[0] * axes[1]).sum(0), -1, 1))).max()
    if shift > 1 or angle > 1:
        findings.warn(
            VolumeFault.QFORM_SFORM_DISAGREE,
            f"sform and qform of the NIfTI header are up to {shift:.1f} mm and {angle:.1f} degrees apart. The "
            "sform is used. Make them agree if the other is right.",
        )


def _nifti_voxels(stream, header, file_size, packed, frame, max_voxels, findings, early):
    try:
        shape, dtype = tuple(int(n) for n in header.get_data_shape()), header.get_data_dtype()
        offset, (slope, intercept) = header.get_data_offset(), header.get_slope_inter()
    except (HeaderDataError, ValueError, OverflowError):
        raise damaged("its NIfTI header breaks the format's rules") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    check_shape(shape, max_voxels)
    if dtype.kind not in "iuf":
        raise VolumeError(VolumeFault.NOT_SCALAR, "The voxels are colours or complex; a scan has one number a voxel.")
    affine = nifti_affine(header, findings)
    wanted = count(shape) * dtype.itemsize  # bytes
    if (file_size * MAX_INFLATION if packed else file_size - offset) < wanted:
        raise VolumeError(
            VolumeFault.HEADER_LIES,
            f"The header says {shape} voxels of {dtype.itemsize} bytes, which cannot be in a file of {file_size} "
            "bytes.",
        )
    frames = shape[3] if len(shape) == 4 else 1
    index = choose_frame(frames, frame)
    one = wanted // frames
    _skip(stream, offset + index * one)
    slope, intercept = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
    place, slices = RAS_TO_LPS @ affine, None
    in_place = dtype.isnative and dtype.str[1:] in SITK_TYPES and (slope, intercept) == (1.0, 0.0)
    with _chunks_ahead(stream, one) as chunks:
        if in_place:
            image, array = blank_image(shape[:3], getattr(sitk, SITK_TYPES[dtype.str[1:]]))
            to_image(image, place)
            slices = early(image) if early is not None else None
        else:
            array = np.empty(shape[2::-1], dtype)
        voxels, done = array.reshape(-1).view(np.uint8), 0
        for chunk in chunks:
            voxels[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)
            if slices is not None:
                slices(done * shape[2] // one)
    _check_rest(stream, (frames - 1 - index) * one, one // shape[2], findings)
    return image if in_place else to_image(rescale(as_scalar(array), slope, intercept), place)


def _skip(stream, offset: int) -> None:
    """Forward to byte `offset`; a gzip stream counts inflated bytes."""
    stream.seek(offset)
    if stream.tell() != offset:
        raise damaged("it ends before its voxels")


@contextlib.contextmanager
def _chunks_ahead(stream, total: int):
    """Iterates over the next `total` bytes of a stream, inflated by another thread while this one does other things.

    Not in this thread also because ISA-L leaves the upper halves of the vector registers set in the thread where it
    ran, and SSE code such as ITK's interpolation then takes twice as long there, and in threads started from there.
    """
    chunks, stop = Queue(AHEAD), threading.Event()

    def read() -> None:
        done = 0
        try:
            while done < total and not stop.is_set():
                chunk = stream.read(min(CHUNK, total - done))
                if not chunk:
                    raise damaged(f"it ends after {done} of {total} bytes of voxels")
                done += len(chunk)
                chunks.put(chunk)
        finally:
            chunks.put(None)

    with ThreadPoolExecutor(max_workers=1) as pool:
        reading = pool.submit(read)
        try:
            yield iter(chunks.get, None)
            reading.result()
        finally:
            stop.set()
            while not reading.done():  # it may wait for room in the queue
                with contextlib.suppress(Empty):
                    chunks.get(timeout=0.01)


def _check_rest(stream, others: int, slice_bytes: int, findings: Findings) -> None:
    """Reads to the end, which checks the checksum of a gzip file, and refuses a file with more slices than it says."""
    rest = 0
    while chunk := stream.read(CHUNK):
        rest += len(chunk)
        if rest >= others + slice_bytes:
            raise VolumeError(VolumeFault.HEADER_LIES, MORE_THAN_SAID)
    if rest < others:
        raise damaged("it ends before its last frame")
    if rest > others:
        findings.note(VolumeFault.HEADER_LIES, f"{rest - others} bytes follow the last voxel; they are not used.")


# === NRRD and MetaImage ==============================================================================================


def read_itk(path: Path, kind: str, findings: Findings, *, frame: int | None, max_voxels: int) -> "sitk.Image":
    """NRRD (.nrrd, .nhdr) or MetaImage (.mha, .mhd) by SimpleITK, after a look at what the header points to."""
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
    check_shape(shape, max_voxels)
    item = sitk.GetArrayViewFromImage(sitk.Image([1, 1, 1], reader.GetPixelID())).itemsize
    wanted, size = count(shape) * item, data_file.stat().st_size
    if (size * MAX_INFLATION if packed else size - begin) < wanted:
        raise VolumeError(
            VolumeFault.HEADER_LIES,
            f"The header says {shape} voxels of {item} bytes, which cannot be in a file of {size} bytes.",
        )
    if not packed and size - begin >= wanted + wanted // shape[-1]:
        raise VolumeError(VolumeFault.HEADER_LIES, MORE_THAN_SAID)
    index = choose_frame(shape[3] if len(shape) == 4 else 1, frame)
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


def _check_text_header(path: Path, kind: str) -> tuple[Path, bool, int]:
    """(file with the voxels, whether they are compressed, bytes of header before them); refuses what ITK would
    guess."""
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
    return (_own_data_file(path, target), packed, 0) if target else (path, packed, begin)


def _check_meta_scale(fields: dict) -> None:
    # ITK passes over these two fields without a word
    scale = (fields.get("ElementToIntensityFunctionSlope", "1"), fields.get("ElementToIntensityFunctionOffset", "0"))
    if [s.strip("0").rstrip(".") for s in scale] != ["1", ""]:
        raise VolumeError(
            VolumeFault.NOT_HU,
            "The MetaImage header holds a scale for its numbers. Apply it and write the file again.",
        )


def _own_data_file(path: Path, target: str) -> Path:
    """The file of voxels beside a detached header: same folder, same stem, no link. Else a header could name any
    file."""
    data = path.parent / target
    plain = target == Path(target).name and Path(target).stem == path.stem
    if not plain or data.is_symlink():
        raise VolumeError(
            VolumeFault.EXTERNAL_DATA_FILE,
            "The header names another file for its voxels than the one of the same stem beside it. Such a link is not "
            "followed: put both in one folder under one stem, or write the scan into a single file.",
        )
    if not data.is_file():
        raise VolumeError(VolumeFault.NO_SUCH_FILE, "The file of voxels which the header names is not beside it.")
    return data
