"""Answers questions about encoded scans, in one thread, in batches, piece by piece.

    engine = Engine(processor, model)
    scan = engine.encode(image)
    asked = engine.ask([{"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": "..."}]}], [scan])
    for event in asked: ...        # pieces of text, then an `Answer`

Questions on the same scans with the same settings that wait at the same time become one batch. A question may be
stopped at any time; its batch goes on without it.
"""

import logging
import math
import queue
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from photon.evaluation.models import VolumeModel
from photon.pipeline_photon import SELECTION, selection_of

LOG = logging.getLogger(__name__)
SAMPLING = ("do_sample", "temperature", "top_p", "seed")


class Busy(RuntimeError):
    """Too many questions wait already; ask again later."""


class EngineError(RuntimeError):
    """The model failed, or was closed, while a question waited for its answer."""


@dataclass(eq=False)
class EncodedScan:
    """What is kept of a scan for questions. Two are the same scan only if they are the same object.

    Args:
        reader: a `VolumeModel` for this scan, which keeps what its questions share in the decoder.
        encoded: what `VolumeModel.encode` gives; geometry: of the scan and its grid, for maps of what was kept.
    """

    reader: VolumeModel
    encoded: tuple
    geometry: dict

    @property
    def nbytes(self):
        output, prefix = self.encoded[0], self.reader.prefix
        lists = [output.pooler_output, *(output.deepstack_features or ())]
        tensors = [part for parts in lists for part in parts]
        tensors += prefix.tensors.values() if prefix is not None else ()
        return sum(tensor.nbytes for tensor in tensors)


