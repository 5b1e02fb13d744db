"""Show what works: a CT file and a DICOM folder are read, asked about, and drawn.

    python scripts/demo.py [--output DIR]

Uses the real scans in $PHOTON_TEST_DATA (default: ../shared/data beside the repository) where they are; else a
phantom, written as NIfTI and as a DICOM series.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

import SimpleITK as sitk

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ask  # noqa: E402
import phantoms  # noqa: E402

DATA = Path(os.environ.get("PHOTON_TEST_DATA", ROOT.parent / "shared" / "data"))
QUESTIONS = ["Is there a lesion in the liver?", "On which side is the kidney with a lesion?"]


def write_dicom(image, folder):
    """A CT as a DICOM series of one file a slice, without a patient. Takes a SimpleITK image of integers."""
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


def scans(output):
    """Name and path of a file and of a folder to show."""
    if (DATA / "example_ct.nii.gz").is_file() and (DATA / "ct_dicom").is_dir():
        return {"real CT (NIfTI)": DATA / "example_ct.nii.gz", "real CT (DICOM folder)": DATA / "ct_dicom"}
    image, *_ = phantoms.make_patient(seed=0)
    sitk.WriteImage(image, str(output / "phantom.nii.gz"), useCompression=True)
    write_dicom(image, output / "phantom_dicom")
    return {"phantom (NIfTI)": output / "phantom.nii.gz", "phantom (DICOM folder)": output / "phantom_dicom"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo", help="folder for pictures and maps")
    output = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("default")
    processor, model = ask.load(ROOT)
    for number, (name, path) in enumerate(scans(output).items(), start=1):
        print(f"\n{name}")
        for question in QUESTIONS:
            result, inputs, keep = ask.ask(processor, model, [path], question)
            print(f"  {question}\n    {ask.described(result)}".replace("\n", "\n    "))
        sitk.WriteImage(processor.keep_map(keep, inputs), str(output / f"kept_{number}.nii.gz"), useCompression=True)
        caption = ask.caption(question, result)
        ask.outlined(processor, inputs, keep, [{"volume": path}], output / f"overlay_{number}.png", caption)
    print(
        f"\nPictures and maps of the kept tokens are in {output.name}/. The model at this root is tiny; its answers "
        "are no medical ones."
    )


if __name__ == "__main__":
    main()
