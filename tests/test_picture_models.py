"""Stock models of pictures through `evaluate_hf.py --slices`, each with its own processor: the classes of Lingshu,
MedGemma and others, built small and random, without network.

Processors with a part for videos need torchvision, the one of the installed torch; without it these tests are skipped.

python -m pytest tests/test_picture_models.py
"""

import json

import pytest
import SimpleITK as sitk
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer
from transformers.utils import is_torchvision_v2_available

import evaluate_hf
from conftest import ROOT
from photon.evaluation.dealing import scan_keys
from photon.evaluation.models import load_model
from photon.phantoms import patient as phantom_patient

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}MARK{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BETWEEN = "<|vision_start|><|image_pad|><|vision_end|>"
QUESTIONS = ("Is there a lesion in the liver?", "Which organ has a lesion? Answer with one word.", "How large is it?")
TEXT = {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def tokenizer(**names):
    """The root's, which knows its special tokens by these names too."""
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True, extra_special_tokens=names)


def ids(words, *names):
    marks = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
             "vision_end": "<|vision_end|>"}  # fmt: skip
    return {f"{name}_token_id": words.convert_tokens_to_ids(marks[name]) for name in names}


def text_config(words, **fields):
    return TEXT | {"vocab_size": len(words), "pad_token_id": words.pad_token_id} | fields


def qwen2_5_vl():
    words, size = tokenizer(), {"shortest_edge": 56 * 56, "longest_edge": 56 * 84}
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(size=size), words, transformers.Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE.replace("MARK", BETWEEN),
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 2, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "out_hidden_size": 32,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config(words, rope_parameters=rope), vision_config=vision, tie_word_embeddings=False,
        **ids(words, "image", "video", "vision_start", "vision_end"),
    )  # fmt: skip
    return config, processor


def qwen3_vl():
    words, size = tokenizer(), {"shortest_edge": 64 * 64, "longest_edge": 64 * 96}
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(size=size, patch_size=16), words, transformers.Qwen3VLVideoProcessor(),
        chat_template=TEMPLATE.replace("MARK", BETWEEN),
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {
        "depth": 2, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config=text_config(words, rope_parameters=rope, head_dim=8), vision_config=vision,
        **ids(words, "image", "video", "vision_start", "vision_end"),
    )  # fmt: skip
    return config, processor


def gemma3():
    marks = {"boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>", "image_token": "<|image_pad|>"}
    words = tokenizer(**marks)
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), words, image_seq_length=4,
        chat_template=TEMPLATE.replace("MARK", "<|vision_start|>"),
    )  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 7,
    }  # fmt: skip
    index = {f"{name.split('_')[0]}_token_index": words.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    config = transformers.Gemma3Config(
        text_config=text_config(words, head_dim=8), vision_config=vision, mm_tokens_per_image=4,
        tie_word_embeddings=False, **index,
    )  # fmt: skip
    return config, processor


def llava_onevision():
    words, pinpoints = tokenizer(), [[28, 28], [28, 56], [56, 28]]
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints),
        words, transformers.LlavaOnevisionVideoProcessor(size={"height": 28, "width": 28}), num_image_tokens=16,
        vision_feature_select_strategy="full", image_token="<|image_pad|>", video_token="<|video_pad|>",
        chat_template=TEMPLATE.replace("MARK", "<|image_pad|>"),
    )  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 7, "vision_use_head": False,
    }  # fmt: skip
    index = {name.replace("_id", "_index"): value for name, value in ids(words, "image", "video").items()}
    config = transformers.LlavaOnevisionConfig(
        text_config=text_config(words, model_type="qwen2"), vision_config=vision, image_grid_pinpoints=pinpoints,
        **index,
    )  # fmt: skip
    return config, processor


def internvl():
    words = tokenizer(
        start_image_token="<|vision_start|>", end_image_token="<|vision_end|>", context_image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=2), words,
        transformers.InternVLVideoProcessor(size=size), image_seq_length=4,
        chat_template=TEMPLATE.replace("MARK", "<|image_pad|>"),
    )  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": [28, 28], "patch_size": [7, 7],
    }  # fmt: skip
    config = transformers.InternVLConfig(
        text_config=text_config(words, model_type="qwen2"), vision_config=vision, image_seq_length=4,
        tie_word_embeddings=False, **ids(words, "image"),
    )  # fmt: skip
    return config, processor


FAMILIES = {
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl,
    "Qwen3VLForConditionalGeneration": qwen3_vl,
    "Gemma3ForConditionalGeneration": gemma3,
    "LlavaOnevisionForConditionalGeneration": llava_onevision,
    "InternVLForConditionalGeneration": internvl,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two scans; three questions on the first, one of them a choice, and one on both."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(2):
        image, *_ = phantom_patient.make_patient(seed=3, patient=number)
        sitk.WriteImage(image, str(folder / f"scan{number}.nii.gz"))
    rows = []
    for number, text in enumerate((*QUESTIONS, "Has it grown?")):
        scans = ["scan0.nii.gz", "scan1.nii.gz"] if number == 3 else ["scan0.nii.gz"]
        content = [*[{"type": "volume"}] * len(scans), {"type": "text", "text": text}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "B"}]}
        choice = {"options": {"A": "yes", "B": "no"}, "answer": "B"} if number == 0 else {"answer": "B"}
        rows.append(
            {"id": str(number), "task": "any", "patient": str(number), "volumes": scans, **choice,
             "messages": [{"role": "user", "content": content}, answer]}
        )  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stock_model_answers_about_slices(data, tmp_path, name, monkeypatch):
    if name != "Gemma3ForConditionalGeneration" and not is_torchvision_v2_available():
        pytest.skip("its processor needs torchvision, the one of the installed torch (requirements-train.txt)")
    folder = tmp_path / "model"
    config, processor = FAMILIES[name]()
    torch.manual_seed(2)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2 / parameter.shape[1:].numel() ** 0.5)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    used = []

    def load(*args, **settings):
        used.append(load_model(*args, **settings))
        return used[-1]

    monkeypatch.setattr("photon.evaluation.run.load_model", load)
    evaluate_hf.main(
        ["--model", str(folder), "--benchmark", "jsonl", "--data", str(data / "questions.jsonl"), "--slices", "3",
         "--output", str(tmp_path / "run"), "--max-new-tokens", "4", "--choices", "logprob", "--bootstrap", "9"]
    )  # fmt: skip
    lines = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    records = {record["id"]: record for record in map(json.loads, lines)}
    assert len(records) == 4 and {*next(iter(records.values()))["choice_logprobs"]} == {"A", "B"}
    (loaded,) = used
    assert type(loaded.model) is type(model) and type(loaded.processor) is type(processor)
    rows = evaluate_hf.questions(evaluate_hf.parse(
        ["--model", str(folder), "--benchmark", "jsonl", "--data", str(data / "questions.jsonl"), "--output", "x"]
    ))  # fmt: skip
    for row in rows:
        by_letter = row["kind"] == "choice"
        scans = [loaded.encode(loaded.read_or_refuse(key)) for key in scan_keys(row)]
        assert [len(scan) for scan in scans] == [3] * len(scans)
        (alone,) = loaded.answer([row], scans, by_letter)
        assert alone["prediction"] == records[row["id"]]["prediction"]
        blank = [[Image.new("RGB", picture.size) for picture in scan] for scan in scans]
        if by_letter:  # it looks at the slices
            assert loaded.answer([row], blank, True)[0]["choice_logprobs"] != alone["choice_logprobs"]
