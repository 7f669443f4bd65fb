# Generated from fsr_hf 0.1.0 (fsr_hf.modeling.scan_kernel), do not edit.
"""
Scan on NVIDIA's GPUs: Eqs. 5 and 8 in a few launches for the whole batch, whatever the number of anchors.

Two ways, by memory. Up to `_MOST_PAIRS` tokens all cosines are computed first, and one program for each row of the
batch takes one anchor after the other: what it needs of a token, its cosine to the closest chosen token and to the
nearest anchor, stays in registers, and a step reads one row of cosines. Beyond, cosines are computed when they are
needed and none are kept: one launch for each anchor reads all tokens, in as many programs as there are blocks of them.
Nothing is read on the host.
"""

import torch

from .triton_launch import is_interpreted, jit, tl, triton


__all__ = ["scan_on_gpu"]

_MOST_PAIRS = 8192  # tokens in a row of the batch: 256 MiB
_MOST_MEMORY = 2**29  # bytes that the cosines of several rows may take


def scan_on_gpu(
    features: torch.Tensor, mask: torch.Tensor, focus: torch.Tensor, num_focus: torch.Tensor, num_anchors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Eqs. 5 and 8 by Triton's kernels.

    Args:
        features (`torch.FloatTensor` of shape `(batch, num_tokens, hidden_size)`):
            The tokens, in any floating-point dtype; cosines are sums of exact products in float32.
        mask (`torch.BoolTensor` of shape `(batch, num_tokens)`):
            True for real tokens.
        focus (`torch.LongTensor` of shape `(batch, width)`):
            The Focus tokens, those of a row first.
        num_focus, num_anchors (`torch.LongTensor` of shape `(batch,)`):
            How many of them a row has, and how many tokens to add, no more than there are.

    Returns:
        The anchors in the order of their choice, `(batch, width - 1)`, filled up with `num_tokens`; the anchor that is
        most similar to each token, `(batch, num_tokens)`, or -1; and its cosine, -inf if there is none or the token is
        not finite.
    """
    if features.is_cuda:
        with torch.cuda.device(features.device):  # where Triton launches
            return _scan_on_device(features, mask, focus, num_focus, num_anchors)
    return _scan_on_device(features, mask, focus, num_focus, num_anchors)


def _scan_on_device(features, mask, focus, num_focus, num_anchors):
    batch, num_tokens, _ = features.shape
    rows = max(1, _MOST_MEMORY // (4 * num_tokens**2))
    if num_tokens <= _MOST_PAIRS and batch > rows:
        parts = (features, mask, focus, num_focus, num_anchors)
        found = [_scan_on_device(*part) for part in zip(*(tensor.split(rows) for tensor in parts))]
        anchors, nearest, similarity = (torch.cat(tensors) for tensors in zip(*found))
        return anchors, nearest, similarity

    tokens, scale = _scale(features)
    anchors = focus.new_empty(batch, focus.shape[1] - 1)
    nearest = torch.empty_like(mask, dtype=torch.long)
    similarity, closest = (torch.empty_like(mask, dtype=torch.float32) for _ in range(2))
    mask, focus, num_focus, num_anchors = (t.contiguous() for t in (mask, focus, num_focus, num_anchors))
    if batch and num_tokens <= _MOST_PAIRS:
        pairs = _pairs(tokens, scale)
        block = triton.next_power_of_2(num_tokens)
        piece = min(block, 128)
        _focus_kernel[(triton.cdiv(num_tokens, piece), batch)](
            pairs, mask, focus, num_focus, closest, num_tokens, focus.shape[1], BLOCK=piece, num_warps=4
        )
        _scan_kernel[(batch,)](
            *(pairs, scale, closest, num_anchors, anchors, nearest, similarity),
            *(num_tokens, anchors.shape[1]),
            BLOCK=block,
            num_warps=min(max(block // 256, 1), 16),
        )
    elif batch:
        _scan_without_pairs(tokens, scale, mask, focus, num_focus, num_anchors, closest, anchors, nearest, similarity)
    return anchors, nearest, similarity


def _scale(features):
    """
    The tokens times powers of two that keep their squares in range, `(batch, num_tokens, hidden_size)`, in their own
    dtype, which changes no digit; and the reciprocals of their norms, `(batch, num_tokens)`, NaN if not finite.
    """
    features = features.detach().contiguous()
    # The interpreter multiplies matrices of bfloat16 as if they were integers.
    is_half = features.dtype == torch.float16 or (features.dtype == torch.bfloat16 and not is_interpreted())
    tokens = torch.empty_like(features, dtype=features.dtype if is_half else torch.float32)
    scale = features.new_empty(features.shape[:2], dtype=torch.float32)
    if scale.numel():
        block = min(triton.next_power_of_2(features.shape[2]), 4096)
        _scale_kernel[(scale.numel(),)](features, tokens, scale, features.shape[2], BLOCK=block)
    return tokens, scale


def _pairs(tokens, scale):
    """Cosines of all pairs, `(batch, num_tokens, num_tokens)`, float32; not cut to [-1, 1], NaN if not finite."""
    batch, num_tokens, hidden_size = tokens.shape
    if tokens.dtype == torch.float32:
        # The library has better float32 kernels. It may compute a last, incomplete tile in another way.
        tokens = torch.nn.functional.pad(tokens * scale[..., None], (0, 0, 0, -num_tokens % 64))
        return (tokens @ tokens.mT)[:, :num_tokens, :num_tokens].contiguous()
    pairs = scale.new_empty(batch, num_tokens, num_tokens)
    size = 128 if num_tokens > 1024 else 64
    blocks = triton.cdiv(num_tokens, size)
    _pairs_kernel[(blocks, blocks, batch)](
        *(tokens, scale, pairs, num_tokens, hidden_size),
        SIZE=size,
        DEPTH=64,
        num_warps=8 if size == 128 else 4,
        num_stages=3,
    )
    return pairs


def _scan_without_pairs(tokens, scale, mask, focus, num_focus, num_anchors, closest, anchors, nearest, similarity):
    batch, num_tokens, hidden_size = tokens.shape
    sizes = (num_tokens, hidden_size)
    precise = {"SIZE": 128, "DEPTH": 32 if tokens.dtype == torch.float32 else 64, "num_warps": 8}
    grid = (triton.cdiv(num_tokens, 128), batch)
    _nearest_kernel[grid](
        *(tokens, scale, focus, num_focus, nearest, closest, *sizes, focus.shape[1]), ONLY_FINITE=False, **precise
    )
    closest.clamp_(min=-1.0).masked_fill_(~mask, torch.inf)
    closest.copy_(torch.nn.functional.pad(closest, (0, 1)).scatter_(1, focus, torch.inf)[:, :-1])

    # What the programs of a step find, the next one compares: farthest token and its cosine, in turns.
    size = 16
    blocks = triton.cdiv(num_tokens, size)
    low = closest.new_full((2, batch, blocks), torch.inf)
    place = focus.new_zeros(2, batch, blocks)
    depth = min(triton.next_power_of_2(hidden_size), 512)
    for step in range(-1, anchors.shape[1]):
        _step_kernel[(blocks, batch)](
            *(tokens, scale, num_anchors, closest, low, place, anchors, *sizes, anchors.shape[1], step, blocks),
            SIZE=size,
            DEPTH=depth,
            BLOCKS=triton.next_power_of_2(blocks),
            num_warps=4,
        )
    ordered = anchors.sort(dim=1).values
    _nearest_kernel[grid](
        *(tokens, scale, ordered, num_anchors, nearest, similarity, *sizes, anchors.shape[1]),
        ONLY_FINITE=True,
        **precise,
    )


@jit
def _scale_kernel(features, tokens, scale, hidden_size, BLOCK: tl.constexpr):
    """One program for each token."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    peak = tl.zeros((BLOCK,), tl.float32)
    finite = tl.full((BLOCK,), 1, tl.int32)
    for start in range(0, hidden_size, BLOCK):
        at = start + places
        values = tl.load(features + token * hidden_size + at, mask=at < hidden_size, other=0.0).to(tl.float32)
        finite = finite & (tl.abs(values) < float("inf")).to(tl.int32)
        peak = tl.maximum(peak, tl.abs(values))
    # The reciprocal of the power of two in the largest entry, by its exponent.
    factor = 1.0
    if tokens.dtype.element_ty != tl.float16:
        exponent = tl.max(peak, 0).to(tl.int32, bitcast=True) & 0x7F800000
        exponent = 0x7F000000 - tl.minimum(exponent, 0x7E800000)
        factor = exponent.to(tl.float32, bitcast=True)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden_size, BLOCK):
        at = start + places
        values = tl.load(features + token * hidden_size + at, mask=at < hidden_size, other=0.0).to(tl.float32)
        values = values * factor
        squares += values * values
        tl.store(tokens + token * hidden_size + at, values.to(tokens.dtype.element_ty), mask=at < hidden_size)
    square = tl.sum(squares, 0)
    inverse = tl.where(square > 0, 1.0 / tl.sqrt(square), 1.0)
    tl.store(scale + token, tl.where(tl.min(finite, 0) == 1, inverse, float("nan")))


