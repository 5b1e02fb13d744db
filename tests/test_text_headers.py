"""NRRD and MetaImage: healthy files agree with SimpleITK, damaged or false ones are refused, no other file is opened.

Run: pytest tests/test_text_headers.py
"""

import builtins
import bz2
import gzip
import os
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from photon.scan_faults_photon import VolumeError
from photon.scan_faults_photon import VolumeFault as Fault
from photon.scan_grid_photon import Geometry
from photon.scan_reader_photon import read_volume
from photon.scan_store_photon import VolumeStore
from scan_writers import AFFINE, codes, edited, hu, nifti, setter, symlink, write_series, written

PACKED = {"gzip NRRD": "a.nrrd", "detached NRRD": "a.nhdr", "zlib MetaImage": "a.mha", "detached MetaImage": "a.mhd"}


def image(seed=0, direction=None) -> sitk.Image:
    image = sitk.GetImageFromArray(hu(seed))
    image.SetSpacing((0.7, 0.9, 2.5))
    image.SetOrigin((-11.0, 7.0, 130.0))
    image.SetDirection(direction or sitk.VersorTransform((0.3, -0.5, 0.8), 0.4).GetMatrix())
    return image


def packed(folder: Path, name: str) -> Path:
    sitk.WriteImage(image(), folder / name, useCompression=True)
    return folder / name


def voxel_file(path: Path) -> tuple[Path, int]:
    """(file of the voxels, byte where they begin)."""
    others = [p for p in path.parent.iterdir() if p != path]
    if others:
        return others[0], 0
    data = path.read_bytes()
    end = b"\n\n" if path.suffix == ".nrrd" else b"LOCAL\n"
    return path, data.index(end) + len(end)


def equals_itk(path: Path) -> None:
    ours, theirs = read_volume(path), sitk.ReadImage(path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs))
    for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(ours, name)(), getattr(theirs, name)(), atol=1e-9)


# === Damaged, too short, too long ====================================================================================


@pytest.mark.parametrize("name", PACKED.values(), ids=PACKED)
def test_a_flipped_byte_in_a_packed_stream_is_refused_or_without_effect(name, tmp_path):
    path = packed(tmp_path, name)
    assert codes(path) == set()
    equals_itk(path)
    file, begin = voxel_file(path)
    data, refused = file.read_bytes(), 0
    for at in range(begin, len(data), 29):
        bad = bytearray(data)
        bad[at] ^= 0x41
        file.write_bytes(bad)
        try:
            np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(path)), hu())  # a gzip header's date
        except VolumeError as error:
            assert error.fault == Fault.DAMAGED_FILE
            refused += 1
    assert refused > 0.9 * len(range(begin, len(data), 29))


@pytest.mark.parametrize("name", PACKED.values(), ids=PACKED)
def test_zeros_and_cuts_in_a_packed_stream_are_refused(name, tmp_path):
    path = packed(tmp_path, name)
    file, begin = voxel_file(path)
    data = file.read_bytes()
    for bad in (data[: begin + 300] + bytes(200) + data[begin + 500 :], data[:-1], data[: begin + 400], data[:begin]):
        file.write_bytes(bad)
        assert codes(path) <= {Fault.DAMAGED_FILE, Fault.HEADER_LIES} and codes(path)


@pytest.mark.parametrize("name", PACKED.values(), ids=PACKED)
def test_other_bytes_after_a_packed_stream_are_refused(name, tmp_path):
    path = packed(tmp_path, name)
    file, _ = voxel_file(path)
    data = file.read_bytes()
    file.write_bytes(data + bytes(60))
    assert codes(path) == set()
    file.write_bytes(data + b"\0\1" * 30)
    assert codes(path) and codes(path) <= {Fault.DAMAGED_FILE, Fault.HEADER_LIES}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_a_header_of_more_or_fewer_slices_is_refused(name, compressed, tmp_path):
    sitk.WriteImage(image(), tmp_path / name, useCompression=compressed)
    data = (tmp_path / name).read_bytes()
    fault = {"more": Fault.DAMAGED_FILE if compressed else Fault.HEADER_LIES, "fewer": Fault.HEADER_LIES}
    for which, size in (("more", b"10 12 9"), ("fewer", b"10 12 7")):
        assert codes(written(tmp_path / name, data.replace(b"10 12 8", size))) == {fault[which]}


