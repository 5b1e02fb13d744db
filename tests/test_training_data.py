"""Rows and batches of training: spellings to one shape, faults by file and line, perturbed scans, token labels.

pytest tests/test_training_data.py
"""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from datasets import Dataset, DatasetDict, Features, List, Nifti
from datasets.table import embed_table_storage
from transformers import AutoTokenizer

from conftest import ROOT, tiny_config
from photon.loading import build_processor
from photon.objectives_photon import Objective
from photon.rows import RowError
from photon.scan_grid_photon import Geometry
from photon.training import perturbations, sources
from photon.training.batches import Collator, ScanSampler
from photon.training.data import check_files, check_rows, load_rows
from photon.training.losses.evidence import EvidenceLoss, evidence_losses, evidence_tokens
from photon.training.losses.label_maps import LabelMapArguments, LabelMapLoss, TokenLabels
from photon.training.losses.token_labels import TokenHead

GRID, SPACING = (28, 56, 84), (5.0, 3.0, 2.0)  # 2 x 2 x 3 = 12 tokens


def ask(text, scans=1):
    return [{"role": "user", "content": [*[{"type": "volume"}] * scans, {"type": "text", "text": text}]}]


def say(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def write_scan(path, seed, size=(23, 31, 37)):
    array = np.random.default_rng(seed).integers(-1000, 300, size[::-1]).astype(np.int16)
    array[0] = -1000  # air, without which values are no HU
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((4.0, 5.0, 6.0))
    sitk.WriteImage(image, str(path))
    return image


def write_rows(path, rows):
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "scans").mkdir()
    for number in range(3):
        write_scan(root / "scans" / f"{number}.nii.gz", number)
    return root


@pytest.fixture(scope="module")
def processor():
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    return build_processor(tokenizer, tiny_config(), {"grid": GRID, "spacing": SPACING, "mean": 0.5, "std": 0.5})


ROWS = [
    {"id": "a", "task": "side", "volumes": ["scans/0.nii.gz"], "messages": ask("On which side?") + say("left")},
    {"messages": ask("Which is larger, the first or the second?", 2) + say("the second"),
     "volumes": ["scans/1.nii.gz", "scans/2.nii.gz"]},
    {"messages": ask("What is a CT?", 0) + say("many X-rays")},
]  # fmt: skip


@pytest.fixture(scope="module")
def rows(folder):
    return load_rows(write_rows(folder / "train.jsonl", ROWS))


# === Rows ============================================================================================================


def test_all_spellings_give_the_same_rows(folder, rows):
    def plain(messages, mark):
        join = "".join
        return [
            {"role": m["role"], "content": join(mark if p["type"] == "volume" else p["text"] for p in m["content"])}
            for m in messages
        ]

    release = [dict(row, messages=plain(row["messages"], "<video>")) for row in ROWS]
    for row in release:
        row["videos"] = row.pop("volumes", [])
    inline = json.loads(json.dumps(ROWS))
    for row in inline:
        volumes = iter(row.pop("volumes", []))
        for part in row["messages"][0]["content"]:
            if part["type"] == "volume":
                part |= {"type": "video", "path": next(volumes)}
    marked = [dict(row, messages=plain(row["messages"], "<volume>")) for row in ROWS]
    for number, variant in enumerate((release, inline, marked)):
        name = folder / f"variant{number}.jsonl"
        other = load_rows(write_rows(name, variant))
        assert other.remove_columns("where").to_list() == rows.remove_columns("where").to_list()
        assert other["where"][1] == f"{name.name} line 2"
    assert rows[1]["volumes"][1]["path"] == str(folder / "scans" / "2.nii.gz")
    assert [rows[0][name] for name in ("id", "task", "answer")] == ["a", "side", "left"]
    assert rows[2]["volumes"] == [] and rows[2]["task"] is None


def test_a_row_may_name_series_and_frame(folder):
    entry = {"path": "scans/0.nii.gz", "series": 2, "frame": 1}
    row = load_rows(write_rows(folder / "series.jsonl", [dict(ROWS[0], volumes=[entry])]))[0]
    assert row["volumes"][0] == {"path": str(folder / "scans" / "0.nii.gz"), "series": "2", "frame": 1, "read": None}


