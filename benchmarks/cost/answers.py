"""What is timed of answering: whole prompts, the decoder alone, encodings, further questions, sixteen at once."""

from functools import partial

from .models import text_of
from .timing import Case, answer, prefill, take_turns, timed

SHARES, MAIN, FRONT = (0.39, 0.20, 0.10, 0.04), 0.39, 0.10
BATCHES = (1, 4, 16)
REUSED = {  # how a scan is shared: which model, share of the tokens, `reuse`, and the same question asked alone
    "exact": ("quarter", MAIN, "exact", f"L/4-1 {MAIN:.0%}"),
    "front": ("front", FRONT, "exact", f"front {FRONT:.0%}"),
    "select": ("quarter", MAIN, "select", f"L/4-1 {MAIN:.0%}"),
}
CUTS = {"L/4-1": "quarter", "front": "front"}


class Answers:
    """The cases of a bench. tokens: of an answer; questions: on one scan at once."""

    def __init__(self, bench, tokens, questions):
        self.bench, self.tokens, self.questions, self.cases = bench, tokens, questions, {}
        self._whole_prompts()
        self._prefills()
        self._encoded()

    def measure(self, allocated_bytes):
        take_turns(self.cases)
        for case in self.cases.values():
            if case.about["batch"] == 1:
                case.peak = allocated_bytes(case.run, self.bench.device)

    def _add(self, name, run, work, slow=False, **about):
        repeats = self.bench.settings["few" if slow else "repeats"]
        self.cases[name] = Case(run, work, repeats, {"batch": 1, "kept": self.bench.prompt.visual} | about)

    def _answer(self, model, tokens, **inputs):
        return partial(answer, model, self.bench.clock, tokens, **inputs)

    def _whole_prompts(self):
        bench, prompt = self.bench, self.bench.prompt
        video = self._answer(bench.models.stock, self.tokens, **bench.video_inputs())
        self._add("video", video, bench.work["video"].whole(bench.video), True, kept=bench.video.visual)
        for batch in BATCHES:
            inputs, at, slow = bench.inputs(batch), "" if batch == 1 else f" x{batch}", batch > 1
            tokens = 1 if slow else self.tokens
            dense = self._answer(bench.models.quarter, tokens, **inputs, use_scheduler=False)
            self._add(f"dense{at}", dense, batch * bench.work["quarter"].whole(prompt), slow, batch=batch)
            for cut, name in CUTS.items():
                for share in (MAIN,) if slow else SHARES:
                    kept = prompt.kept(share)
                    work = batch * bench.work[name].whole(prompt, kept)
                    run = self._answer(getattr(bench.models, name), tokens, **inputs, token_budget=kept)
                    self._add(f"{cut} {share:.0%}{at}", run, work, slow, batch=batch, kept=kept)

    def _prefills(self):
        bench, prompt = self.bench, self.bench.prompt
        for share in (1.0, MAIN, 0.10):
            kept = None if share == 1 else prompt.kept(share)
            run, work = timed(prefill(bench, prompt, kept), bench.clock), bench.work["quarter"].prefill(prompt, kept)
            self._add(f"prefill {share:.0%}", run, work, kept=prompt.kept(share))

    def _encoded(self):
        bench, prompt, clock = self.bench, self.bench.prompt, self.bench.clock
        inputs = bench.inputs()
        text, many = text_of(inputs), text_of(bench.inputs(self.questions))
        for name, (which, share, reuse, _) in REUSED.items():
            model, work, kept = getattr(bench.models, which), bench.work[which], prompt.kept(share)
            encoding, further = work.encode(prompt, reuse), work.further(prompt, kept, reuse)
            make = partial(model.encode_scan, **inputs, reuse=reuse)
            self._add(f"encode {name}", timed(make, clock), encoding)
            run = self._answer(model, self.tokens, **text, token_budget=kept, scan=make())
            self._add(f"further {name}", run, further, kept=kept)

            def sixteen(model=model, make=make, kept=kept):
                model.generate(**many, scan=make(), token_budget=kept, max_new_tokens=1, do_sample=False)

            work = encoding + self.questions * further
            about = {"kept": kept, "batch": self.questions}
            self._add(f"sixteen {name}", timed(sixteen, clock), work, self.bench.settings["few"] > 1, **about)

    # --- figures

    def ratio(self, slow, fast, times=1):
        """How many times faster one case is than another: measured, and by operations."""
        a, b = self.cases[slow], self.cases[fast]
        return times * a.seconds / b.seconds, times * a.work / b.work

    def table(self):
        rows = []
        for name, case in self.cases.items():
            of = "prefill 100%" if name.startswith("prefill") else "video"
            (measured, bound), batch = self.ratio(of, name), case.about["batch"]
            others = case.other_seconds
            rows.append({
                "case": name, **case.about, "GFLOP": case.work / 1e9, "first token s": case.seconds,
                "tokens/s": batch * (self.tokens - 1) / others if others and batch == 1 else "",
                "GFLOP/s": case.work / 1e9 / case.seconds,
                "of": of, "faster": measured * batch, "bound": bound * batch, "reached": measured / bound,
                "peak MiB": "" if case.peak is None else case.peak / 2**20,
            })  # fmt: skip
        return rows

    def ratios(self):
        """Ratios of time, each beside its bound in operations; and of memory."""
        ratios, many = {}, self.questions
        pairs = [(f"further_{name}", alone, f"further {name}", 1) for name, (*_, alone) in REUSED.items()]
        pairs += [(f"sixteen_{name}", alone, f"sixteen {name}", many) for name, (*_, alone) in REUSED.items()]
        pairs += [
            ("sixteen_vs_video", "video", "sixteen exact", many),
            ("prefill_39", "prefill 100%", "prefill 39%", 1),
            ("prefill_10", "prefill 100%", "prefill 10%", 1),
            ("answer_39_vs_video", "video", "L/4-1 39%", 1),
            ("answer_10_front_vs_video", "video", "front 10%", 1),
        ]
        for name, slow, fast, times in pairs:
            ratios[name], ratios[f"{name}_bound"] = self.ratio(slow, fast, times)
        ratios["answer_memory_39_vs_video"] = self.cases["L/4-1 39%"].peak / self.cases["video"].peak
        return ratios