def test_bytes_after_the_voxels(tmp_path):
    """Zeros that pad a file are passed over; other bytes in a file without checksum may mean shifted voxels."""
    for name in ("a.nrrd", "a.mha", "a.nii"):
        sitk.WriteImage(image(), tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert codes(written(tmp_path / name, data + bytes(60))) == set()
        assert codes(written(tmp_path / name, data + b"\0\1" * 30)) == {Fault.HEADER_LIES}
        assert codes(written(tmp_path / name, data[:-900] + b"\3" * 40 + data[-900:])) == {Fault.HEADER_LIES}


# === The header cannot point elsewhere ===============================================================================


def nrrd(**fields) -> str:
    fields = {
        "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "10 12 8",
        "space directions": "(1,0,0) (0,1,0) (0,0,2)", "endian": "little", "encoding": "raw",
    } | {name.replace("_", " "): value for name, value in fields.items()}  # fmt: skip
    return "NRRD0004\n" + "".join(f"{name}: {value}\n" for name, value in fields.items() if value is not None)


def meta(**fields) -> str:
    fields = {
        "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "0 0 0", "ElementSpacing": "1 1 2", "DimSize": "10 12 8", "ElementType": "MET_SHORT",
    } | fields  # fmt: skip
    return "".join(f"{name} = {value}\n" for name, value in fields.items() if value is not None)


NOTES = "# a remark of the writer\n" * 4000  # 100 KB
ELSEWHERE = {
    "capitals": ("a.nhdr", nrrd() + "Data File: {}\n"),
    "one word": ("a.nrrd", nrrd() + "DATAFILE: {}\n\n"),
    "after many remarks": ("a.nrrd", nrrd() + NOTES + "data file: {}\n\n"),
    "after many remarks, packed": ("a.nrrd", nrrd(encoding="gzip") + NOTES + "data file: {}\n\n"),
    "a list": ("a.nhdr", nrrd() + "data file: LIST\n{}\n"),
    "a pattern": ("a.nhdr", nrrd() + "data file: ../outside/a%d.raw 1 8 1\n"),
    "colon": ("a.mhd", meta() + "ElementDataFile: {}\n"),
    "colon and spaces": ("a.mhd", meta() + "  ElementDataFile   :   {}  \n"),
    "no spaces": ("a.mha", meta() + "ElementDataFile={}\n"),
    "after many fields": ("a.mha", meta(CompressedData="True") + "Comment = no\n" * 9000 + "ElementDataFile : {}\n"),
    "MetaImage list": ("a.mhd", meta() + "ElementDataFile = LIST\n{}\n"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_no_other_file_is_opened(name, tmp_path, monkeypatch):
    outside = tmp_path / "outside" / "secret.raw"
    outside.parent.mkdir()
    outside.write_bytes(hu().tobytes())
    (tmp_path / "scan").mkdir()
    file, header = ELSEWHERE[name]
    voxels = "" if file == "a.nhdr" else "\1\2" * 2000
    path = written(tmp_path / "scan" / file, header.replace("{}", str(outside)) + voxels)
    opened = []

    def spy(file, *args, **options):
        opened.append(str(file))
        return real_open(file, *args, **options)

    real_open = builtins.open
    monkeypatch.setattr(builtins, "open", spy)
    assert codes(path) <= {Fault.EXTERNAL_DATA_FILE, Fault.DAMAGED_FILE} and codes(path)
    if "list" not in name:
        assert codes(path) == {Fault.EXTERNAL_DATA_FILE}
    assert opened and all(file == str(path) for file in opened)


def test_headers_that_break_the_rules(tmp_path):
    voxels = hu().tobytes().decode("latin-1")

    def code(name, header):
        return codes(written(tmp_path / name, (header + voxels).encode("latin-1")))

    assert code("good.nrrd", nrrd() + "\n") == set() == code("good.mha", meta() + "ElementDataFile = LOCAL\n")
    bad = [nrrd(dimension="4"), nrrd(endian=None), nrrd(sizes="10 12 x"), nrrd(byte_skip="-5")]
    bad += [nrrd(space_origin="(1,2)")] + [nrrd() + line for line in ("sizes: 10 12 8\n", "colour: 3\n", "words\n")]
    for header in bad:
        assert code("bad.nrrd", header + "\n") == {Fault.DAMAGED_FILE}, header
    assert code("bad.nrrd", nrrd(encoding="hex") + "\n") == {Fault.MISSING_DECODER}
    assert code("bad.nrrd", nrrd(type="block") + "\n") == {Fault.NOT_SCALAR}
    assert code("bad.nrrd", nrrd(space="3D-right-handed") + "\n") == {Fault.NO_GEOMETRY}
    assert code("bad.nrrd", nrrd(old_min="-1000", old_max="1000") + "\n") == {Fault.NOT_HU}
    assert code("bad.nrrd", nrrd(space_units='"cm" "cm" "cm"') + "\n") == {Fault.UNIT_NOT_MILLIMETRE}
    for fields in ({"NDims": "4"}, {"DimSize": "10 12 8.5"}, {"TransformMatrix": "1 0 0 1"}, {"Offset": "a b c"}):
        assert code("bad.mha", meta(**fields) + "ElementDataFile = LOCAL\n") == {Fault.DAMAGED_FILE}, fields
    assert code("bad.mha", meta() + "DimSize = 10 12 8\nElementDataFile = LOCAL\n") == {Fault.DAMAGED_FILE}
    assert codes(written(tmp_path / "bad.mha", meta() + "a = b\n" * 10)) == {Fault.DAMAGED_FILE}  # no end


@pytest.mark.parametrize("slope", ["10", "100", "1e1", "0.5", "1 1", "nan"])
def test_a_scale_of_a_metaimage_is_refused(slope, tmp_path):
    for separator in ("=", ":"):
        for field in (f"ElementToIntensityFunctionSlope {separator} {slope}\n",
                      f"ElementToIntensityFunctionOffset {separator} 10\n"):  # fmt: skip
            sitk.WriteImage(image(), tmp_path / "a.mha")
            edited(tmp_path / "a.mha", b"ElementType", field.encode() + b"ElementType")
            assert codes(tmp_path / "a.mha") == {Fault.NOT_HU}
    for slope, offset in (("1", "0"), ("1.000", "0.0"), ("1e0", "-0")):
        sitk.WriteImage(image(), tmp_path / "a.mha")
        scale = f"ElementToIntensityFunctionSlope = {slope}\nElementToIntensityFunctionOffset = {offset}\nElementType"
        edited(tmp_path / "a.mha", b"ElementType", scale.encode())
        assert codes(tmp_path / "a.mha") == set()


# === Healthy headers =================================================================================================

STORED = hu().tobytes()
HEALTHY = {
    "NRRD, DOS lines": ("a.nrrd", (nrrd() + "\n").replace("\n", "\r\n"), STORED),
    "NRRD, RAS": ("a.nrrd", nrrd(space="right-anterior-superior", space_origin="(3,4,5)") + "\n", STORED),
    "NRRD, LAS": ("a.nrrd", nrrd(space="LAS", space_origin="(3,4,5)") + "\n", STORED),
    "NRRD, big endian": ("a.nrrd", nrrd(endian="big") + "\n", hu().astype(">i2").tobytes()),
    "NRRD, last bytes": ("a.nrrd", nrrd(byte_skip="-1") + "\n", b"notes" + STORED),
    "NRRD, skipped bytes": ("a.nrrd", nrrd(byte_skip="5") + "\n", b"notes" + STORED),
    "NRRD, text": ("a.nrrd", nrrd(encoding="ascii") + "\n", " ".join(map(str, hu().ravel())).encode()),
    "NRRD, bzip2": ("a.nrrd", nrrd(encoding="bz2") + "\n", bz2.compress(STORED)),
    "NRRD, notes with colons": ("a.nrrd", nrrd() + "when: now:=a: b\nnote:=x: y\n\n".replace("when: ", "w"), STORED),
    "NRRD, two gzip members": (
        "a.nrrd", nrrd(encoding="gz") + "\n", gzip.compress(STORED[:999]) + gzip.compress(STORED[999:])
    ),
    "MetaImage, colons": ("a.mha", meta().replace(" =", ":") + "ElementDataFile: LOCAL\n", STORED),
    "MetaImage, DOS lines": ("a.mha", (meta() + "ElementDataFile = LOCAL\n").replace("\n", "\r\n"), STORED),
    "MetaImage, notes": ("a.mha", "ObjectType = Image\nComment = a\nline\n" + meta(ObjectType=None) +
                         "ElementDataFile = LOCAL\n", STORED),
    "MetaImage, big endian": (
        "a.mha", meta(BinaryDataByteOrderMSB="True") + "ElementDataFile = LOCAL\n", hu().astype(">i2").tobytes()
    ),
    "MetaImage, text": (
        "a.mha", meta(BinaryData="False") + "ElementDataFile = LOCAL\n", " ".join(map(str, hu().ravel())).encode()
    ),
    "MetaImage, gzip": (
        "a.mha", meta(CompressedData="True") + "ElementDataFile = LOCAL\n", gzip.compress(STORED)
    ),
}  # fmt: skip
NOT_IN_ITK = {"NRRD, bzip2", "NRRD, two gzip members", "MetaImage, gzip", "MetaImage, notes", "MetaImage, text"}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_headers_agree_with_itk(name, tmp_path):
    file, header, voxels = HEALTHY[name]
    path = written(tmp_path / file, header.encode() + voxels)
    assert codes(path) == set()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(path)), hu())
    if name not in NOT_IN_ITK:
        equals_itk(path)


@pytest.mark.parametrize("axis", [0, 3])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_frames_of_a_sequence(axis, encoding, tmp_path):
    """As 3D Slicer writes sequences: the axis of frames is the fastest or the slowest one."""
    frames = np.stack([hu(seed) for seed in range(3)], axis=3 - axis)  # (z, y, x) and the frames
    sizes, directions = ["10", "12", "8"], ["(1,0,0)", "(0,1,0)", "(0,0,2)"]
    sizes.insert(axis, "3"), directions.insert(axis, "none")
    header = nrrd(dimension="4", sizes=" ".join(sizes), space_directions=" ".join(directions), encoding=encoding)
    voxels = frames.tobytes() if encoding == "raw" else gzip.compress(frames.tobytes())
    kinds = ["domain"] * 3
    kinds.insert(axis, "list")
    path = written(tmp_path / "a.nrrd", header.encode() + f"kinds: {' '.join(kinds)}\n\n".encode() + voxels)
    assert codes(path) == {Fault.SEVERAL_FRAMES}
    for frame in range(3):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_volume(path, frame=frame)), hu(frame))
    colours = header.encode() + f"kinds: {' '.join(kinds).replace('list', 'RGB-color')}\n\n".encode() + voxels
    assert codes(written(tmp_path / "b.nrrd", colours)) == {Fault.NOT_SCALAR}


