"""The blocks of docs/serving.md against a running server; the site builds, and loads nothing from elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("openai", reason="pip install openai")

from doc_blocks import run, workspace  # noqa: E402

from conftest import ROOT  # noqa: E402
from running import running  # noqa: E402

TOKEN = "token-of-the-page-of-the-docs"
FIGURES = {  # rows of docs/serving.md: fields of the JSON
    "questions a second on one scan, one by one": "questions_a_second_one_by_one",
    "the same from 16 clients at once, batched": "questions_a_second_batched",
    "answers a second in the two minutes": "answers_a_second_under_load",
    "seconds to an answer in them, median": "seconds_median",
    "the same, 95 of 100 are faster": "seconds_95_percent",
    "resident memory after a quarter of them, MiB": "memory_mib_first_quarter",
    "the same at their end, MiB": "memory_mib_end",
}


def test_the_blocks_of_serving(tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    (tmp_path / "reader").mkdir()
    folder = workspace(tmp_path / "reader")
    with running("photon.serving", tmp_path, PHOTON_TOKENS=TOKEN) as server:
        # the commands that start a server are run by `running`; the rest is what a client does
        page = re.sub(r"^(python -m photon\.serving|export PHOTON_TOKENS).*$", "true", page, flags=re.M)
        page = page.replace("localhost:8000", f"127.0.0.1:{server.port}")
        out = run(page, folder, with_quickstart=False, PHOTON_TOKENS=TOKEN)
    printed = re.search(r"It prints `(.*?)`", page)[1]
    assert out.strip() == printed


def test_figures_under_load_are_the_measured_ones():
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    measured = json.loads((ROOT / "benchmarks" / "results" / "serving.json").read_text("utf-8"))
    named = dict(re.findall(r"^\| (.+?) \| ([\d.]+) \|$", page, re.M))
    for name, key in FIGURES.items():
        value = named.pop(name)
        digits = len(value.partition(".")[2])
        assert value == f"{measured[key]:.{digits}f}", name
    assert not named and measured["date"] in page and measured["ratios"]["wrong_replies"] == 0


def test_the_site(tmp_path):
    """A broken link or anchor is an error; no page asks another host for anything."""
    pytest.importorskip("mkdocs", reason="pip install -r requirements-docs.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "scans.html", "serving.html", "contributing.html"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text("utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|preload|icon)"[^>]*href="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]+href="([^"]+)"[^>]*rel="(?:stylesheet|preconnect|preload)"', text)
        assert loaded and not any(address.startswith(("http", "//")) for address in loaded), page.name


def test_a_broken_link_stops_the_site(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install -r requirements-docs.txt")
    for name in ("docs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "docs" / "scans.md").write_text("# Scans\n\n[there](nowhere.md) and [here](#nothing)\n")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=tmp_path, capture_output=True,
                          encoding="utf-8")  # fmt: skip
    assert done.returncode != 0 and "nowhere.md" in done.stderr and "#nothing" in done.stderr
