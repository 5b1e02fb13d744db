"""Scores against independent computations: other libraries, or a few plain lines here."""

import csv
import json
import math
import os
import random
import re
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

import conftest
from conftest import ROOT
from photon.evaluation.baselines import Blind
from photon.evaluation.benchmarks import BENCHMARKS
from photon.evaluation.comparison import compare, mcnemar
from photon.evaluation.predictions import read_predictions
from photon.evaluation.questions import load_benchmark
from photon.evaluation.scoring import score
from photon.evaluation.swapping import swapped
from photon.evaluation.table import table

DATA = conftest.DATA / "3d_rad"
FULL = os.environ.get("PHOTON_3DRAD")
evaluate = pytest.importorskip("evaluate")

ADVERSARIAL = [
    "", " ", "\n", ".", "...", "!?;:", "-", "a", "A", "a a a a a a", "the the the cat", "12.5 mm", "12,5 mm", "3.",
    ".5", "30x13 mm", "1-2", "-1.5e-3", "Größe", "左肺 结节", "naïve café", "e\u0301", "\u00a0x\u2009y", "🙂 🙂",
    "<skipped>x", "post-\noperative", "a\nb\tc", "&quot;x&quot; &amp; y &lt;z&gt;", "it's", "(right) lung; base/apex",
    "x" * 3000,
    " ".join(["lung"] * 2000), "No.", "no", "B. No", "١٢ mm", "A.B,C", "1,000.5", "[1] {2} ~3", "_ _",
]  # fmt: skip
WORDS = "the right left lung nodule 12 mm 3.5 cm , . - no yes Upper lobe effusion ( ) 2x3".split()


@pytest.fixture(scope="module")
def rad3d():
    return evaluate.load(str(ROOT / "metrics" / "rad3d"), keep_in_memory=True)


@pytest.fixture(scope="module")
def tumor1():
    return evaluate.load(str(ROOT / "metrics" / "deeptumorvqa1"), keep_in_memory=True)


@pytest.fixture(scope="module")
def tumor2():
    return evaluate.load(str(ROOT / "metrics" / "deeptumorvqa2"), keep_in_memory=True)


def sentences(count, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 9))) for _ in range(count)]


def pairs():
    rng = random.Random(5)
    texts = ADVERSARIAL + sentences(200, 1)
    return [(rng.choice(texts), rng.choice(texts)) for _ in range(400)] + [(text, text) for text in ADVERSARIAL]


# === 3D-RAD ==========================================================================================================


def test_bleu1_is_that_of_sacrebleu(rad3d):
    bleu = pytest.importorskip("sacrebleu").metrics.BLEU(
        tokenize="13a", max_ngram_order=1, smooth_method="none", effective_order=False
    )
    found = pairs()
    rng = random.Random(2)
    corpora = [[pair] for pair in found] + [rng.sample(found, rng.randint(2, 30)) for _ in range(60)] + [found]
    above = 0
    for corpus in corpora:
        expected = bleu.corpus_score([p.strip() for p, _ in corpus], [[r.strip() for _, r in corpus]]).score / 100
        got = float(rad3d.bleu1(*np.array([rad3d.bleu1_parts(*pair) for pair in corpus]).sum(0)))
        assert got == pytest.approx(expected, abs=1e-9), corpus[0]
        above += 0.05 < got < 0.95
    assert above > 50  # neither all 0 nor all 1


def test_bleu1_is_that_of_nltk(rad3d):
    """Counts, clipping and brevity, on tokens that white space alone separates."""
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    rng = random.Random(3)
    for _ in range(100):
        texts = [[" ".join(rng.choices("abcdefg", k=rng.randint(1, 8))) for _ in range(7)] for _ in range(2)]
        predicted, true = ([text.split() for text in side] for side in texts)
        got = float(rad3d.bleu1(*np.array([rad3d.bleu1_parts(*p) for p in zip(*texts, strict=True)]).sum(0)))
        assert got == pytest.approx(nltk.corpus_bleu([[t] for t in true], predicted, weights=(1,)), abs=1e-12)


def test_rouge1_is_that_of_rouge_score(rad3d):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1"], use_stemmer=False)
    above = 0
    for prediction, reference in pairs():
        expected = scorer.score(reference.strip(), prediction.strip())["rouge1"].fmeasure
        assert rad3d.rouge1(prediction, reference) == pytest.approx(expected, abs=1e-12), (prediction, reference)
        above += 0 < expected < 1
    assert above > 50


def test_mean_rouge1_is_near_the_resampled_median_that_photon_prints(rad3d):
    rouge = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1"], use_stemmer=False)
    aggregator = pytest.importorskip("rouge_score.scoring").BootstrapAggregator()
    predictions, references = sentences(300, 7), sentences(300, 8)
    for prediction, reference in zip(predictions, references, strict=True):
        aggregator.add_scores(rouge.score(reference, prediction))
    median = aggregator.aggregate()["rouge1"].mid.fmeasure
    found = rad3d.compute(
        predictions=predictions, references=references, tasks=["t"] * 300, subtasks=["s"] * 300, kinds=["open"] * 300
    )
    assert found["tasks"]["t (open)"]["rouge1"] == pytest.approx(median, abs=0.005)
    assert found["tasks"]["t (open)"]["rouge1"] > 0.1


