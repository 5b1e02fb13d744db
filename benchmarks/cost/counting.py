"""Operations that a model does: twice the multiply-adds, of products of matrices and of attention.

A prompt has `lead` tokens in front of its scan, `visual` tokens, and `rest` tokens behind it, the first of which
closes the scan. The layers up to `cut` (`scheduler_layer`) see all of them, those above it `kept` visual tokens. All
that runs is counted, scoring by logits and deciding too, except rotary phases, norms and work on single numbers.

A causal layer needs half of its square, and kernels differ in how much of the rest they leave out. `causal` says which
share is counted: 0.5 is what must be done, 1 what torch's `FlopCounterMode` counts.
"""

from dataclasses import dataclass

CAUSAL = 0.5
STATISTICS = 12  # of a row's saliency, which the threshold is predicted from


@dataclass(frozen=True)
class Prompt:
    grid: tuple  # patches of the scan along depth, height, width
    visual: int
    lead: int
    rest: int
    question: int  # how many of `rest` are the question

    @property
    def length(self):
        return self.lead + self.visual + self.rest

    @property
    def shared(self):
        """How many tokens do not depend on the question."""
        return self.lead + self.visual + 1

    def kept(self, share):
        return round(share * self.visual)


@dataclass(frozen=True)
class Operations:
    """Of products with weights, and of attention. `last`: of the last product of each block, which a checkpointed one
    leaves out when it runs again; `adapters`: of products with adapters, in addition."""

    linear: float = 0.0
    attention: float = 0.0
    last: float = 0.0
    adapters: float = 0.0

    def __add__(self, other):
        return Operations(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __mul__(self, times):
        return Operations(*(times * a for a in self.parts))

    @property
    def parts(self):
        return self.linear, self.attention, self.last, self.adapters

    @property
    def total(self):
        return self.linear + self.attention + self.adapters


class Work:
    """Operations of one model's answers and steps.

    Args: config: of Photon or of Qwen2.5-VL; cut: the last layer that sees the whole prompt; causal: see above; rank:
        of adapters on all products of the decoder, 0 for none.
    """

    def __init__(self, config, cut=-1, causal=CAUSAL, rank=0):
        self.text, self.vision, self.causal, self.rank = config.text_config, config.vision_config, causal, rank
        self.threshold_width = self.text.hidden_size // getattr(config, "threshold_hidden_divisor", 8)
        size = getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads
        self.queries, self.keys = size * self.text.num_attention_heads, size * self.text.num_key_value_heads
        self.below = cut + 1
        self.above = self.text.num_hidden_layers - self.below

    # --- parts

    def layer(self, new, past=0):
        """One decoder layer for `new` tokens that also attend to `past` ones."""
        hidden, wide = self.text.hidden_size, self.text.intermediate_size
        weights = 2 * hidden * (self.queries + self.keys) + 3 * hidden * wide
        sides = 2 * (hidden + self.queries) + 2 * (hidden + self.keys) + 3 * (hidden + wide)
        pairs = new * (past + self.causal * new)
        last = hidden * (self.rank or wide)
        return Operations(2 * weights * new, 4 * self.queries * pairs, 2 * last * new, 2 * self.rank * sides * new)

    def tower(self, grid):
        """The vision tower for one scan of `grid` (t, h, w) patches."""
        vision, (t, h, w) = self.vision, grid
        patches, width, window = t * h * w, vision.hidden_size, vision.window_size // vision.patch_size
        windows = t * _pairs(h, window) * _pairs(w, window)  # a depth slab's windows, smaller ones at its border
        linear = 2 * patches * (4 * width**2 + 3 * width * vision.intermediate_size) * vision.depth
        pairs = [t * (h * w) ** 2 if i in vision.fullatt_block_indexes else windows for i in range(vision.depth)]
        last = 2 * patches * width * vision.intermediate_size * vision.depth
        return Operations(linear, 4 * width * sum(pairs), last)

    def embedding(self, grid):
        """The patch embedding."""
        vision, (t, h, w) = self.vision, grid
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return Operations(2 * t * h * w * pixels * vision.hidden_size)

    def merger(self, grid):
        vision, (t, h, w) = self.vision, grid
        merged = vision.hidden_size * vision.spatial_merge_size**2
        tokens = t * h * w // vision.spatial_merge_size**2
        last = 2 * tokens * merged * vision.out_hidden_size
        return Operations(2 * tokens * merged**2 + last, last=last)

    def encoder(self, grid):
        return self.embedding(grid) + self.tower(grid) + self.merger(grid)

    def head(self, places=1):
        return Operations(2 * self.text.hidden_size * self.text.vocab_size * places)

    def score(self, prompt, visual_keys=True):
        """Saliency and threshold; with the cut before layer 0, whose queries and keys no layer has made, these of the
        question too, and keys of the scan unless they are there."""
        hidden, question = self.text.hidden_size, prompt.question
        projected = question * (self.queries + self.keys) + (prompt.visual * self.keys if visual_keys else 0)
        projected = 0 if self.below else projected
        compared = self.queries * (question**2 + question) + self.keys * prompt.visual
        return Operations(2 * (hidden * projected + compared + (STATISTICS + 1) * self.threshold_width))

    # --- answers, to the first token

    def decoder(self, prompt, kept=None):
        """The layers on a whole prompt; kept=None cuts nothing."""
        if kept is None:
            return self.layer(prompt.length) * (self.below + self.above)
        return self.layer(prompt.length) * self.below + self.layer(prompt.length - prompt.visual + kept) * self.above

    def prefill(self, prompt, kept=None):
        """Decoder and head on a scan that the vision tower has encoded."""
        scored = Operations() if kept is None else self.score(prompt)
        return (self.decoder(prompt, kept) + scored + self.head()).total

    def whole(self, prompt, kept=None):
        """Scan and question."""
        return self.encoder(prompt.grid).total + self.prefill(prompt, kept)

    def encode(self, prompt, reuse="exact"):
        """What questions on a scan share."""
        behind = self.layer(prompt.shared if reuse == "select" else prompt.lead) * self.above
        if self.below == 0:  # the keys by which the first layer scores
            behind += Operations(2 * self.text.hidden_size * self.keys * prompt.shared)
        return (self.encoder(prompt.grid) + self.layer(prompt.shared) * self.below + behind).total

    def further(self, prompt, kept, reuse="exact"):
        """A further question on an encoded scan."""
        text = prompt.rest - 1
        if reuse == "select":
            above = self.layer(text, prompt.lead + kept + 1)
        else:
            above = self.layer(kept + prompt.rest, prompt.lead)
        scored = self.score(prompt, visual_keys=False)
        return (self.layer(text, prompt.shared) * self.below + scored + above * self.above + self.head()).total

    # --- training

    def step(self, prompt, kept, labels, scans=1, questions=1, stock=False):
        """A training step with checkpointing: forward, every block again, and back by inputs and by weights.

        Args: labels: tokens to learn in each question's prompt; scans, questions: of the batch; stock: Qwen2.5-VL
            makes the logits of all places, once, and does not run its merger again. With adapters (`rank`) the weights
            themselves have no gradient, except the patch embedding's.
        """
        weights = 1 if self.rank else 2  # times the forward's, on the way back
        blocks = self.tower(prompt.grid) * scans + self.decoder(prompt, kept) * questions
        merger = self.merger(prompt.grid) * scans
        if not stock:
            blocks, merger = blocks + merger, Operations()
        total = blocks.total * 2 - blocks.last  # forward, and again
        total += weights * blocks.linear + 2 * (blocks.attention + blocks.adapters)
        total += (1 + weights) * merger.linear + 2 * self.embedding(
            prompt.grid
        ).linear * scans  # voxels have no gradient
        places, runs = (prompt.length, 1) if stock else (labels, 2)
        total += (runs + weights) * self.head(places).linear * questions
        if kept is not None:  # with the scoring layer, which is checkpointed; a cut before layer 0 scores once
            total += self.score(prompt).linear * questions * (2 if self.below else 1)
        return total


def _pairs(length, window):
    """Sum of squares of the lengths of the windows along an axis."""
    whole, rest = divmod(length, window)
    return whole * window**2 + rest**2
