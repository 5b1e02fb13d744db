"""The scans of a data set, each once, in an order that is the same on every machine.

for scan in list_scans("rows.jsonl"):       # Scan(id="000017", source={"path": ..., "frame": 2})
    ...
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from photon.scan_files_photon import SUFFIXES
from photon.training.batches import scan_source
from photon.training.data import load_rows

FILES = tuple(suffix for group in SUFFIXES.values() for suffix in group)
DICOM_SUFFIXES = ("", ".dcm", ".dicom", ".ima")


@dataclass(frozen=True)
class Scan:
    """One scan of a data set. source: its path with reading options, as the processor takes it."""

    id: str
    source: dict

    def stamp(self, settings):
        """A hash of the scan's place, options, sizes and times, and of the settings: equal while nothing changed."""
        path = Path(self.source["path"])
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        stats = [(file.name, *_size_and_time(file)) for file in files]
        text = json.dumps([self.source, stats, settings], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _size_and_time(file):
    try:
        stat = file.stat()
    except OSError:
        return None, None
    return stat.st_size, stat.st_mtime_ns


def list_scans(data, volume_root=None, options=()):
    """List of `Scan` of a file of rows (as training takes it) or of a folder.

    Of a folder: every NIfTI, NRRD and MetaImage file, and every folder that holds DICOM files, at any depth.
    Args: volume_root: folder to which relative paths in rows belong. options: pairs of reading options for all scans;
        what a row says about its scan counts more.
    Raises: `ValueError` where there is no scan.
    """
    path = Path(data)
    if path.is_dir() and not any(path.glob("*.parquet")) and not (path / "dataset_info.json").exists():
        sources = [{"path": str(scan)} for scan in sorted(_walk(path))]
    else:
        rows = load_rows(data, volume_root=volume_root)
        sources = [scan_source(volume) for row in rows for volume in row["volumes"]]
    sources = [dict(options) | source for source in sources]
    distinct = list({json.dumps(source, sort_keys=True): source for source in sources}.values())
    if not distinct:
        raise ValueError("--data holds no scan: expected rows with 'volumes', or a folder of scans.")
    width = max(4, len(str(len(distinct))))
    return [Scan(f"{number:0{width}d}", source) for number, source in enumerate(distinct, start=1)]


def _walk(root):
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name) for name in names if name.lower().endswith(FILES))
        if any(_is_dicom(Path(folder, name)) for name in names if not name.lower().endswith(FILES)):
            yield Path(folder)


def _is_dicom(file):
    """By content; of the suffixes that DICOM files have, so that a folder of pictures is not opened file by file."""
    if file.suffix.lower() not in DICOM_SUFFIXES and not file.suffix[1:].isdecimal():
        return False
    try:
        with open(file, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False
