"""What a new user meets: the type of the weights, the end of an answer, data from `datasets`, peers' packages."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from datasets import Dataset, Nifti
from transformers import GenerationConfig, pipeline

import convert_photon
from conftest import FIXTURE, ROOT, tiny_config
from photon import asking, precision
from photon.loading import complete_generation_config, load
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.pipeline_photon import finish_reason

TORCH = torch.__version__.partition("+")[0]
TORCHVISION = f"0.{int(TORCH.split('.')[1]) + 15}.0"
QUESTION = "Is there a lesion in the liver?"


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    array = np.random.default_rng(0).normal(0, 60, (21, 27, 33)).astype(np.int16)
    array[:, :3] = array[:, :, :4] = -1000
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((9.0, 8.0, 11.0))
    path = tmp_path_factory.mktemp("scan") / "ct.nii.gz"
    sitk.WriteImage(image, str(path))
    return str(path)


@pytest.fixture(scope="module")
def pipe():
    return pipeline("volume-question-answering", model=str(ROOT), trust_remote_code=True)


# === The type of the weights =========================================================================================


@pytest.mark.parametrize(
    "parameters, bfloat16, free, expected",
    [
        (4e6, True, 64, "float32"),  # small: alike on every machine
        (3.8e9, True, 64, "bfloat16"),
        (3.8e9, False, 64, "float32"),  # faster there
        (3.8e9, False, 16, "bfloat16"),  # 3.8e9 numbers of 4 bytes are 14.2 GiB, and a scan needs some too
        (3.8e9, False, 10, "bfloat16"),
    ],
)
def test_the_type_follows_from_size_processor_and_memory(monkeypatch, parameters, bfloat16, free, expected):
    monkeypatch.setattr(precision, "parameter_count", lambda config: parameters)
    monkeypatch.setattr(precision, "computes_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(precision, "free_memory", lambda: free * 2**30)
    assert precision.choose_dtype(None, "cpu")[0] == expected
    assert precision.choose_dtype(None, "cuda")[0] == "auto"


def test_parameters_and_memory_are_counted(tmp_path, monkeypatch):
    model = PhotonForConditionalGeneration(tiny_config())
    assert precision.parameter_count(model.config) == sum(p.numel() for p in model.parameters())
    machine = precision.free_memory(tmp_path)
    assert 2**26 < machine < 2**46
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert precision.free_memory(tmp_path) == pytest.approx(machine, rel=0.5)
    (tmp_path / "memory.max").write_text("5000000\n")  # a container with little memory on a machine with much
    assert precision.free_memory(tmp_path) == 4_000_000


def test_a_large_model_is_loaded_as_chosen_and_it_is_said(monkeypatch, scan):
    monkeypatch.setattr(precision, "SMALL", 0)
    monkeypatch.setattr(precision, "computes_bfloat16", lambda: True)
    processor, model = load(ROOT, device="cpu")
    assert model.dtype == torch.bfloat16
    result, *_ = asking.ask(processor, model, [scan], QUESTION, max_new_tokens=2)
    assert result["dtype"] == "bfloat16" and "; bfloat16" in asking.describe(result)
    assert load(ROOT, device="cpu", dtype="float32")[1].dtype == torch.float32


# === The end of an answer ============================================================================================


def test_a_cut_answer_is_marked(pipe, scan):
    processor, model = load(ROOT)
    complete, *_ = asking.ask(processor, model, [scan], QUESTION)
    assert complete["finish_reason"] == "stop" and "Cut at" not in asking.describe(complete)
    count = complete["answer_tokens"]
    cut, *_ = asking.ask(processor, model, [scan], QUESTION, max_new_tokens=count - 1)
    assert cut["finish_reason"] == "length" and complete["answer"].startswith(cut["answer"])
    assert f"Cut at {count - 1} tokens; --max-new-tokens gives more." in asking.describe(cut)
    for limit, reason in ((count, "stop"), (count - 1, "length")):
        assert pipe(scan, QUESTION, max_new_tokens=limit)["finish_reason"] == reason
    unended = pipe(scan, QUESTION, max_new_tokens=count, eos_token_id=[1, 2])
    asked, *_ = asking.ask(processor, model, [scan], QUESTION, max_new_tokens=count, eos_token_id=[1, 2])
    assert unended["finish_reason"] == asked["finish_reason"] == "length"
    assert finish_reason(torch.tensor([5, 7]), 7) == finish_reason([5, 7], [7, 8]) == "stop"
    assert finish_reason([], 7) == finish_reason([7, 5], 7) == finish_reason([7], None) == "length"


def test_folders_carry_a_limit_and_keep_the_sources_settings(tmp_path):
    source = FIXTURE / "official_checkpoint"
    convert_photon.main(["--official", str(source), "--output", str(tmp_path / "photon")])
    settings = json.loads((tmp_path / "photon" / "generation_config.json").read_text())
    assert settings["max_new_tokens"] == 256
    model = PhotonForConditionalGeneration(tiny_config())
    model.generation_config = GenerationConfig(max_new_tokens=64, do_sample=True, temperature=0.2)
    complete_generation_config(model)
    assert model.generation_config.max_new_tokens == 64 and model.generation_config.temperature == 0.2
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.2)
    complete_generation_config(model)
    model.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (settings["max_new_tokens"], settings["temperature"], settings["do_sample"]) == (256, 0.2, True)


# === Packages of peers ===============================================================================================


@pytest.mark.parametrize(
    "version, needs, code, refused",
    [
        ("0.21.0", "2.6.0", "raise RuntimeError('operator torchvision::nms does not exist')", True),
        (
            TORCHVISION,
            TORCH,
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "+" in torch.__version__,
        ),
        ("0.21.0", "2.6.0", "", False),  # of another release, but it works
    ],
)
def test_a_torchvision_of_another_torch_is_named(tmp_path, version, needs, code, refused):
    """A package of that name which fails as an unmatched one does; of PyPI beside a torch for CPUs, too."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(code)
    (tmp_path / f"torchvision-{version}.dist-info").mkdir()
    (tmp_path / f"torchvision-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torchvision\nVersion: {version}\nRequires-Dist: torch=={needs}\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    code = "import photon"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8")
    assert (done.returncode != 0) == refused, done.stderr
    if refused:
        line = done.stderr.strip().splitlines()[-1]
        minor = int(TORCH.split(".")[1])
        assert f"torchvision {version} does not belong to torch {torch.__version__}" in line
        assert f"pip install torchvision==0.{minor + 15}.*" in line


