"""The training script: what a stage trains, phases, resuming, accumulation, ranks, saving, refusals.

    pytest tests/test_training.py

A run is compared with another that must be equal: resumed with uninterrupted, four small batches with one, two ranks
with one process, merged with unmerged, a fresh process with this one.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_training_data import GRID, SPACING, say, write_rows
from test_training_data import ask as question_about
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

import ask
import evaluate_hf
import train_hf
from conftest import ROOT, run_fresh
from photon import loading
from photon.configuration_photon import PhotonConfig
from photon.conversion import RELEASE
from photon.decoder_photon import PhotonTextModel
from photon.loading import build_processor
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.training import saving
from photon.training import trainer as photon_trainer
from photon.training.arguments import parse
from photon.training.batches import Collator
from photon.training.data import load_rows
from photon.training.parts import four_bit, group_of
from photon.training.phases import Phases
from photon.training.trainer import score

PATCH = "model.visual.patch_embed.proj.weight"
KEPT = ("kept", "kept_min", "kept_max", "would_keep", "would_keep_min", "would_keep_max")
TERMS = ("loss", "lm_loss", "band_loss", *KEPT, "threshold", "robust_rows", "flip_rows")
PHASES = ["--soft-start", "2", "--hard-start", "4", "--flip-start", "5"]
HARD = ["--soft-start", "0", "--hard-start", "0", "--flip-start", "0"]
MIXED = ["--photon", "robust_probability=0.3", "flip_probability=0.5"]
EXACT = [*MIXED, 'surrogate="exact"', 'saliency_scale="standard"', "saliency_gradient=true", "keep_budget=0.4"]


def write_model(folder, hidden=32):
    """A random model whose threshold lies amid its saliency, with the tokenizer of this repository."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    config = PhotonConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 56, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "out_hidden_size": hidden,
            "window_size": 56, "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False, **RELEASE | {"surrogate": "taylor"},
    )  # fmt: skip
    processor = build_processor(tokenizer, config, {"grid": GRID, "spacing": SPACING, "mean": 0.5, "std": 0.5})
    torch.manual_seed(5)
    model = PhotonForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1 / parameter.shape[1:].numel() ** 0.5)
        model.model.language_model.scheduler.predictor.mlp[-1].bias.fill_(0.0)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def write_data(folder):
    """Eight rows: one or two scans, or text alone."""
    folder.mkdir()
    names = []
    for number in range(3):
        array = np.random.default_rng(number).integers(-1000, 300, (17, 19, 23)).astype(np.int16)
        array[0] = -1000  # air, without which values are no HU
        organs = np.random.default_rng(9).integers(0, 3, array.shape).astype(np.uint8)
        for name, voxels in ((f"{number}", array), (f"{number}_organs", organs), (f"{number}_lesions", organs // 2)):
            image = sitk.GetImageFromArray(voxels)
            image.SetSpacing((7.0, 8.0, 9.0))
            sitk.WriteImage(image, str(folder / f"{name}.nii.gz"))
        names.append(f"{number}.nii.gz")
    rows = []
    for scans, question, answer in (
        [
            ([0], "Is there a lesion?", "no"), ([1], "On which side is it?", "left"), ([], "What is a CT?", "a scan"),
            ([1, 2], "Has it grown from the first scan to the second?", "grown"), ([2], "How large is it?", "25 mm"),
            ([0], "How many lesions are there?", "3"), ([2, 0], "Which is larger?", "the second"), ([], "Who?", "me"),
        ]
    ):  # fmt: skip
        rows.append({
            "task": "text" if not scans else "scan",
            "volumes": [names[i] for i in scans],
            "labels": [f"{i}_organs.nii.gz" for i in scans],
            "lesions": [f"{i}_lesions.nii.gz" for i in scans],
            "evidence": [1 + len(answer) % 2] if scans else [],
            "messages": question_about(question, len(scans)) + say(answer),
        })  # fmt: skip
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "two.jsonl", [rows[3], rows[2]])
    write_rows(folder / "scans.jsonl", [rows[3], rows[0]])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "rows")


@pytest.fixture
def arguments(model, data, tmp_path):
    """Command line of a run in `tmp_path / name`."""

    def build(name, *more, stage="tune", steps=2, file="train.jsonl"):
        return [
            "--model", model, "--stage", stage, "--train-data", data / file, "--cache-dir", data / "cache",
            "--output-dir", tmp_path / name, "--max-steps", steps, "--per-device-train-batch-size", 3, "--use-cpu",
            "--logging-steps", 1, "--save-strategy", "no", "--learning-rate", 1e-2, "--disable-tqdm", "true",
            "--save-dtype", "float32", "--dataloader-pin-memory", "false", *more,
        ]  # fmt: skip

    return lambda *args, **options: [str(part) for part in build(*args, **options)]


def logged(trainer, names=TERMS):
    return [
        {name: line[name] for name in names if name in line} for line in trainer.state.log_history if "loss" in line
    ]


def assert_equal_logs(found, wanted, rel=1e-4):
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        a, b = dict(a), dict(b)
        assert a.pop("phase", None) == b.pop("phase", None)
        assert a == pytest.approx(b, rel=rel, abs=1e-5)


# === What a step changes =============================================================================================


@pytest.mark.parametrize("stage, more", [
    ("align", []), ("dense", []), ("tune", HARD + MIXED), ("tune", ["--lora", *HARD]), ("dense", ["--lora"]),
    ("dense", ["--parts", "vision", "aligner"]), ("tune", ["--parts", "scheduler", "decoder", *HARD]),
])  # fmt: skip
def test_a_step_changes_what_the_stage_names_and_nothing_else(arguments, model, monkeypatch, stage, more):
    before = {}
    trained_model = train_hf.trained_model

    def remember(*args):
        loaded = trained_model(*args)
        before.update({name: p.detach().clone() for name, p in loaded[0].named_parameters()})
        return loaded

    monkeypatch.setattr(train_hf, "trained_model", remember)
    # two steps: the first leaves LoRA's A as it is, since B is zero
    trainer = train_hf.train(arguments("run", *more, stage=stage))
    after = dict(trainer.model.named_parameters())
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    names = set(load_file(model / "model.safetensors"))
    if "--lora" in more:
        wanted = {name for name in before if ".lora_" in name or ".modules_to_save." in name}
        assert any("visual.patch_embed" in name for name in wanted)
        assert any("scheduler" in name for name in wanted) == (stage == "tune")
        assert sum(".lora_A." in name for name in wanted) == 3 * 7
        assert not any(".lora_" in name and "visual" in name for name in wanted)
    elif stage == "align":
        wanted = {PATCH}
    elif "--parts" in more:
        wanted = {name for name in names if (".visual." in name) == (stage == "dense")}
    else:
        wanted = {name for name in names if stage == "tune" or ".scheduler." not in name}
    assert changed == wanted


