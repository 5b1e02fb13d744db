"""Several questions on one scan in one row, which then passes through the decoder once (`--pack-questions`).

A scan's tokens do not attend to the question behind them, so they are the same for every question. The row holds what
precedes the questions once. Each question attends to that and to itself, at the positions that it would have alone.
Loss and gradients equal those of single rows. A scan of 1,000 tokens and ten questions of 80 make 1,800 tokens, not
10,800. This is exact only while nothing is deleted, because each question keeps different tokens: `--stage dense`.
"""

import torch


def pack_questions(batch, positions, vision_end):
    """Arguments of the model in which rows with the same scans are joined.

    Args:
        batch: of the `Collator`: input_ids, attention_mask, mm_token_type_ids, labels (B, S), volume_count (B,), and
            with scans volume_index (P,) and video_grid_thw (P, 3).
        positions (3, B, S): of `PhotonModel.get_rope_index`.
        vision_end: id of the mark behind a scan; a row's questions share everything up to its last one.
    Returns: arguments of the model for G <= B rows, padded on the right: position_ids (3, G, L), attention_mask
        (G, 1, L, L) bool, True where a query attends to a key, and the others as given.
    Raises: `ValueError` where rows with the same scans differ in front of the question.
    """
    counts, index = batch["volume_count"].tolist(), batch.get("volume_index")
    scans = [()] * len(counts) if index is None else [tuple(p.tolist()) for p in index.split(counts)]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    groups, texts = {}, 0
    for row, shown in enumerate(scans):
        texts += not shown
        groups.setdefault(shown or ("text", texts), []).append(row)
    joined = [_join(batch, positions, rows, vision_end) for rows in groups.values()]
    length = max(len(part["owner"]) for part in joined)
    fills = {"input_ids": 0, "mm_token_type_ids": 0, "labels": -100, "owner": -1}
    packed = {name: torch.stack([_padded(part[name], length, fills[name]) for part in joined]) for name in fills}
    owner = packed.pop("owner")  # (G, L): 0 in front of the questions, then the question's number; -1 padding
    earlier = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
    visible = (owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == 0)
    packed["attention_mask"] = (earlier & visible)[:, None]
    packed["position_ids"] = torch.stack([_padded(part["positions"], length, 0) for part in joined], dim=1)
    if index is not None:
        places = [starts[rows[0]] + place for rows in groups.values() for place in range(counts[rows[0]])]
        packed |= {"volume_index": index[places], "video_grid_thw": batch["video_grid_thw"][places]}
    return packed


def _join(batch, positions, rows, vision_end):
    names = ("input_ids", "mm_token_type_ids", "labels")
    real = [batch["attention_mask"][row].bool() for row in rows]
    parts = {name: [batch[name][row][mask] for row, mask in zip(rows, real, strict=True)] for name in names}
    parts["positions"] = [positions[:, row, mask] for row, mask in zip(rows, real, strict=True)]
    first = parts["input_ids"][0]
    ends = (first == vision_end).nonzero()
    shared = int(ends[-1]) + 1 if len(ends) else 0
    for ids in parts["input_ids"]:
        if not torch.equal(ids[:shared], first[:shared]):
            raise ValueError(
                "Questions on the same scans have different text in front of them, so they cannot share a row. Put "
                "scans first in the user's turn, with one system prompt, or leave --pack-questions out."
            )
    joined = {
        name: torch.cat([pieces[0][..., :shared], *(piece[..., shared:] for piece in pieces)], dim=-1)
        for name, pieces in parts.items()
    }
    lengths = torch.tensor([shared, *(len(ids) - shared for ids in parts["input_ids"])], device=first.device)
    joined["owner"] = torch.arange(len(lengths), device=first.device).repeat_interleave(lengths)
    return joined


def _padded(tensor, length, value):
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[-1]), value=value)
