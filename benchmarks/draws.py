"""Whether pairs of draws tell the exact cut's gradient better than draws on their own.

    python benchmarks/draws.py --model RUN/checkpoint-125 RUN/final --data test.jsonl --json draws.json

For each question the gates are drawn `--draws` times, and once more with 1 - u in place of each u (antithetic). The
figure is the variance of the gradient of the answer's loss by all gates' logits, for the mean of two mirrored draws
over that of two independent ones: below 1, pairs are worth their second forward; at 0.5 they are worth three of them.
`signal` is the squared gradient over the variance of one draw. Intervals are 95 % percentiles over draws of patients.
"""

import sys

import numpy as np
import torch
from surrogate import RESAMPLES, Case, Given
from tqdm import tqdm

from common import ROOT, arguments, report

sys.path.insert(0, str(ROOT))

from photon.evaluation.resampling import Sums, interval
from photon.loading import load
from photon.scheduling_photon import LOG_OF_NOTHING, NOTHING, gate_offset, hard_concrete
from photon.training.batches import Collator
from photon.training.data import load_rows


def variances(gradients):
    """(variance of a mean of two independent draws, of two mirrored ones, squared gradient) of one case.

    gradients (2 n, V): the second half's draws mirror the first half's.
    """
    first, second = gradients.chunk(2)
    single = gradients.var(0).sum()
    mirrored = ((first + second) / 2).var(0).sum()
    # the mean's square is too large by the mean's own variance
    return [float(x) for x in (single / 2, mirrored, gradients.mean(0).square().sum() - mirrored / len(first))]


def gradients(case, uniform):
    """Of the answer's loss by the logits of the gates, (draws, V), under each draw of uniform (draws, V)."""
    config = case.model.config
    with torch.no_grad():
        _, outputs = case.losses(case.own)
    logits = outputs.keep_prob.logit(eps=1e-6) + gate_offset(config)
    logits = logits.repeat(len(uniform), 1).requires_grad_()
    gates = hard_concrete(logits, config, uniform)
    log_gate = torch.where(gates > 0, gates.clamp(min=NOTHING).log(), LOG_OF_NOTHING)
    before, config.surrogate = config.surrogate, "exact"
    losses, _ = case.losses(Given(gates.detach() > 0, log_gate=log_gate), len(uniform))
    (found,) = torch.autograd.grad(losses.sum(), logits)
    config.surrogate = before
    return found


def measured(source, rows, cases, draws):
    """One row of the table."""
    processor, model = load(source, "cpu", "float32")
    model.eval().requires_grad_(False)
    collate, parts = Collator(processor, None), []
    for row in tqdm(rows[:cases], desc=str(source), unit="case"):
        case = Case(model, collate([row]))
        visual = int((case.batch["input_ids"] == model.config.video_token_id).sum())
        uniform = torch.rand(draws, visual)
        parts.append(variances(gradients(case, torch.cat([uniform, 1 - uniform]))))
    kept = [{"patient": row["patient"], "subtask": ""} for row in rows[: len(parts)]]
    sums = Sums(kept, np.array(parts), RESAMPLES, seed=0)
    ratio = interval(*(total[..., 0, 1] / total[..., 0, 0] for total in (sums.all, sums.drawn)))
    signal = sums.all[..., 0, 2] / sums.all[..., 0, 0] / 2
    figures = {f"mirrored{end}": ratio[name] for end, name in (("", "value"), ("_low", "low"), ("_high", "high"))}
    return {"model": str(source), "cases": len(parts), **figures, "signal": float(signal)}


def main():
    options = arguments(
        __doc__,
        ["cpu"],
        model={"required": True, "nargs": "+", "metavar": "DIR", "help": "models, such as points of one training"},
        data={"required": True, "metavar": "FILE", "help": "questions with answers, .jsonl"},
        cases={"type": int, "default": 100, "help": "how many questions of each model"},
        draws={"type": int, "default": 16, "help": "of each question, before they are mirrored"},
    )
    torch.manual_seed(0)
    rows = list(load_rows(options.data, columns={}).shuffle(seed=0))
    rows = [{**row, "patient": row["id"].split("-")[0]} for row in rows]
    table = [measured(source, rows, options.cases, options.draws) for source in options.model]
    report(torch.device("cpu"), table, {"mirrored": table[-1]["mirrored"]}, options.json)


if __name__ == "__main__":
    main()