def test_rad3d_means_over_subtasks(rad3d):
    """Two subtasks of unequal size: a task's figure is the plain mean, not that of questions."""
    answers = ["B", " b", "A", "B. No", "A"]
    true = ["B", "B", "B", "B", "A"]
    found = rad3d.compute(
        predictions=[*answers, "right lung", "x"], references=[*true, "Right lung.", "y"], tasks=["e"] * 5 + ["o"] * 2,
        subtasks=["n", "n", "n", "n", "m", "p", "q"], kinds=["closed"] * 5 + ["open"] * 2,
    )["tasks"]  # fmt: skip
    assert found["e (closed)"]["subtasks"]["n"]["accuracy"] == pytest.approx(2 / 4)
    assert found["e (closed)"]["accuracy"] == pytest.approx((2 / 4 + 1) / 2)
    assert found["e (closed)"]["accuracy_letter_dot"] == pytest.approx((1 / 4 + 0) / 2)
    lung = math.exp(1 - 3 / 2) * 1 / 2  # "Right" is another token than "right"; the full stop is the third
    assert found["o (open)"]["subtasks"]["p"]["bleu1"] == pytest.approx(lung)
    assert found["o (open)"]["bleu1"] == pytest.approx(lung / 2)
    assert found["o (open)"]["rouge1"] == pytest.approx((1 + 0) / 2)


def test_bertscore_is_computed_or_left_out_in_words(rad3d, monkeypatch):
    module = sys.modules[type(rad3d).__module__]
    one = {"predictions": ["a", " b "], "references": ["a", "c"], "tasks": ["t"] * 2, "subtasks": ["s"] * 2}
    one["kinds"] = ["open"] * 2
    monkeypatch.setattr(module, "bert_score", None)
    with pytest.raises(ImportError, match="pip install bert-score"):
        rad3d.compute(**one, bertscore=True)
    found = rad3d.compute(**one)["tasks"]["t (open)"]
    assert found["bertscore"] is None and "pip install bert-score" in found["bertscore_left_out"]
    seen = []

    def stand_in(predictions, references, lang):
        seen.append((predictions, references, lang))
        return None, None, np.array([1.0, 0.5])

    monkeypatch.setattr(module, "bert_score", types.SimpleNamespace(score=stand_in))
    monkeypatch.setattr(module, "_cached", lambda: False)
    assert "roberta-large" in rad3d.compute(**one)["tasks"]["t (open)"]["bertscore_left_out"]
    found = rad3d.compute(**one, bertscore=True)["tasks"]["t (open)"]
    assert found["bertscore"] == 0.75 and "bertscore_left_out" not in found
    assert seen == [(["a", "b"], ["a", "c"], "en")]


def test_modules_load_by_relative_path_and_from_elsewhere(monkeypatch, tmp_path):
    one = {"predictions": ["B"], "references": ["B"], "types": ["t"], "subtypes": ["s"]}
    monkeypatch.chdir(ROOT)
    assert evaluate.load("metrics/deeptumorvqa2").compute(**one)["overall"]["score"] == 1.0
    monkeypatch.chdir(tmp_path)
    assert evaluate.load(str(ROOT / "metrics" / "deeptumorvqa1")).compute(**one)["total"] == 1.0


# === DeepTumorVQA ====================================================================================================


def test_mra_of_version_1(tumor1):
    steps = np.arange(50, 100, 5) / 100
    rng = random.Random(4)
    numbers = [
        rng.choice(["{:.2f}", "{:.0f} HU", "about {:.1f} cm", "-{:.3f}"]).format(rng.uniform(0, 60))
        for _ in range(300)
    ]
    numbers += ["0", "0.0", "none", "", "1e2", "+.5", "5.", "-3", "7 or 8", "١٢"]
    spread = Counter()
    for prediction in rng.choices(numbers, k=2000):
        reference = rng.choice(numbers)
        sides = [
            re.findall(r"[+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?", text)[:1] for text in (prediction, reference)
        ]
        expected = 0.0
        if all(sides):
            p, r = (float(side[0]) for side in sides)
            expected = float((abs(p - r) / max(abs(r), 1e-6) < 1 - steps).mean())
        assert tumor1.mra(prediction, reference) == pytest.approx(expected, abs=1e-12), (prediction, reference)
        spread[round(expected, 1)] += 1
    assert len(spread) == 11
    assert tumor1.mra("10.5", "10") == 1.0  # 0.05 is below 1 - 0.95 by the last bit of a float, as in the script
    assert tumor1.mra("10.4", "10") == 1.0 and tumor1.mra("15", "10") == 0.0 and tumor1.mra("14.99", "10") == 0.1


def test_version_1_is_macro_over_subtypes(tumor1):
    rows = [
        ("A", "A", "r", "x"), ("B", "A", "r", "x"), ("A ", "A", "r", "x"), ("A", "A", "r", "y"), ("C", "C", "m", "z"),
        ("C", "D", "m", "z"),
    ]  # fmt: skip
    columns = dict(
        zip(("predictions", "references", "types", "subtypes"), map(list, zip(*rows, strict=True)), strict=True)
    )
    found = tumor1.compute(**columns)
    assert found["types"]["r"]["score"] == pytest.approx((1 / 3 + 1) / 2)  # "A " is not "A"
    assert found["total"] == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)


