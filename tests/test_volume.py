"""Reading scans: every format gives the same voxels, and every voxel lies where it is in the patient.

Run: pytest tests/test_volume.py
"""

import os
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import binary_erosion, map_coordinates

from photon import scan_intensity_photon as intensity
from photon import scan_reader_photon as volume
from photon.scan_grid_photon import Geometry, model_grid, resample
from photon.scan_reader_photon import read_volume
from photon.scan_report import inspect_volume

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("PHOTON_TEST_DATA", ROOT.parent / "shared" / "data"))
SMALL = {"size": (11, 14, 17), "spacing": (2.3, 1.9, 1.7)}  # unequal on every axis
RELEASE = {"size": (140, 280, 280), "spacing": (364 / 140, 364 / 280, 364 / 280)}


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in the folder of test data (PHOTON_TEST_DATA)")
    return DATA / name


def quietly(source, **options):
    """Reads and fails on any warning: the scan is sound."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_volume(source, **options)


def tensor(image, modality="ct", grid=None, **options) -> np.ndarray:
    grid = model_grid(Geometry.of(image), **(grid or SMALL))
    window = intensity.intensity_window(image, modality=modality)
    return intensity.scale_intensity(resample(image, grid, window=window, outside=window[0]), window=window, **options)


def phantom(shape=(13, 16, 19), seed=0, dtype=np.int16) -> np.ndarray:
    """(k, j, i) voxels that look like HU: air around, soft tissue within."""
    array = np.random.default_rng(seed).integers(-80, 300, shape).astype(dtype)
    array[:2], array[:, :2], array[:, :, :3] = -1000, -1000, -1000
    return array


AFFINE = np.array([[-0.9, 0, 0, 40], [0, 1.3, 0, -70], [0, 0, 2.1, 15], [0, 0, 0, 1]], dtype=np.float64)  # RAS+


# === One way to the grid =============================================================================================


def tilted(path):
    """A sheared NIfTI, as of a tilted gantry."""
    affine = AFFINE.copy()
    affine[1, 2] = 0.4
    nib.save(nib.Nifti1Image(phantom((23, 16, 19)).transpose(2, 1, 0), affine), path)


def turned(path):
    """A NIfTI whose slices are sagittal, so that the grid's slabs lie across another axis than the scan's."""
    affine = AFFINE[:, [2, 0, 1, 3]]
    nib.save(nib.Nifti1Image(phantom((33, 16, 19)).transpose(2, 1, 0), affine), path)


def rescaled(path):
    image = nib.Nifti1Image(phantom().transpose(2, 1, 0), AFFINE)
    image.header.set_slope_inter(2.0, -24.0)
    nib.save(image, path)


def plain(path):
    nib.save(nib.Nifti1Image(phantom((41, 16, 19)).transpose(2, 1, 0), AFFINE), path)


@pytest.mark.parametrize("modality", ["ct", "mr"])
@pytest.mark.parametrize("make", [plain, tilted, turned, rescaled])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_interpolating_while_inflating_is_the_same_to_the_bit(make, suffix, modality, tmp_path):
    path = tmp_path / f"scan{suffix}"
    make(path)
    size, spacing = (45, 14, 17), (2.3, 1.9, 1.7)  # four slabs, the last one short
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", volume.VolumeWarning)
        got, scan, grid = volume.read_on_grid(path, size=size, spacing=spacing, modality=modality)
        image = read_volume(path)
    assert scan == Geometry.of(image) and grid == model_grid(scan, size, spacing)
    window = intensity.intensity_window(image, modality=modality)
    on_grid = resample(image, grid, window=window, outside=window[0])
    assert np.array_equal(got, intensity.scale_intensity(on_grid, window=window))
    # and SimpleITK's own, of the whole scan at once
    lo, hi = int(np.floor(window[0])), int(np.ceil(window[1]))
    whole = sitk.Resample(
        sitk.Clamp(image, image.GetPixelID(), lo, hi), grid.size, sitk.Transform(), sitk.sitkLinear, grid.origin,
        grid.spacing, grid.direction, window[0], sitk.sitkFloat32,
    )  # fmt: skip
    whole, ours = sitk.GetArrayFromImage(whole), sitk.GetArrayFromImage(on_grid)
    same = np.abs(ours - whole) < 1.0  # points are drawn inwards by 1e-4 voxels, see `_rim_transform`,
    on_face = (ours == window[0]) | (whole == window[0])  # which decides for those on the scan's outer faces
    assert same.mean() > 0.9 and (same | on_face).all()


def test_series_are_for_dicom_alone(tmp_path):
    plain(tmp_path / "scan.nii.gz")
    for source in (tmp_path / "scan.nii.gz", read_volume(tmp_path / "scan.nii.gz"), (phantom(), AFFINE)):
        with pytest.raises(ValueError, match="series= chooses among the series of a DICOM folder"):
            read_volume(source, series=1)


# === Formats =========================================================================================================


@pytest.fixture
def twins(tmp_path):
    """One scan in every format and in memory; nibabel writes NIfTI, SimpleITK the others."""
    array, affine = phantom().transpose(2, 1, 0), AFFINE  # [i, j, k]
    nifti = nib.Nifti1Image(array, affine)
    for suffix in (".nii", ".nii.gz"):
        nib.save(nifti, tmp_path / f"scan{suffix}")
    nib.save(nib.Nifti2Image(array, affine), tmp_path / "scan2.nii.gz")
    big = nib.Nifti1Image(array, affine, nib.Nifti1Header(endianness=">"), dtype=np.int16)
    nib.save(big, tmp_path / "big.nii")
    assert (tmp_path / "big.nii").read_bytes()[:4] == b"\0\0\x01\x5c"
    image = sitk.ReadImage(tmp_path / "scan.nii")
    for name in ("scan.nrrd", "scan.nhdr", "scan.mha", "scan.mhd"):
        sitk.WriteImage(image, tmp_path / name, useCompression=name == "scan.mha")
    paths = {p.name: p for p in tmp_path.iterdir() if p.suffix not in (".raw", ".zraw")}
    return paths | {"SimpleITK": image, "nibabel": nifti, "array": (array, affine)}


def test_every_format_gives_the_same_tensor(twins):
    reference = tensor(quietly(twins["array"]))
    assert 0.1 < reference.mean() < 0.8 and reference.std() > 0.05
    for name, source in twins.items():
        image = quietly(source)
        assert image.GetPixelID() == sitk.sitkInt16, name
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), phantom(), err_msg=name)
        assert np.abs(tensor(image) - reference).max() < 1e-4, name


def test_scale_factors_are_applied_in_integers_where_they_are_integers(tmp_path):
    stored = (phantom() + 1024).transpose(2, 1, 0)
    image = nib.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "shifted.nii.gz")
    for source in (tmp_path / "shifted.nii.gz", nib.load(tmp_path / "shifted.nii.gz")):
        got = quietly(source)
        assert got.GetPixelID() == sitk.sitkInt16
        np.testing.assert_array_equal(sitk.GetArrayFromImage(got), phantom())
    image.header.set_slope_inter(0.5, -1024.25)
    nib.save(image, tmp_path / "fraction.nii.gz")
    got = quietly(tmp_path / "fraction.nii.gz")
    expected = nib.load(tmp_path / "fraction.nii.gz").get_fdata().transpose(2, 1, 0)
    np.testing.assert_allclose(sitk.GetArrayFromImage(got), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_number_type_keeps_its_values(dtype, tmp_path):
    array = np.arange(5 * 6 * 7).reshape(5, 6, 7) % 120
    nib.save(nib.Nifti1Image(array.astype(dtype), AFFINE, dtype=dtype), tmp_path / "a.nii")
    for source in (tmp_path / "a.nii", (array.astype(dtype), AFFINE)):
        got = quietly(source)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(got), array.transpose(2, 1, 0))
        assert got.GetPixelID() not in (sitk.sitkFloat64, sitk.sitkInt64, sitk.sitkUInt64)


def test_the_result_carries_no_metadata_of_the_file(twins):
    tagged = sitk.Image(twins["SimpleITK"])
    tagged.SetMetaData("0010|0010", "Doe^Jane")
    for source in (tagged, twins["scan.nrrd"], twins["scan.mha"], twins["scan.nii"]):
        assert read_volume(source).GetMetaDataKeys() == ()
    assert tagged.HasMetaDataKey("0010|0010")  # the caller's own image is left alone


def test_a_frame_is_chosen_from_a_4d_scan(tmp_path):
    frames = np.stack([phantom(seed=s).transpose(2, 1, 0) for s in range(3)], axis=-1)
    nib.save(nib.Nifti1Image(frames, AFFINE), tmp_path / "four.nii.gz")
    sitk.WriteImage(sitk.ReadImage(tmp_path / "four.nii.gz"), tmp_path / "four.mha")
    sources = [tmp_path / "four.nii.gz", tmp_path / "four.mha", nib.load(tmp_path / "four.nii.gz"), (frames, AFFINE)]
    for source in [*sources, sitk.ReadImage(tmp_path / "four.mha")]:
        for frame in range(3):
            got = sitk.GetArrayFromImage(quietly(source, frame=frame))
            np.testing.assert_array_equal(got, phantom(seed=frame))


# === Geometry ========================================================================================================


def test_grid_orientation_is_what_dicomorient_names(tmp_path):
    image = sitk.GetImageFromArray(phantom())
    rotation = sitk.VersorTransform((0.3, -0.5, 0.8), 0.4).GetMatrix()
    image.SetDirection(rotation)
    image.SetSpacing((1.1, 1.7, 2.3))
    for code in ("LAI", "RAI", "LPS", "PSR", "SLA"):
        grid = model_grid(Geometry.of(image), **SMALL, orientation=code)
        oriented = sitk.DICOMOrient(image, code)
        np.testing.assert_allclose(grid.direction, oriented.GetDirection(), atol=1e-6)
        np.testing.assert_allclose(grid.centre, Geometry.of(image).centre, atol=1e-6)
        assert grid.size == (17, 14, 11) and grid.spacing == (1.7, 1.9, 2.3)


def test_geometry_survives_json():
    import dataclasses
    import json

    geometry = model_grid(Geometry.of(read_volume((phantom(), AFFINE))), **SMALL)
    assert Geometry(**json.loads(json.dumps(dataclasses.asdict(geometry)))) == geometry


def test_a_marked_voxel_is_where_radiology_says():
    """LAI: depth grows to the feet, rows to the front, columns to the patient's left. RAS+ input says where is
    what."""
    array = np.full((20, 24, 28), -1000, np.int16)
    array[3:6, 17:21, 22:26] = 1000  # i grows to the right, j to the front, k to the head
    x = tensor(
        read_volume((array, np.diag([2.0, 2.0, 2.0, 1.0]))), grid={"size": (28, 28, 28), "spacing": (2.0, 2.0, 2.0)}
    )
    depth, height, width = (axis.mean() for axis in np.nonzero(x > 0.5))
    assert depth < 13 and height > 14 and width > 17  # towards the head, the front, the left


def test_a_sheared_scan_goes_through_its_full_affine():
    affine = AFFINE.copy()
    affine[1, 2] = 0.6
    with pytest.warns(volume.VolumeWarning, match="SHEARED_AFFINE"):
        image = read_volume((phantom().transpose(2, 1, 0), affine))
    grid = model_grid(Geometry.of(image), **SMALL)
    got = sitk.GetArrayFromImage(resample(image, grid, outside=-1000))
    expected = by_scipy(phantom().transpose(2, 1, 0), affine, grid)
    assert np.abs(got - expected)[expected > -999].mean() < 0.3
    with pytest.raises(volume.VolumeError, match="square"):
        read_volume((phantom().transpose(2, 1, 0), affine), tilt="refuse")


def by_scipy(array_ijk, affine_ras, grid, outside=-1000.0) -> np.ndarray:
    """Independent of SimpleITK: world points of the grid, through the inverse affine, into scipy."""
    k, j, i = np.meshgrid(*[np.arange(n) for n in grid.size[::-1]], indexing="ij")
    index = np.stack([i, j, k]).reshape(3, -1) * np.array(grid.spacing)[:, None]
    lps = np.array(grid.origin)[:, None] + np.array(grid.direction).reshape(3, 3) @ index
    ras = np.vstack([lps * np.array([[-1], [-1], [1]]), np.ones(lps.shape[1])])
    voxel = (np.linalg.inv(affine_ras) @ ras)[:3]
    values = map_coordinates(array_ijk.astype(np.float64), voxel, order=1, mode="nearest")
    far = (voxel < -0.5) | (voxel > np.array(array_ijk.shape)[:, None] - 0.5)
    values[far.any(axis=0)] = outside
    return values.reshape(grid.size[::-1])


@pytest.mark.parametrize("name, modality", [("example_ct.nii.gz", "ct"), ("example_mr_sm.nii.gz", "mr")])
def test_the_real_scan_against_nibabel_and_scipy(name, modality, capsys):
    path = real(name)
    image = quietly(path)
    window = intensity.intensity_window(image, modality=modality)
    grid = model_grid(Geometry.of(image), size=(70, 140, 140), spacing=(5.2, 2.6, 2.6))
    got = sitk.GetArrayFromImage(resample(image, grid, window=window, outside=window[0]))
    nifti = nib.load(path)
    clipped = np.clip(nifti.get_fdata(), np.floor(window[0]), np.ceil(window[1]))
    expected = by_scipy(clipped, nifti.affine, grid, window[0])
    body = binary_erosion(expected > (-500 if modality == "ct" else 50), iterations=2)
    error = np.abs(got - expected)[body].mean()
    with capsys.disabled():
        print(
            f"\n{name}: mean absolute difference to nibabel + scipy inside the body {error:.4f}, {body.sum()} voxels"
        )
    assert body.sum() > 1000 and error < 0.05


def release_pipeline(path) -> np.ndarray:
    """The release's preprocessing, step by step as published, without its last scaling: (140, 280, 280) HU."""
    image = sitk.DICOMOrient(sitk.Cast(sitk.ReadImage(path), sitk.sitkFloat32), "RAI")
    size = [max(1, round(n * s)) for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    # first and last face stay where they are, as in a resize: the grid's first centre moves with the voxel's size
    shift = [(1 - s) / 2 for s in image.GetSpacing()]
    direction = np.array(image.GetDirection()).reshape(3, 3)
    origin = np.array(image.GetOrigin()) + direction @ shift
    image = sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, origin.tolist(), (1, 1, 1), image.GetDirection(), -1000.0
    )
    array = sitk.GetArrayFromImage(image)
    for axis, n in enumerate(array.shape):
        array = np.take(array, range(max(0, (n - 364) // 2), max(0, (n - 364) // 2) + min(n, 364)), axis)
        before = (364 - array.shape[axis]) // 2
        pad = [(0, 0)] * 3
        pad[axis] = (before, 364 - array.shape[axis] - before)
        array = np.pad(array, pad, constant_values=-1000)
    tensor = torch.from_numpy(np.clip(array, -1000, 1000))[None, None]
    small = torch.nn.functional.interpolate(tensor, (140, 280, 280), mode="trilinear", align_corners=False)
    return small[0, 0].flip(-1).numpy()


def test_one_resampling_agrees_with_the_release_in_two(capsys):
    path = real("example_ct.nii.gz")
    image = quietly(path)
    grid = model_grid(Geometry.of(image), **RELEASE)
    ours = sitk.GetArrayFromImage(resample(image, grid, window=(-1000, 1000), outside=-1000))
    theirs = release_pipeline(path)
    body = binary_erosion((ours > -500) & (theirs > -500), iterations=3)
    error = np.abs(ours - theirs)[body].mean()
    wrong = np.abs(ours[..., ::-1] - theirs)[body].mean()  # what a flipped axis would give
    with capsys.disabled():
        print(f"\none step against the release's two, inside the body: {error:.2f} HU (flipped: {wrong:.0f} HU)")
    assert error < 6 < 10 * error < wrong


def test_reading_ahead_keeps_the_order_and_raises_in_place():
    sources = [(phantom(seed=s).transpose(2, 1, 0), AFFINE) for s in range(5)]
    for image, (array, _) in zip(volume.read_ahead(sources, read_volume), sources, strict=True):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array.transpose(2, 1, 0))
    reader = volume.read_ahead([sources[0], "nowhere.nii", sources[1]], read_volume, ahead=2)
    assert next(reader).GetSize() == (19, 16, 13)
    with pytest.raises(volume.VolumeError, match="NO_SUCH_FILE"):
        next(reader)


# === Intensity =======================================================================================================


def test_padding_does_not_bleed_into_the_body():
    array = phantom()
    array[array == -1000] = -3024
    grid = {"size": (30, 30, 30), "spacing": (0.9, 0.8, 0.7)}
    plain, padded = (tensor(read_volume((a.transpose(2, 1, 0), AFFINE)), grid=grid) for a in (phantom(), array))
    np.testing.assert_array_equal(plain, padded)


def test_fixed_window_and_minmax():
    x = np.array([[[-2000.0, -500.0], [0.0, 400.0]]], np.float32)
    np.testing.assert_allclose(intensity.scale_intensity(x, window=(-1000, 1000)).ravel(), [0, 0.25, 0.5, 0.7])
    got = intensity.scale_intensity(x, window=(-1000, 1000), scaling="minmax").ravel()
    np.testing.assert_allclose(got, [0, 500 / 1400, 1000 / 1400, 1], rtol=1e-6)
    assert x.min() == -2000  # the caller's array is left alone


def test_mr_window_ignores_background_and_spikes():
    array = np.random.default_rng(1).integers(100, 200, (20, 22, 24)).astype(np.int16)
    array[:8] = 0
    array[15, 15, 15] = 30000
    lo, hi = intensity.intensity_window(read_volume((array, AFFINE)), modality="mr")
    assert 95 <= lo <= 105 and 195 <= hi <= 205
    with pytest.raises(volume.VolumeError, match="MODALITY_UNKNOWN"):
        intensity.intensity_window(read_volume((array, AFFINE)))


def test_modality_follows_the_tag_then_the_values():
    image = read_volume((phantom(), AFFINE))
    assert intensity.find_modality(image) == "ct"
    image.SetMetaData("0008|0060", "MR")
    assert intensity.find_modality(image) == "mr"
    with pytest.raises(volume.VolumeError, match="MODALITY_UNSUPPORTED"):
        intensity.find_modality(image, "ct")
    image.SetMetaData("0008|0060", "PT")
    with pytest.raises(volume.VolumeError, match="SUV"):
        intensity.find_modality(image)


@pytest.mark.parametrize("fake", [phantom() + 1024, (phantom() // 16 + 63).astype(np.uint8), phantom() / 2000.0])
def test_ct_that_is_not_hu_is_refused(fake):
    image = read_volume((fake, AFFINE))
    with pytest.raises(volume.VolumeError, match="NOT_HU"):
        intensity.intensity_window(image, modality="ct")
    assert intensity.intensity_window(image, modality="ct", assume_hu=True) == (-1000, 1000)


# === DICOM and NIfTI of one scan; the way back =======================================================================


def test_dicom_equals_its_nifti(tmp_path):
    folder = real("ct_dicom")
    series = quietly(folder)
    assert intensity.find_modality(series) == "ct"
    names = sorted(folder.iterdir(), key=lambda p: sitk.ReadImage(p).GetOrigin()[2])
    by_itk = sitk.JoinSeries([sitk.Extract(i, (*i.GetSize()[:2], 0)) for i in map(sitk.ReadImage, names)])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(series), sitk.GetArrayFromImage(by_itk))
    sitk.WriteImage(series, tmp_path / "converted.nii.gz")
    other = quietly(tmp_path / "converted.nii.gz")
    x, y = tensor(series, grid=RELEASE), tensor(other, grid=RELEASE)
    assert x.std() > 0.05 and np.abs(x - y).max() < 1e-4


def test_tokens_find_their_way_back_into_the_scan():
    """A block marked on the grid covers, in the scan, the voxels whose centres lie in that block of the grid."""
    image = read_volume((phantom().transpose(2, 1, 0), AFFINE))
    scan = Geometry.of(image)
    grid = model_grid(scan, **SMALL)
    marks = np.zeros(SMALL["size"], np.uint8)
    marks[3:6, 5:9, 2:11] = 7
    back = resample(grid.image(marks), scan, nearest=True, outside=0)
    assert back.GetPixelID() == sitk.sitkUInt8
    got, marked = sitk.GetArrayFromImage(back), grid.image(marks)
    assert 0 < (got == 7).sum() < got.size
    for k, j, i in np.ndindex(*got.shape):
        at = marked.TransformPhysicalPointToContinuousIndex(image.TransformIndexToPhysicalPoint((i, j, k)))
        if all(abs(a % 1 - 0.5) > 0.01 for a in at):  # not on a face between two tokens
            x, y, z = np.floor(np.array(at) + 0.5).astype(int)
            inside = 0 <= x < 17 and 0 <= y < 14 and 0 <= z < 11
            assert got[k, j, i] == (marks[z, y, x] if inside else 0)


def test_the_report_says_what_the_model_sees(tmp_path):
    report = inspect_volume((phantom((40, 44, 48)).transpose(2, 1, 0), np.diag([10.0, 2, 2, 1])))
    assert report.readable and report.intensity["modality"] == "ct"
    assert report.geometry["extent_mm"] == [480.0, 88.0, 80.0] and report.geometry["orientation"] == "RAS"
    assert report.model["share_of_scan_seen"] == pytest.approx(364 / 480, abs=0.04)
    report.picture(tmp_path / "planes.png")
    assert (tmp_path / "planes.png").stat().st_size > 2000
    assert "readable: yes" in str(report)
    axial, coronal, sagittal = (plane.shape for plane, _ in report.planes.values())
    assert (axial, coronal, sagittal) == ((280, 280), (140, 280), (140, 280))


def test_the_picture_is_upright():
    array = np.full((40, 44, 48), -1000, np.int16)
    array[12:28, 12:32, 12:36] = 0  # a body
    array[14:18, 20:24, 22:26] = 1000  # low i: left of the patient
    array[18:22, 28:32, 22:26] = 1000  # high j: front
    array[18:22, 20:24, 32:36] = 1000  # high k: head
    planes = inspect_volume((array, np.diag([4.0, 4, 4, 1]))).planes
    axial, coronal = planes["axial"][0] > 200, planes["coronal"][0] > 200
    rows, columns = np.nonzero(axial)
    front = rows < 128
    assert 0 < front.sum() < front.size
    assert abs(columns[front].mean() - 140) < 3 and columns[~front].mean() > 145  # the patient's left: on the right
    rows = np.nonzero(coronal)[0]
    assert rows.min() < 60 and rows.max() < 80  # the head: at the top
