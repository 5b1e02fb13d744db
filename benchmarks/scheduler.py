"""Seconds of prefill with and without the cut, in one process, beside the ratio that the operation count gives.

    python benchmarks/scheduler.py --preset cpu --json results/scheduler_cpu.json
    python benchmarks/scheduler.py --preset 3b                                       # on a GPU, bfloat16

One prompt of 1,000 visual and 80 text tokens goes through the decoder (the vision tower is the same in both); 39 % of
the visual tokens are kept; weights are random. `scheduler_share` is the time of scoring, deciding and gathering over
the time of the dense prefill.
"""

import json

import torch

from common import ROOT, arguments, interleaved, report
from photon.configuration_photon import PhotonConfig
from photon.decoder_photon import PhotonTextModel
from photon.objectives_photon import surrogate_gather
from photon.scheduling_photon import ScanRequest, padded_places, stays

VISUAL, QUESTION, TEXT, KEPT = 1000, 24, 80, 0.39
PRESETS = {
    "cpu": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2,
            "intermediate_size": 1536, "vocab_size": 1024, "mrope": [8, 12, 12],
            "bos_token_id": None, "eos_token_id": None},
    "3b": json.loads((ROOT / "configs" / "photon_3b.json").read_text())["text_config"],
}  # fmt: skip


def build(preset, device, dtype):
    text = dict(PRESETS[preset])
    if "mrope" in text:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope")}
    config = PhotonConfig(text_config=text, vision_config={"depth": 1})
    torch.manual_seed(0)
    decoder = PhotonTextModel._from_config(config.text_config, photon=config)
    return decoder.to(device, dtype).eval(), config


def operations(config, lengths):
    """Operations of one prefill (multiply-adds times two) with causal attention; lengths: one a layer."""
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    attention = text.hidden_size * (2 * text.hidden_size + 2 * text.num_key_value_heads * head)
    weights = attention + 3 * text.hidden_size * text.intermediate_size
    return sum(2 * weights * n + 2 * n * n * text.hidden_size for n in lengths)


def main():
    options = arguments(
        __doc__, list(PRESETS), repeats={"type": int, "default": 9}, dtype={"choices": ["float32", "bfloat16"]}
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    decoder, config = build(options.preset, device, dtype)
    length, before = VISUAL + TEXT, (TEXT - QUESTION) // 2
    embeds = torch.randn(1, length, config.text_config.hidden_size, device=device, dtype=dtype)
    visual = torch.zeros(1, length, dtype=torch.bool, device=device)
    question = visual.clone()
    visual[:, before : before + VISUAL] = True
    question[:, before + VISUAL : before + VISUAL + QUESTION] = True
    count = torch.tensor([round(KEPT * VISUAL)], device=device)
    masks = {"visual_mask": visual, "question_mask": question, "keep_count": count}

    @torch.no_grad()
    def dense():
        decoder(inputs_embeds=embeds, use_cache=True)

    @torch.no_grad()
    def pruned():
        decoder(inputs_embeds=embeds, use_cache=True, **masks)

    positions = torch.arange(length, device=device).expand(3, 1, -1)
    request = ScanRequest(visual, question, torch.ones_like(visual), count)
    layer = decoder.layers[decoder.scoring_layer]

    @torch.no_grad()
    def scheduler_alone():  # what the pruned prefill does besides running layers
        rotary = decoder.rotary_emb(embeds, positions)
        scores = layer.scores(embeds, rotary, *decoder.score_places(request))
        schedule = decoder.scheduler(decoder.scheduler_inputs(request, scores, embeds, layer))
        index = padded_places(stays(visual, schedule.keep_mask, request.real))
        short = surrogate_gather(embeds, schedule, request.visual_index, request.visual, index, config)
        decoder.rotary_emb(short, positions[..., : short.shape[1]])

    seconds = interleaved({"dense": dense, "pruned": pruned, "scheduler": scheduler_alone}, device, options.repeats)
    layers, cut = config.text_config.num_hidden_layers, config.scheduler_layer + 1
    short = TEXT + int(count)
    work = {
        "dense": operations(config, [length] * layers),
        "pruned": operations(config, [length] * cut + [short] * (layers - cut)),
    }
    rows = [
        {"prefill": name, "tokens": tokens, "GFLOP": work[name] / 1e9, "ms": 1e3 * seconds[name],
         "GFLOP/s": work[name] / 1e9 / seconds[name]}
        for name, tokens in (("dense", length), ("pruned", short))
    ]  # fmt: skip
    speedup, bound = seconds["dense"] / seconds["pruned"], work["dense"] / work["pruned"]
    ratios = {
        "prefill_speedup": speedup,
        "prefill_bound": bound,
        "speedup_over_bound": speedup / bound,
        "scheduler_share": seconds["scheduler"] / seconds["dense"],
    }
    report(device, rows, ratios, options.json)


if __name__ == "__main__":
    main()
