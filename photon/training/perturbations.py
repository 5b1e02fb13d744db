"""Chooses the robust and the flipped rows of a training step, and perturbs the scans of the robust rows.

The source is section 3.4 of the paper. A robust row shows a perturbed scan, and the model learns to be unsure about
it. The choice depends only on the seed, the optimizer step and the row's number in the data set. So it does not change
with the batch size, with the number of ranks, or after a resume.
"""

import hashlib
import random

import torch

from photon.objectives_photon import Objective

SHUFFLED_PATCHES, SHUFFLED_VOXELS, DROPPED_PATCHES, DROPPED_VOXELS, NOISE, EMPTY = range(6)  # as config.robust_shares


def stream(seed, step, example):
    """A seed of 63 bits for one row in one step."""
    digest = hashlib.blake2b(f"{seed},{step},{example}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_rows(config, seed, step, examples, volume_count, flips):
    """Each row's objective and perturbation.

    Args:
        config: with `robust_probability`, `robust_shares`, `flip_probability`.
        examples, volume_count: lists of B: a row's number in the data set, and how many scans it has. A row without
            scans always answers.
        flips: whether rows are flipped in this step; otherwise those rows answer.
    Returns: list of B `Objective`, list of B perturbation kinds (`None` except for robust rows).
    """
    objectives, perturbations = [], []
    for example, volumes in zip(examples, volume_count, strict=True):
        chance = random.Random(stream(seed, step, example))
        place, objective, perturbation = chance.random(), Objective.ANSWER, None
        if volumes and place < config.robust_probability:
            objective = Objective.ROBUST
            perturbation = chance.choices(range(6), weights=config.robust_shares)[0]
        elif volumes and flips and place < config.robust_probability + config.flip_probability:
            objective = Objective.FLIP
        objectives.append(objective)
        perturbations.append(perturbation)
    return objectives, perturbations


def perturb(patches, kind, config, generator, empty=0.0, full=1.0):
    """One scan's patches (N, voxels), perturbed; a new tensor.

    Args:
        kind: of the six above.
        config: with `robust_patch_drop`, `robust_voxel_drop`.
        generator: on the patches' device.
        empty, full: what 0 and 1 of the scaled scan become by the processor's mean and std. A dropped voxel becomes
            `empty` (air in CT); noise is uniform between the two.
    """
    count, device = len(patches), patches.device
    if kind == SHUFFLED_PATCHES:
        return patches[torch.randperm(count, generator=generator, device=device)]
    if kind == SHUFFLED_VOXELS:
        patches = patches[torch.randperm(count, generator=generator, device=device)]
        return patches.gather(1, _random(patches, generator).argsort(dim=1))  # a different order in each patch
    if kind == DROPPED_PATCHES:
        dropped = torch.randperm(count, generator=generator, device=device)[: round(config.robust_patch_drop * count)]
        return patches.index_fill(0, dropped, empty)
    if kind == DROPPED_VOXELS:
        return patches.masked_fill(_random(patches, generator) < config.robust_voxel_drop, empty)
    if kind == NOISE:
        return (empty + (full - empty) * _random(patches, generator)).to(patches.dtype)
    if kind == EMPTY:
        return torch.full_like(patches, empty)
    raise ValueError(f"kind of perturbation is {kind!r}; expected 0 to 5.")


def _random(patches, generator):
    return torch.rand(patches.shape, generator=generator, device=patches.device)


def perturb_rows(patches, grids, volume_index, volume_count, perturbations, config, seeds, empty=0.0, full=1.0):
    """A batch's patches with the scans of some rows perturbed: such a row gets copies, behind the other volumes.

    Args: patches (N, voxels) of all volumes; grids (P, 3) and volume_index (P,) of the places in the prompts, as
        `PhotonModel.forward` takes them; volume_count: list of B, the places of each row; perturbations: list of B,
        `None` where a row stays as it is; seeds: list of B ints.
    Returns: patches, volume_index, and the list of the clean volumes (not perturbed in at least one place) by their
        old numbers. These come first, in this order. Without a perturbation both tensors are the ones given.
    """
    index = volume_index.tolist()
    first = {volume: place for place, volume in reversed(list(enumerate(index)))}
    clean = sorted(first)
    if all(kind is None for kind in perturbations):
        return patches, volume_index, clean
    volumes = patches.split([int(grids[first[volume]].prod()) for volume in clean])
    perturbed, places = {}, iter(range(len(index)))
    for count, kind, seed in zip(volume_count, perturbations, seeds, strict=True):
        generator = torch.Generator(device=patches.device).manual_seed(seed)
        for place in [next(places) for _ in range(count)]:
            if kind is not None:
                perturbed[place] = perturb(volumes[index[place]], kind, config, generator, empty, full)
    clean = sorted({volume for place, volume in enumerate(index) if place not in perturbed})
    numbers = {volume: number for number, volume in enumerate(clean)}
    copies = {place: len(clean) + number for number, place in enumerate(perturbed)}
    index = [copies[place] if place in copies else numbers[volume] for place, volume in enumerate(index)]
    patches = torch.cat([*(volumes[volume] for volume in clean), *perturbed.values()])
    return patches, torch.tensor(index, device=volume_index.device), clean
