"""The slice difference of OmniV-Med (arXiv 2504.14692), as its authors' Hulu-Med has it
(github.com/ZJUI-AI4H/Hulu-Med).

Taken: a place stays where its voxels differ from the slice before, in mean absolute value; the first slice stays
whole, and each slice keeps at least one token. No code of OmniV-Med is public, and this follows Hulu-Med's file
`hulumed_arch.py` as described. Different: slices are slabs, as deep as a patch; the threshold (0.1 there) is what
meets the budget; with a budget below a token for each slab, the first slab and the largest changes come first; tokens
keep their positions. Slow changes never exceed a difference from the slice before. It reads no question. Set
`scheduler_layer` to -1.
"""

from photon.schedulers.recorders import VOXELS, record_voxels
from photon.schedulers.rows import RowScheduler, top

CHANGE = 1  # column of "voxels"


class OmniVScheduler(RowScheduler):
    """Keeps the first slab, a token of each slab, and the places whose voxels differ most from the slab before."""

    name = "omniv"
    needs = frozenset({"coordinates"})
    scan_records = VOXELS
    record_scan = staticmethod(record_voxels)

    def choose(self, row, count):
        change = row.more["voxels"][:, CHANGE].clone()  # 1 in a first slab
        slab = row.coordinates[:, 0] * (int(row.coordinates[:, 1].max()) + 1) + row.coordinates[:, 1]
        slabs = slab.unique()
        if count >= len(slabs):
            for number in slabs:
                inside = (slab == number).nonzero()[:, 0]
                change[inside[change[inside].argmax()]] += 2  # above all others
        return top(change, count), None