def test_a_data_set_of_the_hub(folder, rows, monkeypatch):
    """Arrow gives every row every field, null where it had none."""
    table = Dataset.from_list([json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()])
    monkeypatch.setattr(sources, "load_dataset", lambda name, split: table)
    found = load_rows("someone/questions", "test", volume_root=folder)
    assert found.remove_columns("where").to_list() == rows.remove_columns("where").to_list()
    assert found["where"][2] == "someone/questions test row 2"
    with pytest.raises(ValueError, match="split 'test' is for a set with several splits"):
        load_rows(folder / "train.jsonl", "test")


def test_every_source_of_rows_gives_the_same(folder, rows, tmp_path):
    """Files, folders and sets in memory; scans as paths, as a `Nifti` feature, and as bytes within a parquet file."""
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    table = Dataset.from_list(records)
    table.save_to_disk(tmp_path / "saved")
    DatasetDict(test=table, train=table.select([1])).save_to_disk(tmp_path / "splits")
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    known = rows.remove_columns("where").to_list()

    def found(source, split=None):
        return load_rows(source, split, volume_root=folder).remove_columns("where").to_list()

    streamed = table.to_iterable_dataset()
    for source in (tmp_path / "saved", tmp_path / "rows.parquet", tmp_path / "parquet", table, streamed, records):
        assert found(source) == known, source
    mixed = json.loads(json.dumps(records))  # scans within a chat and beside it: Arrow gives each part both keys
    mixed[0]["messages"][0]["content"][0] |= {"path": mixed[0].pop("volumes")[0], "frame": None}
    mixed[1]["volumes"] = [{"path": path, "series": None, "frame": None} for path in mixed[1]["volumes"]]
    assert found(Dataset.from_list([{"volumes": None, **record} for record in mixed])) == known
    assert found(tmp_path / "splits", "test") == known
    assert len(found(tmp_path / "splits")) == 1 and len(found(DatasetDict(train=table), "train")) == 3
    where = load_rows(tmp_path / "rows.parquet", volume_root=folder)["where"]
    assert where[2] == "rows.parquet row 2" and load_rows(table, volume_root=folder)["where"][0] == "row 0"

    absolute = [dict(record, volumes=[str(folder / path) for path in record.get("volumes", [])]) for record in records]
    scans = Features(Dataset.from_list(absolute).features | {"volumes": List(Nifti())})
    nifti = Dataset.from_list(absolute, features=scans)
    assert found(nifti) == known
    content = {path.name: path.read_bytes() for path in (folder / "scans").iterdir()}
    shutil.copytree(folder / "scans", tmp_path / "scans")
    moved = [dict(record, volumes=[path.replace(str(folder), str(tmp_path)) for path in record["volumes"]])
             for record in absolute]  # fmt: skip
    moved = Dataset.from_list(moved, features=scans).with_format("arrow").map(embed_table_storage, batched=True)
    moved.with_format(None).to_parquet(tmp_path / "moved.parquet")  # as push_to_hub stores it
    shutil.rmtree(tmp_path / "scans")
    embedded = load_rows(tmp_path / "moved.parquet", embedded=tmp_path / "embedded")
    for row, record in zip(embedded, records, strict=True):
        paths = [Path(volume["path"]) for volume in row["volumes"]]
        assert {path.parent for path in paths} <= {tmp_path / "embedded"}
        names = [Path(path).name for path in record.get("volumes", [])]
        assert [path.read_bytes() for path in paths] == [content[name] for name in names]
    temporary = load_rows(tmp_path / "moved.parquet")[0]["volumes"][0]["path"]
    assert Path(temporary).is_file() and "photon-scans-" in temporary

    other = {"messages": "question", "volumes": "image"}
    with pytest.raises(RowError, match=r"row 0: 'messages' is null; expected a chat \(the row has image, question\)"):
        load_rows(table.select_columns(["messages", "volumes"]).rename_columns(other))
    faulty = [dict(records[0], messages=[]), records[1]]
    with pytest.raises(RowError, match="(?s)1 faulty rows:.*row 0: 'messages' is empty"):
        load_rows(Dataset.from_list(records[1:2] + records[:1]).map(lambda row: {"messages": []}).select([0]))
    with pytest.raises(RowError, match="row 0: 'messages' is empty"):
        load_rows(faulty)
    with pytest.raises(FileNotFoundError, match="holds no data set: expected what save_to_disk writes"):
        load_rows(folder / "scans")
    with pytest.raises(ValueError, match="no split 'val'; the set has 'test', 'train'"):
        load_rows(tmp_path / "splits", "val")
    (tmp_path / "renamed.jsonl").write_bytes((tmp_path / "rows.parquet").read_bytes())
    with pytest.raises(RowError, match="line 2: not UTF-8"):
        load_rows(tmp_path / "renamed.jsonl")


