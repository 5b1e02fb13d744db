"""Every option that a message recommends can be given on the command line and in a row; files are written whole.

Run: pytest tests/test_read_options.py
"""

import argparse
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk

import ask
import evaluate_hf
from conftest import ROOT
from photon.evaluation.dealing import scan_keys
from photon.evaluation.slices import axial_slices
from photon.processing_photon import READ_OPTIONS, PhotonVolumeProcessor
from photon.read_options import checked_option, read_option, with_read_options
from photon.rows import RowError
from photon.scan_faults_photon import POLICY, VolumeError
from photon.scan_files_photon import ReadOptions
from photon.scan_store_photon import VolumeStore
from photon.training.batches import scan_source
from photon.training.data import load_rows
from photon.whole_file import whole_file, write_image
from scan_writers import hu, setter, write_series

GRID = {"grid": (28, 56, 84), "spacing": (3.0, 1.0, 1.0)}


@pytest.fixture
def head(tmp_path):
    """A CT with slices of 4 and then 7 mm, MONOCHROME1: refused unless both are answered for."""
    return write_series(
        tmp_path / "head",
        setter(
            ImagePositionPatient=lambda k: [-5, -7, 4.0 * k if k <= 4 else 16 + 7.0 * (k - 4)],
            PhotometricInterpretation="MONOCHROME1",
        ),
    )


ASKED = {"gaps": "resample", "monochrome1": "as_stored"}


@pytest.mark.parametrize("text, expected", [
    ("gaps=resample", ("gaps", "resample")), ("monochrome1=as_stored", ("monochrome1", "as_stored")),
    ("tilt=refuse", ("tilt", "refuse")), ("assume-hu=True", ("assume_hu", True)), ("series=2", ("series", 2)),
    ("assume_hu=false", ("assume_hu", False)), ("fill_nonfinite=-1000", ("fill_nonfinite", -1000.0)),
    ("frame=3", ("frame", 3)), ("series=1.2.3", ("series", "1.2.3")), ("max_voxels=100", ("max_voxels", 100)),
    ("modality=mr", ("modality", "mr")),
])  # fmt: skip
def test_options_as_text(text, expected):
    assert read_option(text) == expected


@pytest.mark.parametrize("text, named", [
    ("gaps=fill", "'refuse', 'resample', 'interpolate'"), ("gaps", "NAME=VALUE"), ("colour=red", "monochrome1"),
    ("frame=two", "whole number"), ("fill_nonfinite=air", "a number"), ("assume_hu=maybe", "true or false"),
    ("modality=pet", "'auto', 'ct', 'mr'"),
])  # fmt: skip
def test_options_that_are_none(text, named):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(named)):
        read_option(text)


