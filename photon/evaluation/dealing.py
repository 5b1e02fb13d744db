"""Deals questions out: to groups on the same scans, to processes, to batches."""

import json


def scan_keys(row):
    """A row's scans as hashable keys: JSON of what the volume processor takes."""
    entries = [scan if isinstance(scan, dict) else {"path": str(scan)} for scan in row["volumes"]]
    return tuple(json.dumps({k: v for k, v in entry.items() if v is not None}, sort_keys=True) for entry in entries)


def grouped(rows):
    """{scans of the prompt: its questions}, in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault(scan_keys(row), []).append(row)
    return groups


def dealt(groups, ranks):
    """The groups of each rank, a list of lists of keys. Groups that share a scan stay together, so that no scan is
    read twice; ranks get about equally many questions."""
    home = {}  # group -> the group that stands for all groups connected with it

    def root(group):
        while home.setdefault(group, group) != group:
            group = home[group]
        return group

    first = {}
    for group in groups:
        for scan in group:
            home[root(group)] = root(first.setdefault(scan, group))
    together = {}
    for group in groups:
        together.setdefault(root(group), []).append(group)
    shares, load = [[] for _ in range(ranks)], [0] * ranks
    for members in sorted(together.values(), key=lambda m: -sum(len(groups[g]) for g in m)):  # stable, largest first
        lightest = load.index(min(load))
        shares[lightest] += members
        load[lightest] += sum(len(groups[group]) for group in members)
    return shares


def batches(rows, size, by_letter):
    """A group's questions in batches, by the length of their text, so that little of a batch is padding. They depend
    only on the group and the size: a resumed run, or one with other ranks, computes the same batches and so the same
    last digits."""
    rows = sorted(rows, key=lambda row: len(json.dumps(row["messages"][:-1])))
    letters = [row for row in rows if by_letter and row["kind"] == "choice"]
    written = [row for row in rows if not (by_letter and row["kind"] == "choice")]
    return [part[i : i + size] for part in (letters, written) for i in range(0, len(part), size)]
