"""Which share of the places above the cut is padding, by how questions are batched.

    python benchmarks/padding.py --model . --data QUESTIONS.jsonl --json benchmarks/results/padding.json

Every question is asked once, and the places that its row keeps are noted. `one scan` are the batches that
`evaluate_hf.py` makes; `any scan` are random batches, as in training, where flash and flex attention need no padding.
"""

import random
import sys

import torch
from tqdm import tqdm

from common import QUESTIONS, ROOT, arguments, report

sys.path.insert(0, str(ROOT))

from photon.evaluation.dealing import batches, grouped
from photon.evaluation.encoded_scans import EncodedScans
from photon.evaluation.models import load_model
from photon.evaluation.questions import load_benchmark
from photon.prompt_photon import recorded_outputs

SIZES = (4, 8, 16)
WORDS = 1  # tokens of each answer, so that a call of the decoder is a prompt


def padding(parts):
    """The share of padding in batches of rows of these lengths."""
    places = sum(max(part) * len(part) for part in parts)
    return 1 - sum(map(sum, parts)) / places


def split(lengths, size):
    return [lengths[i : i + size] for i in range(0, len(lengths), size)]


def main():
    options = arguments(__doc__, ["cpu"], **QUESTIONS)
    rows = load_benchmark("jsonl", options.data, limit=options.limit)
    answering = load_model(
        options.model, torch.device("cpu"), dtype="float32", max_new_tokens=WORDS, cache_dir=options.cache_dir
    )
    decoder, groups, recorded = answering.model.model.language_model, grouped(rows), {}
    scans = EncodedScans(answering, list(groups))
    by_scan = {size: [] for size in SIZES}
    for key, asked in tqdm(groups.items(), unit="scan"):
        encoded = scans.take(key)
        ordered = []
        for batch in batches(asked, max(SIZES), by_letter=False):
            with recorded_outputs(recorded, decoder):
                answering.answer(batch, encoded)
            ordered += (recorded[decoder].keep_index >= 0).sum(-1).tolist()
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
