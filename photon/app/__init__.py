"""The app: a page on which a person asks about a scan and sees what the model kept of it.

    python -m photon.app            # http://localhost:7860

`visits.py` holds each visitor's scan in memory, `routes.py` takes uploads and gives voxels, `page.py` is the Gradio
page, `server.py` puts them together. The planes are drawn by `photon/viewer`, the 3D view by NiiVue.
"""
