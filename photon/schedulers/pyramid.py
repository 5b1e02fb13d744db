"""PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247; github.com/Cooperx521/PyramidDrop): a cut after each stage.

Taken: the decoder's layers fall into stages; after each but the last the visual tokens go that the prompt's last
token attends to least, mean over heads, softmax over the whole prompt, and each cut leaves the same share of what the
one before has left; in training as in inference tokens are deleted, with no learned selection; layers below a cut
keep their keys and values. The original cuts after layers 8, 16 and 24 of 32, to 50, 25 and 12.5 %. Here the first
cut is after `scheduler_layer` (L / 4 - 1 is where the original has it), and the others share the layers above it
evenly. A budget is what the last cut leaves: the paper's halves are `keep_ratio=0.125`, or `native=True`. Different:
the attention is that of the layer after which tokens go, as in our FastV, and not of the next one; positions are not
packed anew; training has one question a prompt. `evict_early_layers` deletes below the first cut what that cut
deletes. In the soft phase of training there is the first cut alone.
"""

from contextlib import contextmanager

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from photon.schedulers.fastv import FastVScheduler
from photon.scheduling_photon import gather_places, most_salient, padded_places, stays

CUTS = 3
FACTOR = 0.5  # of the tokens, at each cut, where the call gives no budget


def cut_layers(first, layers):
    """The layers after which a decoder of `layers` layers is cut, from `first` on: as many as `CUTS`, or as there are
    layers with another one above them."""
    step, lowest = (layers - first - 1) / CUTS, max(first, 0) + 1
    above = {max(first + round(number * step), lowest) for number in range(1, CUTS)}
    return [first, *sorted(layer for layer in above if layer < layers - 1)]


def stage_share(share, number, cuts):
    """Of the visual tokens, what stays after the cut `number`, counted from 1, if `share` stays after the last."""
    return share ** (number / cuts)


class PyramidScheduler(FastVScheduler):
    """Keeps at each cut the tokens that the prompt's last token attends to most."""

    name = "pyramid"

    @property
    def cuts(self):
        return cut_layers(self.config.scheduler_layer, self.config.text_config.num_hidden_layers)

    def own_count(self, inputs):
        return (inputs.visual.sum(-1) * FACTOR ** len(self.cuts)).round().long()

    def stage_count(self, inputs, count, number):
        """(B,) how many tokens of a row stay after a cut, of which the last leaves `count` (B,)."""
        total = inputs.visual.sum(-1)
        share = stage_share(count / total.clamp(min=1), number, len(self.cuts))
        return (share * total).round().long()

    def select(self, inputs, count):
        return super().select(inputs, self.stage_count(inputs, count, 1))

    def later(self, inputs, count):
        counts = (self.stage_count(inputs, count, number) for number in range(2, len(self.cuts) + 1))
        return {layer: Stage(inputs.scaling, more) for layer, more in zip(self.cuts[1:], counts, strict=True)}


class Stage:
    """A cut above the first: reads the attention of a layer while it runs, and chooses.

    Args: scaling: 1/sqrt(d); count (B,): tokens that stay.
    """

    def __init__(self, scaling, count):
        self.scaling, self.count = scaling, count

    @contextmanager
    def reading(self, layer):
        """A context around a decoder's layer, in which its queries and keys are noted."""
        handle = layer.self_attn.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _note(self, module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        queries, keys = (
            linear(states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for linear in (module.q_proj, module.k_proj)
        )
        self.queries, self.keys = apply_rotary_pos_emb(queries, keys, *kwargs["position_embeddings"])

    @torch.no_grad()
    def choose(self, scan, keep_mask, places, lead=None):
        """Which visual tokens stay (B, V) bool, and their places and the text's in the short sequence, -1 for padding.

        Args: scan: `ScanRequest`; keep_mask (B, V) bool: what the cuts before have left; places (B, S') in the prompt
            of the layer's tokens, -1 for padding; lead (B, G, A, d): keys of what stands in front of these, in a
            prompt behind a prefix.
        """
        last, visual = scan.features["last_index"], scan.visual_index
        queries, keys = (states.to(places.device).float() for states in (self.queries, self.keys))
        read = ((places >= 0) & (places <= last))[:, None, None]  # (B, 1, 1, S')
        query = (places == last).to(torch.uint8).argmax(-1)  # (B,) the last token's place in the short sequence
        query = gather_places(queries.transpose(1, 2), query[:, None])[:, 0]  # (B, H, d)
        query = query.unflatten(1, (keys.shape[1], -1))  # (B, G, H / G, d)
        logits = torch.einsum("bghd,bgsd->bghs", query, keys) * self.scaling
        logits = logits.masked_fill(~read, -torch.inf)
        total = logits.logsumexp(-1, keepdim=True)
        if lead is not None and lead.shape[2]:
            ahead = torch.einsum("bghd,bgsd->bghs", query, lead.to(query)) * self.scaling
            total = torch.logaddexp(total, ahead.logsumexp(-1, keepdim=True))
        attention = (logits - total).exp().mean((1, 2))  # (B, S')
        whole = attention.new_zeros(scan.real.shape).scatter_add(1, places.clamp(min=0), attention)  # padding adds 0
        keep_mask = most_salient(whole.gather(1, visual), keep_mask, self.count)
        stay = stays(scan.visual_mask, keep_mask, scan.real)
        return keep_mask, padded_places(gather_places(stay, places))
