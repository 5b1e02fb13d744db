"""benchmarks/efficiency.py and plan.py at a tiny size: what they count is what is done, and every ratio is there."""

import importlib
import json
import sys

import pytest
import torch
from test_training_benchmark import SETTINGS
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT

CPU = torch.device("cpu")
SCHEDULER = {
    "saliency": "logits", "saliency_scale": "minmax", "saliency_gradient": False, "surrogate": "release",
    "keep_budget": None,
}  # fmt: skip
TINY = {
    "config": SETTINGS["config"] | SCHEDULER, "volume": SETTINGS["volume"], "lead": 6, "rest": 9, "question": 3,
    "learned": 3, "rank": 2, "repeats": 1, "few": 1, "growth": (8, 16, 32), "measured": 8, "prefilled": 16,
    "patches": 32,
}  # fmt: skip
EXACTLY = 0.005  # rotary phases are products of matrices too, and are not counted


@pytest.fixture(scope="module", autouse=True)
def path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


def module(name):
    return importlib.import_module(name)


@pytest.fixture
def bench():
    """Eager attention does the whole square, and so it is counted here."""
    return module("cost.models").Bench(TINY, CPU, torch.float32, "eager", causal=1.0)


def done(function, *args, **kwargs):
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return pytest.approx(counter.get_total_flops(), rel=EXACTLY)


@torch.no_grad()
def test_operations_of_whole_prompts(bench):
    options, prompt = {"use_cache": True, "logits_to_keep": 1}, bench.prompt
    assert bench.work["video"].whole(bench.video) == done(bench.models.stock, **bench.video_inputs(), **options)
    inputs = bench.inputs(2)
    for name in ("quarter", "front"):
        model, work = getattr(bench.models, name), bench.work[name]
        assert work.below == model.config.scheduler_layer + 1
        assert 2 * work.whole(prompt) == done(model, **inputs, **options, use_scheduler=False)
        for kept in (6, 2):
            assert 2 * work.whole(prompt, kept) == done(model, **inputs, **options, token_budget=kept)


@torch.no_grad()
@pytest.mark.parametrize("reuse", ["exact", "select"])
def test_operations_of_further_questions(bench, reuse):
    prompt, one = bench.prompt, bench.inputs()
    text = {name: bench.inputs(2)[name] for name in ("input_ids", "attention_mask")}
    for name in ("quarter", "front"):
        model, work = getattr(bench.models, name), bench.work[name]
        assert work.encode(prompt, reuse) == done(model.encode_scan, **one, reuse=reuse)
        options = {"use_cache": True, "logits_to_keep": 1, "token_budget": 6}
        answered = done(model, **text, **options, scan=model.encode_scan(**one, reuse=reuse))
        assert 2 * work.further(prompt, 6, reuse) == answered


@pytest.mark.parametrize("rank", [0, 2])
def test_operations_of_steps(bench, rank):
    steps = module("cost.steps")
    models = steps.trainable(bench)
    if rank:
        models = [steps.with_adapters(model, rank) for model in models]
    for name, step in steps.steps_of(bench, models, 0.39, 4, rank).items():
        assert step.work == done(step.backward), name


def test_holders_find_what_the_profiler_finds(bench):
    """The peak of a forward, where no gradient is left out; and logits are the largest where all are made."""
    steps, holders = module("cost.steps"), module("cost.holders")
    model, made = bench.models.stock, module("training").allocated_bytes
    step = steps.steps_of(bench, (model, bench.models.quarter), 0.39, 2)["video"]
    for way in (torch.no_grad, torch.enable_grad):
        with way():
            found = holders.Holders(model)
            with found:
                output = model(**step.inputs)
            del output
            assert found.peak == pytest.approx(made(lambda: model(**step.inputs), CPU), rel=0.1)
    found = step.holders()
    assert {row["way"] for row in found.table()} >= {"forward", "back"}
    table = found.table(rows=3)
    assert len(table) == 4 and sum(row["MiB"] for row in table) * holders.MIB == pytest.approx(found.peak)
    assert not any(p.grad is not None for p in model.parameters())