def test_version_1_free_text_with_sensitivity_and_specificity(tumor1):
    rng = random.Random(9)
    words = {True: ["Yes", "yes.", "PRESENT", "1", "有"], False: ["No", " no!", "absent", "0"], None: ["maybe", ""]}
    rows, counts = [], Counter()
    for _ in range(400):
        subtype = rng.choice(["liver_lesion_existence", "kidney tumor existence", "other"])
        predicted, true = rng.choice([True, False, None]), rng.choice([True, False])
        rows.append((rng.choice(words[predicted]), rng.choice(words[true]), "Recognition", subtype))
        counts[subtype.replace("_", " "), predicted, true] += 1
    rows.append(("12", "10", "measurement", "organ volume measurement"))
    columns = dict(
        zip(("predictions", "references", "types", "subtypes"), map(list, zip(*rows, strict=True)), strict=True)
    )
    found = tumor1.compute(**columns, answer_format="freetext")
    assert found["types"]["measurement"]["score"] == pytest.approx(0.6)  # 20 % off: below 1 - t for 0.50 to 0.75
    part = found["existence"]["subtypes"]
    names = ["liver lesion existence", "kidney tumor existence"]
    rates = []
    for name in names:
        tp, fn, tn, fp = (counts[name, s, t] for s, t in ((True, True), (False, True), (False, False), (True, False)))
        assert part[name]["skipped"] == counts[name, None, True] + counts[name, None, False] > 0
        rates.append((tp / (tp + fn), tn / (tn + fp)))
        assert (part[name]["sensitivity"], part[name]["specificity"]) == pytest.approx(rates[-1])
    assert found["existence"]["macro"]["sensitivity"] == pytest.approx(np.mean([r[0] for r in rates]))
    assert found["existence"]["macro"]["specificity"] == pytest.approx(np.mean([r[1] for r in rates]))
    pooled = [sum(counts[name, s, t] for name in names) for s, t in ((True, True), (False, True))]
    assert found["existence"]["micro"]["sensitivity"] == pytest.approx(pooled[0] / sum(pooled))
    assert found["existence"]["subtypes"]["pancreatic lesion existence"]["questions"] == 0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"), ("c", "C"), (" d.", "D"), ("Answer: C", "A"), ("Both", "B"), ("Cannot tell", "C"),
        ("The answer is C", "C"), ("It is (B).", "B"), ("E", ""), ("", ""), ("<think>A or B</think>D", "D"),
        ("<think>never closed C", ""), ("<think>x\n", ""), ("I think none", ""), ("Z A", "A"), ("(c)", "C"),
        ("\u00c5", ""),
    ],
)  # fmt: skip
def test_letters_that_version_2_reads(tumor2, text, letter):
    assert tumor2.letter(text) == letter


def test_version_2_weighs_by_questions(tumor2):
    rows = [("B", "B", "r", "x")] * 3 + [("A", "B", "r", "x")] + [("Answer: C", "C", "r", "y"), ("D", "d ", "m", "z")]
    columns = dict(
        zip(("predictions", "references", "types", "subtypes"), map(list, zip(*rows, strict=True)), strict=True)
    )
    found = tumor2.compute(**columns)
    assert found["overall"] == {"score": 0.6667, "questions": 6}
    assert found["types"]["r"] == {"score": 0.6, "questions": 5}
    assert found["subtypes"]["y"]["score"] == 0.0


def test_version_2_free_form(tumor2):
    rng = random.Random(6)
    rows, expected = [], {"organ HU ratio": [], "splenomegaly detection": [], "fatty liver": []}
    for _ in range(300):
        p, r = rng.randint(-20, 40), rng.choice([0, 5, -8, 20, 31])
        rows.append((f"<think>99</think> it is {p} HU", f"{r}.0", "measurement", "organ HU ratio"))
        error = abs(p - r) / abs(r) if r else (0.0 if p == r else math.inf)
        expected["organ HU ratio"].append((max(0.0, 1 - error), error))
        predicted, true = rng.choice(["Yes, it is", "no", "unclear", "it is, yes"]), rng.choice(["yes", "no"])
        rows.append((predicted, true, "medical reasoning", "splenomegaly detection"))
        word = {"Yes, it is": "yes", "no": "no", "unclear": "", "it is, yes": "yes"}[predicted]
        expected["splenomegaly detection"].append((word, true))
        predicted, true = rng.choice(["Mild!", "mild  disease", "severe", ""]), "mild"
        rows.append((predicted, true, "medical reasoning", "fatty liver"))
        expected["fatty liver"].append(
            ({"Mild!": 1, "mild  disease": 0}.get(predicted, 0), predicted.lower().startswith("mild"))
        )
    rows.append(("3", "not a number", "measurement", "organ HU ratio"))  # no part in the mean, but weighed
    columns = dict(
        zip(("predictions", "references", "types", "subtypes"), map(list, zip(*rows, strict=True)), strict=True)
    )
    found = tumor2.compute(**columns, answer_format="freeform")
    part = found["subtypes"]
    numeric, binary, words = expected.values()
    assert part["organ HU ratio"]["score"] == round(float(np.mean([m for m, _ in numeric])), 4)
    assert part["organ HU ratio"]["within_20%"] == round(float(np.mean([e <= 0.2 for _, e in numeric])), 4)
    assert part["organ HU ratio"]["questions"] == 301 and part["organ HU ratio"]["scored"] == 300
    assert part["splenomegaly detection"]["score"] == round(float(np.mean([w == t for w, t in binary])), 4)
    sick = [w == "yes" for w, t in binary if t == "yes"]
    well = [w != "yes" for w, t in binary if t == "no"]
    assert part["splenomegaly detection"]["sensitivity"] == round(float(np.mean(sick)), 4)
    assert part["splenomegaly detection"]["specificity"] == round(float(np.mean(well)), 4)
    assert part["fatty liver"]["score"] == round(float(np.mean([e for e, _ in words])), 4)
    assert part["fatty liver"]["partial"] == round(float(np.mean([p for _, p in words])), 4)
    micro = sum(part[name]["score"] * part[name]["questions"] for name in part) / 901
    assert found["overall"]["score"] == pytest.approx(micro, abs=6e-5)


