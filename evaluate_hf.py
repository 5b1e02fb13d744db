"""Answer a benchmark's questions with a model, and score the answers.

    python evaluate_hf.py --model . --benchmark 3d-rad --data QUESTIONS --volumes SCANS --output RUN
    torchrun --nproc-per-node 8 evaluate_hf.py ...                         # each process takes its part of the scans
    python evaluate_hf.py --model google/medgemma-4b-it --slices 16 ...    # a 2D model gets axial slices
    python evaluate_hf.py --benchmark 3d-rad --data QUESTIONS --score predictions.jsonl
    python evaluate_hf.py --benchmark 3d-rad --data QUESTIONS --compare first.jsonl second.jsonl

RUN gets `run.json` (what was run), `predictions.jsonl` (a line for each question, written as answers come) and
`scores.json`; the table is printed. A stopped run goes on where it was when the command is given again. A folder that
holds another run is refused. Questions on one scan are asked together: the scan is read once, and the vision tower
encodes it once. The result does not depend on the number of processes. A scan that cannot be read is recorded with its
fault code under each of its questions, which count as wrong.
Not a medical device.
"""

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path

# Before torch is loaded: a thread that waits for the others sleeps. By default it spins, and where other processes use
# the same cores, that makes a small model ten times slower. The results are the same.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import transformers

from photon.console import one_line_faults
from photon.evaluation.benchmarks import BENCHMARKS
from photon.evaluation.comparison import compare
from photon.evaluation.measures import check_installed
from photon.evaluation.predictions import read_predictions, read_records
from photon.evaluation.questions import load_benchmark, missing_report
from photon.evaluation.run import Settings, answered
from photon.evaluation.summary import summary, text_of
from photon.evaluation.swapping import swapped
from photon.loading import HUB_ID
from photon.prefix_photon import REUSE
from photon.read_options import add_read_argument, with_read_options
from photon.run_folder import RunError, write_whole
from photon.schedulers import SCHEDULERS


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("questions")
    group.add_argument("--benchmark", choices=sorted(BENCHMARKS), required=True)
    group.add_argument("--data", required=True, metavar="SOURCE", help="folder, file or Hub id of the questions")
    group.add_argument("--volumes", metavar="FOLDER", help="where the scans are")
    group.add_argument("--split", help="of the questions (default: the benchmark's test split)")
    group.add_argument("--data-revision", metavar="REVISION", help="branch, tag or commit of --data on the Hub")
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="only these")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    group.add_argument("--faults", choices=["refuse", "leave-out"], default="refuse", help="questions with faults")
    group.add_argument("--missing", choices=["stop", "record"], default="stop", help="what to do about absent scans")
    group.add_argument("--swap-scans", action="store_true", help="ask each question about another patient's scan")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="folder or Hub id: Photon, or any image-text-to-text model")
    group.add_argument("--revision", help="branch, tag or commit of --model on the Hub")
    group.add_argument("--trust-remote-code", action="store_true", help="run code of a model other than Photon")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights; auto: the checkpoint's on a GPU, else by size, processor and free memory",
    )
    group.add_argument("--batch-size", type=positive, default=8, metavar="N", help="questions on one scan at a time")
    group.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="longest answer")
    group.add_argument("--choices", choices=["generate", "logprob"], default="generate",
                       help="multiple choice: write an answer, or take the likeliest letter")  # fmt: skip
    group.add_argument(
        "--scheduler",
        choices=("on", "off", *SCHEDULERS),
        default="on",
        help="on: as the model was trained; off: keep all visual tokens; else another rule to choose them, as many "
        "as the model's own or as --token-budget and --keep-ratio say (photon/schedulers/)",
    )
    group.add_argument(
        "--scheduler-layer",
        type=int,
        metavar="L",
        help="cut after decoder layer L, -1: before the first (default: as the model was trained)",
    )
    group.add_argument("--reuse", choices=REUSE, default="exact",
                       help="what questions on one scan share: exact: what no answer can depend on; select: all of "
                            "the decoder's work on the scan, an approximation (docs/efficiency.md)")  # fmt: skip
    group.add_argument("--token-budget", type=int, metavar="K", help="keep exactly the K most salient visual tokens")
    group.add_argument("--keep-ratio", type=float, metavar="R", help="keep this share of the visual tokens")
    group.add_argument(
        "--grounding",
        action="store_true",
        help="also tell how much better each answer follows from the kept tokens than from others",
    )
    group = parser.add_argument_group("scans")
    group.add_argument("--modality", choices=["auto", "ct", "mr"], default="auto", help="what the scans are")
    add_read_argument(group)
    group.add_argument("--cache-dir", metavar="FOLDER", help="keep preprocessed scans in it, in half precision")
    group.add_argument(
        "--read-ahead", type=positive, default=2, metavar="N", help="scans read while one is asked about"
    )
    group.add_argument("--slices", type=positive, default=16, metavar="N", help="axial slices for a 2D model")
    group.add_argument("--window", type=float, nargs=2, default=[-160.0, 240.0], metavar=("LO", "HI"),
                       help="HU that are black and white in them (default: soft tissue)")  # fmt: skip
    group = parser.add_argument_group("scores")
    group.add_argument("--output", type=Path, metavar="RUN", help="folder of the run")
    group.add_argument("--score", type=Path, metavar="FILE",
                       help='score these predictions; no model is run. A line of JSON for each question: '
                            '{"id": "as in the questions", "prediction": "the answer"}')  # fmt: skip
    group.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="compare two such files")
    group.add_argument("--train", metavar="SOURCE", help="training questions, for the majority baseline")
    group.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamplings of the patients")
    group.add_argument("--seed", type=int, default=0, help="of the resampling, and of --swap-scans")
    args = parser.parse_args(argv)
    wrong = wrong_arguments(args)
    if wrong:
        parser.error(wrong)
    return args


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number above 0")
    return number


