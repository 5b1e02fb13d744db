"""Any scan as the model sees it. A scan passes six stages, each one function:

    source -> header      open_scan         format by content, size and place of the voxels; nothing large is read
    header -> geometry    check_geometry    shear and obliqueness of the axes; `header.geometry` is in LPS, mm
    geometry -> voxels    read_voxels       SimpleITK image with rescaled values (HU for CT), all of them finite
    voxels -> grid        resample          one interpolation onto `model_grid` (scan_grid_photon.py)
    grid -> tensor        scale_intensity   the `intensity_window` becomes [0, 1] (scan_intensity_photon.py)

`read_volume` stops at the voxels, `read_on_grid` goes to the tensor:

    image = read_volume("scan.nii.gz")
    x, scan, grid = read_on_grid("scan.nii.gz", size=(140, 280, 280), spacing=(2.6, 1.3, 1.3))

The release does it in six steps and two interpolations (orient to RAI, resample to 1 mm, crop or pad to 364^3, clip,
resize, flip). Together they are one affine map, so here they are one interpolation, from the scan's voxels.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy as np

from .scan_dicom_photon import MODALITY_TAG, open_dicom
from .scan_faults_photon import Findings, VolumeError, VolumeFault, VolumeWarning
from .scan_files_photon import (
    INFLATE_ERRORS,
    RAS_TO_LPS,
    SUFFIXES,
    ReadOptions,
    ScanHeader,
    as_scalar,
    damaged,
    rescale,
    select_frame,
    sniff,
)
from .scan_grid_photon import Geometry, SlabInterpolation, interpolate_linear, model_grid, resample
from .scan_intensity_photon import intensity_window, scale_in_place, value_range
from .scan_nifti_photon import nifti_affine, nifti_unit, open_nifti
from .scan_nrrd_photon import open_meta, open_nrrd

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None
try:
    import nibabel as nib
except ImportError:
    nib = None

__all__ = ["Geometry", "ReadOptions", "VolumeError", "VolumeFault", "VolumeWarning"]
__all__ += ["model_grid", "read_ahead", "read_on_grid", "read_volume", "resample"]

MIN_ANGLE = 0.1  # degrees: less is the rounding of a header
SCAN_SUFFIXES = {".nii", ".nii.gz", ".gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".png", ".jpg", ".txt", ".zip"}
NO_SERIES = "series= chooses among the series of a DICOM folder, and this source holds one scan. Leave it out."


def read_volume(source, **options) -> "sitk.Image":
    """Any scan as a 3D scalar SimpleITK image: LPS world, mm, rescaled values (HU for CT), integers where stored so.

    Args:
        source: path of a .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd file or of a multi-frame DICOM file; folder of one
            DICOM series; SimpleITK image; nibabel image; or (array, affine) with the array in [i, j, k] and the 4 x 4
            affine from voxel to RAS+ mm, as in nibabel, MONAI and TorchIO.
        options: fields of `ReadOptions`: series, frame, max_voxels, tilt, gaps, monochrome1, fill_nonfinite.

    The only metadata of the result is the modality, where DICOM gives it. Raises VolumeError, warns VolumeWarning.
    """
    options, findings = ReadOptions(**options), Findings()
    with system_errors():
        header = open_scan(source, options, findings)
        check_geometry(header.geometry, options, findings)
        image, _ = read_voxels(header, options, findings)
    findings.announce()
    return image


def read_on_grid(
    source,
    *,
    size=(140, 280, 280),
    spacing=(2.6, 1.3, 1.3),
    orientation: str = "LAI",
    modality: str = "auto",
    window=(-1000.0, 1000.0),
    percentiles=(0.5, 99.5),
    assume_hu: bool = False,
    scaling: str = "window",
    **options,
) -> tuple[np.ndarray, Geometry, Geometry]:
    """(float32 (D, H, W) in [0, 1], the scan's geometry, the grid): a scan as the model sees it.

    Equal to the bit to `read_volume`, `model_grid`, `intensity_window`, `resample` and `scale_intensity` one after the
    other; the arguments are theirs. It is faster, because slabs of a NIfTI file are interpolated while the rest is
    being inflated, with the window of a CT. If the scan proves to be none, they are interpolated again.
    """
    options, findings = ReadOptions(**options), Findings()
    with system_errors():
        header = open_scan(source, options, findings)
        check_geometry(header.geometry, options, findings)
        grid = model_grid(header.geometry, size, spacing, orientation)
        ct_window = float(window[0]), float(window[1])
        slabs = SlabInterpolation(grid, window=ct_window, outside=ct_window[0])
        image, values = read_voxels(header, options, findings, None if modality == "mr" else _interpolate_with(slabs))
    findings.announce()
    final_window = intensity_window(
        image, modality=modality, window=window, percentiles=percentiles, assume_hu=assume_hu, values=values
    )
    if slabs.complete and slabs.image is image and final_window == ct_window:
        array = slabs.out
    else:
        array = interpolate_linear(image, grid, window=final_window, outside=final_window[0])
    return scale_in_place(array, final_window, scaling), header.geometry, grid


def _interpolate_with(slabs: SlabInterpolation):
    """A `progress` function for `ScanHeader.read`: interpolates, and leaves one core to inflating until its end."""

    def progress(image, slices: int) -> None:
        last = slices == image.GetSize()[2]
        cores = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
        slabs.advance(image, slices, threads=None if last else max(1, cores - 1))

    return progress


def read_ahead(sources, prepare, *, ahead: int = 2):
    """Yields `prepare(source)` in order, while the next `ahead` sources are prepared in threads.

    Reading scans then costs no time while the model computes: inflating, decoding and resampling hold no interpreter
    lock. An error is raised at the place of its source. Memory: up to `ahead` + 1 prepared scans.
    """
    with ThreadPoolExecutor(max_workers=max(1, ahead)) as pool:
        waiting = deque()
        try:
            for source in sources:
                waiting.append(pool.submit(prepare, source))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def system_errors():
    """Turns errors of the system, whose messages hold the path, into VolumeError."""
    try:
        yield
    except PermissionError:
        raise VolumeError(
            VolumeFault.NO_SUCH_FILE, "The file or folder may not be opened with this user's rights. Change them."
        ) from None
    except OSError as error:
        raise VolumeError(
            VolumeFault.NO_SUCH_FILE,
            f"The file or folder cannot be read ({error.strerror or 'no reason given'}). Check the path and the disk.",
        ) from None
    except MemoryError:
        raise VolumeError(
            VolumeFault.TOO_LARGE,
            "The scan does not fit into this machine's memory. Crop it, or use a larger machine.",
        ) from None


# === Source to header ================================================================================================


def open_scan(source, options: ReadOptions, findings: Findings) -> ScanHeader:
    """The header of any scan; warnings and notes go to `findings`."""
    if sitk is None:
        raise ImportError("reading scans needs SimpleITK: pip install SimpleITK")
    if isinstance(source, (str, PathLike)):
        if not str(source):
            raise VolumeError(VolumeFault.NO_SUCH_FILE, "The path is empty. Give a file or a folder.")
        return _open_path(Path(source), options, findings)
    if options.series is not None:
        raise ValueError(NO_SERIES)
    if isinstance(source, sitk.Image):
        return _open_sitk(source, options)
    if nib is not None and isinstance(source, nib.spatialimages.SpatialImage):
        return _open_nibabel(source, options, findings)
    if isinstance(source, (tuple, list)) and len(source) == 2:
        return _open_array(*source, options)
    raise TypeError(
        f"a path, a SimpleITK image, a nibabel image or (array, affine) was expected, got "
        f"{type(source).__name__}; an array alone has no geometry"
    )


def _open_path(path: Path, options: ReadOptions, findings: Findings) -> ScanHeader:
    suffix = "".join(s for s in path.suffixes[-2:] if s.lower() in (".gz", ".nii")) or path.suffix
    if path.is_dir():
        return open_dicom(path, options, findings)
    if not path.is_file():  # nor pipes and devices, which may have no end
        raise VolumeError(VolumeFault.NO_SUCH_FILE, "There is no such file or folder. Check the path.")
    kind = sniff(path)
    if kind == "numpy":
        raise VolumeError(
            VolumeFault.PICKLED_ARRAY,
            "A NumPy file has no geometry and may hold a pickle, which could run any code. Load it yourself with "
            "allow_pickle=False and pass (array, affine).",
        )
    if kind == "unknown":
        raise VolumeError(
            VolumeFault.NOT_A_SCAN,
            f"The content of this {suffix.lower() if suffix.lower() in SCAN_SUFFIXES else 'file'} is no scan. "
            "Expected: NIfTI, NRRD, MetaImage, or a folder with a DICOM series.",
        )
    name, others = str(path).lower(), tuple(s for k, group in SUFFIXES.items() if k != kind for s in group)
    if name.endswith(others) or kind != "dicom" and not name.endswith(SUFFIXES[kind]):
        findings.warn(VolumeFault.MISLABELLED_FILE, f"The content is {kind}, but the suffix is of another format.")
    if kind == "dicom":
        return open_dicom(path, options, findings)
    if options.series is not None:
        raise ValueError(NO_SERIES)
    opener = {"nifti": open_nifti, "nrrd": open_nrrd, "meta": open_meta}[kind]
    return opener(path, options, findings)


def _open_sitk(image, options: ReadOptions) -> ScanHeader:
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise VolumeError(VolumeFault.NOT_SCALAR, "The SimpleITK image has several numbers a voxel; a scan has one.")
    _, index = select_frame(image.GetSize(), options)
    if image.GetDimension() == 4:
        image = image[:, :, :, index]
    modality = image.GetMetaData(MODALITY_TAG) if image.HasMetaDataKey(MODALITY_TAG) else ""
    foreign = set(image.GetMetaDataKeys()) - {MODALITY_TAG}
    geometry = Geometry.of(image)

    def read(progress=None) -> "sitk.Image":
        if foreign or image.GetPixelID() in (sitk.sitkFloat64, sitk.sitkInt64, sitk.sitkUInt64):
            return geometry.image(as_scalar(sitk.GetArrayViewFromImage(image)))  # without the metadata
        return image

    return ScanHeader(geometry, read, modality)


def _open_nibabel(image, options: ReadOptions, findings: Findings) -> ScanHeader:
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    size, index = select_frame(shape, options)
    if image.affine is None:
        raise VolumeError(VolumeFault.NO_GEOMETRY, "The nibabel image has no affine. Give it one.")
    affine = np.array(image.affine, dtype=np.float64)
    if isinstance(image, nib.Nifti1Pair):
        stored = nifti_affine(image.header, findings)  # refuses a header without a place, warns of two that differ
        affine[:3] *= nifti_unit(image.header)
        affine = affine if affine[:3].any() else stored
    geometry = Geometry.from_affine(size, RAS_TO_LPS @ affine)
    part = ((slice(None),) * 3 + (index,) + (0,) * (len(image.shape) - 4))[: len(image.shape)]
    return ScanHeader(
        geometry, lambda progress=None: geometry.image(as_scalar(_nibabel_voxels(image.dataobj, part).transpose()))
    )


def _nibabel_voxels(data, part: tuple) -> np.ndarray:
    try:
        if nib.is_proxy(data) and len(data.shape) == 3 and getattr(data, "slope", None) is not None:
            return rescale(as_scalar(data.get_unscaled()), data.slope, data.inter)  # nibabel scales in float64
        return np.asanyarray(data[part])
    except INFLATE_ERRORS:
        raise damaged("it ends too early, or its checksum fails") from None


def _open_array(array, affine, options: ReadOptions) -> ScanHeader:
    array, affine = np.asarray(array), np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4):
        raise VolumeError(
            VolumeFault.NO_GEOMETRY, f"(array, affine) needs a 4 x 4 affine to RAS+ mm, got shape {affine.shape}."
        )
    size, index = select_frame(array.shape, options)
    geometry = Geometry.from_affine(size, RAS_TO_LPS @ affine)
    volume = array if array.ndim == 3 else array[..., index]
    return ScanHeader(geometry, lambda progress=None: geometry.image(as_scalar(volume.transpose())))


# === Header to geometry ==============================================================================================


def check_geometry(geometry: Geometry, options: ReadOptions, findings: Findings) -> None:
    """Warns of sheared axes, or refuses them; notes oblique ones."""
    shear = np.degrees(np.arcsin(np.clip(np.abs(geometry.axes.T @ geometry.axes - np.eye(3)).max(), 0, 1)))
    if shear >= MIN_ANGLE:
        tilted = any(f.fault == VolumeFault.GANTRY_TILT for f in findings)
        fault = VolumeFault.GANTRY_TILT if tilted else VolumeFault.SHEARED_AFFINE
        if options.tilt == "refuse":
            raise VolumeError(fault, f'The axes are {shear:.2f} degrees from square. tilt="resample" reads the scan.')
        if not tilted:
            findings.warn(fault, f"The axes are {shear:.2f} degrees from square; resampled through the full affine.")
    if geometry.oblique_degrees > MIN_ANGLE:
        findings.note(VolumeFault.OBLIQUE, f"The axes are {geometry.oblique_degrees:.1f} degrees off the patient's.")


# === Geometry to voxels ==============================================================================================


def read_voxels(
    header: ScanHeader, options: ReadOptions, findings: Findings, progress=None
) -> tuple["sitk.Image", tuple[float, float]]:
    """(image, (smallest, largest value)), without NaN and inf. progress: see `ScanHeader`."""
    image = header.read(progress)
    lo, hi = value_range(image)
    if not (np.isfinite(lo) and np.isfinite(hi)):
        array = sitk.GetArrayFromImage(image)
        bad, fill = ~np.isfinite(array), options.fill_nonfinite
        if fill is None:
            raise VolumeError(
                VolumeFault.NON_FINITE,
                f"{int(bad.sum())} of {bad.size} voxels are NaN or inf. Clean the scan, or give with fill_nonfinite "
                "the value that they stand for (air: -1000).",
            )
        findings.warn(VolumeFault.NON_FINITE, f"{int(bad.sum())} of {bad.size} voxels were NaN or inf, now {fill:g}.")
        array[bad] = fill
        image = header.geometry.image(array)
        lo, hi = value_range(image)
    if lo == hi:
        raise VolumeError(VolumeFault.CONSTANT_IMAGE, f"All voxels are {lo:g}: this is no scan. Check the export.")
    if header.modality and not image.HasMetaDataKey(MODALITY_TAG):
        image.SetMetaData(MODALITY_TAG, header.modality)
    return image, (lo, hi)
