"""A benchmark of one's own: one file and one registered line, as the docstring of the registry shows."""

import importlib.util
import json
import re
import textwrap

import pytest
import torch

import evaluate_hf
from conftest import ROOT
from photon.evaluation import benchmarks
from photon.evaluation.benchmarks import BENCHMARKS
from photon.evaluation.questions import load_benchmark
from photon.rows import RowError


@pytest.fixture
def toy(tmp_path):
    """The example in the docstring, written to a file and registered; and the folder of its questions."""
    example = re.search(r"\n\n((?:    .*\n|\n)+)\nand import", benchmarks.__doc__)[1]
    assert len(example.strip().splitlines()) <= 25
    file = tmp_path / "effusion.py"
    file.write_text(textwrap.dedent(example))
    spec = importlib.util.spec_from_file_location("effusion", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "data"
    folder.mkdir()
    records = [{"case": f"p{i}", "effusion": "yes" if i % 3 else "no"} for i in range(7)]
    (folder / "effusion.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    yield folder
    del BENCHMARKS["effusion"]


def test_a_new_benchmark_is_one_file_and_one_line(toy, capsys):
    rows = load_benchmark("effusion", toy)
    assert [row["answer"] for row in rows] == ["no", "yes", "yes", "no", "yes", "yes", "no"]
    assert rows[0]["id"] == "effusion/p0" and rows[0]["volumes"] == [str(toy / "p0.nii.gz")]
    texts = ["No.", "Yes, a small one", "no", "No", "I see none", "yes", ""]  # by its rule: 4 right, 2 not read
    file = toy / "predictions.jsonl"
    lines = [{"id": row["id"], "prediction": text} for row, text in zip(rows, texts, strict=True)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--benchmark", "effusion", "--data", str(toy), "--score", str(file), "--output", str(toy / "run")]
    evaluate_hf.main([*command, "--bootstrap", "9"])
    task = json.loads((toy / "run" / "scores.json").read_text())["scores"]["tasks"]["presence"]
    assert task["figures"]["accuracy_micro"]["value"] == pytest.approx(4 / 7)
    assert task["read"] == pytest.approx(5 / 7)
    assert task["baselines"][0]["letter"] == "yes" and task["baselines"][0]["accuracy_micro"] == pytest.approx(4 / 7)
    assert "| presence | 7 | accuracy_micro | 57.14" in capsys.readouterr().out
    evaluate_hf.main([*command[:4], "--compare", str(file), str(file), "--bootstrap", "0"])
    assert json.loads(capsys.readouterr().out)["tasks"]["presence"]["mcnemar"]["p"] == 1


def test_its_faults_are_named_by_line(toy):
    with open(toy / "effusion.jsonl", "a") as file:
        file.write('{"case": "p7"}\n{"case": "p0", "effusion": "no"}\n{"case": "p8", "effusion": "maybe"}\n')
    with pytest.raises(RowError) as caught:
        load_benchmark("effusion", toy)
    for part in ("line 8: no 'effusion'", "line 9: its id is that of", "line 10: its answer 'maybe' is none"):
        assert f"effusion.jsonl {part}" in str(caught.value)


def test_no_other_file_knows_a_benchmark_by_name():
    """A name in quotes outside `benchmarks/` would be a test for it."""
    files = [ROOT / "evaluate_hf.py", *(ROOT / "photon" / "evaluation").glob("*.py")]
    assert len(files) > 10
    for file in files:
        code = re.sub(r'""".*?"""', "", file.read_text("utf-8"), flags=re.S)
        assert not [name for name in BENCHMARKS if f'"{name}"' in code], file.name


def command_of(name, monkeypatch):
    """The module of a file in `benchmarks/`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    return command


def test_how_much_is_padding(monkeypatch):
    """Rows of 4 and 2 places have 2 of 8 empty; a batch of one has none."""
    command = command_of("padding", monkeypatch)
    assert command.padding([[4, 2]]) == 0.25 and command.padding([[4], [2]]) == 0
    assert command.padding([[4, 2], [3]]) == pytest.approx(2 / 11)
    assert command.split([5, 6, 7], 2) == [[5, 6], [7]]


def test_what_mirrored_draws_are_worth(monkeypatch):
    """Mirrors that undo each other's error leave no variance; mirrors that repeat it leave that of one draw."""
    command = command_of("draws", monkeypatch)
    torch.manual_seed(0)
    error = torch.randn(4000, 3)
    independent, mirrored, signal = command.variances(torch.cat([2 + error, 2 - error]))
    assert independent == pytest.approx(1.5, rel=0.05) and mirrored < 1e-10 and signal == pytest.approx(12)
    independent, mirrored, _ = command.variances(torch.cat([error, error]))
    assert mirrored == pytest.approx(2 * independent, rel=1e-3)
    independent, mirrored, signal = command.variances(torch.randn(8000, 3))
    assert mirrored == pytest.approx(independent, rel=0.05) and abs(signal) < 0.01


def test_what_select_costs(tmp_path, monkeypatch, capsys):
    """Two runs that differ in one answer of four, by `benchmarks/reuse_select.py`."""
    command = command_of("reuse_select", monkeypatch)
    data = tmp_path / "test.jsonl"
    rows = [
        {"id": f"q{i}", "patient": f"p{i // 2}", "split": "test", "task": "presence", "volumes": ["a.nii.gz"],
         "answer": answer, "choices": ["yes", "no"], "messages": [
             {"role": "user", "content": [{"type": "volume"}, {"type": "text", "text": f"Is there {i}?"}]},
             {"role": "assistant", "content": [{"type": "text", "text": answer}]},
         ]}
        for i, answer in enumerate(["yes", "no", "yes", "no"])
    ]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [row["id"] for row in load_benchmark("jsonl", data)]
    for name, texts in (("exact", ["yes", "no", "yes", "no"]), ("select", ["yes", "no", "yes", "yes"])):
        (tmp_path / name).mkdir()
        lines = [{"id": i, "prediction": text, "kept": 0.25} for i, text in zip(ids, texts, strict=True)]
        (tmp_path / name / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = ["--runs", "front", str(tmp_path / "exact"), str(tmp_path / "select")]
    file = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["reuse_select.py", "--data", str(data), *runs, "--json", str(file)])
    command.main()
    found = json.loads(file.read_text())
    row = found["rows"][0]
    assert (row["exact"], row["select"], row["difference_value"]) == (1.0, 0.75, -0.25)
    assert row["difference_low"] <= -0.25 <= row["difference_high"] and found["patients"] == 2
    assert found["ratios"] == {"front_answers_that_differ": 0.25, "front_kept": 0.25}
    assert "presence" in capsys.readouterr().out
