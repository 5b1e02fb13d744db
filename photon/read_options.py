"""Options of reading a scan, as text on the command line and as fields of a row.

ask.py SCAN "question" --read gaps=resample --read monochrome1=as_stored
{"volumes": [{"path": "head", "gaps": "resample"}], "messages": [...]}           a row of JSON lines
"""

import argparse
from dataclasses import fields

from photon.processing_photon import READ_OPTIONS
from photon.scan_files_photon import CHOICES, ReadOptions

SWITCHES = {"true": True, "false": False}
MODALITIES = ("auto", "ct", "mr")


def add_read_argument(parser):
    """Adds `--read NAME=VALUE`, which may be given again; the result is a list of pairs."""
    names = ", ".join(READ_OPTIONS)
    parser.add_argument(
        "--read", action="append", default=[], type=read_option, metavar="NAME=VALUE",
        help=f"how a scan is read, as a message recommends it: {names}; may be given again",
    )  # fmt: skip


def read_option(text):
    """(name, value) of "gaps=resample", "frame=2", "assume_hu=true", "fill_nonfinite=-1000"."""
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or name not in READ_OPTIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE with one of the names {', '.join(READ_OPTIONS)}")
    try:
        return name, checked_option(name, value.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def checked_option(name, value):
    """The value of a reading option, from text or as it is. Raises: `ValueError` where it is none."""
    try:
        if name in CHOICES:
            return getattr(ReadOptions(**{name: value}), name)
        if name == "modality" and value not in MODALITIES:
            raise ValueError(f"modality is one of {MODALITIES}, got {value!r}")
        if name == "assume_hu" and not isinstance(value, bool):
            return SWITCHES[str(value).lower()]
        if name in ("frame", "max_voxels"):
            return int(value)
        if name == "fill_nonfinite":
            return float(value)
        if name == "series":
            return int(value) if str(value).isdecimal() else str(value)
        return value
    except (KeyError, TypeError, ValueError) as error:
        kind = {"assume_hu": "true or false", "fill_nonfinite": "a number"}.get(name, "a whole number")
        told = name in CHOICES or name == "modality"
        raise ValueError(str(error) if told else f"{name} is {kind}, got {value!r}") from None


def with_read_options(rows, options):
    """Rows whose scans are dicts with these options; what a scan has already stays. options: list of pairs."""
    if not options:
        return rows
    given = dict(options)
    return [
        {
            **row,
            "volumes": [given | (scan if isinstance(scan, dict) else {"path": str(scan)}) for scan in row["volumes"]],
        }
        for row in rows
    ]


def reading_fields(processor):
    """{name: value} of the reading options that a `PhotonVolumeProcessor` holds."""
    return {
        field.name: getattr(processor, field.name) for field in fields(ReadOptions) if hasattr(processor, field.name)
    }
