"""`benchmarks/peers.py`: the smoke preset, a run that was stopped, and its statistics.

python -m pytest tests/test_peers_benchmark.py
"""

import importlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from photon.schedulers import SCHEDULERS


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield {name: importlib.import_module(f"peers_{name}") for name in ("arms", "report")}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def run(folder, *options):
    page = folder / "page.md"
    if not page.exists():
        page.write_text("Before\n\n<!-- table of peers -->\n<!-- end of table -->\n\nAfter\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "peers.py", "--output", folder / "run", "--json", folder / "peers.json",
         "--page", page, "--plot", folder / "peers.png", "--resamples", "50", *options],
        capture_output=True, encoding="utf-8", timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "peers.json").read_text(encoding="utf-8"))


def test_smoke_and_a_stopped_run(tmp_path):
    result = run(tmp_path)
    assert {"device", "date", "rows", "ratios", "models", "questions", "patients", "seconds_a_scan"} <= set(result)
    methods = {row["method"].partition(",")[0] for row in result["rows"]}
    untrained = {name for name, method in SCHEDULERS.items() if not method.learns} - {"flipped"}
    assert untrained <= methods
    for row in result["rows"]:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1, row["method"]
        if row["axis"] == "kept":
            assert row["kept"] == pytest.approx(row["share"], abs=0.03)
        if row["axis"] == "layers":
            assert row["layer_average"] == pytest.approx(row["share"], abs=1e-3)
    random = [row for row in result["rows"] if row["method"] == "random" and row["axis"] == "kept"]
    assert len(random) == 2  # one line for all seeds
    files = sorted(tmp_path.glob("run/*/answers.jsonl"))
    assert [file.parent.name for file in files] == ["dense", "trained"]
    held = [file.read_text(encoding="utf-8").splitlines() for file in files]
    files[0].write_text("\n".join([*held[0][:-1], held[0][-1][:99]]), encoding="utf-8")  # stopped within its last line
    again = run(tmp_path)
    lines = files[0].read_text(encoding="utf-8").splitlines()
    assert lines[:-1] == held[0][:-1] and files[1].read_text(encoding="utf-8").splitlines() == held[1]
    fixed = ("method", "axis", "share", "accuracy", "kept", "lesion_tokens_kept")
    assert [[row[n] for n in fixed] for row in again["rows"]] == [[row[n] for n in fixed] for row in result["rows"]]
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith("Before") and page.endswith("After\n") and "| divprune |" in page
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_a_part_of_it_with_a_model_of_a_method(tmp_path):
    options = ("--methods", "stride", "--peer", f"random={ROOT}", "--tasks", "presence", "side", "--rows", "4")
    result = run(tmp_path, *options, "--shares", "0.1", "--clock", "processor", "--table", "peers")
    names = {row["method"] for row in result["rows"] if row["axis"] == "kept"}
    lines = {"photon, trained", "photon's saliency, untrained", "photon's saliency, untrained, after layer 0"}
    assert names == lines | {"stride", "random", "random, on the weights of ours", "random, trained with it"}
    assert set(result["models"]) == {"dense", "trained", "random"} and result["clock"] == "processor"
    rows = [json.loads(line) for line in (tmp_path / "run/data/rows.jsonl").read_text(encoding="utf-8").splitlines()]
    task_of = {row["id"]: row["task"] for row in rows}
    lines = (tmp_path / "run/random/answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert {task_of[i] for line in lines for i in json.loads(line)["ids"]} <= {"presence", "side"}
    with pytest.raises(AssertionError, match="There is no method 'tea'; known are"):
        run(tmp_path, "--methods", "tea")


def test_averages_over_layers(modules):
    arms = modules["arms"]
    assert arms.layer_average(0.2, -1, 4) == 0.2
    assert arms.layer_average(0.2, 1, 4) == pytest.approx((1 + 1 + 0.2 + 0.2) / 4)
    assert arms.share_at(0.6, 1, 4) == pytest.approx(0.2) and arms.share_at(0.5, 1, 4) is None
    # cuts after layers 0, 1 and 2 of 4, to 50, 25 and 12.5 %
    assert arms.layer_average(0.125, 0, 4, "pyramid") == pytest.approx((1 + 0.5 + 0.25 + 0.125) / 4)
    assert arms.layer_average(0.125, 7, 32, "pyramid") == pytest.approx(0.46875)  # as the paper
    assert arms.share_at(0.46875, 7, 32, "pyramid") == pytest.approx(0.125)
    assert arms.share_at(0.25, 0, 4, "pyramid") is None
    for arm in arms.arms_of(2, 4):
        layer = -1 if arm.layer is None else arm.layer
        for share in arms.shares_of(arm, layer, 4, (0.5, 0.1)):
            assert 0 <= share <= 1
    assert len({(arm.name, arm.model) for arm in arms.arms_of(2, 4)}) == len(arms.arms_of(2, 4))


def test_holm_and_the_bootstraps_p(modules):
    report = modules["report"]
    assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x, then 2 x, then not below it
    assert report.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and report.holm([]) == []
    draws = np.array([0.1] * 97 + [-0.1] * 2)
    assert report.two_sided(draws) == pytest.approx(2 * 3 / 100)
    assert report.two_sided(np.zeros(99)) == 1.0


def test_figures_by_hand(modules):
    """Two methods on three patients: accuracies, a paired difference, the mean over seeds."""
    report, arms = modules["report"], modules["arms"]
    rows = [{"id": str(i), "patient": "abc"[i // 2]} for i in range(6)]
    right = {arms.OURS: [1, 1, 1, 1, 1, 0], "stride": [1, 0, 0, 0, 1, 0], "random #0": [1, 0, 0, 0, 0, 0],
             "random #1": [1, 1, 0, 0, 0, 0], arms.ALL: [1] * 6}  # fmt: skip
    entries = [
        {"arm": name, "share": 1.0 if name == arms.ALL else 0.1, "below": 0,
         "layer_average": 1.0 if name == arms.ALL else 0.1,
         "results": [[r, 0.1, None if i else 0.5] for i, r in enumerate(some)],
         "seconds": {"selection": 0.6, "prefill": 1.2, "decode": 1.8}}
        for name, some in right.items()
    ]  # fmt: skip
    line = {"model": "dense", "ids": [row["id"] for row in rows], "seconds": {"vision": 2.0}, "arms": entries}
    table, facts = report.figures([line], rows, [0.1], resamples=400)
    found = {row["method"]: row for row in table if row["axis"] == "kept"}
    assert found["stride"]["accuracy"] == pytest.approx(2 / 6) and found["random"]["accuracy"] == pytest.approx(
        1.5 / 6
    )
    assert found["stride"]["ours_ahead"] == pytest.approx(3 / 6) and found[arms.OURS]["ours_ahead"] is None
    assert found["stride"]["selection_ms"] == pytest.approx(100) and found["random"]["decode_ms"] == pytest.approx(300)
    assert found["stride"]["lesion_tokens_kept"] == 0.5 and facts["seconds_a_scan"] == {"dense": {"vision": 2.0}}
    # each patient is ahead by 1/2, 1 or 0, so that a draw of three patients is ahead by their mean
    rng = np.random.default_rng(0)
    draws = rng.multinomial(3, [1 / 3] * 3, 400) @ np.array([0.5, 1.0, 0.0]) / 3
    low, high = np.percentile(draws, [2.5, 97.5])
    assert (found["stride"]["ahead_low"], found["stride"]["ahead_high"]) == pytest.approx((low, high))
    assert found["stride"]["p"] == report.two_sided(draws)
    both = [found[name]["p"] for name in ("stride", "random")]
    assert [found[name]["p_holm"] for name in ("stride", "random")] == report.holm(both)
    assert math.isclose(found["stride"]["layer_average"], 0.1)
    line = found["stride"]
    by = [f"{100 * line[name]:.1f}" for name in ("ours_ahead", "ahead_low", "ahead_high")]
    assert report.nearest(found.values()) == f"at 10 % stride by {by[0]} ({by[1]} to {by[2]})"
