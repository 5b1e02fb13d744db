"""Who holds memory at the peak of a training step.

Every tensor that an operation makes is followed from its birth to its end, with the module that ran, in which
direction, and by which operation it was made. Gradients of weights, and parts of them, are told apart by their shape;
what remains at the peak is activations. Scratch space inside an operation is not seen.
"""

import re
import weakref
from collections import Counter
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


@dataclass
class Block:
    """A piece of memory."""

    size: int
    module: str
    way: str
    operation: str
    gradient: bool = False


class Holders(TorchDispatchMode):
    """Follows memory while it is active, and the modules of a model that run meanwhile.

    `peak` is the most bytes at a time beside gradients of weights; `table` tells who held them then.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.way = model, "forward"
        self.weights = {tuple(sorted(p.shape)) for p in model.parameters() if p.requires_grad}
        self.blocks, self.live, self.events, self.running, self.hooks = [], {}, [], ["step"], []

    def __enter__(self):
        for name, module in self.model.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, name=name or "model": self.running.append(name))
            leave = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
            self.hooks += [enter, leave]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _key(leaf) not in self.live and _key(leaf) not in given:
                self._born(leaf, str(function.overloadpacket).removeprefix("aten."))
        return result

    def _born(self, tensor, operation):
        storage, number = tensor.untyped_storage(), len(self.blocks)
        # with several uses of a weight, as of tied embeddings, a part of its gradient waits for the others
        part = self.way == "back" and tuple(sorted(tensor.shape)) in self.weights
        self.blocks.append(Block(storage.nbytes(), self.running[-1], self.way, operation, part))
        self.live[key := storage._cdata] = number
        self.events.append((number, 1))
        weakref.finalize(storage, self._died, key, number)

    def _died(self, key, number):
        if self.live.get(key) == number:
            del self.live[key]
            self.events.append((number, -1))

    def _leave(self):
        if len(self.running) > 1:
            self.running.pop()

    def _at_peak(self):
        """The most bytes at a time, and the blocks that were live then."""
        now = most = 0
        place = 0
        for i, (number, sign) in enumerate(self.events):
            now += 0 if self.blocks[number].gradient else sign * self.blocks[number].size
            if now > most:
                most, place = now, i + 1
        live = Counter()
        for number, sign in self.events[:place]:
            live[number] += sign
        return most, [self.blocks[n] for n, count in live.items() if count and not self.blocks[n].gradient]

    @property
    def peak(self):
        return self._at_peak()[0]

    def table(self, rows=8):
        """The largest holders at the peak, and the rest, as rows of a table."""
        sizes, counts = Counter(), Counter()
        for block in self._at_peak()[1]:
            holder = re.sub(r"\.\d+(?=\.|$)", ".*", block.module), block.way, block.operation
            sizes[holder] += block.size
            counts[holder] += 1
        table = [
            {"made in": module, "way": way, "by": operation, "tensors": counts[module, way, operation],
             "MiB": size / MIB}
            for (module, way, operation), size in sizes.most_common(rows)
        ]  # fmt: skip
        rest = sizes.total() / MIB - sum(row["MiB"] for row in table)
        others = counts.total() - sum(row["tensors"] for row in table)
        return [*table, {"made in": "all others", "way": "", "by": "", "tensors": others, "MiB": rest}]


def _key(tensor):
    return tensor.untyped_storage()._cdata
