"""Every fault of the table: made on purpose, told by its code, and silent on its clean twin; and no patient data told.

Run: pytest tests/test_faults.py
"""

import gzip
import json
import os
import random
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from photon.scan_reader_photon import read_volume
from photon.scan_report import inspect_volume
from scan_writers import (
    AFFINE,
    SHAPE,
    codes,
    cut,
    damage,
    dataset,
    edited,
    enhanced,
    from_itk,
    hu,
    nifti,
    notes,
    patched,
    setter,
    symlink,
    write_series,
    written,
)

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("PHOTON_TEST_DATA", ROOT.parent / "shared" / "data"))
volume = sys.modules[read_volume.__module__]
package = read_volume.__module__.rpartition(".")[0]
faults, dicom = (sys.modules[f"{package}.{name}"] for name in ("scan_faults_photon", "scan_dicom_photon"))
Fault, VolumeError, VolumeWarning = volume.VolumeFault, volume.VolumeError, volume.VolumeWarning
# === DICOM faults: (code, how the series is damaged) =================================================================


def z(step):
    return setter(ImagePositionPatient=lambda k: [-5, -7, 100 + step(k)])


def repeat_slice(ds, k):
    if k == 3:
        ds.SOPInstanceUID, ds.ImagePositionPatient = "9.9.9", [-5, -7, 104.0]


DICOM_FAULTS = {
    "gap": (Fault.MISSING_SLICES, lambda ds, k: k != 4),
    "uneven": (Fault.SLICE_INCREMENT_INCONSISTENT, z(lambda k: 2.0 * k + (0.5 if k == 3 else 0))),
    "slightly uneven": (Fault.SLICE_INCREMENT_INCONSISTENT, z(lambda k: 2.0 * k + (0.008 if k == 3 else 0))),
    "tilt": (Fault.GANTRY_TILT, setter(ImagePositionPatient=lambda k: [-5, -7 + 0.6 * k, 100 + 2 * k])),
    "shifted slice": (
        Fault.SLICE_INCREMENT_INCONSISTENT,
        setter(ImagePositionPatient=lambda k: [-5 + 4 * (k == 3), -7, 100 + 2 * k]),
    ),
    "turned slice": (
        Fault.IMAGE_ORIENTATION_INCONSISTENT,
        setter(ImageOrientationPatient=lambda k: [1, 0, 0, 0, 0, 1] if k == 3 else [1, 0, 0, 0, 1, 0]),
    ),
    "axes not square": (Fault.DEGENERATE_AFFINE, setter(ImageOrientationPatient=[1, 0, 0, 0.5, 0.866, 0])),
    "duplicates": (Fault.DUPLICATE_SLICES, repeat_slice),
    "phases": (
        Fault.SEVERAL_FRAMES,
        setter(
            ImagePositionPatient=lambda k: [-5, -7, 100 + 2 * (k // 2)], TemporalPositionIdentifier=lambda k: k % 2
        ),
    ),
    "spacing differs": (Fault.INCONSISTENT_SLICES, setter(PixelSpacing=lambda k: [0.7, 0.9 + (k == 3)])),
    "no spacing": (Fault.NO_GEOMETRY, lambda ds, k: delattr(ds, "PixelSpacing")),
    "no position": (Fault.NO_GEOMETRY, lambda ds, k: delattr(ds, "ImagePositionPatient")),
    "zero spacing": (Fault.DEGENERATE_AFFINE, setter(PixelSpacing=[0.0, 0.9])),
    "few slices": (Fault.TOO_FEW_SLICES, lambda ds, k: k < 3),
    "several series": (Fault.SEVERAL_SERIES, setter(SeriesInstanceUID=lambda k: f"1.2.{k // 4}")),
    "two patients": (Fault.SEVERAL_SERIES, setter(PatientID=lambda k: f"P{k // 4}")),
    "monochrome1": (Fault.MONOCHROME1, setter(PhotometricInterpretation="MONOCHROME1")),
    "mixed photometric": (
        Fault.INCONSISTENT_SLICES,
        setter(PhotometricInterpretation=lambda k: f"MONOCHROME{1 + k % 2}"),
    ),
    "colour": (Fault.NOT_SCALAR, setter(PhotometricInterpretation="RGB", SamplesPerPixel=3)),
    "lossy": (Fault.LOSSY_COMPRESSION, setter(LossyImageCompression="01")),
    "constant": (
        Fault.CONSTANT_IMAGE,
        lambda ds, k: setattr(ds, "PixelData", np.full(SHAPE[1:], 1024, "<u2").tobytes()),
    ),
    "short voxels": (Fault.DAMAGED_FILE, lambda ds, k: setattr(ds, "PixelData", ds.PixelData[:-40])),
    "an intercept missing": (
        Fault.INCONSISTENT_SLICES,
        lambda ds, k: delattr(ds, "RescaleIntercept") if k == 3 else None,
    ),
    "table of values": (Fault.NOT_HU, setter(ModalityLUTSequence=[Dataset()])),
    "electron density": (Fault.NOT_HU, setter(RescaleType="ED")),
    "12 bits packed": (Fault.DAMAGED_FILE, setter(BitsAllocated=12)),
    "no voxels": (Fault.DAMAGED_FILE, lambda ds, k: delattr(ds, "PixelData") if k == 3 else None),
    "frames without places": (Fault.NO_GEOMETRY, setter(NumberOfFrames=4)),
}


@pytest.mark.parametrize("name", DICOM_FAULTS)
def test_dicom_fault(name, tmp_path):
    fault, edit = DICOM_FAULTS[name]
    assert codes(write_series(tmp_path / "faulty", edit)) == {fault}
    assert codes(write_series(tmp_path / "clean")) == set()


def test_the_clean_series_is_right(tmp_path):
    image = read_volume(write_series(tmp_path / "clean"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), hu())
    assert image.GetSpacing() == pytest.approx((0.9, 0.7, 2.0))  # columns are PixelSpacing[1]
    assert image.GetOrigin() == pytest.approx((-5, -7, 100)) and image.GetPixelID() == sitk.sitkInt16
    assert notes(tmp_path / "clean") == {"ANISOTROPIC_IN_PLANE"}
    assert notes(write_series(tmp_path / "square", spacing=(0.8, 0.8))) == set()


def test_a_reversed_stack_and_an_oblique_one_are_right(tmp_path):
    image = read_volume(write_series(tmp_path / "clean"))
    down = read_volume(write_series(tmp_path / "down", step=-2.0))
    assert down.GetDirection() == image.GetDirection() and down.GetOrigin()[2] == pytest.approx(86)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(down), hu()[::-1])
    c, s = np.cos(0.3), np.sin(0.3)
    edit = setter(
        ImageOrientationPatient=[1, 0, 0, 0, c, s], ImagePositionPatient=lambda k: [0, -2 * k * s, 2 * k * c]
    )
    oblique = read_volume(write_series(tmp_path / "oblique", edit))
    np.testing.assert_allclose(oblique.GetDirection(), [1, 0, 0, 0, c, -s, 0, s, c], atol=1e-6)
    assert "OBLIQUE" in notes(tmp_path / "oblique") and codes(tmp_path / "oblique") == set()


def test_tilt_reports_its_degrees_and_keeps_every_voxel_in_its_place(tmp_path):
    folder = write_series(tmp_path / "tilt", DICOM_FAULTS["tilt"][1])
    with pytest.warns(VolumeWarning, match=r"16\.70 degrees"):  # atan(0.6 / 2)
        image = read_volume(folder)
    assert image.TransformIndexToPhysicalPoint((4, 5, 6)) == pytest.approx((-5 + 3.6, -7 + 3.5 + 3.6, 112))
    assert codes(folder, tilt="refuse") == {Fault.GANTRY_TILT}


def test_gaps_tell_their_place_and_are_filled_on_request(tmp_path):
    ramp = hu() * 0 + np.arange(8, dtype=np.int16)[:, None, None] * 100 - 300
    folder = write_series(tmp_path / "gap", lambda ds, k: k not in (4, 5), voxels=ramp)
    with pytest.raises(VolumeError, match=r"slices 4 and 5 of 6 .* 6\.000 mm, elsewhere 2\.000 mm"):
        read_volume(folder)
    with pytest.warns(VolumeWarning, match="MISSING_SLICES"):
        image = read_volume(folder, gaps="interpolate")
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), ramp)  # linear voxels: the gap is filled exactly
    assert image.GetSpacing()[2] == pytest.approx(2)


