"""3D-RAD as it is scored by those who published on it, as an `evaluate` module.

    metric = evaluate.load("metrics/rad3d")
    metric.compute(predictions=[...], references=[...], tasks=[...], subtasks=[...], kinds=["closed", "open", ...])

Definitions, read in github.com/alibaba-damo-academy/Photon (`evaluation/evaluation.py`, `jsonl_results_to_csv.py`) and
github.com/Tang-xiaoxiao/3D-RAD (`M3D/Bench/eval/eval_3DRAD.py`):

- a figure is computed for each subtask (a file of the benchmark), and a task's figure is the plain mean of its
  subtasks';
- closed, `accuracy` (Photon): prediction and reference are equal after white space is joined and letters are lowered;
- closed, `accuracy_letter_dot` (3D-RAD): the reference's letter with a full stop, "B.", occurs in the prediction. It
  is for models that answer "B. No": a bare "B" is wrong by this rule;
- open, `bleu1` (Photon): BLEU of unigrams over the subtask as one corpus (`evaluate`'s bleu, max_order 1, no
  smoothing): clipped matches by predicted tokens, times exp(1 - r/p) where the predictions' p tokens are fewer than
  the references' r; tokens by mteval 13a, case kept;
- open, `rouge1` (Photon): F1 of lower-cased [a-z0-9]+ words of each pair (rouge_score without stemming), and the
  mean. Photon's script prints `evaluate`'s aggregate instead, the median of 1,000 resampled means from an unseeded
  generator; that is this mean up to noise;
- open, `bertscore` (Photon): mean F1 of bert_score, lang="en" (roberta-large).

3D-RAD's script averages BLEU-1 of single answers and leaves empty predictions out; Photon's table does neither, and is
followed here. Photon's script reads predictions back from a CSV, by which an empty one and "None"
become "nan"; that is not repeated here: an empty prediction has no tokens.
"""

import re
from collections import Counter

import datasets
import evaluate
import numpy as np

try:
    import bert_score
except ImportError:
    bert_score = None

BERT = "roberta-large"  # what bert_score takes for English
INSTALL = "pip install bert-score"
PUNCTUATION = re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])")  # ASCII punctuation except ' , - .
BEFORE = re.compile(r"([^0-9])([\.,])")
AFTER = re.compile(r"([\.,])([^0-9])")
DASH = re.compile(r"([0-9])(-)")
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_DESCRIPTION = "3D-RAD: accuracy, BLEU-1, ROUGE-1 and BERTScore by subtask, and their means by task."
_INPUTS = """
    predictions: list of str. references: list of str.
    tasks, subtasks: lists of str; kinds: list of "closed" or "open".
    bertscore: True (raises where it cannot be computed), False, or "if-cached" (left out, and the reason is in the
        result, where bert_score or its model is not on this machine).
"""


def tokens_13a(text):
    """Tokens of mteval 13a, as sacrebleu and `evaluate` make them."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in ENTITIES if "&" in text else ():
        text = text.replace(entity, sign)
    text = PUNCTUATION.sub(r" \1 ", f" {text} ")
    text = AFTER.sub(r" \1 \2", BEFORE.sub(r"\1 \2 ", text))
    return DASH.sub(r"\1 \2 ", text).split()


def words_rouge(text):
    """Words as rouge_score counts them without a stemmer."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def overlap(first, second):
    return sum((Counter(first) & Counter(second)).values())


def bleu1_parts(prediction, reference):
    """(matches, predicted tokens, reference tokens) of one pair; they add up over a corpus."""
    predicted, true = tokens_13a(prediction.strip()), tokens_13a(reference.strip())
    return overlap(predicted, true), len(predicted), len(true)


def bleu1(matches, predicted, true):
    """Corpus BLEU-1 from summed parts; arrays broadcast. 0 where either side has no tokens."""
    matches, predicted, true = (np.asarray(x, dtype=np.float64) for x in (matches, predicted, true))
    some = (predicted > 0) & (true > 0)
    length = np.where(some, predicted, 1.0)
    return np.where(some, matches / length * np.exp(np.minimum(0.0, 1.0 - true / length)), 0.0)


def rouge1(prediction, reference):
    """F1 of words, 0 where they share none."""
    predicted, true = words_rouge(prediction.strip()), words_rouge(reference.strip())
    return 2 * overlap(predicted, true) / max(1, len(predicted) + len(true))


