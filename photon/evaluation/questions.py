"""Benchmarks of questions about CT volumes, each to rows of one form.

    rows = load_benchmark("3d-rad", QUESTIONS, volumes=SCANS)

A row is a dict that JSON can hold, and a row of `training_data.load_rows` as well: `id`, `benchmark`, `task`,
`subtask`, `kind` ("choice": the answer is a letter; "number"; "text"), `patient` (the unit of resampling), `volumes`
(paths), `messages` (the last is the answer), `question` (as printed, without options), `answer`, `options`
{letter: text} and `choices` [letters], the last two `None` where there are none.

Where the formats come from (read in public code; the files themselves are not all public):
- 3D-RAD: CSVs of github.com/Tang-xiaoxiao/3D-RAD. Its scan `test_N_x_k` is CT-RATE's `valid_N_x_k`: so several public
  loaders read it; the authors do not say it. Their M3D loader puts `Choices: A. .. B. ..` on one line and `Answer:`
  after it; how Photon's authors asked is not public. Here each option has a line, and a last line asks for a letter.
- DeepTumorVQA 2.0: `data/loader.py` and `data/prompt.py` of github.com/Schuture/DeepTumorVQA; prompts as there.
- DeepTumorVQA 1.0: JSONL as `evaluation/` of github.com/alibaba-damo-academy/Photon reads it, or a CSV with the
  columns that public users of it read; the names of its free-text columns were not found, those of 2.0 are taken.
- M3D-VQA: `VQADataset` of github.com/BAAI-DCAI/M3D. An option "NA" is none, as in its generator.
- CT-RATE VQA: `llava/serve` and `evaluations` of github.com/ibrahimethemhamamci/CT-CHAT. A question stands alone, but
  for type "conversation", where the earlier turns precede it with their reference answers (CT-CHAT: with its own).

Faults are named by file and line and never by scan. The same question twice about one scan is kept, as the authors
score it, and counted in a warning; the same id twice is a fault.
"""

import csv
import json
import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MAX_FAULTS = 20  # as many are spelt out; the rest is counted
LETTERS = "ABCDEFGH"
SCAN = re.compile(r"\.(nii\.gz|nii|nrrd|nhdr|mha|mhd)$", re.IGNORECASE)
ARRAY = re.compile(r"\.(npy|npz)$", re.IGNORECASE)
CT_RATE = re.compile(r"(train|valid|test)_(\d+)_([a-z]+)_(\d+)")
TAG = re.compile(r"<(image|multiple_choice|short_answer|long_answer|report_generation)>")
NO_OPTION = {"", "-", "na", "nan"}
ASK_LETTER = "Answer with the letter of the right option."


