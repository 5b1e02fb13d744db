"""Label maps beside the scans -> what each visual token holds; two losses learn from it."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from photon.scan_grid_photon import Geometry, resample
from photon.scan_store_photon import VolumeStore
from photon.training.batches import scan_source
from photon.training.losses.base import Loss

try:
    import SimpleITK as sitk
except ImportError as error:
    raise ImportError("Label maps are read with SimpleITK, which is missing: pip install SimpleITK") from error

PRESENT = 0.02  # share of a patch's voxels from which a class, or its lesion, counts as present


@dataclass
class LabelMapArguments:
    token_label_classes: int = field(default=11, metadata={"help": "labels 0 (background) to this - 1"})


class TokenLabels:
    """Label maps of a row's scan -> what each of its visual tokens holds.

    Args:
        volumes: the processor's volume processor.
        classes: organs and background; a map's labels are 0 (background) to classes - 1.
        cache_dir: the collator's, so that each scan is read once.
    """

    def __init__(self, volumes, classes, cache_dir=None):
        self.volumes, self.classes, self.scans, self.store = volumes, classes, None, None
        if cache_dir is not None:
            self.scans = VolumeStore(cache_dir, volumes.settings)
            self.store = VolumeStore(Path(cache_dir) / "tokens", volumes.settings | {"classes": classes})

    def __call__(self, row, number):
        """Targets of scan `number` (from 0) of a row: float32 (tokens, patches of a token, 2, classes): the share of a
        patch's voxels that each class has, and the share that is lesion of each class. Raises `ValueError`."""
        scan = scan_source(row["volumes"][number])
        paths = [maps[number] for maps in (row["labels"], row["lesions"]) if maps]
        options = {key: value for key, value in scan.items() if key != "path"}
        keys = [] if self.store is None else [self.store.key(path, options) for path in (scan["path"], *paths)]
        found = self.store.load("-".join(keys)) if keys else None
        if found is None:
            _, geometry = self.volumes.prepare(scan, self.scans)
            targets = self.targets(paths, Geometry(**geometry["grid"])).numpy()
            if keys:
                self.store.save("-".join(keys), targets, {})
        else:
            targets, _ = found
        return torch.from_numpy(targets)

    def targets(self, paths, grid):
        maps = [sitk.GetArrayFromImage(resample(sitk.ReadImage(p), grid, outside=0, nearest=True)) for p in paths]
        organs = maps[0].astype(np.int64)  # (D, H, W)
        lesions = maps[1] > 0 if len(maps) > 1 else np.zeros_like(organs, dtype=bool)
        if organs.min() < 0 or organs.max() >= self.classes:
            raise ValueError(
                f"a label map holds labels up to {organs.max()}; token_label_classes {self.classes} allows 0 to "
                f"{self.classes - 1}"
            )
        return torch.stack([self.shares(organs, np.ones_like(lesions)), self.shares(organs, lesions)], dim=-2)

    def shares(self, organs, counted):
        """(D, H, W) labels and which voxels count -> (tokens, patches of a token, classes), of a patch's voxels."""
        organs, counted = self.volumes.patchify(organs), self.volumes.patchify(counted)  # (patches, voxels)
        patches, voxels = organs.shape
        place = np.arange(patches)[:, None] * self.classes + organs
        counts = np.bincount(place.ravel(), weights=counted.ravel(), minlength=patches * self.classes)
        shares = counts.reshape(-1, self.volumes.merge_size**2, self.classes) / voxels
        return torch.from_numpy(shares).float()


class LabelMapLoss(Loss):
    """A loss with `token_targets`: for each volume (T, P, 2, C) of `TokenLabels`, `None` where no row needs them."""

    def __init__(self, arguments, model, processor, cache_dir=None):
        super().__init__(arguments, model, processor, cache_dir)
        self.token_labels = TokenLabels(processor.image_processor, arguments.token_label_classes, cache_dir)

    def needs_label_maps(self, row):
        return True

    def add_targets(self, rows, batch, targets):
        if "volume_index" not in batch:  # no scans
            return
        index = batch["volume_index"].tolist()
        found = targets.setdefault("token_targets", [None] * (max(index) + 1))  # another loss may have read some
        places = ((row, number) for row in rows for number in range(len(row["volumes"])))
        for volume, (row, number) in zip(index, places, strict=True):
            if found[volume] is None and self.needs_label_maps(row):
                found[volume] = self.token_labels(row, number)
