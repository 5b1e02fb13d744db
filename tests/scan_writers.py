"""Writers of small scans for the tests: sound ones, and ones with a fault made on purpose."""

import random
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian

from photon.scan_faults_photon import VolumeError
from photon.scan_reader_photon import read_volume
from photon.scan_report import inspect_volume

SHAPE = (8, 12, 10)  # slices, rows, columns
AFFINE = np.array([[-0.9, 0, 0, 40], [0, 1.3, 0, -70], [0, 0, 2.1, 15], [0, 0, 0, 1]], dtype=np.float64)  # RAS+


def hu(seed=0, shape=SHAPE) -> np.ndarray:
    array = np.random.default_rng(seed).integers(-100, 400, shape).astype(np.int16)
    array[:, :3], array[:, :, :2] = -1000, -1000
    return array


def codes(source, **options) -> set:
    """Codes that reading gives: of the refusal, else of the warnings, else none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            read_volume(source, **options)
        except VolumeError as error:
            return {error.fault}
    assert all(w.category.__name__ == "VolumeWarning" for w in caught), [str(w.message) for w in caught]
    return {w.message.fault for w in caught}


def notes(source, **options) -> set:
    return {f["fault"] for f in inspect_volume(source, **options).faults}


# === Making DICOM ====================================================================================================


def dataset(k: int, plane: np.ndarray, series="1.2.3.4", spacing=(0.7, 0.9), step=2.0) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, f"{series}.{k + 1}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"{series}.{k + 1}"
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = series, "1.2.3", "1.2.3.9"
    ds.Modality, ds.PatientID, ds.InstanceNumber, ds.ImageType = "CT", "P1", k + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-5.0, -7.0, 100 + step * k]
    ds.PixelSpacing, ds.SliceThickness = list(spacing), 5.0  # the thickness is not the distance: it must not be used
    ds.Rows, ds.Columns = plane.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.PixelData = (plane.astype(np.int32) + 1024).astype("<u2").tobytes()
    return ds


def write_series(folder: Path, edit=None, voxels=None, prefix="slice", **options) -> Path:
    """A sound series of CT; `edit(dataset, k)` changes it, and may return None to leave the slice out."""
    folder.mkdir(exist_ok=True)
    voxels = hu() if voxels is None else voxels
    for k in np.random.default_rng(7).permutation(len(voxels)):  # the order of files means nothing
        ds = dataset(int(k), voxels[k], **options)
        if edit is None or edit(ds, int(k)) is not False:
            ds.save_as(folder / f"{prefix}{(k * 5) % 97:03d}.dcm", enforce_file_format=True)
    return folder


def setter(**tags):
    def edit(ds, k):
        for name, value in tags.items():
            setattr(ds, name, value(k) if callable(value) else value)

    return edit


def enhanced(path: Path, edit=None, order=None, phases=1) -> Path:
    order = list(range(8)) if order is None else order
    ds = dataset(0, hu()[0])
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for name in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(ds, name)
    shared, frames = Dataset(), []
    orientation, measures, values = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient, measures.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.7, 0.9]
    values.RescaleSlope, values.RescaleIntercept = 1, -1024
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    shared.PixelValueTransformationSequence = [values]
    for phase in range(phases):
        for k in order:
            frame, place, content = Dataset(), Dataset(), Dataset()
            place.ImagePositionPatient, content.TemporalPositionIndex = [-5.0, -7.0, 100 + 2.0 * k], phase + 1
            frame.PlanePositionSequence, frame.FrameContentSequence = [place], [content]
            frames.append(frame)
    voxels = np.concatenate([hu(phase)[order] for phase in range(phases)]).astype(np.int32) + 1024
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], frames
    ds.NumberOfFrames, ds.PixelData = len(frames), voxels.astype("<u2").tobytes()
    if edit:
        edit(ds)
    ds.save_as(path, enforce_file_format=True)
    return path


# === Files ===========================================================================================================


def nifti(path: Path, edit=None, array=None, affine=AFFINE) -> Path:
    image = nib.Nifti1Image(hu().transpose(2, 1, 0) if array is None else array, affine)
    if edit:
        edit(image)
    nib.save(image, path)
    return path


def patched(path: Path, offset: int, value: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)
    return path


def cut(path: Path, keep: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def written(path: Path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def from_itk(path: Path, array=None, vector=False) -> Path:
    image = sitk.GetImageFromArray(hu() if array is None else array, isVector=vector)
    sitk.WriteImage(image, path)
    return path


def edited(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    return written(path, data.replace(old, new))


def symlink(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def damage(data: bytes, dice: random.Random) -> bytes:
    """Cut, flipped bytes, a block of zeros, a block moved, or a stretch repeated."""
    data, kind = bytearray(data), dice.randrange(5)
    at, length = dice.randrange(len(data)), dice.randrange(1, 400)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        for _ in range(dice.randrange(1, 9)):
            data[dice.randrange(len(data))] = dice.randrange(256)
    elif kind == 2:
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == 3:
        del data[at : at + length]
    else:
        data[at:at] = data[at : at + length]
    return bytes(data)
