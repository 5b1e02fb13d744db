"""Records of an audit -> counts, the refused scans, distributions and thumbnails; without patient data."""

import base64
import html
import io
from collections import Counter
from datetime import date

import numpy as np

from photon.whole_file import whole_file

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

SHOWN = 400  # thumbnails of a page, evenly from all
ADVICE = 1000  # refused scans that are listed
PAGE = """<!doctype html><meta charset="utf-8"><title>Scans of a data set</title>
<style>body{{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}table{{border-collapse:collapse}}
td,th{{border:1px solid #bbb;padding:.2em .6em;text-align:left;vertical-align:top}}
.sheet{{display:flex;flex-wrap:wrap;gap:4px}}figure{{margin:0}}figcaption{{font-size:11px}}</style>
<h1>Scans of a data set</h1><p>{date}. {summary}</p>
<h2>By code</h2>{counts}<h2>Refused</h2>{refused}<h2>Distributions</h2>{distributions}<h2>What the model sees</h2>
<p>Axial and coronal middle plane of {shown} of {read} scans.</p><div class="sheet">{thumbnails}</div>
"""


def counts_by_code(records):
    """{"read": n, "refused": n, "died": n} and {code: n} of refusals and of warnings."""
    status = Counter(record["status"] for record in records)
    refused = Counter(record["fault"] or "OPTIONS" for record in records if record["status"] != "read")
    warned = Counter(code for record in records if record["status"] == "read" for code in record["warnings"])
    return status, refused, warned


def text_of(records, total):
    """The end of a run, for a terminal: counts, one line for each refused scan, distributions."""
    status, refused, warned = counts_by_code(records)
    lines = [_summary(status, total)]
    lines += [f"  {number:6d}  {code}" for code, number in refused.most_common()]
    lines += [f"  {number:6d}  {code} (read, with a warning)" for code, number in warned.most_common()]
    away = [record for record in records if record["status"] != "read"]
    lines += [f"{record['id']}  {record['fault'] or 'OPTIONS'}  {record['message']}" for record in away[:ADVICE]]
    lines += [f"... and {len(away) - ADVICE} more" if len(away) > ADVICE else ""]
    for name, values in distributions(records).items():
        low, middle, high = np.percentile(values, (5, 50, 95))
        lines.append(f"{name}: {low:.4g} to {high:.4g} (5 to 95 %), median {middle:.4g}")
    return "\n".join(line for line in lines if line)


def _summary(status, total):
    left = total - status.total()
    text = f"{total} scans: {status['read']} read, {status['refused']} refused, {status['died']} killed their worker"
    return text + (f", {left} not read yet" if left else "")


def distributions(records):
    """{name: values} of the scans that were read."""
    read = [record for record in records if record["status"] == "read"]
    if not read:
        return {}
    spacing, extent = (np.array([record[name] for record in read]) for name in ("spacing", "extent"))
    return {
        "spacing in plane (mm)": spacing[:, 0],
        "spacing between slices (mm)": spacing[:, 2],
        "extent in plane (mm)": extent[:, 0],
        "extent along the slices (mm)": extent[:, 2],
        "share at or below the window": np.array([record["dark"] for record in read]),
        "share at or above the window": np.array([record["bright"] for record in read]),
        "mean within the window": np.array([record["mean"] for record in read]),
    }


def write_page(audit, file):
    """Writes the report of an `Audit` as one HTML file that needs no network."""
    records, total = audit.records(), len(audit.scans)
    status, refused, warned = counts_by_code(records)
    rows = [(code, number, "refused") for code, number in refused.most_common()]
    rows += [(code, number, "read, with a warning") for code, number in warned.most_common()]
    away = [record for record in records if record["status"] != "read"]
    read = [record for record in records if record["status"] == "read"]
    picked = [read[i] for i in np.linspace(0, len(read) - 1, min(SHOWN, len(read))).astype(int)] if read else []
    thumbnails = sorted(audit.thumbnails(picked).items())
    page = PAGE.format(
        date=date.today().isoformat(),
        summary=_summary(status, total) + ".",
        counts=_table(("code", "scans", ""), rows),
        refused=_table(("scan", "code", "what to do"), [(r["id"], r["fault"], r["message"]) for r in away[:ADVICE]]),
        distributions=_histograms(distributions(records)),
        shown=len(thumbnails),
        read=len(read),
        thumbnails="".join(
            f'<figure><img src="data:image/png;base64,{png}" alt=""><figcaption>{number}</figcaption></figure>'
            for number, png in thumbnails
        ),
    )
    with whole_file(file) as partial:
        partial.write_text(page, encoding="utf-8")


def _table(head, rows):
    if not rows:
        return "<p>None.</p>"
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(str(c))}</td>' for c in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{cells}</table>"


def _histograms(values):
    """The distributions as one picture within the page."""
    if not values:
        return "<p>None.</p>"
    if Figure is None:
        raise ImportError("the report needs matplotlib: pip install matplotlib")
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(2, 4).ravel()
    for axis, (name, numbers) in zip(axes, values.items(), strict=False):
        axis.hist(numbers, bins=30, color="#4477aa")
        axis.set_title(name, fontsize=9)
    for axis in axes[len(values) :]:
        axis.set_axis_off()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return f'<img alt="distributions" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'
