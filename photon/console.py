"""How commands report to a person: one line for each warning and each fault."""

import sys
import warnings
from contextlib import contextmanager

import torch
from transformers.utils import logging


def print_warning(message, *where):
    """Prints a warning as one line without the source file (a `warnings.showwarning`)."""
    print("warning: " + " ".join(str(message).split()), file=sys.stderr)


@contextmanager
def one_line_faults():
    """Turns a fault of the input or of the machine into one line and exit code 2, around a command's body."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            yield
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError) as error:
        print(" ".join(str(error).split()) or "Out of memory.", file=sys.stderr)
        raise SystemExit(2) from None
