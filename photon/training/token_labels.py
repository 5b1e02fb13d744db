"""A throw-away head that teaches the vision tower what each visual token holds (`--token-labels`).

Answers alone say very little about where to look; a tower that starts from random weights then stays at chance for a
long time. With label maps beside the scans, a linear head on the visual tokens learns each token's organs and lesions.
It is dropped when the model is saved.

The same label maps can teach the scheduler (`--evidence-weight`): of a question that names the labels it is about, the
tokens that hold them are the evidence, and those are to be kept.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from photon.scan_grid_photon import Geometry, resample
from photon.scan_store_photon import VolumeStore
from photon.training.data import reading

try:
    import SimpleITK as sitk
except ImportError as error:
    raise ImportError("token labels are read with SimpleITK, which is missing: pip install SimpleITK") from error


PRESENT = 0.02  # share of a patch's voxels from which a class, or its lesion, counts as there


class TokenLabels:
    """Label maps of a row's scan -> what each of its visual tokens holds.

    Args:
        volumes: the processor's volume processor.
        classes: organs and background; a map's labels are 0 (background) to classes - 1.
        cache_dir: as the collator's.
    """

    def __init__(self, volumes, classes, cache_dir=None):
        self.volumes, self.classes, self.scans, self.store = volumes, classes, None, None
        self.geometry, self.resample = Geometry, resample
        if cache_dir is not None:
            store_class = VolumeStore
            self.scans = store_class(cache_dir, volumes.settings)  # the collator's, so that a scan is read once
            self.store = store_class(Path(cache_dir) / "tokens", volumes.settings | {"classes": classes})

    def __call__(self, row, number):
        """Targets of scan `number` (from 0) of a row: float32 (tokens, patches of a token, 2, classes): the share of a
        patch's voxels that each class has, and the share that is lesion of each class."""
        scan = reading(row["volumes"][number])
        paths = [maps[number] for maps in (row["labels"], row["lesions"]) if maps]
        options = {key: value for key, value in scan.items() if key != "path"}
        keys = [] if self.store is None else [self.store.key(path, options) for path in (scan["path"], *paths)]
        found = self.store.load("-".join(keys)) if keys else None
        if found is None:
            _, geometry = self.volumes.prepare(scan, self.scans)
            targets = self.targets(paths, self.geometry(**geometry["grid"])).numpy()
            if keys:
                self.store.save("-".join(keys), targets, {})
        else:
            targets, _ = found
        return torch.from_numpy(targets)

    def targets(self, paths, grid):
        maps = [sitk.GetArrayFromImage(self.resample(sitk.ReadImage(p), grid, outside=0, nearest=True)) for p in paths]
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


class TokenHead(nn.Module):
    """Linear head on the vision tower's output; hooked into its forward, so that it is wrapped and sharded with it.

    A token answers for each of its patches, since it must know where in it a lesion lies; and for a lesion only in the
    classes that a patch holds, since elsewhere the question teaches nothing but the rarity of lesions.

    Args: size of a visual token; patches of a token; classes of the label maps.
    """

    def __init__(self, size, patches, classes):
        super().__init__()
        self.shape, self.logits = (patches, 2, classes), []
        self.linear = nn.Linear(size, patches * 2 * classes)

    def attach(self, visual):
        visual.register_forward_hook(self._look)

    def _look(self, visual, args, output):
        if visual.training:
            logits = self.linear(output.pooler_output.to(self.linear.weight.dtype))
            self.logits.append(logits.float().unflatten(-1, self.shape))  # (T, P, 2, C)

    def losses(self, targets):
        """Organ cross-entropy over a scan's patches, and lesion binary cross-entropy over the organs in its patches;
        uses up what was looked at.

        Args: targets: a list, (T, P, 2, C) of `TokenLabels` for each of the first scans that were looked at, or `None`
            for a batch without scans. Returns: (scans,); for a batch without scans one 0.
        """
        logits = torch.cat(self.logits)
        self.logits = []
        if not targets:
            return 0.0 * logits.sum()[None]  # takes part in the reduction
        losses, begin = [], 0
        for target in targets:
            organ, lesion = logits[begin : begin + len(target)].unbind(-2)  # (T, P, C)
            begin += len(target)
            organs, lesions = target.unbind(-2)
            there = organs > PRESENT
            there[..., 0] = False  # background
            lesion = F.binary_cross_entropy_with_logits(lesion, (lesions > PRESENT).float(), reduction="none")
            organ = -(organs * organ.log_softmax(-1)).sum(-1).mean()
            losses.append(organ + (lesion * there).sum() / there.sum().clamp(min=1))
        return torch.stack(losses)


def evidence_tokens(targets, evidence):
    """Which visual tokens hold one of the labels `evidence` in a patch. targets: a list of (T, P, 2, C) of
    `TokenLabels`, of the scans that a row shows. Returns (V,) bool, V the tokens of all of them."""
    shares = torch.cat(targets)[:, :, 0]  # (V, P, C)
    return (shares[..., evidence] > PRESENT).any(-1).any(-1)


def evidence_losses(keep_prob, visual_count, targets, evidence):
    """How far each row is from keeping its evidence and nothing else: cross-entropy of the keep probabilities, with
    tokens that are evidence and tokens that are not weighing alike, as few are.

    Args: keep_prob (B, V); visual_count (B,); targets: for each row the list of its scans' targets; evidence: for each
        row its labels. Rows without labels, or without scans, give 0.
    Returns: (B,).
    """
    losses = []
    for row, (scans, labels) in enumerate(zip(targets, evidence, strict=True)):
        prob = keep_prob[row, : int(visual_count[row])].clamp(1e-6, 1 - 1e-6)
        if not labels or not scans:
            losses.append(0.0 * prob.sum())
            continue
        wanted = evidence_tokens(scans, labels).to(prob.device)
        parts = [-group.log().mean() for group in (prob[wanted], 1 - prob[~wanted]) if len(group)]
        losses.append(sum(parts) / len(parts))
    return torch.stack(losses)


__all__ = ["TokenHead", "TokenLabels", "evidence_losses", "evidence_tokens"]
