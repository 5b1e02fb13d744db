"""Photon in the evaluator of DeepTumorVQA 2.0 (github.com/Schuture/DeepTumorVQA), as its custom backend.

    pip install git+https://github.com/Schuture/DeepTumorVQA
    PYTHONPATH=. deeptumorvqa-eval --backend custom --custom-module integrations.deeptumorvqa --model . \\
        --mode vqa --input 3d_volume --format mc --data-dir DeepTumorVQA_2.0 --output photon.json --label Photon

The evaluator imports `--custom-module` by its dotted name, so the command runs with this repository on PYTHONPATH. It
asks one question at a time, in the order of its file; a scan is read and encoded again only when it changes. `--label`
is the name in its leaderboard; without it the name is the last part of `--model`, which is empty for ".".

Its scorer takes the first character of an answer as the choice where that is one of A to D ("Answer: C" counts as A).
Otherwise it takes the first such letter that stands alone ("It is B" counts as B). So a choice question is answered
with a bare letter, the likeliest of those in the prompt. A scan that is refused or absent gives the empty string,
which is wrong in either format, and a line on stderr with the fault's code.
"""

import json
import re
import sys

from deeptumorvqa.eval.vqa_evaluator import HFVLMEvaluator

from photon.evaluation.models import Refused, VolumeModel, load_model
from photon.loading import usable_device

OPTION = re.compile(r"(?<![\w-])([A-D])[:.)](?=\s)")


class PhotonEvaluator(HFVLMEvaluator):
    """Answers questions about CT volumes.

    Args:
        answerer: a `VolumeModel`.
        by_letter: answer with the likeliest of the prompt's choice letters, not with generated text.
    """

    def __init__(self, answerer, model_id, by_letter):
        super().__init__(model_id=model_id, device=str(answerer.model.device))
        self.answerer, self.by_letter = answerer, by_letter
        self.path = self.scan = None

    def generate(self, prompt, images=None, video_path=None):
        """One question. `video_path` is the scan's path: the evaluator passes volumes under that name."""
        if video_path is None:
            print("a question's scan is not in the data folder; the answer is left empty", file=sys.stderr)
            return ""
        if video_path != self.path:
            scan = self.answerer.read_or_refuse(json.dumps({"path": video_path}))
            self.scan = scan if isinstance(scan, Refused) else self.answerer.encode(scan)
            self.path = video_path
        if isinstance(self.scan, Refused):
            print(f"a question's scan was refused ({self.scan.fault}); the answer is left empty", file=sys.stderr)
            return ""
        content = [{"type": "volume"}, {"type": "text", "text": prompt}]
        row = {"messages": [{"role": "user", "content": content}, None], "choices": letters(prompt)}
        return self.answerer.answer([row], [self.scan], self.by_letter)[0]["prediction"]


def letters(prompt):
    """The choice letters of a prompt ("A: ... B: ..."), from A on without a gap; all four where it lists none."""
    found = [match.group(1) for match in OPTION.finditer(prompt)]
    listed = ["A", "B", "C", "D"]
    while listed and not all(letter in found for letter in listed):
        listed.pop()
    return listed if len(listed) > 1 else ["A", "B", "C", "D"]


def build_evaluator(args):
    """The evaluator for the command line's arguments: `model`, `mode`, `input`, `format`, `max_new_tokens`."""
    if args.mode != "vqa" or args.input != "3d_volume":
        raise ValueError(f"Photon reads volumes: pass --mode vqa --input 3d_volume, not {args.mode} {args.input}.")
    answerer = load_model(args.model, usable_device("auto"), modality="ct", max_new_tokens=args.max_new_tokens)
    if not isinstance(answerer, VolumeModel):
        raise ValueError("--model is not a Photon model; the evaluator has backends of its own for others.")
    return PhotonEvaluator(answerer, args.model, by_letter=args.format == "mc")