def test_each_part_has_its_own_learning_rate(arguments):
    rates = {"vision": 0.25, "aligner": 0.5, "scheduler": 0.125}
    more = [part for name, rate in rates.items() for part in (f"--{name}-learning-rate", rate)]
    trainer = train_hf.train(arguments("run", *more, "--optim", "sgd", "--lr-scheduler-type", "constant", steps=1))
    seen = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen[id(parameter)] = group["lr"]
    for name, parameter in trainer.model.named_parameters():
        part = {"model.visual.merger": "aligner", "model.visual": "vision"}.get(
            name[: 19 if name.startswith("model.visual.merger") else 12], "decoder"
        )
        part = "scheduler" if "language_model.scheduler" in name else part
        assert seen.pop(id(parameter)) == (rates | {"decoder": 1e-2})[part], name
        assert group_of("base_model.model." + name) == part
    assert not seen
    line = trainer.state.log_history[0]
    assert {name: line[f"lr_{name}"] for name in rates} == rates


def test_muon_trains_the_matrices_of_the_layers_alone(arguments, model):
    rates = [
        "--muon-learning-rate",
        0.03,
        "--adam-beta2",
        0.9,
        "--lr-scheduler-type",
        "constant",
        "--max-grad-norm",
        0,
    ]
    steps = [train_hf.train(arguments(f"run{n}", *rates, stage="dense", steps=n)) for n in (1, 2)]
    start = {k: v.float() for k, v in load_file(model / "model.safetensors").items()}
    first, second = (dict(trainer.model.named_parameters()) for trainer in steps)
    groups = {id(p): g["name"] for g in steps[0].optimizer.param_groups for p in g["params"]}
    turned = set()
    for name, weight in first.items():
        if ".scheduler." in name:
            continue
        change = weight.detach() - start[name]
        if groups[id(weight)].endswith("_muon"):
            turned.add(name)
            values = torch.linalg.svdvals(change / (0.03 * 0.2 * max(change.shape) ** 0.5))
            assert values[0] < 1.4 and values[3] > 0.6, name  # directions alike; AdamW's lie further apart
        else:  # the first step of AdamW: the sign of the gradient
            assert change.abs().max() < 1.3e-2, name
        assert not torch.equal(weight, second[name])
    layers = [n for n in first if (".layers." in n or ".blocks." in n) and first[n].ndim == 2]
    assert turned == set(layers) and len(layers) == 3 * 7 + 2 * 5


# === Phases, resuming, accumulation ==================================================================================


def test_phases_are_steps_or_shares_of_the_run():
    def phases(soft=None, hard=None, flip=None, steps=100, end=None):
        given = {"soft_start": soft, "hard_start": hard, "flip_start": flip, "budget_end": end}
        return Phases.of(SimpleNamespace(**given), steps)

    assert phases(steps=32_000) == Phases(4000, 8000, 9000, 19_200)  # the release's run, and our budget
    assert [phases(10, 20, 30).at(step) for step in (0, 9, 10, 19, 20, 99)] == [
        "dense", "dense", "soft", "soft", "hard", "hard"
    ]  # fmt: skip
    assert phases(0.25, 40, 0.5) == Phases(25, 40, 50, 60)
    assert phases(hard=0.05) == Phases(5, 5, 28, 60) and phases(soft=70) == Phases(70, 70, 70, 70)
    assert phases(hard=0) == Phases(0, 0, 28, 60)
    budgets = [phases(10, 20, 30, end=0.6).budget_at(step, 0.1) for step in (0, 19, 39, 59, 99)]
    assert budgets == pytest.approx([1.0, 1.0, 0.1**0.5, 0.1, 0.1])
    with pytest.raises(ValueError, match="ends at step 15; expected 20"):
        phases(10, 20, 30, end=15)
    with pytest.raises(ValueError, match=r"\[25, 60, 50\]"):
        phases(0.25, 60, 0.5)


def test_a_short_run_deletes_tokens_or_warns(arguments, capsys):
    """The model's config names steps of its own training, which a short run would never reach."""
    more = ["--photon", "robust_probability=0"]
    log = train_hf.train(arguments("run", *more, steps=5)).state.log_history
    lines = [line for line in log if "loss" in line]
    assert [line["phase"] for line in lines] == ["dense", "hard", "hard", "hard", "hard"]
    assert "would_keep" in lines[0] and "kept" not in lines[0] and "would_keep" not in lines[-1]
    assert all(0 < line["kept"] < 1 for line in lines[1:])
    assert "hard (tokens deleted) from 1, flipped rows from 1; the run has 5 steps" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="ends at step 2, before its hard phase .step 4.*never deletes a token"):
        train_hf.train(arguments("soft", "--soft-start", "1", "--hard-start", "4", steps=2))
    with pytest.raises(SystemExit):
        parse(arguments("no", "--photon", "hard_start_step=3"))
    assert "Set --soft-start, --hard-start and --flip-start" in capsys.readouterr().err


def running_level(trainer):
    """Of the scheduler that trains, also within adapters."""
    buffers = {name: value for name, value in trainer.model.named_buffers() if name.endswith("running_level")}
    (value,) = (value for name, value in buffers.items() if len(buffers) == 1 or "modules_to_save" in name)
    return value


