"""Scans that the server holds: encoded once, by content, up to a limit; each upload belongs to whose token sent it."""

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from photon.scan_faults_photon import VolumeError, VolumeFault

GONE = "There is no such file (any more): scans are kept in memory, up to a limit. Upload it again."
OUTSIDE = "There is no such scan in the server's folder of scans. Give a path below it."


@dataclass
class StoredFile:
    """An uploaded scan. key: of its content; owner: number of the token that sent it; nbytes: of the upload."""

    key: str
    owner: int
    nbytes: int
    created: int


class ScanStore:
    """Scans by content, the one used least recently dropped first.

    Args: most_bytes: of all encoded scans together.
    """

    def __init__(self, most_bytes=4 << 30):
        self.most_bytes, self.held, self.lock = most_bytes, OrderedDict(), threading.Lock()
        self.hits = self.misses = 0

    def get(self, key):
        """The scan of that key, or `None`."""
        with self.lock:
            scan = self.held.get(key)
            self.hits, self.misses = self.hits + (scan is not None), self.misses + (scan is None)
            if scan is not None:
                self.held.move_to_end(key)
            return scan

    def put(self, key, scan):
        """Keeps a scan; the newest stays, however large."""
        with self.lock:
            self.held[key] = scan
            self.held.move_to_end(key)
            while len(self.held) > 1 and self.nbytes > self.most_bytes:
                self.held.popitem(last=False)

    @property
    def nbytes(self):
        return sum(scan.nbytes for scan in self.held.values())


class Files:
    """Names of uploads. A name serves only the token that made it.

    Args: most: of one token; older ones are dropped.
    """

    def __init__(self, most=1000):
        self.most, self.held, self.lock = most, OrderedDict(), threading.Lock()

    def add(self, key, owner, nbytes):
        """The new file's id."""
        name = f"file-{secrets.token_hex(16)}"
        with self.lock:
            self.held[name] = StoredFile(key, owner, nbytes, int(time.time()))
            mine = [other for other, file in self.held.items() if file.owner == owner]
            for other in mine[: max(0, len(mine) - self.most)]:
                del self.held[other]
        return name

    def get(self, name, owner):
        """The `StoredFile`, `None` where that token has none of this name."""
        file = self.held.get(name)
        return file if file is not None and file.owner == owner else None

    def remove(self, name, owner):
        """Whether there was such a file."""
        with self.lock:
            return self.get(name, owner) is not None and self.held.pop(name, None) is not None

    def of(self, owner):
        """[(id, `StoredFile`)] of a token."""
        with self.lock:
            return [(name, file) for name, file in self.held.items() if file.owner == owner]


def content_key(path, options):
    """The key of a scan by its content and by how it is read; path: a file."""
    digest = hashlib.sha256(repr(sorted(options.items())).encode())
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def path_key(path, options):
    """The key of a scan in the server's folder: of place, size and time of change of its files."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(str(file), file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr([stats, sorted(options.items())]).encode()).hexdigest()


def path_below(folder, relative):
    """The path of a scan in the server's folder.

    Raises: `VolumeError` where it leads out of the folder, also through links, or to nothing; it does not tell which.
    """
    if folder is not None and "\0" not in relative:
        root = Path(folder).resolve()
        path = (root / relative).resolve()
        if path != root and path.is_relative_to(root) and path.exists():
            return path
    raise VolumeError(VolumeFault.NO_SUCH_FILE, OUTSIDE)
