"""A DICOM series, classic or Enhanced multi-frame, as one image; what cannot be one regular volume is refused.

All headers are read first, without voxels, and placed by scan_stack_photon.py. Voxels are then decoded slice by slice
into one array: by pydicom where they are raw, JPEG 2000 or JPEG-LS, otherwise by the GDCM inside SimpleITK.
"""

import contextlib
import logging
import struct
import tempfile
import threading
import warnings
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .scan_faults_photon import Findings, VolumeError, VolumeFault
from .scan_files_photon import (
    ReadOptions,
    ScanHeader,
    check_shape,
    damaged,
    jpeg_is_consistent,
    rescale,
    rle_is_consistent,
)
from .scan_grid_photon import Geometry, interpolate_slices
from .scan_stack_photon import FRAME_TAGS, Slice, localisers, number_of, one_frame, place_stack, slices_of

try:
    import pydicom
    from pydicom.encaps import generate_frames
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
MODALITIES = set(
    "AR AU BDUS BI BMD CR CT CTPROTOCOL DG DMS DOC DX ECG EPS ES FID GM HC HD IO IOL IVOCT IVUS KER KO LEN LS MG MR "
    "NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS OT PA PLAN PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTINTENT RTPLAN "
    "RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SC SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XAPROTOCOL XC".split()
)
NO_SCANS = {"SEG", "RTDOSE", "RTIMAGE", "PR", "REG", "RTSTRUCT", "RTPLAN"}  # made from scans, and left out beside them
SCAN_CLASSES = {
    "CT Image Storage", "Enhanced CT Image Storage", "Legacy Converted Enhanced CT Image Storage", "MR Image Storage",
    "Enhanced MR Image Storage", "Legacy Converted Enhanced MR Image Storage",
}  # fmt: skip
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DICOM_ROOT = b"1.2.840.10008"  # every transfer syntax and object class begins so
APPLE_DOUBLE = b"\0\5\x16\7"  # what a Mac leaves beside each file on foreign disks, "._" before the same name
CONTROLS = bytes(set(range(32)) - {9, 10, 12, 13, 27}) + b"\x7f"  # no text holds them
LOSSY = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81"}
JPEG_LOSSLESS = {"1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"}
RLE = "1.2.840.10008.1.2.5"
GDCM_FIRST = JPEG_LOSSLESS | {  # pydicom has no decoder, or one that accepts damaged streams
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", RLE,
}  # fmt: skip
GDCM_SYNTAXES = GDCM_FIRST | {f"1.2.840.10008.1.2.4.{number}" for number in (80, 81, 90, 91)}
HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID",
    "Modality", "ImageType", "SeriesNumber", "InstanceNumber", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsStored", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "LossyImageCompression",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "SliceThickness", *FRAME_TAGS,
    0x00190010, 0x0019100C, 0x00430010, 0x00431039,  # b-values of Siemens and GE
]  # fmt: skip
UNKNOWN_MODALITY = "unknown"  # a term that is not DICOM's
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
        modality = str(files[0][1].get("Modality", "") or "")
        slices = one_frame(_slices(files, findings), options.frame, modality, findings)
        affine, depth, heights = place_stack(slices, options.gaps, findings)
        rows, columns = slices[0].shape
        check_shape((columns, rows, depth), options.max_voxels)
        _check_photometric(files, options.monochrome1, findings)
        invert = options.monochrome1 == "invert" and _is_monochrome1(files)
    geometry = Geometry.from_affine((columns, rows, depth), affine)

    def read(progress=None) -> "sitk.Image":
        with _quiet():
            voxels = _voxels(slices, invert=invert)
        return geometry.image(voxels if heights is None else interpolate_slices(voxels, heights, depth))

    return ScanHeader(geometry, read, modality if modality in MODALITIES or not modality else UNKNOWN_MODALITY)


# === Which files, which series =======================================================================================


