"""The engine that answers in batches, and uploads: read under random names, whatever they are."""

import io
import os
import queue
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from conftest import ROOT, TOKENS, real
from photon import asking
from photon.loading import load
from photon.scan_faults_photon import VolumeError, VolumeFault
from photon.serving import incoming
from photon.serving.engine import Answer, Busy, Engine, EngineError
from photon.serving.incoming import Limits, private_folder, read_incoming, sweep
from scripts.demo import write_dicom

ORGANS = ("liver", "spleen", "left kidney", "right lung")


def body(seed=0, size=(21, 27, 33)):
    rng = np.random.default_rng(seed)
    array = rng.normal(0, 60, size).astype(np.int16)
    array[:, :3] = array[:, -3:] = array[:, :, :4] = -1000
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((9.0, 8.0, 11.0))
    image.SetOrigin((-100.0, 40.0, -300.0))
    return image


def chat(question):
    return [{"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": question}]}]


def complete(asked):
    *pieces, answer = asked
    assert "".join(pieces).strip() == answer.text
    return answer


@pytest.fixture(scope="module")
def engine():
    engine = Engine(*load(ROOT))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def scans(engine):
    return [engine.encode(engine.read(body(seed))) for seed in (0, 1)]


class Held:
    """Keeps the engine's thread busy, so that questions wait for each other."""

    def __init__(self, engine):
        self.free = threading.Event()
        engine.pool.submit(self.free.wait)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.free.set()


# === The engine ======================================================================================================


def test_batched_answers_are_those_of_ask(engine, scans):
    """Texts and kept tokens equal those of one question at a time, and of the whole path without a server."""
    questions = [f"Is there a lesion in the {organ}?" for organ in ORGANS]
    with Held(engine):
        asked = [engine.ask(chat(question), [scans[0]]) for question in questions]
    answers = [complete(one) for one in asked]
    assert [answer.batch for answer in answers] == [4] * 4
    for question, answer in zip(questions, answers, strict=True):
        alone = complete(engine.ask(chat(question), [scans[0]]))
        result, inputs, keep = asking.ask(engine.processor, engine.model, [body(0)], question)
        assert alone.batch == 1 and answer.text == alone.text == result["answer"]
        assert torch.equal(answer.keep_mask, keep[0]) and torch.equal(alone.keep_mask, keep[0])
        assert (answer.tokens_kept, answer.tokens_seen) == (result["tokens_kept"], TOKENS)
        assert abs(answer.threshold - result["threshold"]) < 1e-5
        assert answer.prompt_tokens == inputs["input_ids"].shape[1] and answer.finish_reason == "stop"
        mine = engine.keep_map([scans[0]], answer.keep_mask)
        theirs = engine.processor.keep_map(keep, inputs)
        np.testing.assert_array_equal(sitk.GetArrayViewFromImage(mine), sitk.GetArrayViewFromImage(theirs))


def test_grounding_is_that_of_ask(engine, scans):
    """Also in a batch; none where nothing is deleted, or where a stop word ended the answer."""
    questions = [f"Is there a lesion in the {organ}?" for organ in ORGANS]
    with Held(engine):
        asked = [engine.ask(chat(question), [scans[0]], grounding=True) for question in questions]
        plain = engine.ask(chat(questions[0]), [scans[0]])
    answers = [complete(one) for one in asked]
    assert [answer.batch for answer in answers] == [4] * 4 and complete(plain).grounding is None
    told = asking.ask_all(engine.processor, engine.model, [body(0)], questions, grounding=True)
    assert [a.grounding for a in answers] == pytest.approx([result["grounding"] for result, _, _ in told], abs=1e-3)
    whole = complete(engine.ask(chat(questions[0]), [scans[0]], grounding=True, use_scheduler=False))
    stop = answers[0].text[-1]
    stopped = complete(engine.ask(chat(questions[0]), [scans[0]], grounding=True, stop=[stop]))
    assert whole.grounding is None and stopped.grounding is None
    ends, engine.end_ids = engine.end_ids, set()
    try:  # an answer that its length ends has one
        cut = complete(engine.ask(chat(questions[0]), [scans[0]], grounding=True, max_new_tokens=1))
    finally:
        engine.end_ids = ends
    assert cut.finish_reason == "length" and cut.grounding is not None


