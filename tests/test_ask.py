"""The command line: what it prints, what it draws, how it fails."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

import ask
from conftest import ROOT, SETTINGS, TOKENS, run_fresh
from photon import asking, overlay, planes
from photon.loading import load
from photon.scheduling_photon import gate_offset, standard_saliency

QUESTION = "Is there a lesion in the liver?"


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """An oblique scan of unequal sizes, stored in another order; its name must not appear in any output."""
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
              tmp_path / "kept.nii.gz", "--overlay", tmp_path / "overlay.png")  # fmt: skip
    result = json.loads(out)
    assert set(result) == {
        "answer", "tokens_kept", "tokens_seen", "threshold", "answer_tokens", "finish_reason", "dtype", "seconds"
    }  # fmt: skip
    assert result["dtype"] == "float32"
    assert result["threshold"] is None  # a budget leaves it out
    assert (result["tokens_kept"], result["tokens_seen"]) == (17, TOKENS) and 1 <= result["answer_tokens"] <= 3
    assert set(result["seconds"]) == {"reading", "vision", "prefill", "decode"}
    assert all(value >= 0 for value in result["seconds"].values())
    kept, image = sitk.ReadImage(str(tmp_path / "kept.nii.gz")), sitk.ReadImage(str(scan))
    assert kept.GetSize() == image.GetSize()
    np.testing.assert_allclose(kept.GetOrigin(), image.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(kept.GetDirection(), image.GetDirection(), atol=1e-5)
    share = sitk.GetArrayFromImage(kept).mean()
    assert 0 < share < 1
    assert (tmp_path / "overlay.png").stat().st_size > 10_000


def test_the_answer_is_that_of_generate(scan):
    """`ask` calls the vision tower apart to time it; answer, mask and threshold stay those of `generate`."""
    processor, model = load(ROOT)
    result, inputs, keep = asking.ask(processor, model, [str(scan)], QUESTION, max_new_tokens=5)
    whole = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)
    tokens = whole.sequences[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(tokens, skip_special_tokens=True).strip() == result["answer"]
    assert torch.equal(whole.past_key_values.cut.keep_mask, keep)
    assert f"(threshold {result['threshold']:.3f})" in asking.describe(result)
    scheduler, counts = model.model.language_model.scheduler, []

    def count(module, args, schedule):
        scores = standard_saliency(schedule.saliency_logits, args[0].visual, model.config)
        level = (
            result["threshold"] + float(scheduler.running_level) + gate_offset(model.config) / model.config.gate_slope
        )
        counts.extend(int((scores > level + more).sum()) for more in (-1e-4, 1e-4))

    scheduler.register_forward_hook(count)
    model.generate(**inputs, max_new_tokens=1)
    low, high = counts
    assert high <= result["tokens_kept"] <= low  # it is the threshold that this many lie above


def test_the_keep_map_is_the_mask_in_the_patient(scan, tmp_path):
    """The map has at each voxel the bit of its token, as the affines give it without `resample`."""
    processor, model = load(ROOT)
    _, inputs, keep = asking.ask(processor, model, [str(scan)], QUESTION, keep_ratio=0.4, max_new_tokens=1)
    image, grid = sitk.ReadImage(str(scan)), inputs.scans[0][0]["grid"]
    size = np.array(image.GetSize())
    index = np.indices(size).reshape(3, -1)  # x, y, z
    matrix = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    world = matrix @ index + np.array(image.GetOrigin())[:, None]
    onto = np.array(grid["direction"]).reshape(3, 3) * grid["spacing"]
    place = np.linalg.solve(onto, world - np.array(grid["origin"])[:, None])
    patch, (depth, height, width) = SETTINGS["patch_size"], SETTINGS["grid"]
    shape = np.array([width // patch // 2, height // patch // 2, depth // patch])[:, None]  # tokens in x, y, z
    token = np.floor((place + 0.5) / (patch * np.array([2, 2, 1]))[:, None]).astype(int)
    inside = ((token >= 0) & (token < shape)).all(0)
    expected = np.zeros(len(inside), bool)
    x, y, z = token[:, inside]
    expected[inside] = keep[0].reshape(*shape[::-1, 0]).numpy()[z, y, x]
    kept = sitk.GetArrayFromImage(processor.keep_map(keep, inputs)).transpose(2, 1, 0).ravel() > 0
    assert 0.1 < expected.mean() < 0.9
    assert (kept == expected).mean() > 0.995  # the rest lie on the border of two tokens


def test_dense_keeps_all(capsys, scan):
    out = run(capsys, scan, QUESTION, "--dense", "--max-new-tokens", 2)
    assert f"{TOKENS} of {TOKENS} visual tokens kept" in out and "prefill" in out


def test_two_scans(capsys, scan, tmp_path):
    out = run(capsys, scan, scan, "Has it grown?", "--json", "--keep-ratio", 0.2, "--max-new-tokens", 2, "--keep-map",
              tmp_path / "kept.nii.gz")  # fmt: skip
    assert json.loads(out)["tokens_kept"] == round(0.2 * 2 * TOKENS)
    assert (tmp_path / "kept.nii.gz").exists() and (tmp_path / "kept_2.nii.gz").exists()


def test_inspect(capsys, scan, tmp_path):
    out = run(capsys, "--inspect", scan, "--json", "--overlay", tmp_path / "read.png")
    report = json.loads(out)
    assert report["readable"] is True and (tmp_path / "read.png").exists()
    settings = json.loads((ROOT / "processor_config.json").read_text())["image_processor"]
    assert report["model"]["size"] == settings["grid"][::-1]  # of the model at hand, not of another one
    assert report["model"]["spacing"] == settings["spacing"][::-1]


def test_inspect_scales_as_the_model_does(capsys, scan, tmp_path):
    settings = json.loads((ROOT / "processor_config.json").read_text())
    for name in ("window", "minmax"):
        folder = tmp_path / name
        folder.mkdir()
        for file in [*ROOT.glob("*_photon.py"), *ROOT.glob("*.json"), *ROOT.glob("*.jinja")]:
            shutil.copy(file, folder)
        settings["image_processor"] |= {"scaling": name, "window": [-3000.0, 3000.0]}  # wider than the scan
        (folder / "processor_config.json").write_text(json.dumps(settings))
        run(capsys, "--inspect", scan, "--model", folder, "--overlay", folder / "read.png")
    first, second = (
        np.asarray(Image.open(tmp_path / name / "read.png").convert("L")) for name in ("window", "minmax")
    )
    assert second.std() > 1.5 * first.std()


def test_inspect_of_a_refused_scan(capsys, tmp_path):
    path = tmp_path / "doe_jane.nii.gz"
    sitk.WriteImage(sitk.Image(7, 8, 9, sitk.sitkInt16), str(path))
    with pytest.raises(SystemExit) as stopped:
        ask.main(["--inspect", str(path), "--json", "--overlay", str(tmp_path / "read.png")])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and not (tmp_path / "read.png").exists()
    assert json.loads(captured.out)["faults"][0]["fault"] == "CONSTANT_IMAGE"
    assert captured.err.count("\n") == 1 and "doe_jane" not in captured.out + captured.err


def test_a_warning_is_one_line_without_a_path(capsys, scan, tmp_path):
    """A mislabelled file is read with a warning, once, although the overlay reads it again."""
    path = tmp_path / "doe_jane.nrrd"  # a NIfTI file by its content
    path.write_bytes(scan.read_bytes())
    ask.main([str(path), QUESTION, "--json", "--max-new-tokens", "1", "--overlay", str(tmp_path / "o.png")])
    captured = capsys.readouterr()
    json.loads(captured.out)
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: [MISLABELLED_FILE]")
    assert str(tmp_path) not in lines[0] and "_photon.py" not in lines[0] and "doe_jane" not in lines[0]


def test_scans_are_never_overwritten(capsys, scan, tmp_path):
    first, second, folder = tmp_path / "a.nii.gz", tmp_path / "a_2.nii.gz", tmp_path / "series"
    first.write_bytes(scan.read_bytes())
    second.symlink_to(first)
    folder.mkdir()
    for scans, target in [
        ([first], first),
        ([first], second),  # a link to the scan
        ([first, second], tmp_path / "a.nii.gz"),
        ([scan, folder], folder / "kept.nii.gz"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            ask.main([*map(str, scans), QUESTION, "--keep-map", str(target)])
        assert stopped.value.code == 2
        assert "overwrite a scan" in (error := capsys.readouterr().err) or "scan's folder" in error
    assert first.read_bytes() == scan.read_bytes() and not list(folder.iterdir())


def test_what_cannot_be_written(capsys, scan, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("Exception thrown in a writer:\nof several lines, with /a/path")

    monkeypatch.setattr(sitk, "WriteImage", full)
    with pytest.raises(SystemExit) as stopped:
        ask.main([str(scan), QUESTION, "--max-new-tokens", "1", "--keep-map", str(tmp_path / "kept.nii.gz")])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.err.count("\n") == 1
    assert "Could not write the file of --keep-map" in captured.err and "/a/path" not in captured.err


def test_a_budget_above_what_there_is(capsys, scan):
    ask.main([str(scan), QUESTION, "--token-budget", str(TOKENS + 1), "--max-new-tokens", "1", "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tokens_kept"] == TOKENS and "more than there are" in captured.err


@pytest.mark.parametrize(("arguments", "message"), [
    (["SCAN"], "then the question"),
    (["--inspect", "SCAN", "b"], "no question"),
    (["SCAN", "q", "--dense", "--token-budget", "3"], "exclude each other"),
    (["SCAN", "q", "--overlay", "a.bmp"], "suffixes"),
    (["SCAN", "q", "--keep-map", "a.png"], "suffixes"),
    (["SCAN", "q", "--html", "a.png"], "--html needs one of the suffixes"),
    (["SCAN", "q", "--compare", " "], "question is empty"),
    (["--inspect", "SCAN", "--compare", "q"], "leave out --compare"),
    (["SCAN", "q", "--overlay", "no/such/folder/a.png"], "does not exist"),
    (["SCAN", "q", "--overlay", "FOLDER.png"], "names a folder"),
    (["SCAN", "SCAN"], "then the question"),  # the question was forgotten, and must not become a caption
    (["SCAN", "  "], "question is empty"),
    (["SCAN", "q", "--series", "2"], "a scan is a file"),
    (["SCAN", "q", "--window", "40", "40"], "lower one first"),
    (["SCAN", "q", "--device", "nonsense"], "no device 'nonsense'"),
    (["SCAN", "q", "--model", "FOLDER.png"], "no config.json"),
    (["--inspect", "SCAN", "--token-budget", "4", "--dense"], "leave out --dense, --token-budget"),
    (["missing.nii.gz", "q"], "NO_SUCH_FILE"),
    (["SCAN", "q", "--token-budget", "-2"], "token_budget is -2"),
    (["SCAN", "q", "--model", "no/such/model"], "no/such/model"),
    (["SCAN", "q", "--frame", "4"], "frame"),
])  # fmt: skip
def test_errors_in_one_line(capsys, scan, tmp_path, arguments, message):
    (tmp_path / "folder.png").mkdir()
    names = {"SCAN": str(scan), "FOLDER.png": str(tmp_path / "folder.png")}
    with pytest.raises(SystemExit) as stopped:
        ask.main([names.get(argument, argument) for argument in arguments])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and message in captured.err and "Traceback" not in captured.err
    assert "doe_jane" not in captured.out + captured.err
    assert captured.err.startswith("usage:") or captured.err.count("\n") == 1


def test_as_a_command(scan):
    code = "import runpy, sys; sys.path.insert(0, ROOT); runpy.run_path(ROOT + '/ask.py', run_name='__main__')"
    code = code.replace("ROOT", repr(str(ROOT)))
    out = run_fresh(code, scan, QUESTION, "--json", "--max-new-tokens", 2)
    assert json.loads(out)["tokens_seen"] == TOKENS


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


def torso(spacing=(3.0, 4.0, 5.0)):
    """A body of water with two lungs and a spine, in air; array (z, y, x) in LPS."""
    array = np.full((24, 36, 50), -1000, np.int16)
    array[:, 6:30, 5:45] = 30
    array[10:20, 9:24, 9:21] = -800  # the patient's right
    array[10:20, 9:24, 29:41] = -800
    array[:, 24:28, 23:27] = 500
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    return image


def kept_image(like, *boxes):
    array = np.zeros(like.GetSize()[::-1], np.uint8)
    for box in boxes:
        array[box] = 1
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(like)
    return image


@pytest.mark.parametrize("stored", ["LPS", "RAI", "SPL"])
def test_planes_go_where_the_question_is(stored):
    """Both lungs, the spine and air outside were kept; the words of the question choose among them."""
    scan = torso()
    kept = kept_image(scan, np.s_[8:22, 9:24, 5:45], np.s_[0:4, 0:36, 0:50])
    turned = [sitk.DICOMOrient(image, stored) for image in (scan, kept)]
    values = sitk.GetArrayViewFromImage(scan)
    for question, low, high, side in [
        ("Is there a lesion in the right lung?", -980, -500, 1),
        ("Is there a lesion in the left lung?", -980, -500, -1),
        ("Is there emphysema?", -980, -500, 0),
        ("Is there a lesion on the right?", -1000, 4000, 1),
    ]:
        (x, y, z), reason = planes.choose_planes(*turned, question, ct=True)
        assert low <= values[z, y, x] <= high and reason.startswith("planes through the middle of what was kept")
        assert sitk.GetArrayViewFromImage(kept)[z, y, x]
        assert side * (25 - x) >= 0 and 10 <= z < 20
    no_bone = kept_image(scan, np.s_[8:22, 9:24, 5:45])
    (x, y, z), reason = planes.choose_planes(scan, no_bone, "A fracture of the left rib?", ct=True)
    assert "nothing of it in bone" in reason and x >= 25  # none was kept there, and the caption tells
    (x, y, z), reason = planes.choose_planes(turned[0], None, "Any fracture of a vertebra?", ct=True)
    assert values[z, y, x] == 500 and "body in bone" in reason
    assert "lung" not in planes.choose_planes(*turned, "the lung?", ct=False)[1]  # MR has no HU


def test_planes_of_a_crowd_and_of_nothing():
    scan = torso()
    crowd = kept_image(scan, np.s_[3:9, 10:16, 30:36], np.s_[18, 20, 10])
    (x, y, z), _ = planes.choose_planes(scan, crowd, "Is there a cyst?", ct=True)
    assert 30 <= x < 36 and 10 <= y < 16 and 3 <= z < 9
    full = kept_image(scan, np.s_[:])
    assert planes.choose_planes(scan, full, "")[1] == planes.choose_planes(scan, None, "")[1]


def test_the_window_shows_what_the_question_names():
    assert planes.question_window("Is there a nodule in the right lung?", True) == (-1350.0, 150.0)
    assert planes.question_window("Is there a nodule in the right lung?", False) is None
    assert planes.question_window("Lung or bone?", True) is None
    assert planes.question_window("Is there a lesion in the liver?", True) is None


def test_a_picture_compares_questions(capsys, scan, tmp_path):
    other = "Is there a lesion in the right lung?"
    out = run(capsys, scan, QUESTION, "--compare", other, "--json", "--keep-ratio", 0.2, "--max-new-tokens", 2,
              "--overlay", tmp_path / "both.png")  # fmt: skip
    result = json.loads(out)
    (second,) = result["compared"]
    assert second["question"] == other and second["tokens_kept"] == result["tokens_kept"] and 0 <= second["shared"] < 1
    run(capsys, scan, QUESTION, "--keep-ratio", 0.2, "--max-new-tokens", 2, "--overlay", tmp_path / "one.png")
    both, one = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("both", "one"))
    assert both.shape[0] > 1.6 * one.shape[0] and both.shape[1] == one.shape[1]
    blue = np.array([0x4C, 0xC9, 0xF0])
    assert (np.abs(both.astype(int) - blue).sum(-1) < 30).any() and not (np.abs(one - blue).sum(-1) < 30).any()
    assert "kept for both" in run(capsys, scan, QUESTION, "--compare", other, "--max-new-tokens", 1)


def test_overlap_counts_tokens():
    first, second = torch.tensor([[True, True, False, False]]), torch.tensor([[False, True, True, False]])
    assert asking.overlap(first, second) == 1 / 3 and asking.overlap(first, first) == 1.0
    assert asking.overlap(first & False, first & False) == 1.0


def test_a_caption_is_drawn_as_it_is(tmp_path):
    """Dollar signs start no formula; long answers and thin slabs are drawn without an error."""
    plane = overlay.upright_view("axial", np.arange(6.0).reshape(2, 3), (2.0, 40.0))
    for caption in ("costs $5 and $x_{", "word " * 2000, ""):
        overlay.draw([plane], tmp_path / "a.png", caption, (0, 5))
        assert (tmp_path / "a.png").stat().st_size > 1000


def test_names_of_several_maps():
    names = [ask.numbered(ask.Path(name), 1).name for name in ("o.nii.gz", "a.b.nii.gz", "v1.2.png", "O.NII.GZ")]
    assert names == ["o_2.nii.gz", "a.b_2.nii.gz", "v1.2_2.png", "O_2.NII.GZ"]
