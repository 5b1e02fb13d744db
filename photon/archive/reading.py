"""One scan -> its record: what was read or refused and why, geometry and a thumbnail; without patient data."""

import base64
import io
import time
import warnings

import numpy as np
import SimpleITK as sitk
from PIL import Image

from photon.processing_photon import PhotonVolumeProcessor
from photon.scan_faults_photon import VolumeError, VolumeWarning
from photon.scan_grid_photon import Geometry
from photon.scan_report import three_planes
from photon.scan_store_photon import VolumeStore

SIDE = 64  # pixels of a thumbnail


class Reader:
    """Reads scans as training and evaluation will, and keeps them in `cache_dir`.

    Args: settings: fields of `PhotonVolumeProcessor`; cache_dir: folder of preprocessed scans, or `None`; threads: for
        one scan.
    """

    def __init__(self, settings, cache_dir, threads=1):
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(max(1, threads))
        self.processor = PhotonVolumeProcessor(**settings)
        self.store = None if cache_dir is None else VolumeStore(cache_dir, self.processor.settings)

    def __call__(self, source):
        """A dict: status "read" or "refused"; fault and message where refused; warnings (codes); seconds. Of a scan
        that was read also its size, spacing and extent (mm), the shares at the ends of the window, entry (its name in
        the folder of preprocessed scans) and thumbnail (PNG in base64).

        Raises: `OSError` where the folder of preprocessed scans cannot be written.
        """
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                patches, geometry = self.processor.prepare(source, self.store)
                options = {name: value for name, value in source.items() if name != "path"}
                entry = None if self.store is None else self.store.key(source["path"], options)
                record = {"status": "read", "entry": entry} | self._view(patches, geometry)
            except VolumeError as error:
                message = str(error).removeprefix(f"[{error.fault.value}] ")
                record = {"status": "refused", "fault": error.fault.value, "message": message}
            except ValueError as error:  # an option that does not suit the scan
                record = {"status": "refused", "fault": "", "message": str(error)}
        codes = [w.message.fault.value for w in caught if isinstance(w.message, VolumeWarning)]
        return record | {"warnings": sorted(set(codes)), "seconds": round(time.perf_counter() - start, 3)}

    def _view(self, patches, geometry):
        scan, grid = Geometry(**geometry["scan"]), Geometry(**geometry["grid"])
        array = self._every_second_voxel(patches, geometry["grid_thw"])
        spacing = np.array(grid.spacing) * grid.size / array.shape[::-1]
        coarse = Geometry(array.shape[::-1], spacing, grid.origin, grid.direction)
        return {
            "size": list(scan.size),
            "spacing": [round(value, 4) for value in scan.spacing],
            "extent": [round(n * s, 1) for n, s in zip(scan.size, scan.spacing, strict=True)],
            "orientation": scan.orientation,
            "dark": round(float(np.mean(array <= 0)), 4),  # at or below the window's lower end
            "bright": round(float(np.mean(array >= 1)), 4),
            "mean": round(float(array.mean()), 4),
            "thumbnail": _thumbnail(three_planes(coarse.image(array))),
        }

    def _every_second_voxel(self, patches, grid_thw):
        """(D/2, H/2, W/2) in [0, 1]: the inverse of `PhotonVolumeProcessor.patchify` and of its scaling."""
        (t, h, w), p, m = grid_thw, self.processor.patch_size, self.processor.merge_size
        array = patches.reshape(t, h // m, w // m, m, m, p, p, p)[..., ::2, ::2, ::2]
        array = array.transpose(0, 5, 1, 3, 6, 2, 4, 7)
        array = np.ascontiguousarray(array).reshape(t * array.shape[1], h * array.shape[4], w * array.shape[7])
        return array * self.processor.std + self.processor.mean


def _thumbnail(planes):
    """PNG in base64: the axial and the coronal plane side by side, in their true proportions."""
    sheet = Image.new("L", (2 * SIDE, SIDE))
    for number, name in enumerate(("axial", "coronal")):
        plane, (row, column) = planes[name]
        height, width = plane.shape[0] * row, plane.shape[1] * column
        scale = SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)
        sheet.paste(small, (number * SIDE + (SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
