"""--cache-features: a frozen tower's output comes from disk, and training is the same."""

import pytest
import torch
from safetensors.torch import load_file
from test_training import arguments, assert_equal_logs, data, logged, model  # noqa: F401 - fixtures

import train_hf
from photon.processing_photon import PhotonVolumeProcessor

FROZEN = ["--parts", "decoder", "scheduler", "--photon", "robust_probability=0", "--max-grad-norm", "0"]


@pytest.fixture
def read(monkeypatch):
    """Counts the scans that are read."""
    counted, prepare = [], PhotonVolumeProcessor.prepare
    monkeypatch.setattr(PhotonVolumeProcessor, "prepare", lambda *args: counted.append(1) or prepare(*args))
    return counted


@pytest.mark.parametrize("more", [[], ["--stage", "dense", "--pack-questions"]], ids=["tune", "packed"])
def test_training_from_cached_features(arguments, data, read, tmp_path, more):  # noqa: F811
    """Rows with one scan, with two and with none; epochs in which some scans are on disk, and all."""
    parts = ["--parts", "decoder", *FROZEN[3:]] if more else FROZEN
    command = [*parts, *more, "--cache-dir", str(tmp_path / "cache"), "--optim", "sgd"]
    runs = {}
    for name, option in (("plain", []), ("first", ["--cache-features"]), ("again", ["--cache-features"])):
        read.clear()
        trainer = train_hf.train(arguments(name, *command, *option, steps=5))
        runs[name] = logged(trainer), {k: v.detach() for k, v in trainer.model.named_parameters()}, len(read)
    assert runs["plain"][2] > runs["first"][2] >= 3 and runs["again"][2] == 0  # a batch is read ahead
    for name in ("first", "again"):
        assert_equal_logs(runs[name][0], runs["plain"][0])
        for weight, value in runs["plain"][1].items():
            torch.testing.assert_close(runs[name][1][weight], value, rtol=1e-5, atol=1e-7, msg=weight)
    files = sorted((tmp_path / "cache" / "features").iterdir())
    assert len(files) == 3 and all(len(load_file(file)["tokens"]) for file in files)
    files[0].write_bytes(b"cut short")
    read.clear()
    train_hf.train(arguments("repaired", *command, "--cache-features", steps=5))
    assert 1 <= len(read) <= 2 and len(load_file(files[0])["tokens"])
    read.clear()
    train_hf.train(arguments("window", *command, "--cache-features", "--vision-patches", "16", steps=2))
    assert not read  # parts of the patches are alike in result


def test_a_method_gets_the_places_of_cached_tokens(arguments, tmp_path):  # noqa: F811
    """Rows with one scan, with two and with none; pooling needs each token's scan, depth, row and column."""
    command = [*FROZEN, "--scheduler", "pooling", "--keep-ratio", "0.4", "--cache-dir", str(tmp_path / "cache")]
    plain = train_hf.train(arguments("plain", *command, steps=3))
    cached = train_hf.train(arguments("cached", *command, "--cache-features", steps=3))
    assert_equal_logs(logged(cached), logged(plain))


def test_another_tower_finds_nothing(arguments, model, read, tmp_path):  # noqa: F811
    from photon.loading import load
    from photon.training.memory import FeatureCache

    processor, photon = load(str(model), device="cpu", dtype="float32")
    photon.requires_grad_(False)
    key = FeatureCache(tmp_path, processor, photon).load({"path": str(model / "config.json")})[0]
    with torch.no_grad():
        photon.model.visual.blocks[0].mlp.up_proj.bias[0] += 1e-3
    assert FeatureCache(tmp_path, processor, photon).load({"path": str(model / "config.json")})[0] != key
    array = torch.zeros(4, 4, 4).numpy(), torch.eye(4).numpy()
    assert FeatureCache(tmp_path, processor, photon).load({"volume": array}) == (None, None, None)


def test_what_cannot_be_cached_is_refused(arguments, capsys):  # noqa: F811
    with pytest.raises(ValueError, match="the tower trains"):
        train_hf.train(arguments("a", "--cache-features", "--photon", "robust_probability=0"))
    with pytest.raises(ValueError, match="robust_probability=0"):
        train_hf.train(arguments("b", "--cache-features", *FROZEN[:3]))
    with pytest.raises(ValueError, match="vision_attention, vision_keys"):
        train_hf.train(arguments("v", "--cache-features", *FROZEN, "--scheduler", "visionzip", "--keep-ratio", "0.4"))
    command = arguments("c", "--cache-features")
    place = command.index("--cache-dir")
    with pytest.raises(SystemExit):
        train_hf.train(command[:place] + command[place + 2 :])
    assert "--cache-features needs --cache-dir" in capsys.readouterr().err
