"""Questions about phantoms that cannot be answered without the scan.

Within a split each question text has each of its answers equally often, so that the blind baseline (the best answer
from the text) is chance.
"""

import itertools
import math
from collections import Counter, defaultdict

from photon.phantoms.anatomy import COUNT_ORGANS, FOV_ORGANS, LABELS, LESION_ORGANS
from photon.phantoms.patient import CHANGES, stream

PAIRS = ("kidney", "lung")
ANSWERS = {
    "presence": ("yes", "no"),
    "side": ("left", "right"),
    "count": ("0", "1", "2", "3"),
    "largest": ("liver", "spleen", "kidney", "lung"),
    "size_open": None,  # the diameters' classes
    "size_choice": None,
    "attenuation": ("hypodense", "hyperdense"),
    "fov": ("yes", "no"),
    "comparison": CHANGES,
}
QUESTIONS = {
    "presence": ("Is there a lesion in the {key}?", "Does the {key} contain a lesion?"),
    "side": ("Which {key} has a lesion, left or right?", "On which side is the {key} lesion, left or right?"),
    "count": ("How many lesions are in the {key}?", "Count the lesions in the {key}."),
    "largest": ("Which organ has the largest lesion: liver, spleen, kidney or lung?",),
    "size_open": ("What is the diameter of the lesion in the {key}, in mm to the nearest {step}?",),
    "size_choice": ("What is the diameter of the lesion in the {key}? {options}",),
    "attenuation": ("Is the lesion in the {key} hypodense or hyperdense?",),
    "fov": ("Is the {key} outside the field of view?", "Has the field of view left out the {key}?"),
    "comparison": ("From the first scan to the second, is the lesion in the {key} grown, shrunk, unchanged or new?",),
}


def scan_questions(facts, config):
    """Yields (task, key, answer) of each question about one scan whose answer is certain."""
    coverage = {name: facts["organs"][name]["coverage"] for name in FOV_ORGANS}
    complete = {name for name, share in coverage.items() if share == 1 and not facts["organs"][name]["touches_edge"]}
    found = defaultdict(list)
    for lesion in facts["lesions"]:
        found[lesion["organ"]].append(lesion)
    for name in FOV_ORGANS:  # no question about an organ that the field of view cuts through
        if name in complete or (coverage[name] == 0 and facts["organs"][name]["volume_ml"] == 0):
            yield "fov", name, "no" if name in complete else "yes"
    for name in LESION_ORGANS:
        if name in complete:
            yield "presence", name, "yes" if found[name] else "no"
        if name in complete and name in COUNT_ORGANS:
            yield "count", name, str(len(found[name]))
        if name in complete and len(found[name]) == 1:
            diameter = found[name][0]["diameter_mm"]
            nearest = min(config.diameters, key=lambda d, wanted=diameter: abs(d - wanted))
            if abs(nearest - diameter) <= config.diameter_jitter:
                yield "size_open", name, f"{nearest:g}"
                yield "size_choice", name, f"{nearest:g}"
            if "lung" not in name:
                yield "attenuation", name, found[name][0]["attenuation"]
    for pair in PAIRS:
        sides = [side for side in ("left", "right") if found[f"{side} {pair}"]]
        if len(sides) == 1 and {f"left {pair}", f"right {pair}"} <= complete:
            yield "side", pair, sides[0]
    ranked = sorted(facts["lesions"], key=lambda lesion: -lesion["diameter_mm"])
    if ranked and set(LESION_ORGANS) <= complete:
        if len(ranked) == 1 or ranked[0]["diameter_mm"] - ranked[1]["diameter_mm"] >= 4:
            yield "largest", "", ranked[0]["organ"].split()[-1]


def comparisons(first, second):
    """Yields (task, key, answer) of a pair of scans, for each organ with exactly one lesion on the second scan."""
    for lesion in second["lesions"]:
        if sum(other["organ"] == lesion["organ"] for other in second["lesions"]) == 1:
            before, now = lesion["previous_mm"], lesion["diameter_mm"]
            change = "new" if not before else "grown" if now > before else "shrunk" if now < before else "unchanged"
            yield "comparison", lesion["organ"], change


def patient_questions(folder, scans, split, config):
    """Yields one patient's rows, still without text. scans: facts of its scans; folder: of their files."""
    patient = f"p{scans[0]['patient']:05d}"
    asked = [((facts["scan"],), entry) for facts in scans for entry in scan_questions(facts, config)]
    asked += [((0, 1), entry) for entry in comparisons(*scans)] if len(scans) == 2 else []
    for which, (task, key, answer) in asked:
        name = "-".join([patient, "".join(str(s) for s in which), task, *key.split()])
        files = [[f"{folder}/scan{s}{kind}.nii.gz" for s in which] for kind in ("", "_organs", "_lesions")]
        yield {"id": name, "patient": patient, "split": split, "task": task, "key": key, "answer": answer,
               "volumes": files[0], "labels": files[1], "lesions": files[2], "evidence": evidence(key)}  # fmt: skip


def evidence(key):
    """Labels of the organs that a question's key names: one organ, both of a pair, or without a key all six."""
    return [LABELS[name] for name in (LESION_ORGANS if key in ("", *PAIRS) else (key,)) if key in name]


