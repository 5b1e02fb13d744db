"""The promise of the repository: a copied folder, a fresh process, an empty HF_HOME, and `trust_remote_code`."""

import json
import shutil
import warnings

import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Trainer,
    TrainingArguments,
)

from conftest import ROOT, TOKENS, collate, real, run_fresh, three_rows, tiny_model
from photon import configuration_photon, modeling_photon, pipeline_photon, processing_photon
from photon.configuration_photon import PhotonConfig
from photon.loading import load
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.phantoms.patient import make_patient

TOOLS = {"convert_photon.py"}  # of this suffix, but nothing in a checkpoint imports it
PIPELINE = """
import json, sys
from transformers import pipeline
ask = pipeline("volume-question-answering", model=sys.argv[1], trust_remote_code=True)
print(json.dumps(ask(sys.argv[2], ["Is there a lesion in the liver?", "How many kidneys?"], max_new_tokens=6)))
"""
LOGITS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    out = model(**load_file(sys.argv[2]))
save_file({"logits": out.logits, "keep": out.keep_mask}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The root's model and processor as `save_pretrained` writes them, each by itself into one folder."""
    folder = tmp_path_factory.mktemp("elsewhere") / "photon-copy"
    AutoModelForImageTextToText.from_pretrained(ROOT, trust_remote_code=True).save_pretrained(folder)
    AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    path = tmp_path_factory.mktemp("scan") / "phantom.nii.gz"
    sitk.WriteImage(make_patient(1, 3)[0], str(path))
    return path


def piped(folder, scan):
    """Two answers of the folder's pipeline in a fresh process."""
    return json.loads(run_fresh(PIPELINE, folder, scan).splitlines()[-1])


@pytest.fixture(scope="module")
def answers(repository, phantom):
    return piped(repository, phantom)


def code(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*_photon.py") if file.name not in TOOLS}


def test_a_saved_folder_is_what_ships(repository, tmp_path):
    """Code, configuration and weights equal the root's, as saved here and as saved from there in a fresh process."""
    assert code(repository) == code(ROOT)
    for name in ("config.json", "processor_config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((repository / name).read_text("utf-8")) == json.loads((ROOT / name).read_text("utf-8")), name
    for name in ("chat_template.jinja", "model.safetensors"):
        assert (repository / name).read_bytes() == (ROOT / name).read_bytes(), name
    run_fresh(
        """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
for loader in (AutoModelForImageTextToText, AutoProcessor):
    loader.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
""",
        repository,
        tmp_path / "again",
    )
    assert code(tmp_path / "again") == code(ROOT)


def test_one_identity():
    """In a process that imports `photon.loading`, the Auto classes return the classes of `photon`."""
    trust = {"pretrained_model_name_or_path": ROOT, "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(**trust)
    for got, expected in [
        (AutoConfig.from_pretrained(**trust), configuration_photon.PhotonConfig),
        (AutoModel.from_pretrained(**trust), modeling_photon.PhotonModel),
        (AutoModelForImageTextToText.from_pretrained(**trust), modeling_photon.PhotonForConditionalGeneration),
        (AutoModelForMultimodalLM.from_pretrained(**trust), modeling_photon.PhotonForConditionalGeneration),
        (processor, processing_photon.PhotonProcessor),
        (processor.image_processor, processing_photon.PhotonVolumeProcessor),
    ]:
        assert type(got) is expected


def test_a_checkpoint_with_other_code(repository, phantom, answers, tmp_path):
    """Here the root's code runs, with a warning that says so; elsewhere the checkpoint runs its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(repository)  # the same code: no warning
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    source = (other / "pipeline_photon.py").read_text()
    (other / "pipeline_photon.py").write_text(source.replace('"answer": ', '"answer": "its own code: " + '))
    source = (other / "processing_photon.py").read_text()
    (other / "processing_photon.py").write_text(source + "\nITS_OWN_CODE = True\n")
    with pytest.warns(UserWarning, match="differs from this repository's .*This repository's code runs") as caught:
        processor, model = load(other)
    text = str(caught[0].message)
    assert "pipeline_photon.py" in text and "processing_photon.py" in text and "modeling_photon.py" not in text
    assert "outside this repository" in text  # how to run the checkpoint's own
    assert type(processor) is processing_photon.PhotonProcessor
    assert type(model) is modeling_photon.PhotonForConditionalGeneration
    assert [a["answer"] for a in piped(other, phantom)] == ["its own code: " + a["answer"] for a in answers]


def test_a_saved_folder_answers_as_the_root_does(phantom, answers):
    """`pipeline_photon.py` is in the folder, although neither the model nor the processor uses it."""
    processor, model = load(ROOT, "cpu", "bfloat16")
    ask = pipeline_photon.VolumeQuestionAnsweringPipeline(model=model, processor=processor)
    assert answers == ask(str(phantom), ["Is there a lesion in the liver?", "How many kidneys?"], max_new_tokens=6)


def test_every_auto_class(repository):
    print(run_fresh(
        """
import sys, torch
from transformers import (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
                          AutoTokenizer)
trust = {"pretrained_model_name_or_path": sys.argv[1], "trust_remote_code": True}
names = [type(c.from_pretrained(**trust)).__name__ for c in (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor)]
assert names == ["PhotonConfig", "PhotonModel", "PhotonForConditionalGeneration", "PhotonForConditionalGeneration",
                 "PhotonProcessor"], names
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert tokenizer.padding_side == "left" and tokenizer.eos_token == "<|im_end|>"
""",
        repository,
    ))  # fmt: skip


def test_without_trust_it_refuses(repository):
    for loader in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"):
        code = (
            f"import sys\nfrom transformers import {loader}\n"
            f"try: {loader}.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
            "except ValueError as error: assert 'trust_remote_code' in str(error)\n"
            "else: raise SystemExit('it loaded')"
        )
        run_fresh(code, repository)


def test_both_pipelines_on_a_real_scan(repository):
    scan = real("example_ct.nii.gz")
    out = run_fresh(
        """
import json, sys
from transformers import pipeline
repository, scan = sys.argv[1:]
ask = pipeline("volume-question-answering", model=repository, trust_remote_code=True)
one = ask(scan, "Is there a lesion in the liver?", max_new_tokens=6)
many = ask(scan, ["Is there a lesion in the liver?", "How many kidneys?"], max_new_tokens=6, token_budget=9)
pair = ask({"volume": [scan, scan], "question": "Has it grown?"}, max_new_tokens=6, use_scheduler=False)
chat = [{"role": "user", "content": [{"type": "volume", "path": scan}, {"type": "text", "text": "Which side?"}]}]
stock = pipeline("image-text-to-text", model=repository, trust_remote_code=True)(text=chat, max_new_tokens=6)
print(json.dumps([one, many, pair, stock[0]["generated_text"][-1]]))
""",
        repository,
        scan,
    )
    one, many, pair, reply = json.loads(out.strip().splitlines()[-1])
    assert one["tokens_seen"] == TOKENS and 1 <= one["tokens_kept"] <= TOKENS and isinstance(one["answer"], str)
    assert [answer["tokens_kept"] for answer in many] == [9, 9]
    assert pair["tokens_kept"] == pair["tokens_seen"] == 2 * TOKENS
    assert reply["role"] == "assistant" and isinstance(reply["content"], str)


def same_in_a_fresh_process(model, folder, tmp_path):
    inputs = collate(three_rows())
    save_file(inputs, tmp_path / "inputs.safetensors")
    run_fresh(LOGITS, folder, tmp_path / "inputs.safetensors", tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        expected = model.eval()(**inputs)
    assert torch.equal(got["keep"], expected.keep_mask)
    torch.testing.assert_close(got["logits"], expected.logits, atol=2e-5, rtol=1e-5)


def published(tmp_path, **fields):
    """A tiny model in a complete folder, loaded as a user loads it."""
    tiny_model(**fields).save_pretrained(tmp_path / "published")
    return AutoModelForImageTextToText.from_pretrained(
        tmp_path / "published", trust_remote_code=True, dtype=torch.float32
    )


def test_saved_equals_reloaded(tmp_path):
    model = published(tmp_path, scheduler_layer=2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "again")
    same_in_a_fresh_process(model, tmp_path / "again", tmp_path)


def test_trainer_checkpoint_equals_reloaded(tmp_path):
    model = published(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = [{"row": row} for row in three_rows(answers=True) * 2]
    arguments = TrainingArguments(
        output_dir=tmp_path / "run", max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True,
        remove_unused_columns=False, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=data, data_collator=lambda rows: collate([row["row"] for row in rows])
    )
    trainer.train()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    trainer.save_model(tmp_path / "saved")
    same_in_a_fresh_process(model, tmp_path / "saved", tmp_path)


def test_merged_lora_equals_reloaded(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = published(tmp_path)
    lora = LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
        modules_to_save=["scheduler", "patch_embed"],
    )  # fmt: skip
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    inputs = collate(three_rows(answers=True))
    model.train()(**inputs, use_cache=False).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("scheduler.modules_to_save" in name for name in trained)
    assert all("lora" in name or "modules_to_save" in name for name in trained)
    with torch.no_grad():
        unmerged = model.eval()(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, unmerged, atol=2e-5, rtol=1e-4)
    assert torch.equal(merged.generate(**inputs, max_new_tokens=4, do_sample=False), generated)
    merged.save_pretrained(tmp_path / "merged")
    same_in_a_fresh_process(merged, tmp_path / "merged", tmp_path)


def test_the_root_is_what_its_script_builds():
    """Same tokenizer, processor and shapes; the weights may have been trained since."""
    config = json.loads((ROOT / "config.json").read_text())
    model = PhotonForConditionalGeneration(PhotonConfig.from_pretrained(ROOT))
    shapes = {name: list(tensor.shape) for name, tensor in load_file(ROOT / "model.safetensors").items()}
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    expected.pop("lm_head.weight")  # tied
    assert shapes == expected
    assert (ROOT / "model.safetensors").stat().st_size <= 8 * 2**20
    assert set(config["auto_map"]) == {
        "AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM",
    }  # fmt: skip
