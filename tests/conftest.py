"""Shared by the tests: the classes as `trust_remote_code` loads them, a tiny random model, prompts about random scans.

Sizes differ on every axis, so that a swapped axis fails. No network, no GPU.
"""

import atexit
import json
import locale
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands: other processes may use the same cores
# a folder for each process: code is copied there, and several processes must not copy at once
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="photon-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

import numpy as np
import pytest
import torch
from transformers import pipeline

from photon import loading  # noqa: E402, F401 - the Auto classes return the classes of this repository
from photon.configuration_photon import PhotonConfig
from photon.conversion import RELEASE
from photon.modeling_photon import PhotonForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("PHOTON_TEST_DATA", ROOT.parent / "shared" / "data"))
SETTINGS = json.loads((ROOT / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
TOKENS = math.prod(n // SETTINGS["patch_size"] for n in SETTINGS["grid"]) // 4  # of a scan in the root's model
FIXTURE = Path(__file__).resolve().parent / "fixtures" / "official_a"
PAD, IM_START, IM_END, V_START, V_END, IMAGE, VIDEO, USER, ASSISTANT, NEWLINE, FIRST_WORD = range(11)
VOCABULARY = 96


def real(name):
    """A file of the real test data, or a skip."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"real scans are not here; set PHOTON_TEST_DATA to a folder with {name}")
    return path


def tiny_config(layers=4, **fields):
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": IM_END,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "out_hidden_size": 32,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    ids = {
        "im_start_token_id": IM_START, "im_end_token_id": IM_END, "vision_start_token_id": V_START,
        "vision_end_token_id": V_END, "image_token_id": IMAGE, "video_token_id": VIDEO, "user_token_id": USER,
    }  # fmt: skip
    # many rows keep unlike numbers of tokens by these; other tests set what they are about
    scheduler = RELEASE | {"surrogate": "taylor", "tie_word_embeddings": False}
    return PhotonConfig(text_config=text, vision_config=vision, **(ids | scheduler | fields))


def tiny_model(seed=0, dtype=torch.float32, attention="sdpa", **fields):
    """A random model whose threshold lies amid its saliency, so that each row keeps another number of tokens."""
    config = tiny_config(**fields)
    config._attn_implementation = attention
    generator = torch.Generator().manual_seed(seed)
    model = PhotonForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 2.0 if "predictor" in name else 1.0
                parameter.normal_(0, scale / parameter.shape[1:].numel() ** 0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
        model.model.language_model.scheduler.predictor.mlp[-1].bias.fill_(0.0)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # always the full length, so that lengths compare
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]  # a random model may write them, and uncached they count
    return model.to(dtype).eval()


def prompt(question, grids, answer=(), system=(11, 12), words_between=()):
    """Ids of one chat: system turn, a user turn with the scans and then the question, the answer's opening."""
    ids = [IM_START, 10, NEWLINE, *system, IM_END, NEWLINE, IM_START, USER, NEWLINE]
    for t, h, w in grids:
        ids += [*words_between, V_START, *[VIDEO] * (t * h * w // 4), V_END]
    ids += [*question, IM_END, NEWLINE, IM_START, ASSISTANT, NEWLINE]
    return ids, list(answer)


def collate(rows, seed=0, dtype=torch.float32):
    """Rows of (ids, answer, grids) -> model inputs, padded on the left. Scans are random, by row and seed."""
    length = max(len(ids) + len(answer) for ids, answer, _ in rows)
    input_ids = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    patches, grids = [], []
    for row, (ids, answer, scans) in enumerate(rows):
        whole = torch.tensor(ids + answer)
        input_ids[row, length - len(whole) :] = whole
        attention_mask[row, length - len(whole) :] = 1
        if answer:
            labels[row, length - len(answer) :] = torch.tensor(answer)
        for number, (t, h, w) in enumerate(scans):
            generator = torch.Generator().manual_seed(1000 * seed + 10 * sum(ids) + number)
            patches.append(torch.randn(t * h * w, 14**3, generator=generator, dtype=dtype))
            grids.append((t, h, w))
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == VIDEO).int() * 2,
    }
    if patches:
        inputs |= {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
    if (labels != -100).any():
        inputs["labels"] = labels
    return inputs


def three_rows(answers=False):
    """Other scans, question lengths, grids; the second has two scans."""
    specs = [
        ((20, 21, 22, 23, 24), [(2, 6, 4)], (30, 31, 32)),
        ((40, 41), [(3, 4, 6), (1, 6, 8)], (33, 34)),
        (tuple(range(50, 61)), [(5, 8, 4)], (35, 36, 37, 38, 39)),
    ]
    return [(*prompt(q, grids, answer if answers else ()), grids) for q, grids, answer in specs]


def text_row(answer=()):
    return (*prompt((70, 71, 72), [], answer), [])


def run_fresh(code, *args, cwd=None, home=None):
    """Run Python code in a new process that does not see this repository, with an empty HF_HOME."""
    with tempfile.TemporaryDirectory() as empty:
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_MODULES_CACHE")}
        env |= {"HF_HOME": home or empty, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            cwd=cwd or empty, env=env, capture_output=True, encoding="utf-8", errors="replace", timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


@pytest.fixture(autouse=True)
def same_locale():
    """GDCM leaves the locale "C" when a test writes DICOM, with which Python reads text files as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(scope="module")
def scans():
    """Two volumes as the pipeline takes them in memory."""
    generator, made = np.random.default_rng(0), []
    for size in ((33, 27, 21), (30, 28, 22)):
        array = generator.normal(0, 60, size).astype(np.int16)
        array[:4] = -1000
        made.append((array, np.diag([11.0, 8.0, 9.0, 1.0])))
    return made


@pytest.fixture(scope="module")
def pipe():
    """The pipeline of the repository's model, in float32."""
    return pipeline("volume-question-answering", model=str(ROOT), trust_remote_code=True, dtype=torch.float32)
