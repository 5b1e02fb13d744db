"""The command line: what it prints, what it draws, how it fails."""

import json
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import ROOT, run_fresh

sys.path.insert(0, str(ROOT))

import ask  # noqa: E402
import overlay  # noqa: E402

QUESTION = "Is there a lesion in the liver?"


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """An oblique scan of unequal sizes, stored in another order, under a name that must not come out again."""
    rng = np.random.default_rng(0)
    array = rng.normal(0, 60, (21, 27, 33)).astype(np.int16)
    array[:, :3] = array[:, -3:] = array[:, :, :4] = -1000
    array[5:9, 10:14, 12:19] = 600
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((9.0, 8.0, 11.0))
    image.SetOrigin((-100.0, 40.0, -300.0))
    turn = sitk.Euler3DTransform()
    turn.SetRotation(0.05, 0.1, -0.12)
    image.SetDirection(turn.GetMatrix())
    path = tmp_path_factory.mktemp("x") / "doe_jane_19700101.nii.gz"
    sitk.WriteImage(sitk.DICOMOrient(image, "SAR"), str(path))
    return path


def run(capsys, *arguments):
    ask.main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert "doe_jane" not in captured.out + captured.err
    return captured.out


def test_json_and_maps(capsys, scan, tmp_path):
    out = run(capsys, scan, QUESTION, "--json", "--token-budget", 17, "--max-new-tokens", 3, "--keep-map",
              tmp_path / "kept.nii.gz", "--overlay", tmp_path / "seen.png")  # fmt: skip
    result = json.loads(out)
    assert set(result) == {"answer", "tokens_kept", "tokens_seen", "answer_tokens", "seconds"}
    assert (result["tokens_kept"], result["tokens_seen"]) == (17, 125) and 1 <= result["answer_tokens"] <= 3
    assert set(result["seconds"]) == {"reading", "vision", "prefill", "decode"}
    assert all(value >= 0 for value in result["seconds"].values())
    kept, image = sitk.ReadImage(str(tmp_path / "kept.nii.gz")), sitk.ReadImage(str(scan))
    assert kept.GetSize() == image.GetSize()
    np.testing.assert_allclose(kept.GetOrigin(), image.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(kept.GetDirection(), image.GetDirection(), atol=1e-5)
    share = sitk.GetArrayFromImage(kept).mean()
    assert 0 < share < 1
    assert (tmp_path / "seen.png").stat().st_size > 10_000


def test_the_answer_is_that_of_generate(scan):
    """Timed in parts, with the vision tower called apart; the answer must not know."""
    processor, model = ask.load(ROOT)
    result, inputs, keep = ask.ask(processor, model, [str(scan)], QUESTION, max_new_tokens=5)
    whole = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)
    tokens = whole.sequences[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(tokens, skip_special_tokens=True).strip() == result["answer"]
    assert torch.equal(whole.past_key_values.cut.keep_mask, keep)


def test_dense_keeps_all(capsys, scan):
    out = run(capsys, scan, QUESTION, "--dense", "--max-new-tokens", 2)
    assert "125 of 125 visual tokens kept" in out and "prefill" in out


def test_two_scans(capsys, scan, tmp_path):
    out = run(capsys, scan, scan, "Has it grown?", "--json", "--keep-ratio", 0.2, "--max-new-tokens", 2, "--keep-map",
              tmp_path / "kept.nii.gz")  # fmt: skip
    assert json.loads(out)["tokens_kept"] == 50
    assert (tmp_path / "kept.nii.gz").exists() and (tmp_path / "kept_2.nii.gz").exists()


def test_inspect(capsys, scan, tmp_path):
    out = run(capsys, "--inspect", scan, "--json", "--overlay", tmp_path / "read.png")
    assert json.loads(out)["readable"] is True and (tmp_path / "read.png").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["SCAN"], "then the question"),
    (["--inspect", "SCAN", "b"], "no question"),
    (["SCAN", "q", "--dense", "--token-budget", "3"], "exclude each other"),
    (["SCAN", "q", "--overlay", "a.bmp"], "suffixes"),
    (["SCAN", "q", "--keep-map", "a.png"], "suffixes"),
    (["SCAN", "q", "--overlay", "no/such/folder/a.png"], "does not exist"),
    (["missing.nii.gz", "q"], "NO_SUCH_FILE"),
    (["SCAN", "q", "--token-budget", "-2"], "token_budget is -2"),
    (["SCAN", "q", "--model", "no/such/model"], "no/such/model"),
    (["SCAN", "q", "--frame", "4"], "frame"),
])  # fmt: skip
def test_errors_in_one_line(capsys, scan, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        ask.main([str(scan) if argument == "SCAN" else argument for argument in arguments])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and message in captured.err and "Traceback" not in captured.err
    assert "doe_jane" not in captured.out + captured.err


def test_as_a_command(scan):
    code = "import runpy, sys; sys.path.insert(0, ROOT); runpy.run_path(ROOT + '/ask.py', run_name='__main__')"
    code = code.replace("ROOT", repr(str(ROOT)))
    out = run_fresh(code, scan, QUESTION, "--json", "--max-new-tokens", 2)
    assert json.loads(out)["tokens_seen"] == 125


@pytest.mark.parametrize("stored", ["LPS", "RAS", "SAR", "AIL"])
def test_views_are_upright(stored):
    """Marks at the patient's right, anterior and superior faces lie left, top and top in the pictures."""
    array = np.zeros((12, 17, 23), np.int16)  # z, y, x in LPS
    marks = {"right": (6, 8, 1), "anterior": (6, 1, 11), "superior": (10, 8, 11)}
    for value, place in enumerate(marks.values(), start=1):
        array[place] = value
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((2.0, 3.0, 5.0))
    kept = sitk.GetImageFromArray((array == 1).astype(np.uint8))
    kept.CopyInformation(image)
    axial, coronal, sagittal = overlay.views(
        sitk.DICOMOrient(image, stored), sitk.DICOMOrient(kept, stored), at=(11, 8, 6)
    )
    assert [view.sides for view in (axial, coronal, sagittal)] == [
        ("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I"),
    ]  # fmt: skip
    assert np.argwhere(axial.pixels == 1).tolist() == [[8, 1]]  # left
    assert np.argwhere(axial.pixels == 2).tolist() == [[1, 11]]  # top
    assert np.argwhere(coronal.pixels == 1).tolist() == [[5, 1]]  # left; rows count from superior
    assert np.argwhere(coronal.pixels == 3).tolist() == [[1, 11]]  # top
    assert np.argwhere(sagittal.pixels == 2).tolist() == [[5, 1]]  # left
    assert np.argwhere(sagittal.pixels == 3).tolist() == [[1, 8]]  # top
    assert np.argwhere(axial.kept).tolist() == [[8, 1]] and not sagittal.kept.any()
    assert (axial.spacing, coronal.spacing, sagittal.spacing) == ((3.0, 2.0), (5.0, 2.0), (5.0, 3.0))


def test_planes_go_where_there_is_something_to_see():
    kept = np.zeros((9, 11, 13), bool)
    dropped = np.zeros_like(kept)
    kept[2, 3, 4] = dropped[2, 3, 5] = dropped[2, 4, 4] = dropped[3, 3, 4] = True
    assert overlay.most_telling(kept, dropped) == (4, 3, 2)