def test_every_option_that_a_text_recommends_is_one():
    texts = [why for _, why in POLICY.values()] + [file.read_text("utf-8") for file in ROOT.glob("scan_*_photon.py")]
    named = {
        name for text in texts for name in re.findall(r"\b([a-z_0-9]+)=\"?(?:[a-z_]+\"|VALUE|True|0|1\b|`)", text)
    }
    named &= {
        "gaps",
        "tilt",
        "monochrome1",
        "fill_nonfinite",
        "assume_hu",
        "series",
        "frame",
        "max_voxels",
        "modality",
    }
    assert {"gaps", "tilt", "monochrome1", "fill_nonfinite", "frame", "series"} <= named <= set(READ_OPTIONS)
    assert set(ReadOptions.__annotations__) < set(READ_OPTIONS) <= set(ReadOptions.__annotations__) | {
        "modality", "assume_hu",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_processor_takes_options_of_each_scan(head, tmp_path):
    processor = PhotonVolumeProcessor(**GRID)
    with pytest.raises(VolumeError, match="MONOCHROME1|SLICE_INCREMENT"):
        processor([head])
    part = {"path": str(head), **ASKED}
    by_part = processor([part], cache_dir=tmp_path / "cache")["pixel_values_videos"]
    by_field = PhotonVolumeProcessor(**GRID, **ASKED)([head])["pixel_values_videos"]
    np.testing.assert_allclose(by_part, by_field, atol=5e-4)
    store = VolumeStore(tmp_path / "cache", processor.settings)
    assert store.key(head, ASKED) != store.key(head, {}) and store.load(store.key(head, ASKED)) is not None
    as_mr, as_ct = (processor([part | {"modality": m, "assume_hu": True}]) for m in ("ct", "ct"))
    np.testing.assert_array_equal(as_mr["pixel_values_videos"], as_ct["pixel_values_videos"])
    with pytest.raises(VolumeError, match="MODALITY_UNSUPPORTED"):
        processor([part | {"modality": "mr"}])
    with pytest.raises(ValueError, match="gaps"):
        processor([part | {"colour": 1}])


def test_inspect_reads_as_told(head, capsys):
    with pytest.raises(SystemExit):
        ask.main(["--inspect", str(head)])
    assert 'gaps="resample"' in capsys.readouterr().out
    ask.main(["--inspect", str(head), "--json", "--read", "gaps=resample", "--read", "monochrome1=as_stored"])
    report = json.loads(capsys.readouterr().out)
    assert report["readable"] and report["geometry"]["size"] == [10, 12, 10]
    with pytest.raises(SystemExit):
        ask.main(["--inspect", str(head), "--read", "gaps=yes"])
    assert "refuse" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_answer_with_its_picture_and_map(head, tmp_path, capsys):
    """The scan is read three times: for the model, for the picture and for the map, each time as told."""
    options = ["--read", "gaps=resample", "--read", "monochrome1=as_stored", "--max-new-tokens", "1"]
    ask.main([str(head), "Is there a lesion?", *options, "--overlay", str(tmp_path / "a.png"),
              "--keep-map", str(tmp_path / "a.nii.gz"), "--json"])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["tokens_kept"] > 0
    assert sitk.ReadImage(tmp_path / "a.nii.gz").GetSize() == (10, 12, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "a.png", "head"]


def rows_file(folder, volumes):
    part = [{"type": "volume"}, {"type": "text", "text": "Where?"}]
    messages = [{"role": "user", "content": part}, {"role": "assistant", "content": "left"}]
    (folder / "rows.jsonl").write_text(json.dumps({"volumes": volumes, "messages": messages}) + "\n")
    return folder / "rows.jsonl"


def test_rows_name_options(head, tmp_path):
    entry = {"path": "head", **ASKED, "assume_hu": True, "frame": 0}
    (volume,) = load_rows(rows_file(tmp_path, [entry]))[0]["volumes"]
    assert scan_source(volume) == entry | {"path": str(head)}
    assert json.loads(json.dumps(volume)) == volume
    for wrong, named in (
        ({"gaps": "yes"}, "resample"),
        ({"colour": 1}, "gaps"),
        ({"assume_hu": "perhaps"}, "true or"),
    ):
        with pytest.raises(RowError, match=named):
            load_rows(rows_file(tmp_path, [{"path": "head", **wrong}]))


def test_evaluation_reads_as_told(head, tmp_path):
    rows = [{"volumes": [str(head)]}, {"volumes": [{"path": str(head), "gaps": "interpolate"}]}]
    parsed = evaluate_hf.parse([
        "--benchmark", "jsonl", "--data", "x", "--model", str(ROOT), "--output", str(tmp_path / "run"),
        "--read", "gaps=resample", "--read", "monochrome1=as_stored",
    ])  # fmt: skip
    assert parsed.read == list(ASKED.items())
    told = with_read_options(rows, parsed.read)
    assert told[0]["volumes"] == [{"path": str(head), **ASKED}]
    assert told[1]["volumes"][0]["gaps"] == "interpolate"  # what a row says counts
    assert json.loads(scan_keys(told[0])[0]) == {"path": str(head), **ASKED}
    assert with_read_options(rows, []) is rows
    with pytest.warns(UserWarning):
        assert len(axial_slices(head, 4, (-160.0, 240.0), **ASKED)) == 4


def test_values_of_json_are_checked_too():
    assert checked_option("assume_hu", True) is True and checked_option("series", 2) == 2
    with pytest.raises(ValueError, match="whole number"):
        checked_option("frame", [1])


# === Files are written whole =========================================================================================


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out.txt"
    with whole_file(target) as partial:
        partial.write_text("first")
        assert partial.parent == tmp_path and partial.suffix == ".txt" and not target.exists()
    with pytest.raises(RuntimeError), whole_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text("utf-8") == "first" and [p.name for p in tmp_path.iterdir()] == ["out.txt"]
    for name in ("a.nii.gz", "b.nrrd", "c.mha", "d.nii"):
        image = sitk.GetImageFromArray(hu())
        write_image(image, tmp_path / name)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / name)), hu())


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails as one to a full disk does
sys.path.insert(0, sys.argv[1])
import numpy as np, SimpleITK as sitk
from photon.overlay import Row, draw_rows
from photon.scan_store_photon import VolumeStore
from photon.whole_file import whole_file, write_image
image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 2, (40, 50, 60)).astype(np.uint8))
store = VolumeStore(sys.argv[2] + "/cache", {})
patches = np.random.default_rng(0).random((50, 2744), np.float32)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
def text():
    with whole_file(sys.argv[2] + "/page.html") as partial:
        partial.write_text("x" * 50000)
for name, job in {
    "nifti": lambda: write_image(image, sys.argv[2] + "/kept.nii.gz"),
    "nrrd": lambda: write_image(image, sys.argv[2] + "/kept.nrrd"),
    "meta": lambda: write_image(image, sys.argv[2] + "/kept.mha"),
    "page": text,
    "store": lambda: store.save("key", patches, {}),
}.items():
    try:
        job()
        print(name, "written")
    except OSError as error:
        print(name, "refused", "/tmp" in str(error) and name in ("nifti", "nrrd", "meta"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's files")
def test_a_full_disk_leaves_no_file(tmp_path):
    (tmp_path / "kept.nii.gz").write_bytes(b"an older map")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(ROOT), str(tmp_path)], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.endswith(("written", "True", "False"))]
    assert lines == [f"{name} refused False" for name in ("nifti", "nrrd", "meta", "page", "store")]
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"kept.nii.gz"} and (tmp_path / "kept.nii.gz").read_bytes() == b"an older map"