# === Closed questions: figures, intervals, baselines =================================================================


def questions(count=240, seed=0, letters="ABC", patients=17, subtasks=("x", "yy", "z")):
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        subtask = rng.choices(subtasks, weights=range(1, len(subtasks) + 1))[0]
        answer = rng.choices(letters, weights=range(len(letters), 0, -1))[0]
        patient = f"p{rng.randrange(patients)}"
        rows.append({
            "id": f"q{i}", "benchmark": "3d-rad", "task": "t", "subtask": subtask, "kind": "choice",
            "patient": patient, "volumes": [f"{patient}.nii.gz"], "question": f"what is {rng.choice('uvw')}?",
            "answer": answer,
            "options": {letter: f"text {letter}" for letter in letters}, "choices": list(letters), "messages": [],
        })  # fmt: skip
    return rows


def guesses(rows, seed, right=0.6, invalid=0.05):
    rng = random.Random(seed)
    return {
        row["id"]: "?"
        if rng.random() < invalid
        else row["answer"]
        if rng.random() < right
        else rng.choice(row["choices"])
        for row in rows
    }


def plain_figures(rows, answers):
    """Accuracy macro and micro, balanced accuracy and mean F1, by loops over questions."""
    subtasks = sorted({row["subtask"] for row in rows})
    letters = sorted({row["answer"] for row in rows})
    right = [answers[row["id"]] == row["answer"] for row in rows]
    by = [np.mean([ok for ok, row in zip(right, rows, strict=True) if row["subtask"] == s]) for s in subtasks]
    recall = [np.mean([answers[row["id"]] == letter for row in rows if row["answer"] == letter]) for letter in letters]
    f1 = []
    for s in subtasks:
        part = [row for row in rows if row["subtask"] == s]
        each = []
        for letter in sorted({row["answer"] for row in part}):
            tp = sum(row["answer"] == letter == answers[row["id"]] for row in part)
            fp = sum(answers[row["id"]] == letter != row["answer"] for row in part)
            fn = sum(row["answer"] == letter != answers[row["id"]] for row in part)
            each.append(2 * tp / (2 * tp + fp + fn))
        f1.append(np.mean(each))
    return {
        "accuracy_macro": np.mean(by), "accuracy_micro": np.mean(right), "balanced_accuracy": np.mean(recall),
        "f1_macro": np.mean(f1),
    }  # fmt: skip


def resampled(rows, values, draws, seed):
    """Intervals by copying each drawn patient's questions."""
    patients = sorted({row["patient"] for row in rows})
    drawn = np.random.default_rng(seed).multinomial(len(patients), np.full(len(patients), 1 / len(patients)), draws)
    out = []
    for weights in drawn:
        copies = [row for row in rows for _ in range(weights[patients.index(row["patient"])])]
        out.append(values(copies))
    return {name: np.percentile([one[name] for one in out], [2.5, 97.5]) for name in out[0]}


def test_figures_and_intervals_are_those_of_loops():
    rows = questions()
    answers = guesses(rows, 1)
    found = score(rows, answers, bootstrap=60, seed=3)["tasks"]["t"]
    plain = plain_figures(rows, answers)
    bounds = resampled(rows, lambda part: plain_figures(part, answers), 60, 3)
    for name, value in plain.items():
        figure = found["figures"][name]
        assert figure["value"] == pytest.approx(value, abs=1e-12), name
        assert (figure["low"], figure["high"]) == pytest.approx(tuple(bounds[name]), abs=1e-12), name
        assert figure["low"] < figure["value"] < figure["high"]
    assert found["read"] == pytest.approx(np.mean([text != "?" for text in answers.values()]))
    part = [row for row in rows if row["subtask"] == "yy"]
    assert found["subtasks"]["yy"]["questions"] == len(part)
    one = plain_figures(part, answers)
    assert found["subtasks"]["yy"]["accuracy"]["value"] == pytest.approx(one["accuracy_micro"])
    assert found["subtasks"]["yy"]["f1"]["value"] == pytest.approx(one["f1_macro"])
    assert found["subtasks"]["yy"]["balanced_accuracy"]["value"] == pytest.approx(one["balanced_accuracy"])


def test_f1_of_yes_by_finding():
    rows = questions(letters="AB")
    for row in rows:
        row["options"] = {"A": "Yes", "B": "No"}
    answers = guesses(rows, 2)
    found = score(rows, answers, bootstrap=0)["tasks"]["t"]["subtasks"]
    for subtask in ("x", "yy", "z"):
        part = [(answers[row["id"]], row["answer"]) for row in rows if row["subtask"] == subtask]
        tp = sum(s == t == "A" for s, t in part)
        expected = tp / (tp + 0.5 * (sum(s == "A" != t for s, t in part) + sum(t == "A" != s for s, t in part)))
        assert found[subtask]["f1_yes"]["value"] == pytest.approx(expected)
        assert found[subtask]["f1_yes"]["low"] is None


