"""Where to cut, and by which score: a model's accuracy at other layers, saliencies and budgets, untuned for them.

    python benchmarks/selection.py --model DIR --data QUESTIONS.jsonl --json benchmarks/results/selection.json

For each `scheduler_layer` and `saliency` the same weights are loaded. The share of most salient visual tokens is given
(`keep_ratio`), so a learnt threshold plays no part. At 0 all visual tokens are withdrawn after the layer: what is
still answered then, the question read before the cut. `all` keeps every token.
"""

import sys

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from common import QUESTIONS, ROOT, arguments, report

sys.path.insert(0, str(ROOT))

from photon.evaluation.dealing import batches, grouped
from photon.evaluation.encoded_scans import EncodedScans
from photon.evaluation.models import VolumeModel
from photon.evaluation.questions import load_benchmark

SETTINGS = [(layer, saliency) for layer in (-1, 0, 1) for saliency in ("attention", "logits")]
SHARES = (0.4, 0.2, 0.1, 0.04, 0.0)


def load(source, layer, saliency, cache_dir):
    options = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(source, **options)
    config = type(config).from_dict(config.to_dict() | {"scheduler_layer": layer, "saliency": saliency})
    model = AutoModelForImageTextToText.from_pretrained(source, config=config, dtype=torch.float32, **options).eval()
    return VolumeModel(AutoProcessor.from_pretrained(source, **options), model, 6, cache_dir=cache_dir)


def main():
    options = arguments(__doc__, ["cpu"], **QUESTIONS)
    rows = load_benchmark("jsonl", options.data, limit=options.limit)
    models = {setting: load(options.model, *setting, options.cache_dir) for setting in SETTINGS}
    first, groups = next(iter(models.values())), grouped(rows)
    scans, hits = EncodedScans(first, list(groups)), {}
    for key, asked in tqdm(groups.items(), unit="scan"):
        encoded = scans.take(key)
        for batch in batches(asked, 16, by_letter=False):
            for setting, model in models.items():
                for share in (*SHARES, None) if model is first else SHARES:
                    model.options = {"use_scheduler": False} if share is None else {"keep_ratio": share}
                    name = ("all", "", 1.0) if share is None else (*setting, share)
                    answers = [answer["prediction"].casefold() for answer in model.answer(batch, encoded)]
                    right = [text == row["answer"].casefold() for text, row in zip(answers, batch, strict=True)]
                    hits.setdefault(name, []).extend(right)
    table = [
        {
            "scheduler_layer": layer,
            "saliency": saliency,
            "kept": share,
            "accuracy": sum(right) / len(right),
            "questions": len(right),
        }
        for (layer, saliency, share), right in sorted(hits.items(), key=lambda item: tuple(map(str, item[0])))
    ]
    report(torch.device("cpu"), table, {}, options.json)


if __name__ == "__main__":
    main()
