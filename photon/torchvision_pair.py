"""Finds a torchvision that does not belong to the installed torch, and says which one does.

transformers imports torchvision where it is installed. One of another release or another build breaks that import, and
the message then names neither: "operator torchvision::nms does not exist", "Could not import module 'AutoProcessor'".
"""

import importlib.metadata as metadata
import re


def check_torchvision():
    """Raises `ImportError` with the command to run, where an installed torchvision cannot be imported with torch."""
    try:
        torchvision, torch = metadata.version("torchvision"), metadata.version("torch")
    except metadata.PackageNotFoundError:
        return
    needed = _needed_torch()
    if needed == torch.partition("+")[0] and _build(torchvision) == _build(torch):
        return  # as released together; no need to import it
    try:
        import torchvision as _  # noqa: F401
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        wanted = "" if needed is None else f" (it needs torch {needed})"
        raise ImportError(
            f"torchvision {torchvision} does not belong to torch {torch}{wanted}, and breaks transformers. Remove it "
            f"(pip uninstall torchvision), or install the one of torch {torch}: {_command(torch)}"
        ) from error


def _needed_torch():
    """The version in torchvision's own requirement of torch, or `None`."""
    for requirement in metadata.requires("torchvision") or ():
        if found := re.match(r"torch\s*\(?==\s*([\d.]+)", requirement):
            return found[1]
    return None


def _build(version):
    return version.partition("+")[2]  # cpu, cu126, ...; empty on PyPI


def _command(torch):
    release, _, build = torch.partition("+")
    major, minor = (int(part) for part in release.split(".")[:2])
    command = f"pip install torchvision==0.{minor + 15}.*" if major == 2 else "pip install -U torchvision"
    return f"{command} --index-url https://download.pytorch.org/whl/{build}" if build else command