def test_figures_of_few_questions():
    """A subtask of one question; a letter answered but never true; a finding neither true nor answered."""
    rows = questions(4, letters="ABC")
    facts = [("x", "A", "A"), ("yy", "A", "B"), ("yy", "A", "A"), ("z", "C", "?")]
    for row, (subtask, true, _) in zip(rows, facts, strict=True):
        row.update(subtask=subtask, answer=true)
    answers = {row["id"]: fact[2] for row, fact in zip(rows, facts, strict=True)}
    found = score(rows, answers, bootstrap=0)["tasks"]["t"]
    assert [found["subtasks"][s]["f1"]["value"] for s in ("x", "yy", "z")] == pytest.approx([1, 2 / 3, 0])
    assert found["figures"]["f1_macro"]["value"] == pytest.approx((1 + 2 / 3) / 3)
    assert found["figures"]["balanced_accuracy"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["read"] == 0.75
    rows = questions(2, letters="AB")
    for row, subtask in zip(rows, ("x", "z"), strict=True):
        row.update(subtask=subtask, answer="B", options={"A": "Yes", "B": "No"})
    found = score(rows, {"q0": "B", "q1": "A"}, bootstrap=0)["tasks"]["t"]
    assert found["subtasks"]["x"]["f1_yes"]["value"] is None and found["subtasks"]["z"]["f1_yes"]["value"] == 0
    assert found["figures"]["f1_macro"]["value"] == 0  # over the one subtask that has an F1
    assert "f1_yes -" in table(score(rows, {"q0": "B", "q1": "A"}, bootstrap=0))


def test_open_questions_are_scored_as_corpora_with_intervals():
    sacrebleu = pytest.importorskip("sacrebleu")
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1"], use_stemmer=False)
    rows = questions(90, subtasks=("x", "yy"))
    for row, text in zip(rows, sentences(90, 11), strict=True):
        row.update(kind="text", answer=text or "none", options=None, choices=None)
    answers = dict(zip((row["id"] for row in rows), sentences(90, 12), strict=True))
    bleu = sacrebleu.metrics.BLEU(tokenize="13a", max_ngram_order=1, smooth_method="none")

    def plain(part):
        both = {"bleu1": [], "rouge1": []}
        for subtask in ("x", "yy"):
            chosen = [(answers[row["id"]].strip(), row["answer"].strip()) for row in part if row["subtask"] == subtask]
            predictions, references = map(list, zip(*chosen, strict=True))
            both["bleu1"].append(bleu.corpus_score(predictions, [references]).score / 100)
            both["rouge1"].append(np.mean([scorer.score(r, p)["rouge1"].fmeasure for p, r in chosen]))
        return {name: np.mean(values) for name, values in both.items()}

    scores = score(rows, answers, bootstrap=40, seed=1)
    bounds = resampled(rows, plain, 40, 1)
    for name, value in plain(rows).items():
        figure = scores["tasks"]["t"]["figures"][name]
        assert figure["value"] == pytest.approx(value, abs=1e-9)
        assert (figure["low"], figure["high"]) == pytest.approx(tuple(bounds[name]), abs=1e-9)
        assert scores["authors"]["tasks"]["t (open)"][name] == pytest.approx(value, abs=1e-9)


def test_short_answers_of_ones_own_have_exact_match_and_balanced_accuracy():
    """Yes or no in words, ten times as often no: always "no" is right for most questions, and balanced half."""
    rows, answers = questions(132, subtasks=("x", "yy")), {}
    for i, row in enumerate(rows):
        row.update(benchmark="jsonl", kind="text", answer="Yes." if i % 11 == 0 else "no", options=None, choices=None)
        answers[row["id"]] = "no" if i % 5 else ["yes", "Yes, a small one", " NO. "][i % 3]
    right = {row["id"]: answers[row["id"]].strip(" .").lower() == row["answer"].strip(".").lower() for row in rows}

    def plain(part):
        by_subtask = [[right[row["id"]] for row in part if row["subtask"] == s] for s in ("x", "yy")]
        by_answer = [[right[row["id"]] for row in part if row["answer"] == a] for a in ("Yes.", "no")]
        return {
            "exact_match": np.mean([np.mean(r) for r in by_subtask if r]),
            "balanced_accuracy": np.mean([np.mean(r) for r in by_answer if r]),
        }

    found = score(rows, answers, bootstrap=60, seed=2)["tasks"]["t"]
    bounds = resampled(rows, plain, 60, 2)
    assert plain(rows)["balanced_accuracy"] < plain(rows)["exact_match"] - 0.1
    for name, value in plain(rows).items():
        figure = found["figures"][name]
        assert figure["value"] == pytest.approx(value, abs=1e-12), name
        assert (figure["low"], figure["high"]) == pytest.approx(tuple(bounds[name]), abs=1e-12), name
    assert {"bleu1", "rouge1"} < set(found["figures"])
    part = [row for row in rows if row["subtask"] == "yy"]
    assert found["subtasks"]["yy"]["balanced_accuracy"]["value"] == pytest.approx(plain(part)["balanced_accuracy"])
    always = score(rows, dict.fromkeys(answers, "No"), bootstrap=0)["tasks"]["t"]["figures"]
    assert always["exact_match"]["value"] > 0.85 and always["balanced_accuracy"]["value"] == 0.5
    for i, row in enumerate(rows):  # each answer once or twice: no balance to speak of
        row["answer"] = f"a sentence of its own {i // 2}"
    assert "balanced_accuracy" not in score(rows, answers, bootstrap=0)["tasks"]["t"]["figures"]
    assert set(compare(rows, answers, answers, bootstrap=0)["tasks"]["t"]["figures"]) == {
        "exact_match",
        "bleu1",
        "rouge1",
    }


def test_intervals_depend_on_the_seed_alone():
    rows = questions()
    answers = guesses(rows, 1)
    once = score(rows, answers, bootstrap=50, seed=3)
    assert json.dumps(once, allow_nan=False) == json.dumps(score(rows, answers, bootstrap=50, seed=3))
    turned = score(rows[::-1], answers, bootstrap=50, seed=3)["tasks"]["t"]["figures"]
    other = score(rows, answers, bootstrap=50, seed=4)["tasks"]["t"]["figures"]
    for name, figure in once["tasks"]["t"]["figures"].items():
        assert tuple(turned[name].values()) == pytest.approx(tuple(figure.values()), abs=1e-12)
        assert other[name]["low"] != figure["low"] or other[name]["high"] != figure["high"]


def test_an_interval_by_patients_is_wider_than_by_questions():
    """Ten copies of each question under one patient: as sure as one copy is, not as ten are."""
    rows = questions(60, patients=60)
    for i, row in enumerate(rows):
        row["patient"] = f"p{i:02d}"
    answers = guesses(rows, 1)
    many = [{**row, "id": f"{row['id']}-{k}"} for row in rows for k in range(10)]
    one = score(rows, answers, bootstrap=400)["tasks"]["t"]["figures"]["accuracy_micro"]
    ten = score(many, {row["id"]: answers[row["id"].split("-")[0]] for row in many}, bootstrap=400)
    ten = ten["tasks"]["t"]["figures"]["accuracy_micro"]
    assert (ten["low"], ten["high"]) == pytest.approx((one["low"], one["high"]), abs=1e-12)
    alone = [{**row, "patient": "p"} for row in rows]
    assert score(alone, answers)["tasks"]["t"]["figures"]["accuracy_micro"]["low"] is None


def test_what_does_not_match_is_refused():
    rows = questions(5)
    answers = guesses(rows, 1)
    with pytest.raises(ValueError, match="question q1: no prediction\n  prediction q9: no question"):
        score(rows, {**{k: v for k, v in answers.items() if k != "q1"}, "q9": "A"})
    with pytest.raises(ValueError, match="2 rows have this id"):
        score([*rows, rows[0]], answers)
    with pytest.raises(ValueError, match="one benchmark at a time"):
        score([rows[0], {**rows[1], "benchmark": "jsonl"}], answers)
    with pytest.raises(ValueError, match="would know their answers"):
        score(rows, answers, train=rows)
    with pytest.raises(ValueError, match="expected questions of 3d-rad"):
        score(rows, answers, train=[{**rows[0], "benchmark": "jsonl"}])


def test_predictions_are_read_and_faults_named_by_line(tmp_path):
    rows = questions(3)
    file = tmp_path / "p.jsonl"
    lines = [{"id": row["id"], "prediction": "A", "kept": 0.4} for row in rows]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    assert read_predictions(file, rows) == {"q0": "A", "q1": "A", "q2": "A"}
    bad = [json.dumps(lines[0]), "{", json.dumps(lines[0]), '{"id": "q9", "prediction": "A"}', '{"id": "q1"}', "[1]"]
    file.write_text("\n".join(bad))
    with pytest.raises(ValueError) as caught:
        read_predictions(file, rows)
    expected = ["line 2: not JSON", "line 3: a second prediction of the question of line 1", "line 4: an id of no"]
    expected += [
        "line 5: no text under 'prediction'",
        "line 6: not a JSON object",
        "question q1: no",
        "question q2: no",
    ]
    for part in expected:
        assert part in str(caught.value)
    file.write_text('{"id": "q9", "prediction": "A"}\n')
    assert read_predictions(file) == {"q9": "A"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("(b)", "B"), ("B. No", "B"), ("b: x", "B"), ("A lesion", None), ("", None), ("E", None)],
)
def test_letters_of_benchmarks_without_a_rule(text, letter):
    assert BENCHMARKS["m3d-vqa"].read_choice(text, ["A", "B", "C"]) == letter


