"""A scan and what was kept of it, in a browser: three linked planes, as one file without network or inside the app.

`viewer.js` and `viewer.css` draw; `packing.py` makes what they take of a scan; `export.py` writes one HTML file.
"""
