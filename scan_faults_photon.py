"""What can be wrong with a scan, by code.

One enum for errors, warnings and notes. Where dicom2nifti has a name for a fault, this is its name, so that a log can
be searched for either. `POLICY` gives for each code what is done and why; the README's table is made from it.

Nothing that could identify a patient enters a message: no file or folder name (at most the suffix), no UID, no name,
no date, no value of a DICOM tag except geometry.
"""

import warnings
from dataclasses import dataclass
from enum import Enum


class VolumeFault(str, Enum):
    """Codes of everything the reader of scans refuses, warns of or notes."""

    # The file
    NO_SUCH_FILE = "NO_SUCH_FILE"
    NOT_A_SCAN = "NOT_A_SCAN"
    MISLABELLED_FILE = "MISLABELLED_FILE"
    DAMAGED_FILE = "DAMAGED_FILE"
    HEADER_LIES = "HEADER_LIES"
    TOO_LARGE = "TOO_LARGE"
    PICKLED_ARRAY = "PICKLED_ARRAY"
    EXTERNAL_DATA_FILE = "EXTERNAL_DATA_FILE"
    LINK_LEAVES_FOLDER = "LINK_LEAVES_FOLDER"
    NON_IMAGING_DICOM_FILES = "NON_IMAGING_DICOM_FILES"
    MISSING_DECODER = "MISSING_DECODER"
    # The shape
    NOT_THREE_DIMENSIONAL = "NOT_THREE_DIMENSIONAL"
    SEVERAL_FRAMES = "SEVERAL_FRAMES"
    SEVERAL_SERIES = "SEVERAL_SERIES"
    TOO_FEW_SLICES = "TOO_FEW_SLICES/LOCALIZER"
    NOT_SCALAR = "NOT_SCALAR"
    # The geometry
    NO_GEOMETRY = "NO_GEOMETRY"
    DEGENERATE_AFFINE = "DEGENERATE_AFFINE"
    SHEARED_AFFINE = "SHEARED_AFFINE"
    GANTRY_TILT = "NON_CUBICAL_IMAGE/GANTRY_TILT"
    OBLIQUE = "OBLIQUE"
    ANISOTROPIC_IN_PLANE = "ANISOTROPIC_IN_PLANE"
    QFORM_SFORM_DISAGREE = "QFORM_SFORM_DISAGREE"
    UNIT_NOT_MILLIMETRE = "UNIT_NOT_MILLIMETRE"
    IMAGE_ORIENTATION_INCONSISTENT = "IMAGE_ORIENTATION_INCONSISTENT"
    SLICE_INCREMENT_INCONSISTENT = "SLICE_INCREMENT_INCONSISTENT"
    MISSING_SLICES = "MISSING_SLICES"
    DUPLICATE_SLICES = "DUPLICATE_SLICES"
    INCONSISTENT_SLICES = "INCONSISTENT_SLICES"
    MULTIFRAME = "MULTIFRAME"
    # The intensity
    SLOPE_VARIES = "SLOPE_VARIES"
    MONOCHROME1 = "MONOCHROME1"
    LOSSY_COMPRESSION = "LOSSY_COMPRESSION"
    NON_FINITE = "NON_FINITE"
    CONSTANT_IMAGE = "CONSTANT_IMAGE"
    NOT_HU = "NOT_HU"
    MODALITY_UNKNOWN = "MODALITY_UNKNOWN"
    MODALITY_UNSUPPORTED = "MODALITY_UNSUPPORTED"


class VolumeError(ValueError):
    """A scan that is refused. `fault` is its code; the message gives what was found, what was expected, what to do."""

    def __init__(self, fault: VolumeFault, message: str):
        super().__init__(f"[{fault.value}] {message}")
        self.fault = fault

    def __reduce__(self):  # an exception with two arguments is lost between worker processes otherwise
        return _rebuild, (type(self), self.fault, str(self))


class VolumeWarning(UserWarning):
    """A scan that is read, with a fault that the user should know. `fault` is its code."""

    def __init__(self, fault: VolumeFault, message: str):
        super().__init__(f"[{fault.value}] {message}")
        self.fault = fault

    def __reduce__(self):
        return _rebuild, (type(self), self.fault, str(self))


def _rebuild(kind, fault, text):
    return kind(fault, text.removeprefix(f"[{fault.value}] "))


@dataclass(frozen=True)
class Finding:
    """One finding of a reading: `level` is "note" (right, worth knowing) or "warning"."""

    fault: VolumeFault
    level: str
    message: str


class Findings(list):
    """Collects notes and warnings of one reading; `announce` turns the warnings into Python warnings."""

    def note(self, fault: VolumeFault, message: str) -> None:
        self.append(Finding(fault, "note", message))

    def warn(self, fault: VolumeFault, message: str) -> None:
        self.append(Finding(fault, "warning", message))

    def announce(self) -> None:
        for finding in self:
            if finding.level == "warning":
                warnings.warn(VolumeWarning(finding.fault, finding.message), stacklevel=3)


