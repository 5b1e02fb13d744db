"""Preprocessed scans on disk, so that an epoch does not resample again.

The key of an entry is the scan's content and the processor's settings: a renamed file is found, a changed one is not.
An entry holds patches and geometry, and nothing else of the scan: no name, no date, no path. It is written beside its
place and renamed, so that several processes may write at once.
"""

import hashlib
import json
import os
import tempfile
import time
from functools import lru_cache
from os import PathLike
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CHUNK = 1 << 20
SETTLED = 2_000_000_000  # nanoseconds
DTYPE = np.float16  # half the space; error 5e-4 of the input range, less than half a HU for most of a CT


class VolumeStore:
    """A folder of preprocessed scans.

    Args: folder: made where it is missing. settings: what decides the result beside the scan; JSON-serialisable.
    """

    def __init__(self, folder, settings):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = json.dumps(settings, sort_keys=True).encode()

    def key(self, source, options):
        """The entry's name, or `None` for objects in memory, which are not stored."""
        if not isinstance(source, (str, PathLike)) or not Path(source).exists():
            return None
        digest = hashlib.blake2b(self.settings + json.dumps(options, sort_keys=True).encode(), digest_size=20)
        for part in sorted(_digest(file) for file in _files(Path(source))):
            digest.update(part)
        return digest.hexdigest()

    def load(self, key):
        """Patches (N, voxels) float32 and geometry, or `None` where there is no complete entry."""
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "np") as entry:
                return entry.get_tensor("patches").astype(np.float32), json.loads(entry.metadata()["geometry"])
        except (SafetensorError, OSError, KeyError, ValueError):
            path.unlink(missing_ok=True)  # cut short by a full disk: written again
            return None

    def save(self, key, patches, geometry):
        """Returns the patches as `load` will give them, so that a first reading equals the later ones."""
        stored = patches.astype(DTYPE)
        handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        try:
            save_file({"patches": stored}, partial, metadata={"geometry": json.dumps(geometry)})
            with open(partial, "rb+") as stream:
                os.fsync(stream.fileno())  # before the rename, so that the name never belongs to half an entry
            os.replace(partial, self.folder / f"{key}.safetensors")
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"A preprocessed scan could not be written to cache_dir; is the disk full? ({error})"
            ) from error
        finally:
            Path(partial).unlink(missing_ok=True)
        return stored.astype(np.float32)


def _files(path):
    """The files of a scan: those of a folder, or a file and those of its stem (a header's voxels)."""
    if path.is_dir():
        return [file for file in path.iterdir() if file.is_file()]
    if path.suffix.lower() in (".mhd", ".nhdr", ".hdr", ".img"):
        return [file for file in path.parent.iterdir() if file.is_file() and file.stem == path.stem]
    return [path]


def _digest(file):
    """A file's hash. A process does not hash a file of the same path, inode, size and time of change again, once that
    time is two seconds old; a change of content that keeps all four is found by the next process only."""
    stat = file.stat()
    known_by = (os.path.realpath(file), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if time.time_ns() - stat.st_mtime_ns < SETTLED:  # it may change again within one tick of the clock
        return _hash(known_by[0])
    return _settled_hash(*known_by)


@lru_cache(maxsize=1 << 18)
def _settled_hash(path, inode, size, changed):
    return _hash(path)


def _hash(path):
    digest = hashlib.blake2b(digest_size=20)
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.digest()
