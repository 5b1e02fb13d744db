"""A scan -> the model's grid: read, find the grid, interpolate once, scale.

    image = read_volume("scan.nii.gz")                                  # SimpleITK image, LPS world, mm, HU
    grid = model_grid(Geometry.of(image), size=(140, 280, 280), spacing=(2.6, 1.3, 1.3))
    window = intensity_window(image, modality="auto")                   # (lo, hi) in the scan's units
    x = resample(image, grid, window=window, outside=window[0])         # SimpleITK image on the grid
    x = scale_intensity(x, window=window)                               # float32 (D, H, W) in [0, 1]

or, the same to the bit but sooner, because slabs are interpolated while the rest is being inflated,

    x, scan, grid = read_on_grid("scan.nii.gz", size=(140, 280, 280), spacing=(2.6, 1.3, 1.3))

The release does it in six steps and two interpolations (orient to RAI, resample to 1 mm, crop or pad to 364^3, clip,
resize, flip); together they are one affine map, so here they are one interpolation, from the scan's own voxels.
Grids and interpolation are those of scan_grid_photon.py, windows and scaling those of scan_intensity_photon.py.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np

from .scan_dicom_photon import MODALITY_TAG, read_dicom
from .scan_faults_photon import Findings, VolumeError, VolumeFault, VolumeWarning
from .scan_files_photon import (
    INFLATE_ERRORS,
    RAS_TO_LPS,
    SUFFIXES,
    as_scalar,
    check_shape,
    choose_frame,
    damaged,
    read_itk,
    rescale,
    sniff,
    to_image,
)
from .scan_grid_photon import Geometry, LinearInterpolation, interpolate_linear, model_grid, resample
from .scan_intensity_photon import intensity_window, scale_in_place, value_range
from .scan_nifti_photon import nifti_affine, nifti_unit, read_nifti

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None
try:
    import nibabel as nib
except ImportError:
    nib = None

__all__ = ["Geometry", "VolumeError", "VolumeFault", "VolumeWarning"]
__all__ += ["model_grid", "read_ahead", "read_on_grid", "read_volume", "resample"]

MIN_ANGLE = 0.1  # degrees: less is the rounding of a header
NO_SERIES = (
    "series= chooses among the series of a DICOM folder, and this is no DICOM: it holds one scan. Leave it out."
)


# === Reading =========================================================================================================


def read_volume(
    source,
    *,
    series: int | str | None = None,
    frame: int | None = None,
    max_voxels: int = 2**31,
    tilt: str = "resample",
    gaps: str = "refuse",
    monochrome1: str = "refuse",
    fill_nonfinite: float | None = None,
) -> "sitk.Image":
    """Any scan as a 3D scalar SimpleITK image: LPS world, mm, rescaled values (HU for CT), integers where stored so.

    Args:
        source: path of a .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd file or of a multi-frame DICOM file; folder of one
            DICOM series; SimpleITK image; nibabel image; or (array, affine) with the array in [i, j, k] and the 4 x 4
            affine from voxel to RAS+ mm, as in nibabel, MONAI and TorchIO.
        series: which DICOM series of a folder: its number in the list that the error gives, or its SeriesInstanceUID.
        frame: which frame (time, phase, echo) of a 4D scan, from 0.
        max_voxels: more are refused from the header alone.
        tilt: "resample" (with a warning) or "refuse" a sheared scan.
        gaps: "refuse" or "interpolate" (with a warning) missing or unevenly spaced slices.
        monochrome1: "refuse", or what the stored values of a MONOCHROME1 series mean: "as_stored" or "invert".
        fill_nonfinite: value for NaN and inf, which are refused without it.

    The only metadata of the result is the modality, where DICOM tells it. Raises VolumeError, warns VolumeWarning.
    """
    options = {"series": series, "frame": frame, "max_voxels": max_voxels, "tilt": tilt, "gaps": gaps}
    findings = Findings()
    image, _ = load(source, findings, **options, monochrome1=monochrome1, fill_nonfinite=fill_nonfinite)
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
    **reading,
) -> tuple[np.ndarray, Geometry, Geometry]:
    """(float32 (D, H, W) in [0, 1], the scan's geometry, the grid): a scan as the model sees it.

    What `read_volume`, `model_grid`, `intensity_window`, `resample` and `scale_intensity` give one after the other, to
    the bit, with their arguments; `reading` are those of `read_volume`. But what has been inflated of a NIfTI file is
    interpolated while the rest is being inflated, as if it were a CT; if it proves not to be one, that is thrown away.
    """
    grid_of = partial(model_grid, size=size, spacing=spacing, orientation=orientation)
    early = _Early(grid_of, window)
    findings = Findings()
    image, values = load(source, findings, early=None if modality == "mr" else early.begin, **reading)
    findings.announce()
    found = intensity_window(
        image, modality=modality, window=window, percentiles=percentiles, assume_hu=assume_hu, values=values
    )
    scan = Geometry.of(image)
    grid, array = grid_of(scan), early.result(image, found)
    if array is None:
        array = interpolate_linear(image, grid, window=found, outside=found[0])
    return scale_in_place(array, found, scaling), scan, grid


class _Early:
    """Interpolates a scan as if it were a CT, slab by slab, while later slices are still being read."""

    def __init__(self, grid_of, window):
        self.grid_of, self.window = grid_of, tuple(float(v) for v in window)
        self.job, self.slabs = None, deque()

    def begin(self, image):
        """For `read_nifti`: the image whose slices are still to come."""
        self.job = LinearInterpolation(
            image, self.grid_of(Geometry.of(image)), window=self.window, outside=self.window[0]
        )
        self.slabs = deque(self.job.slabs)
        return self.slices

    def slices(self, there: int) -> None:
        """For `read_nifti`: so many slices are there."""
        all_here = there == self.job.scan.size[2]
        self.job.threads = None if all_here else max(1, (os.cpu_count() or 2) - 1)  # one core inflates
        while self.slabs and self.slabs[0].last <= there:
            self.job.do(self.slabs.popleft())

    def result(self, image, window) -> np.ndarray | None:
        """The array (D, H, W), where the scan has come to be this image and is clipped to the window assumed."""
        if self.job is None or self.slabs or self.job.image is not image or self.window != tuple(window):
            return None
        return self.job.out


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


def load(
    source,
    findings: Findings,
    *,
    series=None,
    frame=None,
    max_voxels=2**31,
    tilt="resample",
    gaps="refuse",
    monochrome1="refuse",
    fill_nonfinite=None,
    early=None,
) -> tuple:
    """What all that reads shares: (image, (smallest, largest value)); warnings and notes go to `findings`.

    Arguments: those of `read_volume`; `early`: see `read_nifti`.
    """
    if sitk is None:
        raise ImportError("reading scans needs SimpleITK: pip install SimpleITK")
    for name, value, allowed in (
        ("tilt", tilt, ("resample", "refuse")),
        ("gaps", gaps, ("refuse", "interpolate")),
        ("monochrome1", monochrome1, ("refuse", "as_stored", "invert")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is one of {allowed}, got {value!r}")
    sizes = {"frame": frame, "max_voxels": max_voxels}
    try:
        if isinstance(source, (str, PathLike)):
            if not str(source):
                raise VolumeError(VolumeFault.NO_SUCH_FILE, "The path is empty. Give a file or a folder.")
            image = _read_path(Path(source), findings, sizes, early, series=series, gaps=gaps, monochrome1=monochrome1)
        elif series is not None:
            raise ValueError(NO_SERIES)
        elif isinstance(source, sitk.Image):
            image = _from_sitk(source, **sizes)
        elif nib is not None and isinstance(source, nib.spatialimages.SpatialImage):
            image = _from_nibabel(source, findings, **sizes)
        elif isinstance(source, (tuple, list)) and len(source) == 2:
            image = _from_array(*source, **sizes)
        else:
            raise TypeError(
                f"a path, a SimpleITK image, a nibabel image or (array, affine) was expected, got "
                f"{type(source).__name__}; an array alone has no geometry"
            )
        image, values = _check_values(image, findings, fill_nonfinite)
    except PermissionError:  # its message holds the path, as that of every OSError
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
    geometry = Geometry.of(image)
    _check_shear(geometry, findings, tilt)
    if geometry.oblique_degrees > MIN_ANGLE:
        findings.note(VolumeFault.OBLIQUE, f"The axes are {geometry.oblique_degrees:.1f} degrees off the patient's.")
    return image, values


def _read_path(path: Path, findings: Findings, sizes: dict, early, **dicom) -> "sitk.Image":
    suffix = "".join(s for s in path.suffixes[-2:] if s.lower() in (".gz", ".nii")) or path.suffix
    if path.is_dir():
        return read_dicom(path, findings, **sizes, **dicom)
    if not path.is_file():  # pipes and devices are none: they may have no end
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
        findings.warn(VolumeFault.MISLABELLED_FILE, f"The content is {kind}, but the suffix says something else.")
    if kind == "dicom":
        return read_dicom(path, findings, **sizes, **dicom)
    if dicom["series"] is not None:
        raise ValueError(NO_SERIES)
    if kind == "nifti":
        return read_nifti(path, findings, early=early, **sizes)
    return read_itk(path, kind, findings, **sizes)


SCAN_SUFFIXES = {".nii", ".nii.gz", ".gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".png", ".jpg", ".txt", ".zip"}


def _from_sitk(image, *, frame, max_voxels) -> "sitk.Image":
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise VolumeError(VolumeFault.NOT_SCALAR, "The SimpleITK image has several numbers a voxel; a scan has one.")
    check_shape(image.GetSize(), max_voxels)
    if image.GetDimension() == 4:
        image = image[:, :, :, choose_frame(image.GetSize()[3], frame)]
    else:
        choose_frame(1, frame)
    tag = image.GetMetaData(MODALITY_TAG) if image.HasMetaDataKey(MODALITY_TAG) else ""
    foreign = set(image.GetMetaDataKeys()) - {MODALITY_TAG}
    if foreign or image.GetPixelID() in (sitk.sitkFloat64, sitk.sitkInt64, sitk.sitkUInt64):
        geometry = Geometry.of(image)
        image = to_image(sitk.GetArrayViewFromImage(image), _affine_of(geometry))  # leaves a DICOM header behind
        if tag:
            image.SetMetaData(MODALITY_TAG, tag)
    return image


def _affine_of(geometry: Geometry) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = geometry.axes * np.array(geometry.spacing)
    affine[:3, 3] = geometry.origin
    return affine


def _from_nibabel(image, findings, *, frame, max_voxels) -> "sitk.Image":
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    check_shape(shape, max_voxels)
    index = choose_frame(shape[3] if len(shape) == 4 else 1, frame)
    if image.affine is None:
        raise VolumeError(VolumeFault.NO_GEOMETRY, "The nibabel image has no affine. Give it one.")
    affine = np.array(image.affine, dtype=np.float64)
    if isinstance(image, nib.Nifti1Pair):
        nifti_affine(image.header, findings)  # refuses a header without a place, warns where its two places differ
        affine[:3] *= nifti_unit(image.header)
    array = _nibabel_voxels(image.dataobj, (slice(None),) * 3 + (index,) + (0,) * (len(image.shape) - 4))
    return to_image(array.transpose(2, 1, 0), RAS_TO_LPS @ affine)


def _nibabel_voxels(data, cut: tuple) -> np.ndarray:
    try:
        if nib.is_proxy(data) and len(data.shape) == 3 and getattr(data, "slope", None) is not None:
            return rescale(as_scalar(data.get_unscaled()), data.slope, data.inter)  # nibabel scales in float64
        return np.asanyarray(data[cut[: len(data.shape)]])
    except INFLATE_ERRORS:
        raise damaged("it ends too early, or its checksum fails") from None


def _from_array(array, affine, *, frame, max_voxels) -> "sitk.Image":
    array, affine = np.asarray(array), np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4):
        raise VolumeError(
            VolumeFault.NO_GEOMETRY, f"(array, affine) needs a 4 x 4 affine to RAS+ mm, got shape {affine.shape}."
        )
    check_shape(array.shape, max_voxels)
    index = choose_frame(array.shape[3] if array.ndim == 4 else 1, frame)
    array = array if array.ndim == 3 else array[..., index]
    return to_image(array.transpose(2, 1, 0), RAS_TO_LPS @ affine)


# === Checks that every source passes =================================================================================


def _check_values(image, findings: Findings, fill: float | None) -> tuple:
    lo, hi = value_range(image)
    if not (np.isfinite(lo) and np.isfinite(hi)):
        array = sitk.GetArrayFromImage(image)
        bad = ~np.isfinite(array)
        if fill is None:
            raise VolumeError(
                VolumeFault.NON_FINITE,
                f"{int(bad.sum())} of {bad.size} voxels are NaN or inf. Clean the scan, or say with fill_nonfinite "
                "what they stand for (air: -1000).",
            )
        findings.warn(VolumeFault.NON_FINITE, f"{int(bad.sum())} of {bad.size} voxels were NaN or inf, now {fill:g}.")
        array[bad] = fill
        filled = sitk.GetImageFromArray(array)
        filled.CopyInformation(image)
        if image.HasMetaDataKey(MODALITY_TAG):
            filled.SetMetaData(MODALITY_TAG, image.GetMetaData(MODALITY_TAG))
        image, (lo, hi) = filled, value_range(filled)
    if lo == hi:
        raise VolumeError(VolumeFault.CONSTANT_IMAGE, f"All voxels are {lo:g}: this is no scan. Check the export.")
    return image, (lo, hi)


def _check_shear(geometry: Geometry, findings: Findings, tilt: str) -> None:
    shear = np.degrees(np.arcsin(np.clip(np.abs(geometry.axes.T @ geometry.axes - np.eye(3)).max(), 0, 1)))
    if shear < MIN_ANGLE:
        return
    known = [f for f in findings if f.fault == VolumeFault.GANTRY_TILT]
    fault = VolumeFault.GANTRY_TILT if known else VolumeFault.SHEARED_AFFINE
    if tilt == "refuse":
        raise VolumeError(fault, f'The axes are {shear:.2f} degrees from square. Pass tilt="resample" to read it.')
    if not known:
        findings.warn(fault, f"The axes are {shear:.2f} degrees from square; resampled through the full affine.")
