"""`python -m photon.evidence` from nothing to tables, in small; and its figures on records that are known."""

import json
import re

import numpy as np
import pytest

from conftest import real
from photon.evidence.__main__ import main
from photon.evidence.arms import ARMS
from photon.evidence.grounding import auroc, reliability
from photon.evidence.organs import main as organs_command
from photon.evidence.organs import organ_effect, recalls
from photon.evidence.questions import jaccard, question_effect
from photon.evidence.report import TASKS, accuracies, evidence_found, layer_averaged, tables_of, write_tables
from photon.evidence.trainings import PRESETS, ROOT, train, turned

MARK_OF_TABLE = re.compile("<!-- ([a-z]+): begin -->")


def test_from_nothing_to_a_table_and_on_from_there(tmp_path, capsys):
    command = ["--output", str(tmp_path), "--preset", "smoke", "--arms", "exact"]
    main(command)
    table, result = capsys.readouterr().out, json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))
    assert "| exact cut, 10 % | 1 |" in table
    (row,) = result["rows"]
    records = json.loads((tmp_path / "exact-0" / "records.json").read_text(encoding="utf-8"))
    assert len(records) == result["questions"] and row["seconds"] > 0 and row["steps"] == 4
    for record in records:
        assert len(record["places"]) == record["kept_tokens"] and set(record["grounding"]) == {"own", "other"}
        assert record["organ_kept"] <= min(record["organ"], record["kept_tokens"])
        assert record["lesion"] <= record["organ"] <= record["tokens"] == 420 * len(record["scans"])
    written = (tmp_path / "exact-0" / "records.json").stat().st_mtime_ns
    main(command)  # nothing is made again
    assert (tmp_path / "exact-0" / "records.json").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))["rows"] == result["rows"]


def record(patient, task="presence", right=True, organ=(3,), places=(), scan="a", own=0.0, other=0.0, **counts):
    counts = {"tokens": 100, "kept_tokens": 10, "organ": 20, "organ_kept": 8, "lesion": 4, "lesion_kept": 4} | counts
    return {"patient": patient, "task": task, "right": {"own": right}, "evidence": list(organ), "places": list(places),
            "scans": [scan], "grounding": {"own": own, "other": other}, **counts}  # fmt: skip


def test_accuracies_and_what_was_found():
    records = [
        record("a"),
        record("a", right=False),
        record("b", "side"),
        record("b", "side", lesion=0, lesion_kept=0),
    ]
    found = accuracies(records, "own")
    assert (found["presence"][0], found["side"][0], found["mean"][0]) == (0.5, 1.0, 0.75)
    assert set(found) == {"presence", "side", "mean"} and set(found) - {"mean"} <= set(TASKS)
    others = [record("a"), record("a"), record("b", "side"), record("b", "side", right=False)]
    less = accuracies(records, "own", others)
    assert (less["presence"][0], less["side"][0], less["mean"][0]) == (-0.5, 0.5, 0.0)
    assert less["presence"] == [-0.5, -0.5, -0.5]  # each task has one patient: nothing to draw
    evidence = evidence_found(records)
    assert evidence["organ_recall"][0] == 0.4 and evidence["organ_precision"][0] == 0.8
    assert evidence["kept"][0] == 0.1 and evidence["organ_precision_of_chance"][0] == 0.2
    assert evidence["lesion_recall"] == [1.0, 1.0, 1.0]


def test_jaccard():
    assert jaccard([1, 2, 3], [2, 3, 4]) == 0.5 and jaccard([], []) == 1 and jaccard([1], []) == 0


