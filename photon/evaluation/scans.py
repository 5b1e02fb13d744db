"""The files of scans below a folder, and the patient in a scan's name."""

import os
import re
from functools import lru_cache
from pathlib import Path

from photon.rows import RowError

SUFFIX = re.compile(r"\.(nii\.gz|nii|nrrd|nhdr|mha|mhd)$", re.IGNORECASE)
ARRAY = re.compile(r"\.(npy|npz)$", re.IGNORECASE)
CT_RATE = re.compile(r"(train|valid|test)_(\d+)_([a-z]+)_(\d+)")


class ScanFolder:
    """Files of scans below a folder, found by the end of their path without suffix."""

    def __init__(self, root):
        self.root, self.index = root, None

    def path(self, *names, expected=None):
        """The file of the first name that exists, as text; else `expected`, where it should be.

        Args:
            names: like "valid_1_a_1", "BDMAP_1/ct", "ct_quizze/000006/Axial".
            expected: path below the folder without suffix; default the first name.
        Raises: `RowError` where a name exists more than once.
        """
        if self.index is None:
            self.index = self._walk()
        for name in names:
            parts = tuple(name.split("/"))
            found = [p for tail, p in self.index.get(parts[-1], ()) if tail[-len(parts) :] == parts]
            if len(found) > 1:
                raise RowError(f"its scan is in {len(found)} places below volumes; name the one folder meant")
            if found:
                return str(found[0])
        return str(self.root / f"{expected or names[0]}.nii.gz")

    def _walk(self):
        index, visited = {}, set()
        for folder, inner, files in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited:  # a link back
                inner.clear()
                continue
            visited.add(real)
            parts = Path(folder).relative_to(self.root).parts
            for file in sorted(files):
                if SUFFIX.search(file):
                    stem = SUFFIX.sub("", file)
                    index.setdefault(stem, []).append(((self.root.name, *parts, stem), Path(folder) / file))
        return index


def stem_of(name):
    """A scan's name without the suffix of a scan or of an array."""
    return ARRAY.sub("", SUFFIX.sub("", name))


@lru_cache(maxsize=65536)
def patient_of(scan):
    """The patient in a scan's name: CT-RATE's valid_12_a_1 -> valid_12, BDMAP_1/ct.nii.gz -> BDMAP_1; or the name."""
    path = Path(scan)
    stem = stem_of(path.name)
    match = CT_RATE.fullmatch(stem)
    if match:
        return f"{match[1]}_{match[2]}"
    return path.parent.name if stem == "ct" and path.parent.name else stem


def scan_paths(rows):
    """Paths of the rows' scans in their order, each once."""
    return list(dict.fromkeys(v["path"] if isinstance(v, dict) else v for row in rows for v in row["volumes"]))


def missing_volumes(rows):
    """Paths of scans that are not on disk, in the order of the rows; each once."""
    return [path for path in scan_paths(rows) if not os.path.exists(path)]
