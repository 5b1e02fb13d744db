"""Preprocessed scans on disk: the same numbers, found by content, whole or not at all."""

import json
import multiprocessing
import os
import shutil
import sys
import time

import numpy as np
import pytest
import SimpleITK as sitk
from safetensors import safe_open
from transformers import AutoProcessor

from conftest import ROOT, SETTINGS, TOKENS
from photon.scan_store_photon import VolumeStore

SECRET = "doe_jane_19700101"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).image_processor


@pytest.fixture
def scan(tmp_path):
    array = np.random.default_rng(0).integers(-1000, 300, (12, 17, 23)).astype(np.int16)
    array[0] = -1000  # air, without which values are no HU
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((9.0, 11.0, 13.0))
    path = tmp_path / f"{SECRET}.nii.gz"
    sitk.WriteImage(image, str(path))
    return path


def entries(folder):
    return sorted(folder.glob("*"))


def test_stored_equals_fresh_and_is_read_once(processor, scan, tmp_path, monkeypatch):
    folder = tmp_path / "store"
    fresh = processor([scan])
    first = processor([scan], cache_dir=folder)
    np.testing.assert_allclose(first["pixel_values_videos"], fresh["pixel_values_videos"], atol=5e-4)
    assert len(entries(folder)) == 1
    monkeypatch.setattr(type(processor), "read", None)  # a second reading would fail
    again = processor([scan, {"path": str(scan)}], cache_dir=folder)
    for scan_again in np.split(again["pixel_values_videos"], 2):  # a resumed run must see what the first run saw
        np.testing.assert_array_equal(scan_again, first["pixel_values_videos"])
    assert json.loads(json.dumps(again["scans"][1])) == json.loads(json.dumps(fresh["scans"][0]))


def test_content_and_settings_make_the_key(processor, scan, tmp_path):
    folder = tmp_path / "store"
    processor([scan], cache_dir=folder)
    renamed = scan.with_name("other.nii.gz")
    shutil.copy(scan, renamed)
    processor([renamed], cache_dir=folder)
    assert len(entries(folder)) == 1
    image = sitk.ReadImage(str(scan))
    image[1, 2, 3] += 1
    sitk.WriteImage(image, str(renamed))
    processor([renamed], cache_dir=folder)
    assert len(entries(folder)) == 2
    processor([scan], cache_dir=folder, modality="mr")
    processor([{"path": scan, "frame": 0}], cache_dir=folder)
    assert len(entries(folder)) == 4
    processor([image], cache_dir=folder)  # objects in memory are not kept
    assert len(entries(folder)) == 4


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    store_class = VolumeStore
    module, opened = sys.modules[store_class.__module__], []
    path, store = tmp_path / "scan.nii.gz", store_class(tmp_path / "store", {})
    monkeypatch.setattr(module, "open", lambda *a: opened.append(a) or open(*a), raising=False)

    def key(content, age):
        """Of a file of the same name and size that was changed `age` seconds ago; asked for twice."""
        path.write_bytes(content)
        os.utime(path, (time.time() - age,) * 2)
        first, second = store.key(path, {}), store.key(path, {})
        assert first == second
        return first

    keys = [key(b"first", age=500)]
    assert len(opened) == 1
    keys.append(key(b"other", age=400))
    assert len(opened) == 2
    keys.append(key(b"third", age=0))  # just changed: it may change again within one tick, and is looked at each time
    assert len(opened) == 4 and len(set(keys)) == 3


def test_a_header_with_its_voxels_beside_it(processor, scan, tmp_path):
    image = sitk.ReadImage(str(scan))
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    store = VolumeStore(tmp_path / "store", {})
    before = store.key(tmp_path / "a.mhd", {})
    sitk.WriteImage(image + 1, str(tmp_path / "a.mhd"))
    assert store.key(tmp_path / "a.mhd", {}) != before


def test_a_broken_entry_is_made_anew(processor, scan, tmp_path):
    folder = tmp_path / "store"
    fresh = processor([scan], cache_dir=folder)
    (entry,) = entries(folder)
    entry.write_bytes(entry.read_bytes()[:5000])
    again = processor([scan], cache_dir=folder)
    np.testing.assert_array_equal(again["pixel_values_videos"], fresh["pixel_values_videos"])
    (entry,) = entries(folder)
    with safe_open(entry, "np") as tensors:
        assert tensors.get_tensor("patches").shape == (4 * TOKENS, SETTINGS["patch_size"] ** 3)


def test_nothing_of_the_patient_is_stored(processor, scan, tmp_path):
    folder = tmp_path / "store"
    processor([scan], cache_dir=folder)
    (entry,) = entries(folder)
    assert SECRET not in entry.name and SECRET.encode() not in entry.read_bytes()
    with safe_open(entry, "np") as tensors:
        assert set(tensors.metadata()) == {"geometry"}


def _write(folder, seed):
    store = VolumeStore(folder, {})
    patches = np.full((40, 14**3), 0.5, np.float32)
    for _ in range(20):
        store.save("same", patches, {"seed": seed})
        found = store.load("same")
        assert found is not None and (found[0] == 0.5).all()


def test_several_processes_may_write(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(tmp_path, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert [file.name for file in entries(tmp_path)] == ["same.safetensors"]
