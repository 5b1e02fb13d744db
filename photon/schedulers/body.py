"""Random tokens within the body: a control that knows only where the patient is."""

import torch

from photon.schedulers.random import RandomScheduler
from photon.schedulers.recorders import VOXELS, record_voxels

AIR = 0.05  # of the way from the scan's least voxel to its greatest: a token with a lower mean is air


class BodyScheduler(RandomScheduler):
    """Keeps random tokens of the body, and tokens of air once there are no others.

    Body is every token whose mean voxel lies above `AIR`, lungs included where the window does not cut them to air.
    """

    name = "body"
    scan_records = VOXELS
    record_scan = staticmethod(record_voxels)

    def score(self, inputs):
        body = inputs.more["voxels"][..., 0] > AIR
        return super().score(inputs) + body.to(torch.float32)  # a draw is below 1
