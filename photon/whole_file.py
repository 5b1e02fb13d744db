"""Files that are written completely or not at all: beside their place, checked, then renamed.

with whole_file("out.png") as partial:
    figure.savefig(partial)                  # fails: nothing is left behind, and an older out.png stays
write_image(image, "kept.nii.gz")            # SimpleITK does not notice a full disk: the file is read back
"""

import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def whole_file(path):
    """Yields a path in the same folder with the same suffixes; it gets the name `path` when the block ends well."""
    path = Path(path)
    stem = path.name.split(".")[0] or path.name
    partial = path.with_name(f".{stem}.{os.getpid()}.part{path.name[len(stem) :]}")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # before the rename, so that the name never belongs to half a file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_image(image, path, level=-1):
    """Writes a SimpleITK image compressed and reads it back. level: of compression, -1 is the format's default.

    Raises: `OSError` where the file does not hold the image, as on a full disk.
    """
    import SimpleITK as sitk

    with whole_file(path) as partial:
        try:
            sitk.WriteImage(image, str(partial), True, level)
            written = sitk.ReadImage(str(partial))
            whole = np.array_equal(sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(written))
        except RuntimeError:  # its message has several lines and holds the path
            whole = False
        if not whole:
            raise OSError("The image could not be written completely. Is the folder writable, and the disk not full?")