@pytest.mark.parametrize(
    ("text", "choice"),
    [("no", "no"), ("No.", "no"), (" YES ", "yes"), ("no lesion", None), ("y", None), ("", None)],
)
def test_choices_may_be_words(text, choice):
    assert BENCHMARKS["jsonl"].read_choice(text, ["yes", "no"]) == choice
    assert BENCHMARKS["jsonl"].read_choice("2", ["0", "1", "2", "3"]) == "2"


# === Comparison ======================================================================================================


def test_comparison_is_paired():
    rows = questions()
    first, second = guesses(rows, 1, right=0.5), guesses(rows, 2, right=0.7)
    found = compare(rows, first, second, bootstrap=60, seed=5)["tasks"]["t"]

    def difference(part):
        one, two = plain_figures(part, first), plain_figures(part, second)
        return {name: two[name] - one[name] for name in one}

    bounds = resampled(rows, difference, 60, 5)
    for name, value in difference(rows).items():
        figure = found["figures"][name]["difference"]
        assert figure["value"] == pytest.approx(value, abs=1e-12)
        assert (figure["low"], figure["high"]) == pytest.approx(tuple(bounds[name]), abs=1e-12)
    right = [[answers[row["id"]] == row["answer"] for row in rows] for answers in (first, second)]
    alone = [sum(a and not b for a, b in zip(*order, strict=True)) for order in (right, right[::-1])]
    assert [found["mcnemar"][key] for key in ("first_alone", "second_alone")] == alone
    assert found["mcnemar"]["p"] == pytest.approx(binomtest(alone[0], sum(alone), 0.5).pvalue, rel=1e-9)
    same = compare(rows, first, first, bootstrap=20)["tasks"]["t"]
    assert same["mcnemar"] == {"first_alone": 0, "second_alone": 0, "p": 1.0}
    assert all(tuple(f["difference"].values()) == (0, 0, 0) for f in same["figures"].values())