@pytest.mark.parametrize("lora", [
    [], ["--lora", "--lora-dropout", "0.2"], ["--muon-learning-rate", "0.02"], EXACT, ["--lora", *EXACT],
], ids=["full", "lora", "muon", "exact", "lora-exact"])  # fmt: skip
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(arguments, tmp_path, lora):
    """Stopped within the dense, the soft and the hard phase, and after the first flips."""
    more = [*PHASES, *([] if EXACT[1] in lora else MIXED), *lora, "--save-strategy", "steps", "--save-steps", "1"]
    whole = train_hf.train(arguments("whole", *more, steps=7))
    names = (*TERMS, "grad_norm", "learning_rate", "phase", *(["kept"] if EXACT[1] in lora else []))
    wanted = logged(whole, names)
    assert [line["phase"] for line in wanted] == ["dense"] * 2 + ["soft"] * 2 + ["hard"] * 3
    assert sum(line["flip_rows"] for line in wanted) > 0 < sum(line["robust_rows"] for line in wanted)
    for step in (1, 3, 4, 6) if not lora else (3, 5):
        folder = tmp_path / f"stopped{step}"
        folder.mkdir()
        shutil.copy(tmp_path / "whole" / "run.json", folder)
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed = train_hf.train(arguments(folder.name, *more, "--resume", steps=7))
        assert_equal_logs(logged(resumed, names)[step:], wanted[step:], rel=1e-5)
    if EXACT[1] in lora:
        assert [line["budget"] for line in logged(whole, ("budget",))] == pytest.approx([1.0] * 4 + [0.4] * 3)
        levels = [running_level(run) for run in (whole, resumed)]
        assert torch.equal(*levels) and levels[0] != 0
    config = json.loads((tmp_path / "whole" / "checkpoint-7" / "config.json").read_text()) if not lora else None
    if config:
        assert [config[f"{name}_start_step"] for name in ("soft", "hard", "flip")] == [2, 4, 5]


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["full", "lora"])
def test_a_finished_run_stays_or_is_extended(arguments, tmp_path, lora):
    """Eight rows in batches of three make epochs of three steps; two steps end within the first one."""
    more = [*lora, "--save-strategy", "steps", "--save-steps", "1", "--lr-scheduler-type", "constant", *MIXED]
    shares = ["--soft-start", "0.7", "--hard-start", "0.7", "--flip-start", "0.7"]  # step 1, and 3 in a run of four
    finished = train_hf.train(arguments("run", *more, *shares, steps=2))
    weights = {name: parameter.clone() for name, parameter in finished.model.named_parameters()}
    again = train_hf.train(arguments("run", *more, *shares, "--resume", steps=2))
    assert again.state.global_step == 2
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    longer = train_hf.train(arguments("run", *more, *shares, "--resume", steps=4))
    steps = ["--soft-start", "1", "--hard-start", "1", "--flip-start", "1"]
    whole = train_hf.train(arguments("whole", *more, *steps, steps=4))
    assert_equal_logs(logged(longer, (*TERMS, "phase"))[2:], logged(whole, (*TERMS, "phase"))[2:], rel=1e-5)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["max_steps"] == 4
    with pytest.raises(ValueError, match="max_steps: 4 there, 3 now"):
        train_hf.train(arguments("run", *more, *shares, "--resume", steps=3))