FAULTS = {
    "the line is empty": "",
    "not JSON": '{"messages": [',
    "not a JSON object": "[1, 2]",
    "not UTF-8": b"\xff",
    "'messages' is null": {"volumes": ["scans/0.nii.gz"]},
    "'messages' is empty": {"messages": []},
    "role is 'doctor'": {"messages": [{"role": "doctor", "content": "?"}]},
    "content part of type 'picture'": {"messages": [{"role": "user", "content": [{"type": "picture"}]}]},
    "without an answer": {"messages": ask("Why?", 0)},
    "and not empty": {"messages": ask("Why?", 0) + say("  ")},
    "1 places for scans in 'messages', but 0 scans": {"messages": ask("Why?") + say("so")},
    "0 places for scans in 'messages', but 1 scans": {"volumes": ["x"], "messages": ask("Why?", 0) + say("so")},
    "two names of one thing": {"volumes": ["x"], "videos": ["y"], "messages": ask("Why?") + say("so")},
    "'volumes' is str": {"volumes": "x", "messages": ask("Why?") + say("so")},
    "'volumes' holds int": {"volumes": [3], "messages": ask("Why?") + say("so")},
    "a scan has the keys": {"volumes": [{"path": "x", "slice": 3}], "messages": ask("Why?") + say("so")},
    "'bytes' is str": {"volumes": [{"path": "x", "bytes": "q"}], "messages": ask("Why?") + say("so")},
    "a scan in a turn of the assistant": {"volumes": ["x"], "messages": ask("Why?", 0) + [
        {"role": "assistant", "content": [{"type": "volume"}, {"type": "text", "text": "so"}]}]},
    "2 'labels' for 1 scans": {"volumes": ["x"], "labels": ["y", "z"], "messages": ask("Why?") + say("so")},
}  # fmt: skip


def test_every_fault_is_named_by_file_and_line(folder):
    path = write_rows(folder / "faulty.jsonl", [json.dumps(ROWS[0]), *FAULTS.values(), json.dumps(ROWS[1])])
    with pytest.raises(RowError) as caught:
        load_rows(path)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{len(FAULTS)} faulty rows")
    for number, (fault, line) in enumerate(zip(FAULTS, lines[1:], strict=True), start=2):
        assert line.strip().startswith(f"faulty.jsonl line {number}:") and fault in line


def test_many_faults_are_counted_and_no_file_is_said(folder):
    path = write_rows(folder / "many.jsonl", ["{"] * 33)
    with pytest.raises(RowError, match="33 faulty rows") as caught:
        load_rows(path)
    assert "and 13 more" in str(caught.value) and len(str(caught.value).splitlines()) == 22
    with pytest.raises(RowError, match="holds no rows"):
        load_rows(write_rows(folder / "none.jsonl", []))
    with pytest.raises(FileNotFoundError, match="absent.jsonl"):
        load_rows(folder / "absent.jsonl")


def test_all_missing_scans_are_listed_without_their_names(folder, rows):
    check_files(rows)
    secret = [dict(ROWS[1], volumes=[f"scans/Smith{i}.nii.gz", "scans/0.nii.gz"]) for i in range(40)]
    found = load_rows(write_rows(folder / "missing.jsonl", [ROWS[0], *secret]))
    with pytest.raises(RowError) as caught:
        check_files(found)
    message = str(caught.value)
    assert message.startswith("40 rows") and "Smith" not in message
    assert all(f"missing.jsonl line {number}: scan 1 of 2 is missing" in message for number in range(2, 42))


