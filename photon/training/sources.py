"""Records of a data set, wherever it is, each with its place for messages.

for place, record in read_records("train.jsonl"):            # a JSON lines file
for place, record in read_records("folder"):                 # of `Dataset.save_to_disk`, or of parquet files
for place, record in read_records("owner/name", "train"):    # a data set of the Hub
for place, record in read_records(dataset):                  # `Dataset`, `IterableDataset`, list of dicts
"""

import atexit
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk

from photon.rows import RowError, read_rows

GZIP = b"\x1f\x8b"
TEMPORARY = "photon-scans-"  # how the name of a folder of `EmbeddedScans` begins
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # what `save_to_disk` leaves in a folder


def read_records(source, split=None):
    """Yields (place, record or `RowError`).

    Args:
        source: path of a .jsonl or .parquet file, or of a folder of `save_to_disk` or of parquet files; a Hub id; a
            set of `datasets`, in memory or streamed; a list of dicts.
        split: of a set that has several; default "train".
    Raises: `ValueError` for a split where there is none; `FileNotFoundError`; `RowError` for another kind of file.
    """
    if not isinstance(source, str | Path):
        return _of_set(source, split, "row")
    path = Path(source)
    if path.is_dir():
        return _of_folder(path, split)
    if path.suffix in (".jsonl", ".json", ".parquet", ".arrow") or path.exists():
        if split is not None:
            raise ValueError(f"split {split!r} is for a set with several splits; a file was given.")
        if not path.is_file():
            raise FileNotFoundError(f"There is no data file {path.name}; expected a .jsonl or .parquet file.")
        if path.suffix == ".parquet":
            return _of_set(Dataset.from_parquet(str(path)), None, f"{path.name} row")
        if path.suffix == ".arrow":
            return _of_set(Dataset.from_file(str(path)), None, f"{path.name} row")
        return read_rows(path)
    split = split or "train"
    return _of_set(load_dataset(str(source), split=split), None, f"{source} {split} row")


def _of_folder(path, split):
    if any((path / name).is_file() for name in SAVED):
        return _of_set(load_from_disk(path), split, f"{path.name} row")
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"The folder {path.name} holds no data set: expected what save_to_disk writes, or .parquet files."
        )
    return _of_set(load_dataset(str(path), split=split or "train"), None, f"{path.name} row")


def _of_set(data, split, place):
    if isinstance(data, dict):  # `DatasetDict`, `IterableDatasetDict`
        split = split or "train"
        if split not in data:
            raise ValueError(f"There is no split {split!r}; the set has {', '.join(map(repr, data))}.")
        data, place = data[split], f"{split} {place}"
    elif split is not None:
        raise ValueError(f"split {split!r} was asked for, but the set has no splits.")
    rows = data
    if hasattr(data, "with_format"):  # as stored: a decoded scan would be read here, before training
        tables = data.with_format("arrow").iter(batch_size=64)
        rows = (row for table in tables for row in table.to_pylist())
    for number, record in enumerate(rows):
        fault = None if isinstance(record, dict) else RowError("not a dict")
        yield f"{place} {number}", fault or record


def content_name(path):
    """The name of a file that `EmbeddedScans` wrote to a folder of its own, which its content decides; else `None`."""
    path = Path(path)
    return path.name if path.parent.name.startswith(TEMPORARY) else None


class EmbeddedScans:
    """Files for scans that a set holds as bytes, as a parquet file of the `Nifti` feature does.

    Args: folder: where they are kept; default a folder that goes when the process ends.
    """

    def __init__(self, folder=None):
        self.folder = None if folder is None else Path(folder)

    def path(self, content):
        """The path of a file with these bytes, a NIfTI image."""
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix=TEMPORARY))
            atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        suffix = ".nii.gz" if content.startswith(GZIP) else ".nii"
        file = self.folder / (hashlib.blake2b(content, digest_size=16).hexdigest() + suffix)
        if not file.is_file():
            handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".part")
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            os.replace(partial, file)
        return str(file)
