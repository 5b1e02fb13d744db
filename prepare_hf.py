"""Read every scan of a data set once: find those that cannot be read, and fill the cache of preprocessed scans.

    python prepare_hf.py --data rows.jsonl --cache-dir CACHE --workers 8 --report report.html
    python prepare_hf.py --data FOLDER --cache-dir CACHE                  # every scan below a folder
    python prepare_hf.py --data FOLDER --cache-dir CACHE --shard 3/20     # task 3 of an array job of 20
    python prepare_hf.py --data FOLDER --cache-dir CACHE --ray auto       # on the nodes of a Ray cluster

Training and evaluation take the scans from CACHE (--cache-dir there too). The run ends with the number of scans by
fault code and one line for each scan that was refused: its id, the code and what to do. `scans.jsonl` in CACHE/audit-*
maps ids to paths; the report itself holds no path and no patient data. A run that was stopped goes on where it was. A
scan that kills its worker process (out of memory, a crash of a library) is recorded, and the others are read.
"""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from photon.archive.audit import Audit
from photon.archive.listing import list_scans
from photon.archive.on_ray import run_on_ray
from photon.archive.report import text_of, write_page
from photon.console import one_line_faults
from photon.loading import ROOT, load_processor
from photon.read_options import add_read_argument


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="SOURCE", help="rows as train_hf.py takes them, or a folder")
    parser.add_argument("--volumes", metavar="FOLDER", help="where relative paths in the rows begin (default: there)")
    parser.add_argument("--cache-dir", required=True, metavar="CACHE", help="folder of preprocessed scans")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: cores)")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="read only part I of N, I from 1")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help='spread over a Ray cluster; "auto" finds it, "local" starts one'
    )
    parser.add_argument("--report", type=Path, metavar="HTML", help="write the report, of all shards, as a page")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id whose processor decides what is read")
    parser.add_argument("--modality", choices=["auto", "ct", "mr"], help="what the scans are (default: the model's)")
    parser.add_argument(
        "--timeout", type=float, default=900.0, metavar="S", help="seconds for one scan (default: 900)"
    )
    add_read_argument(parser)
    args = parser.parse_args(argv)
    if args.workers < 1 or args.timeout <= 0:
        parser.error("--workers and --timeout are numbers above 0.")
    if args.ray and args.shard != (1, 1):
        parser.error("--ray spreads the scans itself; leave --shard out.")
    return args


def shard(text):
    """(i, n) of "i/n"."""
    try:
        part, number = (int(word) for word in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 3/20") from None
    if not 1 <= part <= number:
        raise argparse.ArgumentTypeError(f"{text!r}: I is 1 to N")
    return part, number


def run(args):
    fields = {} if args.modality is None else {"modality": args.modality}
    settings = load_processor(args.model, **fields).image_processor.settings
    audit = Audit(list_scans(args.data, args.volumes, args.read), settings, args.cache_dir, args.shard)
    scans = audit.open_scans()
    if args.ray:
        done = run_on_ray(audit, args.ray, args.workers, args.timeout)
    else:
        done = audit.run(args.workers, args.timeout, scans=scans)
    for _ in tqdm(done, total=len(scans), unit="scan", smoothing=0.05, file=sys.stderr):
        pass
    print(text_of(audit.records(), len(audit.scans)))
    if args.report:
        write_page(audit, args.report)


def main(argv=None):
    args = parse(argv)
    with one_line_faults(interrupted="Stopped. Give the same command again to go on."):
        run(args)


if __name__ == "__main__":
    main()