def test_only_rows_that_a_loss_teaches_need_label_maps(folder, processor):
    """Scan 0 is asked about twice, and only the second row names evidence: its label map is read all the same."""
    organs = sitk.ReadImage(str(folder / "scans" / "0.nii.gz")) * 0 + 1
    sitk.WriteImage(sitk.Cast(organs, sitk.sitkUInt8), str(folder / "organs.nii.gz"))
    named = {"labels": ["organs.nii.gz"], "evidence": [1]}
    found = load_rows(write_rows(folder / "few.jsonl", [*ROWS, ROWS[0] | named]), columns=EvidenceLoss.columns)
    evidence, tokens = (
        type("Named", (Base,), {"name": None, "weight": "token_label_classes"})(LabelMapArguments(3), None, processor)
        for Base in (EvidenceLoss, LabelMapLoss)
    )
    check_files(found, [evidence])
    with pytest.warns(UserWarning, match="1 of 3 training rows with scans"):
        evidence.check_rows(found)
    with pytest.raises(RowError, match="(?s)2 rows.*line 1: no 'labels'.*line 2: no 'labels'"):
        check_files(found, [evidence, tokens])
    missing = load_rows(write_rows(folder / "absent.jsonl", [ROWS[0] | {"evidence": [1]}]), columns=evidence.columns)
    with pytest.raises(RowError, match="line 1: no 'labels'"):
        check_files(missing, [evidence])
    targets = Collator(processor, 1000, losses=[evidence])(list(found))["targets"]["token_targets"]
    assert [target is None for target in targets] == [False, True, True]
    assert targets[0][:, :, 0].sum(-1).allclose(torch.ones(12, 4)) and targets[0][..., 0, 1].max() > 0.5


def test_lengths_are_those_of_the_batch_and_cut_answers_are_refused(rows, processor):
    lengths = check_rows(rows, processor, 1000)
    batch = Collator(processor, 1000)(list(rows))
    assert lengths == batch["attention_mask"].sum(-1).tolist() and len(set(lengths)) == 3
    limit = sorted(lengths)[1]
    longest = lengths.index(max(lengths))
    with pytest.raises(RowError, match=f"1 rows cannot.*\n.*line {longest + 1}: {max(lengths)} tokens, of which"):
        check_rows(rows, processor, limit)
    with pytest.raises(RowError, match=f"line {longest + 1}: .* nothing is cut"):
        Collator(processor, limit)(list(rows))


def test_a_template_without_marks_is_refused(rows, processor):
    template = processor.chat_template
    try:
        processor.chat_template = template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
        with pytest.raises(RowError, match="line 1: all labels are masked"):
            check_rows(rows, processor, 1000)
        with pytest.raises(RowError, match="line 1: all labels are masked"):
            Collator(processor, 1000)(list(rows))
    finally:
        processor.chat_template = template


# === Batches =========================================================================================================


