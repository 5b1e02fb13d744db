"""What a scan's numbers mean: CT or MR, the window of values that the model sees, and their scale."""

import numpy as np

from .scan_dicom_photon import MODALITIES, MODALITY_TAG
from .scan_faults_photon import VolumeError, VolumeFault

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None

AIR = (-1060, -940)  # HU
TISSUE = (-160, 260)  # HU: fat, water, organs, vessels with contrast
SOLID = -300  # HU: more is no air and no lung
DENSE = 3200  # HU: more is metal


def find_modality(image, modality: str = "auto", *, assume_hu: bool = False, values=None) -> str:
    """A scan's modality, "ct" or "mr", never guessed.

    "auto": the DICOM modality where the scan has one; else "ct" where the values are surely HU (`is_surely_hu`); else
    MODALITY_UNKNOWN. For "ct", asked for or found, numbers that cannot be HU are refused (NOT_HU: 8 bits, nothing
    below -500, nothing above 0) unless `assume_hu`, which is for crops within the body. "ct" or "mr" also reads a scan
    whose DICOM modality is OT or SC, which name no kind. `values`: the image's smallest and largest, where known.
    """
    if modality not in ("auto", "ct", "mr"):
        raise ValueError(f"modality is 'auto', 'ct' or 'mr', got {modality!r}")
    tag = image.GetMetaData(MODALITY_TAG).strip().upper() if image.HasMetaDataKey(MODALITY_TAG) else ""
    declared = {"CT": "ct", "MR": "mr"}.get(tag)
    open_tag = tag in ("OT", "SC") and modality != "auto"
    if tag and not open_tag and (declared is None or modality not in ("auto", declared)):
        reason = " (SUV needs dose, weight and times, and no model here was trained on it)" if tag == "PT" else ""
        name = tag if tag in MODALITIES else "another kind"
        raise VolumeError(
            VolumeFault.MODALITY_UNSUPPORTED,
            f"The scan's header says {name}{reason}; {'CT or MR' if modality == 'auto' else modality.upper()} was "
            "expected. Give such a scan, or set modality to what it is.",
        )
    lo, hi = values or value_range(image)
    kind = declared or modality
    if kind == "auto":
        if not is_surely_hu(image, (lo, hi)):
            raise VolumeError(
                VolumeFault.MODALITY_UNKNOWN,
                f"The scan has no modality, and its values ({lo:g} to {hi:g}) are not surely HU: air near -1000 "
                "around soft tissue was expected. Set modality to 'ct' or 'mr'.",
            )
        kind = "ct"
    eight_bits = image.GetPixelID() in (sitk.sitkInt8, sitk.sitkUInt8)
    if kind == "ct" and not (lo < -500 and hi > 0 and not eight_bits) and not assume_hu:
        raise VolumeError(
            VolumeFault.NOT_HU,
            f"A CT was expected, but the values ({lo:g} to {hi:g}) cannot be HU: air is at -1000 and water at 0. "
            "Undo the scaling (often: add the intercept), or set assume_hu for a crop within the body.",
        )
    return kind


