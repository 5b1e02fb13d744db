"""Rows to batches: the order of rows, and what the processor makes of them.

- `ScanSampler`: the order of rows in which questions on one scan come together, and like rows in a batch;
- `ChatCollator`: chats to a batch that any trainer takes, padded on the left, labels on the assistant's tokens alone;
- `Collator`: the same with what the `PhotonTrainer` needs beside.
Scans stay paths until the collator. Messages name a row by its file and line, never by its scan.
"""

import json
import random

import torch
from torch.utils.data import Sampler

from photon.processing_photon import distinct_volumes
from photon.rows import RowError


def conversation(row, answer=True):
    """A row's chat as the processor takes it; without the last turn if not `answer`."""
    volumes = iter(row["volumes"])

    def part(content):
        if content["type"] == "text":
            return {"type": "text", "text": content["text"]}
        return {"type": "volume", **scan_source(next(volumes))}

    messages = [{"role": m["role"], "content": [part(c) for c in m["content"]]} for m in row["messages"]]
    return messages if answer else messages[:-1]


def scan_source(volume):
    """A row's scan as the volume processor takes it: its path, and what to read from there."""
    out = {key: value for key, value in volume.items() if value is not None}
    out |= json.loads(out.pop("read", "{}"))
    if out.get("series", "").isdecimal():
        out["series"] = int(out["series"])  # a number in the list of series
    return out


class ScanSampler(Sampler):
    """Rows in random order, but those on one scan up to `together` at a time, so that a batch encodes it once, and
    batches of rows with equally many scans, so that a comparison of two does not pad the others to twice their length.

    Args: rows with `volumes`; together; batch, rows of a batch; seed, the order follows from it and from the epoch.
    """

    def __init__(self, rows, together, batch, seed):
        self.together, self.batch, self.seed, self.epoch = together, batch, seed, 0
        self.kinds = {}  # {number of scans: {scans: [numbers of rows]}}
        for number, volumes in enumerate(rows["volumes"]):
            scans = self.kinds.setdefault(len(volumes), {})
            scans.setdefault(json.dumps(volumes) if volumes else number, []).append(number)

    def __len__(self):
        return sum(len(numbers) for scans in self.kinds.values() for numbers in scans.values())

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        chance = random.Random(f"{self.seed},{self.epoch}")
        batches, rest = [], []
        for scans in self.kinds.values():
            groups = []
            for numbers in scans.values():
                numbers = chance.sample(numbers, len(numbers))
                groups += [numbers[begin : begin + self.together] for begin in range(0, len(numbers), self.together)]
            chance.shuffle(groups)
            numbers = [number for group in groups for number in group]
            whole = len(numbers) - len(numbers) % self.batch
            batches += [numbers[begin : begin + self.batch] for begin in range(0, whole, self.batch)]
            rest += numbers[whole:]
        chance.shuffle(batches)
        return (number for numbers in [*batches, rest] for number in numbers)


