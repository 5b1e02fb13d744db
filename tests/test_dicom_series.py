"""DICOM folders as they come: scouts, reports, two scans under one UID, echoes, mosaics, rounding, damaged streams.

Run: pytest tests/test_dicom_series.py
"""

import gzip
import io
import os
import random
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    EnhancedMRImageStorage,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    MRImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    RLELossless,
    RTDoseStorage,
    RTPlanStorage,
    RTStructureSetStorage,
)

from photon import scan_dicom_photon as dicom
from photon.scan_faults_photon import VolumeError, VolumeWarning
from photon.scan_faults_photon import VolumeFault as Fault
from photon.scan_grid_photon import Geometry
from photon.scan_intensity_photon import find_modality
from photon.scan_reader_photon import read_volume
from scan_writers import codes, dataset, enhanced, hu, notes, setter, write_series

LOCALISER = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def voxels(source, **options) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sitk.GetArrayFromImage(read_volume(source, **options))


def message(source, **options) -> str:
    with pytest.raises(VolumeError) as error:
        read_volume(source, **options)
    return str(error.value)


# === What lies beside or within a series =============================================================================


def scouts(folder: Path, series: str, number=2, prefix="0scout"):
    """Sagittal and coronal localisers, of other sizes, sorted before the slices."""
    for k in range(number):
        ds = dataset(k, hu(9, (1, 20, 16))[0], series=series, spacing=(1.5, 1.5))
        ds.ImageType, ds.InstanceNumber, ds.SOPInstanceUID = LOCALISER, 0, f"7.7.{k}"
        ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1] if k else [1, 0, 0, 0, 0, -1]
        ds.save_as(folder / f"{prefix}{k}.dcm", enforce_file_format=True)


@pytest.mark.parametrize("number", [1, 2, 6])
def test_scouts_under_the_uid_of_a_series_are_left_out(number, tmp_path):
    """One file of the series, the first, is a localiser: the others are judged by themselves."""
    folder = write_series(tmp_path / "scan")
    scouts(folder, "1.2.3.4", number)
    assert codes(folder) == {Fault.TOO_FEW_SLICES}
    np.testing.assert_array_equal(voxels(folder), hu())
    for series in (1, "1.2.3.4"):
        np.testing.assert_array_equal(voxels(folder, series=series), hu())
    assert codes(folder, series=2) <= {Fault.TOO_FEW_SLICES, Fault.IMAGE_ORIENTATION_INCONSISTENT}
    assert f"2: CT localiser, {number} slices of 20 x 16" in message(folder, series=3)
    write_series(folder, voxels=hu(1, (6, 12, 10)), series="1.2.3.5", prefix="other")  # not read instead
    assert "1: CT, 8 slices" in message(folder) and "3: CT, 6 slices" in message(folder)


@pytest.mark.parametrize("kind", [["ORIGINAL", "PRIMARY", "SCOUT"], ["ORIGINAL", "PRIMARY", "AXIAL"], None])
def test_scouts_without_the_word_are_left_out(kind, tmp_path):
    """Known by another plane on another grid; slices of the series itself are never taken for scouts."""
    folder = write_series(tmp_path / "scan")
    scouts(folder, "1.2.3.4")
    for file in folder.glob("0scout*"):
        ds = pydicom.dcmread(file)
        ds.ImageType = kind
        ds.save_as(file)
    assert codes(folder) == {Fault.TOO_FEW_SLICES}
    np.testing.assert_array_equal(voxels(folder), hu())

    def turned(ds, k):
        if k == 4:
            ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]

    assert codes(write_series(tmp_path / "turned", turned)) == {Fault.IMAGE_ORIENTATION_INCONSISTENT}


def rt_object(folder: Path, kind, modality: str):
    ds = dataset(0, hu()[0])
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = kind
    ds.SeriesInstanceUID, ds.Modality, ds.SOPInstanceUID = f"8.8.{modality}", modality, "8.8.8"
    for name in ("PixelData", "Rows", "Columns", "BitsAllocated", "ImagePositionPatient", "PixelSpacing"):
        if kind != RTDoseStorage:
            delattr(ds, name)
    if kind == RTDoseStorage:
        ds.NumberOfFrames, ds.PixelData = 5, bytes(5 * 2 * hu()[0].size)
    ds.save_as(folder / f"{modality}.dcm", enforce_file_format=True)


