"""What a loss of training is, and what it sees of a batch."""

from dataclasses import dataclass, field

import torch

LOSSES = {}  # {name in the log: class}, in the order in which `photon/training/losses/__init__.py` imports them


@dataclass
class LossBatch:
    """What a loss may use of one batch: B rows with P scans in their prompts, V visual tokens a row at most.

    Args:
        inputs: arguments of the model: `labels` (B, S), `volume_index` (P,), `video_grid_thw` (P, 3), ...; the last
            two are absent where no row has a scan.
        outputs: of the model: `keep_prob` (B, V), `visual_count` (B,), ...; `logits` where a loss needs them; `None`
            without the decoder.
        targets: what the losses' `add_targets` took from the rows.
        objectives: list of B `Objective`.
        volume_count: list of B ints, the scans of each row.
        clean_volumes: numbers, among the volumes that the collator gave, of those that no perturbation has changed.
            In `volume_index` they come first, in this order; the number of a perturbed volume is higher.
    """

    inputs: dict
    outputs: object
    objectives: list
    volume_count: list
    clean_volumes: list
    targets: dict = field(default_factory=dict)

    @property
    def device(self):
        return self.inputs["input_ids"].device

    def volumes_of_rows(self):
        """For each row the list of the numbers of its volumes; a number from `len(clean_volumes)` on is perturbed."""
        if "volume_index" not in self.inputs:
            return [[] for _ in self.volume_count]
        return [part.tolist() for part in self.inputs["volume_index"].split(self.volume_count)]

    def scan_targets(self, name):
        """The targets of the clean volumes, from a list with one entry for each volume that the collator gave."""
        targets = self.targets.get(name)
        return [] if targets is None else [targets[volume] for volume in self.clean_volumes]


class Loss:
    """One loss beside the model's own. See `photon/training/losses/__init__.py` for how to add one.

    Class attributes:
        name: in the log.
        weight: name of the argument with its weight.
        Arguments: dataclass of its arguments, which become options of `train_hf.py`.
        columns: {name: feature of `datasets`} of the rows that it needs beyond those that every row has.
        needs_logits: whether it looks at the outputs' `logits`, which are left out otherwise.
        needs_decoder: False for a loss that needs only the vision tower (`--token-labels-alone`).
    """

    name = weight = Arguments = None
    columns = {}
    needs_logits, needs_decoder = False, True
    module = None  # an `nn.Module` that learns with the model, under the name `module_name`, and is not saved with it
    module_name = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.name is None:  # a base of other losses
            return
        if cls.name in LOSSES:
            raise ValueError(f"There are two losses of the name {cls.name!r}.")
        LOSSES[cls.name] = cls

    @classmethod
    def used(cls, arguments):
        """Whether the arguments ask for this loss."""
        return getattr(arguments, cls.weight) > 0

    def __init__(self, arguments, model, processor, cache_dir=None):
        self.arguments, self.factor = arguments, getattr(arguments, self.weight)

    def needs_label_maps(self, row):
        """Whether each scan of this row must have a label map (`labels`)."""
        return False

    def check_rows(self, rows):
        """Raises `RowError` where the training rows (a `Dataset`) lack what this loss needs."""

    def add_targets(self, rows, batch, targets):
        """In a worker of the data loader: adds to the dict `targets` what the loss needs of the rows.

        Args: rows: list of B rows; batch: of the collator.
        """

    def __call__(self, batch):
        """(B,) loss of each row of a `LossBatch`. The trainer weighs a row by its answer tokens and adds them up."""
        raise NotImplementedError


def row_shares(labels, num_items):
    """(B,) weight of each row: its answer tokens, as a share of the step's. labels (B, S)."""
    counts = (labels[:, 1:] != -100).sum(-1)
    return (counts / (counts.sum().clamp(min=1) if num_items is None else num_items)).to(torch.float32)