def test_only_what_fits_is_answered_together(engine, scans):
    with Held(engine):
        asked = [
            engine.ask(chat("Is there a lesion in the liver?"), [scans[0]]),
            engine.ask(chat("Is there a lesion in the liver?"), [scans[1]]),
            engine.ask(chat("Is there a lesion in the spleen?"), [scans[0]], token_budget=17),
            engine.ask(chat("Is there a lesion in the spleen?"), [scans[0]]),
        ]
    answers = [complete(one) for one in asked]
    assert [answer.batch for answer in answers] == [2, 1, 1, 2]
    assert answers[2].tokens_kept == 17 and answers[2].threshold is None


def test_turns_and_two_scans(engine, scans):
    earlier = [*chat("Is there a lesion in the liver?"), {"role": "assistant", "content": "yes"},
               {"role": "user", "content": "And in the spleen?"}]  # fmt: skip
    assert complete(engine.ask(earlier, [scans[0]])).tokens_seen == TOKENS
    both = [{"role": "user", "content": [{"type": "volume"}] * 2 + [{"type": "text", "text": "Has it grown?"}]}]
    answer = complete(engine.ask(both, scans))
    result, _, keep = asking.ask(engine.processor, engine.model, [body(0), body(1)], "Has it grown?")
    assert answer.text == result["answer"] and torch.equal(answer.keep_mask, keep[0])


def test_a_question_in_front_of_its_scan_and_a_system_turn(engine, scans):
    """Neither shares the beginning of the usual prompt; both are answered as without a server."""
    before = [{"role": "user", "content": [{"type": "text", "text": "Is there a lesion in the liver?"},
                                           {"type": "volume"}]}]  # fmt: skip
    system = [{"role": "system", "content": "One word."}, *chat("Is there a lesion in the spleen?")]
    usual = chat("Is there a lesion in the right lung?")
    with Held(engine):
        asked = [engine.ask(turns, [scans[0]]) for turns in (system, usual)]
    together = [complete(one) for one in asked]
    assert together[0].batch == 2
    for turns, answer in zip(
        (system, usual, before), [*together, complete(engine.ask(before, [scans[0]]))], strict=True
    ):
        filled = [{**turn, "content": turn["content"] if isinstance(turn["content"], str) else
                   [{"type": "volume", "volume": body(0)} if part["type"] == "volume" else part
                    for part in turn["content"]]} for turn in turns]  # fmt: skip
        inputs = engine.processor.apply_chat_template(
            filled, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = engine.model.generate(**inputs, return_dict_in_generate=True)
        text = engine.processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.text == text.strip() and torch.equal(answer.keep_mask, output.past_key_values.cut.keep_mask[0])


def test_stop_words_and_lengths(engine, scans):
    """Stop words end an answer and never come out, not even in part; a cut answer is marked."""
    never = {"use_scheduler": False}
    whole = complete(engine.ask(chat("How many lesions are in the liver?"), [scans[0]], **never))
    assert len(whole.text) >= 1
    stopped = engine.ask(chat("How many lesions are in the liver?"), [scans[0]], stop=[whole.text[-1]], **never)
    *pieces, answer = stopped
    assert whole.text[-1] not in "".join(pieces) and answer.finish_reason == "stop"
    assert answer.text == whole.text[: whole.text.index(whole.text[-1])].strip()
    ends, engine.end_ids = engine.end_ids, set()
    try:  # without an end the answer would be cut
        cut = complete(engine.ask(chat("Is there?"), [scans[0]], max_new_tokens=1))
    finally:
        engine.end_ids = ends
    assert cut.finish_reason == "length" and cut.answer_tokens == 1


def test_limits_of_the_queue(engine, scans):
    small = Engine(engine.processor, engine.model, max_waiting=2)
    with Held(small):
        asked = [small.ask(chat("Is there?"), [scans[0]]) for _ in range(2)]
        with pytest.raises(Busy, match="ask again later"):
            small.ask(chat("Is there?"), [scans[0]])
    assert all(complete(one).batch == 2 for one in asked)
    small.close()
    with pytest.raises(EngineError, match="shut down"):
        small.ask(chat("Is there?"), [scans[0]])


def test_who_does_not_wait_is_left_out(engine, scans):
    with Held(engine):
        late = engine.ask(chat("Is there?"), [scans[0]], timeout=0.0)
        left = engine.ask(chat("Is there?"), [scans[0]])
        left.cancel()
        stays = engine.ask(chat("Is there?"), [scans[0]])
    for gone in (late, left):
        with pytest.raises(TimeoutError, match="waited too long"):
            list(gone)
    assert complete(stays).batch == 1


def test_cancelled_in_the_middle(engine, scans):
    """The row ends at its next token; the other row of its batch goes on."""
    events = queue.SimpleQueue()
    with Held(engine):
        first = engine.ask(chat("Is there?"), [scans[0]], on_event=events.put)
        other = engine.ask(chat("Is there a lesion in the liver?"), [scans[0]])
    ends, engine.end_ids = engine.end_ids, set()
    try:
        while not isinstance(events.get(), str):
            pass
        first.cancel()
        answer = complete(other)
    finally:
        engine.end_ids = ends
    while not isinstance(last := events.get(), Answer):
        pass
    assert last.finish_reason in ("cancelled", "length") and last.answer_tokens <= answer.answer_tokens


def test_faults_reach_whoever_asked(engine, scans, monkeypatch):
    with pytest.raises(ValueError, match="token_budget is -2"):
        list(engine.ask(chat("Is there?"), [scans[0]], token_budget=-2))
    with pytest.raises(ValueError, match="nonsense: not known"):
        engine.ask(chat("Is there?"), [scans[0]], nonsense=1)
    with pytest.raises(ValueError, match="no scan"):
        engine.ask(chat("Is there?"), [])
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "generate", lambda **inputs: 1 / 0)
        with pytest.raises(EngineError, match="log"):
            list(engine.ask(chat("Is there?"), [scans[0]]))
    assert complete(engine.ask(chat("Is there?"), [scans[0]])).tokens_seen == TOKENS  # the thread lives on


