"""Questions on one scan asked together against the same questions asked one by one, in one process.

    python benchmarks/evaluation.py --preset cpu --json benchmarks/results/evaluation_cpu.json
    python benchmarks/evaluation.py --preset 3b                                       # on a GPU, bfloat16

One by one, each question reads the scan, encodes it and answers, as `ask.py` does; together, `evaluate_hf.py` reads
and encodes the scan once and answers in one batch. The scan is a phantom in a .nii.gz file, weights are random, 39 %
of the visual tokens are kept, and every answer has the same length. `grouped_bound` is the ratio of the operations
that the model must do, vision tower and decoder; reading, which is no operation of the model, is left out of it and of
`grouped_speedup_without_reading`.
"""

import json
import statistics
import tempfile
from pathlib import Path

import SimpleITK as sitk
import torch
from scheduler import operations

from common import ROOT, arguments, interleaved, report
from photon.configuration_photon import PhotonConfig
from photon.evaluation.encoded_scans import EncodedScans
from photon.evaluation.models import VolumeModel
from photon.loading import build_processor
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.phantoms.patient import PhantomConfig, make_patient

KEPT, ANSWER = 0.39, 8
ORGANS = ("liver", "spleen", "left kidney", "right kidney", "left lung", "right lung", "pancreas", "aorta")
FIELDS = ("text_config", "vision_config", "scheduler_layer", "tie_word_embeddings")
PRESETS = {
    # vision tower and decoder in about the proportion of 3b
    "cpu": {
        "text_config": {
            "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2,
            "intermediate_size": 1536, "vocab_size": 1024, "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        "vision_config": {
            "depth": 6, "hidden_size": 320, "intermediate_size": 860, "num_heads": 5, "out_hidden_size": 512,
            "fullatt_block_indexes": [2, 5],
        },
        "scheduler_layer": 2,
    },
    "3b": {k: v for k, v in json.loads((ROOT / "configs" / "photon_3b.json").read_text()).items() if k in FIELDS},
}  # fmt: skip


def build(preset, device, dtype):
    """A random model of the preset's size with the tokenizer of this repository, and its processor."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT)
    root = json.loads((ROOT / "config.json").read_text())
    ids = {name: value for name, value in root.items() if name.endswith("_token_id")}
    fields = json.loads(json.dumps(PRESETS[preset]))
    fields["text_config"] |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = PhotonConfig(**(fields | ids))
    torch.manual_seed(0)
    model = PhotonForConditionalGeneration(config).to(device, dtype).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    options = {"keep_ratio": KEPT, "min_new_tokens": ANSWER}
    return VolumeModel(build_processor(tokenizer, config, {}), model, ANSWER, options)


def vision_operations(config, grid):
    """Multiply-adds times two of the vision tower for one scan of `grid` (t, h, w) patches."""
    vision, (t, h, w) = config.vision_config, grid
    patches, width = t * h * w, vision.hidden_size
    window = (vision.window_size // vision.patch_size) ** 2
    total = 2 * patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width
    for layer in range(vision.depth):
        keys = h * w if layer in vision.fullatt_block_indexes else window  # a depth slab, or a window of one
        total += 2 * patches * (4 * width**2 + 3 * width * vision.intermediate_size) + 4 * patches * keys * width
    merged = width * vision.spatial_merge_size**2
    return total + 2 * patches // vision.spatial_merge_size**2 * (merged**2 + merged * vision.out_hidden_size)


def answer_operations(config, length, visual):
    """The same of the decoder for one question of `length` tokens, `visual` of them of the scan."""
    layers, cut = config.text_config.num_hidden_layers, config.scheduler_layer + 1
    short = length - visual + round(KEPT * visual)
    prefill = operations(config, [length] * cut + [short] * (layers - cut))
    return prefill + (ANSWER - 1) * operations(config, [1] * layers)


def questions(path, count):
    """Rows as `evaluate_hf.py` has them, on one scan, with questions of unlike lengths."""
    rows = []
    for number in range(count):
        text = f"Is there a lesion in the {ORGANS[number % len(ORGANS)]}?" + " Look at all of it." * (number % 3)
        content = [{"type": "volume"}, {"type": "text", "text": text}]
        rows.append({"messages": [{"role": "user", "content": content}, None], "volumes": [str(path)]})
    return rows


def main():
    options = arguments(
        __doc__,
        list(PRESETS),
        repeats={"type": int, "default": 5},
        questions={"type": int, "default": 8, "help": "on the one scan"},
        dtype={"choices": ["float32", "bfloat16"]},
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = build(options.preset, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        image, *_ = make_patient(config=PhantomConfig(size="full"))
        sitk.WriteImage(image, str(path), useCompression=True)
        rows, group = questions(path, options.questions), (json.dumps({"path": str(path)}),)

        def read():
            return model.read_or_refuse(*group)

        def one_by_one():
            return [text for row in rows for text in model.answer([row], [model.encode(read())])]

        def grouped():
            return model.answer(rows, EncodedScans(model, [group]).take(group))

        differ = sum(a["prediction"] != b["prediction"] for a, b in zip(one_by_one(), grouped(), strict=True))
        seconds = interleaved({"read": read, "one by one": one_by_one, "grouped": grouped}, device, options.repeats)
        model_inputs = [model.inputs([chat], [model.encode(read())]) for chat in chats(model, rows)]
    lengths = [inputs["input_ids"].shape[1] for inputs in model_inputs]
    grid = model.processor.image_processor.grid_thw
    visual = grid[0] * grid[1] * grid[2] // model.processor.image_processor.merge_size**2
    config, count = model.model.config, len(rows)
    vision = vision_operations(config, grid)
    answers = sum(answer_operations(config, length, visual) for length in lengths)
    print(
        f"{count} questions of {statistics.mean(lengths):.0f} tokens, {visual} of them visual; {differ} answers differ"
    )
    table = [
        {"questions": name, "read": reads, "encoded": reads, "batches": batches,
         "GFLOP": (reads * vision + answers) / 1e9, "s": seconds[name], "questions/s": count / seconds[name],
         "reading s": reads * seconds["read"]}
        for name, reads, batches in (("one by one", count, count), ("grouped", 1, 1))
    ]  # fmt: skip
    one, together, reading = seconds["one by one"], seconds["grouped"], seconds["read"]
    ratios = {
        "grouped_speedup": one / together,
        "grouped_speedup_without_reading": (one - count * reading) / (together - reading),
        "grouped_bound": (count * vision + answers) / (vision + answers),
        "vision_share": vision / (vision + answers / count),
    }
    report(device, table, ratios, options.json)


def chats(model, rows):
    return [[{"role": "user", "content": row["messages"][0]["content"]}] for row in rows]


if __name__ == "__main__":
    main()
