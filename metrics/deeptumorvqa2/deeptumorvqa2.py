"""DeepTumorVQA 2.0 as its authors score it, as an `evaluate` module.

    metric = evaluate.load("metrics/deeptumorvqa2")
    metric.compute(predictions=[...], references=[...], types=[...], subtypes=[...], answer_format="mc" or "freeform")

Definitions, read in github.com/Schuture/DeepTumorVQA (`src/deeptumorvqa/eval/metrics.py`):

- `<think>...</think>` is removed, also where it is never closed;
- "mc": the letter is the first character of the upper-cased answer if that is A to D, else the first of A to D that
  stands alone as a word. So "Answer: C" is read as **A**, "Both" as B and "Cannot tell" as C: answer with the bare
  letter. Where no letter is found, the answer is wrong;
- "freeform": a numeric subtype has `mean_mra`, the mean of max(0, 1 - |p - r| / |r|) with the first number of each
  side (1 or 0 where r is 0), and shares within 5, 10, 20 and 50 %; questions whose reference has no number are left
  out of the mean. This is another MRA than that of 1.0. A binary subtype is read as yes or no, at the answer's
  beginning or as a word, and has accuracy, sensitivity and specificity (for these an unread answer counts as "no").
  Any other subtype is compared without case and punctuation;
- a super-type's figure and `overall` weigh subtypes by their questions (micro), from figures rounded to four digits,
  as the leaderboard's are. The heading of their module says macro; its code does this.
"""

import re

import datasets
import evaluate

NUMERIC = {
    "organ volume measurement", "organ HU measurement", "lesion volume measurement", "organ HU ratio",
    "tumor burden percentage", "largest lesion diameter", "largest lesion slice", "lesion counting",
    "lesion count by location", "organ aggregation", "tumor organ HU difference",
}  # fmt: skip
BINARY = {
    "pancreatic lesion existence", "liver lesion existence", "kidney lesion existence", "kidney tumor existence",
    "kidney cyst existence", "colon lesion existence", "PDAC existence", "PNET existence", "lesion outlier",
    "organ enlargement", "pancreatic steatosis", "pancreatic cyst resectability", "pseudocyst determination",
    "splenomegaly detection", "portal hypertension assessment",
}  # fmt: skip
THINK = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.?\d*")
LETTER = re.compile(r"\b([A-D])\b")
TOLERANCES = (0.05, 0.10, 0.20, 0.50)
_DESCRIPTION = "DeepTumorVQA 2.0: accuracy and mean relative accuracy, weighted by questions."
_INPUTS = """
    predictions: list of str. references: list of str, letters for "mc".
    types, subtypes: lists of str; answer_format: "mc" or "freeform".
"""


def without_thoughts(text):
    return THINK.sub("", text).strip()


def letter(text):
    """The letter that the benchmark reads in an answer; "" if none."""
    text = without_thoughts(text).upper()
    if text[:1] in tuple("ABCD"):
        return text[0]
    found = LETTER.search(text)
    return found[1] if found else ""


def number(text):
    found = NUMBER.search(text.strip())
    return float(found[0]) if found else None


def yes_or_no(text):
    """ "yes", "no" or "" """
    text = text.strip().lower()
    for word in ("yes", "no"):
        if text.startswith(word):
            return word
    return next((word for word in ("yes", "no") if re.search(rf"\b{word}\b", text)), "")


def plain(text):
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s\-]", "", text.strip().lower()))


def relative_error(predicted, true):
    if true == 0:
        return 0.0 if predicted == 0 else float("inf")
    return abs(predicted - true) / abs(true)


def kind_of(subtype):
    return "numeric" if subtype in NUMERIC else "binary" if subtype in BINARY else "categorical"


def score(prediction, reference, subtype, answer_format):
    """A pair's part in its subtype's mean, or `None` where the pair has no part in it."""
    if answer_format == "mc":
        return float(letter(prediction) == reference.strip().upper())
    kind, prediction = kind_of(subtype), without_thoughts(prediction)
    if kind == "numeric":
        predicted, true = number(prediction), number(reference)
        if true is None:
            return None
        return 0.0 if predicted is None else max(0.0, 1.0 - relative_error(predicted, true))
    if kind == "binary":
        found = yes_or_no(prediction)
        return float(bool(found) and found == yes_or_no(reference))
    return float(plain(prediction) == plain(reference))


def _mean(values, count):
    return round(sum(values) / max(count, 1), 4)


def _subtype(pairs, subtype, answer_format):
    scores = [value for value in (score(*pair, subtype, answer_format) for pair in pairs) if value is not None]
    figures = {"questions": len(pairs), "score": _mean(scores, len(scores))}
    kind = "mc" if answer_format == "mc" else kind_of(subtype)
    if kind == "mc":
        figures["read"] = sum(letter(prediction) != "" for prediction, _ in pairs)
    elif kind == "numeric":
        numbers = [(number(without_thoughts(p)), number(r)) for p, r in pairs]
        errors = [relative_error(p, r) if p is not None else float("inf") for p, r in numbers if r is not None]
        figures["scored"] = len(errors)
        within = {f"within_{int(t * 100)}%": _mean([e <= t for e in errors], len(errors)) for t in TOLERANCES}
        figures |= within
    elif kind == "binary":
        found = [(yes_or_no(without_thoughts(p)) == "yes", yes_or_no(r)) for p, r in pairs]
        positive, negative = ([yes for yes, true in found if true == word] for word in ("yes", "no"))
        figures["sensitivity"] = _mean(positive, len(positive))
        figures["specificity"] = _mean([not yes for yes in negative], len(negative))
    else:
        sides = [(plain(without_thoughts(p)), plain(r)) for p, r in pairs]
        partly = [p == r or bool(p and r and (p in r or r in p)) for p, r in sides]
        figures["partial"] = _mean(partly, len(partly))
    return {"metric": "mra" if kind == "numeric" else "exact", **figures}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class DeepTumorVQA2(evaluate.Metric):
    """Functions of single pairs: `score`, `letter`. `NUMERIC`, `BINARY`: subtypes by the kind of their answer."""

    score, letter = staticmethod(score), staticmethod(letter)
    NUMERIC, BINARY = NUMERIC, BINARY

    def _info(self):
        text = datasets.Value("string")
        names = ("predictions", "references", "types", "subtypes")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="arXiv 2505.18915",
            inputs_description=_INPUTS,
            features=datasets.Features(dict.fromkeys(names, text)),
            reference_urls=["https://github.com/Schuture/DeepTumorVQA"],
        )

    def _compute(self, predictions, references, types, subtypes, answer_format="mc"):
        if answer_format not in ("mc", "freeform"):
            raise ValueError(f'answer_format={answer_format!r}; expected "mc" or "freeform".')
        groups, type_of = {}, {}
        for prediction, reference, kind, subtype in zip(predictions, references, types, subtypes, strict=True):
            groups.setdefault(subtype, []).append((prediction, reference))
            type_of.setdefault(subtype, kind)
        parts = {subtype: _subtype(pairs, subtype, answer_format) for subtype, pairs in groups.items()}
        by_type = {}
        for subtype, part in parts.items():
            by_type.setdefault(type_of[subtype], []).append(part)
        return {
            "overall": _pooled(parts.values()),
            "types": {kind: _pooled(members) for kind, members in by_type.items()},
            "subtypes": parts,
        }


def _pooled(parts):
    count = sum(part["questions"] for part in parts)
    return {"score": _mean([part["score"] * part["questions"] for part in parts], count), "questions": count}