class BenchmarkError(ValueError):
    """Something in a benchmark's files, named by file and line; `faults` has all of them."""

    def __init__(self, message, faults=()):
        super().__init__(message)
        self.faults = list(faults)

    @classmethod
    def of(cls, faults, what):
        more = [f"... and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
        return cls("\n  ".join([f"{len(faults)} {what}:", *faults[:MAX_FAULTS], *more]), faults)


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark is, where it is from, and how its files are read.

    Args: read: function of (questions' `Source`) that yields (place, row or `BenchmarkError`); splits: {name: patterns
        of its file, the first that matches is taken}, the first split is the default; strict: whether an answer's text
        must be the text of its letter (else it is counted in a warning; the letter is scored, as the authors do).
    """

    name: str
    title: str
    read: object
    splits: dict
    hub: str | None
    questions: str
    scans: str
    tasks: tuple = ()
    strict: bool = False


@dataclass
class Source:
    """Question files, and where scans are."""

    benchmark: Benchmark
    split: str
    files: list
    root: Path
    scans: "Scans"

    def name(self, file):
        """A question file's name for messages."""
        return str(file.relative_to(self.root)) if file.is_relative_to(self.root) else file.name


# === Loading =========================================================================================================


def load_benchmark(name, source, *, volumes=None, split=None, revision=None, tasks=None, limit=None, faults="refuse"):
    """Rows of a benchmark.

    Args:
        name: one of `BENCHMARKS`.
        source: folder or file of its questions, or a Hub id (questions alone are downloaded, never scans).
        volumes: folder in which scans are looked for by name, at any depth; default the folder of the questions.
        split: default the test split.
        revision: branch, tag or commit of a Hub id.
        tasks: only these tasks.
        limit: only the first so many questions.
        faults: "leave-out" drops faulty questions with a warning that names them, instead of raising.
    Returns: list of rows. A scan that is not there has the path where it is expected; see `missing_volumes`.
    Raises: `BenchmarkError`; `FileNotFoundError` for a source that is neither there nor a Hub id.
    """
    if name not in BENCHMARKS:
        raise BenchmarkError(f"There is no benchmark {name!r}; known are {', '.join(BENCHMARKS)}.")
    if faults not in ("refuse", "leave-out"):
        raise ValueError(f'faults={faults!r}; expected "refuse" or "leave-out".')
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; expected a number above 0, or None for all.")
    benchmark = BENCHMARKS[name]
    wanted = _wanted(benchmark, tasks)
    found = _source(benchmark, source, volumes, split, revision)
    rows, wrong, odd = [], [], []
    for place, row in benchmark.read(found):
        if isinstance(row, BenchmarkError):
            wrong.append(f"{place}: {row}")
            continue
        doubt = _doubt(row)
        if doubt and benchmark.strict:
            wrong.append(f"{place}: {doubt}")
            continue
        odd += [f"{place}: {doubt}"] if doubt else []
        rows.append((place, row))
    wrong += _repeated(rows)
    if wrong and faults == "refuse":
        raise BenchmarkError.of(wrong, f"faulty questions of {name} (faults='leave-out' goes on without them)")
    if wrong:
        warnings.warn(str(BenchmarkError.of(wrong, f"questions of {name} were left out")), stacklevel=2)
        seen = Counter(row["id"] for _, row in rows)
        rows = [(place, row) for place, row in rows if seen[row["id"]] == 1]
    _warn(rows, odd)
    rows = _filtered([row for _, row in rows], wanted, name)
    return rows[:limit]


def missing_volumes(rows):
    """Paths of scans that are not on disk, in the order of the rows; each once."""
    paths = dict.fromkeys(v["path"] if isinstance(v, dict) else v for row in rows for v in row["volumes"])
    return [path for path in paths if not os.path.exists(path)]


def missing_report(rows, name):
    """Text that lists missing scans by their number among all, and says what to download; "" if all are there."""
    paths = list(dict.fromkeys(v["path"] if isinstance(v, dict) else v for row in rows for v in row["volumes"]))
    missing = set(missing_volumes(rows))
    numbers = [number for number, path in enumerate(paths, start=1) if path in missing]
    if not numbers:
        return ""
    return f"{len(numbers)} of {len(paths)} scans are missing: {_ranges(numbers)}.\n{what_to_download(name)}"


def what_to_download(name):
    """What a benchmark needs, from where, under which licence."""
    if name not in BENCHMARKS:
        raise BenchmarkError(f"There is no benchmark {name!r}; known are {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    return f"{benchmark.title}\n  questions: {benchmark.questions}\n  scans: {benchmark.scans}"


@lru_cache(maxsize=65536)
def patient_of(scan):
    """The patient in a scan's name: CT-RATE's valid_12_a_1 -> valid_12, BDMAP_1/ct.nii.gz -> BDMAP_1; or the name."""
    path = Path(scan)
    stem = ARRAY.sub("", SCAN.sub("", path.name))
    match = CT_RATE.fullmatch(stem)
    if match:
        return f"{match[1]}_{match[2]}"
    return path.parent.name if stem == "ct" and path.parent.name else stem


def _wanted(benchmark, tasks):
    if tasks is None:
        return None
    wanted = {str(task).strip().lower().replace(" ", "-").replace("_", "-") for task in tasks}
    unknown = wanted - set(benchmark.tasks) if benchmark.tasks else set()
    if unknown or not wanted:
        known = ", ".join(benchmark.tasks)
        raise BenchmarkError(f"{benchmark.name} has no task {', '.join(sorted(unknown)) or 'at all'}; known: {known}.")
    return wanted


def _filtered(rows, wanted, name):
    kept = [row for row in rows if wanted is None or _slug(row["task"]) in wanted]
    if not kept:
        there = ", ".join(sorted({row["task"] for row in rows})) or "none"
        raise BenchmarkError(f"No question of {name} is left; tasks in these files: {there}.")
    absent = set() if wanted is None else wanted - {_slug(row["task"]) for row in kept}
    if absent:
        raise BenchmarkError(f"These files have no question of {', '.join(sorted(absent))}.")
    return kept


def _source(benchmark, source, volumes, split, revision):
    splits = benchmark.splits
    split = split or next(iter(splits))
    if split not in splits:
        raise BenchmarkError(f"{benchmark.name} has no split {split!r}; known are {', '.join(splits)}.")
    path = Path(source)
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise FileNotFoundError(
                f"The questions of {benchmark.name} are not there; give their folder or file, or a Hub id like "
                f"{benchmark.hub or 'owner/name'}.\n{what_to_download(benchmark.name)}"
            )
        path = _download(benchmark, str(source), split, revision)
    elif revision is not None:
        raise BenchmarkError("revision is for a Hub id; the source is a folder or file.")
    root = path if path.is_dir() else path.parent
    files = _files(benchmark, path, split) if path.is_dir() else [path]
    where = Path(volumes) if volumes is not None else root
    if not where.is_dir():
        raise FileNotFoundError("volumes is not a folder; give the folder in which the scans are.")
    return Source(benchmark, split, files, root, Scans(where))


def _download(benchmark, hub_id, split, revision):
    from huggingface_hub import snapshot_download

    patterns = [p for pattern in benchmark.splits[split] for p in (pattern, f"*/{pattern}")]
    return Path(snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=patterns))


def _files(benchmark, folder, split):
    for pattern in benchmark.splits[split]:
        found = sorted(file for file in folder.rglob(pattern) if file.is_file())
        found = _of_split(found, folder, split, benchmark)
        if len(found) > 1 and benchmark.name != "3d-rad":
            names = ", ".join(str(file.relative_to(folder)) for file in found[:5])
            raise BenchmarkError(f"{len(found)} files could be {benchmark.name} {split}: {names}. Name one as source.")
        if found:
            return found
    expected = " or ".join(benchmark.splits[split])
    raise BenchmarkError(f"The folder has no {expected}.\n{what_to_download(benchmark.name)}")


def _of_split(files, folder, split, benchmark):
    """Files in folders of the split. The folder itself may be one split's; then no other is read from it."""
    if benchmark.name != "3d-rad":
        return files
    names = set(benchmark.splits)
    if folder.resolve().name in names - {split}:
        raise BenchmarkError(f"split {split!r} was asked for, but the folder is that of {folder.resolve().name!r}.")
    apart = {file: names & set(file.relative_to(folder).parts[:-2]) for file in files}
    return [file for file in files if not apart[file] or split in apart[file]]


def _doubt(row):
    """What speaks against a row's letter, or `None`."""
    text, options = row.pop("answer_text", None), row["options"]
    if text is None or not options:
        return None
    same = [letter for letter, option in options.items() if _same(option, text)]
    if row["answer"] in same:
        return None
    if same:
        return f"the letter is {row['answer']}, but the answer's text is that of {' and '.join(same)}"
    return f"the answer's text is none of the options {', '.join(options)}"


@lru_cache(maxsize=4096)  # few texts, many questions
def _same(first, second):
    first, second = (" ".join(str(text).split()).lower().rstrip(".") for text in (first, second))
    if first == second:
        return True
    numbers = [re.match(r"-?\d+(\.\d+)?(?=\s|$|%)", text) for text in (first, second)]  # "12.50 HU" is "12.5"
    return all(numbers) and float(numbers[0][0]) == float(numbers[1][0])


def _repeated(rows):
    first, wrong = {}, []
    for place, row in rows:
        if row["id"] in first:
            wrong.append(f"{place}: its id is that of {first[row['id']]}")
        first.setdefault(row["id"], place)
    return wrong


def _warn(rows, odd):
    answers = {}
    for _, row in rows:
        key = str([row["task"], row["subtask"], row["volumes"], row["messages"][:-1]])
        answers.setdefault(key, []).append(row["answer"])
    repeated = [found for found in answers.values() if len(found) > 1]
    if repeated:
        differ = sum(len(set(found)) > 1 for found in repeated)
        warnings.warn(
            f"{len(repeated)} questions stand in the files more than once for one scan, {differ} of them with "
            "different answers. All are kept, as the benchmark's authors score them.",
            stacklevel=3,
        )
    if odd:
        message = BenchmarkError.of(odd, "questions whose letter and answer's text do not agree; the letter is scored")
        warnings.warn(str(message), stacklevel=3)


def _ranges(numbers):
    """1, 2, 3, 7 -> "1-3, 7"."""
    parts, start = [], 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            first, last = numbers[start], numbers[i - 1]
            parts.append(f"{first}-{last}" if last > first else f"{first}")
            start = i
    shown = parts[: 2 * MAX_FAULTS]
    return ", ".join(shown + ([f"... and {len(parts) - len(shown)} more ranges"] if len(parts) > len(shown) else []))


def _slug(text):
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-")


# === Scans ===========================================================================================================


class Scans:
    """Files of scans under a folder, found by the end of their path without suffix."""

    def __init__(self, root):
        self.root, self.index = root, None

    def path(self, *names):
        """The file of the first name that is there, as text; else where the first name is expected.

        Args: names: like "valid_1_a_1", "BDMAP_1/ct", "ct_quizze/000006/Axial".
        Raises: `BenchmarkError` where a name is there more than once.
        """
        if self.index is None:
            self.index = self._walk()
        for name in names:
            parts = tuple(name.split("/"))
            found = [p for tail, p in self.index.get(parts[-1], ()) if tail[-len(parts) :] == parts]
            if len(found) > 1:
                raise BenchmarkError(f"its scan is in {len(found)} places below volumes; name the one folder meant")
            if found:
                return str(found[0])
        match = CT_RATE.fullmatch(names[0])
        nested = f"{match[1]}_{match[2]}/{match[1]}_{match[2]}_{match[3]}/{names[0]}" if match else names[0]
        return str(self.root / f"{nested}.nii.gz")

    def _walk(self):
        index, seen = {}, set()
        for folder, inner, files in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link back
                inner.clear()
                continue
            seen.add(real)
            parts = Path(folder).relative_to(self.root).parts
            for file in sorted(files):
                if SCAN.search(file):
                    stem = SCAN.sub("", file)
                    index.setdefault(stem, []).append(((self.root.name, *parts, stem), Path(folder) / file))
        return index


def _ct_rate_names(name):
    """Names under which CT-RATE has a scan of 3D-RAD (test_1_a_1 -> valid_1_a_1), and its own."""
    stem = ARRAY.sub("", SCAN.sub("", name.strip()))
    if not CT_RATE.fullmatch(stem):
        raise BenchmarkError("its scan's name is not like train_1_a_1.nii.gz")
    return list(dict.fromkeys([re.sub("^test_", "valid_", stem), stem]))


def _atlas_names(name):
    """AbdomenAtlas: BDMAP_1/ct.nii.gz, or BDMAP_1.nii.gz."""
    parts = [part for part in SCAN.sub("", str(name).strip()).replace("\\", "/").split("/") if part]
    if not parts:
        raise BenchmarkError("it names no scan")
    case = parts[-2] if parts[-1] == "ct" and len(parts) > 1 else parts[-1]
    return [f"{case}/ct", case]


# === Rows ============================================================================================================


def _row(source, number, names, *, task, subtask, kind, question, prompt, answer, options=None, text=None, **more):
    """One row. `number`: what makes its id unique; `names`: of its scan; `text`: the answer's, beside its letter."""
    if not answer:
        raise BenchmarkError("its answer is empty")
    if not question:
        raise BenchmarkError("its question is empty")
    choices = more.pop("choices", None) or (list(options) if options else None)
    if kind == "choice" and answer not in choices:
        raise BenchmarkError(f"its answer {answer[:20]!r} is none of the choices {', '.join(choices)}")
    default = next(iter(source.benchmark.splits))
    prefix = source.benchmark.name + ("" if source.split == default else f"-{source.split}")
    return {
        "id": f"{prefix}/{number}",
        "benchmark": source.benchmark.name,
        "task": task,
        "subtask": subtask,
        "kind": kind,
        "patient": patient_of(names[0]),
        "volumes": [source.scans.path(*names)],
        "messages": [
            {"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "question": question,
        "answer": answer,
        "options": options,
        "choices": choices,
        "answer_text": text,
        **more,
    }


def _listed(question, options):
    """A question with a line for each option, and a line that asks for the letter."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items()), ASK_LETTER])


def _csv(source, file, required):
    """(place, record or `BenchmarkError`) of a CSV's records. Its columns are checked first; a tuple among `required`
    holds names of which one must be there."""
    name = source.name(file)
    with open(file, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            columns = set(reader.fieldnames or [])
            absent = [n if isinstance(n, str) else " or ".join(n) for n in required
                      if not columns & ({n} if isinstance(n, str) else set(n))]  # fmt: skip
            if absent:
                raise BenchmarkError(
                    f"{name} line 1: no column {', '.join(absent)}; there are {reader.fieldnames or 'none'}."
                )
            line = reader.line_num + 1
            for record in reader:
                place, line = f"{name} line {line}", reader.line_num + 1
                if None in record or None in record.values():
                    count = len(reader.fieldnames)
                    yield place, BenchmarkError(f"its fields are not as many as the {count} columns")
                else:
                    yield place, {key: value.strip() for key, value in record.items()}
        except UnicodeDecodeError as error:
            raise BenchmarkError(f"{name} line {reader.line_num + 1}: not UTF-8 ({error.reason}).") from error
        except csv.Error as error:
            raise BenchmarkError(f"{name} line {reader.line_num + 1}: not CSV ({error}).") from error


def _json(source, file):
    """(place, record or `BenchmarkError`) of a JSON list, of {"questions": list}, or of JSON lines."""
    if file.suffix == ".jsonl":
        with open(file, encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                place = f"{source.name(file)} line {number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    yield place, BenchmarkError(f"not JSON ({error.msg} at character {error.pos + 1})")
                    continue
                yield place, record if isinstance(record, dict) else BenchmarkError("not a JSON object")
        return
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{file.name}: not JSON ({error}).") from error
    data = data.get("questions") if isinstance(data, dict) else data
    if not isinstance(data, list):
        raise BenchmarkError(f'{file.name}: expected a list, or {{"questions": list}}.')
    for number, record in enumerate(data, start=1):
        good = isinstance(record, dict)
        yield f"{source.name(file)} question {number}", record if good else BenchmarkError("not a JSON object")


def _each(records, build):
    """(place, row or fault) where `build(record)` makes a row, or several."""
    for place, record in records:
        try:
            if isinstance(record, BenchmarkError):
                raise record
            rows = build(record)
            yield from ((place, row) for row in (rows if isinstance(rows, list) else [rows]))
        except BenchmarkError as error:
            yield place, error


def _field(record, *names):
    """A record's value under the first of several names, as text."""
    for name in names:
        if record.get(name) not in (None, ""):
            return str(record[name]).strip()
    raise BenchmarkError(f"no {' or '.join(map(repr, names))}; it has {', '.join(map(str, sorted(record)))}")


# === Benchmarks ======================================================================================================

RAD_TASKS = {
    "1": "image-observation",
    "2": "anomaly-detection",
    "3": "medical-computation",
    "4": "existence",
    "5": "static-temporal",
    "6": "longitudinal-temporal",
}
RAD_COLUMNS = ("Task", "Subtask", "VolumeName", "Question", "Answer", "QuestionType", "AnswerChoice")


def _read_rad(source):
    seen = {}
    for file in source.files:
        folder = re.match(r"Task(\d+)_", file.parent.name)
        if not folder or folder[1] not in RAD_TASKS:
            raise BenchmarkError(f"{file.parent.name} is no task of 3D-RAD; expected Task1_.. to Task6_...")
        task, subtask = RAD_TASKS[folder[1]], file.stem
        if (task, subtask) in seen:
            raise BenchmarkError(f"{task} {subtask} is there twice; name the folder that is meant as source.")
        seen[task, subtask] = file
        count = iter(range(1, 10**9))

        def build(record, task=task, subtask=subtask, folder=folder, count=count):
            number = f"{task}/{_slug(subtask)}/{next(count):05d}"
            if record["Task"] != folder[1]:
                raise BenchmarkError(f"its Task is {record['Task']!r} in a file of task {folder[1]}")
            kind, question, answer = record["QuestionType"].lower(), record["Question"], record["Answer"]
            options = {x: record[f"Choice {x}"] for x in "ABCD" if record[f"Choice {x}"].lower() not in NO_OPTION}
            names, fields = _ct_rate_names(record["VolumeName"]), {"task": task, "subtask": subtask}
            fields |= {"patient": patient_of(record["VolumeName"])}
            if kind == "open":
                return _row(source, number, names, kind="text", question=question, prompt=question,
                            answer=answer, **fields)  # fmt: skip
            if kind != "close":
                raise BenchmarkError(f"its QuestionType is {record['QuestionType']!r}; expected Open or Close")
            if len(options) < 2:
                raise BenchmarkError(f"it is closed, but has {len(options)} options")
            return _row(source, number, names, kind="choice", question=question, prompt=_listed(question, options),
                        answer=record["AnswerChoice"], options=options, text=answer, **fields)  # fmt: skip

        yield from _each(_csv(source, file, [*RAD_COLUMNS, *(f"Choice {x}" for x in "ABCD")]), build)


def _inline(question):
    """Options written within a question, "... A: one B: two", as {letter: text}, and the question before them."""
    marks = list(re.finditer(r"(?:^|(?<=[\s,;?]))(\(?)([A-Da-d])([:.)])\s+", question))
    for begin in reversed(marks):
        run = []
        for mark in marks:  # the letters in turn, all written alike: "E. coli" and "(a) B. cereus" are no options
            due = mark.start() >= begin.start() and mark[2].upper() == "ABCDE"[len(run)]
            run += [mark] if due and (mark[1], mark[3]) == (begin[1], begin[3]) else []
        if len(run) > 1 and run[0] is begin:
            ends = [m.start() for m in run[1:]] + [len(question)]
            texts = [question[m.end() : end].strip(" ,;\n") for m, end in zip(run, ends, strict=True)]
            return dict(zip("ABCD", texts, strict=False)), question[: begin.start()].strip()
    return None, question


MRA_SUBTYPES = {
    "lesion volume measurement", "organ hu measurement", "organ volume measurement", "largest lesion diameter",
    "largest lesion slice", "lesion count by location", "lesion counting", "organ aggregation",
    "tumor organ hu difference",
}  # fmt: skip


TUMOR1_CHOICE = (("multiple-choice question", "mc_question"), ("correct option", "correct_option"))
TUMOR1_COLUMNS = (
    ("Image ID", "image_id", "image"),
    ("question type", "question_type"),
    ("question subtype", "question_subtype"),
)


def _read_tumor1(source):
    choice = source.benchmark.name.endswith("-mc")
    asked, answered = TUMOR1_CHOICE if choice else (("question",), ("answer",))
    scan, kinds, subkinds = TUMOR1_COLUMNS
    count = iter(range(1, 10**9))

    def build(record):
        number = f"{next(count):06d}"
        fields = {"task": _field(record, *kinds), "subtask": _field(record, *subkinds)}
        if "messages" in record:
            question, answer = _turns(record)
            scans = record.get("videos") or record.get("volumes") or []
            name = str(scans[0]) if isinstance(scans, list) and len(scans) == 1 else ""
        else:
            name, question, answer = (_field(record, *names) for names in (scan, asked, answered))
        kind = "number" if fields["subtask"].replace("_", " ").lower() in MRA_SUBTYPES else "text"
        if not choice:
            return _row(source, number, _atlas_names(name), kind=kind, question=question, prompt=question,
                        answer=answer, **fields)  # fmt: skip
        options, stem = _inline(question)
        letter = re.match(r"\(?([A-H])\)?\s*([.:)]|$)", answer)
        return _row(source, number, _atlas_names(name), kind="choice", question=stem, prompt=question,
                    answer=letter[1] if letter else answer, options=options, choices=None if options else list("ABCD"),
                    text=None if "messages" in record else record.get("answer"), **fields)  # fmt: skip

    columns = [*TUMOR1_COLUMNS, asked, answered]
    file = source.files[0]
    yield from _each(_csv(source, file, columns) if file.suffix == ".csv" else _json(source, file), build)


def _turns(record):
    """Question and answer of a chat with one turn of each."""
    turns = [m for m in record["messages"] if isinstance(m, dict) and m.get("role") != "system"]
    texts = [m.get("content") for m in turns]
    if [m.get("role") for m in turns] != ["user", "assistant"] or not all(isinstance(t, str) for t in texts):
        raise BenchmarkError("its messages are not one question and one answer in plain text")
    return re.sub(r"<video>|<volume>", "", texts[0]).strip(), texts[1].strip()


NUMERIC2 = {
    "organ volume measurement", "organ HU measurement", "lesion volume measurement", "organ HU ratio",
    "tumor burden percentage", "largest lesion diameter", "largest lesion slice", "lesion counting",
    "lesion count by location", "organ aggregation", "tumor organ HU difference",
}  # fmt: skip
BINARY2 = {
    "pancreatic lesion existence", "liver lesion existence", "kidney lesion existence", "kidney tumor existence",
    "kidney cyst existence", "colon lesion existence", "PDAC existence", "PNET existence", "lesion outlier",
    "organ enlargement", "pancreatic steatosis", "pancreatic cyst resectability", "pseudocyst determination",
    "splenomegaly detection", "portal hypertension assessment",
}  # fmt: skip


def _prompt2(record, question, choice):
    """The prompt of DeepTumorVQA 2.0 for a volume."""
    known = [f"{key}={record[key]}" for key in ("sex", "age", "scanner", "contrast") if record.get(key)]
    subtype = record.get("question_subtype")
    lines = ["You are given the full 3D abdominal CT volume (NIfTI, native voxel spacing)."]
    lines += [f"Patient: {', '.join(known)}."] if known else []
    if subtype in NUMERIC2 and record.get("spacing"):
        lines.append(f"Voxel spacing (mm): {record['spacing']}.  Volume shape: {record.get('shape')}.")
    if choice:
        ask = "Answer with ONLY the single letter (A, B, C, or D)."
    elif subtype in NUMERIC2:
        ask = "Answer with a single number (no units, no extra words)."
    else:
        ask = "Answer with 'yes' or 'no'." if subtype in BINARY2 else "Answer with the most appropriate short phrase."
    return "\n".join([*lines, question, ask])


def _read_tumor2(source):
    choice = not source.benchmark.name.endswith("-ft")
    count = iter(range(1, 10**9))

    def build(record):
        number = str(record.get("qid") or f"{next(count):06d}")
        task, subtask = _field(record, "question_type"), _field(record, "question_subtype")
        names, answer = _atlas_names(_field(record, "image_id")), _field(record, "answer")
        if not choice:
            question = _field(record, "question")
            kind = "number" if subtask in NUMERIC2 else "text"
            return _row(source, number, names, task=task, subtask=subtask, kind=kind, question=question,
                        prompt=_prompt2(record, question, False), answer=answer)  # fmt: skip
        question = _field(record, "mc_question")
        options, stem = _inline(question)
        return _row(source, number, names, task=task, subtask=subtask, kind="choice", question=stem,
                    prompt=_prompt2(record, question, True), answer=_field(record, "correct_option").upper(),
                    options=options, choices=None if options else list("ABCD"), text=answer)  # fmt: skip

    columns = ["question_type", "question_subtype", "image_id", "answer"]
    columns += ["mc_question", "correct_option"] if choice else ["question"]
    file = source.files[0]
    yield from _each(_csv(source, file, columns) if file.suffix == ".csv" else _json(source, file), build)


M3D_TASKS = {"1": "plane", "2": "phase", "3": "organ", "4": "abnormality", "5": "location"}
M3D_COLUMNS = ("Image Path", "Question Type", "Question", "Answer", "Answer Choice")


def _read_m3d(source):
    count = iter(range(1, 10**9))

    def build(record):
        number, kind = f"{next(count):06d}", record["Question Type"]
        if kind not in M3D_TASKS:
            raise BenchmarkError(f"its Question Type is {kind!r}; expected 1 to 5")
        options = {x: record[f"Choice {x}"] for x in "ABCD" if record[f"Choice {x}"].lower() not in NO_OPTION}
        parts = ARRAY.sub("", SCAN.sub("", record["Image Path"])).replace("\\", "/").strip("/").split("/")
        if len(options) < 2:
            raise BenchmarkError(f"it has {len(options)} options")
        case = "/".join(parts[-3:-1]) or parts[-1]  # a folder holds the phases of one case
        return _row(source, number, ["/".join(parts[-3:])], task=M3D_TASKS[kind], subtask=M3D_TASKS[kind],
                    kind="choice", question=record["Question"], prompt=_listed(record["Question"], options),
                    answer=record["Answer Choice"].upper(), options=options, text=record["Answer"],
                    patient=case)  # fmt: skip

    yield from _each(_csv(source, source.files[0], [*M3D_COLUMNS, *(f"Choice {x}" for x in "ABCD")]), build)


CT_RATE_TYPES = {
    "multiple_choice": "multiple-choice", "report_generation": "report-generation", "free_response": "long-answer",
    "description": "long-answer", "long_answer": "long-answer", "conversation": "conversation",
    "short_answer": "short-answer",
}  # fmt: skip


def _read_ct_rate(source):
    def build(record):
        names, turns = _ct_rate_names(_field(record, "image")), record.get("conversations")
        if not isinstance(turns, list) or [t.get("from") for t in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise BenchmarkError("its conversations are not turns of human and gpt")
        number, rows, before = _field(record, "id"), [], []
        for i in range(0, len(turns), 2):
            said, answer = str(turns[i].get("value", "")), str(turns[i + 1].get("value", "")).strip()
            tags = [tag for tag in TAG.findall(said) if tag != "image"]
            named = turns[i].get("type") or next(iter(tags), None) or _prefix(number)
            task = CT_RATE_TYPES.get(named, "short-answer" if named else None)  # RadGenome's topics are short answers
            if task is None:
                raise BenchmarkError("no turn's type, tag or id tells what kind of question it is")
            question = " ".join(TAG.sub("", said).split())
            row = _ct_rate_row(source, f"{number}/{i // 2 + 1}", names, task, named, question, answer)
            if task == "conversation" and before:
                row["messages"] = _after(before, question, answer)
            before += [(question, answer)]
            rows.append(row)
        return rows

    yield from _each(_json(source, source.files[0]), build)


def _prefix(number):
    return next((name for name in CT_RATE_TYPES if number.startswith(name)), None)


def _ct_rate_row(source, number, names, task, named, question, answer):
    fields = {"task": task, "subtask": str(named), "question": question}
    if task != "multiple-choice":
        return _row(source, number, names, kind="text", prompt=question, answer=answer, **fields)
    options, stem = _inline(question)
    letter = re.match(r"\(?([A-Ha-h])[).:]\s*(.*)", answer, re.DOTALL)
    if not options or not letter:
        raise BenchmarkError("its options or its answer are not like '(a) text'")
    fields["question"] = stem
    return _row(source, number, names, kind="choice", prompt=_listed(stem, options), answer=letter[1].upper(),
                options=options, text=letter[2] or None, **fields)  # fmt: skip


def _after(before, question, answer):
    """A chat whose earlier turns are given; the scan stands in the first."""
    texts = [text for turn in [*before, (question, answer)] for text in turn]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(texts)
    ]
    messages[0]["content"].insert(0, {"type": "volume"})
    return messages


def _read_jsonl(source):
    """Rows of the training format; `kind`, `subtask`, `patient`, `options` and `choices` are taken where given."""
    from photon.rows import RowError
    from photon.training.data import load_rows

    file = source.files[0]
    try:
        good = load_rows(file, volume_root=source.scans.root)
    except RowError as error:
        raise BenchmarkError(str(error)) from error
    for (place, record), row in zip(_json(source, file), good, strict=True):
        try:
            yield place, _jsonl_row(record, row)
        except BenchmarkError as error:
            yield place, error


def _jsonl_row(record, row):
    options = record.get("options")
    if options is not None and not isinstance(options, dict):
        raise BenchmarkError('its options are not an object like {"A": text}')
    choices = record.get("choices") or (list(options) if options else None)
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", row["answer"])
    kind = record.get("kind") or ("choice" if choices else "number" if number else "text")
    if kind not in ("choice", "number", "text"):
        raise BenchmarkError(f"its kind is {kind!r}; expected choice, number or text")
    if kind == "choice" and row["answer"] not in (choices or ()):
        raise BenchmarkError(f"its answer {row['answer'][:20]!r} is none of the choices {', '.join(choices or ['-'])}")
    volumes = [{k: v for k, v in scan.items() if v is not None} for scan in row["volumes"]]
    volumes = [scan["path"] if list(scan) == ["path"] else scan for scan in volumes]
    first = row["volumes"][0]["path"] if volumes else row["where"]
    asked = [part["text"] for part in row["messages"][-2]["content"] if part["type"] == "text"]
    messages = [
        {"role": m["role"], "content": [{k: v for k, v in part.items() if v is not None} for part in m["content"]]}
        for m in row["messages"]
    ]
    return {
        "id": row["id"] or f"jsonl/{row['example'] + 1:06d}",
        "benchmark": "jsonl",
        "task": row["task"] or "",
        "subtask": str(record.get("subtask") or ""),
        "kind": kind,
        "patient": str(record.get("patient") or patient_of(first)),
        "volumes": volumes,
        "messages": messages,
        "question": str(record.get("question") or " ".join(asked)),
        "answer": row["answer"],
        "options": options,
        "choices": choices,
    }


CT_RATE_SCANS = (
    "Hub data set ibrahimhamamci/CT-RATE (gated: accept its terms there), {part}; CC BY-NC-SA 4.0, no commercial use. "
    '`hf download ibrahimhamamci/CT-RATE --repo-type dataset --include "{glob}" --local-dir SCANS`'
)
ATLAS_SCANS = "as AbdomenAtlas 3.0 Mini (Hub AbdomenAtlas/AbdomenAtlas3.0Mini) has them, BDMAP_*/ct.nii.gz; terms of"
ATLAS_SCANS += " AbdomenAtlas and of each data set in it"

BENCHMARKS = {
    b.name: b
    for b in [
        Benchmark(
            "3d-rad", "3D-RAD (chest CT, six tasks; test 41 files, 29,218 closed questions)", _read_rad,
            {"test": ("Task*_*/*.csv",), "train": ("Task*_*/*.csv",)}, "Tang-xiaoxiao/3D-RAD",
            "Hub data set or GitHub repository Tang-xiaoxiao/3D-RAD, folder with Task1_.. to Task6_..; MIT",
            CT_RATE_SCANS.format(part="validation scans (test_1_a_1 is valid_1_a_1)", glob="dataset/valid_fixed/**")
            + ". The .npy files of 3D-RAD (1 x 32 x 256 x 256, 0 to 1) have neither geometry nor HU and are not read",
            tuple(RAD_TASKS.values()), True,
        ),
        Benchmark(
            "deeptumorvqa-1-mc", "DeepTumorVQA 1.0, multiple choice (abdominal CT)", _read_tumor1,
            {"val": ("val_multi_choice.jsonl", "val*.csv"), "train": ("train_multi_choice.jsonl", "train*.csv")},
            "tumor-vqa/DeepTumorVQA_1.0", "Hub data set tumor-vqa/DeepTumorVQA_1.0; see its card for the licence",
            ATLAS_SCANS,
        ),
        Benchmark(
            "deeptumorvqa-1-ft", "DeepTumorVQA 1.0, free text (abdominal CT)", _read_tumor1,
            {"val": ("val_free_text.jsonl", "val*.csv"), "train": ("train_free_text.jsonl", "train*.csv")},
            "tumor-vqa/DeepTumorVQA_1.0", "Hub data set tumor-vqa/DeepTumorVQA_1.0; see its card for the licence",
            ATLAS_SCANS,
        ),
        *[
            Benchmark(
                name, f"DeepTumorVQA 2.0, {what} (abdominal CT, 10,000 questions on 991 scans)", _read_tumor2,
                {"benchmark": ("test_qa.json", "test_qa.jsonl"), "train": ("train_qa.csv",)},
                "tumor-vqa/DeepTumorVQA_2.0",
                "Hub data set tumor-vqa/DeepTumorVQA_2.0, benchmark/test_qa.json; CC BY 4.0",
                "the same data set, benchmark/ct/BDMAP_*/ct.nii.gz (about 70 GB), under the terms of their sources "
                "(AbdomenAtlas); those of the training questions " + ATLAS_SCANS,
                ("recognition", "measurement", "visual-reasoning", "medical-reasoning"),
            )
            for name, what in (("deeptumorvqa-2", "multiple choice"), ("deeptumorvqa-2-ft", "free form"))
        ],
        Benchmark(
            "m3d-vqa", "M3D-VQA, closed questions (CT)", _read_m3d,
            {"test": ("M3D_VQA_test.csv", "M3D_VQA_test5k.csv"), "val": ("M3D_VQA_val.csv",),
             "train": ("M3D_VQA_train.csv",)},
            "GoodBaiBai88/M3D-VQA", "Hub data set GoodBaiBai88/M3D-VQA",
            "M3D-Cap (Hub GoodBaiBai88/M3D-Cap), from Radiopaedia, no commercial use. Its pictures and .npy files "
            "have neither geometry nor HU; this needs each as a scan with the same path and the suffix .nii.gz",
            tuple(M3D_TASKS.values()),
        ),
        Benchmark(
            "ct-rate-vqa", "CT-RATE VQA (chest CT, the questions of CT-CHAT)", _read_ct_rate,
            {"valid": ("valid_vqa.json",), "train": ("train_vqa.json",)}, "ibrahimhamamci/CT-RATE",
            "Hub data set ibrahimhamamci/CT-RATE (gated), dataset/vqa/valid_vqa.json; CC BY-NC-SA 4.0",
            CT_RATE_SCANS.format(part="its validation scans", glob="dataset/valid_fixed/**"),
            tuple(dict.fromkeys(CT_RATE_TYPES.values())),
        ),
        Benchmark(
            "jsonl", "questions of your own, in the training format", _read_jsonl, {"test": ("*.jsonl",)}, None,
            "a .jsonl file of rows as for training (README)", "those that the rows name, relative to volumes",
        ),
    ]
}  # fmt: skip
