"""Questions about CT volumes: each benchmark's files become rows of one form (`photon.evaluation.row`).

    rows = load_benchmark("3d-rad", QUESTIONS, volumes=SCANS)

Formats and their sources are in `photon/evaluation/benchmarks/`, one file a benchmark; the files themselves are not
all public. Faults are named by file and line and never by scan. The same question twice about one scan is kept, as the
authors score it, and counted in a warning; the same id twice is a fault.
"""

import re
import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path

from photon.evaluation.benchmarks import BENCHMARKS
from photon.evaluation.records import Source
from photon.evaluation.scans import ScanFolder, missing_volumes, scan_paths
from photon.loading import HUB_ID
from photon.rows import MAX_FAULTS, RowError


def load_benchmark(name, source, *, volumes=None, split=None, revision=None, tasks=None, limit=None, faults="refuse"):
    """Rows of a benchmark.

    Args:
        name: one of `BENCHMARKS`.
        source: folder or file of its questions, or a Hub id (only questions are downloaded, never scans); of your own
            questions ("jsonl") also a set of `datasets`, in memory or streamed.
        volumes: folder in which scans are searched by name, at any depth; default the folder of the questions.
        split: default the test split.
        revision: branch, tag or commit of a Hub id.
        tasks: only these tasks.
        limit: only the first so many questions.
        faults: "leave-out" drops faulty questions with a warning that names them, instead of raising.
    Returns: list of rows. A scan that does not exist has the path where it is expected; see `missing_volumes`.
    Raises: `RowError`; `FileNotFoundError` for a source that neither exists nor is a Hub id.
    """
    benchmark = _benchmark(name)
    if faults not in ("refuse", "leave-out"):
        raise ValueError(f'faults={faults!r}; expected "refuse" or "leave-out".')
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}; expected a number above 0, or None for all.")
    wanted = _wanted(benchmark, tasks)
    rows, wrong, odd = [], [], []
    for place, row in benchmark.rows(_source(benchmark, source, volumes, split, revision)):
        if isinstance(row, RowError):
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
        raise RowError.of(wrong, f"faulty questions of {name} (faults='leave-out' goes on without them)")
    if wrong:
        warnings.warn(str(RowError.of(wrong, f"questions of {name} were left out")), stacklevel=2)
        times = Counter(row["id"] for _, row in rows)
        rows = [(place, row) for place, row in rows if times[row["id"]] == 1]
    _warn(rows, odd)
    rows = _filtered([row for _, row in rows], wanted, name)
    return rows[:limit]


def missing_report(rows, name):
    """Text that lists missing scans by their number among all, and says what to download; "" if none is missing."""
    paths, missing = scan_paths(rows), set(missing_volumes(rows))
    numbers = [number for number, path in enumerate(paths, start=1) if path in missing]
    if not numbers:
        return ""
    return f"{len(numbers)} of {len(paths)} scans are missing: {ranges(numbers)}.\n{what_to_download(name)}"


def what_to_download(name):
    """What a benchmark needs, from where, under which licence."""
    return _benchmark(name).what_to_download()


def _benchmark(name):
    if name not in BENCHMARKS:
        raise RowError(f"There is no benchmark {name!r}; known are {', '.join(sorted(BENCHMARKS))}.")
    return BENCHMARKS[name]


# === Files ===========================================================================================================


def _source(benchmark, source, volumes, split, revision):
    split = split or benchmark.default_split
    benchmark.check_split(split)
    if not isinstance(source, str | Path):  # a set of `datasets`
        return Source(benchmark, split, [source], Path(), ScanFolder(Path(volumes or "")))
    path = Path(source)
    if not path.exists():
        if not HUB_ID.fullmatch(str(source)):
            hub = f", or a Hub id like {benchmark.hub}" if benchmark.hub else ""
            raise FileNotFoundError(
                f"The questions of {benchmark.name} are not there; give their folder or file{hub}.\n"
                f"{benchmark.what_to_download()}"
            )
        path = _download(benchmark, str(source), split, revision)
    elif revision is not None:
        raise RowError("revision is for a Hub id; the source is a folder or file.")
    root = path if path.is_dir() else path.parent
    files = benchmark.files(path, split) if path.is_dir() else [path]
    if not files:
        expected = " or ".join(benchmark.splits[split])
        raise RowError(f"The folder has no {expected}.\n{benchmark.what_to_download()}")
    where = Path(volumes) if volumes is not None else root
    if not where.is_dir():
        raise FileNotFoundError("volumes is not a folder; give the folder in which the scans are.")
    return Source(benchmark, split, files, root, ScanFolder(where))


def _download(benchmark, hub_id, split, revision):
    from huggingface_hub import snapshot_download

    patterns = [p for pattern in benchmark.splits[split] for p in (pattern, f"*/{pattern}")]
    return Path(snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=patterns))


# === Tasks ===========================================================================================================


def _wanted(benchmark, tasks):
    if tasks is None:
        return None
    wanted = {str(task).strip().lower().replace(" ", "-").replace("_", "-") for task in tasks}
    unknown = wanted - set(benchmark.tasks) if benchmark.tasks else set()
    if unknown or not wanted:
        known = ", ".join(benchmark.tasks)
        raise RowError(f"{benchmark.name} has no task {', '.join(sorted(unknown)) or 'at all'}; known: {known}.")
    return wanted


def _filtered(rows, wanted, name):
    kept = [row for row in rows if wanted is None or _slug(row["task"]) in wanted]
    if not kept:
        tasks = ", ".join(sorted({row["task"] for row in rows})) or "none"
        raise RowError(f"No question of {name} is left; tasks in these files: {tasks}.")
    absent = set() if wanted is None else wanted - {_slug(row["task"]) for row in kept}
    if absent:
        raise RowError(f"These files have no question of {', '.join(sorted(absent))}.")
    return kept


def _slug(text):
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-")


# === Checks ==========================================================================================================


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
        message = RowError.of(odd, "questions whose letter and answer's text do not agree; the letter is scored")
        warnings.warn(str(message), stacklevel=3)


def ranges(numbers):
    """1, 2, 3, 7 -> "1-3, 7"."""
    parts, start = [], 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            first, last = numbers[start], numbers[i - 1]
            parts.append(f"{first}-{last}" if last > first else f"{first}")
            start = i
    shown = parts[: 2 * MAX_FAULTS]
    return ", ".join(shown + ([f"... and {len(parts) - len(shown)} more ranges"] if len(parts) > len(shown) else []))
