"""What the commands say to a person: one line a warning, one line a fault."""

import sys
import warnings
from contextlib import contextmanager

import torch
from transformers.utils import logging


def print_warning(message, *where):
    """A warning as one line without the file of this machine that gave it (a `warnings.showwarning`)."""
    print("warning: " + " ".join(str(message).split()), file=sys.stderr)


@contextmanager
def one_line_faults():
    """Runs a command's body: a fault of the input or of the machine becomes one line and exit code 2."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            yield
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError) as error:
        print(" ".join(str(error).split()) or "Out of memory.", file=sys.stderr)
        raise SystemExit(2) from None
