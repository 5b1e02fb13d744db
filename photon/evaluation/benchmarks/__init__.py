"""The benchmarks that `evaluate_hf.py --benchmark` takes: one file each, and one line each below.

A benchmark owns its files, its rows, how an answer is read and how it is scored. To add one, write a file like

    from photon.evaluation.benchmark import Benchmark
    from photon.evaluation.records import field, json_records
    from photon.evaluation.row import make_row
    from photon.rows import build_rows

    class Effusion(Benchmark):
        name = "effusion"                                    # --benchmark effusion
        title = "Effusion, yes or no (chest CT)"
        splits = {"test": ("effusion.jsonl",)}               # looked for in --data
        questions, scans = "where to get the questions, licence", "where to get the scans, licence"

        def rows(self, source):
            def build(record):                               # {"case": "p1", "effusion": "yes"}
                return make_row(source, field(record, "case"), [record["case"]], task="presence", subtask="effusion",
                                kind="choice", question="Is there an effusion?", answer=field(record, "effusion"),
                                prompt="Is there an effusion? Answer yes or no.", choices=["yes", "no"])

            return build_rows(json_records(source), build)   # a `RowError` in `build` names the record's line

        def read_choice(self, text, choices):                # optional: the authors' rule to read an answer
            word = text.split()[0].strip(".,").lower() if text.split() else ""
            return word if word in choices else None

and import its class below. `photon.evaluation.benchmark.Benchmark` shows what else a benchmark may decide:
several question files, figures of its authors, a total over all tasks.
"""

from photon.evaluation.benchmark import BENCHMARKS

# an import registers the benchmarks of its file
from photon.evaluation.benchmarks.ct_rate import CtRateVqa
from photon.evaluation.benchmarks.deeptumorvqa1 import Tumor1Choice, Tumor1Text
from photon.evaluation.benchmarks.deeptumorvqa2 import Tumor2Choice, Tumor2Text
from photon.evaluation.benchmarks.m3d import M3dVqa
from photon.evaluation.benchmarks.own import OwnQuestions
from photon.evaluation.benchmarks.rad3d import Rad3D

__all__ = ["BENCHMARKS"]
