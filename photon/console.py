"""How commands report to a person: one line for each warning and each fault."""

import re
import sys
import warnings
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from photon.rows import RowError
from photon.run_folder import RunError

UNWRITTEN = ("inline_container", "iostream error")  # in the RuntimeError of `torch.save` on a full disk


def print_warning(message, *where):
    """Prints a warning as one line without the source file (a `warnings.showwarning`)."""
    print("warning: " + " ".join(str(message).split()), file=sys.stderr)


@contextmanager
def named_requirements(file):
    """Around a command's imports: a missing package becomes one line that names the requirements to install, and
    Ctrl-C one line with exit code 130."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise _exit(f"{error.name} is missing: pip install -r {file} -c constraints.txt") from None
    except KeyboardInterrupt:
        raise _exit("Stopped before anything was begun.", 130) from None


@contextmanager
def one_line_faults(out_of_memory="Out of memory.", interrupted="Stopped."):
    """Turns a fault of the input or of the machine into one line and exit code 2, around a command's body.

    A list of faults (`RowError`, `RunError`) keeps its lines. out_of_memory: the line for a GPU that is full.
    interrupted: the line after Ctrl-C, with exit code 130.
    """
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            yield
    except KeyboardInterrupt:
        raise _exit(interrupted, 130) from None
    except (RowError, RunError) as error:
        raise _exit(_without_worker(str(error))) from None
    except torch.OutOfMemoryError:
        raise _exit(out_of_memory) from None
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in UNWRITTEN):
            raise
        text = " ".join(str(error).split())
        raise _exit(f"A file of weights could not be written or read; is the disk full? ({text})") from None
    except (ValueError, OSError, ImportError, MemoryError) as error:
        raise _exit(" ".join(_without_worker(str(error)).split()) or "Out of memory.") from None


def _without_worker(text):
    """The fault alone, where a worker process of the data loader has put its traceback in front."""
    return re.sub(r"^Caught \w+ in DataLoader worker process.*\n[\w.]*Error: ", "", text, flags=re.DOTALL)


def _exit(text, code=2):
    print(text, file=sys.stderr)
    return SystemExit(code)
