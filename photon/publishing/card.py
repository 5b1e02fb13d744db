"""The card of a model: what it is, what it was trained on and how, and what its evaluations came to."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

# settings of a training run that a reader wants; all others, and all paths, stay at home
TRAINING = (
    "stage", "learning_rate", "muon_learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "lora", "lora_rank", "bf16", "seed", "warmup_ratio", "lr_scheduler_type",
    "evidence_weight", "surrogate", "saliency",
)  # fmt: skip
RELEASE = "Alibaba-DAMO-Academy/Photon-S2"
NOT_VALIDATED = (
    "**Not a medical device.** For research on scans that you are allowed to use. Nothing here has been validated for "
    "diagnosis, triage or treatment, and no answer may reach a patient."
)
CODE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

ask = pipeline("volume-question-answering", model="{repo}", trust_remote_code=True)
ask("ct.nii.gz", "Is there a lesion in the liver?")

processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{repo}", trust_remote_code=True)
```"""


@dataclass
class CardFacts:
    """What a card is made from.

    Args: repo: owner/name; licence: an identifier that the Hub knows; base_model: Hub id, or `None`; training_data: a
        sentence of the author; datasets: Hub ids; training: folder of a train_hf.py run; results: folders of
        evaluate_hf.py runs; languages.
    """

    repo: str
    licence: str
    base_model: str | None = None
    training_data: str | None = None
    datasets: list = field(default_factory=list)
    training: Path | None = None
    results: list = field(default_factory=list)
    languages: tuple = ("en",)