@pytest.mark.parametrize(("one", "two"), [(0, 1), (3, 3), (2, 9), (40, 75), (900, 1100), (5000, 6000)])
def test_mcnemar_is_the_exact_binomial_test(one, two):
    first = np.array([True] * one + [False] * two + [True] * 7)
    second = np.array([False] * one + [True] * two + [True] * 7)
    found = mcnemar(first, second)
    assert found["p"] == pytest.approx(binomtest(one, one + two, 0.5).pvalue, rel=1e-9)


# === Baselines =======================================================================================================


def by_name(scores, task):
    return {b["name"]: b for b in scores["tasks"][task]["baselines"]}


def given(folder, task):
    """{file: [(letter, question)]} of a task's CSVs, read plainly."""
    out = {}
    for file in sorted(Path(folder).glob(f"Task{task}_*/*.csv")):
        with open(file, encoding="utf-8-sig", newline="") as stream:
            out[file.stem] = [(row["AnswerChoice"], row["Question"]) for row in csv.DictReader(stream)]
    return out


def accuracy(files, rule):
    """(macro over files, micro) of a rule that sees the question alone."""
    right = [[rule(question) == letter for letter, question in rows] for rows in files.values()]
    return np.mean([np.mean(r) for r in right]), np.mean(np.concatenate(right))


def history_letter(question):
    past = json.loads(re.search(r"\[[01, ]+\]", question)[0])
    return "D" if not any(past) else "A" if past[-1] == 1 else "B"


HISTORY = "the history printed in the question: all 0 is D, last 1 is A, else B"
RULES = {
    ("4", "existence"): ("one letter for all: the most frequent in test", lambda question: "B"),
    ("5", "static-temporal"): ("one letter for all: the most frequent in test", lambda question: "D"),
    ("6", "longitudinal-temporal"): (HISTORY, history_letter),
}


@pytest.mark.filterwarnings("ignore:.*stand in the files more than once")
def test_blind_baselines_on_the_given_questions():
    if not DATA.is_dir():
        pytest.skip("3D-RAD questions are not here; set PHOTON_TEST_DATA to a folder with 3d_rad")
    rows = load_benchmark("3d-rad", DATA)
    scores = score(rows, {row["id"]: "" for row in rows}, bootstrap=0)
    for (number, task), (name, rule) in RULES.items():
        macro, micro = accuracy(given(DATA, number), rule)
        found = by_name(scores, task)[name]
        assert (found["accuracy_macro"], found["accuracy_micro"]) == pytest.approx((macro, micro), abs=1e-12)
        assert scores["tasks"][task]["figures"]["accuracy_macro"]["value"] == 0.0
    assert "no model knows" in by_name(scores, "existence")[RULES["4", "existence"][0]]["fitted_on"]
    assert HISTORY not in by_name(scores, "static-temporal")
    assert by_name(scores, "existence")["one letter for all: the most frequent in test"]["balanced_accuracy"] == 0.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not FULL, reason="the full 3D-RAD questions are not here; set PHOTON_3DRAD to the folder 3DRAD")
def test_blind_baselines_on_all_questions():
    rows = load_benchmark("3d-rad", FULL, split="test")
    closed = [row for row in rows if row["kind"] == "choice"]
    assert len(closed) == 29218
    train = load_benchmark(
        "3d-rad", FULL, split="train", tasks=["existence", "static-temporal", "longitudinal-temporal"]
    )
    scores = score(closed, {row["id"]: "" for row in closed}, bootstrap=0, train=train)
    fitted = "one letter for all: the most frequent in train"
    found = {task: by_name(scores, task) for _, task in RULES}
    per_cent = lambda entry, key: round(100 * entry[f"accuracy_{key}"], 2)  # noqa: E731
    assert found["existence"][fitted]["letter"] == "B" and found["static-temporal"][fitted]["letter"] == "D"
    assert per_cent(found["existence"][fitted], "micro") == per_cent(found["existence"][fitted], "macro") == 82.01
    static = found["static-temporal"][fitted]
    assert (per_cent(static, "micro"), per_cent(static, "macro")) == (64.11, 46.09)
    longitudinal = found["longitudinal-temporal"][HISTORY]
    assert (per_cent(longitudinal, "micro"), per_cent(longitudinal, "macro")) == (80.72, 75.92)


def test_blind_baseline_learns_from_training_questions_alone():
    """The right option's text follows from the words in train and test, but its letter is shuffled."""
    rng = random.Random(1)

    def made(prefix, count):
        rows = questions(count, seed=count)
        for i, row in enumerate(rows):
            word = rng.choice("uvwk")
            texts = rng.sample(["big", "small", "gone"], 3)
            true = {"u": "big", "v": "small", "w": "gone", "k": rng.choice(texts)}[word]
            row.update(id=f"{prefix}{i}", patient=f"{prefix}{row['patient']}", volumes=[f"{prefix}{i}"],
                       question=f"what is {word} ?", options=dict(zip("ABC", texts, strict=True)))  # fmt: skip
            row["answer"] = "ABC"[texts.index(true)]
        return rows

    train, test = made("train", 300), made("test", 200)
    scores = score(test, {row["id"]: "A" for row in test}, train=train, bootstrap=0)
    blind = by_name(scores, "t")["the question's text alone"]
    assert blind["seen_by"] == "words" and blind["fitted_on"] == "the answers of 300 training questions"
    sure = np.mean([not row["question"].startswith("what is k") for row in test])
    assert sure < 0.9 and sure <= blind["accuracy_micro"] < 1
    right = {row["question"]: row["options"][row["answer"]] for row in train if "k" not in row["question"]}
    known = [row for row in test if row["question"] in right]
    guess = Blind(train)
    assert all(guess(row) == row["answer"] for row in known)
    constant = by_name(scores, "t")["one letter for all: the most frequent in train"]
    letter = Counter(row["answer"] for row in train).most_common(1)[0][0]
    assert constant["letter"] == letter
    assert constant["accuracy_micro"] == pytest.approx(np.mean([row["answer"] == letter for row in test]))
    each = by_name(scores, "t")["a letter for each subtask: the most frequent in train"]
    best = {s: Counter(r["answer"] for r in train if r["subtask"] == s).most_common(1)[0][0] for s in ("x", "yy", "z")}
    assert each["accuracy_micro"] == pytest.approx(np.mean([row["answer"] == best[row["subtask"]] for row in test]))