def test_rt_objects_beside_a_series_are_left_out(tmp_path):
    folder = write_series(tmp_path / "scan")
    rt_object(folder, RTStructureSetStorage, "RTSTRUCT"), rt_object(folder, RTPlanStorage, "RTPLAN")
    with pytest.warns(VolumeWarning, match="1 RT Plan Storage, 1 RT Structure Set Storage"):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), hu())
    rt_object(folder, RTDoseStorage, "RTDOSE")
    assert codes(folder) == {Fault.NON_IMAGING_DICOM_FILES, Fault.TOO_FEW_SLICES}
    np.testing.assert_array_equal(voxels(folder), hu())


def test_text_that_quotes_a_uid_is_left_out_by_kind(tmp_path):
    folder = write_series(tmp_path / "scan")
    (folder / "Doe_Jane.txt").write_text("transfer syntax 1.2.840.10008.1.2.1, für Frau Doe", "utf-8")
    (folder / "notes").write_text("series 1.2.840.10008.5.1.4.1.1.2\n" * 40)
    (folder / "VERSION").write_bytes(b"")
    with pytest.warns(VolumeWarning, match="3 of 11 files .*: 1 other, 2 text") as caught:
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), hu())
    assert "Doe" not in str(caught[0].message)


def test_a_slice_whose_begin_is_lost_is_refused_whatever_its_suffix(tmp_path):
    folder = tmp_path / "scan"
    write_series(folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"IM{number}")
    data = (folder / "IM3").read_bytes()
    for bad in (bytes(600) + data[600:], b"\1" * 300 + data[300:]):
        (folder / "IM3").write_bytes(bad)
        assert codes(folder) == {Fault.DAMAGED_FILE}


# === Several scans in one place or in turn ===========================================================================


def mr(tags_of, count=8, tail=None):
    """An edit that makes the slices of an MR series and sets tags by slice."""

    def edit(ds, k):
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MRImageStorage
        ds.Modality = "MR"
        del ds.RescaleSlope, ds.RescaleIntercept
        for name, value in tags_of(k).items():
            setattr(ds, name, value)

    return edit


def place(k):
    return [-5, -7, 100 + 2 * k]


def test_echoes_and_types_in_one_place_are_listed_by_what_differs(tmp_path):
    """Two echoes by magnitude and phase: four scans, of which no single tag is enough to tell one."""

    def tags(k):
        echo, kind, at = k % 2, k // 2 % 2, k // 4
        return {"EchoTime": 2.46 + 2.46 * echo, "ImageType": ["ORIGINAL", "PRIMARY", "MP"[kind], "Doe"],
                "ImagePositionPatient": place(at), "AcquisitionTime": f"1012{k:02d}.5"}  # fmt: skip

    folder = write_series(tmp_path / "scan", mr(tags), voxels=hu(shape=(24, 12, 10)))
    said = message(folder)
    assert "4 frames" in said and "0: echo 2.46 ms, type 1 (ORIGINAL PRIMARY M), 6 slices" in said
    assert (
        "3: echo 4.92 ms, type 2 (ORIGINAL PRIMARY P), 6 slices" in said and "Doe" not in said and "1012" not in said
    )
    stored = hu(shape=(24, 12, 10)) + 1024
    for frame, (echo, kind) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        np.testing.assert_array_equal(voxels(folder, frame=frame), stored[echo + 2 * kind :: 4])
    assert codes(folder, frame=4) == {Fault.SEVERAL_FRAMES}


@pytest.mark.parametrize("vendor", ["standard", "SIEMENS MR HEADER", "GEMS_PARM_01"])
def test_b_values_and_directions(vendor, tmp_path):
    """One volume without diffusion and three directions with it."""

    def edit(ds, k):
        volume, at = k % 4, k // 4
        mr(lambda k: {"ImagePositionPatient": place(at)})(ds, k)
        b = 0 if volume == 0 else 1000
        if vendor == "standard":
            ds.DiffusionBValue = float(b)
        elif vendor.startswith("SIEMENS"):
            ds.private_block(0x19, vendor, create=True).add_new(0x0C, "IS", b)
        else:
            ds.private_block(0x43, vendor, create=True).add_new(0x39, "IS", [b + 10**9, 8, 0, 0])
        if volume:
            ds.DiffusionGradientOrientation = np.eye(3)[volume - 1].tolist()

    folder = write_series(tmp_path / "scan", edit, voxels=hu(shape=(24, 12, 10)))
    said = message(folder)
    assert "4 frames" in said and "b-value 0" in said and "b-value 1000" in said and "direction 3" in said
    for frame in range(4):
        np.testing.assert_array_equal(np.unique(voxels(folder, frame=frame)[2]),
                                      np.unique(hu(shape=(24, 12, 10))[8 + [0, 3, 2, 1][frame]] + 1024))  # fmt: skip