def test_slope_and_intercept_by_slice(tmp_path):
    stored = np.random.default_rng(3).integers(0, 4000, SHAPE)
    edit = setter(
        RescaleSlope=lambda k: 0.25 * (k + 1), RescaleIntercept=lambda k: -1000 - k, PixelData=lambda k:
        stored[k].astype("<u2").tobytes()
    )  # fmt: skip
    folder = write_series(tmp_path / "slopes", edit)
    k = np.arange(8)[:, None, None]
    np.testing.assert_allclose(
        sitk.GetArrayFromImage(read_volume(folder)), stored * 0.25 * (k + 1) - 1000 - k, rtol=1e-6
    )
    assert codes(folder) == set() and "SLOPE_VARIES" in notes(folder)


def test_values_beyond_int16_are_kept(tmp_path):
    stored = np.random.default_rng(3).integers(0, 65535, SHAPE)
    folder = write_series(
        tmp_path / "wide", setter(BitsStored=16, HighBit=15, PixelData=lambda k: stored[k].astype("<u2").tobytes())
    )
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), stored - 1024)


def test_phases_and_series_are_chosen_by_name(tmp_path):
    folder = write_series(tmp_path / "phases", DICOM_FAULTS["phases"][1])
    for frame in (0, 1):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder, frame=frame)), hu()[frame::2])
    assert codes(folder, frame=2) == {Fault.SEVERAL_FRAMES}
    folder = write_series(tmp_path / "series", series="1.2.3.5")
    write_series(folder, voxels=hu(1), series="1.2.3.6", prefix="other")
    with pytest.raises(VolumeError, match="1: CT, 8 slices of 12 x 10; 2: CT, 8 slices") as error:
        read_volume(folder)
    assert "1.2.3.5" not in str(error.value)
    for series, seed in ((1, 0), (2, 1), ("1.2.3.5", 0), ("1.2.3.6", 1)):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder, series=series)), hu(seed))
    assert codes(folder, series=3) == {Fault.SEVERAL_SERIES} == codes(folder, series="")


