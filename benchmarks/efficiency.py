"""Time and memory of answering and training, from Qwen2.5-VL on a video of slices to a further question, in one table.

    python benchmarks/efficiency.py --json benchmarks/results/efficiency_cpu.json --plot docs/efficiency.png
    python benchmarks/efficiency.py --preset 3b --json benchmarks/results/efficiency_3b.json     # on a GPU, bfloat16
    python benchmarks/efficiency.py --preset 3b --count                       # operations alone; measures nothing

Weights are random; `token_budget` sets how many tokens stay, and the scheduler is the release's. `3b` and `7b` are the
sizes of Qwen2.5-VL. `cpu` is `3b` with half the tokens of scan and text, a fifth of the width, a third of the layers,
and a vision tower of about its share of the work: vision, first quarter of the decoder and the rest stand to each
other about as in `3b`.

- video: stock Qwen2.5-VL, whose patches are 2 frames deep, on every slice (7,000 tokens in 3b);
- dense: Photon without a cut; L/4-1 and front: with the cut behind the first quarter, or before layer 0, at the share
  of visual tokens that stays;
- prefill: the decoder alone, on a scan that the vision tower has encoded;
- further: a question on a scan that `encode_scan` has encoded; sixteen: the encoding and 16 questions in one batch;
- step: a training step of forward, backward and AdamW with checkpointing, as `train_hf.py` takes it, of the whole
  model or of adapters; `grouped` is 16 questions on one scan that is encoded once, `apart` the same with 16 encodings.

Operations are counted by `cost/counting.py`. `faster` is how much less time a question takes than in the row named in
`of`, `bound` the same of operations, `reached` the one as a share of the other. Ratios whose names end in `_bound` are
counted, the others measured; `paper_*` are the paper's. `peak` is what one run has allocated at a time beyond weights.
Activations are the most that a step holds at a time beside weights, gradients and optimiser states; `holders` in the
JSON says who holds them (`cost/holders.py`).
"""

import time
from pathlib import Path

import torch
from cost import growth
from cost.answers import MAIN, Answers
from cost.bounds import counted
from cost.models import Bench
from cost.presets import PRESETS
from cost.steps import training
from cost.timing import CLOCKS
from training import allocated_bytes

from common import arguments, report

TOKENS, QUESTIONS = 9, 16
PARTS = ("answers", "growth", "training")
PAPER = {"paper_training_speedup": 5.7, "paper_training_memory": 0.26, "paper_answering_speedup": 1.8,
         "paper_answering_memory": 0.35}  # fmt: skip


def main():
    options = arguments(
        __doc__,
        list(PRESETS),
        dtype={"choices": ["float32", "bfloat16"]},
        attention={"choices": ["sdpa", "flash_attention_2", "eager"], "default": "sdpa"},
        clock={"choices": list(CLOCKS), "default": "wall", "help": "processor: on a CPU that others use too"},
        parts={"nargs": "+", "choices": PARTS, "default": PARTS, "help": "measure these only"},
        plot={"type": Path, "metavar": "FILE", "help": "draw the growth with volume and with questions"},
        count={"action": "store_true", "help": "count the preset's operations; measure nothing"},
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.count:
        return report(device, *counted(PRESETS[options.preset], QUESTIONS), options.json, preset=options.preset)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    start, parts = time.perf_counter(), options.parts
    bench = Bench(PRESETS[options.preset], device, dtype, options.attention, clock=options.clock)
    facts = {"preset": options.preset, "dtype": str(dtype).removeprefix("torch."), "clock": options.clock}
    rows, ratios = [], {}
    if "answers" in parts:
        answers = Answers(bench, TOKENS, QUESTIONS)
        answers.measure(allocated_bytes)
        rows, ratios = answers.table(), answers.ratios()
        facts["questions"] = growth.by_questions(answers)
    if "growth" in parts:
        facts["growth"] = growth.by_volume(bench)
    if "training" in parts:
        facts["training"], more, facts["holders"] = training(bench, MAIN, QUESTIONS)
        ratios |= more
    facts["minutes"] = (time.perf_counter() - start) / 60
    tables = {f"memory at the peak of a step, {step}": held for step, held in facts.get("holders", {}).items()}
    tables |= {name: facts[name] for name in ("training", "growth", "questions") if name in facts}
    for title, table in tables.items():
        print(f"\n{title}")
        report(device, table, {})
    print()
    report(device, rows, ratios | PAPER, options.json, **facts)
    print(f"{facts['minutes']:.1f} minutes")
    if options.plot:
        growth.plot(facts["growth"], facts["questions"], options.plot)


if __name__ == "__main__":
    main()
