"""3D-RAD: chest CT, closed and open questions.

Format: CSVs of github.com/Tang-xiaoxiao/3D-RAD, a folder a task and a file a subtask. Its scan `test_N_x_k` is
CT-RATE's `valid_N_x_k`: several public loaders read it so; the authors do not say it. Their M3D loader puts
`Choices: A. .. B. ..` on one line and `Answer:` after it; how Photon's authors asked is not public. Here each option
has a line, and a last line asks for a letter.
"""

import re
from itertools import count

from photon.evaluation.benchmark import Benchmark
from photon.evaluation.benchmarks.ct_rate import scan_of, scans_from
from photon.evaluation.measures import metric
from photon.evaluation.records import csv_records
from photon.evaluation.row import listed_options, make_row, options_of
from photon.evaluation.scans import patient_of
from photon.rows import RowError, build_rows

TASKS = {
    "1": "image-observation",
    "2": "anomaly-detection",
    "3": "medical-computation",
    "4": "existence",
    "5": "static-temporal",
    "6": "longitudinal-temporal",
}
COLUMNS = ("Task", "Subtask", "VolumeName", "Question", "Answer", "QuestionType", "AnswerChoice")
COLUMNS += tuple(f"Choice {x}" for x in "ABCD")


class Rad3D(Benchmark):
    name = "3d-rad"
    title = "3D-RAD (chest CT, six tasks; test 41 files, 29,218 closed questions)"
    splits = {"test": ("Task*_*/*.csv",), "train": ("Task*_*/*.csv",)}
    hub = "Tang-xiaoxiao/3D-RAD"
    questions = "Hub data set or GitHub repository Tang-xiaoxiao/3D-RAD, folder with Task1_.. to Task6_..; MIT"
    scans = (
        scans_from("validation scans (test_1_a_1 is valid_1_a_1)")
        + ". The .npy files of 3D-RAD (1 x 32 x 256 x 256, 0 to 1) have neither geometry nor HU and are not read"
    )
    tasks = tuple(TASKS.values())
    strict = True

    def files(self, folder, split):
        """All files of the split. The folder itself may be that of one split; then no other split is read from it."""
        names = set(self.splits)
        found = sorted(file for pattern in self.splits[split] for file in folder.rglob(pattern) if file.is_file())
        if folder.resolve().name in names - {split}:
            raise RowError(f"split {split!r} was asked for, but the folder is that of {folder.resolve().name!r}.")
        apart = {file: names & set(file.relative_to(folder).parts[:-2]) for file in found}
        return [file for file in found if not apart[file] or split in apart[file]]

    def rows(self, source):
        read = set()
        for file in source.files:
            folder = re.match(r"Task(\d+)_", file.parent.name)
            if not folder or folder[1] not in TASKS:
                raise RowError(f"{file.parent.name} is no task of 3D-RAD; expected Task1_.. to Task6_...")
            task, subtask = TASKS[folder[1]], file.stem
            if (task, subtask) in read:
                raise RowError(f"{task} {subtask} is there twice; name the folder that is meant as source.")
            read.add((task, subtask))
            yield from self._file(source, file, folder[1], task, subtask)

    def _file(self, source, file, task_number, task, subtask):
        numbers, slug = count(1), re.sub(r"[^a-z0-9]+", "-", subtask.lower()).strip("-")

        def build(record):
            number = f"{task}/{slug}/{next(numbers):05d}"
            if record["Task"] != task_number:
                raise RowError(f"its Task is {record['Task']!r} in a file of task {task_number}")
            kind, question, answer = record["QuestionType"].lower(), record["Question"], record["Answer"]
            options, fields = options_of(record), {"task": task, "subtask": subtask, **scan_of(record["VolumeName"])}
            fields["patient"] = patient_of(record["VolumeName"])
            if kind == "open":
                return make_row(source, number, kind="text", question=question, prompt=question, answer=answer,
                                **fields)  # fmt: skip
            if kind != "close":
                raise RowError(f"its QuestionType is {record['QuestionType']!r}; expected Open or Close")
            if len(options) < 2:
                raise RowError(f"it is closed, but has {len(options)} options")
            return make_row(source, number, kind="choice", question=question, prompt=listed_options(question, options),
                            answer=record["AnswerChoice"], options=options, answer_text=answer, **fields)  # fmt: skip

        return build_rows(csv_records(source, file, COLUMNS), build)

    def read_choice(self, text, choices):
        """The whole answer is the letter, whatever its case (Photon's script)."""
        found = " ".join(text.split()).upper()
        return found if found in choices else None

    def authors(self, rows, texts):
        return metric("rad3d").compute(
            predictions=texts,
            references=[row["answer"] for row in rows],
            tasks=[row["task"] for row in rows],
            subtasks=[row["subtask"] for row in rows],
            kinds=["closed" if row["kind"] == "choice" else "open" for row in rows],
        )
