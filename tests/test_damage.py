"""Two thousand damages: format, compression, orientation and damage are drawn; each is refused by code or equal.

Where no decoder can tell (docs/scans.md, limits), the damage stays where it is: the shape is the same, and at most the
bytes or the slice that were hit differ. What a checksum guards is refused, or equal to the last bit and the last digit
of its place.

Run: pytest tests/test_damage.py
"""

import random
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from photon.scan_faults_photon import VolumeError
from photon.scan_grid_photon import Geometry
from photon.scan_reader_photon import read_volume
from scan_writers import dataset

SHAPE, LARGE = (5, 34, 27), (5, 66, 67)  # OpenJPEG writes no smaller ones
ROUNDS = 182  # of each of eleven kinds of file: 2,002 damages
DICOM = ("raw", "RLE", "JPEG lossless", "JPEG-LS", "JPEG 2000")
FILES = (".nii", ".nii.gz", ".nrrd", ".nrrd gzip", ".mha", ".mha zlib")


def voxels(dice, shape=SHAPE) -> np.ndarray:
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    noise = np.random.default_rng(dice.randrange(1000)).normal(0, 6, shape)
    return np.where(x**2 + y**2 + 0 * z < 0.7, 40 + 200 * np.cos(5 * x) + noise, -1000).astype(np.int16)


def turn(dice) -> np.ndarray:
    """(3, 3): any rotation."""
    axis = np.array([dice.uniform(-1, 1), dice.uniform(-1, 1), dice.uniform(0.1, 1)])
    return np.array(sitk.VersorTransform(axis / np.linalg.norm(axis), dice.uniform(-3, 3)).GetMatrix()).reshape(3, 3)


@dataclass
class Written:
    """A scan on disk: what is read, the file to damage, where its voxels begin in it, and the slice that it holds."""

    source: Path
    file: Path
    begin: int
    slice: int | None = None


def write_dicom(folder, syntax, dice) -> list[Written]:
    folder.mkdir()
    array, axes = voxels(dice, LARGE if syntax == "JPEG 2000" else SHAPE), turn(dice)
    out = []
    for k, plane in enumerate(array):
        ds = dataset(k, plane)
        ds.ImageOrientationPatient = np.round(axes[:, :2].T.ravel(), 6).tolist()
        ds.ImagePositionPatient = np.round(axes @ [-5.0, -7.0, 10 + 2.0 * k], 4).tolist()
        packed = {"RLE": RLELossless, "JPEG-LS": JPEGLSLossless, "JPEG 2000": JPEG2000Lossless}.get(syntax)
        if packed:
            ds.compress(packed, generate_instance_uid=False)
        file = folder / f"{k}.dcm"
        ds.save_as(file, enforce_file_format=True)
        if syntax == "JPEG lossless":
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn(), writer.UseCompressionOn(), writer.SetCompressor("JPEG")
            image = sitk.ReadImage(file)
            writer.SetFileName(str(file))
            writer.Execute(image)
        data = file.read_bytes()
        at = data.index(b"\xe0\x7f\x10\x00")
        begin = at + 12 if not pydicom.dcmread(file).file_meta.TransferSyntaxUID.is_compressed else at + 28
        out.append(Written(folder, file, begin, k))
    return out


def write_file(folder, kind, dice) -> list[Written]:
    folder.mkdir()
    suffix, _, packed = kind.partition(" ")
    path = folder / f"scan{suffix}"
    if suffix.startswith(".nii"):
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = turn(dice) * [0.9, 1.1, 2.3], [4, 5, 6]
        nib.save(nib.Nifti1Image(voxels(dice).transpose(2, 1, 0), affine), path)
        begin = 352 if suffix == ".nii" else 0
    else:
        image = sitk.GetImageFromArray(voxels(dice))
        image.SetSpacing((0.9, 1.1, 2.3)), image.SetDirection(turn(dice).ravel().tolist())
        sitk.WriteImage(image, path, useCompression=bool(packed))
        data, end = path.read_bytes(), b"\n\n" if suffix == ".nrrd" else b"LOCAL\n"
        begin = data.index(end) + len(end)
    return [Written(path, path, begin)]