def _headers(path: Path, findings: Findings) -> list:
    """[(path, dataset without voxels)] of every image in a folder; other files are counted, damaged ones refused."""
    files = sorted(p for p in path.iterdir() if not p.is_dir()) if path.is_dir() else [path]
    folder, headers, others, unknown = path.resolve(), [], Counter(), []
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
        header = _header(file) if file.is_file() else "other"  # opening a pipe would wait for ever
        if isinstance(header, str):
            others[header] += 1
            unknown += [file] if header == "other" and file.is_file() else []
        else:
            headers.append((file, header))
    sizes = defaultdict(list)
    for file, _ in headers if unknown else ():
        sizes[file.suffix].append(file.stat().st_size)
    if any(len(sizes[f.suffix]) > 2 and f.stat().st_size >= 0.5 * min(sizes[f.suffix]) for f in unknown):
        raise damaged("a file named as the slices of the series does not begin as DICOM does")
    listed = ", ".join(f"{number} {kind}" for kind, number in sorted(others.items()))
    if not headers:
        raise VolumeError(
            VolumeFault.NON_IMAGING_DICOM_FILES if others else VolumeFault.NOT_A_SCAN,
            f"No DICOM image was found among {len(files)} files ({listed or 'none'}). Give the folder that holds the "
            "slices themselves; sub-folders are not searched.",
        )
    if others:
        findings.warn(
            VolumeFault.NON_IMAGING_DICOM_FILES,
            f"{others.total()} of {len(files)} files are no DICOM images and were left out: {listed}.",
        )
    return headers


def _header(file: Path):
    """The dataset of an image without its voxels, or what kind of file it is instead."""
    with open(file, "rb") as stream:
        head = stream.read(512)
    if head[:4] == APPLE_DOUBLE:
        return "note of a Mac"
    bare = head[:2] == b"\x08\0" and head[4:6].isalpha()  # old files have no preamble: group 0008, explicit VR
    if head[128:132] != b"DICM" and not bare:
        text = len(head) == len(head.translate(None, CONTROLS))
        if file.suffix.lower() in SUFFIXES or DICOM_ROOT in head and not text:
            raise damaged("a slice of the series does not begin as DICOM does")
        return "text" if text and head else "other"
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
    names = {kind.name for kind in kinds if kind and kind.name != str(kind)}
    vendor = kinds[0] == kinds[1] and kinds[0].is_valid and not kinds[0].startswith(DICOM_ROOT.decode())
    if names & SCAN_CLASSES or not names and not vendor:
        raise damaged("the header of a slice ends too early")
    return sorted(names)[0] if names else "vendor's DICOM object"


def _classes(dataset):
    """The two places that name the class of a file's object: a damaged slice must not pass for a report."""
    return (dataset, "SOPClassUID"), (dataset.file_meta, "MediaStorageSOPClassUID")


def _choose_series(headers: list, series, findings: Findings) -> list:
    """The slices of one series. Localisers count as a series by themselves, also where they share its UID."""
    groups, scouts = defaultdict(list), localisers(headers)
    for file, dataset in headers:
        key = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID", "FrameOfReferenceUID", "Modality")
        key = tuple(str(dataset.get(k, "") or "") for k in key)
        groups[(*key, file in scouts)].append((file, dataset))
    ordered = sorted(groups.items(), key=lambda item: (number_of(item[1][0][1].get("SeriesNumber")), item[0]))
    if series is not None:
        return _named_series(ordered, series)
    volumes = [group for key, group in ordered if _is_volume(key, group)]
    others = [group for key, group in ordered if not _is_volume(key, group)]
    strays = [group for key, group in ordered if volumes and not _is_volume(key, group) and not _is_aside(key, group)]
    if len(volumes) > 1 or strays or not volumes and len(ordered) > 1:
        raise VolumeError(
            VolumeFault.SEVERAL_SERIES,
            f"The folder holds {len(ordered)} series: {_listing(ordered)}. Choose one with series=1 ... "
            f"series={len(ordered)}.",
        )
    if volumes and others:
        findings.warn(
            VolumeFault.TOO_FEW_SLICES,
            f"{sum(map(_frames, others))} localisers, screenshots or images made from the series were left out.",
        )
    return volumes[0] if volumes else ordered[0][1]


