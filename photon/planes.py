"""Which three planes of a scan a picture shows: those that meet where most was kept of what the question is about.

    at, reason = choose_planes(scan, kept, "Is there a lesion in the right lung?", ct=True)

What the question is about is read from its words, as far as voxels can tell: a side, lung, bone. The reason is one
sentence for a caption.
"""

import re

import numpy as np

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None

SIDES = ("right", "left")
TISSUES = {  # name: words of a question, HU of the tissue, (low, high) HU drawn black and white
    "lung": ({"lung", "lungs", "pulmonary", "emphysema", "lobe"}, (-980, -500), (-1350.0, 150.0)),
    "bone": ({"bone", "bones", "rib", "ribs", "spine", "vertebra", "vertebrae"}, (200, 4000), (-500.0, 1300.0)),
}
SMOOTHING = 15.0  # mm: a crowd of kept voxels counts, a single one does not
LATTICE = 128  # at most so many voxels an axis are looked at


def choose_planes(scan, kept=None, question="", ct=False):
    """The voxel (x, y, z) in LPS order where the three planes meet, and a sentence that says why there.

    Args:
        scan: 3D SimpleITK image of any orientation.
        kept: image on the same voxels, nonzero where kept; `None`, empty or full where nothing was chosen.
        question: its words "right", "left", "lung", "bone", ... narrow the choice.
        ct: whether values are HU; only then tissues are told apart.
    """
    scan = sitk.DICOMOrient(scan, "LPS")
    steps = [max(1, -(-n // LATTICE)) for n in scan.GetSize()]
    small = scan[tuple(slice(None, None, step) for step in steps)]
    body = body_mask(small)
    chosen, where = body, "the body"
    if kept is not None:
        voxels = sitk.GetArrayFromImage(sitk.DICOMOrient(kept, "LPS"))[
            tuple(slice(None, None, s) for s in steps[::-1])
        ]
        crossed = (voxels > 0) & body
        if crossed.any() and not crossed[body].all():
            chosen, where = crossed, "what was kept"
    for part, name in parts_of_question(question, sitk.GetArrayViewFromImage(small), body, ct):
        if (chosen & part).any():
            chosen, where = chosen & part, f"{where} {name}"
        else:
            where = f"{where} (nothing of it {name})"
    weight = sitk.GetImageFromArray(chosen.astype(np.float32))
    weight.SetSpacing(small.GetSpacing())
    if min(weight.GetSize()) >= 4:  # what the filter asks for
        weight = sitk.SmoothingRecursiveGaussian(weight, SMOOTHING)
    crowd = np.where(chosen, sitk.GetArrayFromImage(weight), -np.inf)
    z, y, x = np.unravel_index(crowd.argmax(), crowd.shape)
    at = [min(int(i) * step, n - 1) for i, step, n in zip((x, y, z), steps, scan.GetSize(), strict=True)]
    return tuple(at), f"planes through the middle of {where}"


def body_mask(image):
    """(z, y, x) bool of an LPS image: the largest bright part with the air that it encloses, slice by slice."""
    bright = sitk.OtsuThreshold(image, 0, 1)
    largest = sitk.RelabelComponent(sitk.ConnectedComponent(bright), sortByObjectSize=True) == 1
    mask = np.empty(image.GetSize()[::-1], bool)
    for z in range(image.GetSize()[2]):
        mask[z] = sitk.GetArrayViewFromImage(sitk.BinaryFillhole(largest[:, :, z], fullyConnected=False)) > 0
    return mask if mask.any() else np.ones_like(mask)


def parts_of_question(question, values, body, ct):
    """What the words of a question name: pairs of a mask (z, y, x) and of words for a caption."""
    named = [side for side in SIDES if side in words_of(question)]
    parts = []
    if len(named) == 1:
        middle = np.average(np.arange(body.shape[2]), weights=body.sum((0, 1)))
        right = np.arange(body.shape[2]) < middle  # x grows to the patient's left
        parts.append((np.broadcast_to(right if named == ["right"] else ~right, body.shape), f"on the {named[0]} side"))
    for tissue in tissues_of(question) if ct else ():
        low, high = TISSUES[tissue][1]
        parts.append(((values >= low) & (values <= high) & body, f"in {tissue} tissue"))
    return parts


def question_window(question, ct):
    """(low, high) in HU that shows the tissue which a question names; `None` where it names none or several."""
    tissues = tissues_of(question) if ct else []
    return TISSUES[tissues[0]][2] if len(tissues) == 1 else None


def tissues_of(question):
    """Names of `TISSUES` that a question's words name."""
    return [tissue for tissue, (names, *_) in TISSUES.items() if names & words_of(question)]


def words_of(question):
    """The words of a question in lower case."""
    return set(re.findall(r"[a-z]+", question.lower()))
