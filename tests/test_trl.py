"""Other trainers than ours: TRL's SFTTrainer, the plain Trainer with metrics, log-probabilities as GRPO needs them."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from test_training import write_data, write_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from conftest import run_fresh
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.pipeline_photon import VolumeQuestionAnsweringPipeline
from photon.rows import RowError
from photon.training.batches import ChatCollator
from photon.training.data import load_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return load_rows(write_data(tmp_path_factory.mktemp("data") / "rows") / "train.jsonl")


def load(folder, scheduler):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert type(model) is PhotonForConditionalGeneration
    model.config.use_scheduler = scheduler
    model.set_scheduler_phase("hard")
    return model


OPTIONS = {
    "max_steps": 1, "per_device_train_batch_size": 8, "use_cpu": True, "logging_steps": 1, "report_to": [],
    "save_strategy": "no", "remove_unused_columns": False, "gradient_checkpointing": False, "optim": "sgd",
    "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "disable_tqdm": True, "bf16": False,
    "dataloader_pin_memory": False,
}  # fmt: skip


@pytest.mark.parametrize("scheduler", [False, True])
def test_sft_of_trl_trains_as_a_plain_loop_does(folder, processor, rows, tmp_path, scheduler):
    """A step of SGD on all rows: loss and gradients are those of the model's own forward. The scheduler learns too."""
    args = SFTConfig(str(tmp_path), **OPTIONS, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    model, collator = load(folder, scheduler), ChatCollator(processor, output_full_length=True)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, data_collator=collator, processing_class=processor)
    trainer.train()
    (loss,) = [line["loss"] for line in trainer.state.log_history if "loss" in line]

    plain, batch = load(folder, scheduler).train(), ChatCollator(processor)(list(rows))
    assert "output_full_length" not in batch
    wanted = plain(**batch).lm_loss
    assert loss == pytest.approx(wanted.item(), rel=1e-4)
    wanted.backward()
    for (name, trained), parameter in zip(model.named_parameters(), plain.parameters(), strict=True):
        change = (trained - parameter).detach()
        if ".scheduler." not in name:
            torch.testing.assert_close(change, -0.1 * parameter.grad, atol=1e-6, rtol=1e-3, msg=name)
        assert bool(change.any()) == (scheduler or ".scheduler." not in name), name