def _named_series(ordered: list, series) -> list:
    named = [item for number, item in enumerate(ordered, start=1) if series in (number, item[0][0] or None)]
    if not named:
        raise VolumeError(
            VolumeFault.SEVERAL_SERIES, f"series= matches none of the {len(ordered)} series: {_listing(ordered)}."
        )
    return next((group for key, group in named if _is_volume(key, group)), named[0][1])


def _listing(ordered: list) -> str:
    lines = []
    for number, (key, group) in enumerate(ordered, start=1):
        modality, dataset = key[4] if key[4] in MODALITIES else "other", group[0][1]
        kind = f"{modality} localiser" if key[5] else modality
        lines.append(f"{number}: {kind}, {_frames(group)} slices of {dataset.Rows} x {dataset.Columns}")
    return "; ".join(lines)


def _frames(group: list) -> int:
    return sum(int(number_of(d.get("NumberOfFrames") or 1)) for _, d in group)


def _is_volume(key: tuple, group: list) -> bool:
    slices = _frames(group) * (16 if "MOSAIC" in str(group[0][1].get("ImageType")).upper() else 1)
    return slices >= 4 and not key[5] and key[4] not in NO_SCANS


def _is_aside(key: tuple, group: list) -> bool:
    """Whether a group may be left out. Any other lone slice may belong to the series, with a damaged tag."""
    capture = str(group[0][1].get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE)
    return key[5] or key[4] in NO_SCANS or capture


def _slices(headers: list, findings: Findings) -> list[Slice]:
    """Every slice of the series with its place, after checks that they are of one kind."""
    try:
        slices = [item for file, dataset in headers for item in slices_of(file, dataset)]
    except PARSE_ERRORS as error:
        if isinstance(error, VolumeError):
            raise
        raise damaged("a position, orientation or scale in a slice's header is no number") from None
    if any(s.frame is not None and not s.tiles for s in slices):
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
                planes = _tiles(frames, item) if item.tiles else frames
                if planes.shape[1:] != (rows, columns) or (item.frame or 0) >= len(planes):
                    raise VolumeError(VolumeFault.HEADER_LIES, "A slice's number of voxels is not that of its header.")
                plane = planes[item.frame or 0]
                plane = rescale(top - plane.astype(np.int32) if invert else plane, item.slope, item.intercept)
                volume = _fitting(volume, plane)
                volume[k] = plane
    return volume


def _tiles(frames: np.ndarray, item: Slice) -> np.ndarray:
    """The tiles of a mosaic, one after the other."""
    (rows, columns), n = item.shape, item.tiles
    if frames.shape != (1, rows * n, columns * n):
        return frames
    return frames.reshape(n, rows, n, columns).transpose(0, 2, 1, 3).reshape(n * n, rows, columns)


def _fitting(volume: np.ndarray, plane: np.ndarray) -> np.ndarray:
    if plane.dtype.kind == "f":
        return volume.astype(np.float32, copy=False)
    info = np.iinfo(volume.dtype) if volume.dtype.kind == "i" else None
    if info is not None and (plane.min() < info.min or plane.max() > info.max):
        return volume.astype(np.int32)
    return volume


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """(stored values (frames, rows, columns) of one file, the sum of a stored value and its inverse)."""
    try:
        dataset = pydicom.dcmread(path, force=True)
        if dataset.preamble is None and "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian  # as `_header` found
        syntax = dataset.file_meta.TransferSyntaxUID
        top = -1 if int(dataset.PixelRepresentation) else 2 ** int(dataset.BitsStored) - 1
        _check_end(path, dataset)
        plugins = _plugins(syntax)
        if not syntax.is_compressed or plugins and syntax not in GDCM_FIRST:
            array = pixel_array(dataset, raw=True, decoding_plugin="pylibjpeg" if "pylibjpeg" in plugins else "")
        elif syntax in GDCM_SYNTAXES:
            array = _decode_by_gdcm(dataset)
        else:
            raise _no_decoder(syntax)
        return array.reshape(-1, *array.shape[-2:]), top
    except VolumeError:
        raise
    except DECODE_ERRORS:
        raise damaged("the voxels of a slice cannot be decoded") from None


