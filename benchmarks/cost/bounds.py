"""What the operation count alone says of a preset. No model is built."""

import numpy as np
from training import configs, frame_patches, volume_patches

from .answers import FRONT, MAIN, SHARES
from .counting import Work
from .presets import prompt_of


class Count:
    """Prompts and `Work` of a preset: of a video, and of Photon with the cut at L/4 - 1 and before layer 0."""

    def __init__(self, settings):
        self.config, stock = configs(settings["config"])
        volume = np.zeros(settings["volume"], dtype=np.float32)
        self.prompt, self.video = (
            prompt_of(settings, self.config, grid)
            for grid in (volume_patches(volume, self.config)[1], frame_patches(volume, stock)[1])
        )
        self.stock, self.front = Work(stock), Work(self.config)
        self.quarter = Work(self.config, self.config.scheduler_layer)


def proportions(settings):
    """Shares of vision, first quarter and rest of a prompt at 39 %, in operations."""
    count = Count(settings)
    work, prompt = count.quarter, count.prompt
    whole = work.whole(prompt, prompt.kept(MAIN))
    vision, first = work.encoder(prompt.grid).total, (work.layer(prompt.length) * work.below).total
    return {"vision": vision / whole, "first quarter": first / whole, "rest": 1 - (vision + first) / whole}


def counted(settings, questions):
    """Rows of operations, and the bounds that they give."""
    count, learned = Count(settings), settings["learned"]
    prompt, quarter, front = count.prompt, count.quarter, count.front
    main, few = prompt.kept(MAIN), prompt.kept(FRONT)
    of = {"video": count.stock.whole(count.video), "dense": quarter.whole(prompt)}
    of |= {f"L/4-1 {share:.0%}": quarter.whole(prompt, prompt.kept(share)) for share in SHARES}
    of |= {f"front {share:.0%}": front.whole(prompt, prompt.kept(share)) for share in SHARES}
    for name, work, kept, reuse in (
        ("exact", quarter, main, "exact"), ("front", front, few, "exact"), ("select", quarter, main, "select")
    ):  # fmt: skip
        of |= {f"encode {name}": work.encode(prompt, reuse), f"further {name}": work.further(prompt, kept, reuse)}
        of[f"sixteen {name}"] = of[f"encode {name}"] + questions * of[f"further {name}"]
    step = {"video": count.stock.step(count.video, None, learned, stock=True)}
    step |= {"dense": quarter.step(prompt, None, learned), "hard": quarter.step(prompt, main, learned)}
    step["apart"] = quarter.step(prompt, main, learned, questions, questions)
    step["grouped"] = quarter.step(prompt, main, learned, 1, questions)
    of |= {f"step {name}": work for name, work in step.items()}
    alone = {"exact": of["L/4-1 39%"], "front": of["front 10%"], "select": of["L/4-1 39%"]}
    ratios = dict(proportions(settings))
    ratios |= {f"further_{name}_bound": work / of[f"further {name}"] for name, work in alone.items()}
    ratios |= {f"sixteen_{name}_bound": questions * work / of[f"sixteen {name}"] for name, work in alone.items()}
    ratios |= {
        "sixteen_vs_video_bound": questions * of["video"] / of["sixteen exact"],
        "prefill_39_bound": quarter.prefill(prompt) / quarter.prefill(prompt, main),
        "prefill_10_bound": quarter.prefill(prompt) / quarter.prefill(prompt, few),
        "training_grouped_bound": step["apart"] / step["grouped"],
        "step_vs_video_bound": step["video"] / step["hard"],
    }
    return [{"case": name, "TFLOP": work / 1e12} for name, work in of.items()], ratios
