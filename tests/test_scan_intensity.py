"""CT or MR without a tag: surely HU, or refused.

Run: pytest tests/test_scan_intensity.py
"""

import numpy as np
import pytest
import SimpleITK as sitk

from photon.scan_faults_photon import VolumeError
from photon.scan_faults_photon import VolumeFault as Fault
from photon.scan_intensity_photon import find_modality, intensity_window
from photon.scan_reader_photon import read_volume

SHAPE = (24, 40, 46)
z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
BODY = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1


def noise(scale, seed=0):
    return np.random.default_rng(seed).normal(0, scale, SHAPE)


def ct() -> np.ndarray:
    array = np.where(BODY, 40 + 60 * (np.sin(9 * x) > 0.5), -1000) + noise(15)
    array[((x - 0.3) / 0.3) ** 2 + (y / 0.4) ** 2 < 1] = -850
    array[(x + 0.3) ** 2 + y**2 < 0.02] = 900
    return array


def clipped(array, lo, hi):
    return np.clip(array, lo, hi)


def padded(value):
    array = ct()
    array[x**2 + y**2 > 0.95] = value
    return array


HU = {
    "plain": ct().astype(np.int16),
    "clipped to a symmetric range": clipped(ct(), -1000, 1000).astype(np.int16),
    "clipped at -1024": clipped(ct(), -1024, 3071).astype(np.int32),
    "padded with -2000": padded(-2000).astype(np.int16),
    "padded with -3024": padded(-3024).astype(np.int16),
    "interpolated": (ct() + 0.37).astype(np.float32),
    "air of one value": np.where(BODY, ct(), -1000).astype(np.int16),
    "air of one value, as floats": np.where(BODY, np.rint(ct()), -1000).astype(np.float32),
    "metal": np.where(BODY & (np.abs(x) < 0.05) & (np.abs(y) < 0.05), 14000, ct()).astype(np.int16),
    "head to the edge": np.where((x / 1.2) ** 2 + (y / 1.2) ** 2 < 1, 40, -1000) + noise(8),
}
NO_HU = {
    "phase, noise around": np.where(BODY, 3000 * np.sin(4 * x), np.random.default_rng(1).uniform(-4096, 4094, SHAPE)),
    "phase, zero around": np.where(BODY, 4094 * np.sin(4 * x + y), 0.0),
    "phase in milliradians": np.where(BODY, 3141 * np.sin(7 * y), noise(3141) % 3141),
    "perfusion map": np.where(BODY, 300 + noise(900), 0.0),
    "relCBF map, lowest value around": np.where(BODY, 100 + noise(200), -2048.0),
    "relCBF map, -1000 within": np.where(BODY, noise(1000), 0.0),
    "MTT map, -1000 around": np.where(BODY, 120 + noise(60), -1000.0),
    "field map, -1000 around": np.where(BODY, 200 * x - 100 * y, -1000.0),
    "T1 less 1000": (np.where(BODY, 400 + noise(200), -1000) + noise(5, 1)).astype(np.int16),
    "difference image": noise(900),
    "field map in Hz": np.where(BODY, 700 * x, noise(20)),
    "eight bits": np.clip(ct() / 10, -128, 127).astype(np.int8),
    "crop within the body": np.where((x + 0.3) ** 2 + y**2 < 0.1, -860, 40) + noise(20),
    "no tissue": np.where(BODY, 2000, -1000) + noise(5),
    "T1 with a filter's ringing": np.where(BODY, 900, 0) + noise(230),
}


def image(array):
    return read_volume((np.asarray(array).transpose(2, 1, 0), np.diag([1.1, 0.9, 2.0, 1.0])))


@pytest.mark.parametrize("name", HU)
def test_hu_are_known_without_a_tag(name):
    assert find_modality(image(HU[name])) == "ct"
    assert intensity_window(image(HU[name])) == (-1000, 1000)


@pytest.mark.parametrize("name", NO_HU)
def test_what_may_be_mr_is_refused_without_a_tag(name):
    with pytest.raises(VolumeError, match="Set modality to 'ct' or 'mr'") as error:
        find_modality(image(NO_HU[name]))
    assert error.value.fault == Fault.MODALITY_UNKNOWN
    assert find_modality(image(NO_HU[name]), "mr") == "mr"


def test_a_ct_by_the_user_or_by_its_tag_needs_less():
    """The peak of air is asked for only where nobody says that the scan is a CT."""
    array = NO_HU["crop within the body"].astype(np.int16)
    assert find_modality(image(array), "ct") == "ct"
    tagged = sitk.Image(image(array))
    tagged.SetMetaData("0008|0060", "CT")
    assert find_modality(tagged) == "ct"
    with pytest.raises(VolumeError, match="NOT_HU"):
        find_modality(image(np.where(BODY, 40, 0) + noise(20)), "ct")