def _check_end(path: Path, dataset) -> None:
    """Refuses bytes after raw voxels that are no padding: inserted bytes shift the voxels behind them."""
    element = dataset.get_item(0x7FE00010)  # raw, as long as nobody asked for its value
    begin = getattr(element, "value_tell", None)
    if begin is None or element.length == 0xFFFFFFFF or {0xFFFCFFFC, 0xFFFAFFFA} & set(dataset.keys()):
        return
    with open(path, "rb") as stream:
        stream.seek(begin + element.length)
        if any(stream.read(1 << 16)):
            raise damaged("bytes follow the voxels of a slice, which may be shifted")


def _plugins(syntax) -> tuple:
    """pydicom's decoders of a transfer syntax that are installed."""
    try:
        decoder = get_decoder(syntax) if syntax.is_compressed else None
    except NotImplementedError:
        return ()
    return decoder.available_plugins if decoder is not None and decoder.is_available else ()


def _decode_by_gdcm(dataset) -> np.ndarray:
    """Stored values, from a temporary file that holds the packed voxels and nothing of the patient.

    Given the whole file, GDCM would rescale the values and invert MONOCHROME1 by its rules.
    """
    frames, bare = int(dataset.get("NumberOfFrames") or 1), pydicom.Dataset()
    for name in ("Rows", "Columns", "BitsAllocated", "SamplesPerPixel"):
        setattr(bare, name, getattr(dataset, name))
    bare.BitsStored, bare.HighBit, bare.PixelRepresentation = bare.BitsAllocated, bare.BitsAllocated - 1, 0
    bare.SOPClassUID, bare.SOPInstanceUID = f"{SECONDARY_CAPTURE}.3", "2.25.1"
    bare.PhotometricInterpretation, bare.NumberOfFrames, bare.PixelData = "MONOCHROME2", frames, dataset.PixelData
    bare["PixelData"].VR, bare["PixelData"].is_undefined_length = "OB", True
    bare.file_meta = pydicom.dataset.FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = syntax = dataset.file_meta.TransferSyntaxUID
    bare.file_meta.MediaStorageSOPClassUID, bare.file_meta.MediaStorageSOPInstanceUID = bare.SOPClassUID, "2.25.1"
    with tempfile.TemporaryDirectory() as folder:
        bare.save_as(f"{folder}/voxels.dcm", enforce_file_format=True)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(f"{folder}/voxels.dcm")
        array = sitk.GetArrayFromImage(reader.Execute())
    array = array.reshape(frames, int(dataset.Rows), int(dataset.Columns))
    check = jpeg_is_consistent if syntax in JPEG_LOSSLESS else rle_is_consistent if syntax == RLE else None
    streams = generate_frames(dataset.PixelData, number_of_frames=frames) if check else ()
    if not all(check(stream, plane) for stream, plane in zip(streams, array, strict=False)):
        raise damaged("the compressed voxels of a slice hold more or fewer values than a slice has")
    return _of_stored_bits(array, int(dataset.BitsStored), int(dataset.HighBit), int(dataset.PixelRepresentation))


def _of_stored_bits(array: np.ndarray, stored: int, high: int, signed: int) -> np.ndarray:
    """The bits that hold the value, with its sign."""
    array = array >> (high + 1 - stored) & (1 << stored) - 1
    if not signed:
        return array
    return (array.astype(np.int32) ^ 1 << (stored - 1)) - (1 << (stored - 1))


def _no_decoder(syntax) -> VolumeError:
    name = syntax.name if syntax.name != str(syntax) else "an unknown transfer syntax"
    return VolumeError(
        VolumeFault.MISSING_DECODER,
        f"There is no decoder here for {name}. Try pip install pylibjpeg pylibjpeg-openjpeg, or convert the series to "
        "an uncompressed transfer syntax.",
    )
