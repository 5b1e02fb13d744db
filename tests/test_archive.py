"""A whole data set: every scan has a record, whatever happens to its worker; the cache is the one of training.

Run: pytest tests/test_archive.py
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import prepare_hf
from archive_jobs import Troubled, make_nothing, make_square
from conftest import ROOT
from photon.archive.audit import DIED, Audit
from photon.archive.listing import list_scans
from photon.archive.pool import Death, in_processes
from photon.archive.reading import Reader
from photon.archive.report import text_of
from photon.processing_photon import PhotonVolumeProcessor
from photon.scan_grid_photon import Geometry
from photon.scan_reader_photon import read_volume
from scan_writers import from_itk, hu, nifti, setter, write_series, written

SETTINGS = PhotonVolumeProcessor(grid=(28, 56, 84), spacing=(3.0, 1.0, 1.0)).settings
SECRET = "Doe_Jane_19700101"


@pytest.fixture
def data(tmp_path):
    """Seven scans: three healthy ones, in three formats, a gap, a damaged file, an MR without a tag, another depth."""
    folder = tmp_path / "data"
    (folder / "deep" / "er").mkdir(parents=True)
    nifti(folder / f"{SECRET}.nii.gz")
    from_itk(folder / "deep" / "b.mhd", hu(2))
    write_series(folder / "deep" / SECRET, setter(PatientName="Zzyzx"))
    write_series(folder / "gap", lambda ds, k: k != 4)
    nifti(folder / "deep" / "er" / "cut.nii.gz")
    data = (folder / "deep" / "er" / "cut.nii.gz").read_bytes()
    written(folder / "deep" / "er" / "cut.nii.gz", data[:-200])
    nifti(folder / "mr.nii", array=np.random.default_rng(0).integers(0, 900, (10, 12, 8)).astype(np.int16))
    written(folder / "notes.txt", "no scan")
    return folder


def by_path(audit):
    """{last part of the path: record}."""
    paths = {scan.id: scan.source["path"] for scan in audit.scans}
    return {paths[record["id"]].rsplit("/", 1)[-1]: record for record in audit.records()}


def test_every_scan_below_a_folder_once(data):
    scans = list_scans(data)
    names = [os.path.relpath(scan.source["path"], data) for scan in scans]
    assert sorted(names) == sorted(
        [f"{SECRET}.nii.gz", "deep/b.mhd", f"deep/{SECRET}", "gap", "deep/er/cut.nii.gz", "mr.nii"]
    )
    assert [scan.id for scan in scans] == [f"{n:04d}" for n in range(1, 7)]
    assert list_scans(data, options=[("gaps", "interpolate")])[0].source["gaps"] == "interpolate"
    (data / "empty").mkdir()
    with pytest.raises(ValueError, match="no scan"):
        list_scans(data / "empty")


def test_scans_of_rows_with_their_options(data, tmp_path):
    def row(*volumes):
        user = [{"type": "volume"} for _ in volumes] + [{"type": "text", "text": "Where?"}]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "left"}]
        return json.dumps({"volumes": list(volumes), "messages": messages}) + "\n"

    gap = {"path": "gap", "gaps": "interpolate"}
    (data / "rows.jsonl").write_text(row(f"{SECRET}.nii.gz") + row(f"{SECRET}.nii.gz", gap) + row("gap"))
    scans = list_scans(data / "rows.jsonl")
    assert [scan.source for scan in scans] == [
        {"path": str(data / f"{SECRET}.nii.gz")},
        {"path": str(data / "gap"), "gaps": "interpolate"},
        {"path": str(data / "gap")},
    ]


def test_the_command_reads_all_and_fills_the_cache_of_training(data, tmp_path, capsys, monkeypatch):
    cache, page = tmp_path / "cache", tmp_path / "report.html"
    prepare_hf.main(["--data", str(data), "--cache-dir", str(cache), "--workers", "2", "--report", str(page)])
    out = capsys.readouterr()
    assert "6 scans: 3 read, 3 refused, 0 killed their worker" in out.out and "6/6" in out.err
    lines = {line.split()[1]: line for line in out.out.splitlines() if re.match(r"\d{4}  ", line)}
    assert set(lines) == {"MISSING_SLICES", "DAMAGED_FILE", "MODALITY_UNKNOWN"}
    assert 'gaps="interpolate"' in lines["MISSING_SLICES"] and "Fetch it again" in lines["DAMAGED_FILE"]
    assert "spacing in plane (mm)" in out.out
    # the cache is the one of the processor: nothing is read again
    processor = prepare_hf.load_processor(str(ROOT)).image_processor
    fresh = processor([data / f"{SECRET}.nii.gz"])["pixel_values_videos"]
    monkeypatch.setattr(type(processor), "read", None)
    for name in (f"{SECRET}.nii.gz", "deep/b.mhd", f"deep/{SECRET}"):
        kept = processor([{"path": str(data / name)}], cache_dir=cache)["pixel_values_videos"]
    kept = processor([data / f"{SECRET}.nii.gz"], cache_dir=cache)["pixel_values_videos"]
    np.testing.assert_allclose(kept, fresh, atol=5e-4)
    # nothing of the patient in what is reported
    html = page.read_text("utf-8")
    records = "".join(file.read_text("utf-8") for file in cache.glob("audit-*/records-*.jsonl"))
    for text in (html, out.out, out.err, records):
        assert SECRET not in text and "Zzyzx" not in text and str(tmp_path) not in text
    assert html.count("data:image/png;base64") == 4 and "MISSING_SLICES" in html  # three thumbnails, one figure
    (mapped,) = cache.glob("audit-*/scans.jsonl")
    ids = {json.loads(line)["path"]: json.loads(line)["id"] for line in mapped.read_text("utf-8").splitlines()}
    assert lines["MISSING_SLICES"].startswith(ids[str(data / "gap")])
    # again: there is nothing to do
    prepare_hf.main(["--data", str(data), "--cache-dir", str(cache), "--workers", "2"])
    out = capsys.readouterr()
    assert "6 scans: 3 read, 3 refused" in out.out and "0scan" in out.err.replace(" ", "")
    # with an option that a message recommends
    prepare_hf.main(["--data", str(data), "--cache-dir", str(cache), "--workers", "1", "--read", "gaps=interpolate"])
    assert "4 read, 2 refused" in capsys.readouterr().out


def test_a_record_says_what_was_read(data, tmp_path):
    reader = Reader(SETTINGS, tmp_path / "cache")
    source = {"path": str(data / f"{SECRET}.nii.gz")}
    record, again = reader(source), reader(source)
    scan = Geometry.of(read_volume(data / f"{SECRET}.nii.gz"))
    assert record["size"] == list(scan.size) and record["spacing"] == pytest.approx(scan.spacing, abs=1e-4)
    assert record["extent"] == pytest.approx([n * s for n, s in zip(scan.size, scan.spacing, strict=True)], abs=0.06)
    array, *_ = PhotonVolumeProcessor(**SETTINGS).read(data / f"{SECRET}.nii.gz")
    assert record["mean"] == pytest.approx(array[::2, ::2, ::2].mean(), abs=1e-3) and record["dark"] == pytest.approx(
        (array[::2, ::2, ::2] <= 0).mean(), abs=1e-3
    )
    assert (tmp_path / "cache" / f"{record['entry']}.safetensors").is_file()
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in record.items() if k != "seconds"}
    patches, _ = PhotonVolumeProcessor(**SETTINGS).prepare(source)
    np.testing.assert_allclose(reader._every_second_voxel(patches, (2, 4, 6)), array[::2, ::2, ::2], atol=1e-6)


def test_a_scan_that_kills_its_worker_is_recorded_and_the_others_are_read(data, tmp_path):
    for name in ("killer", "crash", "quit", "hang"):
        nifti(data / f"{name}.nii.gz")
    audit = Audit(list_scans(data), SETTINGS, tmp_path / "cache")
    records = list(audit.run(workers=2, timeout=25, make_reader=Troubled))
    assert len(records) == 10
    found = by_path(audit)
    for name, reason in (("killer", "SIGKILL: often out of memory"), ("crash", "SIGSEGV"), ("quit", "exit code 3"),
                         ("hang", "no answer in 25 s")):  # fmt: skip
        assert found[f"{name}.nii.gz"]["fault"] == DIED and reason in found[f"{name}.nii.gz"]["message"]
    assert [found[name]["status"] for name in (f"{SECRET}.nii.gz", "b.mhd", "gap", "mr.nii")] == [
        "read", "read", "refused", "refused",
    ]  # fmt: skip
    assert "3 read, 3 refused, 4 killed their worker" in text_of(audit.records(), len(audit.scans))
    assert {scan.source["path"].rsplit("/", 1)[-1].split(".")[0] for scan, _ in audit.open_scans()} == {
        "killer", "crash", "quit", "hang",
    }  # read again next time: the machine may have had too little memory  # fmt: skip


def test_a_killed_run_goes_on_where_it_was(data, tmp_path):
    """The process is killed while it reads; the next run reads the others, and no line is lost or doubled."""
    for number in range(30):
        nifti(data / f"more{number}.nii.gz", array=hu(number).transpose(2, 1, 0))
    cache = tmp_path / "cache"
    command = [sys.executable, str(ROOT / "prepare_hf.py"), "--data", str(data), "--cache-dir", str(cache),
               "--workers", "1"]  # fmt: skip
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(2400):
            lines = [
                line for file in cache.glob("audit-*/records-*.jsonl") for line in file.read_text("utf-8").splitlines()
            ]
            if len(lines) > 5 or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    (file,) = cache.glob("audit-*/records-*.jsonl")
    file.write_text(file.read_text("utf-8")[:-20])  # and the last line is half
    before = file.read_text("utf-8").splitlines()[:-1]
    assert 5 <= len(before) < 36
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "36 scans: 33 read, 3 refused" in done.stdout, done.stderr[-2000:]
    after = file.read_text("utf-8").splitlines()
    assert after[: len(before)] == before and len(after) == 36
    assert len({json.loads(line)["stamp"] for line in after}) == 36


def test_changed_files_and_lost_entries_are_read_again(data, tmp_path):
    audit = Audit(list_scans(data), SETTINGS, tmp_path / "cache")
    assert len(list(audit.run(workers=1))) == 6
    assert audit.open_scans() == []
    nifti(data / "deep" / "er" / "cut.nii.gz")  # mended
    next((tmp_path / "cache").glob("*.safetensors")).unlink()
    assert len(audit.open_scans()) == 2
    assert {record["status"] for record in audit.run(workers=1)} == {"read"}
    assert by_path(audit)["cut.nii.gz"]["status"] == "read" and len(audit.records()) == 6
    other = Audit(list_scans(data), SETTINGS | {"modality": "mr"}, tmp_path / "cache")
    assert len(other.open_scans()) == 6 and other.folder != audit.folder


def test_shards_of_an_array_job_read_each_scan_once(data, tmp_path):
    cache, numbers = tmp_path / "cache", []
    for part in (1, 2, 3):
        audit = Audit(list_scans(data), SETTINGS, cache, (part, 3))
        numbers.append([record["id"] for record in audit.run(workers=1)])
    assert sorted(sum(numbers, [])) == [f"{n:04d}" for n in range(1, 7)] and [len(n) for n in numbers] == [2, 2, 2]
    whole = Audit(list_scans(data), SETTINGS, cache)
    assert len(whole.records()) == 6 and whole.open_scans() == []  # whoever read them
    for text in ("0/3", "4/3", "3", "a/b"):
        with pytest.raises(SystemExit):
            prepare_hf.parse(["--data", "x", "--cache-dir", "y", "--shard", text])
    assert prepare_hf.parse(["--data", "x", "--cache-dir", "y", "--shard", "2/3"]).shard == (2, 3)


def test_a_full_cache_folder_ends_the_run(data, tmp_path, capsys):
    shutil.rmtree(data / "gap")
    written(tmp_path / "file", "")
    with pytest.raises(SystemExit):
        prepare_hf.main(["--data", str(data), "--cache-dir", str(tmp_path / "file")])
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# === Worker processes ================================================================================================


def test_results_of_every_task_whatever_its_worker_does():
    got = dict(in_processes(make_square, (), range(40), workers=3))
    assert set(got) == set(range(40)) and isinstance(got.pop(13), Death)
    assert all(got[n] == n * n for n in got)


def test_tasks_are_taken_when_a_worker_is_free():
    taken = []

    def tasks():
        for number in range(20):
            taken.append(number)
            yield number

    results = in_processes(make_square, (), tasks(), workers=2)
    next(results)
    assert len(taken) <= 5
    results.close()
    assert list(in_processes(make_square, (), [], workers=2)) == []


def test_what_a_job_raises_ends_the_work():
    with pytest.raises(OSError, match="no space"):
        list(in_processes(make_square, (), [1, 99, 2, 3], workers=2))
    with pytest.raises(ImportError, match="a library"):
        list(in_processes(make_nothing, (), [1, 2], workers=2))


# === Ray =============================================================================================================


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='Ray is optional: pip install "ray[data]"')
def test_two_nodes_of_a_ray_cluster(data, tmp_path):
    """In a process by itself, since Ray changes signals and logging."""
    code = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
import prepare_hf
prepare_hf.main(["--data", sys.argv[1], "--cache-dir", sys.argv[2], "--workers", "2", "--ray", cluster.address])
cluster.shutdown()
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(data), str(tmp_path / "cache")],
        cwd=tmp_path, env=env, capture_output=True, encoding="utf-8", timeout=400,
    )  # fmt: skip
    assert "6 scans: 3 read, 3 refused, 0 killed" in done.stdout, done.stderr[-3000:]
    files = list((tmp_path / "cache").glob("audit-*/records-*-of-8.jsonl"))  # four shards a node
    assert len(files) == 8 and sum(len(file.read_text("utf-8").splitlines()) for file in files) == 6
