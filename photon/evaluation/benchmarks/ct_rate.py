"""CT-RATE VQA: chest CT, the questions of CT-CHAT.

Format: `llava/serve` and `evaluations` of github.com/ibrahimethemhamamci/CT-CHAT. A question stands alone, except in
type "conversation": there the earlier turns precede it with their reference answers (CT-CHAT: with its own answers).
"""

import re

from photon.evaluation.benchmark import Benchmark
from photon.evaluation.records import field, json_records
from photon.evaluation.row import inline_options, listed_options, make_row
from photon.evaluation.scans import CT_RATE, stem_of
from photon.rows import RowError, build_rows

TYPES = {
    "multiple_choice": "multiple-choice", "report_generation": "report-generation", "free_response": "long-answer",
    "description": "long-answer", "long_answer": "long-answer", "conversation": "conversation",
    "short_answer": "short-answer",
}  # fmt: skip
TAG = re.compile(r"<(image|multiple_choice|short_answer|long_answer|report_generation)>")


def scans_from(part):
    """Where CT-RATE's scans are."""
    return (
        f"Hub data set ibrahimhamamci/CT-RATE (gated: accept its terms there), {part}; CC BY-NC-SA 4.0, no commercial "
        'use. `hf download ibrahimhamamci/CT-RATE --repo-type dataset --include "dataset/valid_fixed/**" '
        "--local-dir SCANS`"
    )


def scan_of(name):
    """`names` and `expected` of `make_row` for a scan of CT-RATE, or of 3D-RAD (test_1_a_1 is valid_1_a_1)."""
    stem = stem_of(name.strip())
    if not CT_RATE.fullmatch(stem):
        raise RowError("its scan's name is not like train_1_a_1.nii.gz")
    names = list(dict.fromkeys([re.sub("^test_", "valid_", stem), stem]))
    split, patient, study, _ = names[0].split("_")
    return {"names": names, "expected": f"{split}_{patient}/{split}_{patient}_{study}/{names[0]}"}


class CtRateVqa(Benchmark):
    name = "ct-rate-vqa"
    title = "CT-RATE VQA (chest CT, the questions of CT-CHAT)"
    splits = {"valid": ("valid_vqa.json",), "train": ("train_vqa.json",)}
    hub = "ibrahimhamamci/CT-RATE"
    questions = "Hub data set ibrahimhamamci/CT-RATE (gated), dataset/vqa/valid_vqa.json; CC BY-NC-SA 4.0"
    scans = scans_from("its validation scans")
    tasks = tuple(dict.fromkeys(TYPES.values()))

    def rows(self, source):
        def build(record):
            scan, turns = scan_of(field(record, "image")), record.get("conversations")
            if not isinstance(turns, list) or [t.get("from") for t in turns] != ["human", "gpt"] * (len(turns) // 2):
                raise RowError("its conversations are not turns of human and gpt")
            number, rows, before = field(record, "id"), [], []
            for i in range(0, len(turns), 2):
                asked, answer = str(turns[i].get("value", "")), str(turns[i + 1].get("value", "")).strip()
                kind = turns[i].get("type") or _tag(asked) or _prefix(number)
                task = TYPES.get(kind, "short-answer" if kind else None)  # RadGenome's topics are short answers
                if task is None:
                    raise RowError("no turn's type, tag or id tells what kind of question it is")
                question = " ".join(TAG.sub("", asked).split())
                fields = {**scan, "task": task, "subtask": str(kind), "question": question}
                row = _row(source, f"{number}/{i // 2 + 1}", answer, **fields)
                if task == "conversation" and before:
                    row["messages"] = _after(before, question, answer)
                before += [(question, answer)]
                rows.append(row)
            return rows

        return build_rows(json_records(source), build)


def _tag(text):
    return next((tag for tag in TAG.findall(text) if tag != "image"), None)


def _prefix(number):
    return next((name for name in TYPES if number.startswith(name)), None)


def _row(source, number, answer, *, task, question, **fields):
    if task != "multiple-choice":
        return make_row(source, number, kind="text", task=task, question=question, prompt=question, answer=answer,
                        **fields)  # fmt: skip
    options, stem = inline_options(question)
    letter = re.match(r"\(?([A-Ha-h])[).:]\s*(.*)", answer, re.DOTALL)
    if not options or not letter:
        raise RowError("its options or its answer are not like '(a) text'")
    return make_row(source, number, kind="choice", task=task, question=stem, prompt=listed_options(stem, options),
                    answer=letter[1].upper(), options=options, answer_text=letter[2] or None, **fields)  # fmt: skip


def _after(before, question, answer):
    """A chat whose earlier turns are given; the scan stands in the first turn."""
    texts = [text for turn in [*before, (question, answer)] for text in turn]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(texts)
    ]
    messages[0]["content"].insert(0, {"type": "volume"})
    return messages
