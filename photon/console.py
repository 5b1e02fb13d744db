"""How commands report to a person: one line for each warning and each fault."""

import sys
import warnings
from contextlib import contextmanager

import torch
from transformers.utils import logging

from photon.rows import RowError
from photon.run_folder import RunError


def print_warning(message, *where):
    """Prints a warning as one line without the source file (a `warnings.showwarning`)."""
    print("warning: " + " ".join(str(message).split()), file=sys.stderr)


@contextmanager
def one_line_faults(out_of_memory="Out of memory."):
    """Turns a fault of the input or of the machine into one line and exit code 2, around a command's body.

    A list of faults (`RowError`, `RunError`) keeps its lines. out_of_memory: the line for a GPU that is full.
    """
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            yield
    except (RowError, RunError) as error:
        raise _exit(str(error)) from None
    except torch.OutOfMemoryError:
        raise _exit(out_of_memory) from None
    except (ValueError, OSError, ImportError, MemoryError) as error:
        raise _exit(" ".join(str(error).split()) or "Out of memory.") from None


def _exit(text):
    print(text, file=sys.stderr)
    return SystemExit(2)