# What is done about each code, and why. "read" leaves a note in the report of `inspect_volume` and raises nothing.
POLICY: dict[VolumeFault, tuple[str, str]] = {
    VolumeFault.NO_SUCH_FILE: ("refuse", "There is nothing to read."),
    VolumeFault.NOT_A_SCAN: (
        "refuse",
        "The content decides the format, not the suffix, and this content is of no known format.",
    ),
    VolumeFault.MISLABELLED_FILE: ("warn", "The suffix is wrong and the content is clear: the content decides."),
    VolumeFault.DAMAGED_FILE: (
        "refuse",
        "Part of the scan is missing or fails its checksum; half a scan would give another answer.",
    ),
    VolumeFault.HEADER_LIES: (
        "refuse",
        "The header's size does not fit the file; checked before memory is allocated.",
    ),
    VolumeFault.TOO_LARGE: ("refuse", "More voxels than `max_voxels`, known from the header alone."),
    VolumeFault.PICKLED_ARRAY: ("refuse", "A pickle can run any code, and an array alone has no geometry."),
    VolumeFault.EXTERNAL_DATA_FILE: (
        "refuse",
        "A header may name any file of the machine as its voxels; only the file of "
        "the same stem in the same folder is accepted.",
    ),
    VolumeFault.LINK_LEAVES_FOLDER: ("refuse", "A link out of the folder may point to another patient's slice."),
    VolumeFault.NON_IMAGING_DICOM_FILES: (
        "warn",
        "Reports, RT structure sets, text and other files beside the slices are left out and counted by kind. Refused "
        "where there are no slices.",
    ),
    VolumeFault.MISSING_DECODER: (
        "refuse",
        "The transfer syntax or encoding has no decoder here; the message tells what to install or how to convert.",
    ),
    VolumeFault.NOT_THREE_DIMENSIONAL: ("refuse", "A plane or a five-dimensional array is not a scan."),
    VolumeFault.SEVERAL_FRAMES: (
        "refuse",
        "Times, phases, echoes, b-values, kernels or acquisitions: choose one with `frame=`; the message lists them.",
    ),
    VolumeFault.SEVERAL_SERIES: ("refuse", "Choose one with `series=`; the message lists them without patient data."),
    VolumeFault.TOO_FEW_SLICES: (
        "refuse",
        "A localiser or a single slice is no volume. Beside or within a proper series localisers are left out, with a "
        "warning.",
    ),
    VolumeFault.NOT_SCALAR: ("refuse", "Colour, vectors and complex numbers have no HU and no single intensity."),
    VolumeFault.NO_GEOMETRY: ("refuse", "Without spacing and orientation, left and right would be a guess."),
    VolumeFault.DEGENERATE_AFFINE: (
        "refuse",
        "A flat or non-finite affine, or an orientation without perpendicular unit vectors, places no voxel.",
    ),
    VolumeFault.SHEARED_AFFINE: ("warn", 'Resampled through the full affine; refused with `tilt="refuse"`.'),
    VolumeFault.GANTRY_TILT: (
        "warn",
        'Found in the positions, not in the tag; resampled through the full affine, or refused with `tilt="refuse"`.',
    ),
    VolumeFault.OBLIQUE: ("read", "The grid follows the scan's axes; the angle is in the report."),
    VolumeFault.ANISOTROPIC_IN_PLANE: ("read", "Row and column spacing are kept apart."),
    VolumeFault.QFORM_SFORM_DISAGREE: (
        "warn",
        "The sform is used, as nibabel does; the qform where the sform is all zero.",
    ),
    VolumeFault.UNIT_NOT_MILLIMETRE: ("warn", "Metres and micrometres are turned into millimetres."),
    VolumeFault.IMAGE_ORIENTATION_INCONSISTENT: ("refuse", "Slices that are not parallel are not one volume."),
    VolumeFault.SLICE_INCREMENT_INCONSISTENT: (
        "refuse",
        'Above 1 % no regular grid fits (a warning from 0.1 %); `gaps="resample"` makes it regular.',
    ),
    VolumeFault.MISSING_SLICES: (
        "refuse",
        'The message gives the place of the gap; `gaps="interpolate"` fills it, with a warning.',
    ),
    VolumeFault.DUPLICATE_SLICES: (
        "refuse",
        "Two slices in one place; equal files and equal voxels are read once, with a warning.",
    ),
    VolumeFault.INCONSISTENT_SLICES: ("refuse", "Slices of one series differ in size, spacing or kind."),
    VolumeFault.MULTIFRAME: ("read", "Enhanced multi-frame: geometry by frame, from the functional groups."),
    VolumeFault.SLOPE_VARIES: ("read", "Slope and intercept are applied slice by slice."),
    VolumeFault.MONOCHROME1: (
        "refuse",
        "By the standard it changes the display alone, but some writers invert the stored "
        'values: choose with `monochrome1="as_stored"` or `"invert"`.',
    ),
    VolumeFault.LOSSY_COMPRESSION: ("warn", "HU after lossy compression are not the scanner's."),
    VolumeFault.NON_FINITE: (
        "refuse",
        "NaN would pass through every later step; `fill_nonfinite=VALUE` replaces it, with a warning.",
    ),
    VolumeFault.CONSTANT_IMAGE: ("refuse", "One value everywhere is no scan."),
    VolumeFault.NOT_HU: (
        "refuse",
        "Numbers that cannot be HU (8 bits, no air, nothing above water); `assume_hu=True` for a "
        "crop within the body.",
    ),
    VolumeFault.MODALITY_UNKNOWN: (
        "refuse",
        '`modality="auto"` takes the DICOM tag, or CT where the values are surely HU (a peak of air near -1000 on the '
        'faces, soft tissue within). Nothing else is guessed: set "ct" or "mr".',
    ),
    VolumeFault.MODALITY_UNSUPPORTED: (
        "refuse",
        "PET (SUV needs dose, weight and time), ultrasound, doses, masks: no scale "
        "is defined for them. Also where the tag contradicts `modality=`; OT and SC contradict nothing.",
    ),
}


def policy_table() -> str:
    """The table of faults in Markdown, as the README shows it."""
    rows = [f"| `{fault.value}` | {action} | {why} |" for fault, (action, why) in POLICY.items()]
    return "\n".join(["| code | what is done | why |", "|---|---|---|", *rows])
