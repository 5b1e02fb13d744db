"""Writes a complete Photon folder from the authors' checkpoint, or from a Qwen2.5-VL checkpoint.

    python convert_photon.py --official Alibaba-DAMO-Academy/Photon-S2 --revision BRANCH --output photon-s2
    python convert_photon.py --qwen Qwen/Qwen2.5-VL-3B-Instruct --output photon-3b-start

`--official` takes a folder or a Hub id (Photon-S2 has one branch for each benchmark). The result behaves as the
release does: keys and values of the early layers are evicted too, with its surrogate gradient and min-max scaling.
`--qwen` gives a model to train. Its 3D patch embedding is inflated from the 2D one, so that a volume of equal slices
gives the same answer as the grey image of one slice; with `--random-patch-embed` it is random, as the authors begin.
Every key of a checkpoint must find its place; a missing or unexpected one stops the conversion. Weights keep their
type. The conversion needs as much memory as the weights take.
"""

import argparse
import sys
from pathlib import Path

from photon.console import one_line_faults
from photon.conversion import from_official, from_qwen, local_folder, save_processor
from photon.loading import complete_generation_config


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--official", metavar="DIR|HUB_ID", help="a checkpoint of the authors' release")
    source.add_argument("--qwen", metavar="DIR|HUB_ID", help="a Qwen2.5-VL checkpoint")
    parser.add_argument("--revision", metavar="BRANCH", help="branch of a Hub id")
    parser.add_argument("--random-patch-embed", action="store_true", help="with --qwen: do not inflate")
    parser.add_argument("--output", metavar="DIR", required=True, type=Path, help="new folder for the Photon model")
    args = parser.parse_args(argv)
    if args.official and args.random_patch_embed:
        parser.error("--random-patch-embed is for --qwen; the release's checkpoints have a 3D patch embedding.")
    if args.output.exists() and any(args.output.iterdir()):
        parser.error("--output is not empty; name a new folder.")
    return args


def convert(args):
    """Write the Photon folder; returns its model, and whether the source had a tokenizer for a processor."""
    folder = local_folder(args.official or args.qwen, args.revision)
    if args.official:
        model, volume_fields = from_official(folder)
    else:
        model, volume_fields = from_qwen(folder, args.random_patch_embed)
    args.output.mkdir(parents=True, exist_ok=True)
    with_processor = save_processor(folder, args.output, model.config, volume_fields)
    complete_generation_config(model)
    model.save_pretrained(args.output, save_original_format=False)  # under our names, not those of the source
    return model, with_processor


def main(argv=None):
    args = parse(argv)
    with one_line_faults():
        model, with_processor = convert(args)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e6:.1f} M parameters, scheduling layer {model.config.scheduler_layer}.", file=sys.stderr)
    if not with_processor:
        print("The source has no tokenizer, so no processor was written.", file=sys.stderr)


if __name__ == "__main__":
    main()
