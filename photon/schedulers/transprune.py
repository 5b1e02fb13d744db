"""TransPrune (CVPR 2026; github.com/liaolea/TransPrune) at one layer: tokens that change, and that the question
reads.

Taken: token transition variation, for each attention and each MLP module the norm of its output by that of its input,
times the softmax over the visual tokens of 1 - cosine of the two, added up over the last six layers below the cut
(the original: layers 7 to 12) and normalised; plus the attention of all instruction tokens, mean over them and over
heads, normalised likewise. Different: the original prunes at three layers to 87.5, 62.5 and 12.5 %, and this is
its form with a single stage, at `scheduler_layer`; attention is that of the scheduling layer and not of the next one,
and a softmax over the visual tokens alone.
"""

from photon.schedulers.recorders import record_transitions
from photon.schedulers.rows import RowScheduler, top


class TransPruneScheduler(RowScheduler):
    """Keeps the tokens with the highest transition variation and attention together."""

    name = "transprune"
    lowest_layer = 0  # it reads the layers below the cut
    record_layers = staticmethod(record_transitions)

    def choose(self, row, count):
        ratio, cosine = row.more["transitions"].unbind(-1)  # (V, modules) each
        variation = (ratio * (1 - cosine).softmax(0)).sum(-1)
        attention = row.attention(row.queries).mean((0, 1))
        return top(variation / variation.sum() + attention / attention.sum(), count), None
