"""Which rows of a training step are asked for doubt, and how their scans are spoilt (paper section 3.4).

A row's draw follows from (seed, optimizer step, number in the data set) alone, so that it is the same however a step's
rows are dealt out to batches and ranks, and after a resume.
"""

import hashlib
import random

import torch

SHUFFLED_PATCHES, SHUFFLED_VOXELS, DROPPED_PATCHES, DROPPED_VOXELS, NOISE, EMPTY = range(6)  # as config.robust_shares


def stream(seed, step, example):
    """A seed of 63 bits for one row in one step."""
    digest = hashlib.blake2b(f"{seed},{step},{example}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_rows(config, seed, step, examples, volume_count, flips):
    """Each row's kind of loss and of perturbation.

    Args:
        config: with `robust_probability`, `robust_shares`, `flip_probability`.
        examples, volume_count: (B,) lists: a row's number in the data set, its scans. A row without scans always
            answers.
        flips: whether rows are flipped in this step; else those rows answer.
    Returns: list of "answer" | "robust" | "flip", list of perturbation kinds (`None` but for robust rows).
    """
    kinds, perturbations = [], []
    for example, volumes in zip(examples, volume_count, strict=True):
        chance = random.Random(stream(seed, step, example))
        place, kind, perturbation = chance.random(), "answer", None
        if volumes and place < config.robust_probability:
            kind = "robust"
            perturbation = chance.choices(range(6), weights=config.robust_shares)[0]
        elif volumes and flips and place < config.robust_probability + config.flip_probability:
            kind = "flip"
        kinds.append(kind)
        perturbations.append(perturbation)
    return kinds, perturbations


def perturb(patches, kind, config, generator, empty=0.0, full=1.0):
    """One scan's patches (N, voxels), spoilt; a new tensor.

    Args:
        kind: of the six above.
        config: with `robust_patch_drop`, `robust_voxel_drop`.
        generator: on the patches' device.
        empty, full: what 0 and 1 of the scaled scan are after the processor's mean and std; "zeroed" means `empty`
            (air in CT), noise is even between the two.
    """
    count, device = len(patches), patches.device
    if kind == SHUFFLED_PATCHES:
        return patches[torch.randperm(count, generator=generator, device=device)]
    if kind == SHUFFLED_VOXELS:
        patches = patches[torch.randperm(count, generator=generator, device=device)]
        return patches.gather(1, _random(patches, generator).argsort(dim=1))  # each patch in an order of its own
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
    """A batch's patches with the scans of some rows spoilt: such a row gets scans of its own, behind the others.

    Args: patches (N, voxels) of all volumes; grids (P, 3) and volume_index (P,) of the places in the prompts, as
        `PhotonModel.forward` takes them; volume_count (B,) list, places of each row; perturbations (B,) list, `None`
        where a row is left alone; seeds (B,) list of int.
    Returns: patches, volume_index, and the list of the volumes that are still whole, by their old numbers: these come
        first and in order. The same tensors where no row is spoilt.
    """
    index = volume_index.tolist()
    first = {volume: place for place, volume in reversed(list(enumerate(index)))}
    whole = sorted(first)
    if all(kind is None for kind in perturbations):
        return patches, volume_index, whole
    volumes = patches.split([int(grids[first[volume]].prod()) for volume in whole])
    spoilt, places = {}, iter(range(len(index)))
    for count, kind, seed in zip(volume_count, perturbations, seeds, strict=True):
        generator = torch.Generator(device=patches.device).manual_seed(seed)
        for place in [next(places) for _ in range(count)]:
            if kind is not None:
                spoilt[place] = perturb(volumes[index[place]], kind, config, generator, empty, full)
    whole = sorted({volume for place, volume in enumerate(index) if place not in spoilt})
    numbers = {volume: number for number, volume in enumerate(whole)}
    own = {place: len(whole) + number for number, place in enumerate(spoilt)}
    index = [own[place] if place in own else numbers[volume] for place, volume in enumerate(index)]
    patches = torch.cat([*(volumes[volume] for volume in whole), *spoilt.values()])
    return patches, torch.tensor(index, device=volume_index.device), whole
