"""The folder of a Hugging Face Space: the page of `python -m photon.app`, with its model and NiiVue beside it."""

import shutil
from pathlib import Path

from photon.app.niivue import niivue_bundle
from photon.loading import ROOT
from photon.publishing.folder import SETTINGS, WEIGHTS, code_files

PACKAGES = ("app", "serving", "viewer", "phantoms", "evaluation", "schedulers")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "node_modules", "package*.json")


def build_space(output):
    """Writes the folder of a Space with the tiny model. Returns it.

    Raises: `ValueError` where NiiVue is not installed, which a Space cannot fetch by itself.
    """
    bundle, output = niivue_bundle(), Path(output)
    if bundle is None:
        raise ValueError("NiiVue is not installed: npm ci --prefix photon/app --ignore-scripts")
    output.mkdir(parents=True)
    names = [*SETTINGS, *WEIGHTS, "LICENSE", "NOTICE"]
    for file in sorted({*code_files(), *(file for name in names for file in ROOT.glob(name))}):
        shutil.copy(file, output / file.name)
    (output / "photon").mkdir()
    for file in (ROOT / "photon").glob("*.py"):
        shutil.copy(file, output / "photon" / file.name)
    for name in PACKAGES:
        shutil.copytree(ROOT / "photon" / name, output / "photon" / name, ignore=LEFT_OUT)
    shutil.copy(bundle, output / "photon" / "app" / "niivue.js")
    (output / "space").mkdir()
    shutil.copy(ROOT / "space" / "app.py", output / "space" / "app.py")
    shutil.copy(ROOT / "space" / "README.md", output / "README.md")
    lines = []
    for name in ("requirements.txt", "requirements-app.txt"):
        lines += [
            line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("-r ")
        ]
    (output / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return output
