"""What each visual token holds, from label maps: a head that teaches the vision tower (`--token-labels`).

Answers alone teach the tower very little about where things are: a tower that starts from random weights stays at
chance for a long time. A linear head on the visual tokens learns each token's organs and lesions. It is dropped when
the model is saved.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from photon.training.losses.label_maps import PRESENT, LabelMapArguments, LabelMapLoss


@dataclass
class TokenLabelArguments(LabelMapArguments):
    token_labels: bool = field(
        default=False, metadata={"help": "learn each token's organs and lesions beside answers"}
    )
    token_labels_alone: bool = field(
        default=False, metadata={"help": "learn nothing else: the decoder is left out; one process"}
    )
    token_label_weight: float = field(default=1.0, metadata={"help": "weight of that loss"})


class TokenHead(nn.Module):
    """Linear head on the vision tower's output; hooked into its forward, so that it is wrapped and sharded with it.

    A token answers for each of its patches, since it must know where in it a lesion lies. A lesion is asked about only
    in the classes that a patch holds: elsewhere the question would teach nothing except how rare lesions are.

    Args: size of a visual token; patches of a token; classes of the label maps.
    """

    def __init__(self, size, patches, classes):
        super().__init__()
        self.shape, self.logits = (patches, 2, classes), []
        self.linear = nn.Linear(size, patches * 2 * classes)

    def attach(self, visual):
        visual.register_forward_hook(self._predict)

    def _predict(self, visual, args, output):
        if visual.training:
            logits = self.linear(output.pooler_output.to(self.linear.weight.dtype))
            self.logits.append(logits.float().unflatten(-1, self.shape))  # (T, P, 2, C)

    def losses(self, targets):
        """Organ cross-entropy over a scan's patches, and lesion binary cross-entropy over the organs in its patches.
        The logits since the last call are used up.

        Args: targets: a list, (T, P, 2, C) of `TokenLabels` for each of the first scans of the logits.
        Returns: (scans,); for an empty list one 0 that has a gradient.
        """
        logits = torch.cat(self.logits)
        self.logits = []
        if not targets:
            return 0.0 * logits.sum()[None]  # takes part in the reduction over ranks
        losses, begin = [], 0
        for target in targets:
            organ, lesion = logits[begin : begin + len(target)].unbind(-2)  # (T, P, C)
            begin += len(target)
            organs, lesions = target.unbind(-2)
            present = organs > PRESENT
            present[..., 0] = False  # background
            lesion = F.binary_cross_entropy_with_logits(lesion, (lesions > PRESENT).float(), reduction="none")
            organ = -(organs * organ.log_softmax(-1)).sum(-1).mean()
            losses.append(organ + (lesion * present).sum() / present.sum().clamp(min=1))
        return torch.stack(losses)


class TokenLabelLoss(LabelMapLoss):
    """The mean of `TokenHead.losses` over a row's scans; a perturbed scan counts 0."""

    name, weight, Arguments = "token_loss", "token_label_weight", TokenLabelArguments
    needs_decoder = False
    module_name = "token_head"

    @classmethod
    def used(cls, arguments):
        return arguments.token_labels

    def __init__(self, arguments, model, processor, cache_dir=None):
        super().__init__(arguments, model, processor, cache_dir)
        patches, size = processor.image_processor.merge_size**2, model.config.text_config.hidden_size
        self.module = TokenHead(size, patches, arguments.token_label_classes)
        self.module.attach(model.model.visual)

    def __call__(self, batch):
        losses = self.module.losses(batch.scan_targets("token_targets"))  # (clean volumes,), or one 0
        rows = []
        for volumes in batch.volumes_of_rows():
            clean = [losses[volume] for volume in volumes if volume < len(batch.clean_volumes)]
            rows.append(sum(clean, 0.0 * losses.sum()) / max(len(volumes), 1))
        return torch.stack(rows)
