"""A folder that holds one run: `run.json` in it says which, so that a command goes on with its own run only.

if open_run(folder, settings, begun=any(folder.iterdir())):
    ...                         # this very run has begun there: go on with it
"""

import json
from pathlib import Path

from photon.whole_file import whole_file

RUN_FILE = "run.json"


class RunError(ValueError):
    """A run that cannot start or go on as asked."""


def open_run(folder, settings, *, begun, resume=None, extend=(), option="--output", file=RUN_FILE):
    """Makes a folder the folder of one run, or finds that run in it. Returns whether the run has begun there.

    Args:
        settings: dict of what makes the run what it is, as JSON takes it; becomes run.json.
        begun: whether the folder holds anything that a run has made. If not, an earlier run.json is replaced.
        resume: True: the run must have begun; False: it must not have; None: either.
        extend: names of settings whose numbers may grow when the run goes on; the file then gets the new ones.
        option: the command's argument that names the folder, for messages.
        file: name of the file of settings.
    Raises: `RunError` where the folder holds another run (it lists what differs), or what `resume` excludes.
    """
    stamp = Path(folder) / file
    if not begun:
        if resume:
            raise RunError(f"There is no run to resume in the folder of {option}. Leave --resume out, or check it.")
        stamp.parent.mkdir(parents=True, exist_ok=True)
        write_whole(stamp, json.dumps(settings, indent=2) + "\n")
        return False
    if not stamp.is_file():
        raise RunError(f"The folder of {option} is not empty and holds no {file}. Choose another.")
    held = json.loads(stamp.read_text(encoding="utf-8"))
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    differences = [
        f"{name}: {held.get(name)!r} there, {settings.get(name)!r} now"
        for name in sorted(held.keys() | settings.keys())
        if held.get(name) != settings.get(name) and not (name in extend and _grows(held.get(name), settings.get(name)))
    ]
    if differences:
        message = f"The folder of {option} holds another run; choose another folder. What differs:"
        raise RunError("\n  ".join([message, *differences]))
    if resume is False:
        raise RunError(f"The folder of {option} holds this run already. Add --resume, or choose another folder.")
    if held != settings:
        write_whole(stamp, json.dumps(settings, indent=2) + "\n")
    return True


def _grows(before, now):
    numbers = all(isinstance(value, int | float) and value > 0 for value in (before, now))
    return numbers and now > before


def write_whole(file, text):
    """Writes a text file completely or not at all."""
    with whole_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
