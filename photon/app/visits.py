"""Each visitor's scan and answers, in memory, under a name that cannot be guessed; gone when the visit ends."""

import secrets
import threading
import time
from dataclasses import dataclass, field

from photon.serving.engine import EncodedScan
from photon.viewer.packing import PackedScan


@dataclass
class ReadScan:
    """A visitor's scan. image: SimpleITK image; encoded: for the model; packed: for the viewer; facts: for people."""

    image: object
    encoded: EncodedScan
    packed: PackedScan
    facts: dict


@dataclass
class Visit:
    """What is kept for one visitor. turns: dicts as `PackedScan.question` gives them; masks: kept tokens of each."""

    scan: ReadScan | None = None
    turns: list = field(default_factory=list)
    masks: list = field(default_factory=list)
    touched: float = field(default_factory=time.monotonic)

    def show(self, scan):
        """Replaces the scan; answers about the one before are forgotten."""
        self.scan = scan
        self.forget_answers()

    def forget_answers(self):
        """Starts the chat about the scan anew."""
        self.turns, self.masks = [], []


class Full(RuntimeError):
    """As many visits as the server takes."""


class Visits:
    """All visits.

    Args: most: visits at the same time; idle: seconds after which a visit without a sign of life ends.
    """

    def __init__(self, most=16, idle=1800.0):
        self.most, self.idle = most, idle
        self.held, self.lock = {}, threading.Lock()

    def begin(self):
        """The name of a new visit. Raises `Full`."""
        with self.lock:
            self._expire()
            if len(self.held) >= self.most:
                raise Full(f"{self.most} people are using this page; try again in some minutes.")
            name = secrets.token_urlsafe(24)
            self.held[name] = Visit()
        return name

    def get(self, name):
        """The visit of that name, `None` where there is none (any more)."""
        with self.lock:
            self._expire()
            visit = self.held.get(name)
            if visit is not None:
                visit.touched = time.monotonic()
        return visit

    def end(self, name):
        """Forgets a visit."""
        with self.lock:
            self.held.pop(name, None)

    def expire(self):
        """Ends the visits that have been idle for too long."""
        with self.lock:
            self._expire()

    def _expire(self):
        now = time.monotonic()
        for name in [name for name, visit in self.held.items() if now - visit.touched > self.idle]:
            del self.held[name]
