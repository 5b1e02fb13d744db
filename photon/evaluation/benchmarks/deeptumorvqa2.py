"""DeepTumorVQA 2.0: abdominal CT, multiple choice or free form.

Format and prompts: `data/loader.py` and `data/prompt.py` of github.com/Schuture/DeepTumorVQA.
"""

from itertools import count

from photon.evaluation.benchmarks.deeptumorvqa1 import ATLAS, DeepTumorVQA, atlas_names
from photon.evaluation.measures import metric
from photon.evaluation.records import field, records
from photon.evaluation.row import inline_options, make_row
from photon.rows import build_rows

COLUMNS = ["question_type", "question_subtype", "image_id", "answer"]


class Tumor2(DeepTumorVQA):
    splits = {"benchmark": ("test_qa.json", "test_qa.jsonl"), "train": ("train_qa.csv",)}
    hub = "tumor-vqa/DeepTumorVQA_2.0"
    questions = "Hub data set tumor-vqa/DeepTumorVQA_2.0, benchmark/test_qa.json; CC BY 4.0"
    scans = (
        "the same data set, benchmark/ct/BDMAP_*/ct.nii.gz (about 70 GB), under the terms of their sources "
        "(AbdomenAtlas); those of the training questions " + ATLAS
    )
    tasks = ("recognition", "measurement", "visual-reasoning", "medical-reasoning")
    module = "deeptumorvqa2"
    columns: list  # beside `COLUMNS`

    def rows(self, source):
        numbers = count(1)

        def build(record):
            number = str(record.get("qid") or f"{next(numbers):06d}")
            fields = {"task": field(record, "question_type"), "subtask": field(record, "question_subtype")}
            fields["names"] = atlas_names(field(record, "image_id"))
            return self._row(source, number, record, field(record, "answer"), **fields)

        return build_rows(records(source, [*COLUMNS, *self.columns]), build)

    def prompt(self, record, question, ask):
        """The authors' prompt for a volume; `ask` is its last line."""
        known = [f"{key}={record[key]}" for key in ("sex", "age", "scanner", "contrast") if record.get(key)]
        lines = ["You are given the full 3D abdominal CT volume (NIfTI, native voxel spacing)."]
        lines += [f"Patient: {', '.join(known)}."] if known else []
        if record.get("question_subtype") in metric(self.module).NUMERIC and record.get("spacing"):
            lines.append(f"Voxel spacing (mm): {record['spacing']}.  Volume shape: {record.get('shape')}.")
        return "\n".join([*lines, question, ask])


class Tumor2Choice(Tumor2):
    name = "deeptumorvqa-2"
    title = "DeepTumorVQA 2.0, multiple choice (abdominal CT, 10,000 questions on 991 scans)"
    format = "mc"
    columns = ["mc_question", "correct_option"]

    def _row(self, source, number, record, answer, **fields):
        question = field(record, "mc_question")
        options, stem = inline_options(question)
        prompt = self.prompt(record, question, "Answer with ONLY the single letter (A, B, C, or D).")
        return make_row(source, number, kind="choice", question=stem, prompt=prompt,
                        answer=field(record, "correct_option").upper(), options=options,
                        choices=None if options else list("ABCD"), answer_text=answer, **fields)  # fmt: skip

    def read_choice(self, text, choices):
        """The letter that the authors' scorer finds (`metrics/deeptumorvqa2`)."""
        found = metric(self.module).letter(text)
        return found if found in choices else None


class Tumor2Text(Tumor2):
    name = "deeptumorvqa-2-ft"
    title = "DeepTumorVQA 2.0, free form (abdominal CT, 10,000 questions on 991 scans)"
    format = "freeform"
    columns = ["question"]

    def _row(self, source, number, record, answer, **fields):
        question, subtask, kinds = field(record, "question"), fields["subtask"], metric(self.module)
        if subtask in kinds.NUMERIC:
            ask = "Answer with a single number (no units, no extra words)."
        elif subtask in kinds.BINARY:
            ask = "Answer with 'yes' or 'no'."
        else:
            ask = "Answer with the most appropriate short phrase."
        kind = "number" if subtask in kinds.NUMERIC else "text"
        return make_row(source, number, kind=kind, question=question, prompt=self.prompt(record, question, ask),
                        answer=answer, **fields)  # fmt: skip
