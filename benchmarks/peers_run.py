"""Runs the arms of `peers.py` on questions: answers, what was kept, and seconds, as lines of JSON."""

import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from cost.timing import FirstToken
from tqdm import tqdm

from peers_arms import layer_average, shares_of
from photon.configuration_photon import PhotonConfig
from photon.evaluation.dealing import grouped
from photon.evaluation.encoded_scans import EncodedScans
from photon.evaluation.measures import same_answer
from photon.evaluation.models import VolumeModel, prompt
from photon.loading import load_config, load_model, load_processor
from photon.schedulers import BudgetScheduler, load_method, use_scheduler
from photon.schedulers.recorders import (
    MIDDLE,
    VOXELS,
    record_middle,
    record_queries,
    record_transitions,
    record_voxels,
)
from photon.scheduling_photon import NEEDS
from photon.training.losses.label_maps import PRESENT, TokenLabels

LONGEST = 6  # tokens of an answer
CLASSES = 11  # organs of the phantoms, and background


class Everything(BudgetScheduler):
    """Records what all methods read, so that one encoding of a scan serves them all."""

    needs = NEEDS
    scan_records = (*VOXELS, *MIDDLE)

    @contextmanager
    def record_scan(self, *where):
        with record_voxels(*where), record_middle(*where):
            yield

    @contextmanager
    def record_layers(self, recorded, layers):
        with ExitStack() as stack:
            for record in (record_transitions, record_queries) if len(layers) else ():
                stack.enter_context(record(recorded, layers))
            yield


class TimedModel(VolumeModel):
    """Notes the seconds of the vision tower."""

    vision, clock = 0.0, None

    def encode(self, scan):
        start = self.clock()
        encoded = super().encode(scan)
        self.vision += self.clock() - start
        return encoded