def wrong_arguments(args):
    """What is wrong with the arguments, or `None`."""
    modes = [name for name in ("--model", "--score", "--compare") if getattr(args, name[2:]) is not None]
    if len(modes) != 1:
        return "Give one of --model (a run), --score (predictions) and --compare (two files of predictions)."
    if args.model and not Path(args.model).is_dir() and not HUB_ID.fullmatch(args.model):
        return f"There is no folder {args.model}, and it is no Hub id (owner/name). Check --model."
    if args.model and not args.output:
        return "A run needs --output, the folder for its predictions."
    if args.output and args.output.exists() and not args.output.is_dir():
        return f"--output {args.output} is a file; expected a folder, which may be new."
    for file in filter(None, (args.score, *(args.compare or ()))):
        if not file.is_file():
            return f"There is no file {file}; --score and --compare take files of predictions."
    if args.swap_scans and not args.model:
        return "--swap-scans is for a run; predictions of swapped scans are scored as they are."
    if sum((args.scheduler == "off", args.token_budget is not None, args.keep_ratio is not None)) > 1:
        return "--scheduler off, --token-budget and --keep-ratio exclude each other."
    if args.grounding and (args.scheduler == "off" or args.choices == "logprob"):
        return "--grounding is of written answers from kept tokens: leave --scheduler off and --choices logprob out."
    if args.token_budget is not None and args.token_budget < 0:
        return "--token-budget is a number of tokens, 0 or more."
    if args.keep_ratio is not None and not 0 <= args.keep_ratio <= 1:
        return "--keep-ratio is a share from 0 to 1."
    if not args.window[0] < args.window[1]:
        return "--window takes two numbers, the lower one first."
    return None


def questions(args):
    """The benchmark's rows, checked; in a run also that their scans exist."""
    rows = load_benchmark(
        args.benchmark, args.data, volumes=args.volumes, split=args.split, revision=args.data_revision,
        tasks=args.tasks, limit=args.limit, faults=args.faults,
    )  # fmt: skip
    if not rows:
        raise RunError("There are no questions; check --data and --tasks.")
    missing = missing_report(rows, args.benchmark) if args.model else ""
    if missing and (args.missing == "stop" or args.swap_scans):
        advice = "Ask about fewer questions (--tasks, --limit), or count theirs as wrong (--missing record)."
        raise RunError(f"{missing}\n{advice}")
    return swapped(rows, args.seed) if args.swap_scans else rows


def settings(args):
    return Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})


def run(args):
    check_installed()  # before anything is answered
    rows = questions(args)
    if args.compare:
        first, second = (read_predictions(file, rows) for file in args.compare)
        result = compare(rows, first, second, bootstrap=args.bootstrap, seed=args.seed)
        text = json.dumps(result, indent=2)
    else:
        if args.score:
            records = read_records(args.score, rows)
        else:
            records = answered(settings(args), with_read_options(rows, args.read))
        if records is None:  # of several processes the first one reports
            return
        result = summary(args.benchmark, rows, records, train=args.train, tasks=args.tasks, bootstrap=args.bootstrap,
                         seed=args.seed)  # fmt: skip
        text = text_of(result)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        name = "comparison.json" if args.compare else "scores.json"
        write_whole(args.output / name, json.dumps(result, indent=2) + "\n")


def main(argv=None):
    args = parse(argv)
    transformers.utils.logging.set_verbosity_error()
    with one_line_faults(
        out_of_memory="Out of memory. Lower --batch-size, and give a new --output: another size is another run.",
        interrupted="Stopped. Give the same command again to go on.",
    ):
        run(args)


if __name__ == "__main__":
    main()