def test_small_batches_add_up_to_a_large_one(arguments):
    """Every term, with text-only rows, perturbed and flipped rows, the token head and the evidence."""
    more = [
        *PHASES,
        *MIXED,
        "--token-labels",
        "--token-label-classes",
        "3",
        "--evidence-weight",
        "0.5",
        "--optim",
        "sgd",
        "--learning-rate",
        "1e-3",
    ]
    one = ["--per-device-train-batch-size", "4"]
    four = ["--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "4"]
    terms = (*TERMS, "token_loss", "evidence_loss", "grad_norm")
    logs = [logged(train_hf.train(arguments(name, *more, *how, steps=7)), terms)
            for name, how in (("one", one), ("four", four))]  # fmt: skip
    assert_equal_logs(*logs)
    for line in logs[0]:
        terms = line["lm_loss"] + line["band_loss"] + line["token_loss"] + 0.5 * line["evidence_loss"]
        assert line["loss"] == pytest.approx(terms, rel=1e-3) and line["evidence_loss"] > 0
    assert len({line["threshold"] for line in logs[0]}) > 2
    assert sum(line["flip_rows"] for line in logs[0]) > 0 < sum(line["robust_rows"] for line in logs[0])
    assert any(line["band_loss"] > 0 for line in logs[0])


def test_token_labels_alone_leave_the_decoder_out(arguments, model, monkeypatch):
    names = (*TERMS, "token_loss")
    labels = ["--token-labels", "--token-label-classes", "3", "--parts", "vision", "aligner"]
    with_answers = train_hf.train(arguments("answers", *labels, stage="dense", steps=1, file="scans.jsonl"))
    decoder = PhotonTextModel
    monkeypatch.setattr(decoder, "forward", lambda *args, **kwargs: pytest.fail("the decoder ran"))
    trainer = train_hf.train(
        arguments("alone", *labels, "--token-labels-alone", stage="dense", steps=2, file="scans.jsonl")
    )
    first = logged(trainer, names)[0]
    assert first["token_loss"] == pytest.approx(logged(with_answers, names)[0]["token_loss"], rel=1e-4)
    assert first["loss"] == pytest.approx(first["token_loss"], rel=1e-5) and first["lm_loss"] == 0
    before = load_file(model / "model.safetensors")
    after = load_file(f"{trainer.args.output_dir}/final/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {name for name in before if ".visual." in name}


def test_a_loss_is_one_new_file_and_one_line(arguments, tmp_path):
    """The example in the docstring of `photon/training/losses/__init__.py`, in a copy of the repository."""
    shutil.copytree(ROOT / "photon", tmp_path / "repo" / "photon", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), ROOT / "chat_template.jinja"):
        shutil.copy(file, tmp_path / "repo")
    registry = tmp_path / "repo" / "photon" / "training" / "losses" / "__init__.py"
    text = registry.read_text()
    example = re.search(r"confident answers:\n\n(.*?)\n\n\S", text, re.S)[1]
    (registry.parent / "sharpness.py").write_text(textwrap.dedent(example) + "\n")
    mark = "# the registered losses: a new one is one more line here\n"
    assert mark in text
    registry.write_text(
        text.replace(mark, mark + "from photon.training.losses.sharpness import SharpnessLoss  # noqa: F401\n")
    )
    for name, more in (("toy", ["--sharpness-weight", "0.5"]), ("without", [])):
        more += ["--save-strategy", "steps", "--save-steps", "1", "--optim", "sgd", "--learning-rate", "40", *HARD]
        command = [sys.executable, str(tmp_path / "repo" / "train_hf.py"), *arguments(name, *more, steps=1)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        named = ", sharpness_loss 0.5" if name == "toy" else ""
        assert f"weights of losses: lm_loss 1, band_loss 1{named}\n" in done.stderr
    log, plain = (
        json.loads((tmp_path / name / "checkpoint-1" / "trainer_state.json").read_text())["log_history"][0]
        for name in ("toy", "without")
    )
    assert 0 < log["sharpness_loss"] < 0.25 and "sharpness_loss" not in plain
    assert log["loss"] == pytest.approx(plain["loss"] + 0.5 * log["sharpness_loss"], rel=1e-3)
    name = "model.language_model.scheduler.predictor.mlp.2.bias"
    toy, without = (load_file(tmp_path / run / "final" / "model.safetensors")[name] for run in ("toy", "without"))
    assert (toy - without).abs() > 1e-3  # its gradient reaches the scheduler
    assert json.loads((tmp_path / "toy" / "run.json").read_text())["sharpness_weight"] == 0.5


# === Several ranks ===================================================================================================


def launch(command, ranks=2):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0"]
    done = subprocess.run(
        [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *command],
        env=env, capture_output=True, encoding="utf-8", errors="replace", timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("more", [[], ["--lora"], ["--gradient-checkpointing"]])
def test_packed_questions_equal_single_ones(arguments, model, monkeypatch, more):
    runs, lengths = {}, []
    pack = photon_trainer.pack_questions

    def watched(batch, *args):
        packed = pack(batch, *args)
        lengths.append((batch["input_ids"].shape, packed["input_ids"].shape))
        return packed

    monkeypatch.setattr(photon_trainer, "pack_questions", watched)
    options = ["--optim", "sgd", "--per-device-train-batch-size", 8, "--max-grad-norm", 0, *more]
    for name, packing in (("single", []), ("packed", ["--pack-questions"])):
        trainer = train_hf.train(arguments(name, *options, *packing, stage="dense"))
        runs[name] = logged(trainer), {k: v.detach() for k, v in trainer.model.named_parameters()}
    for (rows, _), (packed, _) in lengths:
        assert rows == 8 and packed == 7  # two questions on scan 0 alone; texts stand alone
    assert len(lengths) == 2
    assert_equal_logs(runs["packed"][0], runs["single"][0])
    for name, weight in runs["single"][1].items():
        torch.testing.assert_close(runs["packed"][1][name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_questions_in_front_of_a_scan_cannot_be_packed():
    batch = {
        "input_ids": torch.tensor([[5, 9, 8, 7, 6], [0, 4, 9, 8, 3]]), "labels": torch.zeros(2, 5, dtype=torch.long),
        "attention_mask": torch.tensor([[1] * 5, [0] + [1] * 4]), "volume_count": torch.tensor([1, 1]),
        "mm_token_type_ids": torch.zeros(2, 5, dtype=torch.long), "volume_index": torch.tensor([0, 0]),
        "video_grid_thw": torch.ones(2, 3, dtype=torch.long),
    }  # fmt: skip
    with pytest.raises(ValueError, match="different text in front of them"):
        photon_trainer.pack_questions(batch, torch.zeros(3, 2, 5, dtype=torch.long), 8)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_two_ranks_one_with_text_alone_equal_one_process(arguments, tmp_path, model, data, checkpointing):
    """SGD without clipping: the change of a weight is its gradient. Two steps, since DDP fails at the second one."""
    more = [*HARD, *MIXED, "--optim", "sgd", "--max-grad-norm", "0", "--learning-rate", "0.1", "--lr-scheduler-type",
            "constant", "--gradient-checkpointing", checkpointing, "--eval-data", data / "train.jsonl",
            "--eval-max-new-tokens", "2", "--per-device-eval-batch-size", "3"]  # fmt: skip
    many = arguments("many", *more, "--per-device-train-batch-size", "1", file="two.jsonl")
    launch([str(ROOT / "train_hf.py"), *many])
    train_hf.train(arguments("one", *more, "--per-device-train-batch-size", "2", file="two.jsonl"))
    evaluated = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("many", "one")]
    for results in evaluated:
        assert results.pop("eval_runtime") > 0 and results["eval_rows"] == 8 and 0 < results["eval_kept"] < 1
    assert evaluated[0] == pytest.approx(evaluated[1])
    before = load_file(model / "model.safetensors")
    many, one = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("many", "one"))
    assert many.keys() == one.keys() == before.keys()
    for name in before:
        assert not torch.equal(one[name], before[name]), name
        torch.testing.assert_close(many[name] - before[name], one[name] - before[name], atol=2e-6, rtol=1e-3, msg=name)


SHARDED = """
import sys
root, model, data, cache, out = sys.argv[1:]
sys.path.insert(0, root)
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText, AutoProcessor
from photon.training.batches import Collator
from photon.training.data import load_rows
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
model_ = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True, dtype=torch.float32).train()
model_.set_scheduler_phase("hard")
for block in [*model_.model.visual.blocks, *model_.model.language_model.layers]:
    fully_shard(block, mesh=mesh)
fully_shard(model_, mesh=mesh)
processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
batch = Collator(processor, 500, cache)([load_rows(data)[rank]])
batch = {name: value for name, value in batch.items() if name not in ("volume_count", "example")}
items = (batch["labels"] != -100).sum()
dist.all_reduce(items)
optimizer = torch.optim.SGD(model_.parameters(), lr=0.1)
for _ in range(2):
    model_(**batch, num_items_in_batch=items / dist.get_world_size()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
whole = {name: p.full_tensor().detach().contiguous() for name, p in model_.named_parameters()}
if rank == 0:
    save_file(whole, out)
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_ranks_equal_one_process(model, data, tmp_path):
    """FSDP2 over two ranks, one with text alone; the Trainer falls back to DDP on CPU, so it is called directly."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    rows, cache = data / "two.jsonl", data / "cache"
    launch([str(part) for part in (tmp_path / "sharded.py", ROOT, model, rows, cache, tmp_path / "many.safetensors")])
    one = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True, dtype=torch.float32).train()
    one.set_scheduler_phase("hard")
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    batch = Collator(processor, 500, cache)(list(load_rows(rows)))
    batch = {name: value for name, value in batch.items() if name not in ("volume_count", "example")}
    before = {name: parameter.detach().clone() for name, parameter in one.named_parameters()}
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        one(**batch).loss.backward()
        optimizer.step()
    many = load_file(tmp_path / "many.safetensors")
    for name, parameter in one.named_parameters():
        change = (parameter - before[name]).detach()
        torch.testing.assert_close(many[name] - before[name], change, atol=2e-6, rtol=1e-3, msg=name)


# === The result ======================================================================================================


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.fixture
def inputs(model, data):
    """A batch of prompts with answers, without what the trainer takes out."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    rows = load_rows(data / "train.jsonl")
    batch = Collator(processor, 500, cache_dir=data / "cache")([rows[0], rows[2], rows[3]])
    return {name: batch[name] for name in batch if name not in ("labels", "volume_count", "example")}


FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, batch, out = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model.eval()(**load_file(batch)).logits.contiguous()}, out)
"""


def test_the_final_folder_gives_the_same_in_a_fresh_process(arguments, tmp_path, inputs):
    more = ["--token-labels", "--token-label-classes", "3", *HARD]
    trainer = train_hf.train(arguments("run", *more))
    final = tmp_path / "run" / "final"
    assert not any("token_head" in name for name in load_file(final / "model.safetensors"))
    assert not (final / "training_args.bin").exists() and (final / "pipeline_photon.py").exists()
    assert json.loads((final / "generation_config.json").read_text())["max_new_tokens"] == 256
    moved = shutil.move(final, tmp_path / "elsewhere")
    save_file({name: value.contiguous() for name, value in inputs.items()}, tmp_path / "batch.safetensors")
    run_fresh(FRESH, moved, tmp_path / "batch.safetensors", tmp_path / "logits.safetensors")
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(found, logits_of(trainer.model, inputs), atol=1e-5, rtol=1e-5)


def test_merged_adapters_equal_unmerged_ones(arguments, tmp_path, model, inputs, monkeypatch):
    """`--model` is a path from the current folder; final and adapter are loaded from another one."""
    monkeypatch.chdir(model.parent)
    command = [model.name if part == str(model) else part for part in arguments("run", "--lora", *HARD, steps=3)]
    trainer = train_hf.train(command)
    wanted = logits_of(trainer.model, inputs)
    monkeypatch.chdir(tmp_path)
    merged, adapter = tmp_path / "run" / "final", tmp_path / "run" / "adapter"
    assert set(load_file(merged / "model.safetensors")) == set(load_file(model / "model.safetensors"))
    assert not list(merged.glob("adapter*"))
    assert json.loads((merged / "generation_config.json").read_text())["max_new_tokens"] == 256
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model) and str(model) in (adapter / "README.md").read_text()
    save_file({name: value.contiguous() for name, value in inputs.items()}, tmp_path / "batch.safetensors")
    for folder in (merged, adapter):
        loaded = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        torch.testing.assert_close(logits_of(loaded, inputs), wanted, atol=1e-4, rtol=1e-4)
        ours = loading.load_model(folder, dtype=torch.float32)
        assert not any("lora" in name for name, _ in ours.named_parameters())
        torch.testing.assert_close(logits_of(ours, inputs), wanted, atol=1e-4, rtol=1e-4)
        run_fresh(FRESH, folder, tmp_path / "batch.safetensors", tmp_path / "logits.safetensors", cwd=tmp_path)
        found = load_file(tmp_path / "logits.safetensors")["logits"]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    base = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True, dtype=torch.float32)
    other = logits_of(base, inputs)
    assert other.shape != wanted.shape or (other - wanted).abs().max() > 0.1