@dataclass
class Place:
    """A model that cuts after one layer, and the selection methods that are tried there."""

    reader: TimedModel
    source: str
    own: object
    everything: Everything
    methods: dict = field(default_factory=dict)

    @classmethod
    def of(cls, source, layer, cache_dir, clock):
        settings = load_config(source).to_dict()
        config = PhotonConfig.from_dict(settings if layer is None else settings | {"scheduler_layer": layer})
        model = load_model(source, config=config, dtype=torch.float32).eval()
        own = model.model.language_model.scheduler
        reader = TimedModel(load_processor(source), model, LONGEST, cache_dir=cache_dir)
        reader.clock = clock
        return cls(reader, source, own, Everything(own).eval())

    @property
    def model(self):
        return self.reader.model

    @property
    def clock(self):
        return self.reader.clock

    @property
    def layer(self):
        return self.model.config.scheduler_layer

    def set_method(self, arm):
        """Makes the model choose as an arm does. Returns the scheduler."""
        if arm not in self.methods:
            self.model.set_scheduler(self.own)
            if arm.method is not None:
                use_scheduler(self.model, arm.method, seed=arm.seed)
                load_method(self.model, self.source)
            self.methods[arm] = self.model.model.language_model.scheduler
        self.model.set_scheduler(self.methods[arm])
        return self.methods[arm]

    def inputs(self, rows, scans):
        """The model's inputs of questions on the same scans, and the seconds of what they share of the decoder."""
        self.model.set_scheduler(self.everything)
        start = self.clock()
        inputs = self.reader.inputs([prompt(row, scans, self.reader.part) for row in rows], scans)
        return inputs, self.clock() - start

    @torch.inference_mode()
    def answers(self, arm, inputs, share):
        """Texts, keep masks (B, V) or `None` where all is kept, and seconds of selection, prefill and decode."""
        scheduler, first, spent = self.set_method(arm), FirstToken(self.clock), []
        hooks = [
            scheduler.register_forward_pre_hook(lambda *_: spent.append(-self.clock())),
            scheduler.register_forward_hook(lambda *_: spent.append(self.clock())),
        ]
        options = {"use_scheduler": False} if arm.whole else {"keep_ratio": share}
        start = self.clock()
        output = self.model.generate(
            **inputs, **options, max_new_tokens=LONGEST, do_sample=False, return_dict_in_generate=True,
            stopping_criteria=[first],
        )  # fmt: skip
        end, selection = self.clock(), sum(spent)
        for hook in hooks:
            hook.remove()
        texts = self.reader.processor.batch_decode(
            output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        cut = output.past_key_values.cut
        seconds = {"selection": selection, "prefill": first.at - start - selection, "decode": end - first.at}
        return texts, None if cut is None else cut.keep_mask, seconds


def lesion_tokens(labels, rows):
    """For each of the rows on the same scans (V,) bool: tokens that hold a lesion of the organs that it asks about;
    `None` where there are none, or no label maps."""
    known = [row for row in rows if row.get("lesions") and row.get("evidence")]
    if not known:
        return [None] * len(rows)
    scans = [scan if isinstance(scan, dict) else {"path": str(scan)} for scan in known[0]["volumes"]]
    maps = [labels(known[0] | {"volumes": scans}, number) for number in range(len(scans))]
    shares, found = torch.cat(maps)[:, :, 1], []
    for row in rows:
        lesion = (shares[..., row["evidence"]] > PRESENT).any(-1).any(-1) if row in known else torch.tensor(False)
        found.append(lesion if lesion.any() else None)
    return found


def measured(row, text, mask, lesions, tokens):
    """[right, share of the tokens kept, share of the lesion tokens kept or `None`]."""
    right = int(same_answer(text, row["answer"]))
    if mask is None:
        return [right, 1.0, None if lesions is None else 1.0]
    recall = None if lesions is None else float(mask[: len(lesions)][lesions].float().mean())
    return [right, int(mask.sum()) / tokens, recall]


def run_model(name, source, arms, rows, shares, done, file, cache_dir, clock):
    """Answers all rows with all arms of one model; writes a line for the questions on each scan or pair of scans, and
    yields after each, so that models take turns.

    Args: rows: of `load_benchmark`, with the label maps' paths; done: first ids of lines that are there; clock: gives
        seconds.
    """
    places = {layer: Place.of(source, layer, cache_dir, clock) for layer in dict.fromkeys(arm.layer for arm in arms)}
    first = next(iter(places.values()))
    layers = first.model.config.text_config.num_hidden_layers
    labels = TokenLabels(first.reader.processor.image_processor, CLASSES, cache_dir)
    groups = {key: asked for key, asked in grouped(rows).items() if asked[0]["id"] not in done}
    scans = EncodedScans(first.reader, list(groups))
    for key, asked in tqdm(groups.items(), unit="scan", desc=name, disable=None):
        first.model.set_scheduler(first.everything)
        first.reader.vision = 0.0
        taken = scans.take(key)
        line = {"model": name, "ids": [row["id"] for row in asked], "seconds": {"vision": first.reader.vision}}
        lesions, inputs = lesion_tokens(labels, asked), {}
        for layer, place in places.items():
            inputs[layer], line["seconds"][f"below the cut, layer {place.layer}"] = place.inputs(asked, taken)
        tokens = (inputs[arms[0].layer]["input_ids"] == first.model.config.video_token_id).sum(-1).tolist()
        line["arms"] = []
        for arm in arms:
            place = places[arm.layer]
            for share in shares_of(arm, place.layer, layers, shares):
                texts, masks, seconds = place.answers(arm, inputs[arm.layer], share)
                masks = [None] * len(asked) if masks is None else masks
                results = [measured(*parts) for parts in zip(asked, texts, masks, lesions, tokens, strict=True)]
                average = layer_average(share, place.layer, layers, arm.method)
                entry = {"arm": arm.name, "share": share, "below": place.layer + 1, "layer_average": average}
                line["arms"].append(entry | {"results": results, "seconds": seconds})
        file.write(json.dumps(line) + "\n")
        file.flush()
        yield
