"""From scans and a conversation to the model's inputs, and from kept tokens back to the scan.

- `PhotonVolumeProcessor`: a scan to patches of 14 x 14 x 14 voxels on the model's grid;
- `PhotonProcessor`: that, a tokenizer and a chat template. A content part `{"type": "volume", "path": ...}` is a
  NIfTI, NRRD or MetaImage file or a DICOM folder; `{"type": "volume", "volume": ...}` an object in memory. Reading
  options (`READ_OPTIONS`: series, frame, modality, gaps, ...) may stand beside either.
Volumes travel under the names of Qwen's videos (`pixel_values_videos`, `video_grid_thw`), which generation knows how
to encode once, expand for beams and drop after the prompt.
"""

from dataclasses import asdict
from os import PathLike
from typing import TypedDict

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin

from .scan_grid_photon import Geometry, resample
from .scan_reader_photon import read_on_grid
from .scan_store_photon import VolumeStore

READ_OPTIONS = (
    "series", "frame", "modality", "assume_hu", "gaps", "tilt", "monochrome1", "fill_nonfinite", "max_voxels",
)  # fmt: skip


class PhotonVolumeKwargs(TypedDict, total=False):
    """Fields that `from_pretrained` may override by name."""

    grid: list | tuple
    spacing: list | tuple
    orientation: str
    modality: str
    window: list | tuple
    percentiles: list | tuple
    scaling: str
    mean: float | int
    std: float | int
    tilt: str
    gaps: str
    monochrome1: str
    fill_nonfinite: float | int | None
    assume_hu: bool
    max_voxels: int
    patch_size: int
    merge_size: int