def test_localisers_notes_and_copies_beside_a_series(tmp_path):
    folder = write_series(tmp_path / "scan")
    write_series(folder, setter(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), series="1.2.3.7", prefix="scout")
    assert codes(folder) == {Fault.TOO_FEW_SLICES}
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder, series="1.2.3.4")), hu())
    stray = write_series(tmp_path / "stray", setter(SeriesInstanceUID=lambda k: "1.2.9" if k == 0 else "1.2.8"))
    assert codes(stray) == {Fault.SEVERAL_SERIES}  # a lone slice may belong to the scan: not left out in silence
    folder = write_series(tmp_path / "notes")
    (folder / "readme.txt").write_text("nothing of interest")
    assert codes(folder) == {Fault.NON_IMAGING_DICOM_FILES}
    folder = write_series(tmp_path / "copies")
    shutil.copy(next(folder.iterdir()), folder / "copy.dcm")
    with pytest.warns(VolumeWarning, match="DUPLICATE_SLICES.* 1 slices are copies"):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), hu())


def test_monochrome1_is_read_as_told(tmp_path):
    folder = write_series(tmp_path / "mono", setter(PhotometricInterpretation="MONOCHROME1"))
    with pytest.warns(VolumeWarning, match="as stored"):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder, monochrome1="as_stored")), hu())
    with pytest.warns(VolumeWarning, match="invert"):
        inverted = sitk.GetArrayFromImage(read_volume(folder, monochrome1="invert"))
    np.testing.assert_array_equal(inverted, 4095 - (hu() + 1024) - 1024)


def beside(folder: Path, name: str, content: bytes) -> Path:
    written(folder / name, content)
    return folder


def test_what_lies_beside_the_slices(tmp_path):
    """A pipe does not make the reader wait, a Mac's notes leave a series unharmed, a link to nowhere is refused."""
    folder = write_series(tmp_path / "pipe")
    os.mkfifo(folder / "pipe")
    assert codes(folder) == {Fault.NON_IMAGING_DICOM_FILES}
    for path in list((folder := write_series(tmp_path / "mac")).iterdir()):
        beside(folder, f"._{path.name}", b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(4000))
    with pytest.warns(VolumeWarning, match="8 of 16 files are no DICOM images"):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), hu())
    folder = write_series(tmp_path / "link")
    symlink(folder / "link.dcm", Path("nowhere.dcm"))
    assert codes(folder) == {Fault.NO_SUCH_FILE}
    assert codes(beside(write_series(tmp_path / "empty"), "empty.dcm", b"")) == {Fault.DAMAGED_FILE}


def test_slices_without_preamble_and_file_meta(tmp_path):
    folder = write_series(tmp_path / "bare")
    for path in folder.iterdir():
        data = path.read_bytes()
        path.write_bytes(data[data.index(b"\x08\0\x08\0CS") :])
    assert codes(folder) == set()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), hu())


def test_padding_and_pixel_types_keep_their_values(tmp_path):
    """Signed voxels with padding below air, dirty bits above those stored, 8 and 32 bits."""
    padded = hu()
    padded[:, :3, :2] = -2000

    def signed(ds, k):
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit, ds.RescaleIntercept = 1, 16, 15, 0
        ds.PixelPaddingValue, ds.PixelData = -2000, padded[k].astype("<i2").tobytes()

    def dirty(ds, k):
        ds.PixelData = ((hu()[k].astype(int) + 1024) | 0xF000).astype("<u2").tobytes()

    def wide(ds, k):
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 32, 32, 31
        ds.PixelData = (hu()[k].astype("<i4") + 1024).tobytes()

    for name, edit, expected in (("signed", signed, padded), ("dirty", dirty, hu()), ("wide", wide, hu())):
        folder = write_series(tmp_path / name, edit)
        assert codes(folder) == set(), name
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), expected, err_msg=name)
    # one intercept for air and for padding: the padding lies outside the window and is clipped before interpolation
    grid = {"size": (9, 14, 11), "spacing": (2.1, 0.6, 0.8)}
    seen = [volume.read_on_grid(tmp_path / name, **grid)[0] for name in ("signed", "wide")]
    np.testing.assert_array_equal(*seen)


# === Transfer syntaxes ===============================================================================================


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_every_transfer_syntax_gives_the_same_voxels(syntax, tmp_path, monkeypatch):
    if syntax == JPEGLSLossless:
        pytest.importorskip("jpeg_ls", reason="writing JPEG-LS needs pyjpegls")

    def edit(ds, k):
        if syntax.is_compressed:
            ds.compress(syntax, generate_instance_uid=False)
        else:
            ds.file_meta.TransferSyntaxUID = syntax

    voxels = hu(shape=(5, 72, 66))  # JPEG 2000 wants room for its resolutions
    folder = write_series(tmp_path / "packed", edit, voxels)
    assert codes(folder) == set()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), voxels)
    if syntax.is_compressed:  # and without any plugin, by the GDCM inside SimpleITK
        monkeypatch.setattr(dicom, "get_decoder", lambda uid: type("None", (), {"is_available": False}))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), voxels)


