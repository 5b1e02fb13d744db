"""Whether pairs of draws tell the exact cut's gradient better than draws on their own.

    python benchmarks/draws.py --model RUN/checkpoint-125 RUN/final --data test.jsonl --json draws.json

For each question the gates are drawn `--draws` times, and once more with 1 - u in place of each u (antithetic). The
figure is the variance of the gradient of the answer's loss by all gates' logits, for the mean of two mirrored draws
over that of two independent ones: below 1, pairs are worth their second forward; at 0.5 they are worth three of them.
`signal` is the squared gradient over the variance of one draw. Intervals are 95 % percentiles over draws of patients.
"""

import numpy as np
import torch
from surrogate import asked, cases_of, gated, ratio
from tqdm import tqdm

from common import report
from photon.scheduling_photon import gate_offset, hard_concrete


def variances(gradients):
    """(variance of a mean of two independent draws, of two mirrored ones, squared gradient) of one case.

    gradients (2 n, V): the second half's draws mirror the first half's.
    """
    first, second = gradients.chunk(2)
    single = gradients.var(0).sum()
    mirrored = ((first + second) / 2).var(0).sum()
    # the mean's square is too large by the mean's own variance
    return [float(x) for x in (single / 2, mirrored, gradients.mean(0).square().sum() - mirrored / len(first))]


def gradients(case, draws):
    """Of the answer's loss by the logits of the gates, (2 draws, V): of so many draws, and of their mirrors."""
    config = case.model.config
    with torch.no_grad():
        _, outputs = case.losses(case.own)
    logits = outputs.keep_prob.logit(eps=1e-6) + gate_offset(config)
    uniform = torch.rand(draws, logits.shape[1])
    logits = logits.repeat(2 * draws, 1).requires_grad_()
    gates = hard_concrete(logits, config, torch.cat([uniform, 1 - uniform]))
    return case.gradient("exact", logits, gated(gates), len(gates))


def measured(source, rows, draws):
    """One row of the table."""
    cases = tqdm(cases_of(source, rows), desc=str(source), total=len(rows), unit="case")
    parts = np.array([variances(gradients(case, draws)) for _, case in cases])
    independent, _, signal = parts.sum(0)
    figures = ratio("mirrored", rows, parts[:, [1, 0]])
    return {"model": str(source), "cases": len(parts), **figures, "signal": signal / independent / 2}


def main():
    options, rows = asked(__doc__, cases=100, draws=16)
    table = [measured(source, rows[: options.cases], options.draws) for source in options.model]
    report(torch.device("cpu"), table, {"mirrored": table[-1]["mirrored"]}, options.json)


if __name__ == "__main__":
    main()