def test_requirements_name_the_matching_torchvision():
    pins = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    makefile = re.search(r"TORCH_VERSION = ([\d.]+)", (ROOT / "Makefile").read_text())[1]
    named = re.findall(
        r"torch ([\d.]+).*: pip install torchvision==0\.(\d+)", (ROOT / "requirements-train.txt").read_text()
    )
    assert len(named) == 2 and pins.get("torch", makefile) == makefile
    for release, minor in named:
        assert release == makefile and int(minor) == int(release.split(".")[1]) + 15


# === Data of `datasets` ==============================================================================================


def test_pipelines_take_sets_of_datasets(pipe, scan):
    """In memory and streamed; a decoded `Nifti` feature; chats with the keys that Arrow fills in."""
    rows = [{"volume": scan, "question": text, "patient": i} for i, text in enumerate((QUESTION, "How many kidneys?"))]
    expected = pipe([{"volume": row["volume"], "question": row["question"]} for row in rows], max_new_tokens=4)
    held = Dataset.from_list(rows)
    assert list(pipe(held, max_new_tokens=4)) == expected
    assert list(pipe(held.to_iterable_dataset(), max_new_tokens=4)) == expected
    decoded = held.cast_column("volume", Nifti())
    assert not isinstance(decoded[0]["volume"], str)
    assert list(pipe(decoded, max_new_tokens=4)) == expected
    paths = held.cast_column("volume", Nifti(decode=False))
    assert paths[0]["volume"] == {"bytes": None, "path": scan}
    assert list(pipe(paths, max_new_tokens=4)) == expected
    for other in (held, held.to_iterable_dataset()):
        with pytest.raises(ValueError, match="has the columns .*image.*; expected volume and question. Rename them"):
            list(pipe(other.rename_column("volume", "image")))
    with pytest.raises(ValueError, match="Got a dict of image, question; expected a scan and a question"):
        pipe({"image": scan, "question": QUESTION})
    chats = [
        {"messages": [{"role": "user", "content": [{"type": "volume", "path": scan}, {"type": "text", "text": text}]}]}
        for text in (row["question"] for row in rows)
    ]
    stock = pipeline("image-text-to-text", model=str(ROOT), trust_remote_code=True)
    for row, answer in zip(Dataset.from_list(chats), expected, strict=True):
        reply = stock(text=row["messages"], max_new_tokens=4, return_full_text=False)
        assert reply[0]["generated_text"].strip() == answer["answer"]