def test_the_modality_of_a_metaimage(tmp_path):
    path = written(tmp_path / "a.mha", (meta(Modality="MET_MOD_MR") + "ElementDataFile = LOCAL\n").encode() + STORED)
    assert read_volume(path).GetMetaData("0008|0060") == "MR"


# === NIfTI and the file system =======================================================================================


def test_an_sform_of_zeros_leaves_the_qform(tmp_path):
    path = nifti(tmp_path / "a.nii", lambda i: (i.set_qform(AFFINE, 1), i.set_sform(None, 0)))
    data = bytearray(path.read_bytes())
    data[254:256], data[280:328] = b"\2\0", bytes(48)  # sform_code and its rows
    path.write_bytes(data)
    assert codes(path) == {Fault.QFORM_SFORM_DISAGREE}
    plain = nifti(tmp_path / "b.nii", lambda i: (i.set_qform(AFFINE, 1), i.set_sform(None, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Geometry.of(read_volume(path)) == Geometry.of(read_volume(plain))
        assert Geometry.of(read_volume(nib.load(path))) == Geometry.of(read_volume(plain))


def test_a_loop_of_links_is_refused_without_its_path(tmp_path):
    folder = write_series(tmp_path / "scan", setter())
    symlink(folder / "one.dcm", Path("two.dcm")), symlink(folder / "two.dcm", Path("one.dcm"))
    symlink(tmp_path / "loop.nii.gz", Path("loop.nii.gz"))
    symlink(tmp_path / "folder", Path("folder"))
    for path in (folder, tmp_path / "loop.nii.gz", tmp_path / "folder"):
        with pytest.raises(VolumeError) as error:
            read_volume(path)
        assert error.value.fault == Fault.NO_SUCH_FILE and str(tmp_path) not in str(error.value)
        assert error.value.__cause__ is None and error.value.__suppress_context__ or not error.value.__context__
    store = VolumeStore(tmp_path / "store", {})
    assert store.key(tmp_path / "loop.nii.gz", {}) is None
    assert store.key(folder, {}) is not None  # its slices are hashed; reading refuses it
    os.unlink(folder / "one.dcm")
    assert codes(folder) == {Fault.NO_SUCH_FILE}
