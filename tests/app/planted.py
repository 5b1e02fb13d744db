"""A zipped CT series full of a patient's tags, whose words must be nowhere else."""

import io
import zipfile

import numpy as np
import SimpleITK as sitk

from photon.app.scans import sample
from scan_writers import write_series

SECRETS = ["Zzyzx", "MRN55173", "19470229", "8.7.6543210", "Quandary", "Saint-Nowhere"]


def plant(ds):
    """Fills a dataset with tags of a patient."""
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Zzyzx^Quandary", "MRN55173", "19470229"
    ds.StudyDate = ds.AcquisitionDate = "19470229"
    ds.InstitutionName, ds.StudyDescription, ds.SeriesDescription = "Saint-Nowhere", "Quandary of Zzyzx", "Zzyzx"
    ds.SeriesInstanceUID = ds.SeriesInstanceUID.replace("1.2.", "8.7.6543210.")
    block = ds.private_block(0x0011, "Quandary", create=True)
    block.add_new(0x01, "LO", "Zzyzx MRN55173")


def planted_series(folder, sound=True):
    """The bytes of the archive; a series that is not sound lacks slices, and is refused."""

    def edit(ds, k):
        plant(ds)
        return None if sound else k not in (3, 4, 5, 9)

    voxels = sitk.GetArrayFromImage(sample(0)[0])[20:44].astype(np.int16)
    series = write_series(folder, edit, voxels, prefix="Zzyzx_", spacing=(4.6, 4.6), step=5.0)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(series.iterdir()):
            archive.write(file, f"MRN55173/{file.name}")
    return packed.getvalue()


def secrets_in(*texts):
    """Which of the planted words are in the texts or bytes, in any case."""
    joined = "\n".join(text.decode("latin-1") if isinstance(text, bytes) else text for text in texts).lower()
    return [secret for secret in SECRETS if secret.lower() in joined]
