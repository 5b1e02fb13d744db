"""Grounding: how much better an answer follows from the kept tokens than from as many others."""

import math

import pytest
import torch
from test_prefix import asked, encoded, text_of

import ask
import evaluate_hf
from conftest import IM_END, ROOT, tiny_model
from photon import asking
from photon.evaluation.models import VolumeModel
from photon.objectives_photon import other_tokens

STOPS = [IM_END]


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def answered(model, inputs, length=4):
    """Sequences as `generate` returns them: the answers of the second row on end early, and are padded."""
    answers = torch.arange(30, 30 + length).repeat(len(inputs["input_ids"]), 1)
    answers[1:, length - 2] = IM_END
    model.generation_config.eos_token_id = IM_END
    return torch.cat([inputs["input_ids"], answers], dim=1)


def plain_log_prob(model, inputs, sequence, row, **options):
    """log p of a row's answer up to its stop token, token by token, from full-length logits."""
    length = inputs["input_ids"].shape[1]
    new = sequence[row, length:].tolist()
    new = new[: new.index(IM_END) + 1] if IM_END in new else new
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(sequence[:, length:])], dim=1)
    types = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(sequence[:, length:])], dim=1)
    given = inputs | {"input_ids": sequence, "attention_mask": mask, "mm_token_type_ids": types} | options
    logits = model(**given, output_full_length=True).logits[row].log_softmax(-1)
    return sum(logits[length + i - 1, token] for i, token in enumerate(new))


@torch.no_grad()
def test_grounding_is_a_difference_of_log_probabilities(model):
    inputs = asked()
    sequences = answered(model, inputs)
    found = model.grounding(sequences, draws=2, **inputs)
    for row in range(len(sequences)):
        kept = plain_log_prob(model, inputs, sequences, row)
        others = [plain_log_prob(model, inputs, sequences, row, others=seed) for seed in range(2)]
        assert found[row].item() == pytest.approx((kept - sum(others) / 2).item(), abs=1e-4)
    assert (found.abs() > 1e-4).any()


@torch.no_grad()
def test_batch_as_single_and_behind_a_prefix(model):
    inputs = asked()
    sequences = answered(model, inputs)
    batch = model.grounding(sequences, **inputs)
    behind = model.grounding(sequences, **text_of(inputs), scan=encoded(model))
    torch.testing.assert_close(behind, batch, atol=1e-4, rtol=1e-4)
    for row, single in enumerate(inputs["input_ids"]):
        real = inputs["attention_mask"][row].bool()
        one = {name: inputs[name][row : row + 1, real] for name in text_of(inputs)}
        sequence = torch.cat([single[real], sequences[row, len(single) :]])[None]
        alone = model.grounding(sequence, **one, scan=encoded(model))
        torch.testing.assert_close(alone, batch[row : row + 1], atol=1e-4, rtol=1e-4)


def test_others_are_as_many_and_none_that_was_kept():
    generator = torch.Generator().manual_seed(0)
    visual = torch.arange(40) < torch.tensor([40, 25, 7])[:, None]
    keep = (torch.rand(3, 40, generator=generator) < 0.3) & visual
    keep[2] = visual[2] & (torch.arange(40) < 5)  # two others are left
    others = other_tokens(keep, visual, seed=3)
    assert not (others & keep).any() and not (others & ~visual).any()
    assert others.sum(-1).tolist() == [int(keep[0].sum()), int(keep[1].sum()), 2]
    assert torch.equal(other_tokens(keep[1:2, :25], visual[1:2, :25], 3)[0], others[1, :25])  # without the other rows
    assert not torch.equal(other_tokens(keep, visual, seed=4), others)


def test_sequences_must_begin_with_the_prompts(model):
    inputs = asked()
    with pytest.raises(ValueError, match="begin with the prompts"):
        model.grounding(inputs["input_ids"], **inputs)


@torch.no_grad()
def test_without_a_scan_there_is_nothing_to_tell(model):
    inputs = {"input_ids": torch.tensor([[11, 12, 13]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    sequences = torch.tensor([[11, 12, 13, 30, IM_END]])
    model.generation_config.eos_token_id = IM_END
    assert model.grounding(sequences, **inputs).isnan().all()


def test_pipeline_ask_and_evaluation_tell_the_same(pipe, scans):
    questions = ["Is there a lesion in the liver?", "Which kidney has a lesion, left or right?", "Is it?"]
    piped = pipe(scans[0], questions, grounding=True)
    assert all("grounding" not in answer for answer in pipe(scans[0], questions))
    alone = [pipe(scans[0], question, grounding=True)["grounding"] for question in questions]
    told = [a["grounding"] for a, _, _ in asking.ask_all(pipe.processor, pipe.model, scans[:1], questions, True)]
    model = VolumeModel(pipe.processor, pipe.model, 64, None, True)
    encoded = [model.encode(pipe.processor.image_processor(scans[:1], return_tensors="pt"))]
    chats = [[{"type": "volume"}, {"type": "text", "text": question}] for question in questions]
    rows = [{"messages": [{"role": "user", "content": chat}, None]} for chat in chats]
    scored = [answer["grounding"] for answer in model.answer(rows, encoded)]
    values = [answer["grounding"] for answer in piped]
    assert len(set(values)) == 3 and all(map(math.isfinite, values))
    for other in (alone, told, scored):
        assert other == pytest.approx(values, abs=1e-3)
    few = pipe(scans[0], questions[0], grounding=True, token_budget=9)["grounding"]  # of the set that was asked for
    asked = asking.ask(pipe.processor, pipe.model, scans[:1], questions[0], grounding=True, token_budget=9)
    assert few == pytest.approx(asked[0]["grounding"], abs=1e-3) != pytest.approx(alone[0], abs=1e-3)


def test_commands_refuse_what_has_no_grounding(tmp_path, capsys):
    for command, arguments in (
        (
            evaluate_hf,
            ["--benchmark", "jsonl", "--data", "x", "--model", str(ROOT), "--output", "x", "--scheduler", "off"],
        ),
        (ask, ["scan.nii.gz", "Is it?", "--dense"]),
    ):
        with pytest.raises(SystemExit):
            command.parse([*arguments, "--grounding"])
        assert "--grounding" in capsys.readouterr().err.splitlines()[-1]
