"""A DICOM series, classic or Enhanced multi-frame, as one image; what cannot be one regular volume is refused.

All headers are read first, without voxels. Geometry comes from positions and orientations alone, never from slice
thickness, slice location, file names or the gantry-tilt tag. Voxels are then decoded slice by slice into one array,
by pydicom, or by the GDCM inside SimpleITK where pydicom has no plugin for the transfer syntax.
"""

import contextlib
import logging
import struct
import threading
import warnings
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .scan_faults_photon import Findings, VolumeError, VolumeFault
from .scan_files_photon import ReadOptions, ScanHeader, check_shape, damaged, rescale
from .scan_grid_photon import Geometry
from .scan_stack_photon import PHASE_TAGS, Slice, interpolate, one_phase, place_stack

try:
    import pydicom
    from pydicom.errors import BytesLengthException, InvalidDicomError
    from pydicom.pixels import get_decoder, pixel_array
except ImportError:
    pydicom = None
    BytesLengthException = InvalidDicomError = ValueError
try:
    import SimpleITK as sitk
except ImportError:
    sitk = None

# pydicom raises many types on a damaged file: a wrong byte may become a wrong length, type, tag or encoding.
PARSE_ERRORS = (
    InvalidDicomError, BytesLengthException, EOFError, OSError, ValueError, KeyError, TypeError, IndexError,
    AttributeError, NotImplementedError, OverflowError, RecursionError, struct.error, zlib.error, AssertionError,
)  # fmt: skip
DECODE_ERRORS = (*PARSE_ERRORS, RuntimeError)
SUFFIXES = (".dcm", ".dicom", ".ima")
MODALITY_TAG = "0008|0060"  # the key under which SimpleITK keeps the DICOM modality of an image
MODALITIES = {"CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "SEG", "RTDOSE", "SC", "OT"}
CT_MR_CLASSES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4")  # CT and MR storage, classic and Enhanced
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DICOM_ROOT = b"1.2.840.10008"  # every transfer syntax and object class begins so
APPLE_DOUBLE = b"\0\5\x16\7"  # what a Mac leaves beside each file on foreign disks, "._" before the same name
HU_TYPES = ("", "HU", "US", "HU_MOD")  # of RescaleType; US is unspecified: then the values are checked
LOSSY = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81"}
INSTALL = {
    "1.2.840.10008.1.2.4.90": "pip install pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.91": "pip install pylibjpeg pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.80": "pip install pyjpegls",
    "1.2.840.10008.1.2.4.81": "pip install pyjpegls",
}
HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID",
    "Modality", "ImageType", "SeriesNumber", "InstanceNumber", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsStored", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "LossyImageCompression",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "TemporalPositionIdentifier", "AcquisitionNumber", "TriggerTime", "EchoTime",
    "DiffusionBValue", "NominalPercentageOfCardiacPhase", "AcquisitionTime",
]  # fmt: skip
_pydicom_lock = threading.RLock()  # warning filters and pydicom's log level belong to the process


@contextlib.contextmanager
def _quiet():
    """Silences pydicom's warnings and logs, which quote tag values."""
    log = logging.getLogger("pydicom")
    with _pydicom_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level, shown = log.level, sitk.ProcessObject.GetGlobalWarningDisplay()
        log.setLevel(logging.CRITICAL + 1)
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            yield
        finally:
            log.setLevel(level)
            sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def open_dicom(path: Path, options: ReadOptions, findings: Findings) -> ScanHeader:
    """One series in a folder, or one multi-frame file."""
    if pydicom is None:
        raise ImportError("reading DICOM needs pydicom: pip install pydicom pylibjpeg pylibjpeg-openjpeg")
    with _quiet():
        files = _choose_series(_headers(path, findings), options.series, findings)
        slices = one_phase(_slices(files, findings), options.frame, findings)
        affine, depth, heights = place_stack(slices, options.gaps, findings)
        rows, columns = slices[0].shape
        check_shape((columns, rows, len(slices)), options.max_voxels)
        _check_photometric(files, options.monochrome1, findings)
        invert = options.monochrome1 == "invert" and _is_monochrome1(files)
        modality = str(files[0][1].get("Modality", "") or "")
    geometry = Geometry.from_affine((columns, rows, depth), affine)

    def read(progress=None) -> "sitk.Image":
        with _quiet():
            voxels = _voxels(slices, invert=invert)
        return geometry.image(voxels if heights is None else interpolate(voxels, heights, depth))

    return ScanHeader(geometry, read, modality if modality in MODALITIES or not modality else "OT")


# === Which files, which series =======================================================================================