def test_labels_are_the_assistants_words(rows, processor):
    batch = Collator(processor, 1000)(list(rows))
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["left<|im_end|>", "the second<|im_end|>", "many X-rays<|im_end|>"]
    assert batch["volume_count"].tolist() == [1, 2, 0] and batch["example"].tolist() == [0, 1, 2]
    assert batch["video_grid_thw"].tolist() == [[2, 4, 6]] * 3
    visual = (batch["mm_token_type_ids"] == 2).sum(-1)
    assert visual.tolist() == [12, 24, 0]
    padding = batch["attention_mask"].diff(dim=-1)
    assert (padding >= 0).all() and (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_a_batch_is_its_rows(rows, processor):
    collator = Collator(processor, 1000)
    together = collator(list(rows))
    alone = [collator([row]) for row in rows]
    for row, single in enumerate(alone):
        length = single["input_ids"].shape[1]
        for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
            assert torch.equal(together[name][row, -length:], single[name][0]), name
    assert "pixel_values_videos" not in alone[2]
    patches = torch.cat([single["pixel_values_videos"] for single in alone[:2]])
    assert torch.equal(together["pixel_values_videos"], patches)


def test_several_turns_are_all_learned(folder, processor):
    chat = ask("Where?") + say("left") + [{"role": "user", "content": "And how large?"}] + say("12 mm")
    row = load_rows(write_rows(folder / "turns.jsonl", [dict(ROWS[0], messages=chat)]))[0]
    labels = Collator(processor, 1000)([row])["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "left<|im_end|>12 mm<|im_end|>"
    prompt = Collator(processor, 1000, answers=False)([row])
    text = processor.tokenizer.decode(prompt["input_ids"][0])
    assert text.endswith("And how large?<|im_end|>\n<|im_start|>assistant\n") and "12 mm" not in text
    assert "labels" not in prompt


def test_the_first_epoch_sees_what_the_second_sees(rows, processor, tmp_path):
    plain = Collator(processor, 1000)(list(rows))["pixel_values_videos"]
    collator = Collator(processor, 1000, cache_dir=tmp_path / "cache")
    first, second = (collator(list(rows))["pixel_values_videos"] for _ in range(2))
    assert list((tmp_path / "cache").glob("*.safetensors"))
    assert torch.equal(first, second) and not torch.equal(first, plain)
    torch.testing.assert_close(first, plain, atol=1e-3, rtol=0)
    assert "pixel_values_videos" not in collator([rows[2]])  # text alone, with a cache


def test_an_unreadable_scan_is_named_by_its_row(folder, processor):
    shutil.copy(folder / "train.jsonl", folder / "Smith.nii.gz")
    broken = [ROWS[0], dict(ROWS[0], volumes=["Smith.nii.gz"]), ROWS[2]]
    found = load_rows(write_rows(folder / "broken.jsonl", broken))
    with pytest.raises(RowError, match="^broken.jsonl line 2: ") as caught:
        Collator(processor, 1000)(list(found))
    assert "Smith" not in str(caught.value)


# === Spoilt scans ====================================================================================================


@pytest.fixture
def patches():
    return torch.randn(50, 84, generator=torch.Generator().manual_seed(1))


def spoil(patches, kind, seed=3, **fields):
    rule = SimpleNamespace(robust_patch_drop=0.8, robust_voxel_drop=0.9)
    before = patches.clone()
    out = perturbations.perturb(patches, kind, rule, torch.Generator().manual_seed(seed), **fields)
    assert torch.equal(patches, before) and out.shape == patches.shape and out.dtype == patches.dtype
    assert not torch.equal(out, patches)
    return out


def test_shuffled_patches_are_the_patches(patches):
    out = spoil(patches, perturbations.SHUFFLED_PATCHES)
    assert sorted(out.tolist()) == sorted(patches.tolist())


def test_shuffled_voxels_are_the_voxels(patches):
    out = spoil(patches, perturbations.SHUFFLED_VOXELS)
    assert sorted(out.sort(1).values.tolist()) == sorted(patches.sort(1).values.tolist())
    assert sorted(out.tolist()) != sorted(patches.tolist())
    order = [patch.argsort().tolist() for patch in out]
    assert len(set(map(tuple, order))) == len(order)  # no two patches in the same order


def test_dropped_parts_are_air(patches):
    out = spoil(patches, perturbations.DROPPED_PATCHES, empty=-1.0)
    gone = (out == -1).all(1)
    assert gone.sum() == 40 and torch.equal(out[~gone], patches[~gone])
    out = spoil(patches, perturbations.DROPPED_VOXELS, empty=-1.0)
    gone = out == -1
    assert abs(gone.float().mean() - 0.9) < 0.02 and torch.equal(out[~gone], patches[~gone])
    assert (spoil(patches, perturbations.EMPTY, empty=-1.0) == -1).all()


def test_noise_is_even_between_air_and_the_windows_end(patches):
    out = spoil(patches, perturbations.NOISE, empty=-1.0, full=1.0)
    assert -1 <= out.min() < -0.99 and 0.99 < out.max() <= 1
    assert abs(out.mean()) < 0.03 and abs(out.std() - 3**-0.5) < 0.02
    with pytest.raises(ValueError, match="expected 0 to 5"):
        spoil(patches, 6)


def test_draws_have_the_shares_of_the_config():
    rule = tiny_config(robust_shares=(0.3, 0.1, 0.2, 0.05, 0.15, 0.2), robust_probability=0.25, flip_probability=0.1)
    many = 20_000
    kinds, perturbed = perturbations.draw_rows(rule, 7, 11, range(many), [1] * many, flips=True)
    count = Counter(kinds)
    assert abs(count[Objective.ROBUST] / many - 0.25) < 0.01 and abs(count[Objective.FLIP] / many - 0.1) < 0.01
    shares = Counter(kind for kind in perturbed if kind is not None)
    for kind, share in enumerate(rule.robust_shares):
        assert abs(shares[kind] / count[Objective.ROBUST] - share) < 0.02
    assert all((kind == Objective.ROBUST) == (how is not None) for kind, how in zip(kinds, perturbed, strict=True))
    kinds, _ = perturbations.draw_rows(rule, 7, 11, range(many), [1] * many, flips=False)
    assert Objective.FLIP not in kinds and Counter(kinds)[Objective.ROBUST] == count[Objective.ROBUST]
    kinds, _ = perturbations.draw_rows(rule, 7, 11, range(many), [0] * many, flips=True)
    assert set(kinds) == {Objective.ANSWER}


def test_a_draw_follows_from_seed_step_and_row_alone():
    rule = tiny_config(robust_probability=0.5, flip_probability=0.3)
    draw = perturbations.draw_rows
    whole = draw(rule, 1, 5, list(range(40)), [1] * 40, True)
    parts = [draw(rule, 1, 5, part, [1] * len(part), True) for part in (range(13), range(13, 40))]
    assert whole == tuple(a + b for a, b in zip(*parts, strict=True))
    assert (
        whole != draw(rule, 1, 6, list(range(40)), [1] * 40, True) != draw(rule, 2, 5, list(range(40)), [1] * 40, True)
    )


def test_only_the_robust_rows_scans_are_perturbed():
    grids = torch.tensor([[1, 2, 2], [2, 2, 2], [1, 2, 4], [1, 4, 4]])
    patches = torch.randn(int(grids.prod(-1).sum()), 10)
    rule, perturbed = tiny_config(), [None, perturbations.NOISE, None, perturbations.EMPTY]
    places = torch.arange(4)
    out, index, whole = perturbations.perturb_rows(patches, grids, places, [1, 2, 0, 1], perturbed, rule, [5, 6, 7, 8])
    first, second, third, last = out.split([4, 8, 8, 16])
    assert index.tolist() == [0, 1, 2, 3] and whole == [0]
    assert torch.equal(first, patches[:4]) and (last == 0).all()
    assert not torch.equal(torch.cat([second, third]), patches[4:20]) and not torch.equal(second, third)
    same, index, whole = perturbations.perturb_rows(
        patches, grids, places, [1, 2, 0, 1], [None] * 4, rule, [5, 6, 7, 8]
    )
    assert same is patches and index is places and whole == [0, 1, 2, 3]


def test_a_perturbed_row_gets_a_scan_of_its_own():
    """Rows 0, 1 and 3 show scan A (row 3 beside B), row 2 shows C alone. Rows 1 and 2 are perturbed."""
    patches, rule = torch.randn(4 + 8 + 6, 3), tiny_config()
    grids = torch.tensor([[1, 2, 2], [1, 2, 2], [3, 1, 2], [1, 2, 2], [2, 2, 2]])
    index, count = torch.tensor([0, 0, 2, 0, 1]), [1, 1, 1, 2]
    kinds = [None, perturbations.NOISE, perturbations.EMPTY, None]
    out, index, whole = perturbations.perturb_rows(patches, grids, index, count, kinds, rule, [1, 2, 3, 4], -2.0, 5.0)
    assert whole == [0, 1] and index.tolist() == [0, 2, 3, 0, 1]
    a, b, noise, empty = out.split([4, 8, 4, 6])
    assert torch.equal(a, patches[:4]) and torch.equal(b, patches[4:12]) and (empty == -2).all()
    alone, *_ = perturbations.perturb_rows(
        patches[:4], grids[:1], torch.tensor([0]), [1], [perturbations.NOISE], rule, [2], -2.0, 5.0
    )
    assert torch.equal(noise, alone)  # the same as without sharing


def test_questions_on_one_scan_come_together():
    names = [["a"], ["b"], ["a"], ["a", "b"], [], ["a"], ["b"], ["a"], []]
    rows = {"volumes": [[{"path": name} for name in row] for row in names]}
    sampler, orders = ScanSampler(rows, 3, batch=9, seed=5), []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(9)) and len(sampler) == 9
        place = [order.index(i) for i in (0, 2, 5, 7)]  # four on a: three together and one
        assert any(sorted(place)[k + 2] - sorted(place)[k] == 2 for k in (0, 1))
        assert abs(order.index(1) - order.index(6)) == 1
        orders.append(order)
    assert orders[0] != orders[1] and orders[1] == list(sampler)


def test_a_batch_has_rows_with_equally_many_scans():
    rows = {"volumes": [[{"path": f"{n % 7}{k}"} for k in range(n % 3)] for n in range(50)]}
    order = list(ScanSampler(rows, 2, batch=4, seed=1))
    assert sorted(order) == list(range(50))
    counts = [[len(rows["volumes"][n]) for n in order[i : i + 4]] for i in range(0, 50, 4)]
    whole = sum(sum(n % 3 == kind for n in range(50)) // 4 for kind in range(3))
    assert whole == 12 and all(len(set(batch)) == 1 for batch in counts[:whole])
    assert [batch[0] for batch in counts[:whole]] != sorted(batch[0] for batch in counts[:whole])


def test_a_scan_is_given_once_a_batch(processor, tmp_path):
    for name in ("a", "b"):
        write_scan(tmp_path / f"{name}.nii.gz", seed=ord(name))
    records = [
        {"volumes": [f"{name}.nii.gz" for name in names], "messages": ask("What?", len(names)) + say("left")}
        for names in ("a", "ba", "a")
    ]
    rows = load_rows(write_rows(tmp_path / "rows.jsonl", records))
    batch = Collator(processor, 1000)(list(rows))
    assert batch["volume_index"].tolist() == [0, 1, 0, 0] and batch["video_grid_thw"].shape == (4, 3)
    one, two = (Collator(processor, 1000)([rows[i]])["pixel_values_videos"] for i in (0, 1))
    scan_b, again = two.chunk(2)
    assert torch.equal(batch["pixel_values_videos"], torch.cat([one, scan_b])) and torch.equal(again, one)


# === Token labels ====================================================================================================


def test_token_targets_are_the_shares_of_a_tokens_voxels(processor, tmp_path):
    """On the model's own grid, so that voxels can be counted by hand: one token is 14 x 28 x 28 voxels."""
    geometry = Geometry(GRID[::-1], SPACING[::-1], (0.0, 0.0, 0.0), np.diag([1.0, -1.0, -1.0]).ravel())
    assert geometry.orientation == processor.image_processor.orientation
    organs, lesions = np.zeros(GRID, np.uint8), np.zeros(GRID, np.uint8)
    organs[14:28, 0:28, 56:84] = 2  # depth 1, row 0, column 2: token 8, all of it
    organs[0:7, 42:56, 0:28] = 1  # half of the depth of the lower patches of token 3
    lesions[14:16, 0:28, 56:84] = 5  # 2 of 14 slices of token 8
    scan = np.random.default_rng(0).integers(-1000, 300, GRID).astype(np.int16)
    scan[:20] = -1000  # air, without which values are no HU
    for name, array in (("scan", scan), ("organs", organs), ("lesions", lesions)):
        sitk.WriteImage(geometry.image(array), str(tmp_path / f"{name}.nii.gz"))
    record = {"volumes": ["scan.nii.gz"], "labels": ["organs.nii.gz"], "lesions": ["lesions.nii.gz"],
              "messages": ask("Where?") + say("left")}  # fmt: skip
    row = load_rows(write_rows(tmp_path / "row.jsonl", [record]))[0]
    wanted = torch.zeros(12, 4, 2, 4)
    wanted[:, :, 0, 0] = 1
    wanted[8, :, 0] = torch.tensor([0.0, 0, 1, 0])
    wanted[3, 2:, 0] = torch.tensor([0.5, 0.5, 0, 0])  # the lower two of its four patches
    wanted[8, :, 1, 2] = 2 / 14
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        labels = TokenLabels(processor.image_processor, 4, cache)
        torch.testing.assert_close(labels(row, 0), wanted, atol=1e-3, rtol=0)

    def loss(classes, *cache):
        Loss = type("Loss", (LabelMapLoss,), {"weight": "token_label_classes"})
        return Loss(LabelMapArguments(classes), None, processor, *cache)

    batch = Collator(processor, 1000, tmp_path / "cache", losses=[loss(4, tmp_path / "cache")])([row])
    assert [target.shape for target in batch["targets"]["token_targets"]] == [(12, 4, 2, 4)]
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1  # head and collator share the prepared scan
    with pytest.raises(RowError, match="row.jsonl line 1: a label map holds labels up to 2"):
        Collator(processor, 1000, losses=[loss(2)])([row])


def test_evidence_is_what_a_token_holds_of_the_labels_asked_about():
    generator = torch.Generator().manual_seed(4)
    first, second = torch.zeros(3, 4, 2, 5), torch.zeros(4, 4, 2, 5)
    first[1, 3, 0, 2] = 0.5  # label 2 in one patch of token 1
    first[2, :, 0, 4] = 0.01  # too little of label 4
    second[0, 0, 0, 4] = second[3, 2, 0, 2] = 0.3
    second[1, 0, 1, 2] = 0.3  # lesions do not count by themselves
    keep_prob = torch.rand(4, 7, generator=generator).requires_grad_()
    counts = torch.tensor([7, 3, 4, 0])
    targets = [[first, second], [first], [second], []]
    labels = [[2, 4], [3], [], [2]]
    losses = evidence_losses(keep_prob, counts, targets, labels)
    wanted = torch.tensor([0, 1, 0, 1, 0, 0, 1]).bool()
    p = keep_prob.detach()
    by_hand = (-p[0][wanted].log().mean() - (1 - p[0][~wanted]).log().mean()) / 2
    none_there = -(1 - p[1, :3]).log().mean()
    torch.testing.assert_close(losses.detach(), torch.stack([by_hand, none_there, p.new_zeros(()), p.new_zeros(())]))
    assert evidence_tokens(targets[0], [2, 4]).tolist() == wanted.tolist()
    losses.sum().backward()
    assert (keep_prob.grad[0][wanted] < 0).all() and (keep_prob.grad[0][~wanted] > 0).all()
    assert not keep_prob.grad[1, 3:].any() and not keep_prob.grad[2:].any()


def test_the_token_heads_loss():
    head = TokenHead(6, 2, 3)
    features = torch.randn(7, 6)
    visual = torch.nn.Identity().train()
    visual.forward = lambda x: SimpleNamespace(pooler_output=x)
    head.attach(visual)
    visual(features)
    targets = torch.rand(7, 2, 2, 3)
    targets[:, :, 0] /= targets[:, :, 0].sum(-1, keepdim=True)
    targets[1, :, 0] = torch.tensor([0.99, 0.01, 0.0])  # too little of class 1 to be asked about its lesions
    targets[2:5, :, 1] = 0
    losses = head.losses(targets.split([3, 4]))
    logits = head.linear(features).reshape(7, 2, 2, 3).double()
    wanted = []
    for tokens in (range(3), range(3, 7)):
        organ, lesion = [], []
        for t in tokens:
            for patch in range(2):
                organ.append(
                    -sum(targets[t, patch, 0, c] * torch.log_softmax(logits[t, patch, 0], 0)[c] for c in range(3))
                )
                for c in (1, 2):  # class 0 is background
                    if targets[t, patch, 0, c] > 0.02:
                        p = torch.sigmoid(logits[t, patch, 1, c])
                        lesion.append(-torch.log(p if targets[t, patch, 1, c] > 0.02 else 1 - p))
        wanted.append(sum(organ) / len(organ) + sum(lesion) / len(lesion))
    torch.testing.assert_close(losses.double(), torch.stack(wanted).double())
    visual.eval()
    visual(features)
    assert head.logits == []
