"""What deleting a token costs, and what each gradient says it would cost.

    python benchmarks/surrogate.py --model RUN/checkpoint-125 RUN/final --data test.jsonl --json surrogate.json

A case is a question and the tenth of the tokens that the model finds most salient for it. The truth: the rise of the
answer's loss when one kept token more is deleted. An estimate: minus the gradient that training would give its
keep probability.

- `plain`: first order, -<x, g>, of scaling the token's hidden state;
- `taylor`, `release`: the surrogate rules of those names, normalised and clipped as in training;
- `gate`: of log p on the token's attention logits, at p = 1; `straight-through`: the same times p (1 - p);
- `exact`: of the gate's logit in the exact cut, a mean over `--draws` draws.

For each: Spearman's correlation with the truth within a case (mean over cases), and how often the sign is right,
weighted by the size of the rise. Intervals are 95 % percentiles over draws of patients. `cost`: forwards a case.
"""

import sys

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

from common import ROOT, arguments, report

sys.path.insert(0, str(ROOT))

from photon.evaluation.resampling import Sums, interval
from photon.loading import load
from photon.objectives_photon import answer_losses, targets_of
from photon.scheduling_photon import LOG_OF_NOTHING, NOTHING, Schedule, gate_offset, hard_concrete
from photon.training.batches import Collator
from photon.training.data import load_rows

ESTIMATES = ("plain", "taylor", "release", "gate", "straight-through", "exact")
RESAMPLES, MIN_TOKENS, KEPT = 2000, 5, 0.1


class Given(nn.Module):
    """A scheduler that keeps what it is given: keep (B, V) bool; with leaves by which to ask for gradients.

    keep_prob (1, V): for the surrogate rules; scale (1, V): multiplies hidden states; log_gate (B, V): added to the
    logits.
    """

    def __init__(self, keep, keep_prob=None, scale=None, log_gate=None):
        super().__init__()
        self.keep, self.keep_prob, self.scale, self.log_gate = keep, keep_prob, scale, log_gate
        self.needs = frozenset() if scale is None else frozenset({"hidden_states"})

    def forward(self, inputs):
        prob = torch.ones_like(self.keep[:1], dtype=torch.float32) if self.keep_prob is None else self.keep_prob
        states = None if self.scale is None else inputs.hidden_states * self.scale[..., None]
        zeros = torch.zeros_like(self.keep, dtype=torch.float32)
        return Schedule(
            self.keep, prob.expand_as(zeros), zeros[:, :1], zeros, zeros, inputs.visual.sum(-1),
            hidden_states=states, log_gate=self.log_gate,
        )  # fmt: skip


class Case:
    """A question, encoded once: losses (B,) of its answer under given schedules."""

    def __init__(self, model, batch):
        self.model = model
        batch = {name: value for name, value in batch.items() if name not in ("volume_count", "example")}
        self.labels, index = batch.pop("labels"), batch.pop("volume_index")
        with torch.no_grad():
            vision = model.model.get_video_features(
                batch.pop("pixel_values_videos"), batch["video_grid_thw"], index, return_dict=True
            )
        self.vision, self.batch = vision, batch
        self.own = model.model.language_model.scheduler

    def losses(self, scheduler, count=1, **options):
        """Sums over the answer's tokens (count,), of as many copies of the row; options: of the model's forward."""
        given = {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in self.batch.items()}
        vision = type(self.vision)(pooler_output=list(self.vision.pooler_output) * count)
        self.model.set_scheduler(scheduler)
        outputs = self.model.model(**given, **options, mm_encoder_outputs={"video": vision}, use_cache=False)
        self.model.set_scheduler(self.own)
        target = targets_of(self.labels.repeat(count, 1), outputs.keep_index)
        return answer_losses(self.model.lm_head(outputs.last_hidden_state), target)[0], outputs

    def gradient(self, rule, leaf, scheduler, count=1):
        """Of the losses' sum by `leaf`, as training by a rule of `config.surrogate` has it."""
        config = self.model.config
        before, config.surrogate = config.surrogate, rule
        losses, _ = self.losses(scheduler, count)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)  # on the way back the rule is read again
        config.surrogate = before
        return grad


def cases_of(source, rows):
    """(row, `Case`) of each question, for the model in folder `source`, whose weights do not train."""
    processor, model = load(source, "cpu", "float32")
    model.eval().requires_grad_(False)
    collate = Collator(processor, None)
    for row in rows:
        yield row, Case(model, collate([row]))


def gated(gates):
    """The exact cut's schedule with these gates (B, V)."""
    return Given(gates.detach() > 0, log_gate=torch.where(gates > 0, gates.clamp(min=NOTHING).log(), LOG_OF_NOTHING))


