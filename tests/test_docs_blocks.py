"""Every code block of the README and of docs/ runs, or is an example to fill in, or says which test runs it."""

import pytest
from doc_blocks import blocks, elsewhere, run, workspace

from conftest import ROOT

PAGES = {path.name: path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
RUN_HERE = [name for name, page in PAGES.items() if elsewhere(page) is None and blocks(page)]


@pytest.fixture
def folder(tmp_path):
    return workspace(tmp_path)


@pytest.mark.parametrize("name", RUN_HERE)
def test_blocks_run(folder, name):
    run(PAGES[name], folder, with_quickstart=name != "README.md")


def test_pages_tested_elsewhere_are():
    for name, page in PAGES.items():
        file = elsewhere(page)
        assert file is None or name in (ROOT / file).read_text("utf-8"), name
