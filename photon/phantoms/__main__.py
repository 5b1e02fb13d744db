"""Writes synthetic torso CTs with known truth, and questions about them that need the scan.

    python -m photon.phantoms --one OUT.nii.gz --seed 3                one scan; its facts are printed as JSON
    python -m photon.phantoms --output DIR --patients 600 --workers 2  a data set: scans, label maps, questions, card
    python -m photon.phantoms --letters FILE.jsonl --rows 12000        rows of text that teach answers by letter

Patients, questions and files are made in photon/phantoms/.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

from photon.phantoms.dataset import DataConfig, write_data_set
from photon.phantoms.patient import LIMITED_FOVS, PhantomConfig, make_patient
from photon.phantoms.questions import letter_rows
from photon.run_folder import write_whole
from photon.whole_file import write_image

SETTINGS = [field for field in (*fields(DataConfig), *fields(PhantomConfig)) if field.name != "phantom"]


def arguments():
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=defaults)
    parser.add_argument("--one", metavar="OUT.nii.gz", help="write one scan and print its facts")
    parser.add_argument("--output", metavar="DIR", help="write a data set into this folder, or complete it")
    parser.add_argument("--letters", type=Path, metavar="FILE.jsonl", help="write rows of text that teach letters")
    parser.add_argument("--rows", type=int, default=12000, help="of --letters")
    parser.add_argument("--patients", type=int, default=600, help="of the data set")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--fov", choices=("full", *LIMITED_FOVS), default="full", help="field of view of --one")
    for field in SETTINGS:
        several = isinstance(field.default, tuple)
        kind = type(field.default[0] if several else field.default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            nargs="+" if several else None,
            default=field.default,
            help=field.metadata["help"],
        )
    return parser


def configured(args):
    """The `DataConfig` of the arguments. Raises `ValueError` where they do not fit together."""
    if sum(map(bool, (args.one, args.output, args.letters))) != 1:
        raise ValueError("give one of --one OUT.nii.gz, --output DIR and --letters FILE.jsonl")
    for name in ("patients", "workers", "rows"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; expected at least 1")
    values = {field.name: getattr(args, field.name) for field in fields(PhantomConfig)}
    phantom = PhantomConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return DataConfig(args.seed, args.val, args.test, phantom)


def run(args):
    config = configured(args)
    if args.one:
        image, _, _, facts = make_patient(config.seed, config=config.phantom, fov=args.fov)
        write_image(image, args.one, 1)
        print(json.dumps(facts, indent=1))
    elif args.letters:
        rows = letter_rows(config.phantom, args.rows, config.seed)
        write_whole(args.letters, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        _, _, report = write_data_set(args.output, args.patients, config, args.workers)
        print(report)


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
