"""What `mkdocs` needs beside docs/: README.md and CONTRIBUTING.md as pages, the order of the pages, links that fit.

mkdocs.yml names this file as a hook. A page that is not in `ORDER` comes behind those that are.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
ORDER = {  # file: title
    "index.md": "Quickstart",
    "fine_tune.md": "Fine-tune",
    "evaluate.md": "Evaluate",
    "many_gpus.md": "Many GPUs",
    "pictures.md": "Pictures",
    "app.md": "The page",
    "serving.md": "The server",
    "publish.md": "Push to the Hub",
    "method.md": "What the scheduler does",
    "peers.md": "Other methods",
    "efficiency.md": "Speed and memory",
    "scans.md": "Scans and faults",
    "facts.md": "Card facts",
    "results.md": "Published figures",
    "tiny_model.md": "The tiny model",
}
ADDED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", re.S | re.M)


def on_config(config):
    """Sets the order of the pages."""
    pages = {file.name for file in (ROOT / "docs").glob("*.md")} | set(ADDED)
    known = [{title: name} for name, title in ORDER.items() if name in pages]
    rest = sorted(pages - set(ORDER) - {"contributing.md"})
    config.nav = [*known, *rest, {"Contributing": "contributing.md"}]
    return config


def on_files(files, config):
    """Adds the pages that lie at the repository's root."""
    for name, source in ADDED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)  # the card's metadata
        files.append(File.generated(config, name, content=fitted(text, from_root=True)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fits the links of the pages of docs/."""
    return markdown if page.file.src_uri in ADDED else fitted(markdown, from_root=False)


def fitted(text, from_root):
    """A page whose links lead to pages of the site; a link to another file of the repository becomes its name."""
    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(lambda m: _link(m, from_root), part) for part in parts)


def _link(match, from_root):
    mark, words, target = match.groups()
    path, _, anchor = target.partition("#")
    if "://" in target or not path or target.startswith("mailto:"):
        return match[0]
    inside = path.removeprefix("docs/") if from_root else path
    if from_root and path.startswith("docs/") or not from_root and not path.startswith("../"):
        return f"{mark}[{words}]({inside}{'#' + anchor if anchor else ''})"
    name = path.removeprefix("../")
    for page, source in ADDED.items():
        if name == source:
            return f"{mark}[{words}]({page}{'#' + anchor if anchor else ''})"
    return f"{words}" if words.strip("`") == name else f"{words} (`{name}`)"