@dataclass
class Answer:
    """An answer that is complete.

    Args:
        text: without the stop words; finish_reason: "stop", "length", "timeout" or "cancelled".
        prompt_tokens, answer_tokens: with the visual tokens before the cut.
        tokens_kept, tokens_seen: visual tokens; threshold: of the saliency, `None` where their number was given.
        keep_mask: (V,) bool; seconds: {"waiting", "first_token", "decode"}; batch: questions that were
            answered together; grounding: as of `PhotonForConditionalGeneration.grounding`, `None` where it was not
            asked for, nothing was cut, or the answer was stopped.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    answer_tokens: int
    tokens_kept: int
    tokens_seen: int
    threshold: float | None
    keep_mask: torch.Tensor
    seconds: dict
    batch: int
    grounding: float | None = None


@dataclass(eq=False)
class Asked:
    """A question on its way. Iterating gives pieces of text, then the `Answer`; an error is raised there."""

    chat: list
    scans: list
    options: dict
    stop: tuple
    deadline: float
    on_event: object  # called with each piece of text, the `Answer` or an exception, in the engine's thread
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    since: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def cancel(self):
        """Stops the answer at its next token, or before it begins."""
        self.cancelled = True

    def post(self, event):
        (self.on_event or self.events.put)(event)

    def __iter__(self):
        while True:
            event = self.events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, Answer):
                return

    def fits(self, other):
        """Whether both can be answered in one batch."""
        same_scans = len(self.scans) == len(other.scans) and all(map(lambda a, b: a is b, self.scans, other.scans))
        return same_scans and self.options == other.options and not self.options.get("do_sample")


class Engine:
    """A model with a thread that answers.

    Args:
        processor, model: as `photon.loading.load` returns them.
        max_batch: questions answered at the same time; max_waiting: further ones are refused with `Busy`.
        max_new_tokens: longest answer that may be asked for.
    """

    def __init__(self, processor, model, max_batch=16, max_waiting=64, max_new_tokens=512):
        self.processor, self.model = processor, model
        self.max_batch, self.max_waiting, self.max_new_tokens = max_batch, max_waiting, max_new_tokens
        ends = model.generation_config.eos_token_id
        self.end_ids = set(ends if isinstance(ends, list) else [ends])
        self.waiting, self.lock, self.closed = deque(), threading.Lock(), False
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="photon-engine")

    def close(self):
        """Ends the thread after what it is doing; questions that wait are told."""
        with self.lock:
            self.closed, left = True, list(self.waiting)
            self.waiting.clear()
        for asked in left:
            asked.post(EngineError("The server is being shut down; ask again later."))
        self.pool.shutdown(cancel_futures=True)

    @property
    def queue_length(self):
        return len(self.waiting)

    def read(self, image, **fields):
        """A scan in memory as the vision tower takes it; runs in the caller's thread. fields: as of `modality`."""
        return self.processor.image_processor([image], return_tensors="pt", **fields)

    def encode(self, prepared):
        """What `read` returned as an `EncodedScan`; the vision tower runs in the engine's thread."""
        reader = VolumeModel(self.processor, self.model)
        encoded = self.pool.submit(reader.encode, prepared).result()
        return EncodedScan(reader, encoded, prepared["scans"][0])

    def ask(
        self, chat, scans, *, max_new_tokens=None, stop=(), timeout=120.0, on_event=None, grounding=False, **options
    ):
        """A question: an `Asked` to iterate over.

        Args:
            chat: turns as the chat template takes them, with a part {"type": "volume"} for each scan in turn.
            scans: `EncodedScan`s; stop: texts that end an answer; timeout: seconds, with waiting.
            on_event: called with each event instead; see `Asked`.
            grounding: whether to tell how much the answer rests on what was kept, at the cost of some forward passes.
            options: of `SELECTION` and `SAMPLING`.
        Raises: `Busy`, and `ValueError` for options that are not known.
        """
        if not scans:
            raise ValueError("There is no scan to ask about; pass one for each volume of the chat.")
        unknown = set(options) - {*SELECTION, *SAMPLING}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: not known; expected {', '.join(SELECTION + SAMPLING)}.")
        longest = self.max_new_tokens if max_new_tokens is None else min(max_new_tokens, self.max_new_tokens)
        options = {name: value for name, value in options.items() if value is not None}
        options |= {"max_new_tokens": longest} | ({"grounding": True} if grounding else {})
        asked = Asked(chat, list(scans), options, tuple(stop), time.monotonic() + timeout, on_event)
        with self.lock:
            if self.closed:
                raise EngineError("The server is being shut down; ask again later.")
            if len(self.waiting) >= self.max_waiting:
                raise Busy(f"{len(self.waiting)} questions wait already; ask again later.")
            self.waiting.append(asked)
        self.pool.submit(self._answer_next).add_done_callback(_log_fault)
        return asked

    def keep_map(self, scans, keep_mask, number=0):
        """A SimpleITK image on the voxels of scan `number`, 1 where kept; keep_mask: (V,) of an `Answer`."""
        geometries = SimpleNamespace(scans=[[scan.geometry for scan in scans]])
        return self.processor.keep_map(keep_mask[None], geometries, 0, number)

    # === The thread ==================================================================================================

    def _answer_next(self):
        """Answers the question that waited longest and those that fit to it; nothing where they are answered."""
        batch, done = self._take(), False
        try:
            if batch:
                self._answer(batch)
            done = True
        except ValueError as error:  # of the options of generation, which says what to do
            done = True
            for asked in batch:
                asked.post(error)
        finally:
            if not done:
                for asked in batch:
                    asked.post(EngineError("The model failed on this question; the log of the server says why."))

    def _take(self):
        with self.lock:
            if not self.waiting:
                return []
            first = self.waiting.popleft()
            batch = [first, *(asked for asked in self.waiting if asked.fits(first))][: self.max_batch]
            for asked in batch[1:]:
                self.waiting.remove(asked)
        now = time.monotonic()
        return [asked for asked in batch if not self._over(asked, now)]

    @torch.inference_mode()
    def _answer(self, batch):
        start = time.monotonic()
        scans = batch[0].scans
        inputs = scans[0].reader.inputs([asked.chat for asked in batch], [scan.encoded for scan in scans])
        options = dict(batch[0].options)
        grounding = options.pop("grounding", False)
        if options.pop("seed", None) is not None:
            torch.manual_seed(batch[0].options["seed"])
        options = {"do_sample": False, "num_beams": 1} | options
        reporter = Reporter(self, batch)
        output = self.model.generate(
            **inputs, stopping_criteria=StoppingCriteriaList([reporter]), return_dict_in_generate=True, **options
        )
        end = time.monotonic()
        cut = output.past_key_values.cut
        seen = (inputs["input_ids"] == self.model.config.video_token_id).sum(-1).tolist()
        given = {"token_budget", "keep_ratio"} & set(options)
        prompts = inputs["attention_mask"].sum(-1).tolist()
        for text in reporter.rows:
            text.finish()
        grounded = [None] * len(batch)
        if grounding and cut is not None:
            grounded = self._grounding(inputs, output.sequences, reporter.rows, options)
        for row, asked in enumerate(batch):
            text = reporter.rows[row]
            mask = torch.ones(seen[row], dtype=torch.bool) if cut is None else cut.keep_mask[row, : seen[row]].cpu()
            first = reporter.first or end
            seconds = {
                "waiting": start - asked.since,
                "first_token": first - start,
                "decode": end - first,
            }
            asked.post(
                Answer(
                    text=text.text.strip(),
                    finish_reason=text.reason,
                    prompt_tokens=prompts[row],
                    answer_tokens=len(text.ids),
                    tokens_kept=int(mask.sum()),
                    tokens_seen=seen[row],
                    threshold=None if cut is None or given else float(cut.threshold[row]),
                    keep_mask=mask,
                    seconds=seconds,
                    batch=len(batch),
                    grounding=grounded[row] if 0 < int(mask.sum()) < seen[row] else None,
                )
            )

    def _grounding(self, inputs, sequences, rows, options):
        """A number for each row, `None` where its answer was stopped from outside: the rest is no answer of the
        model's."""
        values = self.model.grounding(sequences, **inputs, **selection_of(options)).tolist()
        return [v if text.own_end and math.isfinite(v) else None for v, text in zip(values, rows, strict=True)]

    def _over(self, asked, now):
        """Whether nobody waits for the answer any more; then it is told so."""
        if not asked.cancelled and now < asked.deadline:
            return False
        asked.post(TimeoutError("The question waited too long; ask again later, or allow more time."))
        return True