def test_the_presets_keep_the_proportions():
    """Vision, first quarter, rest; and the sizes that the method's arithmetic gives at 3B."""
    bounds, presets = module("cost.bounds"), module("cost.presets").PRESETS
    small, full = (bounds.proportions(presets[name]) for name in ("cpu", "3b"))
    for part in ("vision", "first quarter", "rest"):
        assert small[part] == pytest.approx(full[part], abs=0.03)
    rows, ratios = bounds.counted(presets["3b"], 16)
    work = {row["case"]: row["TFLOP"] for row in rows}
    assert work["L/4-1 39%"] == pytest.approx(8.5, rel=0.05) and work["video"] == pytest.approx(82, rel=0.05)
    assert 4 < ratios["further_exact_bound"] < 5 and ratios["training_grouped_bound"] > 2


@pytest.mark.parametrize("preset", ["3b", "7b"])
def test_the_large_presets_build(preset):
    bench = module("cost.models").Bench(
        module("cost.presets").PRESETS[preset], torch.device("meta"), torch.bfloat16, "sdpa"
    )
    assert bench.prompt.visual == 1000 and bench.video.visual == 7000
    names = {name: parameter.shape for name, parameter in bench.models.quarter.named_parameters()}
    assert {name: parameter.shape for name, parameter in bench.models.front.named_parameters()} == names
    assert bench.inputs(2)["input_ids"].shape == (2, bench.prompt.length)


def test_table_and_ratios(tmp_path, monkeypatch, capsys):
    efficiency, file = module("efficiency"), tmp_path / "results" / "efficiency.json"
    monkeypatch.setitem(efficiency.PRESETS, "tiny", TINY)
    monkeypatch.setattr(efficiency, "QUESTIONS", 4)
    options = ["--preset", "tiny", "--json", str(file), "--plot", str(tmp_path / "growth.png")]
    monkeypatch.setattr(sys, "argv", ["efficiency.py", *options])
    efficiency.main()
    result = json.loads(file.read_text(encoding="utf-8"))
    assert {"device", "date", "rows", "ratios"} <= set(result)
    ratios = result["ratios"]
    for name in ("further_exact", "further_front", "further_select", "sixteen_exact", "sixteen_vs_video", "prefill_39",
                 "prefill_10", "training_grouped", "step_vs_video"):  # fmt: skip
        assert ratios[name] > 0 and ratios[f"{name}_bound"] > 1, name
    for at in ("", "_lora"):
        for name in ("step_activation_memory_vs_video", "step_memory_vs_video", "step_hard_memory_vs_dense"):
            assert 0 < ratios[f"{name}{at}"] <= 1.01, name  # weights count for most at this size
        assert ratios[f"training_grouped_gradient_difference{at}"] < 1e-5
    rows = {row["case"]: row for row in result["rows"]}
    assert rows["video"]["kept"] == 112 and rows["dense"]["kept"] == 16 and rows["L/4-1 39%"]["kept"] == 6
    assert rows["dense x16"]["GFLOP"] == pytest.approx(16 * rows["dense"]["GFLOP"])
    assert all(row["reached"] == pytest.approx(row["faster"] / row["bound"]) for row in rows.values())
    assert [row["tokens"] for row in result["growth"]] == [8, 16, 32]
    assert result["growth"][0]["dense s"] > 0 and result["growth"][1]["dense s"] == ""
    assert result["growth"][1]["prefill 10% s"] > 0 and result["growth"][2]["prefill 10% s"] == ""
    assert [row["questions"] for row in result["questions"]] == [1, 2, 4, 8, 16, 32]
    names = [f"{kind} {name}" for kind in ("full", "lora") for name in ("video", "dense", "hard", "apart", "grouped")]
    assert [row["step"] for row in result["training"]] == names
    assert set(result["holders"]) == {name for name in names if not name.endswith(("apart", "grouped"))}
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert "further_exact_bound" in capsys.readouterr().out