def questions(follows):
    """Twenty scans, six questions each about two organs; the kept places follow the organ or not."""
    random = np.random.default_rng(0)
    for scan in range(20):
        for number in range(6):
            begin = 50 * (number % 2) if follows else 0
            places = begin + random.choice(50, 20, replace=False)
            task = TASKS[number // 2]
            yield record(f"p{scan}", task, organ=[1 + number % 2], scan=str(scan), places=places.tolist())


def test_the_question_matters_where_places_follow_it():
    yes, no = (question_effect(list(questions(follows))) for follows in (True, False))
    assert yes["pairs"] == no["pairs"] == 20 * 12
    assert yes["other_organ"] == 0 and yes["same_organ"] > 0.2 and yes["p"] < 0.001
    assert abs(no["difference"]) < 0.05 and no["p"] > 0.01


def test_auroc_and_reliability():
    assert auroc(np.array([1.0, 2, 3, 4]), np.array([False, False, True, True])) == 1
    assert auroc(np.array([1.0, 1, 1, 1]), np.array([False, True, True, False])) == 0.5
    assert auroc(np.array([3.0, 1, 2]), np.array([True, False, True])) == 1
    assert np.isnan(auroc(np.array([1.0]), np.array([True])))
    records = [record(f"p{i}", right=i % 2 == 0, own=i % 2 - 1.0, other=-5.0) for i in range(30)]
    found = reliability(records)
    assert found["own_or_other_scan"] == [1.0, 1.0, 1.0] and found["right_or_wrong"] == [0.0, 0.0, 0.0]


def test_a_page_without_marks_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- arms: begin -->\nold\n<!-- arms: end -->\n", encoding="utf-8")
    row = {"arm": "dense", "says": "all tokens", "seeds": 1, "steps": 5, "seconds": 3, "table": "arms"}
    row["accuracy"] = {"presence": [0.5, 0.4, 0.6], "mean": [0.5, 0.4, 0.6]}
    with pytest.raises(ValueError, match="methods: begin"):
        write_tables(tables_of({"rows": [row]}), page)


def test_arms_have_names_of_their_own_and_tables_that_are_shown():
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    known = set(MARK_OF_TABLE.findall((ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")))
    assert {arm.table for arm in ARMS} <= known
    for arm in (arm for arm in ARMS if arm.begins):
        (first,) = (other for other in ARMS if other.name == arm.begins)
        assert first.layers == arm.layers and first.seeds >= arm.seeds


def test_tokens_that_a_decoder_layer_sees():
    arms = {arm.name: arm for arm in ARMS}
    assert layer_averaged(arms["exact"], 0.1) == 0.1  # before the first of four layers
    assert layer_averaged(arms["deep_quarter"], 0.1) == (3 + 9 * 0.1) / 12  # layers 0, 1, 2 see all
    assert layer_averaged(arms["deep_front"], 0.1) == 0.1


def test_an_arm_that_goes_on_with_another_wants_it_first(tmp_path):
    (tmp_path / "train").mkdir()
    (arm,) = (arm for arm in ARMS if arm.name == "deep_half")
    with pytest.raises(RuntimeError, match="goes on with deep, which is not trained"):
        train(tmp_path, arm, 0, PRESETS["smoke"])


def test_a_row_with_its_question_in_front():
    parts = [{"type": "volume"}, {"type": "volume"}, {"type": "text", "text": "Grown?"}]
    row = {"id": "a", "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": []}]}
    asked = turned(row)["messages"][0]["content"]
    assert [part["type"] for part in asked] == ["text", "volume", "volume"] and row["messages"][0]["content"] is parts
    assert turned(row)["messages"][1] is row["messages"][1]


def test_the_organ_that_a_question_names_is_told_from_chance():
    random = np.random.default_rng(0)
    held = np.zeros((5, 200), bool)
    for organ in range(5):
        held[organ, 30 * organ : 30 * organ + 7 + organ] = True
    blind = random.random((6, 5, 200)) < 0.1
    own, other, p = organ_effect(blind, held)
    assert p > 0.05 and own.shape == other.shape == (5,)
    table = recalls(blind, held)
    assert table[3, 1, 4] == (blind[3, 1] & held[4]).sum() / held[4].sum()
    np.testing.assert_allclose(own[2], table[:, 2, 2].mean())
    np.testing.assert_allclose(other[2], table[:, [0, 1, 3, 4], 2].mean())
    asked, other, p = organ_effect(blind | (held[None] & (random.random((6, 5, 200)) < 0.5)), held)
    assert p < 0.001 and (asked > other + 0.2).all()


def test_a_real_scan_and_its_organs(tmp_path, capsys):
    organs, file = real("organs"), tmp_path / "organs.json"
    masks = {"liver": "liver", "spleen": "spleen", "left kidney": "kidney_left", "right lung": "lung_upper_lobe_right"}
    named = [f"--mask={organ}={organs / name}.nii.gz" for organ, name in masks.items()]
    organs_command(["--scan", str(real("example_ct_sm.nii.gz")), *named, "--json", str(file)])
    result = json.loads(file.read_text(encoding="utf-8"))
    assert [row["organ"] for row in result["rows"]] == [
        "liver",
        "spleen",
        "left kidney",
    ]  # that lobe is not in the scan
    assert result["rows"][2]["own"] > 2 * result["rows"][2]["other"] and result["ratios"]["p"] < 0.01
    assert "liver: 40 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        organs_command(["--scan", str(organs), "--mask", "brain=brain.nii.gz"])
    assert "one of liver, spleen" in capsys.readouterr().err
