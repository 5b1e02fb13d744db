"""The phantoms' truth against what an independent reader (nibabel, RAS) finds in the files.

python -m pytest tests/test_phantoms.py
"""

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from conftest import ROOT, run_fresh
from photon.phantoms import __main__ as command
from photon.phantoms import dataset as phantoms
from photon.phantoms.anatomy import FOV_ORGANS, LABELS
from photon.phantoms.patient import CHANGES, LIMITED_FOVS, Phantom, PhantomConfig, make_patient
from photon.phantoms.questions import (
    ANSWERS,
    blind_baseline,
    comparisons,
    question_text,
    scan_questions,
    write_questions,
)

PATIENTS = 30


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms") / "set"
    config = phantoms.DataConfig(seed=4, val=0.2, test=0.4)
    rows, table, report = phantoms.write_data_set(root, PATIENTS, config)
    return root, config, rows, table, report


def read(path):
    """Values and the RAS positions' affine, as nibabel sees them."""
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def centroid(mask, affine):
    return affine[:3, :3] @ np.argwhere(mask).mean(0) + affine[:3, 3]


def change_of(before, now):
    """The change that two volumes of one lesion show; diameters of a change differ by a fifth at least."""
    return "new" if not before else "grown" if now > 1.5 * before else "shrunk" if now < before / 1.5 else "unchanged"


def save(tmp_path, **names):
    paths = {}
    for name, image in names.items():
        paths[name] = tmp_path / f"{name}.nii.gz"
        sitk.WriteImage(image, str(paths[name]))
    return paths


def test_same_seed_same_files_whatever_the_workers(tmp_path):
    config = phantoms.DataConfig(seed=2)
    for name, workers in (("one", 1), ("two", 2)):
        phantoms.write_data_set(tmp_path / name, 3, config, workers)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len([p for p in files if p.name.endswith(".nii.gz")]) >= 9
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_seed_patient_and_scan_each_change_the_voxels():
    config = PhantomConfig(follow_up=1.0)
    images = [make_patient(*key, config)[0] for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({sitk.Hash(image) for image in images}) == 4
    assert sitk.Hash(make_patient(0, 0, 0, config)[0]) == sitk.Hash(images[0])


def test_lesions_have_their_volume_and_place():
    painted, true = [], []
    for patient in range(14):
        _, organs, lesions, facts = make_patient(7, patient, fov="full")
        labels, voxel = sitk.GetArrayFromImage(lesions), math.prod(lesions.GetSpacing()) / 1000
        assert sorted(set(np.unique(labels)) - {0}) == [lesion["label"] for lesion in facts["lesions"]]
        for lesion in facts["lesions"]:
            found = labels == lesion["label"]
            painted.append(found.sum() * voxel)
            true.append(4 / 3 * math.pi * (lesion["diameter_mm"] / 20) ** 3)
            center = lesions.TransformContinuousIndexToPhysicalPoint(np.argwhere(found).mean(0)[::-1].tolist())
            assert math.dist(center, lesion["center_lps"]) < 1.5
            assert set(sitk.GetArrayFromImage(organs)[found]) == {LABELS[lesion["organ"]]}
    ratio = np.array(painted) / np.array(true)
    assert len(true) >= 20 and abs(ratio - 1).max() < 0.35
    assert sum(painted) == pytest.approx(sum(true), rel=0.03)


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "PSR", "ILA"])
def test_organs_lie_where_anatomy_puts_them(tmp_path, orientation):
    image, organs, _, _ = make_patient(5, fov="full", orientation=orientation)
    paths = save(tmp_path, image=image, organs=organs)
    labels, affine = read(paths["organs"])
    assert "".join(nib.aff2axcodes(affine)) == orientation
    at = {name: centroid(labels == label, affine) for name, label in LABELS.items()}
    spine = at["spine"]
    for name in ("left kidney", "left lung", "spleen", "stomach", "aorta"):
        assert at[name][0] < spine[0] - 5, name  # RAS: the patient's left is -x
    for name in ("right kidney", "right lung", "liver"):
        assert at[name][0] > spine[0] + 5, name
    assert all(at[name][1] > spine[1] for name in ("aorta", "liver", "heart", "stomach"))  # +y is the front
    assert all(at[f"{side} kidney"][1] < at["liver"][1] for side in ("left", "right"))
    assert at["left lung"][2] > at["spleen"][2] > at["left kidney"][2]
    values, _ = read(paths["image"])
    median = {name: np.median(values[labels == label]) for name, label in LABELS.items()}
    assert median["left lung"] < -700 < 60 < median["liver"] < median["aorta"] < median["spine"]