def test_big_endian(tmp_path):
    folder = tmp_path / "big"
    folder.mkdir()
    for k, plane in enumerate(hu()):
        ds = dataset(k, plane)
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        pydicom.dcmwrite(folder / f"{k}.dcm", ds, implicit_vr=False, little_endian=False, force_encoding=True)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), hu())


def test_jpeg_lossless_written_by_gdcm(tmp_path):
    clean = write_series(tmp_path / "clean")
    folder = tmp_path / "jpeg"
    folder.mkdir()
    for path in clean.iterdir():
        image = sitk.ReadImage(path)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn(), writer.UseCompressionOn(), writer.SetCompressor("JPEG")
        writer.SetFileName(str(folder / path.name))
        writer.Execute(image)
    syntaxes = {str(pydicom.dcmread(p).file_meta.TransferSyntaxUID) for p in folder.iterdir()}
    assert syntaxes == {"1.2.840.10008.1.2.4.70"}
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), hu())


def test_what_gdcm_refuses_is_damage_and_its_message_stays_inside(tmp_path, monkeypatch):
    folder = write_series(
        tmp_path / "packed",
        lambda ds, k: ds.compress(JPEG2000Lossless, generate_instance_uid=False),
        hu(shape=(5, 72, 66)),
    )
    monkeypatch.setattr(dicom, "get_decoder", lambda uid: type("None", (), {"is_available": False}))
    monkeypatch.setattr(sitk.ImageFileReader, "Execute", lambda self: (_ for _ in ()).throw(RuntimeError("/secret")))
    with pytest.raises(VolumeError) as error:
        read_volume(folder)
    assert error.value.fault == Fault.DAMAGED_FILE and "secret" not in str(error.value)


# === Enhanced multi-frame ============================================================================================


def test_enhanced_multiframe_equals_the_classic_series(tmp_path):
    classic = read_volume(write_series(tmp_path / "classic"))
    path = enhanced(tmp_path / "enhanced.dcm", order=[3, 1, 7, 0, 2, 6, 5, 4])
    image = read_volume(path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(classic))
    assert volume.Geometry.of(image) == volume.Geometry.of(classic)
    assert codes(path) == set() and "MULTIFRAME" in notes(path)
    packed = enhanced(tmp_path / "packed.dcm", lambda ds: ds.compress(RLELossless, generate_instance_uid=False))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(packed)), hu())


def test_enhanced_multiframe_faults(tmp_path):
    def no_places(ds):
        for frame in ds.PerFrameFunctionalGroupsSequence:
            del frame.PlanePositionSequence

    assert codes(enhanced(tmp_path / "a.dcm", no_places)) == {Fault.NO_GEOMETRY}
    assert codes(enhanced(tmp_path / "b.dcm", setter_of(NumberOfFrames=7))) == {Fault.HEADER_LIES}
    assert codes(enhanced(tmp_path / "c.dcm", order=[0, 1, 2, 4, 5, 6, 7])) == {Fault.MISSING_SLICES}
    phases = enhanced(tmp_path / "d.dcm", phases=2)
    assert codes(phases) == {Fault.SEVERAL_FRAMES}
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(phases, frame=1)), hu(1))


def setter_of(**tags):
    return lambda ds: [setattr(ds, name, value) for name, value in tags.items()]


# === Files ===========================================================================================================


