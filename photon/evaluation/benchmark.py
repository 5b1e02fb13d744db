"""What a benchmark has to say about itself, and the defaults that most benchmarks share."""

from pathlib import Path

from photon.evaluation.letters import choice_in
from photon.evaluation.measures import Closed, Open, Scored, metric
from photon.rows import RowError

BENCHMARKS = {}  # {name: benchmark}, as photon/evaluation/benchmarks/__init__.py imports them


class Benchmark:
    """A benchmark: where its files are, how they become rows, how an answer is read and scored.

    A subclass with a `name` is registered in `BENCHMARKS` when its file is imported. It sets the attributes without a
    default and writes `rows`. It overrides the other methods where the benchmark's authors have another rule.

    Attributes:
        name: as `--benchmark` and the rows' `benchmark` have it.
        title: name and content, for people.
        splits: {split: patterns of its question file}. The first split is the default; of the patterns the first that
            matches a file is taken.
        hub: Hub id of the questions, or `None`.
        questions, scans: where to get them, under which licence.
        tasks: names of the tasks; empty where the files decide.
        strict: whether an answer whose text is not the text of its letter is a fault. If not, it is counted in a
            warning and the letter is scored, as the authors do.
    """

    name: str
    title: str
    splits: dict
    hub = None
    questions: str
    scans: str
    tasks = ()
    strict = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):  # what several benchmarks share has none
            if cls.name in BENCHMARKS:
                raise ValueError(f"There are two benchmarks of the name {cls.name!r}.")
            BENCHMARKS[cls.name] = cls()

    # --- files and rows

    @property
    def default_split(self):
        return next(iter(self.splits))

    @property
    def train_split(self):
        """The split of training questions, for the baselines; the default split where there is no other."""
        return "train" if "train" in self.splits else self.default_split

    def check_split(self, split):
        """Raises `RowError` where the benchmark has no such split."""
        if split not in self.splits:
            raise RowError(f"{self.name} has no split {split!r}; known are {', '.join(self.splits)}.")

    def files(self, folder: Path, split: str):
        """The question files of a split in a folder: one file; empty where there is none. Raises `RowError`."""
        for pattern in self.splits[split]:
            found = sorted(file for file in folder.rglob(pattern) if file.is_file())
            if len(found) > 1:
                names = ", ".join(str(file.relative_to(folder)) for file in found[:5])
                raise RowError(f"{len(found)} files could be {self.name} {split}: {names}. Name one as source.")
            if found:
                return found
        return []

    def rows(self, source):
        """(place, row) of each question, or (place, `RowError`) of a faulty one.

        Args: source: a `photon.evaluation.records.Source`. See `photon.evaluation.row.make_row` for rows.
        """
        raise NotImplementedError

    # --- answers and figures

    def read_choice(self, text, choices):
        """The choice that an answer names, or `None`."""
        return choice_in(text, choices)

    def rule(self, row):
        """The rule by which a row is scored. Rows of one task with several rules are reported apart."""
        return row["kind"]

    def measure(self, rows, texts):
        """A measure (`photon.evaluation.measures`) of answers to rows of one task under one rule."""
        if rows[0]["kind"] == "choice":
            return Closed(rows, [self.read_choice(t, row["choices"]) for row, t in zip(rows, texts, strict=True)])
        if all(row["kind"] == "number" for row in rows):
            mra = metric("deeptumorvqa1").mra
            return Scored([mra(text, row["answer"]) for row, text in zip(rows, texts, strict=True)])
        return Open(rows, texts)

    def authors(self, rows, texts):
        """The figures of the benchmark's authors as a dict, or `None` where they have none here."""
        return None

    def overall(self, rows, texts):
        """A measure over all tasks, or `None` where the benchmark has no total."""
        return None

    def what_to_download(self):
        return f"{self.title}\n  questions: {self.questions}\n  scans: {self.scans}"
