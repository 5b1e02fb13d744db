"""A scan that came over the network: written under a random name, read into memory, deleted from the disk at once.

    with private_folder() as folder:
        ...                                  # write the upload to folder / "upload"
        scan = read_incoming(folder / "upload", Limits())

Nothing of an upload is trusted: not its name, not its suffix, not the sizes that an archive declares. Files of an
archive get numbers for names, so that no path in it leads anywhere.
"""

import os
import shutil
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from photon.scan_faults_photon import Findings, VolumeError, VolumeFault
from photon.scan_files_photon import ReadOptions, sniff
from photon.scan_reader_photon import check_geometry, open_scan, read_voxels, system_errors

PREFIX = "photon-upload-"
CHUNK = 1 << 20
ZIP = b"PK\x03\x04"
READING = ("tilt", "gaps", "monochrome1", "fill_nonfinite")  # fields of a processor that decide how scans are read
ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Limits:
    """What is read at most. upload_bytes: of the body; unpacked_bytes and files: of an archive; voxels: of a scan."""

    upload_bytes: int = 1 << 30
    unpacked_bytes: int = 2 << 30
    files: int = 5000
    voxels: int = 2**28


@dataclass
class IncomingScan:
    """A scan in memory. image: SimpleITK image; findings: what was noted and warned of while reading."""

    image: object
    findings: list = field(default_factory=list)


@contextmanager
def private_folder():
    """A new folder that only this user can open, deleted with all that is in it when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep():
    """Deletes the folders of processes that were killed while they read an upload."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if folder.owner() == Path.home().owner() and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_incoming(path, limits, processor=None, series=None, frame=None):
    """A file or an archive of DICOM files as an `IncomingScan`.

    Args:
        path: the upload, in a folder of its own; other files are written beside it.
        limits: `Limits`.
        processor: a `PhotonVolumeProcessor`, whose way with faulty scans is followed.
        series, frame: as `read_volume` takes them.
    Raises: `VolumeError` where there is no scan in it, or one beyond the limits.
    """
    path = Path(path)
    with system_errors(), open(path, "rb") as stream:
        packed = stream.read(4) == ZIP
    source = unpack(path, path.with_name("files"), limits) if packed else named_by_content(path)
    return read_place(source, limits, processor, series, frame)


def read_place(source, limits, processor=None, series=None, frame=None):
    """A file or folder of this machine as an `IncomingScan`; the arguments are those of `read_incoming`."""
    ways = {name: getattr(processor, name) for name in READING} if processor is not None else {}
    if frame is not None:
        ways["frame"] = frame
    if series is not None and Path(source).is_dir():
        ways["series"] = series
    options, findings = ReadOptions(max_voxels=limits.voxels, **ways), Findings()
    with system_errors():
        header = open_scan(source, options, findings)
        check_geometry(header.geometry, options, findings)
        image, _ = read_voxels(header, options, findings)
    return IncomingScan(image, list(findings))


def named_by_content(path):
    """Gives a file the suffix of its format, by which the reader would otherwise warn, and returns its new path."""
    with system_errors():
        kind = sniff(path)
        with open(path, "rb") as stream:
            squeezed = stream.read(2) == b"\x1f\x8b"
    suffix = {"nifti": ".nii.gz" if squeezed else ".nii", "nrrd": ".nrrd", "meta": ".mha", "dicom": ".dcm"}.get(kind)
    if suffix is None:
        raise VolumeError(
            VolumeFault.PICKLED_ARRAY if kind == "numpy" else VolumeFault.NOT_A_SCAN,
            "The file is no scan by its content. Send a NIfTI, NRRD or MetaImage file, a multi-frame DICOM file, or a "
            "zip archive of the files of one DICOM series.",
        )
    return path.rename(path.with_name(f"scan{suffix}"))


def unpack(archive, folder, limits):
    """Files of a zip archive, under numbers for names: a folder, or the file where it holds only one.

    Raises: `VolumeError` beyond the limits, counted while unpacking, and for damaged or encrypted archives.
    """
    folder.mkdir()
    left, files = limits.unpacked_bytes, []
    try:
        with zipfile.ZipFile(archive) as listed:
            members = [item for item in listed.infolist() if not item.is_dir() and not _of_the_system(item.filename)]
            if len(members) > limits.files:
                raise VolumeError(
                    VolumeFault.TOO_LARGE,
                    f"The archive holds {len(members)} files; at most {limits.files} are read. Send one series alone.",
                )
            for number, item in enumerate(members):
                file = folder / f"{number:06d}"
                with listed.open(item) as stream, open(file, "wb") as out:
                    while chunk := stream.read(CHUNK):
                        left -= len(chunk)
                        if left < 0:
                            raise VolumeError(
                                VolumeFault.TOO_LARGE,
                                f"Unpacked, the archive has more than {limits.unpacked_bytes >> 20} MiB. Send one "
                                "series alone.",
                            )
                        out.write(chunk)
                files.append(file)
    except ARCHIVE_ERRORS as error:
        if isinstance(error, VolumeError):
            raise
        raise VolumeError(
            VolumeFault.DAMAGED_FILE,
            "The archive cannot be unpacked: it is damaged, encrypted or packed in an unusual way. Pack it again as "
            "plain zip.",
        ) from None
    if not files:
        raise VolumeError(VolumeFault.NOT_A_SCAN, "The archive is empty. Send the files of one DICOM series.")
    return named_by_content(files[0]) if len(files) == 1 else folder


def _of_the_system(name):
    """Whether a Mac or Windows put a file into an archive by itself."""
    parts = name.replace("\\", "/").split("/")
    return "__MACOSX" in parts or parts[-1].startswith("._") or parts[-1] in (".DS_Store", "Thumbs.db")
