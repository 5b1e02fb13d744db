"""Figures of the steps since the last log, added up on the device and gathered over ranks."""

import sys
import time

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None

SUMS = ("tokens", "rows", "robust_rows", "flip_rows", "kept_sum", "kept_rows", "threshold_sum")
MINIMA, MAXIMA = ("kept_min",), ("kept_max", "peak_gib")


class Figures:
    """Sums, minima and maxima by name. losses: names of the losses, which are sums too."""

    def __init__(self, losses):
        self.kinds = (
            ((*losses, *SUMS), 0.0, torch.add, torch.sum),
            (MINIMA, torch.inf, torch.minimum, torch.amin),
            (MAXIMA, -torch.inf, torch.maximum, torch.amax),
        )
        # all names from the start: a rank without scans must gather the same list
        self.values = {name: torch.tensor(start) for names, start, *_ in self.kinds for name in names}
        self.clock = time.perf_counter()

    def add(self, **figures):
        for names, _, join, _ in self.kinds:
            for name in names:
                if name in figures:
                    value = torch.as_tensor(figures[name], dtype=torch.float32).detach()
                    self.values[name] = join(self.values[name].to(value.device), value)

    def gathered(self, accelerator):
        """{name: float} over all ranks."""
        mine = torch.stack([value.cpu() for value in self.values.values()]).to(accelerator.device)
        table = dict(zip(self.values, accelerator.gather(mine[None]).T, strict=True))  # (ranks,) each
        return {name: float(over(table[name], 0)) for names, _, _, over in self.kinds for name in names}


def peak_memory(device):
    """GiB, the most that this process has held: of the GPU's memory on a GPU, otherwise of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
