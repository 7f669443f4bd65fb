"""
Attention received, from whole maps: of queries and keys, and in the vision towers of Qwen-VL by their eager
implementation; and the order of Qwen2.5-VL's windows, written out in loops.
"""

import sys

import torch


__all__ = ["attention_maps", "queries_and_keys", "received_attention", "received_by_maps", "window_order"]


@torch.no_grad()
def attention_maps(tower, pixels: torch.Tensor, grid: torch.Tensor, block: int = -1) -> list[torch.Tensor]:
    """
    The maps `(heads, queries, keys)` of one block of a tower with eager attention, one for each chunk of patches that
    attend to each other, in the order in which the tower works.
    """
    module, maps, modeling = tower.blocks[block].attn, [], sys.modules[type(tower).__module__]
    eager = modeling.eager_attention_forward

    def record(caller, *args, **kwargs):
        output, weights = eager(caller, *args, **kwargs)
        if caller is module:
            maps.append(weights[0])
        return output, weights

    assert tower.config._attn_implementation == "eager"
    modeling.eager_attention_forward = record
    try:
        tower(pixels, grid_thw=grid)
    finally:
        modeling.eager_attention_forward = eager
    return maps


def window_order(grid: torch.Tensor, side: int, merge: int) -> list[int]:
    """
    Which token of the merger's output each token of the blocks is: window by window, and row by row in each. `side` is
    that of a window in tokens.
    """
    order, first = [], 0
    for frames, height, width in grid.tolist():
        height, width = height // merge, width // merge
        for frame in range(frames):
            for top in range(0, height, side):
                for left in range(0, width, side):
                    for row in range(top, min(top + side, height)):
                        for column in range(left, min(left + side, width)):
                            order.append(first + (frame * height + row) * width + column)
        first += frames * height * width
    return order


def received_attention(tower, pixels: torch.Tensor, grid: torch.Tensor, block: int = -1) -> torch.Tensor:
    """Attention received by each token `(tokens,)`, in the order of the merger's output."""
    merge = tower.spatial_merge_size
    received = torch.cat([weights.double().mean((0, 1)) for weights in attention_maps(tower, pixels, grid, block)])
    order = range(len(received) // merge**2)
    if hasattr(tower, "window_size"):
        order = window_order(grid, tower.window_size // merge // tower.patch_size, merge)
    tokens = torch.zeros(len(order), dtype=torch.double)
    for place, token in enumerate(order):
        for patch in range(place * merge**2, (place + 1) * merge**2):
            tokens[token] += received[patch] / merge**2
    return tokens.float()


def queries_and_keys(
    tokens: int, heads: int = 3, head_dim: int = 8, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key = torch.randn(2, tokens, heads, head_dim, generator=torch.Generator().manual_seed(seed)) * 2
    return query, key


def received_by_maps(query: torch.Tensor, key: torch.Tensor, lengths: list[int], scale: float) -> torch.Tensor:
    """Whole maps in float64, averaged over heads and over the queries of the segment."""
    received, start = [], 0
    for length in lengths:
        segment = slice(start, start + length)
        maps = torch.einsum("qhd,khd->hqk", query[segment].double(), key[segment].double()) * scale
        received.append(maps.softmax(-1).mean((0, 1)))
        start += length
    return torch.cat(received)