CARD_CODE = """
import sys, torch
from safetensors.torch import load_file, save_file
card, folder, batch, out = sys.argv[1:]
exec(open(card).read().split("```python")[1].split("```")[0].replace("FOLDER", folder))
with torch.no_grad():
    save_file({"logits": model.eval()(**load_file(batch)).logits.contiguous()}, out)
"""


def test_every_command_takes_adapters(arguments, data, tmp_path, model, inputs, capsys, monkeypatch):
    """A model trained dense: the base, which has the scheduler on, does not know; and the card's code works."""
    trainer = train_hf.train(arguments("run", "--lora", "--merge-lora", "false", stage="dense"))
    wanted, adapter = logits_of(trainer.model, inputs), tmp_path / "run" / "adapter"
    assert not (tmp_path / "run" / "final").exists()
    save_file({name: value.contiguous() for name, value in inputs.items()}, tmp_path / "batch.safetensors")
    run_fresh(CARD_CODE, adapter / "README.md", adapter, tmp_path / "batch.safetensors", tmp_path / "l.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "l.safetensors")["logits"], wanted, atol=1e-4, rtol=1e-4)
    processor, loaded = loading.load(adapter)
    assert loaded.config.use_scheduler is False
    torch.testing.assert_close(logits_of(loaded, inputs), wanted, atol=1e-4, rtol=1e-4)
    pipe = pipeline("volume-question-answering", model=str(adapter), trust_remote_code=True)
    question = "On which side is it?"
    answer = pipe(str(data / "1.nii.gz"), question, max_new_tokens=4, do_sample=False, use_scheduler=False)["answer"]
    capsys.readouterr()
    ask.main([str(data / "1.nii.gz"), question, "--model", str(adapter), "--max-new-tokens", "4", "--json"])
    assert json.loads(capsys.readouterr().out)["answer"] == answer
    evaluation = ["--benchmark", "jsonl", "--data", str(data / "scans.jsonl"), "--model", str(adapter), "--limit", "1"]
    evaluate_hf.main([*evaluation, "--device", "cpu", "--output", str(tmp_path / "evaluated")])
    first = json.loads((tmp_path / "evaluated" / "run.json").read_text())["model"]
    assert " on " in first
    again = train_hf.train([str(adapter) if part == str(model) else part for part in arguments("more", stage="align")])
    for name, weight in load_file(tmp_path / "more" / "final" / "model.safetensors").items():
        assert (name == PATCH) != torch.equal(weight, loaded.state_dict()[name].float()), name
    assert again.model.config.use_scheduler is False
    with pytest.raises(ValueError, match="Give the merged model"):
        train_hf.train([str(adapter) if part == str(model) else part for part in arguments("no", "--lora")])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "moved")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="there is no such folder. Write the folder or Hub id of their base"):
        loading.load(adapter)