def test_stored_orientation_moves_no_voxel(tmp_path):
    stored = {}
    for code in ("LPS", "SRP"):
        image, organs, lesions, facts = make_patient(3, 1, orientation=code)
        assert facts["orientation"] == code
        for name, path in save(tmp_path, image=image, organs=organs, lesions=lesions).items():
            canonical = nib.as_closest_canonical(nib.load(path))
            stored[code, name] = np.asarray(canonical.dataobj), canonical.affine, nib.load(path).shape
    for name in ("image", "organs", "lesions"):
        (a, affine_a, shape_a), (b, affine_b, shape_b) = stored["LPS", name], stored["SRP", name]
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(affine_a, affine_b, atol=1e-3)
        assert shape_a != shape_b and a.std() > 0


def test_grid_is_hounsfield_and_spacing_varies(data_set):
    root, _, rows, _, _ = data_set
    grids = set()
    for volume in {v for row in rows for v in row["volumes"]}:
        image = nib.load(root / volume)
        assert image.get_data_dtype() == np.int16
        grids.add((image.shape, "".join(nib.aff2axcodes(image.affine))))
    assert len({code for _, code in grids}) >= 4 and len({shape for shape, _ in grids}) >= 15


@pytest.mark.parametrize("fov", LIMITED_FOVS)
def test_field_of_view_answers_agree_with_the_labels(tmp_path, fov):
    config = PhantomConfig()
    out = set()
    for patient in range(2):
        phantom = Phantom(11, patient, config, fov)
        _, organs, _, facts = phantom.render()
        labels, _ = read(save(tmp_path, organs=organs)["organs"])
        whole = sitk.GetArrayFromImage(Phantom(11, patient, config, "full").render()[1])
        answers = {key: answer for task, key, answer in scan_questions(facts, config) if task == "fov"}
        for name in FOV_ORGANS:
            mask = labels == LABELS[name]
            assert (whole == LABELS[name]).any()  # the patient has the organ: it is the view that ends
            rim = mask.any() and any(mask.take(side, axis).any() for axis in range(3) for side in (0, -1))
            if not mask.any():
                assert answers[name] == "yes"
            assert (answers.get(name) == "no") <= (mask.any() and not rim)
            assert not rim or name not in answers
            out |= {name} if answers.get(name) == "yes" else set()
    expected = {"chest": {"liver", "spleen"}, "upper": {"left kidney"}, "lower": {"left lung", "right lung"},
                "lumbar": {"liver"}, "left side": {"right kidney"}, "right side": {"spleen"}}  # fmt: skip
    assert expected[fov] <= out


def test_answers_agree_with_image_and_maps(data_set):
    """Every answer is found again in the written voxels."""
    root, _, rows, _, _ = data_set
    checked = Counter()
    for row in rows:
        text = question_text(row)
        organ = next((name for name in LABELS if name in text), None)
        scans = []
        for volume, organs, lesions in zip(row["volumes"], row["labels"], row["lesions"], strict=True):
            (hu, affine), (organs, _), (lesions, _) = (read(root / path) for path in (volume, organs, lesions))
            scans.append((hu, organs, lesions, abs(np.linalg.det(affine[:3, :3]))))
        hu, organs, lesions, voxel = scans[0]
        inside = {name: np.unique(lesions[(organs == n) & (lesions > 0)]) for name, n in LABELS.items()}
        sizes = {name: [(6 / math.pi * voxel * (lesions == n).sum()) ** (1 / 3) for n in found]
                 for name, found in inside.items()}  # fmt: skip
        task, answer = row["task"], row["answer"]
        if task == "presence":
            assert answer == ("yes" if len(inside[organ]) else "no")
        elif task == "count":
            assert answer == str(len(inside[organ]))
        elif task == "side":
            pair = "kidney" if "kidney" in text else "lung"
            assert len(inside[f"{answer} {pair}"])
        elif task == "largest":
            assert answer in max((max(found, default=0), name) for name, found in sizes.items())[1]
        elif task in ("size_open", "size_choice"):
            claimed = answer if task == "size_open" else text.split(f"{answer}) ")[1].split(" mm")[0]
            assert abs(float(claimed) - sizes[organ][0]) < 3.5
        elif task == "attenuation":
            mine, other = hu[lesions == inside[organ][0]], hu[(organs == LABELS[organ]) & (lesions == 0)]
            assert answer == ("hyperdense" if np.median(mine) > np.median(other) else "hypodense")
        elif task == "fov":
            assert answer == ("no" if (organs == LABELS[organ]).any() else "yes")
        else:
            before, now = ((m[o == LABELS[organ]] > 0).sum() * v for _, o, m, v in scans)
            assert answer == change_of(before, now)
        checked[task] += 1
    assert {"presence", "side", "attenuation", "fov"} <= set(checked) and min(checked.values()) > 1, checked


