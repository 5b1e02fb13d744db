"""From an upload or a sample to a scan that the page can show and ask about, and from a fault to plain sentences."""

import SimpleITK as sitk

from photon.app.visits import ReadScan
from photon.asking import display_window
from photon.phantoms.patient import PhantomConfig, make_patient
from photon.scan_faults_photon import POLICY, VolumeFault
from photon.viewer.packing import PackedScan

SAMPLES = 6  # phantoms to choose from; the tiny model was not trained on patients of this seed
SAMPLE_SEED = 1
SAMPLE_CONFIG = PhantomConfig(
    diameters=(20.0, 28.0, 35.0, 42.0), contrast=(140.0, 210.0), ground_glass=0.0, follow_up=0.0, limited_fov=0.0
)
NEXT_STEPS = {  # what a person does on the page, where the reader's message names an argument
    VolumeFault.MODALITY_UNKNOWN: "Choose CT or MR under “Kind of scan” and press “Read again”.",
    VolumeFault.MODALITY_UNSUPPORTED: "If the header is wrong, choose CT or MR under “Kind of scan”.",
    VolumeFault.NOT_HU: "If it is an MR scan, choose MR under “Kind of scan” and press “Read again”.",
    VolumeFault.SEVERAL_SERIES: "Write the number of one series into “Series” and press “Read again”.",
    VolumeFault.SEVERAL_FRAMES: "Write the number of one frame into “Frame” and press “Read again”.",
}


def read_scan(engine, image, findings=(), modality="auto"):
    """A SimpleITK image as a `ReadScan`. Raises `VolumeError` where the model cannot take it."""
    fields = {} if modality == "auto" else {"modality": modality}
    encoded = engine.encode(engine.read(image, **fields))
    window, ct = display_window(engine.processor, image, modality)
    facts = {
        "kind": "CT" if ct else "MR",
        "size": list(image.GetSize()),
        "spacing": [round(mm, 2) for mm in image.GetSpacing()],
        "notes": [finding.message for finding in findings],
        "tokens": int(encoded.encoded[0].pooler_output[0].shape[0]),
    }
    return ReadScan(image, encoded, PackedScan(image, window, ct), facts)


def sample(number):
    """A synthetic CT as a SimpleITK image, and which organs hold a lesion. number: 0 to `SAMPLES` - 1."""
    image, _, _, facts = make_patient(SAMPLE_SEED, number % SAMPLES, config=SAMPLE_CONFIG)
    return image, sorted({lesion["organ"] for lesion in facts["lesions"]})


def plain_fault(error):
    """What is wrong with a refused scan and what to do, as a dict for the page: code, message, step."""
    step = NEXT_STEPS.get(error.fault, POLICY[error.fault][1])
    return {"code": error.fault.value, "message": str(error).partition("] ")[2], "step": step}


def nifti_bytes(image, folder):
    """A SimpleITK image as the bytes of a .nii.gz file; folder: where it is written for a moment."""
    file = folder / "image.nii.gz"
    sitk.WriteImage(image, str(file), useCompression=True)
    try:
        return file.read_bytes()
    finally:
        file.unlink()


def small_image(image, most=160):
    """The image with at most `most` voxels an axis, for a 3D view; without the metadata of a scan."""
    steps = [max(1, -(-n // most)) for n in image.GetSize()]
    thin = sitk.Cast(image, sitk.sitkFloat32)[tuple(slice(None, None, step) for step in steps)]
    for key in thin.GetMetaDataKeys():
        thin.EraseMetaData(key)
    return thin