def model_card(source, facts):
    """The text of README.md for the model in folder `source`."""
    config = json.loads(Path(source, "config.json").read_text(encoding="utf-8"))
    volumes = json.loads(Path(source, "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    runs = [read_run(folder) for folder in facts.results]
    metadata = ModelCardData(
        model_name=facts.repo.split("/")[-1],
        base_model=facts.base_model,
        license=facts.licence,
        language=list(facts.languages),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["medical", "radiology", "ct", "visual-question-answering", "token-pruning", "custom_code"],
        datasets=facts.datasets or None,
        eval_results=[result for run in runs for result in eval_results(run)] or None,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {facts.repo.split('/')[-1]}\n",
        "Photon answers questions about whole CT and MR scans. A scan becomes visual tokens; for each question the "
        "model keeps those that it needs and deletes the rest "
        "([arXiv 2603.25155](https://arxiv.org/abs/2603.25155)).\n",
        f"{NOT_VALIDATED}\n",
        "## Use\n\nInstall `requirements.txt` of this repository, then:\n\n" + CODE.format(repo=facts.repo) + "\n",
        "## Model\n\n" + model_table(config, volumes) + "\n",
        "## Training\n\n" + training_text(facts) + "\n",
        "## Results\n\n" + results_text(runs) + "\n",
        f"## Licence\n\n{licence_text(facts)}\n",
    ]
    return "\n".join(parts)


def model_table(config, volumes):
    """What the model is, as a table: sizes, where it cuts, how it reads scans."""
    text, vision = config["text_config"], config["vision_config"]
    tokens = 1
    for size in volumes["grid"]:
        tokens *= size // volumes["patch_size"]
    rows = {
        "decoder": f"{text['num_hidden_layers']} layers, width {text['hidden_size']}",
        "vision tower": f"{vision['depth']} layers, width {vision['hidden_size']}",
        "visual tokens of a scan": tokens // volumes["merge_size"] ** 2,
        "cut": "before the first decoder layer" if config["scheduler_layer"] == -1
               else f"after decoder layer {config['scheduler_layer']}",
        "saliency": config.get("saliency"),
        "grid": f"{' × '.join(map(str, volumes['grid']))} voxels of {' × '.join(map(str, volumes['spacing']))} mm",
        "CT window": f"{volumes['window'][0]:g} to {volumes['window'][1]:g} HU",
        "weights": config.get("dtype") or config.get("torch_dtype"),
    }  # fmt: skip
    return table(["", ""], [[name, value] for name, value in rows.items() if value is not None])


def training_text(facts):
    """Base, data and settings of the training."""
    lines = []
    if facts.base_model:
        lines.append(f"From [{facts.base_model}](https://huggingface.co/{facts.base_model}).")
    lines.append(f"Data: {facts.training_data}" if facts.training_data else "The training data are not described.")
    if facts.datasets:
        names = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in facts.datasets)
        lines.append(f"Data sets: {names}.")
    if facts.training is not None:
        settings = json.loads(Path(facts.training, "run.json").read_text(encoding="utf-8"))
        kept = [[name.replace("_", " "), settings[name]] for name in TRAINING if settings.get(name) not in (None, "")]
        lines.append("\n" + table(["setting", ""], kept))
    return "\n".join(lines)


def read_run(folder):
    """scores.json and run.json of an evaluate_hf.py run. Raises `ValueError` where it is not complete."""
    try:
        scores, run = (
            json.loads(Path(folder, name).read_text(encoding="utf-8")) for name in ("scores.json", "run.json")
        )
    except FileNotFoundError as error:
        raise ValueError(
            f"A folder of --results has no {Path(error.filename).name}; give one of evaluate_hf.py."
        ) from None
    return {"scores": scores, "run": run}


def eval_results(run):
    """The `EvalResult`s of a run, one a task and figure."""
    scores, found = run["scores"], []
    name = scores["benchmark"]
    percent = round(100 * scores["scores"]["resampling"]["interval"])
    for task, entry in scores["scores"]["tasks"].items():
        for metric, figure in entry["figures"].items():
            ends = [round(figure[end], 4) for end in ("low", "high") if figure.get(end) is not None]
            found.append(
                EvalResult(
                    task_type="visual-question-answering",
                    dataset_type=name,
                    dataset_name=f"{name}: {task}" if task else name,
                    metric_type="accuracy" if metric.startswith("accuracy") else metric,
                    metric_name=f"{task} {metric}".strip(),
                    metric_value=round(figure["value"], 4),
                    metric_args={f"interval_{percent}": ends} if ends else None,
                )
            )
    return found


def results_text(runs):
    """The figures of all runs with their intervals, beside what answers without the scan reach."""
    if not runs:
        return "No evaluation is given here."
    rows = []
    for run in runs:
        scores, settings = run["scores"], run["run"]
        kept = f"{100 * scores['kept']['mean']:.1f} %" if scores["kept"] else "all"
        for task, entry in scores["scores"]["tasks"].items():
            for name, figure in entry["figures"].items():
                blind = [b[name] for b in entry.get("baselines") or () if b.get(name) is not None]
                interval = "" if figure.get("low") is None else f" ({figure['low']:.3f} to {figure['high']:.3f})"
                rows.append([scores["benchmark"], task, name.replace("_", " "), f"{figure['value']:.3f}{interval}",
                             f"{max(blind):.3f}" if blind else "", kept, entry["questions"], entry["patients"],
                             settings["scheduler"]])  # fmt: skip
    names = "benchmark|task|figure|value (interval)|best without the scan|kept|questions|patients|selection".split("|")
    first = runs[0]["scores"]["scores"]["resampling"]
    note = f"Intervals are {round(100 * first['interval'])} % by {first['unit']}, {first['resamples']} resamples."
    return f"{table(names, rows)}\n\n{note} Made by `evaluate_hf.py`."


def licence_text(facts):
    """Which licence the weights and the code have."""
    if facts.base_model == RELEASE:
        return (
            f"Weights: those of the authors' release, under its terms ({facts.licence}). Code: Apache-2.0; see NOTICE."
        )
    return f"Weights: {facts.licence}. Code: Apache-2.0; see NOTICE. Training data have licences of their own."


def table(names, rows):
    """A Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
