"""docs/fine_tune.ipynb from docs/fine_tune.md: its python and bash blocks as cells, the rest as text.

    python scripts/build_notebook.py

The page is the source; a test compares the two and runs every cell.
"""

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
START = "%cd ..\n# the commands and imports below are run from the folder of the repository"


def cells(page):
    """[(kind, text)] of a page: "markdown", or "code" with shell lines as IPython takes them."""
    found, end = [("code", START)], 0
    for block in BLOCK.finditer(page):
        if text := page[end : block.start()].strip():
            found.append(("markdown", text))
        found.append(("code", block[2].rstrip() if block[1] == "python" else shell(block[2])))
        end = block.end()
    if text := page[end:].strip():
        found.append(("markdown", text))
    return found


def shell(text):
    """Shell commands as lines of IPython: `%env` for what later cells need too, `!` for the rest."""
    lines = []
    for command in re.split(r"(?<!\\)\n", text.strip()):
        if command.startswith("export "):
            lines += ["%env " + setting for setting in command.removeprefix("export ").split()]
        else:
            lines.append("!" + command)
    return "\n".join(lines)


def notebook(page):
    listed = []
    for number, (kind, text) in enumerate(cells(page)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        listed.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": listed, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    page = (DOCS / "fine_tune.md").read_text(encoding="utf-8")
    (DOCS / "fine_tune.ipynb").write_text(notebook(page), encoding="utf-8")