def _headers(path: Path, findings: Findings) -> list:
    """[(path, dataset without voxels)] of every image in a folder; other files are counted, damaged ones refused."""
    files = sorted(p for p in path.iterdir() if not p.is_dir()) if path.is_dir() else [path]
    folder, headers, others = path.resolve(), [], 0
    for file in files:
        if file.is_symlink() and not file.exists():
            raise VolumeError(
                VolumeFault.NO_SUCH_FILE,
                "The folder holds a link to a file that does not exist: a slice may be missing. Repair or remove it.",
            )
        if file.is_symlink() and path.is_dir() and folder not in file.resolve().parents:
            raise VolumeError(
                VolumeFault.LINK_LEAVES_FOLDER,
                "The folder holds a link to a file outside it. Copy the slices themselves into the folder.",
            )
        dataset = _header(file) if file.is_file() else None  # opening a pipe would wait for ever
        if dataset is None:
            others += 1
        else:
            headers.append((file, dataset))
    if not headers:
        raise VolumeError(
            VolumeFault.NON_IMAGING_DICOM_FILES if others else VolumeFault.NOT_A_SCAN,
            f"No DICOM image was found among {len(files)} files. Give the folder that holds the slices "
            "themselves; sub-folders are not searched.",
        )
    if others:
        findings.warn(
            VolumeFault.NON_IMAGING_DICOM_FILES,
            f"{others} of {len(files)} files are no DICOM images (reports, indexes, notes) and were left out.",
        )
    return headers


def _header(file: Path):
    with open(file, "rb") as stream:
        head = stream.read(512)
    if head[:4] == APPLE_DOUBLE:
        return None
    bare = head[:2] == b"\x08\0" and head[4:6].isalpha()  # old files have no preamble: group 0008, explicit VR
    if head[128:132] != b"DICM" and not bare:
        if file.suffix.lower() in SUFFIXES or DICOM_ROOT in head:
            raise damaged("a slice of the series does not begin as DICOM does")
        return None
    try:
        dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=HEADER_TAGS, force=bare)
        kinds = [pydicom.uid.UID(str(d.get(name, "") or "")) for d, name in _classes(dataset)]
        for _ in dataset.iterall():  # pydicom decodes on access: a damaged value must fail here
            pass
        if "Rows" in dataset and "Columns" in dataset:
            for name in ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames"):
                int(dataset.get(name) or 1)
            return dataset
    except PARSE_ERRORS:
        raise damaged("the header of a slice cannot be read") from None
    if any(k.startswith(CT_MR_CLASSES) for k in kinds) or not any(k and k.name != str(k) for k in kinds):
        raise damaged("the header of a slice ends too early")
    return None


def _classes(dataset):
    """The two places that name the class of a file's object: a damaged slice must not pass for a report."""
    return (dataset, "SOPClassUID"), (dataset.file_meta, "MediaStorageSOPClassUID")


def _choose_series(headers: list, series, findings: Findings) -> list:
    groups = defaultdict(list)
    for file, dataset in headers:
        key = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID", "FrameOfReferenceUID", "Modality")
        groups[tuple(str(dataset.get(k, "") or "") for k in key)].append((file, dataset))
    ordered = sorted(groups.items(), key=lambda item: (_number(item[1][0][1].get("SeriesNumber")), item[0]))
    if series is not None:
        return _named_series(ordered, series)
    volumes = [group for _, group in ordered if _is_volume(group)]
    strays = [group for _, group in ordered if volumes and not _is_volume(group) and not _is_aside(group)]
    if len(volumes) > 1 or strays or not volumes and len(ordered) > 1:
        raise VolumeError(
            VolumeFault.SEVERAL_SERIES,
            f"The folder holds {len(ordered)} series: {_listing(ordered)}. Choose one with series=1 ... "
            f"series={len(ordered)}.",
        )
    if volumes and len(ordered) > 1:
        findings.warn(
            VolumeFault.TOO_FEW_SLICES,
            f"{len(ordered) - 1} localisers or screenshots beside the series were left out.",
        )
    return volumes[0] if volumes else ordered[0][1]


def _named_series(ordered: list, series) -> list:
    for number, (key, group) in enumerate(ordered, start=1):
        if series == number or series == key[0] != "":
            return group
    raise VolumeError(
        VolumeFault.SEVERAL_SERIES, f"series= matches none of the {len(ordered)} series: {_listing(ordered)}."
    )


def _listing(ordered: list) -> str:
    lines = []
    for number, (key, group) in enumerate(ordered, start=1):
        modality = key[-1] if key[-1] in MODALITIES else "other"
        dataset = group[0][1]
        lines.append(f"{number}: {modality}, {_frames(group)} slices of {dataset.Rows} x {dataset.Columns}")
    return "; ".join(lines)


