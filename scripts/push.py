"""Builds a clean folder of a model, with a generated card, and pushes it to the Hub.

    python scripts/push.py run/final --repo me/my-photon --licence apache-2.0 --training run --results answers \\
        --base-model Qwen/Qwen2.5-VL-3B-Instruct --training-data "9,000 CT, not public" --dry-run
    python scripts/push.py --space --repo me/photon-page --dry-run

Only weights, settings, code, card and requirements go out; `--dry-run` lists each file with its size and SHA-256, and
sends nothing. The card tells base, data, settings, licence, and the results of evaluate_hf.py runs with intervals and
with the best answer without the scan. `--space` is the page of `make app` as a Hugging Face Space.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from photon.console import one_line_faults
from photon.loading import HUB_ID
from photon.publishing.card import CardFacts, model_card
from photon.publishing.folder import build_model, complete_weights, listing
from photon.publishing.space import build_space


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", metavar="DIR", help="a complete folder of a model")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="where it goes")
    parser.add_argument("--space", action="store_true", help="push the page as a Space")
    parser.add_argument("--licence", "--license", help="of the weights: apache-2.0, cc-by-nc-sa-4.0, ...")
    parser.add_argument("--base-model", metavar="HUB_ID", help="what the training began with")
    parser.add_argument("--training-data", metavar="TEXT", help="a sentence about the data")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="HUB_ID", help="data sets of the Hub")
    parser.add_argument("--training", type=Path, metavar="RUN", help="folder of train_hf.py, for its settings")
    parser.add_argument("--results", type=Path, nargs="+", default=[], metavar="RUN", help="folders of evaluate_hf.py")
    parser.add_argument("--build", type=Path, metavar="DIR", help="keep the built folder here")
    parser.add_argument("--private", action="store_true", help="a private repository")
    parser.add_argument("--dry-run", action="store_true", help="build and list; send nothing")
    args = parser.parse_args(argv)
    if args.space == bool(args.source):
        parser.error("give the folder of a model, or --space.")
    if not args.space and not args.licence:
        parser.error("--licence is needed: under which terms may the weights be used?")
    if not HUB_ID.fullmatch(args.repo) or "/" not in args.repo:
        parser.error("--repo is owner/name.")
    if args.build and args.build.exists():
        parser.error("--build names something that exists; name a new folder.")
    return args


def build(args, output):
    """The folder to push."""
    if args.space:
        return build_space(output)
    complete_weights(args.source)  # what is missing is told before the card needs it
    facts = CardFacts(
        args.repo, args.licence, args.base_model, args.training_data, args.datasets, args.training, args.results
    )
    return build_model(args.source, output, model_card(args.source, facts))


def push(args, folder):
    """Sends the folder; what the repository held beside it is deleted. Returns the commit's address."""
    api, kind = HfApi(), "space" if args.space else "model"
    options = {"space_sdk": "gradio"} if args.space else {}
    try:
        api.create_repo(args.repo, repo_type=kind, private=args.private, exist_ok=True, **options)
        return api.upload_folder(
            repo_id=args.repo, repo_type=kind, folder_path=folder, commit_message="Photon", delete_patterns="*"
        ).commit_url
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = {401: "Log in with: hf auth login", 403: "The token may not write there."}.get(
            status, "Try again later."
        )
        raise ValueError(f"The Hub refused with status {status}. {hint}") from None


def main(argv=None):
    args = parse(argv)
    with one_line_faults(), tempfile.TemporaryDirectory() as place:
        folder = build(args, args.build or Path(place) / "folder")
        files = listing(folder)
        for path, size, digest in files:
            print(f"{digest}  {size:>12,}  {path}")
        print(f"{len(files)} files, {sum(size for _, size, _ in files):,} bytes")
        print("Nothing was sent." if args.dry_run else push(args, folder))


if __name__ == "__main__":
    main()