def as_other(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


def numpy_file(path: Path) -> Path:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return path


def members(folder: Path) -> Path:
    """A .nii.gz of three gzip members, as parallel compressors write."""
    raw = nifti(folder / "plain.nii").read_bytes()
    parts = [raw[:500], raw[500:1200], raw[1200:]]
    return written(folder / "a.nii.gz", b"".join(gzip.compress(part) for part in parts))


def no_forms(image):
    image.set_sform(None, 0), image.set_qform(None, 0)


def other_qform(image):
    turned = AFFINE.copy()
    turned[0, 3] += 3
    image.set_sform(AFFINE, 1), image.set_qform(turned, 1)


def extended(image):
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Zzyzx " * 50))


def agreeing_qform(image):
    image.set_sform(AFFINE, 1), image.set_qform(AFFINE, 1)


def linked_raw(tmp: Path) -> Path:
    from_itk(tmp / "other.mhd", hu(5))
    path = from_itk(tmp / "a.mhd")
    (tmp / "a.raw").unlink()
    (tmp / "a.raw").symlink_to(tmp / "other.raw")
    return path


holes = hu().astype(np.float32).transpose(2, 1, 0).copy()
holes[3, 3, 3] = np.nan
FILE_FAULTS = {
    "pipe": (Fault.NO_SUCH_FILE, lambda t: os.mkfifo(t / "a.nii.gz") or t / "a.nii.gz"),
    "device": (Fault.NO_SUCH_FILE, lambda t: Path("/dev/zero")),
    "path too long": (Fault.NO_SUCH_FILE, lambda t: t / ("Doe_Jane" * 600)),
    "gz members": (Fault.DAMAGED_FILE, lambda t: patched(members(t), -8, b"\1\2\3\4")),
    "missing": (Fault.NO_SUCH_FILE, lambda t: t / "Doe_Jane.nii.gz"),
    "empty": (Fault.NOT_A_SCAN, lambda t: written(t / "a.nii", b"")),
    "text": (Fault.NOT_A_SCAN, lambda t: written(t / "a.nii", "this is a letter " * 99)),
    "gzipped text": (Fault.NOT_A_SCAN, lambda t: written(t / "a.nii.gz", gzip.compress(b"a letter " * 99))),
    "gz that is none": (Fault.MISLABELLED_FILE, lambda t: as_other(nifti(t / "a.nii"), "b.nrrd")),
    "dicom as nifti": (
        Fault.MISLABELLED_FILE,
        lambda t: as_other(enhanced(t / "a.dcm"), "a.nii"),
    ),
    "one slice": (Fault.TOO_FEW_SLICES, lambda t: next(write_series(t / "s").iterdir())),
    "empty folder": (Fault.NOT_A_SCAN, lambda t: t),
    "folder of text": (Fault.NON_IMAGING_DICOM_FILES, lambda t: written(t / "a.txt", "a").parent),
    "not dicom": (Fault.DAMAGED_FILE, lambda t: written(t / "a.dcm", "a" * 500).parent),
    "2D": (Fault.NOT_THREE_DIMENSIONAL, lambda t: from_itk(t / "a.mha", hu()[0])),
    "2D NIfTI": (Fault.NOT_THREE_DIMENSIONAL, lambda t: nifti(t / "a.nii", array=hu()[0])),
    "flat": (Fault.TOO_FEW_SLICES, lambda t: nifti(t / "a.nii", array=hu()[:, :, :1])),
    "4D": (Fault.SEVERAL_FRAMES, lambda t: nifti(t / "a.nii.gz", array=np.stack([hu(), hu()], -1))),
    "5D": (Fault.NOT_THREE_DIMENSIONAL, lambda t: nifti(t / "a.nii", array=np.zeros((5, 5, 5, 2, 2), np.int16))),
    "vector": (Fault.NOT_SCALAR, lambda t: from_itk(t / "a.mha", hu(shape=(6, 7, 8, 3)), vector=True)),
    "colour": (
        Fault.NOT_SCALAR,
        lambda t: nifti(t / "a.nii", array=np.zeros((6, 7, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])),
    ),
    "complex": (Fault.NOT_SCALAR, lambda t: nifti(t / "a.nii", array=np.zeros((6, 7, 8), np.complex64))),
    "huge": (Fault.TOO_LARGE, lambda t: patched(nifti(t / "a.nii"), 42, b"\x30\x75" * 3)),
    "huge gz": (
        Fault.TOO_LARGE,
        lambda t: written(
            t / "b.nii.gz", gzip.compress(patched(nifti(t / "a.nii"), 42, b"\x30\x75" * 3).read_bytes())
        ),
    ),
    "header says more": (Fault.HEADER_LIES, lambda t: patched(nifti(t / "a.nii"), 46, b"\x60")),
    "header says less": (Fault.HEADER_LIES, lambda t: patched(nifti(t / "a.nii"), 46, b"\x05")),
    "gz bomb": (
        Fault.HEADER_LIES,
        lambda t: written(
            t / "b.nii.gz", gzip.compress(patched(nifti(t / "a.nii"), 42, b"\xe8\x03" * 3).read_bytes())
        ),
    ),
    "nrrd says more": (Fault.HEADER_LIES, lambda t: edited(from_itk(t / "a.nrrd"), b"10 12 8", b"10 12 80")),
    "mha says more": (Fault.HEADER_LIES, lambda t: edited(from_itk(t / "a.mha"), b"10 12 8", b"10 12 80")),
    "mha huge": (Fault.TOO_LARGE, lambda t: edited(from_itk(t / "a.mha"), b"10 12 8", b"9999 9999 9999")),
    "truncated nii": (Fault.HEADER_LIES, lambda t: cut(nifti(t / "a.nii"), 0.9)),
    "truncated gz": (Fault.DAMAGED_FILE, lambda t: cut(nifti(t / "a.nii.gz"), 0.9)),
    "checksum": (Fault.DAMAGED_FILE, lambda t: patched(nifti(t / "a.nii.gz"), -8, b"\1\2\3\4")),
    "truncated nrrd": (Fault.HEADER_LIES, lambda t: cut(from_itk(t / "a.nrrd"), 0.9)),
    "truncated mha": (Fault.HEADER_LIES, lambda t: cut(from_itk(t / "a.mha"), 0.9)),
    "pickle": (Fault.PICKLED_ARRAY, lambda t: numpy_file(t / "a.npy")),
    "no forms": (Fault.NO_GEOMETRY, lambda t: nifti(t / "a.nii", no_forms)),
    "no nrrd space": (
        Fault.NO_GEOMETRY,
        lambda t: edited(from_itk(t / "a.nrrd"), b"space: left-posterior-superior", b"# none of all that is here."),
    ),
    "no mha matrix": (Fault.NO_GEOMETRY, lambda t: edited(from_itk(t / "a.mha"), b"TransformMatrix", b"Comment")),
    "mha scale": (
        Fault.NOT_HU,
        lambda t: edited(from_itk(t / "a.mha"), b"ElementType", b"ElementToIntensityFunctionSlope = 2\nElementType"),
    ),
    "flat affine": (Fault.DEGENERATE_AFFINE, lambda t: patched(nifti(t / "a.nii"), 312, bytes(16))),  # srow_z
    "nan affine": (Fault.DEGENERATE_AFFINE, lambda t: patched(nifti(t / "a.nii"), 300, b"\0\0\xc0\x7f")),  # srow_y
    "sheared": (
        Fault.SHEARED_AFFINE,
        lambda t: nifti(t / "a.nii", affine=AFFINE + np.eye(4)[:, [3, 2, 1, 0]] * [[0], [0.3], [0], [0]]),
    ),
    "qform and sform": (Fault.QFORM_SFORM_DISAGREE, lambda t: nifti(t / "a.nii", other_qform)),
    "metres": (Fault.UNIT_NOT_MILLIMETRE, lambda t: nifti(t / "a.nii", lambda i: i.header.set_xyzt_units("meter"))),
    "nan": (Fault.NON_FINITE, lambda t: nifti(t / "a.nii", array=holes)),
    "constant": (Fault.CONSTANT_IMAGE, lambda t: nifti(t / "a.nii", array=np.full((6, 7, 8), 5, np.int16))),
    "pair": (Fault.EXTERNAL_DATA_FILE, lambda t: from_itk(t / "a.img").with_suffix(".hdr")),
    "mhd elsewhere": (
        Fault.EXTERNAL_DATA_FILE,
        lambda t: edited(from_itk(t / "a.mhd"), b"a.raw", b"/etc/hostname"),
    ),
    "mhd above": (Fault.EXTERNAL_DATA_FILE, lambda t: edited(from_itk(t / "a.mhd"), b"a.raw", b"../a.raw")),
    "mhd other": (Fault.EXTERNAL_DATA_FILE, lambda t: edited(from_itk(t / "a.mhd"), b"a.raw", b"b.raw")),
    "mhd link": (Fault.EXTERNAL_DATA_FILE, linked_raw),
    "nhdr elsewhere": (Fault.EXTERNAL_DATA_FILE, lambda t: edited(from_itk(t / "a.nhdr"), b"a.raw", b"/etc/hostname")),
}
CLEAN = {
    ".nii": lambda t: nifti(t / "clean.nii", agreeing_qform),
    ".gz": lambda t: nifti(t / "clean.nii.gz"),
    ".gz of several members": members,
    ".gz and zeros": lambda t: written(t / "b.nii.gz", nifti(t / "a.nii.gz").read_bytes() + bytes(512)),
    "extensions": lambda t: nifti(t / "clean.nii", extended),
    "slope 0": lambda t: patched(nifti(t / "clean.nii"), 112, bytes(8)),
    "slope NaN": lambda t: patched(nifti(t / "clean.nii"), 112, b"\0\0\xc0\x7f" * 2),
    "qform alone": lambda t: nifti(t / "clean.nii", lambda i: (i.set_qform(AFFINE, 1), i.set_sform(None, 0))),
    "odd path": lambda t: nifti(t / "J\u00f6rg \u2603 \u809d scan.nii.gz"),
    ".nrrd": lambda t: from_itk(t / "clean.nrrd"),
    ".nhdr": lambda t: from_itk(t / "clean.nhdr"),
    ".mha": lambda t: from_itk(t / "clean.mha"),
    ".mhd": lambda t: from_itk(t / "clean.mhd"),
}


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_file_fault(name, tmp_path):
    fault, make = FILE_FAULTS[name]
    (tmp_path / "faulty").mkdir()
    path = make(tmp_path / "faulty")
    assert codes(path) == {fault}
    assert notes(path) >= {fault.value}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            read_volume(path)
        except VolumeError as error:
            text = str(error)
            assert error.__cause__ is None and len(text) > 40
        else:
            text = str(caught[0].message)
    for part in (path.stem, str(tmp_path)):
        assert len(part) < 3 or part not in text


@pytest.mark.parametrize("suffix", CLEAN)
def test_clean_file(suffix, tmp_path):
    path = CLEAN[suffix](tmp_path)
    assert codes(path) == set()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(path)), hu())


