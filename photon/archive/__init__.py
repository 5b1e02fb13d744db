"""An audit of every scan of a data set, which also fills the folder of preprocessed scans.

    listing.py    data set -> scans, each with an id
    reading.py    one scan -> its record, in a worker process
    pool.py       worker processes; a scan that kills its worker is a result as any other
    audit.py      scans -> records on disk, resumable; shards of an array job; Ray
    report.py     records -> summary and a page, without patient data

`prepare_hf.py` is the command. A record holds no path; `scans.jsonl` beside the records maps ids to paths and stays on
the machine.
"""
