"""PhotonProcessor: prompts and scans together, the conventions of processors, and the way back to the scan."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from datasets import Dataset
from transformers import AutoProcessor

from conftest import ROOT, real
from photon.processing_photon import PhotonVolumeProcessor
from photon.scan_reader_photon import read_volume

SIZE = (37, 29, 23)  # x, y, z


@pytest.fixture(scope="module")
def processor():
    fields = {"grid": [70, 140, 140], "spacing": [5.2, 2.6, 2.6], "patch_size": 14, "window": [-1000.0, 1000.0]}
    return AutoProcessor.from_pretrained(ROOT, trust_remote_code=True, **fields)  # 5 x 5 x 5 tokens


def scan(seed=0, size=SIZE, spacing=(5.1, 6.3, 7.7), direction=None):
    """A random CT-like SimpleITK image, oblique unless told."""
    rng = np.random.default_rng(seed)
    array = rng.integers(-1000, 300, size[::-1]).astype(np.int16)
    array[0] = -1000  # air, without which values are no HU
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin((-31.0, 17.0, 240.0))
    if direction is None:
        turn = sitk.Euler3DTransform()
        turn.SetRotation(0.1, -0.15, 0.2)
        direction = turn.GetMatrix()
    image.SetDirection(direction)
    return image


def test_one_identity_and_fields_for_one_call_through_the_auto_class():
    """The Auto classes return the repository's classes, and fields given for one call reach them."""
    image_processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True).image_processor
    assert type(image_processor) is PhotonVolumeProcessor
    image = scan(4)
    small = {"grid": [28, 56, 84], "spacing": [9.0, 4.0, 3.0]}
    ct, mr = (image_processor([image], modality=modality, **small) for modality in ("ct", "mr"))
    expected, *_ = PhotonVolumeProcessor(**(image_processor.settings | small | {"modality": "mr"})).read(image)
    np.testing.assert_array_equal(mr["pixel_values_videos"], patches_of(expected, mr["video_grid_thw"][0]))
    assert np.abs(ct["pixel_values_videos"] - mr["pixel_values_videos"]).max() > 1e-3
    assert image_processor.modality == "auto"


