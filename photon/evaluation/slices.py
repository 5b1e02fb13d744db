"""A scan as pictures, for models that read only pictures."""

import numpy as np
from PIL import Image

from photon.scan_intensity_photon import intensity_window
from photon.scan_reader_photon import read_volume


def axial_slices(source, count, window, modality="auto", assume_hu=False, **options):
    """`count` axial slices of a scan, evenly spaced from head to feet, as 8-bit RGB pictures.

    The patient's right is on the left of a picture and the front at its top; pixels are square. CT is windowed to
    `window` (HU), MR by its percentiles. A scan with fewer slices gives all of them. options: as `read_volume` takes
    them. Raises `VolumeError`.
    """
    import SimpleITK as sitk

    image = read_volume(source, **options)
    low, high = intensity_window(image, modality=modality, window=window, assume_hu=assume_hu)
    image = sitk.DICOMOrient(image, "LPI")  # columns grow to the left, rows to the back, slices to the feet
    voxels = sitk.GetArrayFromImage(image)  # (slices, rows, columns)
    x, y, _ = image.GetSpacing()
    pixel, depth = min(x, y), len(voxels)
    size = (round(voxels.shape[2] * x / pixel), round(voxels.shape[1] * y / pixel))  # width, height
    count = min(count, depth)
    pictures = []
    for index in ((2 * i + 1) * depth // (2 * count) for i in range(count)):
        grey = (np.clip(voxels[index].astype(np.float32), low, high) - low) / (high - low)
        picture = Image.fromarray(np.rint(255 * grey).astype(np.uint8)).convert("RGB")
        pictures.append(picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR))
    return pictures