class ChatCollator:
    """Chats to a batch of the model, padded on the left, with `labels` on the assistant's tokens alone.

    It returns arguments of the model's forward and nothing else, so that any trainer can use it: the Trainer of
    transformers, TRL's `SFTTrainer`, a loop in plain PyTorch.

        collator = ChatCollator(processor, output_full_length=True)
        SFTTrainer(model, train_dataset=rows, data_collator=collator, processing_class=processor, args=SFTConfig(
            dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, ...))

    A row has `messages`, or `prompt` and `completion`: a chat as the processor takes it, where a scan is a part
    {"type": "volume", "path": ...} of a user's turn. A row of `load_rows` will do as well.

    Args:
        max_length: longer rows are refused; nothing is ever cut. `None`: any length.
        cache_dir: folder where scans are kept preprocessed, in float16; `None` reads them each time.
        answers: False gives the prompts alone, without the last turn, for generation.
        output_full_length: adds this argument of the model, so that logits have the length of `labels`. A trainer that
            looks at logits itself needs it; the model's own loss does not.
    Returns: `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` (B, S); with scans `pixel_values_videos`,
        `video_grid_thw` (P, 3) and `volume_index` (P,): a scan that several rows ask about is encoded only once.
    Raises: `RowError` for a row that is too long, or has no token to learn, or whose scan cannot be read.
    """

    def __init__(self, processor, max_length=None, cache_dir=None, answers=True, output_full_length=False):
        self.processor, self.max_length, self.cache_dir = processor, max_length, cache_dir
        self.answers, self.output_full_length = answers, output_full_length

    def __call__(self, rows):
        try:
            return self._batch(rows)
        except RowError:
            raise
        except ValueError as error:  # for example a scan that cannot be read
            for row in rows if len(rows) > 1 else ():
                self([row])  # raises with the one row's place
            raise RowError(f"{_place(rows[0])}: {error}") from error

    def _batch(self, rows):
        batch = self._encode(rows)
        lengths = batch["attention_mask"].sum(-1).tolist()
        for row, length in zip(rows, lengths, strict=True):
            if self.max_length is not None and length > self.max_length:
                raise RowError(f"{_place(row)}: {length} tokens, but max_length is {self.max_length}; nothing is cut")
        if self.answers:
            learned = batch.pop("assistant_masks").bool()
            batch["labels"] = batch["input_ids"].masked_fill(~learned, -100)
            for row, some in zip(rows, learned.any(-1).tolist(), strict=True):
                if not some:
                    raise RowError(f"{_place(row)}: all labels are masked; the chat template marks no assistant token")
        if self.output_full_length:
            batch["output_full_length"] = True
        return dict(batch)

    def _chat(self, row):
        if row.get("volumes") is not None:
            return conversation(row, self.answers)
        messages = row.get("messages") or [*(row.get("prompt") or ()), *(row.get("completion") or ())]
        if not messages:
            raise RowError(
                f"{_place(row)}: expected messages, or prompt and completion; it has {', '.join(row) or 'nothing'}. "
                "A trainer leaves columns out unless remove_unused_columns=False."
            )
        return messages if self.answers else messages[:-1]

    def _encode(self, rows):
        chats = [self._chat(row) for row in rows]
        return self._prompts(chats, cache_dir=self.cache_dir, share_volumes=True)

    def _prompts(self, chats, **options):
        batch = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=not self.answers,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **options},
        )
        if self.answers:
            batch["assistant_masks"] = self._assistant_masks(chats, batch)
        return batch

    def _assistant_masks(self, chats, batch):
        """(B, S): 1 at the assistant's tokens. It is made from the chats with one mark a scan, because the processor's
        mask of texts with all marks takes longer than everything else here."""
        mark = self.processor.video_token_id
        encoded = self.processor.tokenizer.apply_chat_template(
            chats,
            chat_template=self.processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        grids = batch.get("video_grid_thw", torch.zeros(0, 3, dtype=torch.long))
        tokens = iter((grids.prod(-1) // self.processor.image_processor.merge_size**2).tolist())
        masks = torch.zeros_like(batch["input_ids"])
        for row, (ids, mask) in enumerate(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)):
            ids, mask = torch.tensor(ids), torch.tensor(mask)
            times = torch.ones_like(ids)
            times[ids == mark] = torch.tensor(
                [next(tokens) for _ in range(int((ids == mark).sum()))], dtype=torch.long
            )
            real = batch["attention_mask"][row].bool()
            if not torch.equal(ids.repeat_interleave(times), batch["input_ids"][row][real]):
                raise RuntimeError("the tokenizer splits a prompt differently when a scan has many marks")
            masks[row, real] = mask.repeat_interleave(times)
        return masks


def _place(row):
    """A row's file and line, where it is known."""
    return row.get("where") or "a row"


class Collator(ChatCollator):
    """Rows of `load_rows` to a batch of the `PhotonTrainer`: beside the arguments of the model it has

    - `volume_count` (B,): scans of each row;
    - `example` (B,): number of each row in the data set;
    - `targets`, with `losses`: a dict of what they need of the rows (see `Loss.add_targets`).

    - `features`, with a cache of them: what it has of the batch's scans, see `FeatureCache.encoded`.

    Args: losses: those that need targets from the rows, a list of `Loss`; features: a `FeatureCache`, whose scans are
        not read.
    """

    def __init__(self, processor, max_length, cache_dir=None, answers=True, losses=(), features=None):
        super().__init__(processor, max_length, cache_dir, answers)
        self.losses, self.features = losses, features

    def _batch(self, rows):
        batch = super()._batch(rows)
        batch["volume_count"] = torch.tensor([len(row["volumes"]) for row in rows])
        batch["example"] = torch.tensor([row["example"] for row in rows])
        targets = {}
        for loss in self.losses:
            loss.add_targets(rows, batch, targets)
        if targets:
            batch["targets"] = targets
        return batch

    def _encode(self, rows):
        chats = [self._chat(row) for row in rows]
        places = [
            part for chat in chats for message in chat for part in message["content"] if part["type"] == "volume"
        ]
        if self.features is None or not places:
            return super()._encode(rows)
        scans = [{name: value for name, value in place.items() if name != "type"} for place in places]
        distinct, index = distinct_volumes(scans)
        keys, tokens, grids = map(list, zip(*map(self.features.load, distinct), strict=True))
        missing = [number for number, grid in enumerate(grids) if grid is None]
        read = {}
        if missing:
            read = self.processor.image_processor(
                [distinct[number] for number in missing], return_tensors="pt", cache_dir=self.cache_dir
            )
            for number, grid in zip(missing, read["video_grid_thw"], strict=True):
                grids[number] = grid
        for place in places:
            place.clear()
            place["type"] = "volume"
        grids = torch.stack(grids)
        batch = self._prompts(chats, video_grid_thw=grids[index])
        batch["volume_index"] = torch.tensor(index)
        batch["features"] = {"keys": keys, "tokens": tokens, "grids": grids}
        if missing:
            batch["pixel_values_videos"] = read["pixel_values_videos"]
        return batch
