"""Jobs for worker processes of the archive's tests; workers import this file by its name."""

import os
import signal
import time

from photon.archive.reading import Reader


class Troubled:
    """Reads scans, except that some kill the process or hang, by a word in their path."""

    def __init__(self, settings, cache_dir, threads):
        self.read = Reader(settings, cache_dir, threads)

    def __call__(self, source):
        path = source["path"]
        if "killer" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        if "crash" in path:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "quit" in path:
            os._exit(3)
        if "hang" in path:
            time.sleep(600)
        return self.read(source)


def make_square():
    return square


def square(number):
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 99:
        raise OSError("no space")
    return number * number


def make_nothing():
    raise ImportError("a library is missing")