def patches_of(array, grid_thw):
    """(D, H, W) cut by plain loops into patches, 2 x 2 of a token together."""
    side = array.shape[0] // grid_thw[0]
    t, h, w = grid_thw
    return np.array([
        array[k * side : (k + 1) * side, j * side : (j + 1) * side, i * side : (i + 1) * side].ravel()
        for k in range(t) for jj in range(h // 2) for ii in range(w // 2)
        for j in (2 * jj, 2 * jj + 1) for i in (2 * ii, 2 * ii + 1)
    ])  # fmt: skip


def chat(*volumes, text="Is there a lesion in the liver?", answer=None):
    parts = [{"type": "volume", "volume": volume} for volume in volumes]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def encode(processor, conversations, **kwargs):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(conversations, **(options | kwargs))


def test_a_batch_of_unlike_rows(processor):
    one, two = scan(1), scan(2, size=(20, 31, 44))
    rows = [chat(one), chat(one, two, text="Has the lesion grown since Scan 1?"), chat(text="What is a CT?")]
    inputs = encode(processor, rows, processor_kwargs={"padding": True})
    assert inputs["video_grid_thw"].tolist() == [[5, 10, 10]] * 3
    assert inputs["pixel_values_videos"].shape == (3 * 500, 14**3)
    seen = (inputs["input_ids"] == processor.video_token_id).sum(-1)
    assert seen.tolist() == [125, 250, 0]
    assert torch.equal(inputs["mm_token_type_ids"] == 2, inputs["input_ids"] == processor.video_token_id)
    assert [len(row) for row in inputs.scans] == [1, 2, 0]
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()  # padded on the left
    for i, row in enumerate(rows):
        alone = encode(processor, row)
        length = alone["input_ids"].shape[1]
        assert torch.equal(inputs["input_ids"][i, -length:], alone["input_ids"][0])
    texts = processor.batch_decode(inputs["input_ids"])
    assert "Scan 1: " in texts[1] and "Scan 2: " in texts[1] and "Scan 1" not in texts[0]


def test_every_way_to_name_a_scan(processor, tmp_path):
    image = scan(3)
    sitk.WriteImage(image, tmp_path / "scan.nii.gz")
    parts = [
        {"type": "volume", "path": str(tmp_path / "scan.nii.gz")},
        {"type": "volume", "volume": tmp_path / "scan.nii.gz"},
        {"type": "volume", "volume": image},
    ]
    tensors = [
        encode(processor, [{"role": "user", "content": [part, {"type": "text", "text": "Where?"}]}]) for part in parts
    ]
    for other in tensors[1:]:
        torch.testing.assert_close(other["pixel_values_videos"], tensors[0]["pixel_values_videos"], atol=1e-4, rtol=0)
    prompt = processor.apply_chat_template(chat(image, text="Where?"), add_generation_prompt=True)
    direct = processor(text=prompt, volumes=image, return_tensors="pt")
    for key, value in tensors[2].items():
        assert torch.equal(direct[key], value), key


def test_none_is_an_absent_key_everywhere_in_a_chat(processor, tmp_path):
    """A chat that went through `datasets.Dataset`: Arrow gives every part every key, `None` where it had none."""
    sitk.WriteImage(scan(1), str(tmp_path / "a.nii.gz"))
    first = {"type": "volume", "path": str(tmp_path / "a.nii.gz")}
    part = {"type": "volume", "path": str(tmp_path / "a.nii.gz"), "frame": 0}
    text = {"type": "text", "text": "Is it larger?"}
    rows = [
        [
            {"role": "user", "content": [*parts, text]},
            {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        ]
        for parts in ([first, part], [part])
    ]
    through = [row["messages"] for row in Dataset.from_list([{"messages": row} for row in rows])]
    assert through[0][0]["content"][0] == {"type": "volume", "path": first["path"], "frame": None, "text": None}
    plain, arrow = encode(processor, rows, padding=True), encode(processor, through, padding=True)
    assert plain.keys() == arrow.keys()
    for name in plain:
        assert torch.equal(plain[name], arrow[name]), name
    volumes = [{"path": None, "volume": scan(1), "series": None, "frame": None}]
    direct = processor.image_processor(volumes, return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(direct, processor.image_processor([scan(1)], return_tensors="pt")["pixel_values_videos"])
    both = [[{"role": "user", "content": [part, text]}] for part in (first, first | {"frame": None, "text": None})]
    shared = encode(processor, both, processor_kwargs={"padding": True, "share_volumes": True})
    assert shared["volume_index"].tolist() == [0, 0] and len(shared["pixel_values_videos"]) == 500
    place = [{"role": "user", "content": [{"type": "volume", "path": None, "text": None}, text]}]
    encoded = encode(processor, place, processor_kwargs={"video_grid_thw": shared["video_grid_thw"][:1]})
    assert torch.equal(encoded["input_ids"], encode(processor, both[0])["input_ids"])
    question = [{"role": "user", "content": [text]}]
    for empty in (None, [], [{"type": "text", "text": None}]):
        turns = [*question, {"role": "assistant", "content": empty}]
        for template in (processor, processor.tokenizer):
            prompt = template.apply_chat_template(turns, chat_template=processor.chat_template, tokenize=False)
            assert prompt.endswith("assistant\n<|im_end|>\n")
        ids = encode(processor, turns, add_generation_prompt=False)["input_ids"][0]
        assert processor.tokenizer.decode(ids).endswith("assistant\n<|im_end|>\n")
    with pytest.raises(ValueError, match="A volume is"):
        processor.image_processor([{"path": None, "volume": None}])


def test_return_tensors(processor):
    for kind, expected in (("np", np.ndarray), ("pt", torch.Tensor)):
        inputs = encode(processor, chat(scan()), return_tensors=kind)
        assert {type(value) for value in inputs.values()} == {expected}
    assert isinstance(encode(processor, chat(scan()), return_tensors=None)["input_ids"][0], list)
    assert set(inputs) == set(processor.model_input_names)
    alone = processor(volumes=scan())
    assert set(alone) == {"pixel_values_videos", "video_grid_thw"}


def test_assistant_masks_mark_the_answer(processor):
    inputs = encode(
        processor, chat(scan(), answer="no"), add_generation_prompt=False, return_assistant_tokens_mask=True
    )
    marked = inputs["input_ids"][0][torch.as_tensor(inputs["assistant_masks"])[0].bool()]
    assert processor.decode(marked) == "no<|im_end|>"


def test_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path / "a")
    again = AutoProcessor.from_pretrained(tmp_path / "a", trust_remote_code=True)
    again.save_pretrained(tmp_path / "b")
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    first, second = (encode(p, chat(scan())) for p in (processor, again))
    assert torch.equal(first["pixel_values_videos"], second["pixel_values_videos"])
    changed = AutoProcessor.from_pretrained(tmp_path / "a", trust_remote_code=True, scaling="minmax", std=0.25)
    assert (changed.image_processor.scaling, changed.image_processor.std) == ("minmax", 0.25)


def test_scaling_fields():
    image = scan(4)
    volume_class = PhotonVolumeProcessor
    grid = {"grid": (28, 56, 84), "spacing": (6.0, 4.0, 2.0)}
    plain, *_ = volume_class(**grid).read(image)
    assert plain.shape == (28, 56, 84) and plain.min() >= 0 and plain.max() <= 1
    centred, *_ = volume_class(**grid, mean=0.5, std=0.25).read(image)
    np.testing.assert_allclose(centred, (plain - 0.5) / 0.25, atol=1e-6)
    narrow, *_ = volume_class(**grid, window=(-200, 100)).read(image)
    inside = (plain * 2000 - 1000 > -200) & (plain * 2000 - 1000 < 100)
    assert np.unique(narrow[~inside]).size > 1 and narrow.min() == 0 and narrow.max() == 1
    stretched, *_ = volume_class(**grid, window=(-1000, 3000), scaling="minmax").read(image)
    assert stretched.min() == 0 and stretched.max() == 1


def test_fields_for_one_call(processor):
    image = scan(4)
    prompt = processor.apply_chat_template(chat(image), add_generation_prompt=True)
    plain = processor(text=prompt, volumes=image)
    other = processor(text=prompt, volumes=image, grid=[28, 56, 84], spacing=[9.0, 4.0, 3.0], mean=0.0)
    assert other["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert np.array(other["input_ids"]).shape[1] == np.array(plain["input_ids"]).shape[1] - 125 + 12
    assert other["pixel_values_videos"].min() == 0 and processor.image_processor.grid == [70, 140, 140]
    by_template = encode(processor, chat(image), processor_kwargs={"modality": "mr"})
    assert not torch.equal(by_template["pixel_values_videos"], torch.as_tensor(plain["pixel_values_videos"]))


@pytest.mark.parametrize("fields", [
    {"grid": (100, 280, 280)}, {"grid": (140, 266, 280)}, {"grid": (140, 280)}, {"grid": (0, 280, 280)},
    {"scaling": "zscore"}, {"std": 0},
])  # fmt: skip
def test_wrong_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        PhotonVolumeProcessor(**fields)


def test_marks_and_scans_must_match(processor):
    image = scan()
    one = "<|vision_start|><|video_pad|><|vision_end|>Where?"
    for text, volumes in ((one, None), (one, [image, image]), ("Where?", image), ([one, one], [[image, image], []])):
        with pytest.raises(ValueError, match="placeholders"):
            processor(text=text, volumes=volumes)
    assert processor(text=[one, one], volumes=[image, image])["video_grid_thw"].shape == (2, 3)
    for part in (
        {"type": "volume"},
        {"type": "volume", "path": "a", "volume": image},
        {"type": "volume", "file": "a"},
    ):
        with pytest.raises(ValueError, match='"path": FILE_OR_FOLDER'):
            encode(processor, [{"role": "user", "content": [part, {"type": "text", "text": "Where?"}]}])
    with pytest.raises(ValueError, match="reads volumes"):
        processor(text="a", images=[image])
    with pytest.raises(ValueError, match="text, volumes or both"):
        processor()


# --- the way back


def test_keep_map_lies_on_the_scan(processor):
    """Each scan voxel's world point is looked up in the model's grid by hand; its token says kept or not."""
    images = [scan(5), scan(6, size=(44, 25, 31), spacing=(4.0, 5.5, 6.5))]
    inputs = encode(processor, [chat(images[0]), chat(*images)], processor_kwargs={"padding": True})
    keep = torch.rand(2, 250, generator=torch.Generator().manual_seed(0)) < 0.4
    for row, volume, image in ((0, 0, images[0]), (1, 0, images[0]), (1, 1, images[1])):
        kept = processor.keep_map(keep, inputs, row, volume)
        for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(kept, name)() == pytest.approx(getattr(image, name)())
        got = sitk.GetArrayFromImage(kept)
        tokens = keep[row, 125 * volume : 125 * (volume + 1)].reshape(5, 5, 5).numpy()
        x, y, z = np.meshgrid(*(np.arange(n) for n in image.GetSize()), indexing="ij")
        axes = np.array(image.GetDirection()).reshape(3, 3)
        spacing = np.array(image.GetSpacing())
        offset = np.stack([x, y, z], -1) - (np.array(image.GetSize()) - 1) / 2  # voxels from the centre of the scan
        # LAI: columns grow to the left (+x), rows to anterior (-y), slabs to inferior (-z); 36.4 and 72.8 mm a token
        along = offset * spacing * np.sign(np.diag(axes)) * [1, -1, -1]
        place = along / [72.8, 72.8, 72.8] + 2.5
        inside = ((place >= 0) & (place < 5)).all(-1)
        index = np.clip(np.floor(place), 0, 4).astype(int)
        expected = tokens[index[..., 2], index[..., 1], index[..., 0]] & inside
        edge = (np.abs(place - np.round(place)) < 0.02).any(-1)
        assert (expected == got.transpose(2, 1, 0).astype(bool))[~edge].all()
        assert 0.2 < got.mean() < 0.6


def test_keep_map_refuses_what_does_not_belong(processor):
    inputs = encode(processor, chat(scan()))
    keep = torch.ones(1, 125, dtype=torch.bool)
    with pytest.raises(ValueError, match="no geometry"):
        processor.keep_map(keep, dict(inputs))
    with pytest.raises(ValueError, match="no scan 1 in row 0"):
        processor.keep_map(keep, inputs, volume=1)
    with pytest.raises(ValueError, match="no scan 0 in row 3"):
        processor.keep_map(keep, inputs, row=3)
    with pytest.raises(ValueError, match="124 places"):
        processor.keep_map(keep[:, 1:], inputs)
    assert sitk.GetArrayFromImage(processor.keep_map(keep, inputs)).all()


def test_geometry_survives_a_move(processor):
    inputs = encode(processor, chat(scan())).to("cpu", torch.bfloat16)
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16 and len(inputs.scans[0]) == 1
    json.dumps(inputs.scans)


def test_a_bright_corner_lands_where_the_orientation_says(processor):
    """A hot block in the patient's right-anterior-superior corner: first column, last row, first slab in LAI."""
    array = np.full((40, 50, 60), -1000, dtype=np.int16)  # z, y, x in LPS: right is low x, anterior low y
    array[-8:, :10, :12] = 900
    array[5:20, 20:40, 20:50] = -50  # soft tissue, without which values are no HU
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((6.0, 7.0, 8.0))
    stored = sitk.DICOMOrient(image, "SRP")  # another order and other directions on disk
    for source in (image, stored):
        seen, *_ = processor.image_processor.read(source)
        z, y, x = np.unravel_index(np.where(seen > 0.5, 1, 0).argmax(), seen.shape)
        bright = np.argwhere(seen > 0.5)
        centre = bright.mean(0) / np.array(seen.shape)
        assert centre[0] < 0.5 < centre[1] and centre[2] < 0.5, centre
    a, b = (processor.image_processor.read(source)[0] for source in (image, stored))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_real_dicom_folder_equals_its_nifti(processor, tmp_path):
    folder = real("ct_dicom")
    series = read_volume(folder)
    sitk.WriteImage(series, tmp_path / "scan.nii.gz")
    a, b = (
        processor.image_processor([source])["pixel_values_videos"] for source in (folder, tmp_path / "scan.nii.gz")
    )
    assert a.std() > 0.1
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_one_resampling_agrees_with_the_release_two(capsys):
    """Orient to RAI, 1 mm, crop or pad to 364^3, clip, resize, flip: on a real CT the two ways differ by what a second
    interpolation blurs."""
    image = sitk.ReadImage(str(real("example_ct.nii.gz")))
    oriented = sitk.DICOMOrient(sitk.Cast(image, sitk.sitkFloat32), "RAI")
    centre = oriented.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in oriented.GetSize()])
    axes = np.array(oriented.GetDirection()).reshape(3, 3)
    origin = np.array(centre) - axes @ np.full(3, 363 / 2)
    cube = sitk.Resample(
        oriented, (364,) * 3, sitk.Transform(), sitk.sitkLinear, origin.tolist(), (1.0,) * 3, oriented.GetDirection(),
        -1000.0,
    )  # fmt: skip
    array = torch.from_numpy(sitk.GetArrayFromImage(cube)).clamp(-1000, 1000)
    two = torch.nn.functional.interpolate(array[None, None], size=(140, 280, 280), mode="trilinear")[0, 0].flip(-1)
    one, *_ = PhotonVolumeProcessor().read(image)
    one = torch.from_numpy(one) * 2000 - 1000
    body = (one > -500) & (two > -500)
    error = (one - two).abs()
    with capsys.disabled():
        print(f"\n  one against two resamplings: {error[body].mean():.1f} HU in the body, {error.mean():.1f} overall")
    assert error[body].mean() < 15 and error.mean() < 5
    assert (one.flip(-1) - two).abs()[body].mean() > 100  # a wrong flip would be seen


def test_text_before_scans_and_text_alone(processor, tmp_path):
    """With the answer's mask and a folder for scans, as training asks, whatever row comes first."""
    options = {"add_generation_prompt": False, "return_assistant_tokens_mask": True}
    options["processor_kwargs"] = {"padding": True, "cache_dir": str(tmp_path)}
    for rows in (
        [chat(text="What is a CT?", answer="a scan"), chat(scan(), answer="no")],
        [chat(text="a", answer="b")],
    ):
        inputs = encode(processor, rows, **options)
        assert torch.as_tensor(inputs["assistant_masks"]).any(-1).all()
        assert ("pixel_values_videos" in inputs) == (len(rows) == 2)
