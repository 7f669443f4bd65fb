"""Saliency (Eq. 1): rows and column means of a vision block's attention, recomputed from the block's input."""

from typing import Any

import torch
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from .offload import sharded_params_gathered
from .precision import without_autocast
from .received_kernel import can_receive_on_gpu, received_on_gpu


__all__ = ["attention_received", "cls_attention", "patch_attention", "resolve_feature_layer", "resolve_tower_layer"]

# Towers with a choice of features: what saliency is there, and the strategy whose tokens are the patches it ranks.
_TOWERS = {
    "clip_vision_model": ("the attention of [CLS] in a CLIP tower", "default"),
    "siglip_vision_model": ("the attention that patches receive in a SigLIP tower", "full"),
}


@torch.no_grad()
def cls_attention(block: CLIPEncoderLayer, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    How much [CLS] looks at each patch in one block of a CLIP vision tower, averaged over heads (Eq. 1): from the input
    of the block, `(batch, 1 + num_patches, hidden_size)`, the row of [CLS] after softmax, its own column left out and
    nothing renormalised, `(batch, num_patches)`, float32.

    The tower's own attention maps need the eager implementation, and cost N x N; this one row needs the block's input
    and its modules, so it is the same under every attention implementation and with adapted or quantised projections.
    """
    attention = block.self_attn
    heads = (attention.num_heads, attention.head_dim)
    with sharded_params_gathered(block, attention):
        hidden_states = block.layer_norm1(hidden_states)
        query = attention.q_proj(hidden_states[:, :1]).unflatten(-1, heads).transpose(1, 2)
        key = attention.k_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
    with without_autocast(query.device):
        weights = (query.float() * attention.scale @ key.float().transpose(-1, -2)).softmax(-1)  # [B, heads, 1, 1 + N]
    return weights.mean(1)[:, 0, 1:]


@torch.no_grad()
def patch_attention(block: SiglipEncoderLayer, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    Attention that each patch of a view receives in one block of a SigLIP tower (Eq. 1), from the input of the block,
    `(views, num_patches, hidden_size)`: `(views, num_patches)`, float32.
    """
    attention = block.self_attn
    with sharded_params_gathered(block, attention):
        hidden_states = block.layer_norm1(hidden_states)
        query, key = (
            project(hidden_states).flatten(0, 1).unflatten(-1, (attention.num_heads, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj)
        )
    views, num_patches, _ = hidden_states.shape
    return attention_received(query, key, [num_patches] * views, attention.scale).view(views, num_patches)


# Scores that are in memory at once: 4 MiB in float32, which a CPU's cache holds.
_BLOCK_SCORES = 2**20


@torch.no_grad()
def attention_received(query: torch.Tensor, key: torch.Tensor, lengths: list[int], scale: float) -> torch.Tensor:
    """
    How much attention each token receives, averaged over heads and over the queries that see it: Eq. 1 for towers
    without [CLS]. The tokens stand in segments of these `lengths` (an image, a frame), and attention stays within a
    segment. The scores of a block of queries against the keys of their segment are in memory at once, never those of
    all pairs: `O(tokens * head_dim + block * segment)`.

    Queries (with their positions) and keys of a block have the shape `(tokens, heads, head_dim)`; `scale` multiplies
    their products before softmax. Returns `(tokens,)`, float32: the means over each segment add up to 1.
    """
    if can_receive_on_gpu(query, _received_in_blocks):
        return received_on_gpu(query, key, lengths, scale)
    return _received_in_blocks(query, key, lengths, scale)


def _received_in_blocks(query, key, lengths, scale):
    heads = query.shape[1]
    received = []
    with without_autocast(query.device):
        for queries, keys in zip(query.split(lengths), key.split(lengths)):
            queries, keys = (part.transpose(0, 1).float().contiguous() for part in (queries, keys))
            total = queries.new_zeros(heads, 1, queries.shape[1])  # queries, keys: [heads, length, head_dim]
            for block in queries.split(max(1, _BLOCK_SCORES // (heads * queries.shape[1])), dim=1):
                weights = (block * scale) @ keys.mT  # [heads, block, length]
                weights = weights.sub_(weights.amax(-1, keepdim=True)).exp_()
                # The column sums of a softmax, whose denominators weight the rows.
                total += weights.sum(-1, keepdim=True).reciprocal_().mT @ weights
            received.append(total.sum((0, 1)) / (heads * queries.shape[1]))
    return torch.cat(received)


def resolve_feature_layer(config: Any, layer: Any = None) -> int:
    """
    The block, counted from 1, whose output `vision_feature_layer` names: `layer`, or by default the config's.
    `ValueError` if it names no single block of the tower, since saliency is the attention of that block.
    """
    layer = config.vision_feature_layer if layer is None else layer
    depth = config.vision_config.num_hidden_layers
    if not isinstance(layer, int) or isinstance(layer, bool) or not (1 <= layer <= depth or -depth <= layer <= -1):
        raise ValueError(
            f"`vision_feature_layer={layer!r}` is not supported: FSR needs one int that names the output of a block, "
            f"1 to {depth} or -{depth} to -1, since saliency is the attention of that block."
        )
    return layer % (depth + 1)


def resolve_tower_layer(
    tower: str, config: Any, vision_feature_layer: Any = None, vision_feature_select_strategy: str | None = None
) -> int:
    """
    The same, for a call with these arguments (by default the config's) of a family whose `tower` has to be this one.
    `ValueError` also for another tower, or a strategy whose tokens are not the patches that saliency ranks.
    """
    found, (saliency, needed) = config.vision_config.model_type, _TOWERS[tower]
    if found != tower:
        raise ValueError(
            f'`vision_config.model_type="{found}"` is not supported: FSR reads saliency from '
            f'{saliency} ("{tower}") in this family.'
        )
    strategy = vision_feature_select_strategy or config.vision_feature_select_strategy
    if strategy != needed:
        raise ValueError(
            f'`vision_feature_select_strategy="{strategy}"` is not supported: with it the tokens are not the patches '
            f'that FSR ranks. Use "{needed}".'
        )
    return resolve_feature_layer(config, vision_feature_layer)
