"""DeepTumorVQA 1.0 as Photon's authors score it, as an `evaluate` module.

    metric = evaluate.load("metrics/deeptumorvqa1")
    metric.compute(predictions=[...], references=[...], types=[...], subtypes=[...], answer_format="mc" or "freetext")

Definitions, read in github.com/alibaba-damo-academy/Photon (`evaluation/multi-choice-evaluation.py`,
`free-text-evaluation.py`, `evaluate_deeptumor_free_text_medical_metrics.py`); code of DeepTumorVQA's authors for 1.0
was not found:

- `exact`: prediction == reference, character by character (no stripping), the share of a subtype's questions;
- `mra`, for nine measuring and counting subtypes in free text: mean relative accuracy. Of each pair the first number
  is read, e = |prediction - reference| / max(|reference|, 1e-6), and the score is the share of the thresholds t in
  0.50, 0.55, ..., 0.95 with e < 1 - t; 0 where either has no number;
- a type's figure is the plain mean of its subtypes', `total` the plain mean of all subtypes' (macro over subtypes);
- `sensitivity` and `specificity`, free text, for the recognition subtypes liver lesion, kidney tumor and pancreatic
  lesion existence: both sides are read as yes or no after white space and punctuation at the ends are removed; pairs
  that are neither are skipped and counted. Macro is the mean over those subtypes with a pair, micro pools the pairs.
  A subtype without a positive (negative) has sensitivity (specificity) 0, as in the script. The script spells these
  subtypes with underscores and the others with blanks; either is taken here.
"""

import re

import datasets
import evaluate
import numpy as np

NUMBER = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?")
THRESHOLDS = [0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95]
MRA_SUBTYPES = {
    "lesion volume measurement", "organ HU measurement", "organ volume measurement", "largest lesion diameter",
    "largest lesion slice", "lesion count by location", "lesion counting", "organ aggregation",
    "tumor organ HU difference",
}  # fmt: skip
EXISTENCE = ("liver lesion existence", "kidney tumor existence", "pancreatic lesion existence")
YES = {"yes", "true", "present", "positive", "exist", "exists", "有", "是", "存在", "阳性", "1"}
NO = {"no", "false", "absent", "negative", "not exist", "无", "否", "不存在", "阴性", "未见", "0"}
ENDS = " .,:;!?，。；：！？"  # noqa: RUF001
_DESCRIPTION = "DeepTumorVQA 1.0: exact match and mean relative accuracy, macro over subtypes."
_INPUTS = """
    predictions, references: lists of str; types, subtypes: lists of str.
    answer_format: "mc" (all subtypes by exact match) or "freetext".
"""


def number(text):
    """The first number in a text, or `None`."""
    match = NUMBER.search(text)
    return float(match[0]) if match else None


def mra(prediction, reference):
    """Mean relative accuracy of one pair, from 0 to 1 in steps of 0.1."""
    predicted, true = number(prediction), number(reference)
    if predicted is None or true is None:
        return 0.0
    error = abs(predicted - true) / max(abs(true), 1e-6)
    return sum(error < (1.0 - threshold) for threshold in THRESHOLDS) / len(THRESHOLDS)


def yes_or_no(text):
    """True, False, or `None` where a text is neither."""
    word = text.strip().lower().strip(ENDS)
    return True if word in YES else False if word in NO else None


def score(prediction, reference, subtype, answer_format):
    """A pair's part in its subtype's figure."""
    if answer_format == "freetext" and _blank(subtype) in MRA_SUBTYPES:
        return mra(prediction, reference)
    return float(prediction == reference)


def _blank(subtype):
    return subtype.replace("_", " ")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class DeepTumorVQA1(evaluate.Metric):
    """Functions of single pairs: `score`, `mra`, `number`. `MRA_SUBTYPES`: the measuring and counting subtypes."""

    score, mra, number = staticmethod(score), staticmethod(mra), staticmethod(number)
    MRA_SUBTYPES = MRA_SUBTYPES

    def _info(self):
        names = ("predictions", "references", "types", "subtypes")
        features = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
        urls = ["https://github.com/alibaba-damo-academy/Photon"]
        cited = "arXiv 2505.18915 (DeepTumorVQA), arXiv 2603.25155 (Photon)"
        return evaluate.MetricInfo(_DESCRIPTION, cited, features, _INPUTS, reference_urls=urls)

    def _compute(self, predictions, references, types, subtypes, answer_format="mc"):
        if answer_format not in ("mc", "freetext"):
            raise ValueError(f'answer_format={answer_format!r}; expected "mc" or "freetext".')
        rows = list(zip(predictions, references, types, subtypes, strict=True))
        groups = {}
        for prediction, reference, kind, subtype in rows:
            groups.setdefault((kind, subtype), []).append(score(prediction, reference, subtype, answer_format))
        by_type = {}
        for (kind, subtype), scores in groups.items():
            name = "mra" if answer_format == "freetext" and _blank(subtype) in MRA_SUBTYPES else "exact"
            entry = {"questions": len(scores), "metric": name, "score": float(np.mean(scores))}
            by_type.setdefault(kind, {"score": None, "subtypes": {}})["subtypes"][subtype] = entry
        for entry in by_type.values():
            entry["score"] = float(np.mean([part["score"] for part in entry["subtypes"].values()]))
        total = float(np.mean([part["score"] for entry in by_type.values() for part in entry["subtypes"].values()]))
        result = {"total": total, "questions": len(rows), "types": by_type}
        if answer_format == "freetext":
            result["existence"] = _existence(rows)
        return result


def _existence(rows):
    """Sensitivity, specificity and accuracy of the existence questions."""
    counts = {name: np.zeros(5, dtype=int) for name in EXISTENCE}  # tp, tn, fp, fn, skipped
    for prediction, reference, kind, subtype in rows:
        if kind.lower().startswith("recognition") and _blank(subtype) in counts:
            found, true = yes_or_no(prediction), yes_or_no(reference)
            slot = 4 if found is None or true is None else (0 if found else 3) if true else (2 if found else 1)
            counts[_blank(subtype)][slot] += 1
    parts = {name: _rates(count) for name, count in counts.items()}
    used = [part for part in parts.values() if part["questions"]]
    names = ("sensitivity", "specificity", "accuracy")
    macro = {name: float(np.mean([part[name] for part in used])) for name in names} if used else None
    return {"subtypes": parts, "macro": macro, "micro": _rates(sum(counts.values())) if used else None}


def _rates(count):
    tp, tn, fp, fn, skipped = (int(x) for x in count)
    share = lambda part, whole: part / whole if whole else 0.0  # noqa: E731
    return {
        "questions": tp + tn + fp + fn, "skipped": skipped, "tp": tp, "tn": tn, "fp": fp, "fn": fn,
        "sensitivity": share(tp, tp + fn), "specificity": share(tn, tn + fp),
        "accuracy": share(tp + tn, tp + tn + fp + fn),
    }  # fmt: skip