# === Uploads =========================================================================================================


@pytest.fixture
def inbox():
    with private_folder() as folder:
        yield folder


def written(folder, image, name):
    file = folder / name
    sitk.WriteImage(image, str(file))
    return file.rename(folder / "upload")


def zipped(folder, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(folder / "upload", "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return folder / "upload"


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"])
def test_files_by_content(inbox, name):
    """An upload has no suffix; it is read as its content says, without a warning about names."""
    scan = read_incoming(written(inbox, body(), name), Limits())
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(scan.image), sitk.GetArrayFromImage(body()))
    assert scan.findings == []


def test_a_zipped_series(inbox, tmp_path):
    """Names in the archive lead nowhere: absolute ones, parents, links, equal ones."""
    write_dicom(body(), tmp_path / "series")
    names = ["/etc/passwd", "../../up.dcm", "a/b/c.dcm", "..\\win.dcm", "doe_jane.dcm"]
    slices = sorted((tmp_path / "series").iterdir())
    files = [(names[n] if n < len(names) else f"same/{n}", file.read_bytes()) for n, file in enumerate(slices)]
    files += [("__MACOSX/._x", b"x"), (".DS_Store", b"x")]
    archive = zipped(inbox, files)
    scan = read_incoming(archive, Limits())
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(scan.image), sitk.GetArrayFromImage(body()))
    assert sorted(file.name for file in (inbox / "files").iterdir()) == [f"{n:06d}" for n in range(len(slices))]
    assert not list(inbox.parent.glob("up.dcm"))


def test_a_link_in_an_archive_stays_text(inbox):
    item = zipfile.ZipInfo("link.dcm")
    item.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive = zipped(inbox, [(item, "/etc/passwd"), ("two.dcm", b"no scan")])
    with pytest.raises(VolumeError) as refused:
        read_incoming(archive, Limits())
    assert refused.value.fault in (VolumeFault.NOT_A_SCAN, VolumeFault.NON_IMAGING_DICOM_FILES)
    assert not any(file.is_symlink() for file in (inbox / "files").iterdir())


def test_a_scan_alone_in_an_archive(inbox, tmp_path):
    sitk.WriteImage(body(), str(tmp_path / "doe_jane.nii.gz"))
    scan = read_incoming(zipped(inbox, [("x/doe_jane.nii.gz", (tmp_path / "doe_jane.nii.gz").read_bytes())]), Limits())
    assert scan.image.GetSize() == body().GetSize()


