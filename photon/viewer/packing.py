"""A scan and its kept tokens as the viewer in a browser takes them: numbers and compressed voxels, nothing else.

    packed = PackedScan(image, window=(-160, 240), ct=True)
    packed.scan                                   # a dict for JSON: size, spacing, voxels, window presets
    packed.question(kept, "Is there ...?", ...)   # a dict for JSON: the words, the kept voxels, where to look first

No name, date or tag of the scan is in either.
"""

import base64
import gzip

import numpy as np

from photon.planes import choose_planes, question_window

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None

MAX_VOXELS = 12_000_000  # 24 MB before compression: what a browser draws without delay
CT_PRESETS = {  # HU
    "soft tissue": (-160, 240),
    "lung": (-1350, 150),
    "bone": (-500, 1300),
    "liver": (-45, 105),
    "mediastinum": (-125, 225),
    "brain": (0, 80),
}
MR_PERCENTILES = {"usual": (1, 99), "dark parts": (0, 80), "bright parts": (50, 100)}


def squeezed(array):
    """An array's bytes, little-endian, gzipped, as base64 text."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(gzip.compress(little.tobytes(), 5, mtime=0)).decode("ascii")


class PackedScan:
    """A scan for the viewer.

    Args:
        image: 3D SimpleITK image of any orientation; an oblique one is shown along its own axes.
        window: (low, high) in the scan's units that is shown first.
        ct: whether values are HU.
        max_voxels: a larger scan is thinned in the axes with the smallest voxels.
    """

    def __init__(self, image, window, ct, max_voxels=MAX_VOXELS):
        self.image, self.window, self.ct = image, tuple(map(float, window)), ct
        upright = sitk.DICOMOrient(image, "LPS")
        self.steps = thinning(upright.GetSize(), upright.GetSpacing(), max_voxels)
        self.voxels = self._thinned(upright)  # (z, y, x)
        self.spacing = [mm * step for mm, step in zip(upright.GetSpacing(), self.steps, strict=True)]

    def _thinned(self, upright):
        return sitk.GetArrayFromImage(upright[tuple(slice(None, None, step) for step in self.steps)])

    @property
    def scan(self):
        """The scan as a dict for JSON; `value = slope * stored + intercept` in the scan's units."""
        stored, slope, intercept = stored_integers(self.voxels)
        return {
            "size": list(self.voxels.shape[::-1]),  # x to the left, y to the back, z to the head
            "spacing": self.spacing,
            "steps": self.steps,
            "slope": slope,
            "intercept": intercept,
            "unit": "HU" if self.ct else "",
            "window": self.window,
            "presets": {name: list(map(float, ends)) for name, ends in self._presets().items()},
            "voxels": squeezed(stored),
        }

    def _presets(self):
        if self.ct:
            return CT_PRESETS
        some = self.voxels[self.voxels != 0][:: max(1, self.voxels.size // 1_000_000)]
        return {name: np.percentile(some, ends) for name, ends in MR_PERCENTILES.items()} if some.size else {}

    def question(self, kept, question, answer, **more):
        """A question as a dict for JSON.

        Args: kept: image on the scan's voxels, nonzero where kept; question, answer: text; more: further fields.
        """
        at, reason = choose_planes(self.image, kept, question, self.ct)
        mask = self._thinned(sitk.DICOMOrient(kept, "LPS")) > 0
        at = [min(i // step, n - 1) for i, step, n in zip(at, self.steps, mask.shape[::-1], strict=True)]
        words = {"question": question, "answer": answer, "reason": reason}
        words["window"] = question_window(question, self.ct) or self.window
        return words | more | {"at": at, "kept": squeezed(mask.astype(np.uint8))}


def thinning(size, spacing, max_voxels):
    """Steps along x, y and z by which a scan is thinned to at most `max_voxels`, the smallest voxels first."""
    steps = [1, 1, 1]
    while np.prod([-(-n // step) for n, step in zip(size, steps, strict=True)]) > max_voxels:
        steps[int(np.argmin([mm * step for mm, step in zip(spacing, steps, strict=True)]))] += 1
    return steps


def stored_integers(voxels):
    """(int16 array, slope, intercept): integers as they are where they fit, else over the range of the values."""
    low, high = float(voxels.min()), float(voxels.max())
    whole = voxels.dtype.kind in "iu" or high - low > 2000  # HU with fractions: a unit is fine enough
    if whole and -32768 <= low and high <= 32767:
        return np.rint(voxels).astype(np.int16), 1.0, 0.0
    slope = (high - low) / 65000 or 1.0
    return np.rint((voxels - low) / slope - 32500).astype(np.int16), slope, low + 32500 * slope