def is_surely_hu(image, values: tuple[float, float]) -> bool:
    """Whether the numbers are a CT's beyond doubt: a peak of air on the faces of the volume, and soft tissue within.

    Phase maps, perfusion maps and other MR products also reach below -500 and above 0. They have no peak at -1000:
    their background is 0, noise over the whole range, or its lower end. One padding value below air is passed over.
    Maps that are filled with -1000 around the body are known by fractions beside a fill that is one number everywhere,
    shifted MR by tissue that is not the most of what is solid.
    """
    if not (values[0] < -500 and values[1] > 0) or image.GetPixelID() in (sitk.sitkInt8, sitk.sitkUInt8):
        return False
    array = sitk.GetArrayViewFromImage(image)
    inner = [slice(None, None, 1 + n // 96) for n in array.shape]  # every n-th voxel of a large scan decides the same
    outer = [slice(None, None, max(n - 1, 1)) for n in array.shape]  # first and last
    sides = [array[tuple(inner[:axis] + [outer[axis]] + inner[axis + 1 :])].ravel() for axis in range(3)]
    faces, array = np.concatenate(sides), array[tuple(inner)]
    padding = values[0] if values[0] < AIR[0] else None
    faces, inside = faces[faces != padding], array[array != padding]
    if not faces.size or not inside.size:
        return False
    width = AIR[1] - AIR[0]
    counts, edges = np.histogram(faces, np.arange(AIR[0] - 10 * width, DENSE, width))  # one of the bins is AIR
    beyond_tissue = (edges[1:] <= TISSUE[0]) | (edges[:-1] >= TISSUE[1])
    around = faces[(faces >= AIR[0]) & (faces < AIR[1])]
    tissue = np.sum((inside >= TISSUE[0]) & (inside <= TISSUE[1]))
    solid, far = inside[inside > SOLID], np.mean((inside < AIR[0]) | (inside > DENSE))
    if around.size < max(0.03 * faces.size, counts[beyond_tissue].max(), 1) or far > 0.02:
        return False
    filled = np.mean(around == np.median(around)) > 0.95 and np.mean(solid % 1 != 0) > 0.5
    return bool(tissue >= max(0.02 * inside.size, 0.5 * solid.size, 1) and not filled)


def value_range(image) -> tuple[float, float]:
    """Smallest and largest value of an image."""
    array = sitk.GetArrayViewFromImage(image)
    return float(array.min()), float(array.max())


def intensity_window(
    image,
    *,
    modality: str = "auto",
    window=(-1000.0, 1000.0),
    percentiles=(0.5, 99.5),
    assume_hu: bool = False,
    values=None,
) -> tuple[float, float]:
    """(lo, hi) in the scan's units: the values that become 0 and 1.

    CT: `window` in HU. MR: `percentiles` of the voxels that are not 0 (scanners and defacing fill with 0), which a
    single bright vessel or spike cannot stretch. `values`: see `find_modality`.
    """
    if find_modality(image, modality, assume_hu=assume_hu, values=values) == "ct":
        return float(window[0]), float(window[1])
    array = sitk.GetArrayViewFromImage(image)
    array = array[:: 1 + array.shape[0] // 256, :: 1 + array.shape[1] // 256, :: 1 + array.shape[2] // 256]
    array = array[array != 0]  # every n-th voxel of a large scan has the same percentiles
    lo, hi = np.percentile(array, percentiles) if array.size else (0.0, 0.0)
    if not hi > lo:
        raise VolumeError(
            VolumeFault.CONSTANT_IMAGE,
            f"Nearly all voxels that are not 0 have the value {lo:g}, so that there is no contrast. Check the scan.",
        )
    return float(lo), float(hi)


def scale_intensity(x, *, window: tuple[float, float], scaling: str = "window") -> np.ndarray:
    """float32 (D, H, W) in [0, 1] from a resampled image, or an array.

    scaling: "window" maps lo to 0 and hi to 1, the same for every scan; "minmax" maps the smallest and largest value
    after clipping to the window, as the release does (one tissue's value then depends on the rest of the view).
    """
    x = sitk.GetArrayFromImage(x) if isinstance(x, sitk.Image) else np.array(x)
    return scale_in_place(x.astype(np.float32, copy=False), window, scaling)


def scale_in_place(x: np.ndarray, window, scaling: str) -> np.ndarray:
    """`scale_intensity` without a copy: the array is overwritten."""
    if scaling not in ("window", "minmax"):
        raise ValueError(f"scaling is 'window' or 'minmax', got {scaling!r}")
    lowest, highest = float(x.min()), float(x.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise VolumeError(VolumeFault.NON_FINITE, "The volume holds NaN or inf; clean it before it is scaled.")
    lo, hi = (float(window[0]), float(window[1]))
    if lowest < lo or highest > hi:
        np.clip(x, lo, hi, out=x)
        lowest, highest = float(x.min()), float(x.max())
    if lowest == highest:
        raise VolumeError(
            VolumeFault.CONSTANT_IMAGE,
            f"Within the window {window} the volume has one value, {lowest:g}. Check the scan and the window.",
        )
    if scaling == "minmax":
        lo, hi = lowest, highest
    x -= lo
    x /= hi - lo
    return x