@jit
def _pairs_kernel(tokens, scale, pairs, num_tokens, hidden_size, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """One program for each square block of cosines. Every sum runs in the same order, so equal tokens stay equal."""
    row = tl.program_id(2).to(tl.int64)
    tokens += row * num_tokens * hidden_size
    left = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    right = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, hidden_size, DEPTH):
        at = start + depth
        one = tl.load(
            tokens + left[:, None] * hidden_size + at[None, :],
            mask=(left[:, None] < num_tokens) & (at[None, :] < hidden_size),
            other=0.0,
        )
        other = tl.load(
            tokens + right[:, None] * hidden_size + at[None, :],
            mask=(right[:, None] < num_tokens) & (at[None, :] < hidden_size),
            other=0.0,
        )
        sums = tl.dot(one, tl.trans(other), sums)
    left_scale = tl.load(scale + row * num_tokens + left, mask=left < num_tokens, other=0.0)
    right_scale = tl.load(scale + row * num_tokens + right, mask=right < num_tokens, other=0.0)
    tl.store(
        pairs + (row * num_tokens + left[:, None]) * num_tokens + right[None, :],
        sums * left_scale[:, None] * right_scale[None, :],
        mask=(left[:, None] < num_tokens) & (right[None, :] < num_tokens),
    )