def _number(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("inf")


def _frames(group: list) -> int:
    return sum(int(_number(d.get("NumberOfFrames") or 1)) for _, d in group)


def _is_volume(group: list) -> bool:
    return _frames(group) >= 4 and not _is_localiser(group[0][1])


def _is_aside(group: list) -> bool:
    """Whether a group may be left out: a localiser or a screenshot. Any other lone slice may belong to the series,
    with a damaged tag."""
    dataset = group[0][1]
    return _is_localiser(dataset) or str(dataset.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE)


def _is_localiser(dataset) -> bool:
    return "LOCALIZER" in str(dataset.get("ImageType")).upper()


# === Where every slice lies ==========================================================================================


def _slices(headers: list, findings: Findings) -> list[Slice]:
    slices = []
    try:
        for file, dataset in headers:
            if "PerFrameFunctionalGroupsSequence" in dataset:
                slices += _frame_slices(file, dataset)
            elif int(dataset.get("NumberOfFrames") or 1) > 1:
                raise VolumeError(
                    VolumeFault.NO_GEOMETRY,
                    "A multi-frame file without functional groups does not tell where its frames lie. Export the "
                    "series as Enhanced or as single slices.",
                )
            else:
                slices.append(_slice(file, None, [dataset], dataset))
    except PARSE_ERRORS as error:
        if isinstance(error, VolumeError):
            raise
        raise damaged("a position, orientation or scale in a slice's header is no number") from None
    if any(s.frame is not None for s in slices):
        findings.note(VolumeFault.MULTIFRAME, "Enhanced multi-frame: geometry by frame from the functional groups.")
    if len({(s.slope, s.intercept) for s in slices}) > 1:
        findings.note(VolumeFault.SLOPE_VARIES, "Slope and intercept differ between slices; applied slice by slice.")
    if len({s.unscaled for s in slices}) > 1:
        raise VolumeError(
            VolumeFault.INCONSISTENT_SLICES,
            "Some slices have a slope and an intercept and others lack one, so that one tissue has two numbers. Fetch "
            "the series again from its source.",
        )
    if len({s.shape for s in slices}) > 1:
        raise VolumeError(VolumeFault.INCONSISTENT_SLICES, "The slices of the series differ in rows or columns.")
    if max(np.abs(s.spacing - slices[0].spacing).max() for s in slices) > 1e-3 * slices[0].spacing.min():
        raise VolumeError(VolumeFault.INCONSISTENT_SLICES, "The slices of the series differ in pixel spacing.")
    if len({int(d.get("SamplesPerPixel") or 1) for _, d in headers} - {1}):
        raise VolumeError(VolumeFault.NOT_SCALAR, "The slices are in colour; a scan has one number a voxel.")
    return slices


def _frame_slices(file: Path, dataset) -> list[Slice]:
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    frames = dataset.PerFrameFunctionalGroupsSequence
    if len(frames) != int(dataset.get("NumberOfFrames") or 1):
        raise VolumeError(
            VolumeFault.HEADER_LIES, "The multi-frame header describes another number of frames than it declares."
        )
    return [_slice(file, i, [_flat(frame), _flat(shared)], dataset) for i, frame in enumerate(frames)]


def _flat(group):
    """The macros of one functional group as one dataset."""
    flat = pydicom.Dataset()
    for element in group:
        if element.VR == "SQ" and len(element.value):
            flat.update(element.value[0])
    return flat


def _slice(file: Path, frame: int | None, groups: list, dataset) -> Slice:
    def get(name):
        return next((g[name].value for g in groups if name in g and g[name].value is not None), None)

    position, orientation = get("ImagePositionPatient"), get("ImageOrientationPatient")
    spacing = get("PixelSpacing")
    for value, length in ((position, 3), (orientation, 6), (spacing, 2)):
        if value is None or len(np.atleast_1d(value)) != length:
            raise VolumeError(
                VolumeFault.NO_GEOMETRY,
                "A slice does not tell where it lies (position, orientation or pixel spacing is missing). Export "
                "the series again from its source.",
            )
    slope, intercept = get("RescaleSlope"), get("RescaleIntercept")
    _check_scale(dataset, get("RescaleType"), get("ModalityLUTSequence"))
    phases = {}
    for name in PHASE_TAGS:
        value = get(name) if get(name) is not None else dataset.get(name)
        if value is not None:
            phases[name] = str(value) if name in ("StackID", "AcquisitionTime") else _number(value)
    return Slice(
        file, frame, np.array(position, dtype=float), np.array(orientation, dtype=float), np.array(spacing,
        dtype=float), (int(dataset.Rows), int(dataset.Columns)), 1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept), (slope is None, intercept is None), phases,
    )  # fmt: skip