def test_a_final_folder_holds_one_thing(arguments, tmp_path, inputs):
    """Adapters, then the same run resumed and merged: they were applied twice, once merged and once from files."""
    more = ["--lora", "--save-strategy", "steps", "--save-steps", "1", *HARD]
    trainer = train_hf.train(arguments("run", *more, "--merge-lora", "false"))
    wanted, final = logits_of(trainer.model, inputs), tmp_path / "run" / "final"
    adapter = tmp_path / "run" / "adapter"
    shutil.copytree(adapter, final)  # as an earlier version left it
    for merge in ("true", "true", "false", "true"):  # again, the other way, and back
        train_hf.train(arguments("run", *more, "--resume", "--merge-lora", merge))
        assert final.is_dir() == (merge == "true") and not (tmp_path / "run" / "final.partial").exists()
        assert not list(final.glob("adapter*")) and not list(adapter.glob("model*"))
        result = final if merge == "true" else adapter
        loaded = AutoModelForImageTextToText.from_pretrained(result, trust_remote_code=True, dtype=torch.float32)
        torch.testing.assert_close(logits_of(loaded, inputs), wanted, atol=1e-4, rtol=1e-4)


def test_a_model_trained_dense_answers_from_all_tokens_unless_told(arguments, tmp_path, inputs):
    train_hf.train(arguments("dense", stage="dense", steps=1))
    train_hf.train(arguments("tune", *HARD, steps=1))
    dense, tuned = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name / "final", trust_remote_code=True)
        for name in ("dense", "tune")
    )
    assert (dense.config.use_scheduler, tuned.config.use_scheduler) == (False, True)
    with torch.no_grad():
        assert dense(**inputs).keep_mask is None and tuned(**inputs).keep_mask is not None
        assert torch.equal(dense(**inputs).logits, dense(**inputs, use_scheduler=False).logits)
        assert dense(**inputs, use_scheduler=True).keep_mask is not None
        assert dense(**inputs, token_budget=3).keep_mask.sum(-1).tolist() == [3, 0, 3]