@jit
def _in_range(cosines):
    """Cosines in [-1, 1]; -1 for tokens that are not finite."""
    cosines = tl.where(cosines == cosines, cosines, -1.0)
    return tl.minimum(tl.maximum(cosines, -1.0), 1.0)


@jit
def _focus_kernel(pairs, mask, focus, num_focus, closest, num_tokens, width, BLOCK: tl.constexpr):
    """
    Cosine of each token to the closest Focus token; infinity for what is no candidate. One program for each block of
    tokens of a row.
    """
    row = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = places < num_tokens
    nearest = tl.full((BLOCK,), -1.0, tl.float32)
    candidate = tl.load(mask + row * num_tokens + places, mask=is_token, other=0) != 0
    for number in range(tl.load(num_focus + row)):
        token = tl.load(focus + row * width + number)
        cosines = tl.load(pairs + (row * num_tokens + token) * num_tokens + places, mask=is_token, other=-1.0)
        nearest = tl.maximum(nearest, _in_range(cosines))
        candidate = candidate & (places != token)
    tl.store(closest + row * num_tokens + places, tl.where(candidate, nearest, float("inf")), mask=is_token)


@jit
def _scan_kernel(
    pairs, scale, closest, num_anchors, anchors, nearest, similarity, num_tokens, most, BLOCK: tl.constexpr
):
    """One program for each row of the batch, which takes one anchor after the other."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    is_token = places < num_tokens
    number = tl.load(num_anchors + row).to(tl.int32)
    near = tl.load(closest + row * num_tokens + places, mask=is_token, other=float("inf"))
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_anchor = tl.full((BLOCK,), -1, tl.int32)
    for step in range(number):
        anchor = tl.argmin(near, 0, tie_break_left=True)
        tl.store(anchors + row * most + step, anchor.to(tl.int64))
        cosines = tl.load(pairs + (row * num_tokens + anchor) * num_tokens + places, mask=is_token, other=-1.0)
        anchor_scale = tl.load(scale + row * num_tokens + anchor)
        cosines = _in_range(cosines)
        near = tl.where(places == anchor, float("inf"), tl.maximum(near, cosines))
        # An anchor that is not finite absorbs nothing.
        cosines = tl.where(anchor_scale == anchor_scale, cosines, float("-inf"))
        closer = (cosines > best) | ((cosines == best) & (anchor < best_anchor))
        best = tl.where(closer, cosines, best)
        best_anchor = tl.where(closer, anchor, best_anchor)
    for start in range(0, most, BLOCK):
        at = start + places
        tl.store(
            anchors + row * most + at, tl.zeros((BLOCK,), tl.int64) + num_tokens, mask=(at >= number) & (at < most)
        )
    own_scale = tl.load(scale + row * num_tokens + places, mask=is_token, other=1.0)
    best = tl.where(own_scale == own_scale, best, float("-inf"))
    tl.store(nearest + row * num_tokens + places, best_anchor.to(tl.int64), mask=is_token)
    tl.store(similarity + row * num_tokens + places, best, mask=is_token)


@jit
def _nearest_kernel(
    tokens,
    scale,
    chosen,
    num_chosen,
    nearest,
    similarity,
    num_tokens,
    hidden_size,
    width,
    ONLY_FINITE: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """
    Which of the first `num_chosen` tokens of `chosen` is most similar to each token, the first among equal ones. One
    program for each block of tokens of a row.
    """
    row = tl.program_id(1).to(tl.int64)
    tokens += row * num_tokens * hidden_size
    scale += row * num_tokens
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    is_token = places < num_tokens
    own_scale = tl.load(scale + places, mask=is_token, other=1.0)
    depth = tl.arange(0, DEPTH)
    lines = tl.arange(0, 64)
    number = tl.load(num_chosen + row).to(tl.int32)
    best = tl.full((SIZE,), float("-inf"), tl.float32)
    best_token = tl.full((SIZE,), -1, tl.int64)
    for first in range(0, number, 64):
        is_line = first + lines < number
        token = tl.load(chosen + row * width + first + lines, mask=is_line, other=0)
        sums = tl.zeros((64, SIZE), tl.float32)
        for start in range(0, hidden_size, DEPTH):
            at = start + depth
            is_value = at < hidden_size
            one = tl.load(
                tokens + token[:, None] * hidden_size + at[None, :],
                mask=is_line[:, None] & is_value[None, :],
                other=0.0,
            )
            other = tl.load(
                tokens + places[:, None].to(tl.int64) * hidden_size + at[None, :],
                mask=is_token[:, None] & is_value[None, :],
                other=0.0,
            )
            sums = tl.dot(one, tl.trans(other), sums, input_precision="ieee")
        line_scale = tl.load(scale + token, mask=is_line, other=1.0)
        cosines = _in_range(sums * line_scale[:, None] * own_scale[None, :])
        is_valid = is_line
        if ONLY_FINITE:
            is_valid = is_valid & (line_scale == line_scale)
        cosines = tl.where(is_valid[:, None], cosines, float("-inf"))
        top = tl.max(cosines, 0)
        # The first line that holds the maximum, and the token that it stands for.
        line = tl.min(tl.where(cosines == top[None, :], lines[:, None], 64), 0)
        found = tl.load(chosen + row * width + first + line, mask=first + line < number, other=0)
        closer = top > best
        best = tl.where(closer, top, best)
        best_token = tl.where(closer, found, best_token)
    if ONLY_FINITE:
        best = tl.where(own_scale == own_scale, best, float("-inf"))
    tl.store(nearest + row * num_tokens + places, best_token, mask=is_token)
    tl.store(similarity + row * num_tokens + places, best, mask=is_token)


@jit
def _step_kernel(
    tokens,
    scale,
    num_anchors,
    closest,
    low,
    place,
    anchors,
    num_tokens,
    hidden_size,
    most,
    step,
    num_blocks,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """
    The anchor of a step, the farthest token of those that the blocks of the last step named, and what it leaves for
    the next. One program for each block of tokens of a row; step -1 names without an anchor.
    """
    row = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    block = tl.program_id(0)
    tokens += row * num_tokens * hidden_size
    scale += row * num_tokens
    closest += row * num_tokens
    places = block * SIZE + tl.arange(0, SIZE)
    is_token = places < num_tokens
    near = tl.load(closest + places, mask=is_token, other=float("inf"))
    number = tl.load(num_anchors + row)
    if step >= number:
        if (step >= 0) & (block == 0):
            tl.store(anchors + row * most + step, tl.zeros((), tl.int64) + num_tokens)
    else:
        if step >= 0:
            blocks = tl.arange(0, BLOCKS)
            last = ((step + 1) % 2 * batch + row) * num_blocks
            lows = tl.load(low + last + blocks, mask=blocks < num_blocks, other=float("inf"))
            winner = tl.argmin(lows, 0, tie_break_left=True)
            anchor = tl.load(place + last + winner)
            if block == 0:
                tl.store(anchors + row * most + step, anchor)
            depth = tl.arange(0, DEPTH)
            sums = tl.zeros((SIZE, DEPTH), tl.float32)
            for start in range(0, hidden_size, DEPTH):
                at = start + depth
                one = tl.load(tokens + anchor * hidden_size + at, mask=at < hidden_size, other=0.0).to(tl.float32)
                other = tl.load(
                    tokens + places[:, None].to(tl.int64) * hidden_size + at[None, :],
                    mask=is_token[:, None] & (at[None, :] < hidden_size),
                    other=0.0,
                ).to(tl.float32)
                sums += one[None, :] * other
            own_scale = tl.load(scale + places, mask=is_token, other=1.0)
            cosines = _in_range(tl.sum(sums, 1) * own_scale * tl.load(scale + anchor))
            near = tl.where(places == anchor, float("inf"), tl.maximum(near, cosines))
            tl.store(closest + places, near, mask=is_token)
        winner = tl.argmin(near, 0, tie_break_left=True)
        here = (step % 2 + 2) % 2
        tl.store(low + (here * batch + row) * num_blocks + block, tl.min(near, 0))
        tl.store(place + (here * batch + row) * num_blocks + block, (block * SIZE + winner).to(tl.int64))
