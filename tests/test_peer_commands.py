"""Other selection methods by command: evaluated, trained with, asked with.

python -m pytest tests/test_peer_commands.py
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import ask
import evaluate_hf
import train_hf
from conftest import ROOT, TOKENS
from photon.loading import load_model
from photon.phantoms.dataset import DataConfig, write_data_set
from photon.schedulers import use_scheduler

TRAIN = [
    "--stage", "tune", "--max-steps", "3", "--soft-start", "0", "--hard-start", "1", "--flip-start", "9", "--use-cpu",
    "--per-device-train-batch-size", "2", "--logging-steps", "1", "--report-to", "none", "--learning-rate", "1e-3",
    "--keep-ratio", "0.1", "--photon", "robust_probability=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few questions about single phantoms."""
    folder = tmp_path_factory.mktemp("data")
    rows, *_ = write_data_set(folder, 3, DataConfig(seed=3))
    rows = [row for row in rows if len(row["volumes"]) == 1][:4]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def evaluated(data, model, output, *options):
    evaluate_hf.main(
        ["--benchmark", "jsonl", "--data", str(data / "rows.jsonl"), "--model", str(model), "--output", str(output),
         "--bootstrap", "9", "--max-new-tokens", "4", *options]
    )  # fmt: skip
    lines = (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], json.loads((output / "run.json").read_text(encoding="utf-8"))


def test_evaluate_takes_every_method_and_another_layer(data, tmp_path, capsys):
    records, run = evaluated(data, ROOT, tmp_path / "divprune", "--scheduler", "divprune", "--keep-ratio", "0.1")
    assert {record["kept"] for record in records} == {0.1} and "scheduler_layer" not in run
    other = ["--scheduler", "transprune", "--keep-ratio", "0.1"]
    with pytest.raises(SystemExit):
        evaluated(data, ROOT, tmp_path / "refused", *other)
    assert (
        "transprune reads decoder layers below the cut, but the model cuts after layer -1" in capsys.readouterr().err
    )
    records, run = evaluated(data, ROOT, tmp_path / "layer", *other, "--scheduler-layer", "1")
    assert {record["kept"] for record in records} == {0.1} and json.dumps(run).count('"scheduler_layer": 1') == 1


def trained(data, output, name, *options):
    arguments = ["--model", str(ROOT), "--train-data", str(data / "rows.jsonl"), "--output-dir", str(output)]
    trainer = train_hf.train([*arguments, "--scheduler", name, *TRAIN, *options])
    return [line for line in trainer.state.log_history if "loss" in line], output / "final"


def test_the_decoder_learns_with_a_method_and_is_saved_as_a_model(data, tmp_path):
    log, final = trained(data, tmp_path / "run", "random")
    assert [line["phase"] for line in log] == ["soft", "hard", "hard"]
    assert log[-1]["kept"] == pytest.approx(round(0.1 * TOKENS) / TOKENS) and log[-1]["lm_loss"] > 0
    old, new = (load_file(folder / "model.safetensors") for folder in (ROOT, final))
    assert old.keys() == new.keys()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert any(".layers." in name for name in moved)
    assert not any("scheduler" in name for name in moved)  # nothing teaches the model's own
    records, _ = evaluated(data, final, tmp_path / "answers", "--scheduler", "random", "--keep-ratio", "0.1")
    assert {record["kept"] for record in records} == {0.1}


@pytest.mark.parametrize("name, layer", [("perceiver", -1), ("atp", 0)])
def test_a_methods_weights_lie_beside_the_models(data, tmp_path, capsys, name, layer):
    log, final = trained(data, tmp_path / "run", name, "--photon", "robust_probability=0", f"scheduler_layer={layer}")
    weights = load_file(final / f"scheduler_{name}.safetensors")
    model = load_model(final, dtype=torch.float32)
    torch.manual_seed(0)
    use_scheduler(model, name)
    fresh = model.model.language_model.scheduler.own_weights()
    assert weights.keys() == fresh.keys()
    assert log[-1]["kept"] == (1.0 if name == "atp" else pytest.approx(32 / TOKENS))  # a mask deletes nothing
    records, _ = evaluated(data, final, tmp_path / "answers", "--scheduler", name, "--keep-ratio", "0.05")
    assert {record["kept"] for record in records} == {0.05}
    with pytest.raises(SystemExit):
        options = ["--scheduler", name, "--scheduler-layer", str(layer)]
        evaluated(data, ROOT, tmp_path / "untrained", *options)
    assert f"{name} has weights of its own, and --model has no scheduler_{name}.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--scheduler", "random"], "--scheduler needs --keep-ratio"),
        (["--keep-ratio", "0.1"], "--keep-ratio is for --scheduler"),
        (["--scheduler", "random", "--keep-ratio", "0.1", "--lora"], "only whole models are trained"),
    ],
)
def test_contradictions_are_named(data, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        train_hf.main(["--model", str(ROOT), "--stage", "tune", "--train-data", str(data / "rows.jsonl"),
                       "--output-dir", str(tmp_path / "run"), *options])  # fmt: skip
    assert message in capsys.readouterr().err


def test_ask_takes_a_method(data, tmp_path, capsys):
    scan = next(data.glob("scans/*/scan0.nii.gz"))
    masks = {}
    for name in ("random", "grid"):
        file = tmp_path / f"{name}.png"
        ask.main([str(scan), "Is there a lesion in the liver?", "--scheduler", name, "--keep-ratio", "0.1", "--json",
                  "--overlay", str(file)])  # fmt: skip
        result = json.loads(capsys.readouterr().out)
        assert result["tokens_kept"] == round(0.1 * TOKENS)
        masks[name] = file.read_bytes()
    assert masks["random"] != masks["grid"]
    with pytest.raises(SystemExit):
        ask.main([str(scan), "Is there a lesion?", "--scheduler", "grid", "--dense"])
    assert "nothing for --scheduler to choose" in capsys.readouterr().err
