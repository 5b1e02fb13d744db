"""Encoded scans for groups of questions in turn."""

from collections import Counter

from photon.evaluation.models import Refused
from photon.scan_reader_photon import read_ahead


class EncodedScans:
    """Scans read ahead in threads, encoded once, and freed after their last group.

    Args: model: an `Answerer`; groups: the scans' keys of each group, in the order in which they are taken; ahead: how
        many scans are read while one is in use.
    """

    def __init__(self, model, groups, ahead=2):
        self.model, self.left, self.held = model, Counter(scan for group in groups for scan in group), {}
        order = list(self.left)  # in the order of first need
        reader = read_ahead(order, model.read_or_refuse, ahead=ahead)
        self.reader = zip(order, reader, strict=True)

    def take(self, group):
        """A group's scans, each encoded or `Refused`."""
        while any(scan not in self.held for scan in group):
            key, scan = next(self.reader)
            self.held[key] = scan if isinstance(scan, Refused) else self.model.encode(scan)
        taken = [self.held[scan] for scan in group]
        for scan in group:
            self.left[scan] -= 1
            if not self.left[scan]:
                del self.held[scan]
        return taken
