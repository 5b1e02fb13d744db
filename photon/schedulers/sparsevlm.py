"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417; github.com/Gumpest/SparseVLMs), one stage of it.

Taken: raters are the question tokens that resemble the scan more than the mean question token does (softmax over the
text of visual times text states, mean over the visual tokens); a visual token's score is the raters' attention to it,
mean over heads; of the tokens that go, the 30 % with the highest scores are recycled: clustered (DPC-kNN) into a tenth
as many and one, whose means stay. Different: the original prunes at three layers by fixed lists of counts (2, 6 and 15
of 32), and this is one stage of it, at `scheduler_layer`; raters are found there and not at the input (which is the
same at -1); attention is a softmax over the visual tokens alone; a cluster's mean counts in the budget, at most half
of it, and stands at its centre's place and not at the block's end. SparseVLM+ (v2) leaves the recycling out.
"""

import torch

from photon.schedulers.rows import RowScheduler, top

RECYCLED, CLUSTERS = 0.3, 0.1  # of the tokens that go; of the recycled ones
NEIGHBOURS = 5  # of the density


class SparseVLMScheduler(RowScheduler):
    """Keeps the tokens that raters among the question's words attend to most, and means of clusters of others."""

    name = "sparsevlm"
    needs = frozenset({"hidden_states"})

    def choose(self, row, count):
        score = self.score_row(row)
        recycled = int(RECYCLED * (len(row) - count))
        clusters = min(int(CLUSTERS * recycled) + 1, count // 2, recycled)
        keep = top(score, count - clusters)
        if not clusters:
            return keep, None
        again = top(score.masked_fill(keep, -torch.inf), recycled).nonzero()[:, 0]
        centres, label = density_peaks(row.hidden_states[again].detach(), clusters)
        sums = row.hidden_states.new_zeros(clusters, row.hidden_states.shape[1])
        means = sums.index_add(0, label, row.hidden_states[again]) / label.bincount(minlength=clusters)[:, None]
        keep[again[centres]] = True
        return keep, row.hidden_states.index_copy(0, again[centres], means)

    def score_row(self, row):
        """(V,): the raters' attention."""
        match = (row.hidden_states @ row.question_states.T).softmax(-1).mean(0)  # (Q,)
        raters = match >= match.mean()
        return row.attention(row.queries[:, raters]).mean((0, 1))


def density_peaks(states, clusters):
    """DPC-kNN of states (N, D): places of the `clusters` centres, and each state's cluster (N,).

    A state's density is exp(-mean squared distance to its nearest neighbours); centres have high density and are far
    from any denser state; the others join the nearest centre. Distances are divided by the square root of D.
    """
    distance = torch.cdist(states, states) / states.shape[1] ** 0.5
    near = distance.topk(min(NEIGHBOURS, len(states)), largest=False).values
    density = (-(near**2).mean(-1)).exp()
    denser = density[None] > density[:, None]
    peak = distance.masked_fill(~denser, torch.inf).amin(-1)
    peak = torch.where(denser.any(-1), peak, distance.max())
    centres = (density * peak).topk(clusters).indices
    label = distance[:, centres].argmin(-1)
    label[centres] = torch.arange(clusters, device=label.device)
    return centres, label