MIDDLE = {
    **TINY, "volume": (56, 112, 112), "rest": 12, "rank": 8,
    "config": TINY["config"] | {
        "text_config": SETTINGS["config"]["text_config"] | {
            "hidden_size": 96, "num_hidden_layers": 8, "intermediate_size": 516, "vocab_size": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        "vision_config": SETTINGS["config"]["vision_config"] | {
            "hidden_size": 72, "intermediate_size": 96, "out_hidden_size": 96
        },
    },
}  # fmt: skip


def test_planned_memory_is_what_holders_find():
    steps, planning = module("cost.steps"), module("cost.planning")
    bench = module("cost.models").Bench(MIDDLE, CPU, torch.float32, "sdpa")
    plan, models = planning.Plan(MIDDLE, 4), steps.trainable(bench)
    assert plan.parameters()[0] == sum(p.numel() for p in bench.models.quarter.parameters())
    for rank in (0, 8):
        if rank:
            models = [steps.with_adapters(model, rank) for model in models]
            trained = sum(p.numel() for p in models[1].parameters() if p.requires_grad)
            assert plan.parameters(rank)[1] == trained
        made = steps.steps_of(bench, models, 0.39, 4, rank)
        for name in steps.MEASURED:
            planned = plan.activations(name, bench.prompt.kept(0.39))
            assert planned == pytest.approx(made[name].holders().peak, rel=0.15), name


def test_a_plan_is_checked_against_a_measurement(tmp_path, monkeypatch, capsys):
    """A measurement that is made of the plan's own figures is predicted without an error."""
    plan_file, planning, file = module("plan"), module("cost.planning"), tmp_path / "made.json"
    monkeypatch.setitem(plan_file.PRESETS, "tiny", TINY)
    monkeypatch.setattr(planning, "RETURNED", 2**14)  # so that some of the tiny tensors are new memory
    plan = planning.Plan(TINY, 4)
    rates = planning.Rates(vision=3e9, decoder=5e9, adapters=4e8, fixed=0.01, cut=0.004, new=2e-9, step=1.2)
    kept, whole = plan.of("hard")[1].kept(0.39), plan.of("hard")[1].visual
    encoding, further = plan.further_seconds(rates, "hard", kept, batch=16)
    _, prompt, work = plan.of("dense")
    assert plan.new_memory("dense", None, 16, 16) > 0
    assert plan.new_memory("dense") == plan.new_memory("hard", kept) == 0
    times = {
        "prefill 100%": (1, whole, rates.seconds(work.prefill(prompt), 0.0), work.prefill(prompt)),
        "dense": (1, whole, plan.answer_seconds(rates, "dense"), work.whole(prompt)),
        "L/4-1 39%": (1, kept, plan.answer_seconds(rates, "hard", kept), 1.0),
        "encode exact": (1, whole, encoding, 1.0),
        "sixteen exact": (16, kept, encoding + further, 1.0),
        "further select": (1, kept, plan.further_seconds(rates, "hard", kept, "select")[1], 1.0),
        "dense x16": (16, whole, plan.answer_seconds(rates, "dense", batch=16), 1.0),
        "L/4-1 39% x16": (16, kept, plan.answer_seconds(rates, "hard", kept, 16), 1.0),
    }
    rows = [
        {"case": name, "batch": batch, "kept": left, "first token s": seconds, "GFLOP": flop / 1e9,
         "tokens/s": 1 / rates.fixed}
        for name, (batch, left, seconds, flop) in times.items()
    ]  # fmt: skip
    training = [
        {"step": f"full {name}", "questions": 1, "s": plan.step_seconds(rates, name, kept),
         "activations MiB": plan.activations(name, kept) / 2**20}
        for name in ("video", "dense", "hard")
    ] + [
        {"step": f"lora {name}", "questions": 1, "s": plan.step_seconds(rates, name, kept, rank=TINY["rank"]),
         "activations MiB": ""}
        for name in ("dense", "hard")
    ]  # fmt: skip
    result = {"device": "a", "date": "b", "dtype": "float32", "rows": rows, "training": training}
    file.write_text(json.dumps(result), encoding="utf-8")
    options = ["plan.py", "--preset", "tiny", "--measured", str(file), "--json", str(tmp_path / "plan.json")]
    monkeypatch.setattr(sys, "argv", options)
    plan_file.main()
    checked = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert len(checked["rows"]) == 4 + 3 + 3
    assert checked["ratios"]["time_worst"] < 1e-6 and checked["ratios"]["memory_worst"] < 1e-6
    monkeypatch.setattr(sys, "argv", ["plan.py", "--preset", "tiny", "--batch", "4", "--scans", "1", "--gpus", "2"])
    capsys.readouterr()
    plan_file.main()
    printed = capsys.readouterr().out
    assert "questions/s" in printed and "further" in printed
