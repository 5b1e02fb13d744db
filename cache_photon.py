"""A key-value cache that knows what was cut from it."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache


@dataclass
class Cut:
    """What a cache must remember of its cut."""

    mask: torch.Tensor  # (B, S') bool: which places of the short prompt are real
    dropped: int  # S - S': by how much the short prompt is shorter
    first_layer: int  # layers below hold the whole prompt
    keep_mask: torch.Tensor  # (B, V) bool: which visual tokens stayed
    visual_count: torch.Tensor  # (B,): of how many
    threshold: torch.Tensor  # (B, 1)

    def attention_mask(self, attention_mask, stored, new):
        """(B, stored + new) for a layer that holds `stored` places of a short prompt and what followed it.

        attention_mask (B, S + ...) of the unpruned sequence, or `None` where nothing in it is padding.
        """
        short = self.mask[:, :stored]  # shorter than the prompt if candidates of prompt lookup were taken back
        if attention_mask is None:
            rest = self.mask.new_ones(short.shape[0], stored + new - short.shape[1])
        else:
            rest = attention_mask[:, short.shape[1] + self.dropped : stored + self.dropped + new].bool()
        return torch.cat([short, rest.to(short.device)], dim=-1)


class PhotonCache(DynamicCache):
    """A `DynamicCache` whose length is the number of tokens seen, also where some were cut from it.

    After a prompt with scans `cache.cut` tells which visual tokens stayed; generation returns the cache as
    `past_key_values` with `return_dict_in_generate=True`.
    """

    cut: Cut | None = None
    rope_deltas: torch.Tensor | None = None

    def get_seq_length(self, layer_idx=0):
        stored = super().get_seq_length(layer_idx)
        return stored + self.cut.dropped if stored and self.cut and layer_idx >= self.cut.first_layer else stored

    def get_query_offset(self, layer_idx=0):
        return super().get_seq_length(layer_idx)

    def reset(self):
        super().reset()
        self.cut = self.rope_deltas = None
