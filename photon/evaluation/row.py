"""One row: a question in the form that all benchmarks share, and the texts of options.

A row is a dict that JSON can hold, and also a training row (`photon.training.data.load_rows`): `id`, `benchmark`,
`task`, `subtask`, `kind` ("choice": the answer is a letter; "number"; "text"), `patient` (the unit of resampling),
`volumes` (paths), `messages` (the last is the answer), `question` (as printed, without options), `answer`, `options`
{letter: text} and `choices` [letters]; the last two are `None` where there are none.
"""

import re

from photon.evaluation.scans import patient_of
from photon.rows import RowError

ASK_LETTER = "Answer with the letter of the right option."
NO_OPTION = {"", "-", "na", "nan"}
MARK = re.compile(r"(?:^|(?<=[\s,;?]))(\(?)([A-Da-d])([:.)])\s+")


def make_row(
    source, number, names, *, task, subtask, kind, question, prompt, answer, options=None, choices=None,
    answer_text=None, patient=None, expected=None,
):  # fmt: skip
    """One row.

    Args:
        source: the `Source` that the question is from.
        number: what makes the row's id unique in the benchmark's split, as text.
        names, expected: of its scan, as `ScanFolder.path` takes them.
        question: as printed, without options. prompt: what the model is asked.
        choices: letters; default those of `options`.
        answer_text: the text beside the answer's letter, which is checked against the options.
        patient: default the one in the scan's first name.
    Raises: `RowError` where question or answer is empty, or the answer is none of the choices.
    """
    if not answer:
        raise RowError("its answer is empty")
    if not question:
        raise RowError("its question is empty")
    choices = choices or (list(options) if options else None)
    if kind == "choice" and answer not in choices:
        raise RowError(f"its answer {answer[:20]!r} is none of the choices {', '.join(choices)}")
    benchmark = source.benchmark
    prefix = benchmark.name + ("" if source.split == benchmark.default_split else f"-{source.split}")
    return {
        "id": f"{prefix}/{number}",
        "benchmark": benchmark.name,
        "task": task,
        "subtask": subtask,
        "kind": kind,
        "patient": patient or patient_of(names[0]),
        "volumes": [source.scans.path(*names, expected=expected)],
        "messages": [
            {"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "question": question,
        "answer": answer,
        "options": options,
        "choices": choices,
        "answer_text": answer_text,
    }


def options_of(record):
    """{letter: text} of a record's columns "Choice A" to "Choice D", without the empty ones."""
    return {x: record[f"Choice {x}"] for x in "ABCD" if record[f"Choice {x}"].lower() not in NO_OPTION}


def listed_options(question, options):
    """A question with a line for each option, and a line that asks for the letter."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items()), ASK_LETTER])


def inline_options(question):
    """Options written within a question, "... A: one B: two", as {letter: text}, and the question before them; `None`
    and the question where there are none."""
    marks = list(MARK.finditer(question))
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
