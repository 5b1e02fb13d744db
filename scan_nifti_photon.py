"""NIfTI-1 and -2 by nibabel's header: no affine is guessed, and voxels are inflated once, into the image's memory."""

import contextlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, Queue

import numpy as np

from .scan_faults_photon import Findings, VolumeError, VolumeFault
from .scan_files_photon import (
    INFLATE_ERRORS,
    RAS_TO_LPS,
    UNDECLARED_SLICES,
    ReadOptions,
    ScanHeader,
    as_scalar,
    check_file_size,
    count,
    damaged,
    fast_gzip,
    rescale,
    select_frame,
)
from .scan_grid_photon import Geometry, blank_image

try:
    import nibabel as nib
    from nibabel.spatialimages import HeaderDataError
except ImportError:
    nib, HeaderDataError = None, ValueError
try:
    import SimpleITK as sitk
except ImportError:
    sitk = None

FATAL_REPAIRS = ("sizeof_hdr", "bitpix", "vox offset 0", "sform_code", "qform_code")
SITK_TYPES = {
    "i1": "sitkInt8", "u1": "sitkUInt8", "i2": "sitkInt16", "u2": "sitkUInt16", "i4": "sitkInt32", "u4": "sitkUInt32",
    "f4": "sitkFloat32",
}  # fmt: skip
CHUNK = 1 << 20  # bytes
AHEAD = 48  # chunks that may be inflated and not yet used
BROKEN_OFF = "it ends too early, or its checksum fails"
MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's xyzt_units & 7: metre, millimetre, micrometre


def open_nifti(path: Path, options: ReadOptions, findings: Findings) -> ScanHeader:
    """NIfTI-1 or -2 in one file, gzipped or not."""
    if nib is None:
        raise ImportError("reading NIfTI needs nibabel: pip install nibabel")
    with open(path, "rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    opener = fast_gzip.open if packed else open
    try:
        with opener(path, "rb") as stream:
            header = _nifti_header(stream)
    except INFLATE_ERRORS:
        raise damaged(BROKEN_OFF) from None
    try:
        shape, dtype = tuple(int(n) for n in header.get_data_shape()), header.get_data_dtype()
        offset, (slope, intercept) = header.get_data_offset(), header.get_slope_inter()
    except (HeaderDataError, ValueError, OverflowError):
        raise damaged("its NIfTI header breaks the format's rules") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    size, index = select_frame(shape, options)
    if dtype.kind not in "iuf":
        raise VolumeError(VolumeFault.NOT_SCALAR, "The voxels are colours or complex; a scan has one number a voxel.")
    geometry = Geometry.from_affine(size, RAS_TO_LPS @ nifti_affine(header, findings))
    check_file_size(shape, dtype.itemsize, path.stat().st_size, offset, packed)
    scale = 1.0 if slope is None else slope, 0.0 if intercept is None else intercept
    frame_bytes = count(size) * dtype.itemsize
    frames_after = (shape[3] if len(shape) == 4 else 1) - 1 - index

    def read(progress=None) -> "sitk.Image":
        try:
            with opener(path, "rb") as stream:
                _skip(stream, offset + index * frame_bytes)
                image = _read_frame(stream, geometry, dtype, scale, progress)
                _check_rest(stream, frames_after * frame_bytes, frame_bytes // size[2], findings)
                return image
        except INFLATE_ERRORS:
            raise damaged(BROKEN_OFF) from None

    return ScanHeader(geometry, read)


class _Repairs(logging.Logger):
    """Collects what nibabel repairs in a header, which it reports in its log alone."""

    def __init__(self):
        super().__init__("nifti")
        self.messages = []

    def handle(self, record):
        self.messages.append(record.getMessage())


def _nifti_header(stream):
    """The fixed part of the header; extensions, which may hold a whole DICOM header, are never read."""
    repairs, head = _Repairs(), stream.read(540)
    kind = nib.Nifti2Header if head[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Header
    if len(head) < kind.template_dtype.itemsize:
        raise damaged("it ends within its header")
    try:
        header = kind(head[: kind.template_dtype.itemsize], check=False)
        header.check_fix(logger=repairs, error_level=40)
    except (HeaderDataError, ValueError, OverflowError):
        raise damaged("its NIfTI header breaks the format's rules") from None
    if any(message.startswith(FATAL_REPAIRS) for message in repairs.messages) or float(header["vox_offset"]) % 1:
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
    """Millimetres in the header's unit of length; an unknown unit is taken as mm, as all readers do."""
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


def _read_frame(stream, geometry: Geometry, dtype, scale: tuple[float, float], progress) -> "sitk.Image":
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


def _skip(stream, offset: int) -> None:
    """Forward to byte `offset`; a gzip stream counts inflated bytes."""
    stream.seek(offset)
    if stream.tell() != offset:
        raise damaged("it ends before its voxels")


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


def _check_rest(stream, frames_bytes: int, slice_bytes: int, findings: Findings) -> None:
    """Reads to the end, which checks a gzip file's checksum; refuses a file with more slices than its header says."""
    rest = 0
    while chunk := stream.read(CHUNK):
        rest += len(chunk)
        if rest >= frames_bytes + slice_bytes:
            raise VolumeError(VolumeFault.HEADER_LIES, UNDECLARED_SLICES)
    if rest < frames_bytes:
        raise damaged("it ends before its last frame")
    if rest > frames_bytes:
        extra = rest - frames_bytes
        findings.note(VolumeFault.HEADER_LIES, f"{extra} bytes follow the last voxel; they are not used.")
