"""Scans -> records on disk: in processes, resumable after a kill, in shards on many machines.

audit = Audit(scans, settings, cache_dir)
for record in audit.run(workers=8):         # of each scan that has none yet
    ...
records = audit.records()                   # all, of every shard

A line of a record is written when its scan is done. A run that was killed goes on behind it; a scan whose files have
changed since is read again.
"""

import hashlib
import json
import os
from pathlib import Path

from photon.archive.pool import Death, in_processes
from photon.archive.reading import Reader
from photon.rows import read_rows
from photon.run_folder import write_whole

DIED = "WORKER_DIED"  # in place of a fault code: the scan killed the process that read it


class Audit:
    """The records of a data set under one processor's settings, in a folder of the cache.

    Args:
        scans: list of `listing.Scan`. settings: fields of the processor. cache_dir: folder of preprocessed scans.
        shard: (i, n), of which this process reads scans i, i + n, ...; i from 1.
    """

    def __init__(self, scans, settings, cache_dir, shard=(1, 1)):
        self.scans, self.settings, self.cache_dir, self.shard = scans, settings, Path(cache_dir), shard
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()
        self.folder = self.cache_dir / f"audit-{digest}"
        self.folder.mkdir(parents=True, exist_ok=True)
        first, step = shard
        self.part = scans[first - 1 :: step]

    @property
    def file(self):
        """The records of this shard."""
        return self.folder / "records-{}-of-{}.jsonl".format(*self.shard)

    def open_scans(self):
        """[(scan, stamp)] of this shard that are to be read: without a record in any shard, changed since, gone from
        the cache, or with a record that they killed their worker."""
        known = set()
        for file in self._files():
            for record in self._read(file):
                entry = record.get("entry")
                whole = entry is None or (self.cache_dir / f"{entry}.safetensors").is_file()
                if record["status"] != "died" and whole:
                    known.add(record["stamp"])
        stamps = ((scan, scan.stamp(self.settings)) for scan in self.part)
        return [(scan, stamp) for scan, stamp in stamps if stamp not in known]

    def run(self, workers, timeout=None, make_reader=Reader, scans=None):
        """Yields the record of each scan as it is written. scans: what `open_scans` returned, default that."""
        scans = self.open_scans() if scans is None else scans
        lines = [json.dumps({"id": scan.id, **scan.source}) for scan in self.scans]
        write_whole(self.folder / "scans.jsonl", "\n".join(lines) + "\n")
        _end_line(self.file)
        threads = max(1, (os.cpu_count() or 1) // max(1, workers))
        stamps = {scan.id: stamp for scan, stamp in scans}
        tasks = ({"id": scan.id, "source": scan.source} for scan, _ in scans)
        arguments = make_reader, (self.settings, str(self.cache_dir), threads)
        with open(self.file, "a", encoding="utf-8") as lines:
            for task, result in in_processes(Job, arguments, tasks, workers, timeout):
                if isinstance(result, Death):
                    advice = "Read it alone, on a machine with more memory, or leave it out."
                    result = {"status": "died", "fault": DIED, "message": f"{result.reason}. {advice}", "warnings": []}
                record = {"id": task["id"], "stamp": stamps[task["id"]], **result}
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                yield record

    def records(self):
        """The newest record of each scan of the data set, of all shards, in its order; without thumbnails."""
        newest = {}
        for file in self._files():
            for record in self._read(file):
                record.pop("thumbnail", None)
                newest[record["stamp"]] = record
        stamps = ((scan, scan.stamp(self.settings)) for scan in self.scans)
        return [newest[stamp] | {"id": scan.id} for scan, stamp in stamps if stamp in newest]

    def thumbnails(self, records):
        """{id: PNG in base64} of some records."""
        wanted = {record["stamp"]: record["id"] for record in records}
        return {
            wanted[record["stamp"]]: record["thumbnail"]
            for file in self._files()
            for record in self._read(file)
            if record["stamp"] in wanted and "thumbnail" in record
        }

    def _files(self):
        """The records of all shards, from the oldest to the newest."""
        return sorted(self.folder.glob("records-*-of-*.jsonl"), key=lambda file: file.stat().st_mtime_ns)

    def _read(self, file):
        for place, record in read_rows(file, skip_unfinished=True):
            if isinstance(record, ValueError):
                raise ValueError(f"{place} of the records is damaged; remove that line, or the file.")
            yield record


class Job:
    """What a worker does: reads the scan of a task."""

    def __init__(self, make_reader, arguments):
        self.reader = make_reader(*arguments)

    def __call__(self, task):
        return self.reader(task["source"])


def _end_line(file):
    """Removes the half line that a killed run has left."""
    if file.exists():
        whole = file.read_bytes().rpartition(b"\n")
        if whole[2]:
            with open(file, "rb+") as stream:
                stream.truncate(len(whole[0]) + len(whole[1]))
