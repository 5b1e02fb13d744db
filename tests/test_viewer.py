"""What a browser gets of a scan, and the page of `ask.py --html`. What it draws is tested in tests/app."""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import SimpleITK as sitk

import ask
from photon.viewer.export import html_page
from photon.viewer.packing import PackedScan, stored_integers, thinning

SIZE = (11, 14, 9)  # x, y, z


def image_of(array, spacing=(2.0, 3.0, 5.0)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    return image


@pytest.fixture(scope="module")
def array():
    return np.random.default_rng(0).integers(-1100, 2000, SIZE[::-1]).astype(np.int16)


def unpacked(text, dtype, size):
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), dtype).reshape(size[::-1])


@pytest.mark.parametrize("stored", ["LPS", "RAS", "SAR", "PIL"])
def test_voxels_arrive_upright(array, stored):
    """In whatever order a scan is stored, a browser gets x to the left, y to the back, z to the head."""
    kept = (array > 900).astype(np.uint8)
    turned, turned_kept = (sitk.DICOMOrient(image_of(part), stored) for part in (array, kept))
    packed = PackedScan(turned, (-160, 240), ct=True)
    scan = packed.scan
    assert scan["size"] == list(SIZE) and scan["spacing"] == [2.0, 3.0, 5.0] and scan["unit"] == "HU"
    np.testing.assert_array_equal(unpacked(scan["voxels"], "<i2", SIZE), array)
    item = packed.question(turned_kept, "a?", "b", tokens_kept=3)
    np.testing.assert_array_equal(unpacked(item["kept"], "u1", SIZE), kept)
    assert item["tokens_kept"] == 3 and kept[tuple(item["at"][::-1])] == 1


def test_large_scans_are_thinned_alike(array):
    packed = PackedScan(image_of(array), (0, 1), ct=True, max_voxels=500)
    scan = packed.scan
    assert np.prod(scan["size"]) <= 500
    np.testing.assert_allclose(np.multiply(scan["steps"], (2.0, 3.0, 5.0)), scan["spacing"])
    thin = array[tuple(slice(None, None, step) for step in scan["steps"][::-1])]
    np.testing.assert_array_equal(unpacked(scan["voxels"], "<i2", scan["size"]), thin)
    kept = image_of(np.ones_like(array, np.uint8))
    item = packed.question(kept, "", "")
    assert unpacked(item["kept"], "u1", scan["size"]).all()
    assert all(0 <= i < n for i, n in zip(item["at"], scan["size"], strict=True))


def test_the_smallest_voxels_go_first():
    assert thinning((512, 512, 300), (0.7, 0.7, 1.0), 12_000_000) == [2, 2, 2]
    assert thinning((100, 100, 100), (1.0, 1.0, 1.0), 1_000_000) == [1, 1, 1]


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1, 60).reshape(3, 4, 5).astype(np.float32),
        np.linspace(-1000, 3000, 60).reshape(3, 4, 5).astype(np.float32),
        np.arange(60, dtype=np.uint16).reshape(3, 4, 5) * 1000,
        np.full((3, 4, 5), 7.5, np.float32),
    ],
)
def test_values_survive_their_storage(values):
    stored, slope, intercept = stored_integers(values)
    span = float(values.max() - values.min())
    np.testing.assert_allclose(stored * slope + intercept, values, atol=max(0.51 if span > 2000 else 0, span / 60000))
    assert stored.dtype == np.int16


def test_mr_has_windows_of_its_own():
    array = np.random.default_rng(1).gamma(2.0, 100.0, (9, 8, 7)).astype(np.float32)
    scan = PackedScan(image_of(array), (0, 500), ct=False).scan
    assert scan["unit"] == "" and all(low < high for low, high in scan["presets"].values())
    assert "lung" not in scan["presets"]


def test_the_page_is_one_file_without_network(capsys, array, tmp_path):
    """No address, no path, no name; a question that looks like markup stays text."""
    file = tmp_path / "doe_jane.nii.gz"
    body = np.full((20, 24, 28), -1000, np.int16)
    body[:, 4:20, 4:24] = 40
    sitk.WriteImage(image_of(body, (9.0, 9.0, 9.0)), str(file))
    question = "Is it </script><script>alert(1)</script> there?"
    page = tmp_path / "out.html"
    ask.main([str(file), question, "--html", str(page), "--max-new-tokens", "2", "--compare", "And now?"])
    text = page.read_text("utf-8")
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text) and "doe_jane" not in text
    assert "default-src 'none'" in text and text.count("</script>") == 3
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert [item["question"] for item in data["questions"]] == [question, "And now?"]
    np.testing.assert_array_equal(unpacked(data["scan"]["voxels"], "<i2", (28, 24, 20)), body)
    assert html_page(data["scan"], data["questions"]) == text