def test_links_out_of_a_folder(tmp_path):
    folder = write_series(tmp_path / "scan", lambda ds, k: k != 3)
    other = write_series(tmp_path / "other", lambda ds, k: k == 3)
    symlink(folder / "link.dcm", next(other.iterdir()))
    assert codes(folder) == {Fault.LINK_LEAVES_FOLDER}
    (folder / "link.dcm").unlink()
    shutil.copy(next(other.iterdir()), folder)
    symlink(tmp_path / "shortcut", folder)  # a link to the folder itself is the caller's own choice
    assert codes(folder) == set() == codes(tmp_path / "shortcut")


def test_objects_in_memory(tmp_path):
    array = hu().transpose(2, 1, 0)
    assert codes((array, np.eye(3))) == {Fault.NO_GEOMETRY}
    assert codes((array[0], AFFINE)) == {Fault.NOT_THREE_DIMENSIONAL}
    assert codes((np.stack([array] * 2, -1), AFFINE)) == {Fault.SEVERAL_FRAMES}
    assert codes((array.astype(complex), AFFINE)) == {Fault.NOT_SCALAR}
    assert codes((array, AFFINE), max_voxels=array.size - 1) == {Fault.TOO_LARGE}
    assert codes((array, AFFINE), max_voxels=array.size) == set()
    assert codes(sitk.GetImageFromArray(hu()[0])) == {Fault.NOT_THREE_DIMENSIONAL}
    assert codes(sitk.GetImageFromArray(hu(shape=(6, 7, 8, 3)), isVector=True)) == {Fault.NOT_SCALAR}
    assert codes(sitk.GetImageFromArray(np.full(SHAPE, np.inf))) == {Fault.NON_FINITE}
    image = nib.Nifti1Image(array, AFFINE)
    no_forms(image)
    assert codes(image) == {Fault.NO_GEOMETRY}
    with pytest.raises(TypeError, match="geometry"):
        read_volume(array)
    with pytest.raises(ValueError, match="tilt"):
        read_volume((array, AFFINE), tilt="ignore")


