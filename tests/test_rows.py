"""JSON lines with their faults, and the folder of a run."""

import json

import pytest

from photon.rows import MAX_FAULTS, RowError, build_rows, listed, read_rows
from photon.run_folder import RunError, open_run, write_whole

LINES = [b'{"a": 1}', b"", b"{", b"[1]", b"null", b'{"a": "\xff"}', '{"a": "ü\u2028"}'.encode(), b'{"a": 2']


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(LINES))
    return path


def test_each_line_is_a_record_or_its_fault(file):
    found = dict(read_rows(file))
    assert list(found) == [f"rows.jsonl line {number}" for number in range(1, 9)]
    first, empty, cut, array, null, bytes_, text, last = found.values()
    assert first == {"a": 1} and text == {"a": "ü\u2028"}  # json.loads of the same lines
    expected = {
        "empty": empty,
        "not JSON": cut,
        "but list": array,
        "but null": null,
        "not UTF-8 (invalid start byte at byte 8": bytes_,
    }
    for part, fault in expected.items():
        assert isinstance(fault, RowError) and part in str(fault)
    assert isinstance(last, RowError)
    options = {"name": "part/rows.jsonl", "skip_empty": True, "skip_unfinished": True}
    places = [place for place, _ in read_rows(file, **options)]
    assert places == [f"part/rows.jsonl line {number}" for number in (1, 3, 4, 5, 6, 7)]


def test_rows_are_built_of_records_and_faults_pass_through(file):
    def build(record):
        if record["a"] == 1:
            return [1, 2]
        raise RowError("'a' is not 1")

    rows = list(build_rows(read_rows(file), build))
    assert rows[:2] == [("rows.jsonl line 1", 1), ("rows.jsonl line 1", 2)] and len(rows) == 9
    assert [str(row) for place, row in rows if place.endswith("line 7")] == ["'a' is not 1"]


def test_many_faults_are_counted():
    faults = [f"fault {number}" for number in range(MAX_FAULTS + 3)]
    error = RowError.of(faults, "faulty rows")
    assert error.faults == faults and str(error) == listed(f"{len(faults)} faulty rows", faults)
    lines = str(error).split("\n  ")
    assert lines[0] == "23 faulty rows:" and lines[1:-1] == faults[:MAX_FAULTS] and lines[-1] == "... and 3 more"


def test_a_folder_holds_one_run(tmp_path):
    folder, settings = tmp_path / "deep" / "run", {"steps": 3, "window": (1.0, 2.0), "name": None}
    with pytest.raises(RunError, match="no run to resume in the folder of --out"):
        open_run(folder, settings, begun=False, resume=True, option="--out")
    assert open_run(folder, settings | {"steps": 2}, begun=False) is False
    assert open_run(folder, settings, begun=False, resume=False) is False  # nothing came of the first one
    assert json.loads((folder / "run.json").read_text()) == {"steps": 3, "window": [1.0, 2.0], "name": None}
    assert open_run(folder, settings, begun=True) is True and open_run(folder, settings, begun=True, resume=True)
    with pytest.raises(RunError, match="holds this run already. Add --resume"):
        open_run(folder, settings, begun=True, resume=False)
    other = {"steps": 4, "window": (1.0, 2.0), "seed": 0}
    with pytest.raises(RunError) as caught:
        open_run(folder, other, begun=True, resume=True)
    assert str(caught.value).split("\n  ")[1:] == ["seed: None there, 0 now", "steps: 3 there, 4 now"]
    assert open_run(folder, settings | {"steps": 5}, begun=True, resume=True, extend=("steps",))
    assert json.loads((folder / "run.json").read_text())["steps"] == 5
    for fewer in (4, -1, None):
        with pytest.raises(RunError, match="steps: 5 there"):
            open_run(folder, settings | {"steps": fewer}, begun=True, extend=("steps",))
    (folder / "run.json").unlink()
    with pytest.raises(RunError, match="not empty and holds no run.json"):
        open_run(folder, settings, begun=True)


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    file = tmp_path / "x.txt"
    write_whole(file, "one")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert file.read_text() == "one"
