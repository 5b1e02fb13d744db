"""Properties of the grid over random geometries: a point in the patient lands where it must, and finds its way back.

Run: pytest tests/test_volume_properties.py
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.scan_reader_photon import read_volume

ROOT = Path(__file__).resolve().parents[1]
volume = sys.modules[read_volume.__module__]
Geometry, model_grid, resample = volume.Geometry, volume.model_grid, volume.resample

ORIENTATIONS = [
    "".join(letter[flip] for letter, flip in zip(letters, flips, strict=True))
    for letters in (("LR", "PA", "SI"), ("PA", "SI", "LR"), ("SI", "LR", "PA"), ("LR", "SI", "PA"))
    for flips in np.ndindex(2, 2, 2)
]


def three(values):
    return st.tuples(values, values, values)


@st.composite
def affines(draw, shear=True):
    """Voxel to RAS+ mm: any rotation, flips, spacing, offset, and some shear."""
    axes = np.array(sitk.VersorTransform(draw(unit_axes()), draw(st.floats(-3.1, 3.1))).GetMatrix()).reshape(3, 3)
    axes = axes @ np.diag(draw(three(st.sampled_from([-1.0, 1.0]))))
    if shear and draw(st.booleans()):
        skew = np.eye(3)
        skew[draw(st.sampled_from([(0, 1), (1, 2), (0, 2)]))] = draw(st.floats(-0.4, 0.4))
        axes = axes @ skew
    affine = np.eye(4)
    affine[:3, :3] = axes * np.array(draw(three(st.floats(0.4, 4.0))))
    affine[:3, 3] = draw(three(st.floats(-300, 300)))
    return affine


@st.composite
def unit_axes(draw):
    axis = np.array(draw(three(st.floats(-1, 1)))) + np.array([1e-3, 0, 1.1])
    return (axis / np.linalg.norm(axis)).tolist()


sizes = three(st.integers(6, 14))
properties = settings(max_examples=60, deadline=None, derandomize=True)


def blob(shape, centre) -> np.ndarray:
    """A linear cone around a point given in (fractional) voxels; its centroid is the point."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    return np.clip(2.5 - np.linalg.norm(index - centre, axis=-1), 0, None).astype(np.float32)


def world_of(grid: Geometry, index_zyx) -> np.ndarray:
    x = np.array(index_zyx)[::-1]
    return np.array(grid.origin) + np.array(grid.direction).reshape(3, 3) @ (np.array(grid.spacing) * x)


@properties
@given(affine=affines(), size=sizes, where=three(st.floats(0.35, 0.65)), code=st.sampled_from(ORIENTATIONS))
def test_a_marked_point_lands_in_its_grid_voxel_and_back(affine, size, where, code):
    """The mark's centroid in the model's grid, in mm, is the marked voxel's own place by the affine alone."""
    voxel = np.floor(np.array(size) * where)
    array = blob(size, voxel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", volume.VolumeWarning)  # sheared affines are told of
        image = read_volume((array, affine))
    scan = Geometry.of(image)
    fine = min(scan.spacing) * 0.5
    extent = np.linalg.norm(np.array(size) * scan.spacing)
    n = int(np.ceil(extent / fine)) + 4
    if n > 90:
        fine, n = extent / 84, 90
    grid = model_grid(scan, size=(n, n + 1, n + 2), spacing=(fine, fine, fine), orientation=code)
    got = sitk.GetArrayFromImage(resample(image, grid, outside=0.0))
    assert got.shape == (n, n + 1, n + 2)
    centroid = [(got.sum(axis=tuple({0, 1, 2} - {a})) * np.arange(got.shape[a])).sum() / got.sum() for a in range(3)]
    expected = (affine @ [*voxel, 1])[:3] * [-1, -1, 1]  # RAS+ to LPS
    there = world_of(grid, centroid)
    mm = max(scan.spacing) / 2 + fine
    assert np.abs(there - expected).max() < mm
    # and back: the grid voxel nearest to the mark, painted, covers the marked voxel of the scan
    marks = np.zeros(got.shape, np.uint8)
    near = np.round(centroid).astype(int)
    reach = int(np.ceil(mm / fine)) + 1
    marks[tuple(slice(max(0, i - reach), i + reach + 1) for i in near)] = 1
    back = sitk.GetArrayFromImage(resample(grid.image(marks), scan, nearest=True, outside=0.0))  # (k, j, i)
    assert back[tuple(int(v) for v in voxel[::-1])] == 1


@properties
@given(affine=affines(shear=False), size=sizes, code=st.sampled_from(ORIENTATIONS))
def test_a_grid_like_the_scan_is_the_scan_reoriented(affine, size, code):
    """With the scan's own size and spacing the one interpolation must be DICOMOrient: no voxel moves or changes."""
    array = np.random.default_rng(sum(size)).integers(-1000, 300, size).astype(np.int16)
    image = read_volume((array, affine))
    oriented = sitk.DICOMOrient(image, code)
    grid = model_grid(
        Geometry.of(image), size=oriented.GetSize()[::-1], spacing=oriented.GetSpacing()[::-1], orientation=code
    )
    np.testing.assert_allclose(grid.origin, oriented.GetOrigin(), atol=1e-3)
    got = sitk.GetArrayFromImage(resample(image, grid))
    assert np.abs(got - sitk.GetArrayFromImage(oriented)).max() < 1.0  # of 2000: the rim moves by 1e-4 voxels
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(resample(image, grid, nearest=True)), sitk.GetArrayFromImage(oriented)
    )


@properties
@given(affine=affines(), size=sizes, spacing=three(st.floats(0.5, 6.0)), code=st.sampled_from(ORIENTATIONS))
def test_the_grid_is_orthonormal_centred_and_named_as_asked(affine, size, spacing, code):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", volume.VolumeWarning)
        image = read_volume((np.arange(np.prod(size), dtype=np.int32).reshape(size), affine))
    grid = model_grid(Geometry.of(image), size=(5, 6, 7), spacing=spacing, orientation=code)
    axes = np.array(grid.direction).reshape(3, 3)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    middle = (affine @ [*(np.array(size) - 1) / 2, 1])[:3] * [-1, -1, 1]
    np.testing.assert_allclose(world_of(grid, (2, 2.5, 3)), middle, atol=1e-3)
    assert grid.spacing == tuple(spacing)[::-1] and grid.size == (7, 6, 5)
    assert sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(list(grid.direction)) == code