def test_a_comparison_follows_the_voxels():
    config, found = PhantomConfig(follow_up=1.0), Counter()
    for patient in range(6):
        phantom = Phantom(21, patient, config)
        maps, facts = [], []
        for scan in range(2):
            _, organs, lesions, truth = phantom.render(scan)
            labels = (sitk.GetArrayFromImage(organs), sitk.GetArrayFromImage(lesions))
            maps.append((*labels, math.prod(lesions.GetSpacing())))
            facts.append(truth)
        for _, organ, change in comparisons(*facts):
            before, now = ((m[o == LABELS[organ]] > 0).sum() * v for o, m, v in maps)
            assert now > 0 and change == change_of(before, now)
            found[change] += 1
    assert set(found) == set(CHANGES)


def test_rows_have_the_training_format(data_set):
    root, _, rows, _, _ = data_set
    lines = [line for split in ("train", "val", "test") for line in (root / f"{split}.jsonl").read_text().splitlines()]
    written = [json.loads(line) for line in lines]
    assert sorted(row["id"] for row in written) == [row["id"] for row in rows] == sorted({row["id"] for row in rows})
    for row in written:
        assert set(row) == {
            "id", "patient", "split", "task", "volumes", "labels", "lesions", "evidence", "messages", "answer",
            "choices",
        }  # fmt: skip
        user, assistant = row["messages"]
        text = user["content"][-1]["text"]
        whole = [label for name, label in LABELS.items() if name in text and row["task"] != "largest"]
        pairs = [label for name, label in LABELS.items() if name.split()[-1] in text]  # "kidney" means both
        assert row["evidence"] == (whole or pairs) != []
        kinds = [part["type"] for part in user["content"]]
        assert kinds == ["volume"] * len(row["volumes"]) + ["text"]
        assert len(row["volumes"]) == (2 if row["task"] == "comparison" else 1)
        assert assistant == {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}
        assert user["role"] == "user" and len(row["answer"].split()) == 1
        assert row["choices"] is None if row["task"] == "size_open" else row["answer"] in row["choices"]
        for path in row["volumes"] + row["labels"] + row["lesions"]:
            assert (root / path).is_file() and not Path(path).is_absolute()


def test_splits_are_disjoint_by_patient_and_stay_when_the_set_grows(data_set):
    _, config, rows, _, _ = data_set
    patients = defaultdict(set)
    for row in rows:
        patients[row["split"]].add(row["patient"])
        assert f"/{row['patient']}/" in row["volumes"][0]
    assert set(patients) == {"train", "val", "test"}
    assert sum(map(len, patients.values())) == len(set.union(*patients.values()))
    shares = Counter(phantoms.split_of(i, config) for i in range(1000))
    assert abs(shares["test"] - 400) <= 5 and abs(shares["val"] - 200) <= 5


def test_blind_baseline_of_a_small_set_is_chance(data_set):
    root, _, rows, table, report = data_set
    for task, (_, scored, chance, accuracy) in table.items():
        assert task in report and report in (root / "README.md").read_text(encoding="utf-8")
        assert not scored or accuracy <= chance + 0.03, task
    assert table["presence"][1] >= 20 and table["fov"][1] >= 4


def _lopsided(patients, config):
    """Candidates whose answers depend on the question's text, as of an unbalanced generator."""
    rng = np.random.default_rng(0)
    sizes = [f"{d:g}" for d in config.phantom.diameters]
    for patient in range(patients):
        for task, answers in ANSWERS.items():
            for key in ("",) if task == "largest" else ("liver", "spleen"):
                options = list(answers or sizes)[:: 1 if key == "liver" else -1]
                share = 0.5 ** np.arange(len(options))
                name = f"p{patient:05d}"
                yield {"id": f"{name}-0-{task}-{key}", "patient": name, "split": phantoms.split_of(patient, config),
                       "task": task, "key": key, "answer": str(rng.choice(options, p=share / share.sum())),
                       "volumes": ["v"], "labels": ["o"], "lesions": ["m"]}  # fmt: skip