def test_non_finite_voxels_are_filled_on_request():
    with pytest.warns(VolumeWarning, match="1 of 960"):
        image = read_volume((holes, AFFINE), fill_nonfinite=-1000)
    assert image.GetPixel(3, 3, 3) == -1000 and np.isfinite(sitk.GetArrayFromImage(image)).all()


def test_every_code_has_a_policy_and_a_test():
    assert set(faults.POLICY) == set(Fault) and faults.policy_table().count("\n") == len(Fault) + 1
    names = ("test_faults.py", "test_volume.py", "test_dicom_series.py", "test_text_headers.py")
    source = "".join(Path(__file__).with_name(name).read_text("utf-8") for name in names)
    assert not [fault.name for fault in Fault if f"Fault.{fault.name}" not in source and fault.name not in source]


def test_errors_and_warnings_cross_processes():
    import pickle

    for kind in (faults.VolumeError, faults.VolumeWarning):
        twin = pickle.loads(pickle.dumps(kind(Fault.NOT_HU, "a message")))
        assert twin.fault is Fault.NOT_HU and str(twin) == "[NOT_HU] a message"


# === Nothing of the patient gets out =================================================================================

SECRETS = ["Zzyzx", "MRN55173", "19470229", "8.7.6543210", "Quandary", "Saint-Nowhere"]


def test_planted_patient_data_is_told_nowhere(tmp_path, capfd, caplog):
    """Every DICOM fault on a series full of planted tags: messages, warnings, logs, output, reports, images."""

    def plant(ds):
        ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Zzyzx^Quandary", "MRN55173", "19470229"
        ds.StudyDate = ds.AcquisitionDate = "19470229"
        ds.InstitutionName, ds.StudyDescription = "Saint-Nowhere", "Quandary of Zzyzx"
        ds.SeriesInstanceUID = ds.SeriesInstanceUID.replace("1.2.", "8.7.6543210.")
        block = ds.private_block(0x0011, "Quandary", create=True)
        block.add_new(0x01, "LO", "Zzyzx MRN55173")

    told = []
    for number, (fault, edit) in enumerate([(None, lambda ds, k: None), *DICOM_FAULTS.values()]):

        def both(ds, k, edit=edit):
            plant(ds)
            return edit(ds, k)

        folder = write_series(tmp_path / f"Zzyzx_{number}", both, prefix="MRN55173_")
        with warnings.catch_warnings(record=True) as caught, caplog.at_level("DEBUG"):
            warnings.simplefilter("always")
            try:
                image = read_volume(folder, series=None)
                told += [image.GetMetaData(key) for key in image.GetMetaDataKeys()]
                sitk.WriteImage(image, tmp_path / "export.nii")
                told.append((tmp_path / "export.nii").read_bytes().decode("latin-1"))
            except VolumeError as error:
                told += [str(error), repr(error), repr(error.__cause__)]
                assert fault is not None and error.__suppress_context__ or error.__context__ is None
        told += [str(w.message) for w in caught]
        report = inspect_volume(folder)
        told += [str(report), repr(report), json.dumps(report.as_dict())]
    out = capfd.readouterr()
    told = "\n".join([*told, caplog.text, out.out, out.err])
    assert "NON_CUBICAL_IMAGE/GANTRY_TILT" in told and len(told) > 5000
    assert not [secret for secret in [*SECRETS, str(tmp_path)] if secret in told]


# === Damage at random ================================================================================================