def damaged(data: bytes, begin: int, end: int, dice) -> tuple[bytes, str, int]:
    """(bytes with a damage between begin and end, its kind, the number of bytes that it may touch)."""
    data, kind = bytearray(data), dice.choice(("cut", "flips", "zeros", "lost", "repeated"))
    at, length = dice.randrange(begin, end), dice.randrange(1, 400)
    if kind == "cut":
        del data[at:]
    elif kind == "flips":
        length = dice.randrange(1, 5)
        for _ in range(length):
            data[dice.randrange(begin, end)] ^= 1 << dice.randrange(8)
    elif kind == "zeros":
        length = min(length, end - at)
        data[at : at + length] = bytes(length)
    elif kind == "lost":
        del data[at : min(at + length, end)]
    else:
        data[at:at] = data[at : min(at + length, end)]
    return bytes(data), kind, length


def outcome(scan: Written, good, guarded: bool, in_voxels: bool, length: int, by_slice: bool) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = read_volume(scan.source)
        except VolumeError as error:
            assert error.fault.value and str(scan.source.parent) not in str(error)
            return "refused"
    array, geometry = good
    got = sitk.GetArrayFromImage(image)
    if got.shape == array.shape and np.array_equal(got, array) and Geometry.of(image) == geometry:
        return "equal"
    if guarded:
        return "another scan"
    if got.shape != array.shape:
        return "another shape"
    different = np.argwhere(got != array)
    if not in_voxels:  # a digit of a header, which nothing guards
        return "header" if not len(different) or by_slice and len(set(different[:, 0])) == 1 else "another scan"
    if not np.allclose(Geometry.of(image).axes, geometry.axes):
        return "another place"
    if by_slice:
        return "one slice" if len(set(different[:, 0])) == 1 else "several slices"
    return "those bytes" if len(different) <= length + 1 else "more than those bytes"


def run(folder, kind, write, seed, capsys):
    dice, found = random.Random(seed), Counter()
    for number in range(7):
        scans = write(folder / f"scan{number}", kind, dice)
        image = read_volume(scans[0].source)
        good = sitk.GetArrayFromImage(image), Geometry.of(image)
        for _ in range(ROUNDS // 7):
            scan = dice.choice(scans)
            data = scan.file.read_bytes()
            in_voxels = scan.begin == 0 or dice.random() < 0.6
            begin, end = (scan.begin, len(data)) if in_voxels else (0, scan.begin)
            bad, damage, length = damaged(data, begin, end, dice)
            # a checksum over all, over the voxels, or a code that has to come out even
            guarded = kind == ".nii.gz" or in_voxels and kind in (".nrrd gzip", ".mha zlib")
            if in_voxels and damage in ("cut", "lost", "repeated"):
                guarded = guarded or kind in ("JPEG lossless", "JPEG-LS", "JPEG 2000")
            if in_voxels and damage in ("cut", "lost", "repeated") and kind in (".nii", ".nrrd", ".mha", "raw"):
                guarded = True  # by its length
            scan.file.write_bytes(bad)
            result = outcome(scan, good, guarded and bad != data, in_voxels, length, kind in DICOM)
            scan.file.write_bytes(data)
            found[result] += 1
        shutil.rmtree(folder / f"scan{number}")
    with capsys.disabled():
        print(f"\n  {kind}: {', '.join(f'{n} {name}' for name, n in found.most_common())}", end="")
    assert set(found) <= {"refused", "equal", "header", "one slice", "those bytes"}, found
    assert found.total() == ROUNDS and found["refused"] > ROUNDS / 4


@pytest.mark.parametrize("kind", DICOM)
def test_damages_of_a_series(kind, tmp_path, capsys):
    if kind == "JPEG-LS":
        pytest.importorskip("jpeg_ls", reason="writing JPEG-LS needs pyjpegls")
    run(tmp_path, kind, write_dicom, DICOM.index(kind), capsys)


@pytest.mark.parametrize("kind", FILES)
def test_damages_of_a_file(kind, tmp_path, capsys):
    run(tmp_path, kind, write_file, 100 + FILES.index(kind), capsys)