def test_every_text_gets_every_answer_equally_often():
    config = phantoms.DataConfig(seed=1)
    candidates = list(_lopsided(900, config))
    rows, left = write_questions(candidates, config.seed, config.phantom)
    assert len(rows) + sum(left.values()) == len(candidates) and len(rows) > 3000
    counts = defaultdict(Counter)
    for row in rows:
        counts[row["split"], row["task"], question_text(row)][row["answer"]] += 1
    for (_, task, _), answers in counts.items():
        wanted = 5 if task.startswith("size") else len(ANSWERS[task])
        assert len(answers) == wanted and len(set(answers.values())) == 1
    by_split = {split: [row for row in rows if row["split"] == split] for split in ("train", "test")}
    for task, (_, scored, chance, accuracy) in blind_baseline(*by_split.values()).items():
        assert scored and accuracy == pytest.approx(chance), task


def test_blind_baseline_sees_a_leak():
    def row(text, answer):
        return {"task": "presence", "answer": answer, "messages": [{"content": [{"type": "text", "text": text}]}]}

    leaking = [row("liver?", "yes")] * 9 + [row("liver?", "no")] + [row("spleen?", "no")] * 10
    assert blind_baseline(leaking, leaking)["presence"] == (20, 20, 0.5, 0.95)
    assert math.isnan(blind_baseline(leaking, [])["presence"][3])


def test_resume_writes_only_what_is_missing(data_set):
    root, config, rows, _, _ = data_set
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.glob("scans/*/*")}
    lost = root / "scans" / "p00007"
    lost.rename(root / "scans" / ".p00007.partial")  # as a run that was cut off leaves it, with a broken file
    (root / "scans" / ".p00007.partial" / "scan0.nii.gz").write_bytes(b"cut")
    (root / "test.jsonl").unlink()
    again, _, _ = phantoms.write_data_set(root, PATIENTS, config)
    assert again == rows and (root / "test.jsonl").exists() and not list(root.rglob("*.partial"))
    assert {path for path in root.glob("scans/*/*")} == set(before)
    for path, (written, content) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == written) == (path.parent != lost)


def test_a_folder_of_other_data_is_refused(data_set, tmp_path):
    root = data_set[0]
    with pytest.raises(ValueError, match=r"seed 4 \(asked for 5\)"):
        phantoms.write_data_set(root, 1, phantoms.DataConfig(seed=5, val=0.2, test=0.4))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no settings.json"):
        phantoms.write_data_set(tmp_path, 1, phantoms.DataConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "huge"}, "choose one of small, full"),
        ({"lesion_probability": 1.5}, "probability from 0 to 1"),
        ({"max_lesions": 4}, "know 1, 2 and 3"),
        ({"diameters": (15.0, 16.0)}, "overlap"),
        ({"diameters": (5.0, 30.0)}, "from 10 to 42"),
        ({"contrast": (90.0, 50.0)}, "low then high"),
        ({"growth": 3.0}, "two diameters"),
        ({"orientations": ("RAL",)}, "one letter each"),
    ],
)
def test_wrong_settings_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        PhantomConfig(**change)


def test_wrong_requests_are_told():
    with pytest.raises(ValueError, match="this patient has 1"):
        make_patient(0, scan=1, config=PhantomConfig(follow_up=0.0))
    with pytest.raises(ValueError, match="one letter each"):
        make_patient(0, orientation="XYZ")
    with pytest.raises(ValueError, match="choose full, chest"):
        Phantom(0, fov="knee")
    with pytest.raises(ValueError, match="from 0 up"):
        Phantom(-1)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "one.nii.gz"
    command.main(["--one", str(out), "--seed", "3", "--orientations", "RAS", "--diameter-jitter", "1"])
    facts = json.loads(capsys.readouterr().out)
    image = nib.load(out)
    assert facts["fov"] == "full" and "".join(nib.aff2axcodes(image.affine)) == "RAS"
    assert list(image.shape) == facts["shape_lps"]  # RAS and LPS share their axes, not their signs
    np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :3], axis=0), facts["spacing_lps"], rtol=1e-5)
    with pytest.raises(SystemExit):
        command.main(["--one", "a.nii.gz", "--output", "b"])
    assert "give one of --one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--output", "b", "--size", "huge"])
    assert "choose one of" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        command.main(["--output", str(tmp_path), "--patients", "1"])
    assert "no settings.json" in capsys.readouterr().err


def test_every_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    options = re.findall(r"^  --([a-z-]+)(?: [A-Z{].*?)?(?:  +|\n +)(.*)$", capsys.readouterr().out, re.M)
    assert {"seed", "orientations", "workers"} <= {name for name, _ in options} and len(options) >= 20
    assert all(re.match(r"\w", text) for _, text in options), options


def test_phantoms_need_no_torch():
    """They are made on machines that only prepare data."""
    load = "import sys\nsys.path.insert(0, sys.argv[1])\nimport photon.phantoms.__main__"
    code = load + "\nassert 'torch' not in sys.modules"
    run_fresh(code, ROOT)
