"""Saliency (Eq. 1): rows and column means of a vision block's attention, recomputed from the block's input."""

import torch
from transformers.models.clip.modeling_clip import CLIPEncoderLayer


__all__ = ["cls_attention"]


@torch.no_grad()
def cls_attention(block: CLIPEncoderLayer, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    How much [CLS] looks at each patch in one block of a CLIP vision tower, averaged over heads (Eq. 1).

    The tower's own attention maps need the eager implementation, and cost N x N; this one row needs the block's input
    and its modules, so it is the same under every attention implementation and with adapted or quantised projections.

    Args:
        block (`CLIPEncoderLayer`):
            A block of the tower.
        hidden_states (`torch.FloatTensor` of shape `(batch, 1 + num_patches, hidden_size)`):
            The input of the block, [CLS] first.

    Returns:
        `torch.FloatTensor` of shape `(batch, num_patches)`, float32: the row of [CLS] after softmax, its own column
        left out and nothing renormalised.
    """
    attention = block.self_attn
    hidden_states = block.layer_norm1(hidden_states)
    query = attention.q_proj(hidden_states[:, :1]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    key = attention.k_proj(hidden_states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    with torch.autocast(query.device.type, enabled=False):
        weights = (query.float() * attention.scale @ key.float().transpose(-1, -2)).softmax(-1)  # [B, heads, 1, 1 + N]
    return weights.mean(1)[:, 0, 1:]