def _check_scale(dataset, kind, table) -> None:
    if table:
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


# === Voxels ==========================================================================================================


def _is_monochrome1(headers: list) -> bool:
    return any(str(d.get("PhotometricInterpretation", "")).strip() == "MONOCHROME1" for _, d in headers)


def _check_photometric(headers: list, monochrome1: str, findings: Findings) -> None:
    kinds = {str(d.get("PhotometricInterpretation", "") or "MONOCHROME2").strip() for _, d in headers}
    if not kinds <= {"MONOCHROME1", "MONOCHROME2"}:
        raise VolumeError(
            VolumeFault.NOT_SCALAR, "The slices are in colour or indexed; a scan has one number a voxel."
        )
    if len(kinds) > 1:
        raise VolumeError(VolumeFault.INCONSISTENT_SLICES, "Some slices are MONOCHROME1, others MONOCHROME2.")
    if "MONOCHROME1" in kinds:
        if monochrome1 == "refuse":
            raise VolumeError(
                VolumeFault.MONOCHROME1,
                "The series is MONOCHROME1. By the standard its numbers are right and only the display is inverted, "
                'but some writers invert the numbers: pass monochrome1="as_stored" or "invert".',
            )
        findings.warn(VolumeFault.MONOCHROME1, f"MONOCHROME1, read {monochrome1.replace('_', ' ')}.")
    lossy = any(str(d.get("LossyImageCompression", "") or "") == "01" for _, d in headers)
    if lossy or any(str(d.file_meta.get("TransferSyntaxUID", "")) in LOSSY for _, d in headers):
        findings.warn(VolumeFault.LOSSY_COMPRESSION, "The slices went through lossy compression: HU are approximate.")


def _voxels(slices: list[Slice], *, invert: bool) -> np.ndarray:
    """(slices, rows, columns) in the smallest of int16, int32 and float32 that holds every slice."""
    rows, columns = slices[0].shape
    volume = np.empty((len(slices), rows, columns), np.int16)
    files = defaultdict(list)
    for k, item in enumerate(slices):
        files[item.path].append((k, item))
    with ThreadPoolExecutor(max_workers=4) as pool:  # in order, so that few decoded slices wait
        for (_, items), (frames, top) in zip(files.items(), pool.map(_decode, files), strict=True):
            for k, item in items:
                if frames.shape[1:] != (rows, columns) or (item.frame or 0) >= len(frames):
                    raise VolumeError(VolumeFault.HEADER_LIES, "A slice's number of voxels is not that of its header.")
                plane = frames[item.frame or 0]
                if top is None and (invert or item.frame is not None):
                    raise _no_decoder(item.path)  # GDCM's values are rescaled already, by GDCM's rules
                if invert:
                    plane = top - plane.astype(np.int32)
                plane = plane if top is None else rescale(plane, item.slope, item.intercept)
                volume = _fitting(volume, plane)
                volume[k] = plane
    return volume


def _fitting(volume: np.ndarray, plane: np.ndarray) -> np.ndarray:
    if plane.dtype.kind == "f":
        return volume.astype(np.float32, copy=False)
    info = np.iinfo(volume.dtype) if volume.dtype.kind == "i" else None
    if info is not None and (plane.min() < info.min or plane.max() > info.max):
        return volume.astype(np.int32)
    return volume


def _decode(path: Path):
    """(frames, rows, columns) of one file, and the sum of a stored value and its inverse; None if rescaled already."""
    try:
        dataset = pydicom.dcmread(path, force=True)
        if dataset.preamble is None and "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian  # as `_header` found
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.is_compressed or get_decoder(syntax).is_available:
            array = pixel_array(dataset, raw=True)
            top = -1 if int(dataset.PixelRepresentation) else 2 ** int(dataset.BitsStored) - 1
            return array.reshape(-1, *array.shape[-2:]), top
    except DECODE_ERRORS:
        raise damaged("the voxels of a slice cannot be decoded") from None
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError:  # its message holds the path
        raise _no_decoder(path) from None
    return array.reshape(-1, *array.shape[-2:]), None


def _no_decoder(path: Path) -> VolumeError:
    syntax = pydicom.dcmread(path, stop_before_pixels=True, force=True).file_meta.TransferSyntaxUID
    name = syntax.name if syntax.name != str(syntax) else "an unknown transfer syntax"
    return VolumeError(
        VolumeFault.MISSING_DECODER,
        f"There is no decoder here for {name}: {INSTALL.get(str(syntax), 'pip install pylibjpeg[all]')}. If that does "
        "not help, the slice is damaged.",
    )
