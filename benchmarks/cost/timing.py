"""Cases that take turns on the clock."""

import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
from transformers import StoppingCriteria
from transformers.modeling_outputs import BaseModelOutputWithPooling

from common import synchronise


@dataclass
class Case:
    """Something to time. `run` returns (seconds to the first token, seconds of the other tokens)."""

    run: callable
    work: float  # operations up to the first token
    repeats: int
    about: dict  # columns of the table
    peak: int | None = None  # bytes
    first: list = field(default_factory=list)
    others: list = field(default_factory=list)

    @property
    def seconds(self):
        return statistics.median(self.first)

    @property
    def other_seconds(self):
        return statistics.median(self.others)


class Clock:
    """kind: "wall"; or "processor", the seconds that this process had a processor, which other work on the machine
    disturbs less. The latter adds up threads: run it with OMP_NUM_THREADS=1, and never on a GPU."""

    def __init__(self, device, kind="wall"):
        self.device, self.read = device, CLOCKS[kind]

    def __call__(self):
        synchronise(self.device)
        return self.read()

    def time(self, function):
        start = self()
        function()
        return self() - start


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class FirstToken(StoppingCriteria):
    """Notes when the first token is there; stops nothing."""

    def __init__(self, clock):
        self.clock, self.at = clock, None

    def __call__(self, input_ids, scores, **kwargs):
        if self.at is None:
            self.at = self.clock()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def answer(model, clock, tokens, **inputs):
    """Seconds to the first token of an answer of `tokens`, and of the others."""
    first, start = FirstToken(clock), clock()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, stopping_criteria=[first])
    return first.at - start, clock() - first.at


def prefill(bench, prompt, kept=None):
    """A function that runs the decoder alone on a prompt whose scan is encoded, here by random numbers, which take as
    long; kept: visual tokens, or `None` for all without a cut."""
    model, inputs = bench.models.quarter, bench.inputs(1, prompt, bench.patches[:1])
    inputs.pop("pixel_values_videos")
    size = prompt.visual, bench.config.text_config.hidden_size
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(size, generator=generator).to(bench.device, model.dtype)
    features = {"video": BaseModelOutputWithPooling(pooler_output=[states])}
    options = {"use_scheduler": False} if kept is None else {"token_budget": kept}

    @torch.no_grad()
    def run():
        model(**inputs, mm_encoder_outputs=features, use_cache=True, logits_to_keep=1, **options)

    return run


def timed(function, clock):
    """A function that runs another one and returns its seconds, and 0 for an answer that it does not write."""
    return lambda: (clock.time(function), 0.0)


def take_turns(cases):
    """Times all cases, in turn, so that a slow moment of the machine strikes all alike. What runs more than once has a
    round to warm up."""
    for number in range(-1, max(case.repeats for case in cases.values())):
        for name, case in cases.items():
            if number < case.repeats and (number >= 0 or case.repeats > 1):
                print(f"\r{name:60.60}", end="", file=sys.stderr)
                first, others = case.run()
                if number >= 0:
                    case.first.append(first)
                    case.others.append(others)
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