def test_weights_are_saved_in_the_type_that_they_came_in(arguments, tmp_path):
    train_hf.train(arguments("run", "--save-dtype", "bfloat16", stage="align", steps=1))
    final = tmp_path / "run" / "final"
    assert {tensor.dtype for tensor in load_file(final / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"


# === Evaluation ======================================================================================================


def test_evaluation_counts_what_the_model_writes_from_the_prompt_alone(arguments, data, tmp_path):
    more = ["--eval-data", data / "train.jsonl", "--eval-strategy", "steps", "--eval-steps", "1", *HARD,
            "--per-device-eval-batch-size", "3", "--eval-max-new-tokens", "5", "--learning-rate", "0"]  # fmt: skip
    trainer = train_hf.train(arguments("run", *more, steps=1))
    rows, processor = trainer.eval_dataset, trainer.processing_class
    written, kept = [], []
    for row in rows:
        volumes = iter(row["volumes"])
        question = row["messages"][0]["content"]
        parts = [{"type": "volume", "path": next(volumes)["path"]} if part["type"] == "volume" else
                 {"type": "text", "text": part["text"]} for part in question]  # fmt: skip
        chat = [{"role": "user", "content": parts}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        out = trainer.model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        written.append(processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        if row["volumes"]:
            kept.append(float(out.past_key_values.cut.keep_mask.float().mean()))
    answers = [text if number % 2 else "no" for number, text in enumerate(written)]
    same = rows.remove_columns("answer").add_column("answer", [f" {text.upper()} " for text in answers])
    metrics = trainer.evaluate(same)
    hits = [a.strip().casefold() == b.strip().casefold() for a, b in zip(written, answers, strict=True)]
    texts = [hit for hit, task in zip(hits, rows["task"], strict=True) if task == "text"]
    assert metrics["eval_accuracy"] == sum(hits) / 8 >= 0.5
    assert metrics["eval_accuracy_text"] == sum(texts) / 2
    assert metrics["eval_kept"] == pytest.approx(sum(kept) / len(kept), abs=0.02)
    assert sum("eval_accuracy" in line for line in trainer.state.log_history) >= 2
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["eval_rows"] == 8


def test_the_final_folder_alone_goes_to_the_hub(arguments, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, name, private, exist_ok):
            calls.append((name, private))
            return type("Repo", (), {"repo_id": f"someone/{name}"})

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, folder_path, sorted(path.name for path in folder_path.glob("*.json"))))

    monkeypatch.setattr(saving, "HfApi", Hub)
    more = ["--push-to-hub", "--hub-model-id", "tiny", "--hub-private-repo", "true", "--hub-token", "t"]
    train_hf.train(arguments("run", *more, stage="align", steps=1))
    assert calls[:2] == ["t", ("tiny", True)] and calls[2][:2] == ("someone/tiny", tmp_path / "run" / "final")
    assert {"config.json", "processor_config.json"} <= set(calls[2][2]) and len(calls) == 3


def test_score_by_task():
    rows = [{"example": i, "task": task, "answer": "Left"} for i, task in enumerate(["a", "a", "b", None])]

    class Rows(list):
        def select_columns(self, names):
            return self

    results = {0: ("left ", 0.5), 1: ("right", 0.25), 2: ("LEFT", None), 3: ("", 0.75)}
    assert score(Rows(rows), results) == {"accuracy": 0.5, "accuracy_a": 0.5, "accuracy_b": 1.0, "kept": 0.5}


# === Refusals ========================================================================================================


def test_a_folder_that_holds_another_run_is_refused(arguments, tmp_path, model):
    more = ["--save-strategy", "steps", "--save-steps", "1"]
    with pytest.raises(ValueError, match="no run to resume"):
        train_hf.train(arguments("run", *more, "--resume", stage="align", steps=1))
    train_hf.train(arguments("run", *more, stage="align", steps=1))
    with pytest.raises(ValueError, match="holds this run already. Add --resume"):
        train_hf.train(arguments("run", *more, stage="align", steps=1))
    with pytest.raises(ValueError, match="(?s)another run.*learning_rate: 0.01 there, 0.5 now"):
        train_hf.train(arguments("run", *more, "--resume", "--learning-rate", "0.5", stage="align", steps=1))
    with pytest.raises(ValueError, match="(?s)another run.*stage: 'align' there, 'dense' now"):
        train_hf.train(arguments("run", *more, "--resume", stage="dense", steps=1))
    with pytest.raises(ValueError, match="(?s)another run.*rows: "):
        train_hf.train(arguments("run", *more, "--resume", stage="align", steps=1, file="two.jsonl"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.txt").write_text("sun")
    with pytest.raises(ValueError, match="not empty and holds no run.json"):
        train_hf.train(arguments("photos", stage="align", steps=1))
    path = tmp_path / "run" / "checkpoint-1" / "model.safetensors"
    save_file(load_file(path) | {PATCH: torch.zeros(25, 1, 14, 14, 14)}, path)
    with pytest.raises(ValueError, match="another size: model.visual.patch_embed.proj.weight is .25, 1"):
        train_hf.train(arguments("run", *more, "--resume", stage="align", steps=1))


@pytest.mark.parametrize("classes, seen", [("2", "is 2; expected labels from 1 to 1"), ("3", None)])
def test_evidence_beyond_the_label_maps_is_refused(arguments, classes, seen):
    more = ["--evidence-weight", "1", "--token-label-classes", classes, *HARD]
    if seen is None:
        train_hf.train(arguments("run", *more, steps=1))
        return
    with pytest.raises(ValueError, match=seen):
        train_hf.train(arguments("run", *more, steps=1))


@pytest.mark.parametrize("more, message", [
    (["--stage", "warm"], "invalid choice"),
    (["--stage", "align", "--lora"], "the patch embedding alone"),
    (["--merge-lora"], "needs --lora"),
    (["--load-in-4bit"], "cannot be trained"),
    (["--lora", "--token-labels"], "which --lora freezes"),
    (["--pack-questions"], "needs --stage dense"),
    (["--muon-learning-rate", "0.1", "--lora"], "needs whole matrices"),
    (["--muon-learning-rate", "0.1", "--optim", "sgd"], "--optim sgd has no part"),
    (["--parts", "tower"], "expected some of decoder, vision, aligner, scheduler"),
    (["--parts", "vision", "--lora"], "narrows --stage dense and tune"),
    (["--parts", "scheduler", "--stage", "dense"], "needs --stage tune"),
    (["--parts", "decoder", "--token-labels"], "which --parts leaves out"),
    (["--evidence-weight", "1", "--stage", "dense"], "needs --stage tune"),
    (["--token-labels-alone", "--stage", "dense"], "needs --token-labels"),
    (["--token-labels", "--token-labels-alone"], "needs --token-labels, --stage dense and one process"),
    (["--eval-strategy", "steps", "--eval-steps", "1"], "needs --eval-data"),
    (["--lora", "--merge-lora", "false", "--push-to-hub"], "no use on the Hub"),
    (["--fp16"], "Use --bf16"),
])  # fmt: skip
def test_arguments_that_do_not_go_together(arguments, capsys, more, message):
    with pytest.raises(SystemExit):
        parse(arguments("run", *more))
    assert message in capsys.readouterr().err


def test_faults_of_the_model_and_the_data(arguments, tmp_path, model, data):
    for wrong in ("threshold_maxx=1", "threshold_max"):
        with pytest.raises(ValueError, match="expected name=value"):
            train_hf.train(arguments("run", "--photon", wrong))
    with pytest.raises(Exception, match="scheduler_layer is 7"):
        train_hf.train(arguments("run", "--photon", "scheduler_layer=7"))
    with pytest.raises(ValueError, match="cuts the answer away"):
        train_hf.train(arguments("run", "--max-length", "40"))
    with pytest.raises(ValueError, match="--tasks lesion: the data has scan, text"):
        train_hf.train(arguments("run", "--tasks", "text", "lesion"))
    with pytest.raises(ValueError, match="remove_unused_columns=True would drop the scans"):
        train_hf.train(arguments("run", "--remove-unused-columns", "true"))
    assert not (tmp_path / "run").exists()


def test_arguments_from_a_file_and_the_line(arguments, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\nstage: tune\ntrain_data: d.jsonl\noutput_dir: out\nlearning_rate: 1e-5\nhard_start: 0.5\n"
        "photon:\n  scheduler_layer: -1\n  saliency: attention\nuse_cpu: true\nlora: true\n"
    )
    model_args, data_args, _, args = parse([str(recipe), "--stage", "dense", "--max-steps", "7"])
    assert (model_args.model, model_args.stage, model_args.lora) == ("m", "dense", True)
    assert model_args.photon == ["scheduler_layer=-1", 'saliency="attention"']
    assert (args.learning_rate, args.hard_start, args.max_steps, data_args.train_data) == (1e-5, 0.5, 7, "d.jsonl")
    recipe.write_text("model: m\nlearning_rat: 1\n")
    with pytest.raises(SystemExit):
        parse([str(recipe)])
    assert "unknown arguments: learning_rat" in capsys.readouterr().err


def test_mistakes_give_one_line(request, arguments, tmp_path, data, capsys, monkeypatch):
    def refusal(command, code=2):
        with pytest.raises(SystemExit) as caught:
            train_hf.main(command)
        assert caught.value.code == code
        error = capsys.readouterr().err.strip()
        assert "Traceback" not in error
        return error.splitlines()[-1]

    assert "There is no folder nowhere" in refusal(["--model", "nowhere", *arguments("run")[2:]])
    assert "has no config.json" in refusal(["--model", str(data), *arguments("run")[2:]])
    assert "no data file absent.jsonl" in refusal([*arguments("run"), "--train-data", str(data / "absent.jsonl")])
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refusal(arguments("run", "--lora"))
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("photon.scan_store_photon.save_file", full)
    for workers in ("0", "1"):
        command = arguments(f"full{workers}", "--cache-dir", tmp_path / "cache", "--dataloader-num-workers", workers)
        error = refusal(command)
        assert error.startswith("A preprocessed scan could not be written to cache_dir; is the disk full?"), error
    monkeypatch.undo()
    monkeypatch.setattr("photon.training.saving.cast_weights", full)
    for size, more in ((1, []), *((size, ["--save-strategy", "steps", "--save-steps", "1"]) for size in (1, 10**6))):
        monkeypatch.setattr(
            train_hf.PhotonTrainer, "_save_checkpoint", lambda *args, n=size: torch.save(torch.ones(n), "/dev/full")
        )
        error = refusal(arguments(f"unsaved{size}{len(more)}", *more, stage="align", steps=1))
        assert error.startswith("A file of weights could not be written or read; is the disk full?"), error
    monkeypatch.undo()
    monkeypatch.setattr(train_hf.PhotonTrainer, "training_step", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    assert "Run the same command again with --resume" in refusal(arguments("stopped"), code=130)


@pytest.mark.parametrize("code, status, line", [
    ("raise ModuleNotFoundError('No module', name='datasets')", 2,
     "datasets is missing: pip install -r requirements-train.txt -c constraints.txt"),
    ("raise KeyboardInterrupt", 130, "Stopped before anything was begun."),
])  # fmt: skip
def test_what_stops_the_imports_is_one_line(tmp_path, code, status, line):
    (tmp_path / "datasets.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "train_hf.py"), "--help"]
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr.strip()) == (status, line)


def test_help_shows_ours_first(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n  --{name}") for name in ("model", "train_data", "evidence_weight", "hard_start", "bf16")]
    assert places == sorted(places) and text.index("--resume ") < text.index("--output_dir")
    assert len(text.split("options:")[0].splitlines()) < 8


@pytest.mark.parametrize("script", ["stage1_align", "stage2_tune_lora", "stage2_tune_full", "multi_node"])
def test_scripts_without_a_gpu_say_what_to_do(script, tmp_path):
    for program in ("dirname", "wc"):  # a PATH without nvidia-smi
        (tmp_path / program).symlink_to(shutil.which(program))
    env = {"PATH": str(tmp_path), "PYTHON": sys.executable}
    command = [shutil.which("bash"), str(ROOT / "runs" / f"{script}.sh"), "a.jsonl", "b.jsonl", str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and "No NVIDIA GPU was found" in done.stderr and "runs/tiny_cpu.sh" in done.stderr


def test_sets_of_datasets_train_as_the_file_does(arguments, data, tmp_path):
    """A folder of `save_to_disk`, and a set in memory."""
    wanted = logged(train_hf.train(arguments("file", *HARD)))
    table = load_rows(data / "train.jsonl").select_columns(["messages", "volumes", "task"])
    table.save_to_disk(tmp_path / "saved")
    folder = train_hf.train(arguments("folder", *HARD, "--train-data", tmp_path / "saved"))
    assert_equal_logs(logged(folder), wanted)
    command = arguments("memory", *HARD)
    place = command.index("--train-data")
    memory = train_hf.train(command[:place] + command[place + 2 :], train_data=table.to_iterable_dataset())
    assert_equal_logs(logged(memory), wanted)


def test_training_on_some_tasks(arguments, tmp_path):
    trainer = train_hf.train(arguments("run", "--tasks", "text", stage="dense", steps=1))
    assert trainer.train_dataset["where"] == ["train.jsonl line 3", "train.jsonl line 8"]


def test_four_bits_need_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        four_bit()


@pytest.mark.parametrize("recipe", ["align", "tune_lora", "tune_full", "tiny_tower", "tiny_exact"])
def test_recipes_are_arguments(recipe, tmp_path):
    more = ["--model", "m", "--train-data", "d", "--eval-data", "e", "--output-dir", str(tmp_path), "--use-cpu"]
    path = ROOT / "configs" / f"recipe_{recipe}.yaml"
    model_args, _, loss_args, args = parse([str(path), *more, "--bf16", "false"])
    assert model_args.stage == {"align": "align", "tiny_tower": "dense"}.get(recipe, "tune")
    assert model_args.lora == (recipe == "tune_lora") and loss_args.token_labels == (recipe == "tiny_tower")
    if model_args.stage == "tune":
        assert Phases.of(args, 32_000).hard == (1600 if recipe == "tiny_exact" else 8000)


def test_settings_of_launchers_are_read(model):
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {name: load_config_from_file(str(ROOT / "configs" / f"{name}.yaml")).distributed_type.value
             for name in ("accelerate_ddp", "accelerate_zero3", "fsdp2")}  # fmt: skip
    assert kinds == {"accelerate_ddp": "MULTI_GPU", "accelerate_zero3": "DEEPSPEED", "fsdp2": "FSDP"}
    sharded = load_config_from_file(str(ROOT / "configs" / "fsdp2.yaml")).fsdp_config
    loaded = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True)
    names = {type(module).__name__ for module in loaded.modules()}
    assert set(sharded["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= names
    for stage in (2, 3):
        text = (ROOT / "configs" / f"deepspeed_zero{stage}.json").read_text()
        assert json.loads(text)["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "runs").glob("*.sh")))
def test_runs_name_files_that_are_there(script):
    text = (ROOT / "runs" / script).read_text()
    named = set(re.findall(r"(?<![$/\w])(?:configs/)?[\w/]+\.(?:yaml|json|py)\b", text))
    assert any(name.startswith("configs/") for name in named)
    assert not [name for name in named if not (ROOT / name).is_file()]