def test_metrics_of_a_plain_trainer_get_logits_of_the_labels_length(folder, processor, rows, tmp_path):
    shapes = []

    def compute_metrics(prediction):
        logits, labels = prediction.predictions, prediction.label_ids
        shapes.append((logits.shape[:2], labels.shape))
        learned = labels[:, 1:] != -100
        return {"right": (logits[:, :-1].argmax(-1) == labels[:, 1:])[learned].mean(), "learned": learned.sum()}

    args = TrainingArguments(str(tmp_path), **OPTIONS, per_device_eval_batch_size=4)
    collator = ChatCollator(processor, output_full_length=True)
    trainer = Trainer(
        load(folder, True), args, collator, eval_dataset=rows, processing_class=processor,
        compute_metrics=compute_metrics, preprocess_logits_for_metrics=lambda logits, labels: logits[0]
        if isinstance(logits, tuple) else logits,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert shapes[0][0] == shapes[0][1] and 0 <= metrics["eval_right"] <= 1
    batch = ChatCollator(processor)(list(rows))
    assert metrics["eval_learned"] == int((batch["labels"][:, 1:] != -100).sum())
    with torch.no_grad():
        short = load(folder, True).eval()(**batch).logits
    assert short.shape[1] < batch["labels"].shape[1]


def test_log_probabilities_of_sampled_answers(folder, processor, rows):
    """What a GRPO-style step needs: the policy's log-probabilities of what it sampled, from one forward."""
    model = load(folder, True).eval()
    model.generation_config.suppress_tokens = None
    prompts = ChatCollator(processor, answers=False)(list(rows)[:3])
    length = prompts["input_ids"].shape[1]
    torch.manual_seed(0)
    sampled = model.generate(
        **prompts, do_sample=True, max_new_tokens=5, min_new_tokens=5, output_logits=True, return_dict_in_generate=True
    )
    answers = sampled.sequences[:, length:]
    expected = torch.stack(sampled.logits, 1).log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    batch = prompts | {"input_ids": sampled.sequences, "output_full_length": True}
    more = torch.ones_like(answers)
    batch["attention_mask"] = torch.cat([prompts["attention_mask"], more], 1)
    batch["mm_token_type_ids"] = torch.cat([prompts["mm_token_type_ids"], 0 * more], 1)
    logits = model(**batch).logits
    assert logits.shape[1] == length + 5
    found = logits[:, length - 1 : -1].log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    advantages = torch.tensor([1.0, -1.0, 0.5])
    (-(advantages[:, None] * found).mean()).backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


SAVED = """
import json, sys
from transformers import pipeline
folder, scan = sys.argv[1:]
pipe = pipeline("volume-question-answering", model=folder, trust_remote_code=True)
print(json.dumps(pipe(scan, "On which side is it?", max_new_tokens=4)))
"""


class Hub:
    """Keeps in a folder what is sent to it."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations, **options):
        for sent in operations:
            shutil.copy(sent.path_or_fileobj, self.folder / sent.path_in_repo)


@pytest.mark.parametrize("save", ["save_pretrained", "save_model", "push_to_hub"])
def test_saved_folders_answer_through_the_pipeline(folder, processor, rows, tmp_path, save, monkeypatch):
    """By another trainer, and by hand; in a fresh process that does not see this repository."""
    model = load(folder, True)
    if save == "save_pretrained":
        model.save_pretrained(tmp_path / "saved")
        processor.save_pretrained(tmp_path / "saved")
    elif save == "push_to_hub":
        hub = Hub(tmp_path / "saved")
        monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
        monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **options: ModelCard(""))
        model.push_to_hub("someone/photon")
        processor.push_to_hub("someone/photon")
    else:
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **OPTIONS), processing_class=processor)
        trainer.save_model(str(tmp_path / "saved"))
    scan = rows[1]["volumes"][0]["path"]
    found = json.loads(run_fresh(SAVED, tmp_path / "saved", scan).splitlines()[-1])
    here = VolumeQuestionAnsweringPipeline(model=model.eval(), processor=processor)
    assert found == here(scan, "On which side is it?", max_new_tokens=4)


def test_hidden_states_of_the_prompts_length(folder, processor, rows):
    """What TRL's head of its own is given; the field of the config does the same."""
    model, batch = load(folder, True).eval(), ChatCollator(processor)(list(rows))
    del batch["labels"]
    with torch.no_grad():
        short, full = model.model(**batch), model.model(**batch, output_full_length=True)
        model.config.output_full_length = True
        assert torch.equal(model.model(**batch).last_hidden_state, full.last_hidden_state)
        assert torch.equal(model(**batch).logits, model.lm_head(full.last_hidden_state))
    assert short.last_hidden_state.shape[1] < full.last_hidden_state.shape[1] == batch["input_ids"].shape[1]
    for row, index in enumerate(short.keep_index):
        real = index >= 0
        assert torch.equal(full.last_hidden_state[row, index[real]], short.last_hidden_state[row, real])
        assert not np.setdiff1d(np.nonzero(full.last_hidden_state[row].any(-1).numpy())[0], index[real].numpy()).size


def test_the_collator_takes_chats(processor, rows):
    """Rows of `load_rows`, the same as chats with the scans in them, and as prompt and completion."""
    chats, pairs = [], []
    for row in rows:
        volumes = iter(row["volumes"])
        messages = [
            {
                "role": message["role"],
                "content": [
                    {"type": "volume", "path": next(volumes)["path"], "text": None}
                    if part["type"] == "volume"
                    else part
                    for part in message["content"]
                ],
            }
            for message in row["messages"]
        ]
        chats.append({"messages": messages})
        pairs.append({"prompt": messages[:-1], "completion": messages[-1:]})
    for answers in (True, False):
        collator = ChatCollator(processor, answers=answers)
        expected = collator(list(rows))
        both = (
            [dict(chat, prompt=None, completion=None) for chat in chats[:4]]
            + [  # as Arrow fills them
                dict(pair, messages=None) for pair in pairs[4:]
            ]
        )
        for other in (chats, pairs, both):
            found = collator(other)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert ("labels" in expected) == answers
    with pytest.raises(RowError, match="a row: expected messages, .*; it has question, image. .*remove_unused_col"):
        ChatCollator(processor)([{"question": "Where?", "image": None}])
    with pytest.raises(RowError, match="a row: .* tokens, but max_length is 30"):
        ChatCollator(processor, max_length=30)(chats)
