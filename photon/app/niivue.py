"""Where NiiVue's bundle lies: the 3D view's library, BSD-2-Clause, installed from its package registry."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
PLACES = (HERE / "niivue.js", HERE / "node_modules" / "@niivue" / "niivue" / "dist" / "index.js")  # in a Space; here


def niivue_bundle():
    """The file of NiiVue's bundle, `None` where it is not installed."""
    return next((file for file in PLACES if file.is_file()), None)
