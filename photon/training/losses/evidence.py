"""Keeps what a question is about, from label maps: teaches the scheduler (`--evidence-weight`).

A row's `evidence` names the labels that its question is about. The tokens that hold them are to be kept, all others
are to be dropped. Rows without `evidence` need no label map and learn from their answers alone.
"""

import warnings
from dataclasses import dataclass, field

import torch
from datasets import List, Value

from photon.objectives_photon import Objective
from photon.rows import RowError
from photon.training.losses.label_maps import PRESENT, LabelMapArguments, LabelMapLoss


@dataclass
class EvidenceArguments(LabelMapArguments):
    evidence_weight: float = field(
        default=0.0,
        metadata={"help": "weight of learning to keep the tokens with a row's `evidence` labels; stage tune"},
    )


class EvidenceLoss(LabelMapLoss):
    """`evidence_losses` of the rows that answer; robust and flipped rows count 0."""

    name, weight, Arguments = "evidence_loss", "evidence_weight", EvidenceArguments
    columns = {"evidence": List(Value("int64"))}

    def needs_label_maps(self, row):
        return bool(row["evidence"])

    def check_rows(self, rows):
        highest = max(max(labels, default=0) for labels in rows["evidence"])
        classes = self.arguments.token_label_classes
        if not 0 < highest < classes:
            raise RowError(
                f"--evidence-weight: the highest label in the training rows' 'evidence' is {highest or 'none'}; "
                f"expected labels from 1 to {classes - 1} (--token-label-classes)."
            )
        named = [bool(labels) for labels, scans in zip(rows["evidence"], rows["volumes"], strict=True) if scans]
        if not all(named):
            warnings.warn(
                f"{sum(named)} of {len(named)} training rows with scans name 'evidence'; the others learn from their "
                "answers alone.",
                stacklevel=2,
            )

    def add_targets(self, rows, batch, targets):
        super().add_targets(rows, batch, targets)
        targets["evidence"] = [row["evidence"] for row in rows]

    def __call__(self, batch):
        targets = batch.scan_targets("token_targets")
        answers = [objective == Objective.ANSWER for objective in batch.objectives]
        shown = [
            [targets[volume] for volume in volumes] if answer and targets else []
            for volumes, answer in zip(batch.volumes_of_rows(), answers, strict=True)
        ]
        outputs = batch.outputs
        if outputs.keep_prob is None:  # text alone
            return torch.zeros(len(shown), device=batch.device)
        return evidence_losses(outputs.keep_prob, outputs.visual_count, shown, batch.targets["evidence"])


def evidence_tokens(targets, evidence):
    """Which visual tokens hold one of the labels `evidence` in a patch. targets: a list of (T, P, 2, C) of
    `TokenLabels`, of the scans that a row shows. Returns (V,) bool, V the tokens of all of them."""
    shares = torch.cat(targets)[:, :, 0]  # (V, P, C)
    return (shares[..., evidence] > PRESENT).any(-1).any(-1)


def evidence_losses(keep_prob, visual_count, targets, evidence):
    """How far each row is from keeping its evidence and nothing else: cross-entropy of the keep probabilities.
    Evidence is rare, so evidence and the other tokens have equal weight.

    Args: keep_prob (B, V); visual_count (B,); targets: for each row the list of its scans' targets; evidence: for each
        row its labels. Rows without labels, or without scans, give 0.
    Returns: (B,).
    """
    losses = []
    for row, (scans, labels) in enumerate(zip(targets, evidence, strict=True)):
        prob = keep_prob[row, : int(visual_count[row])].clamp(1e-6, 1 - 1e-6)
        if not labels or not scans:
            losses.append(0.0 * prob.sum())
            continue
        wanted = evidence_tokens(scans, labels).to(prob.device)
        parts = [-group.log().mean() for group in (prob[wanted], 1 - prob[~wanted]) if len(group)]
        losses.append(sum(parts) / len(parts))
    return torch.stack(losses)
