"""NRRD and MetaImage: a text header, then voxels in the same file or in one beside it.

ITK reads both, but it accepts damaged streams, follows any file name in a header and ignores scales. So the header is
parsed here, by ITK's rules on case, separators and length, and the voxels are inflated and checked as in NIfTI.
"""

import bz2
import io
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .scan_faults_photon import Findings, VolumeError, VolumeFault
from .scan_files_photon import (
    BROKEN_OFF,
    INFLATE_ERRORS,
    ReadOptions,
    ScanHeader,
    as_scalar,
    check_file_size,
    check_rest,
    check_shape,
    count,
    damaged,
    fast_gzip,
    read_frame,
    select_frame,
    skip,
)
from .scan_grid_photon import Geometry

MAX_HEADER = 1 << 24  # bytes
TO_LPS = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
NRRD_TYPES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
NRRD_TYPES = {name: code for code, names in NRRD_TYPES.items() for name in names.split(", ")}
NRRD_ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
NRRD_ENCODINGS |= {"txt": "text", "text": "text", "ascii": "text"}
NRRD_FIELDS = {
    "dimension", "type", "blocksize", "encoding", "endian", "content", "min", "max", "oldmin", "oldmax", "datafile",
    "lineskip", "byteskip", "number", "sampleunits", "space", "spacedimension", "spaceunits", "spaceorigin",
    "spacedirections", "measurementframe", "sizes", "spacings", "thicknesses", "axismins", "axismaxs", "centers",
    "centerings", "labels", "units", "kinds",
}  # fmt: skip
FRAME_KINDS = {"", "???", "none", "list", "time", "domain"}  # of an axis that is not of space
META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
META_FIELDS = {
    "NDims", "DimSize", "ElementType", "ElementNumberOfChannels", "ElementDataFile", "HeaderSize", "CompressedData",
    "BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "TransformMatrix", "Rotation", "Orientation",
    "ElementSpacing", "Offset", "Position", "Origin", "Modality", "ElementToIntensityFunctionSlope",
    "ElementToIntensityFunctionOffset",
}  # fmt: skip
META_MODALITIES = {"MET_MOD_CT": "CT", "MET_MOD_MR": "MR", "MET_MOD_NM": "NM", "MET_MOD_US": "US"}


@dataclass(frozen=True)
class Voxels:
    """Where the voxels of a text header lie: sizes from the fastest axis on, `frame_axis` among them or -1."""

    file: Path
    begin: int  # byte of the file where the voxels, packed or not, begin
    encoding: str  # "raw", "gzip", "zlib", "bzip2" or "text"
    dtype: np.dtype
    sizes: tuple[int, ...]
    frame_axis: int = -1

    @property
    def shape(self) -> tuple[int, ...]:
        """(x, y, z) or (x, y, z, frames)."""
        space = tuple(n for axis, n in enumerate(self.sizes) if axis != self.frame_axis)
        frames = 1 if self.frame_axis < 0 else self.sizes[self.frame_axis]
        return space if frames == 1 else (*space, frames)