def test_blind_baseline_does_not_learn_by_heart():
    """All questions have words of their own, so that words tell nothing; the subtask tells much."""
    rows = questions(300)
    rng = random.Random(8)
    for i, row in enumerate(rows):
        usual = {"x": "A", "yy": "B", "z": "C"}[row["subtask"]]
        row.update(question=f"question number {i}?", answer=usual if rng.random() < 0.7 else rng.choice("ABC"))
    assert Blind(rows).level == "subtask"


# === Other patients' scans ===========================================================================================


@pytest.mark.parametrize("seed", range(5))
def test_swapped_scans_are_another_patients(seed):
    rows = questions(80, patients=9)
    owner = {row["volumes"][0]: row["patient"] for row in rows}
    found = swapped(rows, seed)
    assert found == swapped(rows, seed) and found != swapped(rows, seed + 1)
    for row, other in zip(rows, found, strict=True):
        assert owner[other["volumes"][0]] != row["patient"]
        assert {**other, "volumes": row["volumes"]} == row
    taken = {}
    for row, other in zip(rows, found, strict=True):
        taken.setdefault(row["patient"], set()).add(owner[other["volumes"][0]])
    assert all(len(donors) == 1 for donors in taken.values()) and len(set.union(*taken.values())) == 9


def test_swapping_needs_another_patient():
    rows = questions(10, patients=1)
    with pytest.raises(ValueError, match="one patient alone"):
        swapped(rows)
    rows = questions(10, patients=5) + [{**questions(1)[0], "id": "two", "volumes": ["a", "b"]}]
    with pytest.raises(ValueError, match="Questions on 2 scans"):
        swapped(rows)


# === DeepTumorVQA's totals, and the table ============================================================================


def test_overall_of_deeptumorvqa_is_that_of_its_module():
    rows = questions(150, letters="ABCD")
    for row in rows:
        row.update(benchmark="deeptumorvqa-2", task="mr"[len(row["subtask"]) % 2])
    answers = {key: f"Answer: {text}" if text == "C" else text for key, text in guesses(rows, 4).items()}
    scores = score(rows, answers, bootstrap=30)
    assert scores["overall"]["score_micro"]["value"] == pytest.approx(scores["authors"]["overall"]["score"], abs=6e-5)
    right = np.mean([("A" if text.startswith("Answer") else text) == row["answer"]
                     for row, text in zip(rows, answers.values(), strict=True)])  # fmt: skip
    assert scores["overall"]["score_micro"]["value"] == pytest.approx(right)
    for row in rows:
        row["benchmark"] = "deeptumorvqa-1-mc"
    scores = score(rows, answers, bootstrap=30)
    assert scores["overall"]["score_macro"]["value"] == pytest.approx(scores["authors"]["total"], abs=1e-12)


def test_free_text_of_version_1_is_scored_by_subtype():
    rows = questions(60, subtasks=("organ volume measurement", "fatty liver"))
    for i, row in enumerate(rows):
        number = row["subtask"].startswith("organ")
        row.update(benchmark="deeptumorvqa-1-ft", kind="number" if number else "text", options=None, choices=None,
                   answer=str(10 + i) if number else "mild")  # fmt: skip
    answers = {row["id"]: "12" if row["kind"] == "number" else "mild"[: 4 - i % 2] for i, row in enumerate(rows)}
    scores = score(rows, answers, bootstrap=10)
    means = []
    for subtask in ("organ volume measurement", "fatty liver"):
        part = [(answers[row["id"]], row["answer"]) for row in rows if row["subtask"] == subtask]
        errors = (
            [abs(12 - float(r)) / float(r) for _, r in part] if subtask[0] == "o" else [1 - (p == r) for p, r in part]
        )
        steps = 1 - np.arange(50, 100, 5) / 100
        means.append(np.mean([(e < steps).mean() for e in errors]))
    assert scores["overall"]["score_macro"]["value"] == pytest.approx(np.mean(means))
    assert scores["authors"]["total"] == pytest.approx(np.mean(means))


def test_the_table_shows_figures_baselines_and_what_was_left_out():
    rows = questions(60)
    extra = {**rows[0], "id": "open", "task": "o", "kind": "text", "answer": "x y", "options": None, "choices": None}
    answers = {**guesses(rows, 1), "open": "x"}
    scores = score([*rows, extra], answers, bootstrap=20)
    text = table(scores)
    figure = scores["tasks"]["t"]["figures"]["accuracy_macro"]
    assert f"| t | 60 | accuracy_macro | {100 * figure['value']:.2f} [{100 * figure['low']:.2f}, " in text
    assert "one letter for all: the most frequent in test (A)" in text and "no model knows" in text
    assert "BERTScore was left out: " in text
    assert "| answers read as a choice |" in text
    columns = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(columns) <= {5, 7}