def test_parts_of_the_stack_may_be_repeated(tmp_path):
    """A second echo of the middle slices alone: each echo is a scan."""

    def tags(k):
        return {"EchoTime": 5.0 if k < 8 else 90.0, "ImagePositionPatient": place(k if k < 8 else k - 6)}

    folder = write_series(tmp_path / "scan", mr(tags), voxels=hu(shape=(12, 12, 10)))
    assert "0: echo 5 ms, 8 slices; 1: echo 90 ms, 4 slices" in message(folder)
    assert voxels(folder, frame=1).shape == (4, 12, 10)


@pytest.mark.parametrize("tag, values, named", [
    ("AcquisitionNumber", (1, 2), "acquisition 2"), ("ConvolutionKernel", ("B30f", "B70f"), "kernel B70f"),
    ("ConvolutionKernel", ("Doe^Jane", "Doe"), "kernel 2"),
])  # fmt: skip
def test_two_scans_in_turn_under_one_uid_are_not_merged(tag, values, named, tmp_path):
    """Half the distance, every other slice of another acquisition or kernel."""
    folder = write_series(tmp_path / "scan", setter(**{tag: lambda k: values[k % 2]}))
    assert codes(folder) == {Fault.SEVERAL_FRAMES} and named in message(folder) and "Doe" not in message(folder)
    frames = [voxels(folder, frame=frame) for frame in (0, 1)]
    order = (0, 1) if values[0] < values[1] else (1, 0)
    for frame, first in enumerate(order):
        np.testing.assert_array_equal(frames[frame], hu()[first::2])
    assert read_volume(folder, frame=0).GetSpacing()[2] == pytest.approx(4)


def test_what_differs_by_station_or_pass_is_one_scan(tmp_path):
    """Acquisitions one after the other, one for each slice, and two passes of an MR stack."""
    for name, edit in {
        "stations": setter(AcquisitionNumber=lambda k: 1 + k // 4, ConvolutionKernel=lambda k: "AB"[k // 4]),
        "each": setter(AcquisitionNumber=lambda k: k),
        "passes": mr(lambda k: {"AcquisitionNumber": 1 + k % 2, "SliceThickness": 1.8}),
    }.items():
        folder = write_series(tmp_path / name, edit)
        assert codes(folder) == set(), name
        assert voxels(folder).shape == (8, 12, 10)
    overlapping = write_series(tmp_path / "two", mr(lambda k: {"AcquisitionNumber": 1 + k % 2, "SliceThickness": 4.0}))
    assert codes(overlapping) == {Fault.SEVERAL_FRAMES}


def test_a_slice_sent_twice_under_two_uids_is_read_once(tmp_path):
    folder = write_series(tmp_path / "scan")
    again = dataset(3, hu()[3])
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = "9.9.9"
    again.ContentTime = "101112"
    again.save_as(folder / "again.dcm", enforce_file_format=True)
    with pytest.warns(VolumeWarning, match="DUPLICATE_SLICES.* 1 slices are copies"):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(folder)), hu())
    again.RescaleIntercept = -1000  # other values: which one is right?
    again.save_as(folder / "again.dcm", enforce_file_format=True)
    assert codes(folder) == {Fault.DUPLICATE_SLICES}


# === Uneven and rounded positions ====================================================================================


def head(k):
    """Four mm through the skull base, then seven."""
    return 100 + (4.0 * k if k <= 5 else 20 + 7.0 * (k - 5))


