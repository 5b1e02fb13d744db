"""NIfTI-1 and -2 by nibabel's header: no affine is guessed, and voxels are inflated once, into the image's memory."""

import logging
from pathlib import Path

import numpy as np

from .scan_faults_photon import Findings, VolumeError, VolumeFault
from .scan_files_photon import (
    BROKEN_OFF,
    INFLATE_ERRORS,
    RAS_TO_LPS,
    ReadOptions,
    ScanHeader,
    check_file_size,
    check_rest,
    count,
    damaged,
    fast_gzip,
    read_frame,
    select_frame,
    skip,
)
from .scan_grid_photon import Geometry

try:
    import nibabel as nib
    from nibabel.spatialimages import HeaderDataError
except ImportError:
    nib, HeaderDataError = None, ValueError
FATAL_REPAIRS = ("sizeof_hdr", "bitpix", "vox offset 0", "sform_code", "qform_code")
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

    def read(progress=None):
        try:
            with opener(path, "rb") as stream:
                skip(stream, offset + index * frame_bytes)
                image = read_frame(stream, geometry, dtype, scale, progress)
                check_rest(stream, frames_after * frame_bytes, frame_bytes // size[2], packed, findings)
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
    if scode and qcode and not np.any(sform[:3]):  # the form of a writer that sets the code alone
        scode = 0
        findings.warn(
            VolumeFault.QFORM_SFORM_DISAGREE, "The sform of the NIfTI header is all zero; the qform is used."
        )
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
