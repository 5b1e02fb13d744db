"""What the readers of all formats share: reading options, a scan's header, checks of shapes, files and numbers.

Each format opens a source as a `ScanHeader`. Sizes are checked against the file before memory is taken, so that a
wrong header costs nothing.
"""

import contextlib
import gzip
import math
import re
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

import numpy as np

from .scan_faults_photon import Findings, VolumeError, VolumeFault
from .scan_grid_photon import Geometry, blank_image

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
UNDECLARED_VOXELS = (
    "The file holds more voxels than its header says, so that part of the scan would be lost or shifted. Fetch it "
    "again, or repair the header."
)
BROKEN_OFF = "it ends too early, or its checksum fails"
SITK_TYPES = {
    "i1": "sitkInt8", "u1": "sitkUInt8", "i2": "sitkInt16", "u2": "sitkUInt16", "i4": "sitkInt32", "u4": "sitkUInt32",
    "f4": "sitkFloat32",
}  # fmt: skip
LISTED_FRAMES = 12
CHUNK = 1 << 20  # bytes
AHEAD = 48  # chunks that may be inflated and not yet used
SUFFIXES = {"nifti": (".nii", ".nii.gz"), "nrrd": (".nrrd", ".nhdr"), "meta": (".mha", ".mhd")}


@dataclass(frozen=True)
class ReadOptions:
    """Choices of the reader, with their defaults.

    series: which DICOM series of a folder: its number in the list that the error gives, or its SeriesInstanceUID.
    frame: which frame (time, phase, echo) of a 4D scan, from 0.
    max_voxels: larger scans are refused from the header alone.
    tilt: "resample" (with a warning) or "refuse" a sheared scan.
    gaps: "refuse" missing or unevenly spaced slices; "resample" (with a warning) uneven ones to an even distance; or
        "interpolate" (with a warning) missing ones too.
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
    "gaps": ("refuse", "resample", "interpolate"),
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
    if re.match(rb"\s*(ObjectType|NDims)\s*[=:]", head):
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


def choose_frame(frames: int, frame: int | None, names=()) -> int:
    """Index of the one frame to read, from 0; never guessed where a scan has several. names: what each frame is."""
    if frame is None:
        if frames > 1:
            listed = "; ".join(f"{i}: {name}" for i, name in enumerate(names[:LISTED_FRAMES]))
            listed += "; ..." if len(names) > LISTED_FRAMES else ""
            raise VolumeError(
                VolumeFault.SEVERAL_FRAMES,
                f"The scan has {frames} frames (times, phases, echoes, acquisitions){': ' if listed else ''}{listed}. "
                f"Choose one with frame=0 ... frame={frames - 1}.",
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


# === Streams of voxels ===============================================================================================


def read_frame(stream, geometry: Geometry, dtype, scale: tuple[float, float], progress) -> "sitk.Image":
    """The frame that begins here, as an image; straight into the image's memory where the stored values are final."""
    in_place = dtype.isnative and dtype.str[1:] in SITK_TYPES and scale == (1.0, 0.0)
    if in_place:
        image, array = blank_image(geometry.size, getattr(sitk, SITK_TYPES[dtype.str[1:]]))
        geometry.image(image)
    else:
        image, array = None, np.empty(geometry.size[::-1], dtype)
    memory, done = array.reshape(-1).view(np.uint8), 0
    with _chunks_ahead(stream, len(memory)) as chunks:
        for chunk in chunks:
            memory[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)
            if in_place and progress is not None:
                progress(image, done * geometry.size[2] // len(memory))
    return image if in_place else geometry.image(rescale(as_scalar(array), *scale))


def skip(stream, length: int) -> None:
    """Reads over `length` bytes of a stream; a packed stream counts inflated bytes."""
    while length:
        chunk = stream.read(min(CHUNK, length))
        if not chunk:
            raise damaged("it ends before its voxels")
        length -= len(chunk)


@contextlib.contextmanager
def _chunks_ahead(stream, total: int):
    """Iterates over the next `total` bytes of a stream, inflated by another thread while this one interpolates.

    Another thread is needed also because ISA-L leaves the upper halves of the vector registers set in the thread where
    it ran. SSE code such as ITK's interpolation then takes twice as long there, and in threads started from there.
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


def check_rest(stream, frames_bytes: int, slice_bytes: int, packed: bool, findings: Findings) -> None:
    """Reads to the end, which checks the checksum of a packed stream. Refuses more slices than the header declares. A
    file without checksum may hold only zeros after the voxels: other bytes may mean that the voxels are shifted."""
    rest, zeros = 0, True
    while chunk := stream.read(CHUNK):
        zeros = zeros and (packed or not any(chunk[max(0, frames_bytes - rest) :]))
        rest += len(chunk)
        if rest >= frames_bytes + slice_bytes or not zeros:
            raise VolumeError(VolumeFault.HEADER_LIES, UNDECLARED_VOXELS)
    if rest < frames_bytes:
        raise damaged("it ends before its last frame")
    if rest > frames_bytes:
        extra = rest - frames_bytes
        findings.note(VolumeFault.HEADER_LIES, f"{extra} bytes follow the last voxel; they are not used.")


def jpeg_is_consistent(stream: bytes, samples: np.ndarray) -> bool:
    """Whether a lossless JPEG stream (ITU-T T.81, process 14) is as long as the code of the samples decoded from it.

    Decoders only print a warning when a damaged stream holds more or fewer codes than the image has samples, and the
    image is wrong from the damage on. Streams with restart markers are not checked.
    """
    lengths, at, precision, start = {}, 2, 16, None
    while start is None and at + 4 <= len(stream):
        marker, size = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        segment, at = stream[at + 4 : at + 2 + size], at + 2 + size
        if marker == 0xC4:  # Huffman tables: how many codes of each length, then their symbols
            while len(segment) > 17:
                counts, table = segment[1:17], segment[0] & 15
                symbols = segment[17 : 17 + sum(counts)]
                of = [length for length, number in enumerate(counts, start=1) for _ in range(number)]
                lengths[table] = dict(zip(symbols, of, strict=False))
                segment = segment[17 + sum(counts) :]
        elif marker == 0xC3:
            precision = segment[0]
        elif marker == 0xDD and any(segment[:2]):
            return True
        elif marker == 0xDA:
            table, predictor, shift, start = segment[2] >> 4, segment[3], segment[5] & 15, at
    end = stream.rfind(b"\xff\xd9")
    if start is None or end < start:
        return False
    values = (samples.astype(np.int64) & (1 << precision) - 1) >> shift
    left, above, corner = np.roll(values, 1, 1), np.roll(values, 1, 0), np.roll(values, 1, (0, 1))
    guess = {
        1: left, 2: above, 3: corner, 4: left + above - corner, 5: left + (above - corner >> 1),
        6: above + (left - corner >> 1), 7: left + above >> 1,
    }[predictor]  # fmt: skip
    guess[0], guess[1:, 0] = left[0], above[1:, 0]
    guess[0, 0] = 1 << (precision - shift - 1)
    difference = np.abs((values - guess + (1 << 15)) % (1 << 16) - (1 << 15))
    categories = np.bincount(np.ceil(np.log2(difference + 1)).astype(int).ravel())
    codes = lengths.get(table, {})
    if any(number and category not in codes for category, number in enumerate(categories)):
        return False
    bits = sum(int(number) * (codes[c] + (c if c < 16 else 0)) for c, number in enumerate(categories) if number)
    packed = end - start - stream.count(b"\xff\0", start, end)
    return 0 <= 8 * packed - bits < 16


def rle_is_consistent(stream: bytes, samples: np.ndarray) -> bool:
    """Whether each segment of a DICOM RLE stream (PS3.5 annex G) unpacks to one byte a sample, with no byte left."""
    bounds = [int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(1, 1 + stream[0])] + [len(stream)]
    for at, end in zip(bounds, bounds[1:], strict=False):
        count = 0
        while at < end and count < samples.size:
            head = stream[at]
            count += head + 1 if head < 128 else 257 - head if head > 128 else 0
            at += head + 2 if head < 128 else 2 if head > 128 else 1
        if count != samples.size or not end - 1 <= at <= end:
            return False
    return True
