"""Synthetic torso CTs with known truth, and questions about them that no reader can answer without looking.

    python phantoms.py --one OUT.nii.gz --seed 3                    one scan; its facts are printed as JSON
    python phantoms.py --output DIR --patients 600 --workers 2      a data set: scans, label maps, questions, card

Patients, questions and files are made in photon/phantoms/.
"""

import argparse
import json
from dataclasses import MISSING, fields

import SimpleITK as sitk

from photon.phantoms.dataset import DataConfig, write_data_set
from photon.phantoms.patient import LIMITED_FOVS, PhantomConfig, make_patient


def parse(argv=None):
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=defaults)
    parser.add_argument("--one", metavar="OUT.nii.gz", help="write one scan and print its facts")
    parser.add_argument("--output", metavar="DIR", help="write a data set here, or complete the one that is here")
    parser.add_argument("--patients", type=int, default=600)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--fov", choices=("full", *LIMITED_FOVS), default="full", help="field of view of --one")
    for field in [f for f in (*fields(DataConfig), *fields(PhantomConfig)) if f.name != "phantom"]:
        if field.default is MISSING:
            raise TypeError(f"{field.name} needs a default")
        many = isinstance(field.default, tuple)
        kind = type(field.default[0] if many else field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, nargs="+" if many else None,
                            default=field.default, help=" ")  # fmt: skip
    args = parser.parse_args(argv)
    if bool(args.one) == bool(args.output):
        parser.error("give either --one OUT.nii.gz or --output DIR")
    if args.patients < 1 or args.workers < 1:
        parser.error(f"--patients {args.patients} and --workers {args.workers} must be at least 1")
    values = {f.name: getattr(args, f.name) for f in fields(PhantomConfig)}
    try:
        phantom = PhantomConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        return args, DataConfig(args.seed, args.val, args.test, phantom)
    except ValueError as error:
        parser.error(str(error))


def main(argv=None):
    args, config = parse(argv)
    if args.one:
        image, _, _, facts = make_patient(config.seed, config=config.phantom, fov=args.fov)
        sitk.WriteImage(image, args.one, True, 1)
        print(json.dumps(facts, indent=1))
    else:
        _, _, report = write_data_set(args.output, args.patients, config, args.workers)
        print(report)


if __name__ == "__main__":
    main()