@pytest.mark.parametrize("thick", [7.0, 8.0])
def test_a_head_ct_of_two_distances_is_read_when_asked(thick, tmp_path):
    def height(k):
        return 4.0 * k if k <= 5 else 20 + thick * (k - 5)

    ramp = hu(shape=(10, 12, 10)) * 0 + np.array([10 * height(k) for k in range(10)]).astype(np.int16)[:, None, None]
    edit = setter(ImagePositionPatient=lambda k: [-5, -7, 100 + height(k)])
    folder = write_series(tmp_path / "head", edit, voxels=ramp - 300)
    said = message(folder)
    assert Fault.SLICE_INCREMENT_INCONSISTENT.value in said and f"4.000 mm, then {thick:.3f} mm" in said
    assert 'gaps="resample"' in said and "Fetch" not in said and "missing" not in said
    with pytest.warns(VolumeWarning, match="even distance of 4.000 mm"):
        image = read_volume(folder, gaps="resample")
    depth = round(height(9) / 4) + 1
    assert image.GetSize()[2] == depth and image.GetSpacing()[2] == pytest.approx(height(9) / (depth - 1))
    even = -300 + 10 * height(9) * np.arange(depth) / (depth - 1)  # voxels that are linear in the height stay so
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), even[:, None, None] + np.zeros((1, 12, 10)), atol=0.01)


def test_resample_makes_up_no_missing_slice(tmp_path):
    folder = write_series(tmp_path / "gap", lambda ds, k: k != 4)
    assert codes(folder, gaps="resample") == {Fault.MISSING_SLICES} == codes(folder, gaps="interpolate")
    assert "Fetch the missing slices" in message(folder) and voxels(folder, gaps="interpolate").shape[0] == 8
    far = write_series(tmp_path / "far", setter(ImagePositionPatient=lambda k: [-5, -7, 2 * k + 1e7 * (k == 7)]))
    assert codes(far, gaps="interpolate", max_voxels=10**6) == {Fault.TOO_LARGE}


@pytest.mark.parametrize("decimals, step", [(1, 1.25), (1, 0.625), (2, 0.333), (2, 0.4375)])
@pytest.mark.parametrize("oblique", [False, True])
def test_positions_that_are_rounded_by_the_writer(decimals, step, oblique, tmp_path):
    c, s = np.cos(0.4), np.sin(0.4)
    normal = np.array([0, -s, c]) if oblique else np.array([0, 0, 1])
    orientation = [1, 0, 0, 0, c, s] if oblique else [1, 0, 0, 0, 1, 0]
    edit = setter(
        ImagePositionPatient=lambda k: np.round(np.array([-5.3, -7.1, 100.2]) + k * step * normal, decimals).tolist(),
        ImageOrientationPatient=orientation,
    )
    stack = hu(shape=(23, 12, 10))
    folder = write_series(tmp_path / "scan", edit, voxels=stack)
    assert codes(folder) == set()
    np.testing.assert_array_equal(voxels(folder), stack)
    assert read_volume(folder).GetSpacing()[2] == pytest.approx(step, abs=10**-decimals / 10)
    gap = write_series(tmp_path / "gap", lambda ds, k: edit(ds, k) if k != 9 else False, voxels=stack)
    assert codes(gap) <= {Fault.MISSING_SLICES, Fault.SLICE_INCREMENT_INCONSISTENT} and codes(gap)


# === Multi-frame =====================================================================================================


def test_private_groups_of_a_frame_change_nothing(tmp_path):
    """As Philips writes: a private sequence with another position, spacing and scale in each frame."""

    def private(ds):
        for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
            item = Dataset()
            item.ImagePositionPatient, item.PixelSpacing = [-5.4, -7.4, 100 + 2.0 * k + 0.4], [0.75, 0.95]
            item.RescaleSlope, item.RescaleIntercept, item.ImageOrientationPatient = 2, 0, [0, 1, 0, 1, 0, 0]
            frame.private_block(0x2005, "Philips MR Imaging DD 005", create=True).add_new(0x0F, "SQ", [item])

    classic, plain = write_series(tmp_path / "classic"), enhanced(tmp_path / "plain.dcm")
    path = enhanced(tmp_path / "private.dcm", private)
    for other in (classic, plain):
        assert Geometry.of(read_volume(path)) == Geometry.of(read_volume(other))
        np.testing.assert_array_equal(voxels(path), voxels(other))


def test_scales_of_a_multiframe_file_at_its_top(tmp_path):
    def at_the_top(ds):
        del ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = MultiFrameGrayscaleWordSecondaryCaptureImageStorage

    np.testing.assert_array_equal(voxels(enhanced(tmp_path / "top.dcm", at_the_top)), hu())

    def both(ds):
        ds.RescaleSlope, ds.RescaleIntercept = 2, 7

    np.testing.assert_array_equal(voxels(enhanced(tmp_path / "both.dcm", both)), hu())  # the frame's scale counts


