"""What some methods read of the vision tower and of the layers below the cut, recorded while these run.

Each is a context manager as `SchedulerInputs.more` describes: a method takes one as its `record_scan` or
`record_layers`.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch.nn import functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from photon.prompt_photon import record_attention

VOXELS = ("voxels",)
MIDDLE = ("middle_attention", "middle_keys")
SLAB_CHANGE = 0.05  # MedPruner's gamma, of voxels between 0 and 1
TRANSITION_LAYERS = 6  # TransPrune accumulates over six layers


@contextmanager
def record_voxels(recorded, visual, patches, grids):
    """Records "voxels" (tokens, 3), of a scan's voxels scaled to 0..1 by its least and its greatest: the token's mean;
    its mean absolute change from the same place in the slab before (1 in the first); the slab's from its anchor, which
    is the last slab that changed by more than `SLAB_CHANGE` (1 for an anchor)."""
    found = []
    merge = visual.spatial_merge_unit
    for part, (slabs, *_) in zip(patches.split(grids.prod(-1).tolist()), grids.tolist(), strict=True):
        voxels = part.float().view(slabs, -1, merge * part.shape[1])  # (slabs, tokens of a slab, voxels of a token)
        low, high = voxels.min(), voxels.max()
        voxels = (voxels - low) / (high - low).clamp(min=torch.finfo(voxels.dtype).tiny)
        change = torch.ones(voxels.shape[:2], device=voxels.device)
        change[1:] = (voxels[1:] - voxels[:-1]).abs().mean(-1)
        anchored, anchor = torch.ones_like(change), 0
        for slab in range(1, slabs):
            distance = (voxels[slab] - voxels[anchor]).abs().mean()
            if distance > SLAB_CHANGE:
                anchor = slab
            else:
                anchored[slab] = distance
        found.append(torch.stack([voxels.mean(-1), change, anchored], dim=-1).flatten(0, 1))
    recorded["voxels"] = torch.cat(found)
    yield


def record_middle(recorded, visual, patches, grids):
    """Records "middle_attention" and "middle_keys", of the tower's middle block what "vision" has of the last."""
    return record_attention(recorded, visual, grids, block=max(len(visual.blocks) // 2 - 1, 0), names=MIDDLE)


@contextmanager
def record_transitions(recorded, layers):
    """Records "transitions" (B, S, M, 2), of each attention and each MLP of the last layers below the cut: the norm of
    its output by that of its input (behind the norm, and before the residual is added), and the cosine of the two."""
    parts = {}

    def watch(module, number):
        def note(module, args, kwargs, output):
            states = args[0] if args else kwargs["hidden_states"]
            output = output[0] if isinstance(output, tuple) else output
            states, output = states.detach().float(), output.detach().float()
            ratio = output.norm(dim=-1) / states.norm(dim=-1).clamp(min=torch.finfo(states.dtype).tiny)
            parts[number] = torch.stack([ratio, F.cosine_similarity(states, output, dim=-1)], dim=-1)
            recorded["transitions"] = torch.stack([*parts.values()], dim=2)

        return module.register_forward_hook(note, with_kwargs=True)

    modules = [module for layer in layers[-TRANSITION_LAYERS:] for module in (layer.self_attn, layer.mlp)]
    with ExitStack() as stack:
        for number, module in enumerate(modules):
            stack.callback(watch(module, number).remove)
        yield


@contextmanager
def record_queries(recorded, layers):
    """Records "layer_queries" (B, S, H, d), of the last layer below the cut, after rotary embedding."""

    def note(module, args, kwargs):
        states = (args[0] if args else kwargs["hidden_states"]).detach()
        queries = module.q_proj(states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        queries, _ = apply_rotary_pos_emb(queries, queries, *kwargs["position_embeddings"])
        recorded["layer_queries"] = queries.transpose(1, 2)

    handle = layers[-1].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