def write_questions(candidates, seed, config):
    """Rows with text, balanced: within a split each text has each of its answers equally often.

    Args:
        candidates: rows of `patient_questions`, of all patients.
        seed: of the order and the wordings.
        config: PhantomConfig.
    Returns:
        rows in the training format, and a Counter of the candidates left over by task.
    """
    cells, rows, left = defaultdict(lambda: defaultdict(list)), [], Counter()
    for row in candidates:
        cells[row["split"], row["task"], row["key"]][row["answer"]].append(row)
    sizes = tuple(f"{d:g}" for d in config.diameters)
    for number, (cell, by_answer) in enumerate(sorted(cells.items())):
        rng = stream(seed, 2**31, number)
        answers = ANSWERS[cell[1]] or sizes
        kept = min(len(by_answer[answer]) for answer in answers)
        left[cell[1]] += sum(len(group) for group in by_answer.values()) - kept * len(answers)
        for repeat in range(config.option_orders if cell[1] == "size_choice" else 1):
            orders = [rng.permutation(len(answers)) for _ in range(kept)]
            for answer in answers:
                group = by_answer[answer]
                for i, pick in enumerate(rng.permutation(len(group))[:kept]):  # each answer's i-th gets the same text
                    row = _word(group[pick], i, [answers[j] for j in orders[i]], answers, config)
                    rows.append({**row, "id": f"{row['id']}-{repeat + 1}"} if repeat else row)
    return sorted(rows, key=lambda row: row["id"]), left


def _word(row, i, options, answers, config):
    row, task = dict(row), row["task"]
    key, answer, wordings = row.pop("key"), row.pop("answer"), QUESTIONS[task]
    step = min(b - a for a, b in itertools.pairwise(config.diameters))
    letters = "ABCDEFGH"[: len(options)]
    listed = " ".join(f"{letter}) {option} mm" for letter, option in zip(letters, options, strict=True))
    text = wordings[i % len(wordings)].format(key=key, options=listed, step=f"{step:g}")
    if task == "size_choice":
        answer, answers = letters[options.index(answer)], tuple(letters)
    prompt = [*({"type": "volume"} for _ in row["volumes"]), {"type": "text", "text": text}]
    reply = [{"type": "text", "text": answer}]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return {**row, "messages": messages, "answer": answer, "choices": None if task == "size_open" else list(answers)}


def letter_rows(config, count, seed):
    """`count` rows of text alone in which the size is told and its letter asked for.

    From questions about scans a small decoder does not learn which letter stands before which size: it learns the
    sizes, and stays at chance on their letters. From these rows it learns that in some hundred steps.
    """
    rng, sizes = stream(seed, 2**31, 2**31), [f"{d:g}" for d in config.diameters]
    for i in range(count):
        options = [sizes[j] for j in rng.permutation(len(sizes))]
        key, answer = LESION_ORGANS[i % len(LESION_ORGANS)], sizes[rng.integers(len(sizes))]
        row = {"id": f"letters-{seed}-{i}", "task": "size_choice", "key": key, "answer": answer, "volumes": []}
        row = _word(row, i, options, sizes, config) | {"task": "letters"}
        part = row["messages"][0]["content"][-1]
        part["text"] = f"The lesion in the {key} measures {answer} mm. {part['text']}"
        yield row


def question_texts(config, count, seed=0):
    """Yields the texts of `count` questions of each task, and of their answers: what a tokenizer should know."""
    rng, sizes = stream(seed, 2**31), [f"{d:g}" for d in config.diameters]
    for task, answers in ANSWERS.items():
        keys = {"side": PAIRS, "fov": FOV_ORGANS}.get(task, LESION_ORGANS)
        for i in range(count):
            options = [sizes[j] for j in rng.permutation(len(sizes))]
            possible = answers or sizes
            row = {"task": task, "key": keys[i % len(keys)], "answer": possible[i % len(possible)], "volumes": ()}
            for message in _word(row, i, options, possible, config)["messages"]:
                yield message["content"][-1]["text"]


def blind_baseline(train, test):
    """Accuracy of the best answer from the text, fitted on train, scored on test.

    Returns:
        {task: (rows in train, rows in test, chance, accuracy)}; accuracy is nan for a task without test rows.
    """
    by_text, overall, table = defaultdict(Counter), defaultdict(Counter), {}
    for row in train:
        by_text[row["task"], question_text(row)][row["answer"]] += 1
        overall[row["task"]][row["answer"]] += 1
    for task in ANSWERS:
        rows = [row for row in test if row["task"] == task]
        guesses = [by_text.get((task, question_text(row))) or overall[task] for row in rows]
        hits = sum(bool(g) and g.most_common(1)[0][0] == row["answer"] for g, row in zip(guesses, rows, strict=True))
        chance = 1 / max(len({row["answer"] for row in rows}), 1)
        table[task] = (sum(overall[task].values()), len(rows), chance, hits / len(rows) if rows else math.nan)
    return table


def question_text(row):
    return row["messages"][0]["content"][-1]["text"]
