"""What a training step need not hold, and what an epoch need not compute again.

- `save_memory`: the vision tower and its merger make their activations again on the way back, and the tower takes
  some patches at a time;
- `FeatureCache`: the output of a frozen vision tower on disk (`--cache-features`), by scan and weights.
"""

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed._composable import checkpoint

from photon.prefix_photon import digest_of, digest_of_weights
from photon.processing_photon import source_and_options
from photon.prompt_photon import PhotonVisionOutput, grid_coordinates, scan_features
from photon.scan_store_photon import VolumeStore
from photon.whole_file import whole_file


def save_memory(model, args):
    """Sets a model up for training by the arguments `vision_checkpointing` and `vision_patches`.

    Parts of the patches give the same gradients, because the tower attends within one depth slab. Sharded weights are
    gathered once a part, and ranks with unlike many parts would wait for each other for ever: with FSDP and DeepSpeed
    the tower takes all patches at once.
    """
    photon = plain_model(model)
    if args.vision_checkpointing and not args.gradient_checkpointing:
        photon.visual.activation_checkpointing_enable({"use_reentrant": False})
    if args.vision_checkpointing:  # which transformers leaves out; four tensors of the size of all patches
        checkpoint(photon.visual.merger, preserve_rng_state=False)
    if not args.fsdp and args.deepspeed is None:
        photon.patches_at_once = args.vision_patches or None


def plain_model(model):
    """The `PhotonModel` within a model with a head, and within adapters."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def within_tower(scheduler):
    """Names of what a scheduler, or its class, needs of each token beside the vision tower's output and its place."""
    return sorted({*scan_features(scheduler)} - {"coordinates"})


class FeatureCache:
    """A folder with the vision tower's output of each scan, in the type in which the tower computes it.

    The name of an entry is a digest of the scan's content, of the processor's settings and of the tower's weights, so
    that another tower, window or scan finds nothing here. Entries hold patient data as scans do.

    Args: folder; processor; model, whose tower must not train.
    Raises: `ValueError` where the tower trains, or the scheduler needs what happens within it.
    """

    def __init__(self, folder, processor, model):
        photon = plain_model(model)
        if any(parameter.requires_grad for parameter in photon.visual.parameters()):
            raise ValueError(
                "--cache-features keeps the vision tower's output, but the tower trains. Freeze it with --parts "
                "decoder scheduler, or leave --cache-features out."
            )
        if within := within_tower(photon.language_model.scheduler):
            raise ValueError(
                "--cache-features keeps the vision tower's output alone, but the scheduler needs more of it: "
                f"{', '.join(within)}. Leave --cache-features out."
            )
        settings = {"processor": processor.image_processor.settings}
        settings["tower"] = digest_of(photon.config.vision_config.to_dict(), *digest_of_weights(photon.visual))
        self.store = VolumeStore(folder, settings)

    def load(self, volume):
        """(key, tokens (V, D), grid (3,)) of a scan as the processor takes it; tokens and grid `None` where it is not
        here yet, and the key for scans that are not files."""
        key = self.store.key(*source_and_options(volume))
        try:
            with safe_open(self._file(key), "pt") as entry:
                return key, entry.get_tensor("tokens"), entry.get_tensor("grid")
        except (FileNotFoundError, SafetensorError):
            return key, None, None

    def save(self, key, tokens, grid):
        if key is not None:
            with whole_file(self._file(key)) as partial:
                save_file({"tokens": tokens.detach().cpu().contiguous(), "grid": grid.cpu()}, partial)

    def _file(self, key):
        return self.store.folder / f"{key}.safetensors"

    def encoded(self, model, inputs):
        """The model's arguments with encoded scans in place of patches; those that were not on disk are kept there.

        Args: inputs: of a `Collator` with this cache.
        """
        photon, inputs, features = plain_model(model), dict(inputs), inputs["features"]
        tokens, grids = list(features["tokens"]), features["grids"]
        missing = [number for number, known in enumerate(tokens) if known is None]
        if missing:
            with torch.no_grad():
                output = photon.get_video_features(inputs.pop("pixel_values_videos"), grids[missing])
            for number, new in zip(missing, output.pooler_output, strict=True):
                tokens[number] = new
                self.save(features["keys"][number], new, grids[number])
        del inputs["features"]
        places = inputs["volume_index"].tolist()
        encoded = PhotonVisionOutput(pooler_output=[tokens[number] for number in places])
        if needed := scan_features(photon.language_model.scheduler):  # coordinates, which follow from the grid
            coordinates = [grid_coordinates(grid, photon.visual.spatial_merge_size) for grid in grids]
            encoded.deepstack_features = [[coordinates[number] for number in places]]
            encoded.feature_names = needed
        return inputs | {"mm_encoder_outputs": {"video": encoded}}