def closed_equal(prediction, reference):
    """Whether a closed answer is right by Photon's script."""
    return " ".join(prediction.split()).lower() == " ".join(reference.split()).lower()


def closed_letter_dot(prediction, reference):
    """Whether a closed answer is right by 3D-RAD's script."""
    return f"{reference.strip()}." in prediction


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Rad3D(evaluate.Metric):
    """Functions of single pairs: `bleu1_parts`, `bleu1`, `rouge1`, `closed_equal`."""

    bleu1_parts, bleu1, rouge1 = staticmethod(bleu1_parts), staticmethod(bleu1), staticmethod(rouge1)
    closed_equal = staticmethod(closed_equal)

    def _info(self):
        text = datasets.Value("string")
        names = ("predictions", "references", "tasks", "subtasks", "kinds")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="arXiv 2506.11147 (3D-RAD), arXiv 2603.25155 (Photon)",
            inputs_description=_INPUTS,
            features=datasets.Features(dict.fromkeys(names, text)),
            reference_urls=[
                "https://github.com/Tang-xiaoxiao/3D-RAD",
                "https://github.com/alibaba-damo-academy/Photon",
            ],
        )

    def _compute(self, predictions, references, tasks, subtasks, kinds, bertscore="if-cached"):
        wrong = sorted(set(kinds) - {"closed", "open"})
        if wrong:
            raise ValueError(f"kinds holds {wrong}; expected 'closed' or 'open'.")
        semantic, reason = self._bertscore(bertscore)
        groups = {}
        for row in zip(predictions, references, tasks, subtasks, kinds, strict=True):
            groups.setdefault((row[2], row[3], row[4]), []).append(row[:2])
        result = {}
        for (task, subtask, kind), pairs in groups.items():
            figures = self._closed(pairs) if kind == "closed" else self._open(pairs, semantic)
            entry = result.setdefault(f"{task} ({kind})", {"task": task, "kind": kind, "subtasks": {}})
            entry["subtasks"][subtask] = {"questions": len(pairs), **figures}
        for entry in result.values():
            parts = list(entry["subtasks"].values())
            entry["questions"] = sum(part["questions"] for part in parts)
            for name in parts[0]:
                if name != "questions":
                    values = [part[name] for part in parts]
                    entry[name] = None if None in values else float(np.mean(values))
            if reason and entry["kind"] == "open":
                entry["bertscore_left_out"] = reason
        return {"tasks": result}

    def _closed(self, pairs):
        return {
            "accuracy": float(np.mean([closed_equal(*pair) for pair in pairs])),
            "accuracy_letter_dot": float(np.mean([closed_letter_dot(*pair) for pair in pairs])),
        }

    def _open(self, pairs, semantic):
        parts = np.array([bleu1_parts(*pair) for pair in pairs]).sum(0)
        return {
            "bleu1": float(bleu1(*parts)),
            "rouge1": float(np.mean([rouge1(*pair) for pair in pairs])),
            "bertscore": semantic(pairs) if semantic else None,
        }

    def _bertscore(self, wanted):
        """(function of pairs or `None`, why it is left out or `None`)"""
        if wanted is False:
            return None, "not asked for"
        if wanted not in (True, "if-cached"):
            raise ValueError(f'bertscore={wanted!r}; expected True, False or "if-cached".')
        if bert_score is None:
            if wanted is True:
                raise ImportError(f"BERTScore needs bert_score; install it with: {INSTALL}")
            return None, f"bert_score is not installed ({INSTALL})"
        if wanted == "if-cached" and not _cached():
            return None, f"its model {BERT} is not on this machine (hf download {BERT})"

        def semantic(pairs):
            predictions, references = zip(*pairs, strict=True)
            found = bert_score.score([p.strip() for p in predictions], [r.strip() for r in references], lang="en")
            return float(np.mean(np.asarray(found[2], dtype=np.float64)))

        return semantic, None


def _cached():
    from huggingface_hub import try_to_load_from_cache

    config = isinstance(try_to_load_from_cache(BERT, "config.json"), str)
    weights = [try_to_load_from_cache(BERT, name) for name in ("model.safetensors", "pytorch_model.bin")]
    return config and any(isinstance(found, str) for found in weights)
