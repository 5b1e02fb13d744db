"""The type of a model's weights on this machine: what its processor computes fast, and what its memory holds."""

from pathlib import Path

import psutil
import torch
from transformers import AutoModelForImageTextToText

SMALL = 2 * 2**30  # bytes in float32; a smaller model stays in float32, so that it answers alike on every machine
HEADROOM = 1.25  # memory beside the weights: a scan, its tokens, one layer's activations


def choose_dtype(config, device):
    """The name of a type, and why; "auto" (that of the checkpoint) on a GPU.

    On a CPU small models are float32. Large ones are bfloat16 where the processor computes with it, or where float32
    would not fit into the free memory; elsewhere float32, which is faster there.
    """
    if torch.device(device).type != "cpu":
        return "auto", "as the checkpoint"
    size = 4 * parameter_count(config)
    if size < SMALL:
        return "float32", "a small model"
    if computes_bfloat16():
        return "bfloat16", "this processor computes with it"
    if size * HEADROOM > free_memory():
        return "bfloat16", f"float32 needs {size * HEADROOM / 2**30:.0f} GiB, more than the free memory"
    return "float32", "this processor does not compute with bfloat16"


def parameter_count(config):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    return sum(parameter.numel() for parameter in model.parameters())


def computes_bfloat16():
    """Whether the processor has instructions for bfloat16 (AVX-512 BF16, AMX, Arm BF16)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(present for name, present in capabilities.items() if name.endswith("bf16"))


def free_memory(groups="/sys/fs/cgroup"):
    """Bytes that this process may still take: of the machine, or of its container where that has a limit."""
    free = psutil.virtual_memory().available
    limit, used = (Path(groups, name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdecimal():
        free = min(free, int(text) - int(used.read_text()))
    return free
