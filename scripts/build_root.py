"""Writes the tiny model of the repository's root: tokenizer, processor, configuration and random weights.

    python scripts/build_root.py [--output DIR]

The tokenizer is a byte-level BPE trained on phantom questions, with Qwen's special tokens. The weights are random;
`runs/tiny_cpu.sh` trains them. Running the script again gives the same files.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from photon.configuration_photon import PhotonConfig
from photon.loading import build_processor  # noqa: E402
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.phantoms.patient import PhantomConfig
from photon.phantoms.questions import question_texts

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
ROLES = ["system", "user", "assistant", "You are a helpful assistant.", "Scan 1: ", "Scan 2: "]
VOCABULARY = 1024
TEXTS = 200  # of each task; a tokenizer that has not met a size cuts it into digits, and then no letter is learnt
DIAMETERS = (20.0, 29.0, 42.0)  # mm, of runs/tiny_cpu.sh
# phantoms have voxels of 4 to 6 mm, so that a patch of 7 x 7 x 7 voxels of 4 mm shows a lesion as well as 14 x 14 x 14
# would, and is learnt sooner. 12 x 5 x 7 = 420 tokens over 336 x 280 x 392 mm
GRID, SPACING, PATCH = (84, 70, 98), (4.0, 4.0, 4.0), 7
WINDOW = (-200.0, 400.0)  # soft tissue fills it
SEED = 0
HIDDEN, LAYERS, HEADS, KEY_HEADS = 128, 4, 4, 2
VISION_HIDDEN, VISION_LAYERS, VISION_HEADS = 128, 2, 4


def corpus():
    """Questions and answers of all tasks, of two sets of sizes, and the chat's fixed words."""
    for diameters in (DIAMETERS, PhantomConfig().diameters):
        yield from question_texts(PhantomConfig(diameters=diameters), TEXTS)
    yield from ROLES * TEXTS


def build_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        padding_side="left",
        model_max_length=4096,
    )


def fields_of(pairs):
    """{name: value} of NAME=VALUE, values as JSON."""
    return {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in pairs)}


def build_config(tokenizer, layers=LAYERS, **fields):
    head = HIDDEN // HEADS
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": HIDDEN**-0.5,  # the usual 0.02 suits a width of 2,048; here learning would start late
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16],
        },
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "depth": VISION_LAYERS,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": 3 * VISION_HIDDEN,
        "num_heads": VISION_HEADS,
        "out_hidden_size": HIDDEN,
        "initializer_range": VISION_HIDDEN**-0.5,
        "patch_size": PATCH,
        "spatial_patch_size": PATCH,
        "temporal_patch_size": PATCH,
        "window_size": 16 * PATCH,  # wider than a slab, so that a patch attends to its whole slab
        "fullatt_block_indexes": [VISION_LAYERS - 1],
    }
    return PhotonConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        # cut before the first layer, where no question has read the scan yet
        **({"scheduler_layer": -1, "robust_probability": 0, "flip_probability": 0} | fields),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT, help="folder to write to (default: the repository)")
    parser.add_argument("--tower", type=Path, metavar="DIR", help="take the vision tower's weights from this model")
    parser.add_argument("--photon", nargs="*", default=[], metavar="NAME=VALUE", help="fields of PhotonConfig to set")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the decoder")
    parser.add_argument("--seed", type=int, default=SEED, help="of the random weights")
    args = parser.parse_args(argv)
    output = args.output
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = build_config(tokenizer, args.layers, **fields_of(args.photon))
    # centred, because the patch embedding has no bias and most of a scan is air
    processor = build_processor(
        tokenizer,
        config,
        {"grid": GRID, "spacing": SPACING, "patch_size": PATCH, "window": WINDOW, "mean": 0.5, "std": 0.5},
    )
    torch.manual_seed(args.seed)
    model = PhotonForConditionalGeneration(config).to(torch.bfloat16)
    with torch.no_grad():  # offsets of either sign from the start
        model.model.language_model.scheduler.predictor.mlp[-1].bias.zero_()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[3:]),  # they mark the input
        max_new_tokens=64,
        do_sample=False,
    )
    if args.tower:
        tower = AutoModelForImageTextToText.from_pretrained(args.tower, trust_remote_code=True, dtype=torch.bfloat16)
        model.model.visual.load_state_dict(tower.model.visual.state_dict())
    processor.save_pretrained(output)
    model.save_pretrained(output)


if __name__ == "__main__":
    main()