def survives(source, good: np.ndarray, allowed: float) -> str:
    """Reads a damaged scan: refused by code, or right but for what no checksum guards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = read_volume(source)
        except VolumeError:
            return "refused"
    got = sitk.GetArrayFromImage(image)
    if got.shape != good.shape:
        return f"another shape: {got.shape}"
    return "read" if (got != good).mean() <= allowed else "another scan"


def test_a_hundred_damages_of_a_real_series(tmp_path):
    source = DATA / "ct_dicom"
    if not source.exists():
        pytest.skip("ct_dicom is not in the folder of test data (PHOTON_TEST_DATA)")
    folder, dice = tmp_path / "scan", random.Random(20)
    folder.mkdir()
    names = sorted(source.iterdir())[:5]
    for path in names:
        shutil.copyfile(path, folder / path.name)
    good = sitk.GetArrayFromImage(read_volume(folder))
    outcomes = []
    for _ in range(100):
        victim = dice.choice(names)
        data = victim.read_bytes()
        head = dice.random() < 0.7  # most of the bytes are voxels; the headers are where it gets interesting
        bad = damage(data[:6000], dice) + data[6000:] if head else damage(data, dice)
        (folder / victim.name).write_bytes(bad)
        outcomes.append(survives(folder, good, allowed=0.25))  # one slice in five may decode to other voxels
        (folder / victim.name).write_bytes(data)
    assert set(outcomes) <= {"refused", "read"} and outcomes.count("refused") > 20, set(outcomes)


@pytest.fixture
def real_slices(tmp_path):
    """Six neighbouring files of the real series in a folder, from the lowest, and their voxels (6, rows, columns)."""
    source = DATA / "ct_dicom"
    if not source.exists():
        pytest.skip("ct_dicom is not in the folder of test data (PHOTON_TEST_DATA)")
    files = sorted(source.iterdir(), key=lambda p: sitk.ReadImage(p).GetOrigin()[2])[:6]
    folder = tmp_path / "scan"
    folder.mkdir()
    files = [Path(shutil.copyfile(file, folder / f"{number}.dcm")) for number, file in enumerate(files)]
    return folder, files, sitk.GetArrayFromImage(read_volume(folder))


def test_slices_of_a_real_series_lost_copied_and_exchanged(real_slices):
    folder, files, good = real_slices
    held = [file.read_bytes() for file in files]
    for number, file in enumerate(files):
        inner = 0 < number < len(files) - 1
        rest = np.delete(good, number, 0)
        other = held[number - 1 if number else 1]
        for content, expected in ((None, set()), (other, {Fault.DUPLICATE_SLICES})):  # lost, or overwritten
            file.unlink() if content is None else file.write_bytes(content)
            assert codes(folder) == ({Fault.MISSING_SLICES} if inner else expected)
            if not inner:  # that there was a slice more at the end, nobody can tell
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), rest)
        file.write_bytes(held[number])
    files[1].write_bytes(held[4]), files[4].write_bytes(held[1])  # names mean nothing
    assert codes(folder) == set()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), good)


def test_header_damages_of_a_real_series_change_no_voxel(real_slices):
    """Damage before the voxels is refused or without effect; voxels themselves carry no checksum in DICOM."""
    folder, files, good = real_slices
    for file in files[4:]:
        file.unlink()
    files, good, dice, outcomes = files[:4], good[:4], random.Random(11), []
    for _ in range(60):
        victim = dice.choice(files)
        data = victim.read_bytes()
        end = data.index(b"\xe0\x7f\x10\0")  # Pixel Data
        victim.write_bytes(damage(data[:end], dice) + data[end:])
        outcomes.append(survives(folder, good, allowed=0.0))
        victim.write_bytes(data)
    assert set(outcomes) == {"refused", "read"} and outcomes.count("refused") > 30, Counter(outcomes)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_fifty_damages_of_a_file(suffix, tmp_path):
    array, dice = hu(shape=(9, 14, 11)), random.Random(len(suffix))
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.9, 1.1, 2.3))
    sitk.WriteImage(image, tmp_path / f"good{suffix}")
    data = (tmp_path / f"good{suffix}").read_bytes()
    outcomes = []
    for number in range(50):
        bad = damage(data[:600], dice) + data[600:] if number % 2 else damage(data, dice)
        (tmp_path / f"bad{suffix}").write_bytes(bad)
        # a checksum guards every byte of a gzip file; of the others, voxels may be damaged but not their number
        outcomes.append(survives(tmp_path / f"bad{suffix}", array, allowed=0.0 if suffix == ".nii.gz" else 1.0))
    assert set(outcomes) <= {"refused", "read"} and outcomes.count("refused") > 10, outcomes


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_a_hundred_damages_of_a_real_file(suffix, tmp_path):
    source = DATA / "example_ct_sm.nii.gz"
    if not source.exists():
        pytest.skip("example_ct_sm.nii.gz is not in the folder of test data (PHOTON_TEST_DATA)")
    data = source.read_bytes() if suffix == ".nii.gz" else gzip.decompress(source.read_bytes())
    good, dice, path = read_volume(source), random.Random(30 + len(suffix)), tmp_path / f"bad{suffix}"
    array, outcomes = sitk.GetArrayFromImage(good), []
    grid = {"size": (31, 28, 27), "spacing": (5.0, 11.0, 12.0), "modality": "ct"}
    seen = volume.read_on_grid(source, **grid)[0]
    for number in range(100):
        path.write_bytes(damage(data[:600], dice) + data[600:] if number % 2 else damage(data, dice))
        outcome = survives(path, array, allowed=0.0 if suffix == ".nii.gz" else 1.0)
        if outcome == "read" and suffix == ".nii.gz":  # the checksum guards header and voxels
            image = read_volume(path)
            assert volume.Geometry.of(image) == volume.Geometry.of(good)
            assert np.array_equal(volume.read_on_grid(path, **grid)[0], seen)
        elif outcome == "refused" and suffix == ".nii.gz":
            with pytest.raises(VolumeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                volume.read_on_grid(path, **grid)
        outcomes.append(outcome)
    assert set(outcomes) <= {"refused", "read"} and outcomes.count("refused") > 30, Counter(outcomes)