def rises(case, keep):
    """The truth: (k,) rises of the loss, for each kept token."""
    places = keep[0].nonzero()[:, 0]
    without = keep.repeat(len(places) + 1, 1)
    without[torch.arange(len(places)) + 1, places] = False
    with torch.no_grad():
        losses, _ = case.losses(Given(without), len(without))
    return losses[1:] - losses[0]


def estimates(case, keep, keep_prob, draws):
    """{name: (k,)} of ESTIMATES, for the kept tokens, and the forwards and backwards of each."""
    config, kept = case.model.config, keep[0]

    def worth(rule, leaf, scheduler, count=1):
        return -case.gradient(rule, leaf, scheduler, count)[0, kept] / count

    def ones():
        return torch.ones_like(keep_prob).requires_grad_()

    scale, prob = ones(), keep_prob.clone().requires_grad_()
    found = {"plain": worth("release", scale, Given(keep, scale=scale))}
    for rule in ("taylor", "release"):
        found[rule] = worth(rule, prob, Given(keep, keep_prob=prob))
    gate = torch.zeros_like(keep_prob).requires_grad_()
    found["gate"] = worth("gate", gate, Given(keep, log_gate=gate))
    found["straight-through"] = found["gate"] * (keep_prob * (1 - keep_prob))[0, kept]
    logits = (keep_prob.logit(eps=1e-6) + gate_offset(config)).requires_grad_()
    found["exact"] = worth("exact", logits, gated(hard_concrete(logits.expand(draws, -1), config)), draws)
    return found


def compared(truth, estimate):
    """(Spearman's correlation, weighted share of right signs) of one case; `nan` where a side does not vary."""
    truth, estimate = truth.double().numpy(), estimate.detach().double().numpy()
    if np.ptp(truth) == 0 or np.ptp(estimate) == 0:
        return np.nan, np.nan
    weight = np.abs(truth)
    return spearmanr(truth, estimate).statistic, (weight * (np.sign(truth) == np.sign(estimate))).sum() / weight.sum()


def ratio(column, rows, parts):
    """A figure and its bounds as columns of a table: the sum of parts[:, 0] over that of parts[:, 1]."""
    sums = Sums([{"patient": row["patient"], "subtask": ""} for row in rows], parts, RESAMPLES, seed=0)
    figure = interval(*(total[..., 0, 0] / total[..., 0, 1] for total in (sums.all, sums.drawn)))
    return {column: figure["value"], f"{column}_low": figure["low"], f"{column}_high": figure["high"]}


def measured(source, rows, cases, draws):
    """One row of the table for each estimate: how it agrees with the truth over the cases of one model."""
    found, kept_rows = {name: [] for name in ESTIMATES}, []
    bar = tqdm(total=cases, desc=str(source), unit="case")
    for row, case in cases_of(source, rows):
        with torch.no_grad():
            _, outputs = case.losses(case.own, keep_ratio=KEPT)
        if int(outputs.keep_mask.sum()) < MIN_TOKENS:
            continue
        truth = rises(case, outputs.keep_mask)
        for name, estimate in estimates(case, outputs.keep_mask, outputs.keep_prob, draws).items():
            found[name].append(compared(truth, estimate))
        kept_rows.append(row)
        bar.update()
        if len(kept_rows) == cases:
            break
    bar.close()
    table = []
    for name, pairs in found.items():
        line = {"model": str(source), "estimate": name, "cases": len(pairs)}
        for column, values in zip(("spearman", "sign"), np.array(pairs).T, strict=True):
            parts = np.stack([np.nan_to_num(values), np.isfinite(values)], axis=1)
            line |= ratio(column, kept_rows, parts)
        table.append(line | {"cost": draws if name == "exact" else 1})
    return table


def asked(description, cases, draws):
    """The options of a command, whose defaults are cases and draws, and the rows of its questions in random order."""
    options = arguments(
        description,
        ["cpu"],
        model={"required": True, "nargs": "+", "metavar": "DIR", "help": "models, such as points of one training"},
        data={"required": True, "metavar": "FILE", "help": "questions with answers, .jsonl"},
        cases={"type": int, "default": cases, "help": "how many questions of each model"},
        draws={"type": int, "default": draws, "help": "of the exact cut's gates, for each question"},
    )
    torch.manual_seed(0)
    rows = load_rows(options.data, columns={}).shuffle(seed=0)
    return options, [{**row, "patient": row["id"].split("-")[0]} for row in rows]


def main():
    options, rows = asked(__doc__, cases=200, draws=16)
    table = [line for source in options.model for line in measured(source, rows, options.cases, options.draws)]
    last = {line["estimate"]: line["spearman"] for line in table if line["model"] == str(options.model[-1])}
    ratios = {f"{name}_spearman": value for name, value in last.items()}
    report(torch.device("cpu"), table, ratios, options.json)


if __name__ == "__main__":
    main()
