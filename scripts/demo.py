"""Reads a CT file and a DICOM folder, asks questions about them, and draws what was kept.

    python scripts/demo.py [--output DIR]

The CT is a phantom on which the tiny model was not trained, written as NIfTI and as a DICOM series; the right answers
stand beside the model's. Real scans are added where $PHOTON_TEST_DATA (default: ../shared/data) has them.
"""

import argparse
import locale
import os
import sys
import textwrap
import warnings
from pathlib import Path

import SimpleITK as sitk

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from photon import overlay  # noqa: E402
from photon.asking import ask, describe, picture_rows, shown_scans  # noqa: E402
from photon.loading import load  # noqa: E402
from photon.phantoms.patient import PhantomConfig, make_patient  # noqa: E402

DATA = Path(os.environ.get("PHOTON_TEST_DATA", ROOT.parent / "shared" / "data"))
SEED, PATIENT = 1, 3  # the model was trained on patients of seed 0
CONFIG = PhantomConfig(diameters=(20.0, 28.0, 35.0, 42.0), contrast=(140.0, 210.0), ground_glass=0.0)
PHANTOM = {"NIfTI": "phantom.nii.gz", "DICOM folder": "phantom_dicom"}
ORGANS = ("liver", "spleen", "left kidney", "right lung")


def write_dicom(image, folder):
    """Write a CT (a SimpleITK image of integers) as a DICOM series of one file a slice, without patient data."""
    folder.mkdir(parents=True, exist_ok=True)
    image = sitk.Cast(sitk.DICOMOrient(image, "LPS"), sitk.sitkInt16)
    direction = image.GetDirection()
    series = {
        "0008|0060": "CT",
        "0020|000d": "1.2.826.0.1.3680043.8.498.1",
        "0020|000e": "1.2.826.0.1.3680043.8.498.2",
        "0020|0037": "\\".join(f"{direction[i]:.6f}" for i in (0, 3, 6, 1, 4, 7)),
        "0028|1052": "0",
        "0028|1053": "1",
    }
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    before = locale.setlocale(locale.LC_ALL)
    for index in range(image.GetSize()[2]):
        plane = image[:, :, index]
        position = image.TransformIndexToPhysicalPoint((0, 0, index))
        place = {
            "0008|0018": f"1.2.826.0.1.3680043.8.498.3.{index + 1}",
            "0020|0013": str(index + 1),
            "0020|0032": "\\".join(f"{value:.4f}" for value in position),
            "0018|0050": f"{image.GetSpacing()[2]:.4f}",
        }
        for tag, value in (series | place).items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{index:04d}.dcm"))
        writer.Execute(plane)
    locale.setlocale(locale.LC_ALL, before)  # GDCM leaves "C", with which Python reads text files as ASCII


def scans(output):
    """A list of (name, path, organs with a lesion); the organs are `None` where the scan is not a phantom.

    Writes the phantom's files into the folder `output`.
    """
    image, _, _, facts = make_patient(SEED, PATIENT, config=CONFIG)
    sitk.WriteImage(image, str(output / PHANTOM["NIfTI"]), useCompression=True)
    write_dicom(image, output / PHANTOM["DICOM folder"])
    truth = {lesion["organ"] for lesion in facts["lesions"]}
    listed = [(f"phantom ({kind})", output / name, truth) for kind, name in PHANTOM.items()]
    for name, path in (("real CT (NIfTI)", DATA / "example_ct.nii.gz"), ("real CT (DICOM)", DATA / "ct_dicom")):
        if path.exists():
            listed.append((f"{name}; the model has learnt phantoms only, so these answers mean nothing", path, None))
    return listed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo", help="folder for scans, pictures and maps")
    output = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("default")
    processor, model = load(ROOT)
    for number, (name, path, truth) in enumerate(scans(output), start=1):
        print(f"\n{name}")
        for organ in ORGANS:
            question = f"Is there a lesion in the {organ}?"
            answer = result, inputs, keep_mask = ask(processor, model, [path], question)
            right = "" if truth is None else f" (right: {'yes' if organ in truth else 'no'})"
            print(textwrap.indent(f"{question}{right}\n{textwrap.indent(describe(result), '  ')}", "  "))
        kept = processor.keep_map(keep_mask, inputs)
        sitk.WriteImage(kept, str(output / f"kept_{number}.nii.gz"), useCompression=True)
        for shown in shown_scans(processor, [path], [answer]):
            rows = picture_rows(shown, [question], [result])
            overlay.draw_rows(rows, output / f"overlay_{number}.png", shown.window)
    print(
        f"\nScans, pictures and maps of the kept tokens are in {output.name}/. The model at this root is tiny and has "
        "learnt phantoms only; about a patient its answers mean nothing."
    )


if __name__ == "__main__":
    main()
