"""Evaluation: batches against single prompts, runs that are killed, split or refused, 2D models, slices."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import evaluate_hf
from conftest import ROOT, TOKENS
from photon import precision
from photon.evaluation import run as evaluation_run
from photon.evaluation.dealing import batches, dealt, grouped, scan_keys
from photon.evaluation.encoded_scans import EncodedScans
from photon.evaluation.models import load_model, prompt
from photon.evaluation.run import identity
from photon.evaluation.slices import axial_slices
from photon.phantoms import patient as phantom_patient
from photon.run_folder import RunError
from photon.schedulers.flipped import FlippedScheduler
from photon.schedulers.random import RandomScheduler
from photon.scheduling_photon import SchedulerInputs

CPU = torch.device("cpu")
NAME = "doe_jane"  # a patient's name in the scans' file names, which must not come out
FILLERS = ("", " Look at every slice before you answer.", " Think.")
PICTURES = '''
from transformers import ProcessorMixin


class PictureProcessor(ProcessorMixin):
    """Qwen2.5-VL's without its videos, which would need torchvision."""

    return_mm_token_type_ids = True

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self):
        return super().model_input_names + ["mm_token_type_ids"]

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return self.image_token * (int(image_inputs["image_grid_thw"][image_idx].prod()) // 4)
'''
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}MARK{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def question(name, scans, text, kind="text", patient="", **more):
    content = [*[{"type": "volume"}] * len(scans), {"type": "text", "text": text}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "B"}]}
    options = {"A": "yes", "B": "no", "C": "unclear"} if kind == "choice" else None
    return {
        "id": name, "benchmark": "jsonl", "task": kind, "subtask": "", "kind": kind, "patient": patient,
        "volumes": [str(scan) for scan in scans], "messages": [{"role": "user", "content": content}, answer],
        "question": text, "answer": "B", "options": options, "choices": list(options) if options else None, **more,
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that the tests start: small work, and last digits that do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three scans of three patients; six questions on each, one on two scans, one on no scan, one on a damaged one."""
    folder = tmp_path_factory.mktemp("data")
    scans = []
    for patient in range(3):
        image, *_ = phantom_patient.make_patient(seed=3, patient=patient)
        scans.append(folder / f"{NAME}{patient}_a_1.nii.gz")
        sitk.WriteImage(image, str(scans[-1]))
    rows = []
    for number in range(6):  # questions on one scan do not stand together
        for patient, scan in enumerate(scans):
            kind = "choice" if number % 2 else "text"
            text = f"Is there a lesion in the {('liver', 'spleen', 'kidney')[number % 3]}?" + FILLERS[number % 3]
            rows.append(question(f"q/{patient}/{number}", [scan], text, kind, f"p{patient}"))
    rows.append(question("pair", [scans[0], scans[2]], "Has it grown?", "choice", "p0"))
    rows.append(question("blind", [], "Is there a lesion?", "text", "p1"))
    damaged = folder / f"{NAME}9_a_1.nii.gz"
    damaged.write_bytes(scans[0].read_bytes()[:2000])
    rows.append(question("damaged", [damaged], "Is there a lesion?", "choice", "p9"))
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """The root's model with larger random weights and no end token, so that it writes something."""
    folder = tmp_path_factory.mktemp("talker")
    generator = torch.Generator().manual_seed(5)
    weights = load_file(ROOT / "model.safetensors")
    for name, weight in weights.items():
        if weight.ndim > 1:
            weights[name] = torch.randn(weight.shape, generator=generator) / weight.shape[1:].numel() ** 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    names = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in names:
        (folder / name).write_bytes((ROOT / name).read_bytes())
    settings = json.loads((ROOT / "generation_config.json").read_text(encoding="utf-8")) | {"eos_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(talker):
    return load_model(str(talker), CPU, max_new_tokens=6)


def rows_of(data):
    return [json.loads(line) for line in (data / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def encoded(model, row):
    return [model.encode(model.read_or_refuse(key)) for key in scan_keys(row)]


def arguments(data, model, output, *more):
    fixed = ["--benchmark", "jsonl", "--max-new-tokens", "4", "--batch-size", "4", "--bootstrap", "9"]
    paths = ["--data", data / "questions.jsonl", "--model", model, "--output", output]
    return [*fixed, *map(str, [*paths, *more])]


def run(capsys, *args):
    """Run in this process. Returns {id: record}, what was printed; nothing of a scan's name may be in that."""
    try:
        evaluate_hf.main(arguments(*args))
    finally:
        captured = capsys.readouterr()
        assert NAME not in captured.out + captured.err
    text = (args[2] / "predictions.jsonl").read_text(encoding="utf-8")
    assert NAME not in text
    return {record["id"]: record for record in map(json.loads, text.splitlines())}, captured


def refusal(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        evaluate_hf.main(arguments(*args))
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and NAME not in captured.err
    return captured.err


@pytest.fixture(scope="module")
def reference(data, talker, tmp_path_factory):
    """One process, never interrupted: the bytes that every other way must give."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    evaluate_hf.main(arguments(data, talker, folder, "--choices", "logprob"))
    return (folder / "predictions.jsonl").read_bytes()


# === A batch =========================================================================================================


def test_inputs_are_the_processors(model, data):
    """Prompts about an encoded scan equal what the processor makes of the same chats, and so do the logits."""
    rows = [row for row in rows_of(data) if row["id"].startswith("q/1/")][:3]
    scans = encoded(model, rows[0])
    chats = [prompt(row, scans, model.part) for row in rows]
    ours = model.inputs(chats, scans)
    full = [[{"role": "user", "content": [{"type": "volume", "path": row["volumes"][0]}, c[0]["content"][1]]}]
            for row, c in zip(rows, chats, strict=True)]  # fmt: skip
    theirs = model.processor.apply_chat_template(
        full, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    assert theirs["attention_mask"].sum(-1).unique().numel() == 3  # three lengths, or padding is not tested
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "video_grid_thw"):
        assert torch.equal(ours[name], theirs[name]), name
    with torch.no_grad():
        a, b = model.model(**ours).logits[:, -1], model.model(**theirs).logits[:, -1]
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by_letter", [False, True])
def test_batch_equals_single(model, data, by_letter):
    rows = [row for row in rows_of(data) if row["id"].startswith("q/2/")]
    rows = [{**row, "choices": ["A", "B", "C"]} for row in rows]
    scans = encoded(model, rows[0])
    together = model.answer(rows, scans, by_letter)
    alone = [model.answer([row], scans, by_letter)[0] for row in rows]
    texts = [answer["prediction"] for answer in alone]
    kept = [answer["kept"] for answer in alone]
    assert texts == [answer["prediction"] for answer in together] and all(texts)
    assert kept == [answer["kept"] for answer in together] and len(set(kept)) > 1 and max(kept) < 1
    if by_letter:
        pairs = zip(alone, together, strict=True)
        for first, second in pairs:
            for letter in "ABC":
                assert first["choice_logprobs"][letter] == pytest.approx(second["choice_logprobs"][letter], abs=2e-4)
    else:
        assert len(set(texts)) > 1


def test_letter_is_the_likeliest_next_token(model, data):
    row = next(row for row in rows_of(data) if row["id"] == "q/0/1")
    chat = [{"role": "user", "content": [{"type": "volume", "path": row["volumes"][0]}, {"type": "text", "text":
             row["question"]}]}]  # fmt: skip
    inputs = model.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logprobs = model.model(**inputs).logits[0, -1].log_softmax(-1)
    expected = {letter: float(logprobs[model.processor.tokenizer.encode(letter)[0]]) for letter in "ABC"}
    answer = model.answer([row], encoded(model, row), by_letter=True)[0]
    assert answer["choice_logprobs"] == pytest.approx(expected, abs=2e-4)
    assert answer["prediction"] == max(expected, key=expected.get)


def test_choices_of_several_tokens_are_refused(model, data):
    row = next(row for row in rows_of(data) if row["kind"] == "choice")
    with pytest.raises(RunError, match="--choices generate"):
        model.answer([{**row, "choices": ["A", "unclear"]}], encoded(model, row), by_letter=True)


# === Dealing and reading =============================================================================================


class Counting:
    """Stands for a model: notes what is read and encoded."""

    def __init__(self):
        self.reads, self.encodes = [], []

    def read_or_refuse(self, key):
        self.reads.append(key)
        return key

    def encode(self, scan):
        self.encodes.append(scan)
        return scan.upper()


def test_each_scan_is_read_and_encoded_once_and_let_go():
    groups = [("a", "b"), ("a",), (), ("c", "a"), ("c",), ("d", "d")]
    model = Counting()
    scans = EncodedScans(model, groups)
    for group in groups:
        assert scans.take(group) == [scan.upper() for scan in group]
        if group == ("c", "a"):
            assert set(scans.held) == {"c"}  # a and b have no question left
    assert sorted(model.reads) == model.encodes == ["a", "b", "c", "d"]
    assert not scans.held


def test_the_vision_tower_sees_a_scan_once(model, data):
    calls = []
    hook = model.model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    try:
        groups = grouped([row for row in rows_of(data) if row["id"] != "damaged"])
        scans = EncodedScans(model, list(groups))
        for group, rows in groups.items():
            taken = scans.take(group)
            for batch in batches(rows, 4, by_letter=False):
                model.answer(batch, taken)
    finally:
        hook.remove()
    assert len(calls) == 3 and len(groups) == 5


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_dealing(world):
    """Every group once; groups that share a scan, also through others, on one rank; no rank left idle."""
    rng = random.Random(world)
    groups = {}
    for patient in range(30):
        scans = [f"{patient}-{k}" for k in range(rng.randint(1, 3))]
        for _ in range(4):
            chosen = tuple(rng.sample(scans, rng.randint(1, len(scans))))
            groups[chosen] = [None] * rng.randint(1, 9)
    shares = dealt(groups, world)
    assert sorted(group for share in shares for group in share) == sorted(groups)
    homes = [{scan for group in share for scan in group} for share in shares]
    assert sum(map(len, homes)) == len(set().union(*homes))
    load = [sum(len(groups[group]) for group in share) for share in shares]
    heaviest = max(sum(len(rows) for g, rows in groups.items() if g[0].split("-")[0] == str(p)) for p in range(30))
    assert max(load) - min(load) <= heaviest


# === Runs ============================================================================================================


def test_run(capsys, data, talker, reference, tmp_path):
    records, printed = run(capsys, data, talker, tmp_path / "run", "--choices", "logprob")
    rows = rows_of(data)
    assert [*records] == [row["id"] for row in rows]
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == reference
    assert records["damaged"] == {"id": "damaged", "prediction": "", "refused": "DAMAGED_FILE"}
    assert records["blind"]["kept"] is None and "choice_logprobs" not in records["blind"]
    for row in rows[:-1]:
        assert (row["kind"] == "choice") == ("choice_logprobs" in records[row["id"]])
        assert row["kind"] == "text" or records[row["id"]]["prediction"] in "ABC"
    scores = json.loads((tmp_path / "run" / "scores.json").read_text(encoding="utf-8"))
    assert scores["refused"] == {"DAMAGED_FILE": {"questions": 1, "scans": 1}}
    assert scores["kept"]["min"] < scores["kept"]["mean"] < scores["kept"]["max"]
    assert "DAMAGED_FILE: 1 scans, 1 questions" in printed.out and "|" in printed.out
    names = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert names == ["predictions.jsonl", "run.json", "scores.json"]


def test_a_finished_run_needs_no_model(capsys, data, talker, reference, tmp_path, monkeypatch):
    run(capsys, data, talker, tmp_path, "--choices", "logprob")
    monkeypatch.setattr(evaluation_run, "load_model", None)
    run(capsys, data, talker, tmp_path, "--choices", "logprob")
    assert (tmp_path / "predictions.jsonl").read_bytes() == reference


def test_any_remainder_is_completed(capsys, data, talker, reference, tmp_path):
    """Cut within a line, between lines, in an empty file, with other ranks' files beside it, and after a merge whose
    files were not yet removed."""
    run(capsys, data, talker, tmp_path, "--choices", "logprob")
    file, lines = tmp_path / "predictions.jsonl", reference.splitlines(keepends=True)
    cuts = [
        (b"", {}),
        (reference[: len(reference) // 2 - 3], {}),
        (b"".join(lines[:7]), {1: lines[12] + lines[9][:11]}),
        (lines[3], {1: lines[0], 2: lines[1][:-1]}),
        (reference, {1: lines[5], 3: lines[6][:2]}),
    ]
    for text, others in cuts:
        file.write_bytes(text)
        for rank, part in others.items():
            (tmp_path / f"predictions.rank{rank}.jsonl").write_bytes(part)
        run(capsys, data, talker, tmp_path, "--choices", "logprob")
        assert file.read_bytes() == reference
        assert not [*tmp_path.glob("*.rank*")]


def command(data, talker, output):
    return [str(ROOT / "evaluate_hf.py"), *arguments(data, talker, output, "--choices", "logprob")]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_two_ranks_equal_one(data, talker, reference, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *command(data, talker, tmp_path / "run")],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        out, error = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too
    assert process.returncode == 0, error[-3000:]
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == reference
    assert out.count("DAMAGED_FILE") == 1  # one rank reports
    assert not [*(tmp_path / "run").glob("*.rank*")]


def test_killed_at_a_random_moment(capsys, data, talker, reference, tmp_path):
    output, lines = tmp_path / "run", random.randint(1, 20)
    process = subprocess.Popen(
        [sys.executable, *command(data, talker, output)], env=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    file, limit = output / "predictions.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = file.read_bytes()
    file.write_bytes(left[: len(left) - random.randint(0, 30)])  # as if killed within a line
    run(capsys, data, talker, output, "--choices", "logprob")
    assert file.read_bytes() == reference, lines


def test_other_runs_folder_is_refused(capsys, data, talker, tmp_path):
    run(capsys, data, talker, tmp_path / "run", "--limit", 2)
    before = (tmp_path / "run" / "predictions.jsonl").read_bytes()
    for more, named in [
        (["--limit", 3], "questions: 2 there, 3 now"),
        (["--limit", 2, "--token-budget", 9], "token_budget: None there, 9 now"),
        (["--limit", 2, "--scheduler", "off"], "scheduler: 'on' there, 'off' now"),
    ]:
        error = refusal(capsys, data, talker, tmp_path / "run", *more)
        assert "holds another run" in error and named in error
    error = refusal(capsys, data, ROOT, tmp_path / "run", "--limit", 2)
    assert "model: " in error and "dtype" not in error
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == before
    (tmp_path / "run" / "run.json").unlink()
    assert "no run.json" in refusal(capsys, data, talker, tmp_path / "run", "--limit", 2)


def test_a_foreign_line_is_named(capsys, data, talker, tmp_path):
    run(capsys, data, talker, tmp_path, "--limit", 4)
    file = tmp_path / "predictions.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    first = {**json.loads(lines[0]), "prediction": "other"}
    for wrong in ("not json", '{"id": []}', '{"id": "stranger", "prediction": "x"}', json.dumps(first), "[]"):
        file.write_text("\n".join([lines[0], wrong, *lines[2:]]) + "\n", encoding="utf-8")
        assert "predictions.jsonl line 2" in refusal(capsys, data, talker, tmp_path, "--limit", 4)


def test_kept_share_follows_the_arguments(capsys, data, talker, tmp_path):
    for number, (more, share) in enumerate([(["--token-budget", TOKENS // 5], 0.2), (["--keep-ratio", 0.4], 0.4)]):
        records, _ = run(capsys, data, talker, tmp_path / str(number), "--limit", 3, *more)
        assert {record["kept"] for record in records.values()} == {share}
    records, printed = run(capsys, data, talker, tmp_path / "dense", "--limit", 3, "--scheduler", "off")
    assert {record["kept"] for record in records.values()} == {None} and "kept" not in printed.out


def test_controls_keep_as_many_other_tokens(capsys, data, talker, tmp_path):
    records = {
        name: run(capsys, data, talker, tmp_path / name, "--limit", 6, "--choices", "logprob", "--scheduler", name)[0]
        for name in ("on", "random", "flipped")
    }
    kept = {name: [records[name][i].get("kept") for i in records["on"]] for name in records}
    assert kept["on"] == kept["random"] == kept["flipped"] and set(kept["on"]) - {None, 1.0}
    answers = {name: [records[name][i].get("choice_logprobs") for i in records["on"]] for name in records}
    assert answers["on"] != answers["flipped"] != answers["random"] != answers["on"]
    more = ["--limit", 6, "--choices", "logprob", "--scheduler", "random", "--seed", 1]
    assert "another run" in refusal(capsys, data, talker, tmp_path / "random", *more)


def test_control_selections(model):
    scheduler = model.model.model.language_model.scheduler
    chance = torch.Generator().manual_seed(0)
    queries, keys, visual_keys = (torch.randn(2, n, m, 8, generator=chance) for n, m in ((4, 5), (2, 5), (2, 13)))
    visual = torch.arange(13) < torch.tensor([[13], [9]])
    args = (queries, keys, visual_keys, torch.ones(2, 5, dtype=torch.bool), visual, 8**-0.5, torch.tensor([6, 4]))
    inputs = SchedulerInputs(*args, row_number=torch.tensor([17, 4]))
    reference, flipped = scheduler(inputs), FlippedScheduler(scheduler)(inputs)
    drawn = [RandomScheduler(scheduler, seed)(inputs).keep_mask for seed in (0, 0, 1)]
    for row, (count, many) in enumerate(((13, 6), (9, 4))):
        order = reference.saliency[row, :count].argsort()
        assert set(flipped.keep_mask[row].nonzero().flatten().tolist()) == set(order[:many].tolist())
        for keep in drawn:
            assert keep[row].sum() == many and not keep[row, count:].any()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(flipped.threshold, reference.threshold)


def test_swapped_run_sees_other_scans(capsys, data, talker, tmp_path):
    rows = [row for row in rows_of(data) if row["id"].startswith("q/")]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    right, _ = run(capsys, folder, talker, tmp_path / "right")
    wrong, _ = run(capsys, folder, talker, tmp_path / "wrong", "--swap-scans")
    assert sum(right[name] != wrong[name] for name in right) > len(right) / 2


def test_scans_that_a_set_holds_as_bytes(capsys, data, talker, tmp_path, monkeypatch):
    """The same answers as from paths; and a second process, whose files have other names, finds the run finished."""
    rows = [row for row in rows_of(data) if row["id"].startswith("q/")][:8]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expected, _ = run(capsys, folder, talker, tmp_path / "paths")
    embedded = [{**row, "volumes": [{"path": None, "bytes": Path(row["volumes"][0]).read_bytes()}]} for row in rows]
    Dataset.from_list(embedded).save_to_disk(folder / "set")
    command = arguments(folder, talker, tmp_path / "bytes")
    command[command.index("--data") + 1] = str(folder / "set")
    evaluate_hf.main(command)
    found = (tmp_path / "bytes" / "predictions.jsonl").read_text(encoding="utf-8")
    assert {record["id"]: record for record in map(json.loads, found.splitlines())} == expected
    monkeypatch.setattr(evaluation_run, "load_model", None)
    evaluate_hf.main(command)
    assert (tmp_path / "bytes" / "predictions.jsonl").read_text(encoding="utf-8") == found
    capsys.readouterr()


def test_faulty_questions_are_named_by_line(capsys, data, talker, tmp_path):
    good, first = rows_of(data)[1], question("one", [data / "x.nii.gz"], "Is it?", "choice")
    for rows, named in [
        ([good, first, first], ["line 3", "line 2"]),
        ([good, {**first, "answer": "D"}], ["line 2", "D"]),
        ([good, {**first, "volumes": []}], ["line 2", "0 scans"]),
        ([], ["no "]),
    ]:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        error = refusal(capsys, folder, talker, tmp_path / "run")
        assert all(word in error for word in named), error
        assert not (tmp_path / "run").exists()


def test_missing_scans_stop_or_are_recorded(capsys, data, talker, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [rows_of(data)[0], question("absent", [folder / f"{NAME}7.nii.gz"], "Is it?", "choice")]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    error = refusal(capsys, folder, talker, tmp_path / "run")
    assert "1 of 2 scans" in error and "--missing record" in error and not (tmp_path / "run").exists()
    records, _ = run(capsys, folder, talker, tmp_path / "run", "--missing", "record")
    assert records["absent"] == {"id": "absent", "prediction": "", "refused": "NO_SUCH_FILE"}
    assert "refused" not in records[rows[0]["id"]]


def test_missing_weights_are_refused(capsys, data, talker, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in talker.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(talker / "model.safetensors")
    weights.pop("model.language_model.scheduler.predictor.mlp.0.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of its weights" in refusal(capsys, data, folder, tmp_path / "run", "--limit", 1)
    run(capsys, data, talker, tmp_path / "run", "--limit", 1)  # nothing was answered, so the folder is still free


def test_scores_and_comparison_of_files(capsys, data, talker, tmp_path):
    run(capsys, data, talker, tmp_path / "a", "--choices", "logprob")
    run(capsys, data, talker, tmp_path / "b", "--choices", "logprob", "--token-budget", 3)
    first, second = tmp_path / "a" / "predictions.jsonl", tmp_path / "b" / "predictions.jsonl"
    plain = ["--benchmark", "jsonl", "--data", str(data / "questions.jsonl"), "--bootstrap", "9"]
    evaluate_hf.main([*plain, "--score", str(first), "--output", str(tmp_path / "again")])
    assert (tmp_path / "again" / "scores.json").read_text(encoding="utf-8") == (
        tmp_path / "a" / "scores.json"
    ).read_text(encoding="utf-8")
    train = tmp_path / "train.jsonl"  # a file of one's questions is a training file too
    lines = (data / "questions.jsonl").read_text(encoding="utf-8").replace('"id": "', '"id": "train/')
    train.write_text(lines.replace('"answer": "B"', '"answer": "A"'), encoding="utf-8")
    evaluate_hf.main([*plain, "--score", str(first), "--train", str(train), "--output", str(tmp_path / "train")])
    scores = [(tmp_path / name / "scores.json").read_text(encoding="utf-8") for name in ("train", "again")]
    assert scores[0] != scores[1]  # the baseline's answers are those of the training file
    evaluate_hf.main([*plain, "--compare", str(first), str(second), "--output", str(tmp_path / "again")])
    assert json.loads((tmp_path / "again" / "comparison.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    first.write_text(first.read_text(encoding="utf-8") * 2, encoding="utf-8")
    with pytest.raises(SystemExit):
        evaluate_hf.main([*plain, "--score", str(first)])
    assert "line" in capsys.readouterr().err


def test_the_type_of_a_large_model_follows_from_the_machine(capsys, data, talker, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "SMALL", 0)
    monkeypatch.setattr(precision, "computes_bfloat16", lambda: True)
    run(capsys, data, talker, tmp_path / "run", "--limit", 1)
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert load_model(str(talker), CPU).model.dtype == torch.bfloat16
    monkeypatch.undo()
    error = refusal(capsys, data, talker, tmp_path / "run", "--limit", 1)
    assert "dtype: 'bfloat16' there, 'float32' now" in error
    assert load_model(str(talker), CPU).model.dtype == torch.float32
    run(capsys, data, talker, tmp_path / "run", "--limit", 1, "--dtype", "bfloat16")


def test_score_takes_the_line_that_its_help_shows(capsys, tmp_path):
    with pytest.raises(SystemExit):
        evaluate_hf.parse(["--help"])
    shown = re.search(r"--score FILE (.*?) --compare", " ".join(capsys.readouterr().out.split()))[1]
    line = json.loads(re.search(r"\{.*\}", shown)[0])
    chat = [{"role": "user", "content": "<volume>Is it?"}, {"role": "assistant", "content": line["prediction"]}]
    row = {"id": line["id"], "messages": chat, "volumes": ["a.nii.gz"]}
    for name, record in (("questions.jsonl", row), ("predictions.jsonl", line)):
        (tmp_path / name).write_text(json.dumps(record) + "\n", encoding="utf-8")
    files = ["--data", str(tmp_path / "questions.jsonl"), "--score", str(tmp_path / "predictions.jsonl")]
    evaluate_hf.main(["--benchmark", "jsonl", *files, "--bootstrap", "9", "--output", str(tmp_path / "scored")])
    scores = json.loads((tmp_path / "scored" / "scores.json").read_text(encoding="utf-8"))["scores"]
    (task,) = scores["tasks"].values()
    assert task["figures"]["exact_match"]["value"] == 1


def test_wrong_arguments(capsys, data):
    plain = ["--benchmark", "jsonl", "--data", "x"]
    for more, named in [
        ([], "--model"),
        (["--model", "m", "--score", "f"], "--score"),
        (["--model", "o/m"], "--output"),
        (["--model", "o/m", "--output", __file__], "is a file"),
        (["--score", "no_such_file.jsonl"], "no file no_such_file.jsonl"),
        (["--compare", __file__, "no_such_file.jsonl"], "no file no_such_file.jsonl"),
        (["--model", "./no/such/folder", "--output", "o"], "no Hub id"),
        (["--model", "o/m", "--output", "o", "--token-budget", "3", "--scheduler", "off"], "exclude"),
        (["--model", "o/m", "--output", "o", "--keep-ratio", "1.5"], "--keep-ratio"),
        (["--model", "o/m", "--output", "o", "--window", "3", "3"], "--window"),
        (["--model", "o/m", "--output", "o", "--batch-size", "0"], "above 0"),
    ]:
        with pytest.raises(SystemExit):
            evaluate_hf.parse([*plain, *more])
        assert named in capsys.readouterr().err


def test_a_model_that_reads_no_pictures_is_refused_in_one_line(capsys, data, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert refusal(capsys, data, folder, tmp_path / "run").startswith("--model has no config.json")
    (folder / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    error = refusal(capsys, data, folder, tmp_path / "run")
    assert (
        error.splitlines()[-1]
        == "--model is a gpt2, which reads no pictures; give Photon or an image-text-to-text model."
    )


def test_an_interrupted_run_says_how_to_go_on(capsys, data, talker, tmp_path, monkeypatch):
    def interrupt(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_run, "load_model", interrupt)
    with pytest.raises(SystemExit) as stopped:
        evaluate_hf.main(arguments(data, talker, tmp_path / "run"))
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "Stopped. Give the same command again to go on.\n"


def test_missing_libraries_are_named_before_anything_is_answered(data, tmp_path):
    code = (
        "import sys; sys.modules['evaluate'] = sys.modules['datasets'] = None; import evaluate_hf; evaluate_hf.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(data, ROOT, tmp_path / "run")], cwd=ROOT, env=ENVIRONMENT,
        capture_output=True, encoding="utf-8", timeout=200,
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.splitlines()[-1].endswith("pip install -r requirements-train.txt")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["evaluate_hf", "train_hf", "ask"])
def test_waiting_threads_sleep(command):
    """The policy stands before torch is loaded, or it has no effect; a user's own is kept."""
    code = f"""
import os, sys
policy = []
def hook(event, args):
    if event == "import" and args[0] == "torch":
        policy.append(os.environ.get("OMP_WAIT_POLICY"))
sys.addaudithook(hook)
import {command}
print(policy[0])
"""
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        env = {k: v for k, v in ENVIRONMENT.items() if k != "OMP_WAIT_POLICY"} | given
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
        assert done.stdout.strip() == expected, done.stderr[-2000:]


# === 2D models =======================================================================================================


def test_slices_are_the_scans_own_upright_and_windowed(tmp_path):
    """Against nibabel: RAS+ array, flipped to rows front to back and columns right to left, from head to feet."""
    rng = np.random.default_rng(0)
    shape, spacing = (20, 26, 9), (1.5, 3.0, 7.0)
    ras = rng.integers(-1000, 300, shape).astype(np.int16)
    ras[0] = -1000  # air, without which values are no HU
    nifti = nib.Nifti1Image(ras, np.diag([*spacing, 1.0]))
    other = nib.as_closest_canonical(nifti).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("PIR"))
    )
    nib.save(other, tmp_path / "scan.nii.gz")
    pictures = axial_slices(tmp_path / "scan.nii.gz", 3, (-200.0, 300.0))
    grey = np.rint(255 * (np.clip(ras.astype(float), -200, 300) + 200) / 500).astype(np.uint8)
    for picture, k in zip(pictures, (7, 4, 1), strict=True):  # centres of thirds of nine slices, the top one first
        plane = grey[::-1, ::-1, k].T  # (rows front to back, columns from the patient's right)
        expected = Image.fromarray(plane).convert("RGB").resize((20, 52), Image.Resampling.BILINEAR)
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), np.asarray(expected))
    assert len(axial_slices(tmp_path / "scan.nii.gz", 99, (-200.0, 300.0))) == 9


def write_gemma(folder):
    """MedGemma's architecture."""
    marks = {"boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>", "image_token": "<|image_pad|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=marks,
    )  # fmt: skip
    ids = {f"{name.split('_')[0]}_token_index": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, image_seq_length=4,
        chat_template=TEMPLATE.replace("MARK", "<|vision_start|>"),
    )  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 7,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=False, **ids
    )
    return config, Gemma3ForConditionalGeneration, processor


def write_qwen(folder):
    """The stock Qwen2.5-VL with a processor of its own code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    (folder / "pictures.py").write_text(PICTURES, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    kind = get_class_from_dynamic_module("pictures.PictureProcessor", str(folder))
    kind.register_for_auto_class()
    processor = kind(
        Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 84}), tokenizer,
        chat_template=TEMPLATE.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    ids = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    ids = {f"{n}_token_id": ids[f"{n}_token_id"] for n in ("image", "video", "vision_start", "vision_end")}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "out_hidden_size": 32,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return config, Qwen2_5_VLForConditionalGeneration, processor


@pytest.mark.parametrize("write", [write_gemma, write_qwen])
def test_two_dimensional_model(capsys, data, tmp_path, write):
    folder = tmp_path / "model"
    folder.mkdir()
    config, kind, processor = write(folder)
    torch.manual_seed(2)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 / parameter.shape[1:].numel() ** 0.5)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    trust = ["--trust-remote-code"] if write is write_qwen else []
    records, _ = run(capsys, data, folder, tmp_path / "run", "--choices", "logprob", "--slices", 3, *trust)
    assert [*records] == [row["id"] for row in rows_of(data)]
    assert records["damaged"]["refused"] == "DAMAGED_FILE"
    texts = {record["prediction"] for name, record in records.items() if "choice_logprobs" not in record}
    assert len(texts) > 3
    loaded = load_model(str(folder), CPU, max_new_tokens=4, slices=3, trust_remote_code=bool(trust))
    for row in rows_of(data)[:-1]:
        letter = row["kind"] == "choice"
        scans = encoded(loaded, row)
        (answer,) = loaded.answer([row], scans, by_letter=letter)
        assert answer["prediction"] == records[row["id"]]["prediction"], row["id"]
        blank = [[Image.new("RGB", picture.size) for picture in scan] for scan in scans]
        if letter:  # it looks at the slices
            assert loaded.answer([row], blank, True)[0]["choice_logprobs"] != answer["choice_logprobs"]
    assert "scheduler" in refusal(capsys, data, folder, tmp_path / "budget", "--token-budget", 5, *trust)
    if trust:
        with pytest.raises((ValueError, SystemExit, OSError)):
            load_model(str(folder), CPU, slices=3)


def test_scans_are_relative_to_their_folder(tmp_path):
    """A run goes on after the scans were moved, and not after they were exchanged."""
    rows = [question("one", [tmp_path / "a" / "x.nii.gz"], "?")]
    here, moved = (
        evaluate_hf.settings(evaluate_hf.parse(arguments(tmp_path, ROOT, Path("run"), "--volumes", tmp_path / name)))
        for name in "ab"
    )
    first = identity(here, rows, CPU)
    assert identity(moved, [question("one", [tmp_path / "b" / "x.nii.gz"], "?")], CPU) == first
    assert identity(here, [question("one", [tmp_path / "a" / "y.nii.gz"], "?")], CPU) != first
