"""The reader agrees with independent ones on every scan of the test data and on every kind of healthy file.

nibabel reads NIfTI, SimpleITK reads NRRD and MetaImage, pydicom reads DICOM slice by slice.

Run: pytest tests/test_agreement.py
"""

import itertools
import os
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import ImplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from conftest import ROOT
from photon.scan_faults_photon import VolumeError, VolumeFault
from photon.scan_reader_photon import read_volume
from scan_writers import enhanced, hu, setter, write_series

DATA = Path(os.environ.get("PHOTON_TEST_DATA", ROOT.parent / "shared" / "data"))
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def ours(path):
    """(values (z, y, x), affine from voxel to LPS mm)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = read_volume(path)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine


def by_nibabel(path):
    image = nib.load(path)
    return image.get_fdata().transpose(2, 1, 0), TO_LPS @ image.affine


def by_itk(path):
    image = sitk.ReadImage(path)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine


def by_pydicom(folder):
    """Slices sorted along their normal, each with its slope and intercept; positions alone make the affine."""
    slices = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    row, column = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(row, column)
    slices.sort(key=lambda ds: np.array(ds.ImagePositionPatient, float) @ normal)
    array = np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices])
    first, last = (np.array(ds.ImagePositionPatient, float) for ds in (slices[0], slices[-1]))
    down, across = map(float, slices[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * across, column * down, (last - first) / (len(slices) - 1)
    affine[:3, 3] = first
    return array, affine


def agree(path, by, atol=0.0):
    (got, place), (expected, expected_place) = ours(path), by(path)
    np.testing.assert_allclose(got, expected, atol=atol, err_msg=str(path))
    np.testing.assert_allclose(place, expected_place, atol=1e-3, err_msg=str(path))


def test_every_scan_of_the_test_data():
    files = sorted(DATA.rglob("*.nii.gz"))
    if not files:
        pytest.skip("there is no folder of test data (PHOTON_TEST_DATA)")
    for path in files:
        try:
            agree(path, by_nibabel, atol=1e-3)
        except VolumeError as error:  # the mask of an organ that lies outside the scan
            assert error.fault == VolumeFault.CONSTANT_IMAGE and not np.ptp(by_nibabel(path)[0])
    folders = {file.parent for file in DATA.rglob("*.dcm")} | set(DATA.glob("ct_dicom"))
    for folder in folders:
        agree(folder, by_pydicom)


ORIENTATIONS = [  # every way that axes can lie, and oblique ones
    np.eye(3)[list(order)] * np.array(signs)[:, None]
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
] + [np.array(sitk.VersorTransform(axis, angle).GetMatrix()).reshape(3, 3)
     for axis, angle in (((0, 0, 1.0), 0.4), ((0.6, 0, 0.8), -1.1))]  # fmt: skip


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".nhdr", ".mhd"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4"])
def test_every_format_type_and_orientation(suffix, dtype, tmp_path):
    for number, (axes, packed) in enumerate(itertools.product(ORIENTATIONS, (False, True))):
        image = sitk.GetImageFromArray((hu(number) // (8 if dtype == "u1" else 1) % 4000).astype(dtype))
        image.SetSpacing((0.7, 1.3, 2.9)), image.SetOrigin((-31.5, 17.25, 240.0))
        image.SetDirection(axes.ravel().tolist())
        if packed and suffix in (".nii", ".nii.gz"):
            continue
        path = tmp_path / f"{number}{suffix}"
        sitk.WriteImage(image, path, useCompression=packed)
        agree(path, by_nibabel if suffix.startswith(".nii") else by_itk)


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_every_transfer_syntax_and_orientation(syntax, tmp_path):
    if syntax == JPEGLSLossless:
        pytest.importorskip("jpeg_ls", reason="writing JPEG-LS needs pyjpegls")
    voxels = hu(shape=(5, 66, 72))
    for number, axes in enumerate(ORIENTATIONS[::3]):

        def edit(ds, k, axes=axes, number=number):
            ds.ImageOrientationPatient = np.round(axes[:, :2].T.ravel(), 7).tolist()
            ds.ImagePositionPatient = np.round(axes @ [3.0, -4.0, 7 + 2.5 * k], 5).tolist()
            ds.RescaleSlope, ds.RescaleIntercept = 2, -1024 - number
            if syntax is not None and syntax.is_compressed:
                ds.compress(syntax, generate_instance_uid=False)
            elif syntax is not None:
                ds.file_meta.TransferSyntaxUID = syntax

        agree(write_series(tmp_path / str(number), edit, voxels), by_pydicom)


def test_a_multiframe_file_by_frame(tmp_path):
    path = enhanced(tmp_path / "a.dcm", order=[4, 1, 7, 0, 2, 6, 5, 3])
    ds = pydicom.dcmread(path)
    places = [f.PlanePositionSequence[0].ImagePositionPatient for f in ds.PerFrameFunctionalGroupsSequence]
    order = np.argsort([float(p[2]) for p in places])
    got, affine = ours(path)
    np.testing.assert_array_equal(got, ds.pixel_array[order].astype(int) - 1024)
    np.testing.assert_allclose(affine[:3, 3], [float(v) for v in places[order[0]]])


def test_classic_and_enhanced_agree_on_every_place(tmp_path):
    """One exam in both, oblique: within 0.05 mm everywhere."""
    c, s = np.cos(0.3), np.sin(0.3)
    classic = write_series(
        tmp_path / "classic",
        setter(ImageOrientationPatient=[1, 0, 0, 0, c, s], ImagePositionPatient=lambda k: [-5, -2 * k * s, 2 * k * c]),
    )

    def oblique(ds):
        ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, c, s]
        for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
            frame.PlanePositionSequence[0].ImagePositionPatient = [-5, -2 * k * s, 2 * k * c]

    (one, first), (two, second) = ours(classic), ours(enhanced(tmp_path / "enhanced.dcm", oblique))
    np.testing.assert_array_equal(one, two)
    corners = np.array(list(itertools.product((0, 9), (0, 11), (0, 7), (1,)))).T
    assert np.abs((first - second) @ corners).max() < 0.05
