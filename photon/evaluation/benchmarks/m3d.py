"""M3D-VQA: CT, closed questions.

Format: `VQADataset` of github.com/BAAI-DCAI/M3D. An option "NA" is no option, as in its generator.
"""

from itertools import count

from photon.evaluation.benchmark import Benchmark
from photon.evaluation.records import csv_records
from photon.evaluation.row import listed_options, make_row, options_of
from photon.evaluation.scans import stem_of
from photon.rows import RowError, build_rows

TASKS = {"1": "plane", "2": "phase", "3": "organ", "4": "abnormality", "5": "location"}
COLUMNS = ("Image Path", "Question Type", "Question", "Answer", "Answer Choice", *(f"Choice {x}" for x in "ABCD"))


class M3dVqa(Benchmark):
    name = "m3d-vqa"
    title = "M3D-VQA, closed questions (CT)"
    splits = {
        "test": ("M3D_VQA_test.csv", "M3D_VQA_test5k.csv"),
        "val": ("M3D_VQA_val.csv",),
        "train": ("M3D_VQA_train.csv",),
    }
    hub = "GoodBaiBai88/M3D-VQA"
    questions = "Hub data set GoodBaiBai88/M3D-VQA"
    scans = (
        "M3D-Cap (Hub GoodBaiBai88/M3D-Cap), from Radiopaedia, no commercial use. Its pictures and .npy files "
        "have neither geometry nor HU; this needs each as a scan with the same path and the suffix .nii.gz"
    )
    tasks = tuple(TASKS.values())

    def rows(self, source):
        numbers = count(1)

        def build(record):
            number, kind = f"{next(numbers):06d}", record["Question Type"]
            if kind not in TASKS:
                raise RowError(f"its Question Type is {kind!r}; expected 1 to 5")
            options = options_of(record)
            if len(options) < 2:
                raise RowError(f"it has {len(options)} options")
            parts = stem_of(record["Image Path"]).replace("\\", "/").strip("/").split("/")
            case = "/".join(parts[-3:-1]) or parts[-1]  # a folder holds the phases of one case
            question = record["Question"]
            return make_row(source, number, ["/".join(parts[-3:])], task=TASKS[kind], subtask=TASKS[kind],
                            kind="choice", question=question, prompt=listed_options(question, options),
                            answer=record["Answer Choice"].upper(), options=options, answer_text=record["Answer"],
                            patient=case)  # fmt: skip

        return build_rows(csv_records(source, source.file, COLUMNS), build)
