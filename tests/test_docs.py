"""README, CONTRIBUTING and docs/ must stay true: files and links exist, code runs and prints what is written."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from conftest import ROOT
from photon.scan_faults_photon import policy_table
from scripts import demo

PAGES = {file.name: file.read_text("utf-8") for file in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
README = PAGES["README.md"]


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode or not listed.stdout:  # a copy without its history
        return {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    return {line.split("/")[0] for line in listed.stdout.splitlines() if not line.startswith(".")}


def test_the_tree_is_the_folder():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.S)[1]
    named = [word.rstrip("/") for line in tree.splitlines() for word in line.split("#")[0].split()]
    assert sorted(named) == sorted(tracked())  # each once


def test_no_file_is_hidden_from_git_and_the_linter():
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("a copy without its history")
    assert not listed.stdout


def test_the_quickstart_prints_what_is_written(tmp_path):
    (tmp_path / "demo").mkdir()
    demo.scans(tmp_path / "demo")
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    printed = []
    for block in blocks:
        code = block.replace('"."', repr(str(ROOT)))
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(done.stdout)
    written = re.search(r"It prints.*?:\n\n```\n(.*?)```", README, re.S)[1]
    assert printed[0] == written


def commands():
    """{command file: options} of each `python FILE --option`; those of CONTRIBUTING.md run in test_contributing.py."""
    named = {}
    for page in (text for name, text in PAGES.items() if name != "CONTRIBUTING.md"):
        page = page.replace("\\\n", " ")
        for line in re.findall(r"python ((?:benchmarks/|scripts/)?\w+\.py[^`\n]*)", page):
            file, *rest = shlex.split(line, comments=True)
            named.setdefault(file, set()).update(word for word in rest if word.startswith("--"))
    return named


@pytest.mark.parametrize("file", sorted(commands()))
def test_commands_and_their_options_exist(file):
    options = commands()[file]
    assert (ROOT / file).is_file()
    if options:
        shown = subprocess.run(
            [sys.executable, ROOT / file, "--help"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
        ).stdout.replace("_", "-")
        known = set(re.findall(r"--[a-z0-9-]+", shown))
        assert options <= known, options - known


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {target for page in PAGES.values() for target in re.findall(r"(?:`|^)make ([a-z-]+)", page, re.M)}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_fault_table_is_the_code():
    assert policy_table().strip() in PAGES["scans.md"]


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", sorted(PAGES))
def test_links_and_pictures_lead_somewhere(name):
    folder = ROOT if (ROOT / name).is_file() else ROOT / "docs"
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        assert not path or (folder / path).exists(), link
        target = PAGES[(folder / path).name if path else name] if anchor else ""
        assert not anchor or anchor in anchors(target), link


def test_results_say_where_and_when():
    results = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert results
    for file in results:
        content = json.loads(file.read_text(encoding="utf-8"))
        assert {"device", "date", "rows", "ratios"} <= set(content), file.name