@pytest.mark.parametrize(
    ("files", "limits", "fault"),
    [
        ([("a", bytes(60 << 20))], Limits(unpacked_bytes=1 << 20), VolumeFault.TOO_LARGE),  # a bomb of zeros
        ([(str(n), b"x") for n in range(30)], Limits(files=20), VolumeFault.TOO_LARGE),
        ([], Limits(), VolumeFault.NOT_A_SCAN),
        ([("a", b"no scan")], Limits(), VolumeFault.NOT_A_SCAN),
        ([("a.zip", b"PK\x03\x04 another archive")], Limits(), VolumeFault.NOT_A_SCAN),
        ([("a.npy", b"\x93NUMPY\x01\x00")], Limits(), VolumeFault.PICKLED_ARRAY),
    ],
)
def test_archives_are_not_trusted(inbox, files, limits, fault):
    if not files:
        files = [("__MACOSX/._a", b"x")]
    archive = zipped(inbox, files)
    with pytest.raises(VolumeError) as refused:
        read_incoming(archive, limits)
    assert refused.value.fault == fault
    assert sum(file.stat().st_size for file in inbox.rglob("*") if file.is_file()) < 4 << 20


def test_the_sizes_that_an_archive_declares_are_not_believed(inbox):
    """A central directory that promises ten bytes does not let a gigabyte through."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(8 << 20))
    raw = bytearray(packed.getvalue())
    size = (8 << 20).to_bytes(4, "little")
    for _ in range(2):
        raw = raw.replace(size, (10).to_bytes(4, "little"))
    (inbox / "upload").write_bytes(raw)
    with pytest.raises(VolumeError):
        read_incoming(inbox / "upload", Limits(unpacked_bytes=1 << 20))
    assert sum(file.stat().st_size for file in inbox.rglob("*") if file.is_file()) <= 1 << 20


@pytest.mark.parametrize("cut", [3, 30, 200, -5])
def test_damaged_archives(inbox, tmp_path, cut):
    write_dicom(body(), tmp_path / "series")
    archive = zipped(inbox, [(f.name, f.read_bytes()) for f in (tmp_path / "series").iterdir()])
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(VolumeError):
        read_incoming(archive, Limits())


def test_an_encrypted_archive(inbox):
    archive = zipped(inbox, [("a", b"x" * 100), ("b", b"y" * 100)], zipfile.ZIP_STORED)
    raw = archive.read_bytes().replace(b"PK\x03\x04\x14\x00\x00", b"PK\x03\x04\x14\x00\x01")
    archive.write_bytes(raw.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"))
    with pytest.raises(VolumeError, match="encrypted"):
        read_incoming(archive, Limits())


def test_large_scans_and_other_files(inbox):
    with pytest.raises(VolumeError) as refused:
        read_incoming(written(inbox, body(), "a.nii.gz"), Limits(voxels=1000))
    assert refused.value.fault == VolumeFault.TOO_LARGE
    (inbox / "upload").write_bytes(b"hello")
    with pytest.raises(VolumeError, match="no scan by its content"):
        read_incoming(inbox / "upload", Limits())


def test_the_way_of_the_processor_is_followed(inbox, engine):
    image = sitk.Cast(body(), sitk.sitkFloat32)
    image[3, 4, 5] = float("nan")
    processor = engine.processor.image_processor
    with pytest.raises(VolumeError) as refused:
        read_incoming(written(inbox, image, "a.nii.gz"), Limits(), processor)
    assert refused.value.fault == VolumeFault.NON_FINITE
    filled = type(processor)(**(processor.settings | {"fill_nonfinite": -1000.0}))
    scan = read_incoming(written(inbox, image, "a.nii.gz"), Limits(), filled)
    assert [finding.fault for finding in scan.findings] == [VolumeFault.NON_FINITE]


def test_folders_are_private_and_go(tmp_path):
    with private_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and "photon-upload-" in folder.name
        (folder / "x").write_bytes(b"x")
    assert not folder.exists()


def test_what_a_killed_process_left_is_swept(monkeypatch, tmp_path):
    monkeypatch.setattr(incoming.tempfile, "gettempdir", lambda: str(tmp_path))
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (sleeper.pid, dead.pid, os.getpid()):
        (tmp_path / f"photon-upload-{pid}-a").mkdir()
    (tmp_path / "photon-upload-x").mkdir()
    sweep()
    sleeper.kill()
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {f"photon-upload-{sleeper.pid}-a", f"photon-upload-{os.getpid()}-a", "photon-upload-x"}


def test_a_real_series(inbox):
    folder = real("ct_dicom")
    archive = shutil.make_archive(str(inbox / "series"), "zip", folder)
    start = time.monotonic()
    scan = read_incoming(Path(archive).rename(inbox / "upload"), Limits())
    assert scan.image.GetSize() == (512, 512, 20) and time.monotonic() - start < 60
