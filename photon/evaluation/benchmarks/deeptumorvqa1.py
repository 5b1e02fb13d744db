"""DeepTumorVQA 1.0: abdominal CT, multiple choice or free text.

Format: JSONL as `evaluation/` of github.com/alibaba-damo-academy/Photon reads it, or a CSV with the columns that
public users of it read. The names of the CSV's free-text columns were not found; those of 2.0 are taken.
"""

import re
from itertools import count

from photon.evaluation.benchmark import Benchmark
from photon.evaluation.measures import Scored, metric
from photon.evaluation.records import field, records
from photon.evaluation.row import inline_options, make_row
from photon.evaluation.scans import SUFFIX
from photon.rows import RowError, build_rows

SCAN, TYPE, SUBTYPE = COLUMNS = (
    ("Image ID", "image_id", "image"),
    ("question type", "question_type"),
    ("question subtype", "question_subtype"),
)
ATLAS = "as AbdomenAtlas 3.0 Mini (Hub AbdomenAtlas/AbdomenAtlas3.0Mini) has them, BDMAP_*/ct.nii.gz; terms of"
ATLAS += " AbdomenAtlas and of each data set in it"


def atlas_names(name):
    """Names of a scan of AbdomenAtlas: BDMAP_1/ct.nii.gz, or BDMAP_1.nii.gz."""
    parts = [part for part in SUFFIX.sub("", str(name).strip()).replace("\\", "/").split("/") if part]
    if not parts:
        raise RowError("it names no scan")
    case = parts[-2] if parts[-1] == "ct" and len(parts) > 1 else parts[-1]
    return [f"{case}/ct", case]


class DeepTumorVQA(Benchmark):
    """What both versions share: the authors score each question, of whatever kind, by one rule.

    Attributes: module: of `metrics/`; format: how that module names the format of the answers.
    """

    module: str
    format: str

    def rule(self, row):
        return "choice" if row["kind"] == "choice" else "text"

    def measure(self, rows, texts):
        return super().measure(rows, texts) if rows[0]["kind"] == "choice" else self.overall(rows, texts)

    def authors(self, rows, texts):
        return metric(self.module).compute(
            predictions=texts,
            references=[row["answer"] for row in rows],
            types=[row["task"] for row in rows],
            subtypes=[row["subtask"] for row in rows],
            answer_format=self.format,
        )

    def overall(self, rows, texts):
        """The authors' total: 1.0 takes the mean over subtypes (macro), 2.0 that over questions (micro)."""
        score = metric(self.module).score
        return Scored([score(text, row["answer"], row["subtask"], self.format)
                       for row, text in zip(rows, texts, strict=True)])  # fmt: skip


class Tumor1(DeepTumorVQA):
    hub = "tumor-vqa/DeepTumorVQA_1.0"
    questions = "Hub data set tumor-vqa/DeepTumorVQA_1.0; see its card for the licence"
    scans = ATLAS
    module = "deeptumorvqa1"
    asked: tuple  # names of the question's column; `answered`: of the answer's
    answered: tuple

    def rows(self, source):
        numbers = count(1)

        def build(record):
            number = f"{next(numbers):06d}"
            fields = {"task": field(record, *TYPE), "subtask": field(record, *SUBTYPE)}
            if "messages" in record:
                question, answer = _turns(record)
                scans = record.get("videos") or record.get("volumes") or []
                scan = str(scans[0]) if isinstance(scans, list) and len(scans) == 1 else ""
            else:
                scan, question, answer = (field(record, *names) for names in (SCAN, self.asked, self.answered))
            return self._row(source, number, atlas_names(scan), record, question, answer, **fields)

        return build_rows(records(source, [*COLUMNS, self.asked, self.answered]), build)


class Tumor1Choice(Tumor1):
    name = "deeptumorvqa-1-mc"
    title = "DeepTumorVQA 1.0, multiple choice (abdominal CT)"
    splits = {"val": ("val_multi_choice.jsonl", "val*.csv"), "train": ("train_multi_choice.jsonl", "train*.csv")}
    format = "mc"
    asked, answered = ("multiple-choice question", "mc_question"), ("correct option", "correct_option")

    def _row(self, source, number, names, record, question, answer, **fields):
        options, stem = inline_options(question)
        letter = re.match(r"\(?([A-H])\)?\s*([.:)]|$)", answer)
        return make_row(source, number, names, kind="choice", question=stem, prompt=question,
                        answer=letter[1] if letter else answer, options=options,
                        choices=None if options else list("ABCD"),
                        answer_text=None if "messages" in record else record.get("answer"), **fields)  # fmt: skip

    def read_choice(self, text, choices):
        """The answer is the letter, character by character (Photon's script)."""
        return text if text in choices else None


class Tumor1Text(Tumor1):
    name = "deeptumorvqa-1-ft"
    title = "DeepTumorVQA 1.0, free text (abdominal CT)"
    splits = {"val": ("val_free_text.jsonl", "val*.csv"), "train": ("train_free_text.jsonl", "train*.csv")}
    format = "freetext"
    asked, answered = ("question",), ("answer",)

    def _row(self, source, number, names, record, question, answer, **fields):
        numeric = {subtype.lower() for subtype in metric(self.module).MRA_SUBTYPES}
        kind = "number" if fields["subtask"].replace("_", " ").lower() in numeric else "text"
        return make_row(source, number, names, kind=kind, question=question, prompt=question, answer=answer, **fields)


def _turns(record):
    """Question and answer of a chat with one turn of each."""
    turns = [m for m in record["messages"] if isinstance(m, dict) and m.get("role") != "system"]
    texts = [m.get("content") for m in turns]
    if [m.get("role") for m in turns] != ["user", "assistant"] or not all(isinstance(t, str) for t in texts):
        raise RowError("its messages are not one question and one answer in plain text")
    return re.sub(r"<video>|<volume>", "", texts[0]).strip(), texts[1].strip()
