"""The bridge from tools to the flat files at the repository's root.

What ships with a checkpoint lies flat at the root, because the loader behind `trust_remote_code=True` resolves
siblings only. Tools lie in folders here. Both are one package:

    from photon.modeling_photon import PhotonForConditionalGeneration     # the file at the root
    from photon.training.trainer import PhotonTrainer                     # a tool

`photon.loading` loads checkpoints, and makes the Auto classes return these very classes.
"""

from pathlib import Path

from photon.torchvision_pair import check_torchvision

__path__.append(str(Path(__file__).resolve().parent.parent))
check_torchvision()  # before anything imports transformers
