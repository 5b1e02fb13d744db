"""One HTML file with a scan, its questions and what was kept; it scrolls through all slices and needs no network."""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOTICE = "Not a medical device. For research; outlines show what the model kept, not why it answered."
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>Photon: what was kept</title>
<style>{css}</style>
</head>
<body class="pv-page">
<p class="pv-notice">{notice}</p>
<main id="viewer"></main>
<script>{js}</script>
<script type="application/json" id="data">{data}</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const viewer = new PhotonViewer(document.getElementById("viewer"));
const second = data.questions.length > 1 ? 1 : null;
viewer.load(data.scan).then(() => viewer.setQuestions(data.questions, 0, second));
</script>
</body>
</html>
"""


def html_page(scan, questions):
    """The page as text. scan, questions: as `PackedScan.scan` and `PackedScan.question` give them."""
    data = json.dumps({"scan": scan, "questions": questions}).replace("<", "\\u003c")  # a question is no markup
    css, js = ((HERE / name).read_text("utf-8") for name in ("viewer.css", "viewer.js"))
    return PAGE.format(css=css, js=js, data=data, notice=NOTICE)
