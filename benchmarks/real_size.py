"""A model of real size on this machine: built, converted, asked, trained one LoRA step. Peak memory and seconds.

    python benchmarks/real_size.py --preset 3b --json benchmarks/results/real_size_3b.json      # make real-size
    python benchmarks/real_size.py --preset 7b

The weights are random, in the layout of the authors' release and in bfloat16. So times and memory are those of the
released model, and the answers mean nothing. The tokenizer is the tiny model's, whose special tokens are Qwen's. Each
command is a process of its own; its peak is of its resident memory, mapped files included. A command that needs more
memory than is free is left out, and the table says so. On disk 3b takes 16 GB, 7b 36 GB.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from safetensors.torch import save_file

from common import ROOT, arguments, report
from photon.configuration_photon import PhotonConfig
from photon.conversion import RELEASE
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.precision import free_memory

SHARD = 2 * 2**30  # bytes of a file of weights, at most
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
QUESTION = "Is there a lesion in the liver?"


def release_name(name, layer):
    """The name of a weight in the release's checkpoints."""
    name = name.replace("model.visual.patch_embed.", "visual.vision_patch_embed.").replace("model.visual.", "visual.")
    name = name.replace("model.language_model.scheduler.", f"model.layers.{layer}.atp.")
    return name.replace("model.language_model.", "model.")


def write_release(folder, fields):
    """A checkpoint of the release's layout with random weights. Returns how many parameters it has."""
    config = PhotonConfig(**(fields | RELEASE))
    with torch.device("meta"):
        model = PhotonForConditionalGeneration(config)
    layout = {key: value for key, value in fields.items() if key not in ("model_type", "scheduler_layer")}
    vision = layout["vision_config"] | {"in_chans": 3}
    text = {key: value for key, value in layout.pop("text_config").items() if key != "rope_parameters"}
    text |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    content = {"model_type": "qwen2_5_vl", **layout, **text, "vision_config": vision, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    for name in TOKENIZER:
        shutil.copy(ROOT / name, folder)
    shard, size, index, generator = {}, 0, {}, torch.Generator().manual_seed(0)

    def write_shard():
        file = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))

    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, weight in model.state_dict().items():
        if name in tied:
            continue
        if size and size + 2 * weight.numel() > SHARD:
            write_shard()
            shard, size = {}, 0
        value = torch.ones(weight.shape, dtype=torch.bfloat16)
        if weight.ndim > 1:
            spread = weight.shape[1:].numel() ** -0.5
            value = torch.empty(weight.shape, dtype=torch.bfloat16).normal_(0, spread, generator=generator)
        elif name.endswith("bias"):
            value.zero_()
        shard[release_name(name, config.scheduler_layer)] = value
        size += 2 * weight.numel()
    write_shard()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(weight.numel() for name, weight in model.state_dict().items() if name not in tied)


def write_data(folder):
    """A scan of usual size, and one row of training."""
    z, y, x = np.mgrid[:160, :256, :256].astype(np.float32)
    body = ((y - 128) / 90) ** 2 + ((x - 128) / 110) ** 2 < 1
    noise = np.random.default_rng(0).normal(40, 20, body.shape)
    image = sitk.GetImageFromArray(np.where(body, noise, -1000).astype(np.int16))
    image.SetSpacing((1.5, 1.5, 2.0))
    sitk.WriteImage(image, str(folder / "ct.nii.gz"))
    messages = [
        {"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]
    (folder / "train.jsonl").write_text(json.dumps({"volumes": ["ct.nii.gz"], "messages": messages}) + "\n")


def run(command):
    """Seconds, peak GiB and output of a command in a process of its own."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        text = out.read().decode(errors="replace")
    if status:
        raise RuntimeError(f"{command[0]} failed:\n{text[-3000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20, text  # ru_maxrss counts KiB on Linux


def measure(folder, fields):
    """Rows of the table; `folder` is empty."""
    release, converted = folder / "release", folder / "photon"
    release.mkdir()
    start = time.perf_counter()
    parameters = write_release(release, fields)
    write_data(folder)
    size = 2 * parameters / 2**30  # GiB in bfloat16
    rows = [{"command": "build (random weights)", "s": time.perf_counter() - start, "peak GiB": size, "note": ""}]
    ask = ["ask.py", folder / "ct.nii.gz", QUESTION, "--model", converted, "--device", "cpu", "--max-new-tokens", 20]
    train = [
        "train_hf.py", "--model", converted, "--stage", "tune", "--train-data", folder / "train.jsonl", "--lora",
        "--lora-rank", 16, "--bf16", "--use-cpu", "--gradient-checkpointing", "--max-steps", 1, "--hard-start", 0,
        "--save-strategy", "no", "--report-to", "none",
    ]  # fmt: skip
    steps = {  # name: command, memory that it needs as a multiple of the weights in bfloat16
        "convert_photon.py": (["convert_photon.py", "--official", release, "--output", converted], 1.1),
        "ask.py": (ask, 1.3),
        "ask.py --json": ([*ask, "--json"], 1.3),
        "ask.py --dtype float32": ([*ask, "--dtype", "float32"], 2.9),
        "train_hf.py --lora, 1 step, adapters": (
            [*train, "--merge-lora", "false", "--output-dir", folder / "adapters"],
            1.8,
        ),
        "train_hf.py --lora, 1 step, merged": ([*train, "--output-dir", folder / "merged"], 2.9),
    }
    for name, (command, factor) in steps.items():
        free = free_memory() / 2**30
        if factor * size > free:
            note = f"left out: needs {factor * size:.0f} GiB, {free:.0f} are free"
            rows.append({"command": name, "s": float("nan"), "peak GiB": float("nan"), "note": note})
            continue
        seconds, peak, text = run(command)
        note = ""
        if "--json" in command:
            result = json.loads(text.strip().splitlines()[-1])
            note = f"{result['dtype']}, {result['answer_tokens']} tokens, ends by {result['finish_reason']}"
        rows.append({"command": name, "s": seconds, "peak GiB": peak, "note": note})
    return rows


def main():
    args = arguments(
        __doc__,
        ["3b", "7b"],
        folder={"type": Path, "metavar": "DIR", "help": "build there (default: a temporary folder)"},
    )
    fields = json.loads((ROOT / "configs" / f"photon_{args.preset}.json").read_text())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(Path(folder), fields)
    seconds = {row["command"]: row["s"] for row in rows}
    peaks = {row["command"]: row["peak GiB"] for row in rows}
    ratios = {
        "float32_over_default_seconds": seconds["ask.py --dtype float32"] / seconds["ask.py"],
        "float32_over_default_memory": peaks["ask.py --dtype float32"] / peaks["ask.py"],
    }
    ratios = {name: value for name, value in ratios.items() if value == value}
    rows = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    report(torch.device("cpu"), rows, ratios, args.json, preset=args.preset)


if __name__ == "__main__":
    main()
