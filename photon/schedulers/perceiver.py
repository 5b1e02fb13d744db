"""The perceiver resampler of RadFM (Wu et al. 2023, arXiv 2308.02463; github.com/chaoyi-wu/RadFM): 32 latents a scan.

Taken: six layers, each a cross-attention of 32 learned latents (8 heads of 64) over tokens and latents and an MLP
four times as wide, with a norm in front of each and a residual around it, a last norm, and a linear map to the
decoder's width. Different: keys get a sine code of their place in three dimensions, of which RadFM adds a learned one
to its tokens; the tokens are those that enter the cut; the latents stand at the places of 32 tokens at even
distances, so that positions, mask and cache are those of any other method; several scans of a prompt share the
latents. It must be trained (`train_hf.py --scheduler perceiver`): untrained, its latents are noise. A budget below 32
takes the first latents, and a call that asks for all tokens gets them unchanged. Set `scheduler_layer` to -1.
"""

import torch
from torch import nn
from torch.nn import functional as F

from photon.schedulers.boxes import box_of_tokens
from photon.schedulers.rows import RowScheduler

LATENTS, LAYERS, HEADS, HEAD, WIDER = 32, 6, 8, 64, 4
LONGEST_WAVE = 100.0  # of the place code, in tokens


class Layer(nn.Module):
    """Latents (N, D) that read tokens (V, D) and themselves."""

    def __init__(self, size):
        super().__init__()
        self.norm_tokens, self.norm_latents = nn.LayerNorm(size), nn.LayerNorm(size)
        self.queries, self.keys_values = (nn.Linear(size, n * HEADS * HEAD, bias=False) for n in (1, 2))
        self.output = nn.Linear(HEADS * HEAD, size, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, WIDER * size, bias=False), nn.GELU(),
            nn.Linear(WIDER * size, size, bias=False),
        )  # fmt: skip

    def forward(self, latents, tokens, places):
        normed = self.norm_latents(latents)
        tokens = self.norm_tokens(tokens)
        read = torch.cat([tokens, normed])
        keys, values = self.keys_values(read).chunk(2, dim=-1)
        coded = F.pad(places, (0, 0, 0, len(latents)))  # latents have no place
        keys = keys.unflatten(-1, (HEADS, HEAD)) + coded[:, None]
        parts = self.queries(normed).unflatten(-1, (HEADS, HEAD)), keys, values.unflatten(-1, (HEADS, HEAD))
        out = F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in parts))  # (HEADS, N, HEAD)
        latents = latents + self.output(out.transpose(0, 1).flatten(1))
        return latents + self.mlp(latents)


class PerceiverScheduler(RowScheduler):
    """Replaces the tokens by latents that have read them, at most 32."""

    name = "perceiver"
    needs = frozenset({"coordinates", "hidden_states"})
    exact, learns = False, True

    def __init__(self, reference, **kwargs):
        super().__init__(reference, **kwargs)
        size = reference.config.text_config.hidden_size
        self.latents = nn.Parameter(torch.randn(LATENTS, size))
        self.layers = nn.ModuleList(Layer(size) for _ in range(LAYERS))
        self.norm, self.output = nn.LayerNorm(size), nn.Linear(size, size)

    def choose(self, row, count):
        _, middles = box_of_tokens(row.coordinates, count if count == len(row) else min(count, LATENTS))
        keep = torch.zeros(len(row), dtype=torch.bool, device=middles.device)
        keep[middles] = True
        if count in (0, len(row)):
            return keep, None
        states = self.read(row)[: len(middles)]
        return keep, row.hidden_states.index_copy(0, middles.sort().values, states)

    def read(self, row):
        """(LATENTS, D): the latents after all layers."""
        latents, places = self.latents.float(), place_code(row.coordinates[:, 1:])
        for layer in self.layers:
            latents = layer(latents, row.hidden_states, places)
        return self.output(self.norm(latents))


def place_code(places):
    """Sines and cosines of places (V, 3), (V, HEAD); what 3 axes leave of HEAD is 0."""
    waves = HEAD // 6
    rates = LONGEST_WAVE ** (-torch.arange(waves, device=places.device) / waves)
    angles = (places[..., None] * rates).flatten(1)  # (V, 3 * waves)
    code = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return F.pad(code, (0, HEAD - code.shape[1]))
