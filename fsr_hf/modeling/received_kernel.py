"""
Speed only: attention received on NVIDIA GPUs. Two passes over the attention scores, which are never stored: the first
computes the logarithm of each softmax denominator, the second sums the columns of the softmax.
"""

import torch

from .triton_launch import is_interpreted, is_trusted, jit, tl, triton


__all__ = ["can_receive_on_gpu", "received_on_gpu"]

# Tokens per program, and tokens that it reads at a time: both fit the shared memory of every GPU from Ampere on.
_TILES = {torch.float32: (64, 32), torch.float16: (128, 64), torch.bfloat16: (128, 64)}


def can_receive_on_gpu(query: torch.Tensor, torch_path) -> bool:
    """
    Whether [`received_on_gpu`] may work on `query`: it runs on its device, and has agreed there with `torch_path`,
    which takes the same arguments, on a small problem.
    """
    return is_trusted(query, _agrees, torch_path)


def received_on_gpu(query: torch.Tensor, key: torch.Tensor, lengths: list[int], scale: float) -> torch.Tensor:
    """
    As [`attention_received`], in two launches for all segments and heads.

    Args:
        query, key (`torch.FloatTensor` of shape `(tokens, heads, head_dim)`):
            In any floating-point dtype; products are exact, sums float32.
        lengths (`list[int]`):
            Tokens of each segment.
        scale (`float`):
            What the scores are multiplied by before softmax.

    Returns:
        `torch.FloatTensor` of shape `(tokens,)`, float32.
    """
    tokens, heads, head_dim = query.shape
    if query.dtype not in (torch.float16, torch.bfloat16) or is_interpreted():
        query, key = query.float(), key.float()  # the interpreter multiplies bfloat16 as if it were integers
    query, key = (tensor.detach().contiguous() for tensor in (query, key.to(query.dtype)))
    rows, columns = _TILES[query.dtype]
    # Of each block: its first token, and the first tokens of its segment and of the next segment.
    blocks, start = [], 0
    for length in lengths:
        blocks += [(first, start, start + length) for first in range(start, start + length, rows)]
        start += length
    table = torch.tensor(blocks, dtype=torch.int32).view(-1, 3).to(query.device, non_blocking=True)
    logs, received = (query.new_empty(heads, tokens, dtype=torch.float32) for _ in range(2))
    if not blocks:
        return received.sum(0)
    options = {
        "DEPTH": max(triton.next_power_of_2(head_dim), 16),
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": 8,
    }
    shape = (tokens, heads, head_dim, scale * 1.4426950408889634)  # times log2(e): the kernels compute powers of 2
    grid = (len(blocks), heads)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _logs_kernel[grid](query, key, table, logs, *shape, **options)
        _columns_kernel[grid](query, key, table, logs, received, *shape, **options)
    return received.sum(0) / heads


def _agrees(torch_path, device, dtype):
    """
    Whether the kernels and `torch_path` find the same attention in segments of one token, of less than a block and of
    more, among scores of very different size, equal keys, and queries of zeros.
    """
    lengths = [1, 70, 150, 33]
    places, heads = torch.arange(sum(lengths), device="cpu")[:, None, None], torch.arange(2, device="cpu")[:, None]
    depth = torch.arange(20, device="cpu")
    query = ((places**2 + 3 * depth * places + 5 * heads + depth) % 11 - 5).to(torch.float32)
    key = ((3 * places**2 + depth * places + heads + 2 * depth**2) % 13 - 6).to(torch.float32)
    query[::9] = 0.0
    query[4::31] *= 16.0
    key[5::7] = key[5]
    arguments = (query.to(device, dtype), key.to(device, dtype), lengths, 2.0**-5)
    received, expected = received_on_gpu(*arguments), torch_path(*arguments)
    return torch.allclose(received, expected, rtol=5e-3, atol=1e-6)  # `torch_path` may multiply in TF32


@jit
def _logs_kernel(
    query,
    key,
    table,
    logs,
    tokens,
    heads,
    head_dim,
    scale,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Binary logarithm of the softmax denominator of each query. One program per block of queries and head."""
    block, head = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(table + block * 3 + 1), tl.load(table + block * 3 + 2)
    rows = tl.load(table + block * 3) + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    own = _vectors(query, rows, head, depth, stop, heads, head_dim)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(start, stop, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        other = _vectors(key, columns, head, depth, stop, heads, head_dim)
        scores = tl.dot(own, tl.trans(other), input_precision="ieee") * scale
        scores = tl.where(columns[None, :] < stop, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        top = higher
    tl.store(logs + head.to(tl.int64) * tokens + rows, top + tl.log2(total), mask=rows < stop)


@jit
def _columns_kernel(
    query,
    key,
    table,
    logs,
    received,
    tokens,
    heads,
    head_dim,
    scale,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean over queries of the attention to each key. One program per block of keys and head."""
    block, head = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(table + block * 3 + 1), tl.load(table + block * 3 + 2)
    rows = tl.load(table + block * 3) + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    own = _vectors(key, rows, head, depth, stop, heads, head_dim)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(start, stop, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        other = _vectors(query, columns, head, depth, stop, heads, head_dim)
        scores = tl.dot(own, tl.trans(other), input_precision="ieee") * scale
        log = tl.load(logs + head.to(tl.int64) * tokens + columns, mask=columns < stop, other=float("inf"))
        total += tl.sum(tl.exp2(scores - log[None, :]), 1)
    tl.store(received + head.to(tl.int64) * tokens + rows, total / (stop - start), mask=rows < stop)


@jit
def _vectors(states, places, head, depth, stop, heads, head_dim):
    """The vectors of one head at the tokens `places`; zeros from `stop` on."""
    return tl.load(
        states + (places[:, None].to(tl.int64) * heads + head) * head_dim + depth[None, :],
        mask=(places[:, None] < stop) & (depth[None, :] < head_dim),
        other=0.0,
    )