def _log_fault(future):
    if not future.cancelled() and future.exception() is not None:
        LOG.error("A batch of questions failed.", exc_info=future.exception())


class Reporter(StoppingCriteria):
    """Hands each row's new text on after every step, and ends rows that nobody waits for."""

    def __init__(self, engine, batch):
        self.first = None
        self.rows = [RowText(asked, engine.processor, engine.end_ids) for asked in batch]

    def __call__(self, input_ids, scores, **kwargs):
        now = time.monotonic()
        self.first = self.first or now
        newest = input_ids[:, -1].tolist()
        done = [row.add(token, now) for row, token in zip(self.rows, newest, strict=True)]
        return torch.tensor(done, device=input_ids.device)


class RowText:
    """The text of one answer while it grows."""

    def __init__(self, asked, processor, end_ids):
        self.asked, self.processor, self.end_ids = asked, processor, end_ids
        self.ids, self.text, self.sent, self.reason = [], "", 0, None
        self.own_end = False  # whether the model ended it, or its length; not a stop word or the visitor

    def add(self, token, now):
        """Takes one token more; returns whether the answer is complete."""
        if self.reason:
            return True
        if token in self.end_ids:
            self.reason, self.own_end = "stop", True
        else:
            self.ids.append(token)
            self.text = self.processor.decode(self.ids, skip_special_tokens=True)
            ends = [self.text.find(word) for word in self.asked.stop if word in self.text]
            if ends:
                self.text, self.reason = self.text[: min(ends)], "stop"
            elif self.asked.cancelled:
                self.reason = "cancelled"
            elif now > self.asked.deadline:
                self.reason = "timeout"
        self._send(whole=self.reason is not None)
        return self.reason is not None

    def finish(self):
        """What was held back, after the last step."""
        if self.reason is None:
            self.reason, self.own_end = "length", True
        self._send(whole=True)

    def _send(self, whole):
        """Hands new text on; half a letter, and what may become a stop word, wait for the next token."""
        ready = len(self.text)
        if not whole:
            if self.text.endswith("\ufffd"):
                return
            for word in self.asked.stop:
                for held in range(min(len(word) - 1, ready), 0, -1):
                    if self.text.endswith(word[:held]):
                        ready = min(ready, len(self.text) - held)
                        break
        piece = self.text[self.sent : ready]
        if piece:
            self.sent = ready
            self.asked.post(piece)