def test_enhanced_mr_by_echo_and_type(tmp_path):
    def edit(ds):
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
        ds.Modality = "MR"
        for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
            echo, kind = Dataset(), Dataset()
            echo.EffectiveEchoTime, kind.ComplexImageComponent = (
                10.0 + 20 * (k // 8 % 2),
                ["MAGNITUDE", "PHASE"][k // 16],
            )
            frame.MREchoSequence, frame.MRImageFrameTypeSequence = [echo], [kind]
            del frame.FrameContentSequence[0].TemporalPositionIndex

    path = enhanced(tmp_path / "scan.dcm", edit, phases=4)
    said = message(path)
    assert "4 frames" in said and "2: echo 30 ms, type 1" in said.replace(
        "3: echo 30 ms, type 1", "2: echo 30 ms, type 1"
    )
    found = {tuple(voxels(path, frame=frame)[:, 5, 5]) for frame in range(4)}
    assert found == {tuple(hu(seed)[:, 5, 5]) for seed in range(4)}


# === Siemens mosaics =================================================================================================


def mosaic_file() -> Path:
    return Path(nib.__file__).parent / "nicom" / "tests" / "data" / "siemens_dwi_1000.dcm.gz"


@pytest.mark.skipif(not mosaic_file().exists(), reason="nibabel came without its test data")
def test_a_mosaic_is_read_through_its_private_header(tmp_path):
    from nibabel.nicom.dicomwrappers import wrapper_from_file

    for number, name in enumerate(("siemens_dwi_0.dcm.gz", "siemens_dwi_1000.dcm.gz")):
        data = io.BytesIO(gzip.decompress((mosaic_file().parent / name).read_bytes()))
        ds = pydicom.dcmread(data, force=True)  # nibabel emptied its voxels
        ds.PixelData = np.random.default_rng(number).integers(0, 900, (ds.Rows, ds.Columns), np.uint16).tobytes()
        ds.save_as(tmp_path / f"{number}.dcm")
    alone = tmp_path / "alone"
    alone.mkdir()
    os.link(tmp_path / "0.dcm", alone / "0.dcm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = wrapper_from_file(tmp_path / "0.dcm")
        array = expected.get_data()  # (rows, columns, slices), and an affine to LPS of these axes
    image = read_volume(alone)
    got = sitk.GetArrayFromImage(image)  # (slices, rows, columns), slices from the lowest
    ends = [image.TransformIndexToPhysicalPoint((0, 0, k)) for k in (0, image.GetSize()[2] - 1)]
    theirs = [(expected.affine @ [0, 0, k, 1])[:3] for k in (0, array.shape[2] - 1)]
    down = np.linalg.norm(np.subtract(ends[0], theirs[0])) > np.linalg.norm(np.subtract(ends[0], theirs[1]))
    if down:
        array, theirs = array[..., ::-1], theirs[::-1]
    np.testing.assert_array_equal(got, array.transpose(2, 0, 1))
    np.testing.assert_allclose(ends, theirs, atol=0.01)
    corner = image.TransformIndexToPhysicalPoint((7, 3, 0))
    index = [3, 7, array.shape[2] - 1 if down else 0, 1]
    np.testing.assert_allclose(corner, (expected.affine @ index)[:3], atol=0.01)
    assert "2 frames" in message(tmp_path) and "b-value" in message(tmp_path)
    np.testing.assert_array_equal(voxels(tmp_path, frame=0), got)


def test_a_mosaic_without_its_private_header_is_refused(tmp_path):
    edit = mr(lambda k: {"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]})
    folder = write_series(tmp_path / "scan", edit, voxels=hu(shape=(1, 12, 10)))
    assert codes(folder) == {Fault.NO_GEOMETRY} and "mosaic" in message(folder) and "dcm2niix" in message(folder)


# === Modality ========================================================================================================


def test_modality_other_is_read_as_told(tmp_path):
    folder = write_series(tmp_path / "scan", setter(Modality="OT"))
    image = read_volume(folder)
    assert find_modality(image, "ct") == "ct" and find_modality(image, "mr") == "mr"
    with pytest.raises(VolumeError) as error:
        find_modality(image)
    assert error.value.fault == Fault.MODALITY_UNSUPPORTED
    for modality in ("US", "Zzyzx"):
        image = read_volume(write_series(tmp_path / modality, setter(Modality=modality)))
        with pytest.raises(VolumeError, match="MODALITY_UNSUPPORTED") as error:
            find_modality(image, "ct")
        assert "Zzyzx" not in str(error.value)


# === Compressed streams ==============================================================================================


def jpeg_lossless(folder: Path, edit=None, stack=None) -> Path:
    """A series in JPEG lossless, written by GDCM."""
    plain = write_series(folder.with_name(folder.name + "_plain"), voxels=stack)
    folder.mkdir()
    for path in plain.iterdir():
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn(), writer.UseCompressionOn(), writer.SetCompressor("JPEG")
        writer.SetFileName(str(folder / path.name))
        writer.Execute(sitk.ReadImage(path))
        ds = pydicom.dcmread(folder / path.name)
        assert ds.file_meta.TransferSyntaxUID == JPEGLosslessSV1
        if edit:
            edit(ds)
            ds.save_as(folder / path.name)
    return folder


def test_monochrome1_is_as_stored_in_every_transfer_syntax(tmp_path):
    def mono(ds, k=0):
        ds.PhotometricInterpretation = "MONOCHROME1"

    def rle(ds, k):
        mono(ds), ds.compress(RLELossless, generate_instance_uid=False)

    raw = write_series(tmp_path / "raw", mono)
    for folder in (raw, write_series(tmp_path / "rle", rle), jpeg_lossless(tmp_path / "jpeg", mono)):
        np.testing.assert_array_equal(voxels(folder, monochrome1="as_stored"), hu(), err_msg=folder.name)
        ds = pydicom.dcmread(next(folder.iterdir()))
        inverse = (-1 if ds.PixelRepresentation else 2**ds.BitsStored - 1) + 2 * int(ds.RescaleIntercept)
        np.testing.assert_array_equal(voxels(folder, monochrome1="invert"), inverse - hu())


def test_signed_values_and_dirty_bits_in_packed_streams(tmp_path):
    def signed(ds, k):
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit, ds.RescaleIntercept = 1, 16, 15, 0
        ds.PixelData = hu()[k].astype("<i2").tobytes()
        ds.compress(RLELossless, generate_instance_uid=False)

    def dirty(ds, k):
        ds.PixelData = ((hu()[k].astype(int) + 1024) | 0xF000).astype("<u2").tobytes()
        ds.compress(RLELossless, generate_instance_uid=False)

    for edit in (signed, dirty):
        np.testing.assert_array_equal(voxels(write_series(tmp_path / edit.__name__, edit)), hu())


def smooth(shape=(5, 72, 66)) -> np.ndarray:
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    noise = np.random.default_rng(3).normal(0, 6, shape)
    return np.where(x**2 + y**2 + 0 * z < 0.7, 40 + 200 * np.cos(5 * x), -1000).astype(int) + noise.astype(int)


def restream(folder: Path, change) -> None:
    """Changes the packed stream of the middle slice."""
    path = sorted(folder.iterdir())[2]
    ds = pydicom.dcmread(path)
    stream = bytearray(next(generate_frames(ds.PixelData, number_of_frames=1)))
    ds.PixelData = encapsulate([bytes(change(stream))])
    ds.save_as(path)


def zeros(stream):
    stream[len(stream) // 2 : len(stream) // 2 + 400] = bytes(400)
    return stream


DAMAGES = {
    "zeros": zeros,
    "cut": lambda stream: stream[: len(stream) // 2],
    "lost": lambda stream: stream[: len(stream) // 2] + stream[len(stream) // 2 + 60 :],
    "repeated": lambda stream: stream[: len(stream) // 2 + 60] + stream[len(stream) // 2 :],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("syntax", ["JPEG lossless", "RLE", "JPEG 2000"])
def test_a_damaged_stream_is_refused_where_a_decoder_can_tell(syntax, damage, tmp_path):
    if (syntax, damage) == ("JPEG 2000", "zeros"):
        pytest.skip("no decoder can tell: see the limits in docs/scans.md")
    folder = tmp_path / "scan"
    if syntax == "JPEG lossless":
        jpeg_lossless(folder, stack=smooth())
    else:
        uid = RLELossless if syntax == "RLE" else JPEG2000Lossless
        write_series(folder, lambda ds, k: ds.compress(uid, generate_instance_uid=False), smooth())
    np.testing.assert_array_equal(voxels(folder), smooth())
    restream(folder, DAMAGES[damage])
    assert codes(folder) == {Fault.DAMAGED_FILE}


def test_lossless_jpeg_of_every_predictor_and_shift():
    """The check of a stream's length, against streams written here by the standard's rules."""
    from photon.scan_files_photon import jpeg_is_consistent

    dice = random.Random(4)
    for predictor in range(1, 8):
        samples = smooth((1, 9, 11))[0] + 1024
        stream = encoded(samples, predictor, precision=12)
        assert jpeg_is_consistent(stream, samples)
        other = samples.copy()
        for column in range(11):
            other[5:, column] += dice.randrange(600)
        assert not jpeg_is_consistent(stream, other)
        assert not jpeg_is_consistent(stream[:-12] + b"\xff\xd9", samples)
        assert jpeg_is_consistent(
            stream.replace(b"\xff\xda", b"\xff\xdd\0\4\0\5\xff\xda"), other
        )  # restarts: unchecked


def encoded(samples: np.ndarray, predictor: int, precision: int) -> bytes:
    """A lossless JPEG stream, sample by sample, with codes of five bits for every category."""
    rows, columns = samples.shape
    bits = []
    for r in range(rows):
        for c in range(columns):
            a, b = (int(samples[r, c - 1]) if c else 0), (int(samples[r - 1, c]) if r else 0)
            d = int(samples[r - 1, c - 1]) if r and c else 0
            if r and c:
                guess = [a, b, d, a + b - d, a + (b - d >> 1), b + (a - d >> 1), a + b >> 1][predictor - 1]
            else:
                guess = a if c else b if r else 1 << (precision - 1)
            difference = int(samples[r, c]) - guess
            category = abs(difference).bit_length()
            extra = difference if difference > 0 else difference + (1 << category) - 1
            bits.append(f"{category:05b}" + (f"{extra:0{category}b}" if category else ""))
    packed = "".join(bits)
    packed += "1" * (-len(packed) % 8)
    data = bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8)).replace(b"\xff", b"\xff\0")
    table = bytes([0, 0, 0, 0, 0, 17]) + bytes(11) + bytes(range(17))
    size = rows.to_bytes(2, "big") + columns.to_bytes(2, "big")
    return (
        b"\xff\xd8\xff\xc4" + (len(table) + 2).to_bytes(2, "big") + table + b"\xff\xc3\0\x0b" + bytes([precision])
        + size + b"\1\1\x11\0" + b"\xff\xda\0\x08\1\1\0" + bytes([predictor, 0, 0]) + data + b"\xff\xd9"
    )  # fmt: skip


def test_a_missing_decoder_is_not_damage(tmp_path, monkeypatch):
    def packed(ds, k):
        ds.PixelData = encapsulate([ds.PixelData])
        ds.file_meta.TransferSyntaxUID = HTJ2KLossless if k < 8 else "1.2.840.10008.1.2.4.102"

    folder = write_series(tmp_path / "scan", packed, smooth())
    monkeypatch.setattr(dicom, "get_decoder", lambda uid: type("None", (), {"is_available": False}))
    assert codes(folder) == {Fault.MISSING_DECODER} and "pip install" in message(folder)
    monkeypatch.undo()
    unknown = write_series(tmp_path / "unknown", lambda ds, k: packed(ds, k + 8), smooth())
    assert codes(unknown) == {Fault.MISSING_DECODER}


def test_nothing_of_the_patient_in_temporary_files(tmp_path, monkeypatch):
    """What GDCM is given holds the packed voxels alone."""
    folder, kept = jpeg_lossless(tmp_path / "scan", setter_of_name), []
    monkeypatch.setattr(dicom.sitk.ImageFileReader, "SetFileName", spy(kept))
    np.testing.assert_array_equal(voxels(folder), hu())
    assert len(kept) == 8
    for content in kept:
        assert b"Zzyzx" not in content and b"1.2.3.4" not in content


def setter_of_name(ds):
    ds.PatientName = "Zzyzx"


def spy(kept):
    real = sitk.ImageFileReader.SetFileName

    def set_name(self, name):
        kept.append(Path(name).read_bytes())
        return real(self, name)

    return set_name


def test_notes_of_the_new_findings(tmp_path):
    edit = setter(ImagePositionPatient=lambda k: [-5, -7, round(100 + 1.25 * k, 1)])
    assert Fault.SLICE_INCREMENT_INCONSISTENT.value in notes(write_series(tmp_path / "rounded", edit))