class PhotonVolumeProcessor(ImageProcessingMixin):
    r"""
    Reads a scan and resamples it once, from the scan's voxels to the model's grid.

    Args:
        grid (`list[int]`): depth, height, width in voxels. Depth a multiple of `patch_size`, height and width of
            `patch_size * merge_size`.
        spacing (`list[float]`): mm between voxels along depth, height, width. The default covers 364 mm each way.
        orientation (`str`): where the grid's width, height and depth indices grow to, as SimpleITK's DICOMOrient
            names it. `"LAI"` is the release's RAI with its last axis flipped.
        modality (`str`): `"auto"`, `"ct"` or `"mr"`. `"auto"` takes the DICOM modality, or CT where the values are
            HU, and refuses a scan where neither decides.
        window (`list[float]`): HU that become 0 and 1 in CT; outside the scan is its lower end, air.
        percentiles (`list[float]`): of the voxels that are not 0, those that become 0 and 1 in MR.
        scaling (`str`): `"window"`, or `"minmax"` over each volume after clipping, as the release does.
        mean, std (`float`): subtracted from and divided by after scaling to [0, 1].
        patch_size, merge_size (`int`): voxels a patch each way; patches a token along height and width.
        tilt, gaps, monochrome1, fill_nonfinite, assume_hu, max_voxels: how faulty scans are read; see `ReadOptions`
            and `find_modality`.
    """

    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    valid_kwargs = PhotonVolumeKwargs

    def __init__(
        self,
        grid=(140, 280, 280),
        spacing=(2.6, 1.3, 1.3),
        orientation="LAI",
        modality="auto",
        window=(-1000.0, 1000.0),
        percentiles=(0.5, 99.5),
        scaling="window",
        mean=0.0,
        std=1.0,
        patch_size=14,
        merge_size=2,
        tilt="resample",
        gaps="refuse",
        monochrome1="refuse",
        fill_nonfinite=None,
        assume_hu=False,
        max_voxels=2**31,
        **kwargs,
    ):
        super().__init__(**kwargs)
        block = (patch_size, patch_size * merge_size, patch_size * merge_size)
        if len(grid) != 3 or any(n <= 0 or n % b for n, b in zip(grid, block, strict=True)):
            raise ValueError(
                f"grid is {list(grid)}; expected depth, height, width in voxels, multiples of {block[0]}, {block[1]}, "
                f"{block[2]}."
            )
        if scaling not in ("window", "minmax"):
            raise ValueError(f"scaling is {scaling!r}; expected 'window' or 'minmax'.")
        if not std > 0:
            raise ValueError(f"std is {std}; expected a number above 0.")
        self.grid, self.spacing, self.orientation = list(grid), list(spacing), orientation
        self.modality, self.window, self.percentiles = modality, list(window), list(percentiles)
        self.scaling, self.mean, self.std = scaling, mean, std
        self.patch_size, self.merge_size = patch_size, merge_size
        self.tilt, self.gaps, self.monochrome1 = tilt, gaps, monochrome1
        self.fill_nonfinite, self.assume_hu, self.max_voxels = fill_nonfinite, assume_hu, max_voxels

    @property
    def settings(self):
        """All that decides what the model sees of a scan, beside the scan."""
        return {name: getattr(self, name) for name in PhotonVolumeKwargs.__annotations__}

    @property
    def grid_thw(self):
        """Patches along depth, height, width."""
        return [n // self.patch_size for n in self.grid]

    def read(self, source, **options):
        """One scan, anything that `read_volume` takes. options: `READ_OPTIONS`, in place of this processor's fields.

        Returns: float32 (depth, height, width) as the model sees it, the scan's `Geometry`, the grid's `Geometry`.
        """
        names = ["spacing", "orientation", "window", "percentiles", "scaling", *READ_OPTIONS]
        held = {name: getattr(self, name) for name in names if hasattr(self, name)}
        array, scan, grid = read_on_grid(source, size=self.grid, **(held | options))
        return (array - self.mean) / self.std, scan, grid

    def patchify(self, array):
        """(D, H, W) -> (patches, patch_size^3), in the order of Qwen's videos: (t, h/2, w/2, 2, 2) patches of
        (depth, height, width)."""
        t, h, w = self.grid_thw
        p, m = self.patch_size, self.merge_size
        array = array.reshape(t, p, h // m, m, p, w // m, m, p)
        return np.ascontiguousarray(array.transpose(0, 2, 5, 3, 6, 1, 4, 7)).reshape(t * h * w, p**3)

    def prepare(self, volume, store=None):
        """One scan, or a dict of it with reading options, to patches (N, patch_size^3) and geometry; with a
        `VolumeStore`, read from it or written to it."""
        source, options = source_and_options(volume)
        key = None if store is None else store.key(source, options)
        found = None if key is None else store.load(key)
        if found is not None:
            return found
        array, scan, grid = self.read(source, **options)
        patches = self.patchify(array)
        geometry = {"scan": asdict(scan), "grid": asdict(grid), "grid_thw": self.grid_thw}
        if key is not None:
            patches = store.save(key, patches, geometry)
        return patches, geometry

    def __call__(self, volumes, return_tensors=None, cache_dir=None, **fields):
        """
        Args:
            volumes: list of scans, or of dicts of a scan under "path" or "volume" with reading options.
            cache_dir: folder where scans that come as files are kept preprocessed, in float16.
            fields: fields of this processor that differ in this call.
        Returns: `pixel_values_videos` (patches of all scans, patch_size^3) float32, `video_grid_thw` (scans, 3), and
            `scans`, a list of the geometries: {"scan": ..., "grid": ..., "grid_thw": ...}.
        """
        processor = type(self)(**(self.settings | fields)) if fields else self
        store = None if cache_dir is None else VolumeStore(cache_dir, processor.settings)
        patches, scans = zip(*(processor.prepare(volume, store) for volume in volumes), strict=True)
        scans = list(scans)
        data = {
            "pixel_values_videos": np.concatenate(patches),
            "video_grid_thw": np.array([scan["grid_thw"] for scan in scans]),
            "scans": scans,
        }
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["scans"])


def source_and_options(volume):
    """A scan and its reading options, from a content part or from the scan itself."""
    if not isinstance(volume, dict):
        return volume, {}
    volume = {key: value for key, value in volume.items() if value is not None}  # Arrow fills absent keys so
    named = [key for key in ("path", "volume") if key in volume]
    unknown = set(volume) - {"type", "path", "volume", *READ_OPTIONS}
    if len(named) != 1 or unknown:
        raise ValueError(
            'A volume is {"type": "volume", "path": FILE_OR_FOLDER} or {"type": "volume", "volume": OBJECT}, with '
            f"reading options ({', '.join(READ_OPTIONS)}) beside it if need be; got the keys {sorted(volume)}."
        )
    return volume[named[0]], {key: volume[key] for key in READ_OPTIONS if key in volume}


class PhotonProcessor(ProcessorMixin):
    r"""
    Conversations about volumes to model inputs: `input_ids`, `attention_mask`, `mm_token_type_ids`,
    `pixel_values_videos`, `video_grid_thw`. The geometry of each scan stays with the result, as `.scans`.

    Args:
        image_processor (`PhotonVolumeProcessor`): in this slot because it is the one that transformers saves and loads
            for processors of any kind.
        tokenizer: of Qwen2.5-VL, or one with the same special tokens.
    """

    return_mm_token_type_ids = True
    skip_tensor_conversion = ["scans", "text_replacement_offsets"]

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.video_token = "<|video_pad|>"
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # the parent asks AutoImageProcessor, which would load this module a second time
        volumes = PhotonVolumeProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return [volumes, cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)]

    @property
    def video_processor(self):
        """Volumes go the way of videos; `ProcessorMixin` asks for this name."""
        return self.image_processor

    @property
    def model_input_names(self):
        return super().model_input_names + ["mm_token_type_ids"]

    def __call__(self, images=None, text=None, videos=None, audio=None, volumes=None, **kwargs):
        """
        Args:
            text (`str` or `list[str]`): prompts with one `<|video_pad|>` a scan, as the chat template makes them.
            volumes: one scan, a list of scans for all prompts in turn, or a list of lists, one a prompt. A scan is
                anything that `read_volume` takes, or a dict of it with reading options.
            kwargs: those of the tokenizer; fields of the volume processor for this call, such as `modality="mr"`; and
                `cache_dir`, a folder where scans that come as files are kept preprocessed; `share_volumes=True`
                reads a scan that stands in several prompts once, and adds `volume_index` (see `PhotonModel.forward`);
                `video_grid_thw` (scans, 3), grids of scans that were encoded before: the prompts get their tokens, and
                no scan is read. In a conversation `{"type": "volume"}` stands for each.
        Returns: `BatchFeature` with an attribute `scans`, a list of geometries for each prompt.
        Raises: `ValueError` where scans and placeholders do not match, `VolumeError` where a scan cannot be read.
        """
        if images is not None or videos is not None or audio is not None:
            raise ValueError("Photon reads volumes: pass volumes=..., or {'type': 'volume', ...} in a conversation.")
        if (grids := kwargs.pop("video_grid_thw", None)) is not None:
            return self._about_encoded(text, grids, volumes, **kwargs)
        rows = None if volumes is None else _rows(volumes)
        flat = [volume for row in rows or () for volume in row]
        texts = [text] if isinstance(text, str) else text
        if texts is not None:
            counts = [prompt.count(self.video_token) for prompt in texts]
            if rows is not None and len(rows) == 1 and len(texts) > 1:  # a flat list: dealt out in turn
                ends = np.cumsum(counts)
                rows = [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]
                rows[-1] += flat[ends[-1] :]
            given = [0] * len(texts) if rows is None else [len(row) for row in rows]
            if counts != given:
                raise ValueError(
                    f"The prompts have {counts} volume placeholders ({self.video_token}), but {given} volumes were "
                    "passed. Every scan needs one placeholder in its prompt; the chat template writes them."
                )
        fields = {name: kwargs.pop(name) for name in PhotonVolumeKwargs.__annotations__ if name in kwargs}
        cache_dir = kwargs.pop("cache_dir", None)
        distinct, index = distinct_volumes(flat) if kwargs.pop("share_volumes", False) else (flat, None)
        processed = self.image_processor(distinct, cache_dir=cache_dir, **fields) if flat else None
        if processed is not None and index is not None:
            processed["volume_index"] = np.array(index)
            processed["video_grid_thw"] = processed["video_grid_thw"][index]
            processed["scans"] = [processed["scans"][i] for i in index]
        out = super().__call__(text=text, videos=processed, **kwargs)
        scans = iter(out.pop("scans", ()))
        out.scans = [[next(scans) for _ in row] for row in rows or [[] for _ in texts]]
        return out

    def _about_encoded(self, text, grids, volumes, **kwargs):
        """Prompts about scans that were encoded before; grids (scans, 3)."""
        places = sum(prompt.count(self.video_token) for prompt in ([text] if isinstance(text, str) else text))
        if places != len(grids) or any(volume for row in _rows(volumes or []) for volume in row):
            raise ValueError(
                f"The prompts have {places} volume placeholders ({self.video_token}), and video_grid_thw has "
                f"{len(grids)} rows; expected as many, and no scans beside it."
            )
        return super().__call__(text=text, videos={"video_grid_thw": np.asarray(grids)}, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if text is None and videos is None:
            raise ValueError("Pass text, volumes or both.")

    def _process_videos(self, videos, **kwargs):
        counts = videos["video_grid_thw"].prod(-1) // self.image_processor.merge_size**2
        return videos, [self.video_token * int(count) for count in counts]

    def _multimodal_inputs_from_conversations(self, conversations, *args, **kwargs):
        images, videos, audios, extra = super()._multimodal_inputs_from_conversations(conversations, *args, **kwargs)
        rows = [
            [
                {key: value for key, value in part.items() if key != "type" and value is not None}
                for message in conversation
                if not isinstance(message.get("content"), str)
                for part in message.get("content") or ()
                if part["type"] == "volume"
            ]
            for conversation in conversations
        ]
        return images, videos, audios, extra | ({"volumes": rows} if any(rows) else {})

    def keep_map(self, keep_mask, inputs, row=0, volume=0):
        """SimpleITK image (uint8, 1 kept) on the scan's voxels: which parts of the scan the model kept.

        Args:
            keep_mask: (B, V) of the model's output.
            inputs: what this processor returned for the same prompts.
            row, volume: which prompt, and which of its scans.
        Raises: `ValueError` where mask and inputs do not belong together.
        """
        scans = getattr(inputs, "scans", None)
        if scans is None:
            raise ValueError(
                "inputs carry no geometry (.scans). Pass the BatchFeature that the processor returned, not a plain "
                "dict made from it."
            )
        if not (0 <= row < len(scans) and 0 <= volume < len(scans[row])):
            raise ValueError(f"There is no scan {volume} in row {row}; rows have {[len(s) for s in scans]} scans.")
        shapes = [self._tokens_thw(scan) for scan in scans[row]]
        ends = np.cumsum([np.prod(shape) for shape in shapes])
        mask = np.asarray(keep_mask[row].cpu() if hasattr(keep_mask, "cpu") else keep_mask[row], dtype=bool)
        if len(mask) < ends[-1]:
            raise ValueError(f"keep_mask has {len(mask)} places a row, but row {row} has {ends[-1]} visual tokens.")
        shape = shapes[volume]
        tokens = mask[ends[volume] - np.prod(shape) : ends[volume]].reshape(shape).astype(np.uint8)  # (t, h/2, w/2)
        scan = scans[row][volume]
        token_grid = coarser(Geometry(**scan["grid"]), self._block)
        return resample(token_grid.image(tokens), Geometry(**scan["scan"]), outside=0, nearest=True)

    @property
    def _block(self):
        """Voxels of a token along depth, height, width."""
        p, m = self.image_processor.patch_size, self.image_processor.merge_size
        return p, p * m, p * m

    def _tokens_thw(self, scan):
        t, h, w = scan["grid_thw"]
        m = self.image_processor.merge_size
        return t, h // m, w // m


def coarser(grid, block):
    """The grid of blocks of (D, H, W) = `block` voxels of a grid."""
    step = np.array(block[::-1])  # x, y, z
    spacing = np.array(grid.spacing)
    origin = np.array(grid.origin) + grid.axes @ (spacing * (step - 1) / 2)  # centre of the first block
    return Geometry(np.array(grid.size) // step, spacing * step, origin, grid.direction)


def scan_name(value):
    """What is equal for scans that need be read only once: paths and reading options as texts, objects by identity."""
    if isinstance(value, dict):
        return tuple(sorted((key, scan_name(item)) for key, item in value.items()))
    if isinstance(value, list):
        return tuple(map(scan_name, value))
    if isinstance(value, str | int | PathLike):
        return type(value).__name__, str(value)
    return id(value)


def distinct_volumes(volumes):
    """Volumes without repetition, and each one's place among them."""
    places = {}
    index = [places.setdefault(scan_name(volume), len(places)) for volume in volumes]
    return [volumes[index.index(i)] for i in range(len(places))], index


def _rows(volumes):
    """One scan, a list of scans, or a list of lists -> a list of lists. A tuple is one scan: (array, affine)."""
    if not isinstance(volumes, list):
        return [[volumes]]
    return volumes if volumes and all(isinstance(row, list) for row in volumes) else [volumes]


__all__ = ["PhotonProcessor", "PhotonVolumeProcessor"]
