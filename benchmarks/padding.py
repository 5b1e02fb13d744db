"""Which share of the places above the cut is padding, by how questions are batched.

    python benchmarks/padding.py --model . --data QUESTIONS.jsonl --json benchmarks/results/padding.json

Every question is asked once, and the places that its row keeps are noted. `one scan` are the batches that
`evaluate_hf.py` makes; `any scan` are random batches, as in training, where flash and flex attention need no padding.
"""

import random
import sys

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from common import ROOT, arguments, report

sys.path.insert(0, str(ROOT))

from photon.evaluation.dealing import batches, grouped
from photon.evaluation.encoded_scans import EncodedScans
from photon.evaluation.models import VolumeModel
from photon.evaluation.questions import load_benchmark

SIZES = (4, 8, 16)
WORDS = 1  # tokens of each answer: the prompt is what is measured


class Kept:
    """Notes how many places each row of a prompt keeps, from a model's decoder."""

    def __init__(self, decoder):
        self.rows = []
        decoder.register_forward_hook(self._note)

    def _note(self, module, inputs, output):
        if output.keep_index is not None:
            self.rows.append((output.keep_index >= 0).sum(-1).tolist())


def padding(parts):
    """The share of padding in batches of rows of these lengths."""
    places = sum(max(part) * len(part) for part in parts)
    return 1 - sum(map(sum, parts)) / places


def split(lengths, size):
    return [lengths[i : i + size] for i in range(0, len(lengths), size)]


def main():
    options = arguments(
        __doc__,
        ["cpu"],
        model={"required": True, "metavar": "DIR", "help": "folder or Hub id of a Photon model"},
        data={"required": True, "metavar": "FILE", "help": "questions, .jsonl"},
        limit={"type": int, "help": "only so many questions"},
        cache_dir={"metavar": "FOLDER", "help": "keep preprocessed scans in this folder"},
    )
    rows = load_benchmark("jsonl", options.data, limit=options.limit)
    trusted = {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32, **trusted).eval()
    processor = AutoProcessor.from_pretrained(options.model, **trusted)
    answering = VolumeModel(processor, model, WORDS, cache_dir=options.cache_dir)
    kept, groups = Kept(model.model.language_model), grouped(rows)
    scans = EncodedScans(answering, list(groups))
    by_scan = {size: [] for size in SIZES}
    for key, asked in tqdm(groups.items(), unit="scan"):
        encoded = scans.take(key)
        ordered = []
        for batch in batches(asked, max(SIZES), by_letter=False):
            answering.answer(batch, encoded)
            ordered += kept.rows.pop()
        for size in SIZES:
            by_scan[size] += split(ordered, size)
    lengths = [length for part in by_scan[max(SIZES)] for length in part]
    random.Random(0).shuffle(lengths)
    table = [
        {"batch": size, "one scan": padding(by_scan[size]), "any scan": padding(split(lengths, size)),
         "any scan, sorted": padding(split(sorted(lengths), size))}
        for size in SIZES
    ]  # fmt: skip
    report(torch.device("cpu"), table, {}, options.json, questions=len(rows), scans=len(groups))


if __name__ == "__main__":
    main()