def _open(voxels: Voxels, affine: np.ndarray, options: ReadOptions, findings: Findings, modality="") -> ScanHeader:
    size, index = select_frame(voxels.shape, options)
    geometry = Geometry.from_affine(size, affine)
    file_size, itemsize = voxels.file.stat().st_size, voxels.dtype.itemsize
    if voxels.encoding == "text":
        check_file_size(voxels.shape, 2, file_size + 1, voxels.begin, packed=False)  # a digit and a space
    elif voxels.encoding == "bzip2":
        check_file_size(voxels.shape, itemsize, 100 * file_size, voxels.begin, packed=True)
    else:
        check_file_size(voxels.shape, itemsize, file_size, voxels.begin, voxels.encoding != "raw")
    frames, frame_bytes = count(voxels.sizes) // count(size), count(size) * itemsize

    def read(progress=None):
        try:
            with open(voxels.file, "rb") as raw:
                raw.seek(voxels.begin)
                if voxels.encoding == "text":
                    return geometry.image(as_scalar(_frame_of(_numbers(raw, voxels), voxels, index)))
                stream = _inflating(raw, voxels.encoding)
                if frames > 1 and voxels.frame_axis < 3:  # frames lie voxel by voxel, not one after the other
                    values = np.empty(count(voxels.sizes), voxels.dtype)
                    _fill(stream, values)
                    image = geometry.image(as_scalar(_frame_of(values, voxels, index)))
                    rest = 0
                else:
                    skip(stream, index * frame_bytes)
                    image = read_frame(stream, geometry, voxels.dtype, (1.0, 0.0), progress)
                    rest = (frames - 1 - index) * frame_bytes
                check_rest(stream, rest, frame_bytes // size[2], voxels.encoding != "raw", findings)
                return image
        except INFLATE_ERRORS:
            raise damaged(BROKEN_OFF) from None

    return ScanHeader(geometry, read, modality)


def _frame_of(values: np.ndarray, voxels: Voxels, index: int) -> np.ndarray:
    """(z, y, x) of one frame from all values in the order of the file."""
    array = values.reshape(voxels.sizes[::-1])
    return array if voxels.frame_axis < 0 else array.take(index, axis=len(voxels.sizes) - 1 - voxels.frame_axis)


def _fill(stream, values: np.ndarray) -> None:
    memory, done = memoryview(values.view(np.uint8)), 0
    while done < len(memory):
        chunk = stream.read(min(1 << 20, len(memory) - done))
        if not chunk:
            raise damaged(f"it ends after {done} of {len(memory)} bytes of voxels")
        memory[done : done + len(chunk)] = chunk
        done += len(chunk)


def _numbers(raw, voxels: Voxels) -> np.ndarray:
    words = raw.read().split()
    if len(words) != count(voxels.sizes):
        raise damaged(f"it holds {len(words)} of {count(voxels.sizes)} numbers")
    try:
        return np.array(words, dtype=np.float64).astype(voxels.dtype)
    except ValueError:
        raise damaged("a voxel is no number") from None


def _inflating(raw, encoding: str):
    """A stream of the voxels' bytes from a file that stands at their begin."""
    if encoding == "gzip":
        return fast_gzip.open(raw, "rb")
    if encoding == "bzip2":
        return bz2.open(raw, "rb")
    return io.BufferedReader(_ZlibStream(raw), 1 << 20) if encoding == "zlib" else raw


class _ZlibStream(io.RawIOBase):
    """Inflates one zlib or gzip stream, as MetaImage packs voxels; its end is checked by its checksum, and by nothing
    else than zeros after it, as in gzip."""

    def __init__(self, raw):
        self.raw, self.inflater, self.packed = raw, zlib.decompressobj(zlib.MAX_WBITS | 32), b""

    def readable(self):
        return True

    def seekable(self):
        return False

    def readinto(self, buffer) -> int:
        while not self.inflater.eof:
            self.packed = self.packed or self.raw.read(1 << 20)
            if not self.packed:
                raise EOFError("the stream ends before its checksum")
            out = self.inflater.decompress(self.packed, len(buffer))
            self.packed = self.inflater.unconsumed_tail
            if out:
                buffer[: len(out)] = out
                return len(out)
        if (self.inflater.unused_data + self.raw.read(1 << 20)).strip(b"\0"):
            raise EOFError("other bytes follow the stream")
        return 0


def _lines(stream):
    """Lines of a header as text, without their ends; refuses a header without end."""
    total = 0
    while line := stream.readline(MAX_HEADER):
        total += len(line)
        if total >= MAX_HEADER:
            raise damaged("its header has no end")
        yield line.decode("latin-1").rstrip("\r\n")


def _integers(text: str, what: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split())
    except ValueError:
        raise damaged(f"{what} of its header are no whole numbers") from None


def _numbers_of(text: str, what: str) -> list[float]:
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise damaged(f"{what} of its header are no numbers") from None


def _no_geometry(kind: str) -> VolumeError:
    return VolumeError(
        VolumeFault.NO_GEOMETRY,
        f"The {kind} header has no orientation or no spacing, so left and right are unknown. "
        "Write it again with both, or pass (array, affine).",
    )


def _data_file(path: Path, target: str) -> Path:
    """The file of voxels beside a detached header: same folder, same stem, no link. Otherwise a header could name any
    file of the machine."""
    data = path.parent / target
    plain = target == Path(target).name and target.startswith(path.stem + ".")
    if not plain or data == path or data.is_symlink():
        raise VolumeError(
            VolumeFault.EXTERNAL_DATA_FILE,
            "The header names another file for its voxels than the one of the same stem beside it. Such a link is not "
            "followed: put both in one folder under one stem, or write the scan into a single file.",
        )
    if not data.is_file():
        raise VolumeError(VolumeFault.NO_SUCH_FILE, "The file of voxels that the header names is not beside it.")
    return data


# === NRRD ============================================================================================================


def open_nrrd(path: Path, options: ReadOptions, findings: Findings) -> ScanHeader:
    """NRRD (.nrrd, or .nhdr with its voxels beside it)."""
    fields, begin = _nrrd_fields(path)
    sizes = _integers(fields.get("sizes", ""), "the sizes")
    if not sizes or fields.get("dimension") != str(len(sizes)):
        raise damaged("its NRRD header contradicts itself about its dimensions")
    affine, frame_axis = _nrrd_axes(fields, len(sizes))
    if fields.get("type", "").lower() not in NRRD_TYPES:
        raise VolumeError(
            VolumeFault.NOT_SCALAR, "The voxels of the NRRD file are no numbers; a scan has one a voxel."
        )
    dtype = np.dtype(NRRD_TYPES[fields["type"].lower()])
    encoding = NRRD_ENCODINGS.get(fields.get("encoding", "").lower())
    if encoding is None or _integers(fields.get("lineskip", ""), "the skipped lines") not in ((), (0,)):
        raise VolumeError(
            VolumeFault.MISSING_DECODER,
            "The NRRD file has an encoding that is not read here (hex, or skipped lines). Write it again with gzip.",
        )
    if dtype.itemsize > 1 and encoding != "text":
        order = {"little": "<", "big": ">"}.get(fields.get("endian", "").lower())
        if order is None:
            raise damaged("its NRRD header gives no byte order")
        dtype = dtype.newbyteorder(order)
    if {"oldmin", "oldmax"} & set(fields):
        raise VolumeError(
            VolumeFault.NOT_HU,
            "The NRRD header says that its numbers are quantised. Undo it and write the file again.",
        )
    file = path
    if "datafile" in fields:
        file, begin = _data_file(path, fields["datafile"]), 0
    jump = _integers(fields.get("byteskip", "0") or "0", "the skipped bytes")[0]
    if jump == -1 and encoding == "raw":
        begin = max(0, file.stat().st_size - count(sizes) * dtype.itemsize)
    elif jump < 0 or jump and encoding != "raw":
        raise damaged("its NRRD header skips bytes of a packed stream")
    else:
        begin += jump
    return _open(Voxels(file, begin, encoding, dtype, sizes, frame_axis), affine, options, findings)


def _nrrd_fields(path: Path) -> tuple[dict, int]:
    """(fields by their names without spaces, in small letters; byte after the header)."""
    fields = {}
    with open(path, "rb") as stream:
        lines = _lines(stream)
        next(lines)  # the magic word
        for line in lines:
            if not line:
                return fields, stream.tell()
            if line.startswith("#"):
                continue
            field = re.match(r"([^:]+): ?(?!=)(.*)", line)
            if not field:
                if ":=" in line:  # the writer's notes
                    continue
                raise damaged("its NRRD header holds a line that is no field")
            name = field[1].strip().lower().replace(" ", "")
            if name not in NRRD_FIELDS or name in fields:
                raise damaged("its NRRD header holds an unknown or a repeated field")
            fields[name] = field[2].strip()
    if "datafile" not in fields:
        raise damaged("its NRRD header has no end")
    return fields, 0


def _nrrd_axes(fields: dict, dimension: int) -> tuple[np.ndarray, int]:
    """(4 x 4 affine to LPS mm, index of the axis of frames or -1)."""
    space, time = re.subn("-time$", "", fields.get("space", "").lower())
    vectors = re.findall(r"\(([^)]*)\)|(none)", fields.get("spacedirections", ""))
    width = int(re.sub(r"\D", "", fields.get("spacedimension", "")) or 3 + time)
    if space not in TO_LPS or len(vectors) != dimension:
        raise _no_geometry("NRRD")
    if any(
        u.lower() not in ("mm", "millimeter", "none", "???", "") for u in _quoted(fields.get("spaceunits", ""))[:3]
    ):
        raise VolumeError(VolumeFault.UNIT_NOT_MILLIMETRE, "The NRRD header is not in mm. Convert it to mm first.")
    kinds = fields.get("kinds", "").lower().split()
    columns, frame_axes = [], []
    for axis, (vector, none) in enumerate(vectors):
        column = [] if none else _numbers_of(vector, "the directions")
        if none or len(column) == 4 and width == 4 and not any(column[:3]):
            frame_axes.append(axis)
        elif len(column) != width:
            raise damaged("its NRRD header contradicts itself about its dimensions")
        else:
            columns.append(column[:3])
    if any(kinds[axis] not in FRAME_KINDS for axis in frame_axes if axis < len(kinds)):
        raise VolumeError(VolumeFault.NOT_SCALAR, "The NRRD file has several numbers a voxel; a scan has one.")
    if len(columns) != 3 or len(frame_axes) > 1:
        raise VolumeError(
            VolumeFault.NOT_THREE_DIMENSIONAL,
            f"The NRRD file has {len(columns)} axes of space and {len(frame_axes)} others; a scan has three, and at "
            "most one of frames. Give a volume.",
        )
    origin = _numbers_of(fields.get("spaceorigin", "(0,0,0)").strip("() "), "the origin")
    if len(origin) < 3:
        raise damaged("its NRRD header contradicts itself about its dimensions")
    affine, flips = np.eye(4), np.array(TO_LPS[space])
    affine[:3, :3] = flips[:, None] * np.array(columns).T
    affine[:3, 3] = flips * np.array(origin[:3])
    return affine, frame_axes[0] if frame_axes else -1


def _quoted(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text) or text.split()


# === MetaImage =======================================================================================================


def open_meta(path: Path, options: ReadOptions, findings: Findings) -> ScanHeader:
    """MetaImage (.mha, or .mhd with its voxels beside it)."""
    fields, begin = _meta_fields(path)
    sizes = _integers(fields.get("DimSize", ""), "the sizes")
    if not sizes or fields.get("NDims") != str(len(sizes)):
        raise damaged("its MetaImage header contradicts itself about its dimensions")
    if fields.get("ElementNumberOfChannels", "1") != "1" or fields.get("ElementType") not in META_TYPES:
        raise VolumeError(VolumeFault.NOT_SCALAR, "The MetaImage file has no single number a voxel; a scan has one.")
    check_shape(sizes, options.max_voxels)
    affine = _meta_affine(fields, len(sizes))
    _check_meta_scale(fields)
    order = ">" if _true(fields, "BinaryDataByteOrderMSB", "ElementByteOrderMSB") else "<"
    dtype = np.dtype(META_TYPES[fields["ElementType"]]).newbyteorder(order)
    encoding = "zlib" if _true(fields, "CompressedData") else "raw"
    if not _true(fields, "BinaryData", default="True"):
        encoding = "text"
    file, target = path, fields["ElementDataFile"]
    if target.upper() != "LOCAL":
        file, begin = _data_file(path, target), 0
    (jump,) = _integers(fields.get("HeaderSize", "0"), "the skipped bytes") or (0,)
    if jump == -1 and encoding == "raw":
        begin = max(0, file.stat().st_size - count(sizes) * dtype.itemsize)
    else:
        begin += max(0, jump)
    modality = META_MODALITIES.get(fields.get("Modality", ""), "")
    frame_axis = 3 if len(sizes) == 4 else -1
    return _open(Voxels(file, begin, encoding, dtype, sizes, frame_axis), affine, options, findings, modality)


def _meta_fields(path: Path) -> tuple[dict, int]:
    """(fields, byte after the header). A key ends at "=" or ":"; ElementDataFile is the last."""
    fields = {}
    with open(path, "rb") as stream:
        for line in _lines(stream):
            field = re.match(r"\s*([^=:]*?)\s*[=:]\s*(.*?)\s*$", line)
            if not field or field[1] not in META_FIELDS:  # the writer's notes, of which one may have several lines
                continue
            if field[1] in fields:
                raise damaged("its MetaImage header holds a field twice")
            fields[field[1]] = field[2]
            if field[1] == "ElementDataFile":
                return fields, stream.tell()
    raise damaged("its MetaImage header has no end")


def _true(fields: dict, *names: str, default: str = "False") -> bool:
    return next((fields[name] for name in names if name in fields), default)[:1] in ("T", "t", "1")


def _meta_affine(fields: dict, dimension: int) -> np.ndarray:
    rows = next((fields[name] for name in ("TransformMatrix", "Rotation", "Orientation") if name in fields), None)
    if rows is None or "ElementSpacing" not in fields:
        raise _no_geometry("MetaImage")
    matrix, spacing = _numbers_of(rows, "the directions"), _numbers_of(fields["ElementSpacing"], "the spacings")
    place = next((fields[name] for name in ("Offset", "Position", "Origin") if name in fields), "0 " * dimension)
    origin = _numbers_of(place, "the origin")
    if len(matrix) != dimension**2 or len(spacing) != dimension or len(origin) != dimension:
        raise damaged("its MetaImage header contradicts itself about its dimensions")
    affine = np.eye(4)
    affine[:3, :3] = np.array(matrix).reshape(dimension, dimension)[:3, :3].T * np.array(spacing[:3])
    affine[:3, 3] = origin[:3]
    return affine


def _check_meta_scale(fields: dict) -> None:
    slope = _numbers_of(fields.get("ElementToIntensityFunctionSlope", "1"), "the scale")
    offset = _numbers_of(fields.get("ElementToIntensityFunctionOffset", "0"), "the scale")
    if not (len(slope) == len(offset) == 1 and math.isclose(slope[0], 1) and offset[0] == 0):
        raise VolumeError(
            VolumeFault.NOT_HU,
            "The MetaImage header holds a scale for its numbers. Apply it and write the file again.",
        )
