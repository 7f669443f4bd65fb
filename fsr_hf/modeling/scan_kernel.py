"""
Speed only: Scan on NVIDIA GPUs. Triton kernels for Eqs. 5 and 8, in a few launches for the whole batch.

There are two variants, which differ in memory:

- Up to `_MAX_PAIRS` tokens, the cosines of all pairs are computed first. Then one program per row of the batch adds
  one anchor after the other. It keeps two values of each token in registers, the cosines to the closest chosen token
  and to the nearest anchor, and reads one row of cosines per step.
- Beyond, cosines are computed when they are needed and not kept. There is one launch per anchor, in which each program
  reads one block of tokens.

The host never waits for a value.
"""

import torch

from .triton_launch import is_interpreted, is_trusted, jit, tl, triton


__all__ = ["can_scan_on_gpu", "scan_on_gpu"]

_MAX_PAIRS = 8192  # tokens in a row of the batch; their cosines take 256 MiB
_MAX_PAIRS_MEMORY = 2**29  # bytes that the cosines of several rows may take at once


def can_scan_on_gpu(features: torch.Tensor, torch_path) -> bool:
    """
    Whether [`scan_on_gpu`] may scan `features`: it runs on their device, and has agreed there with `torch_path`, which
    takes the same arguments, on a small problem.
    """
    return is_trusted(features, _agrees, torch_path, features.shape[1] <= _MAX_PAIRS)


def scan_on_gpu(
    features: torch.Tensor,
    mask: torch.Tensor,
    focus: torch.Tensor,
    num_focus: torch.Tensor,
    even: torch.Tensor,
    num_even: torch.Tensor,
    num_anchors: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Eqs. 5 and 8.

    Args:
        features (`torch.FloatTensor` of shape `(batch, num_tokens, hidden_size)`):
            The tokens, in any floating-point dtype. Products are exact and summed in float32.
        mask (`torch.BoolTensor` of shape `(batch, num_tokens)`):
            True for real tokens.
        focus (`torch.LongTensor` of shape `(batch, width)`):
            The Focus tokens of each row, filled up with `num_tokens`.
        even (`torch.LongTensor` of shape `(batch, width - 1)`):
            The anchors to begin with, ascending, filled up with `num_tokens`.
        num_focus, num_even, num_anchors (`torch.LongTensor` of shape `(batch,)`):
            How many Focus tokens each row has, how many anchors it begins with, and how many it will have, no more
            than there are tokens left.

    Returns:
        The anchors in the order of their choice, `(batch, width - 1)`, filled up with `num_tokens`; the anchor that is
        most similar to each token, `(batch, num_tokens)`, or -1; and its cosine, -inf if there is none or the token is
        not finite.
    """
    with_pairs = features.shape[1] <= _MAX_PAIRS
    return _scan(with_pairs, features, mask, focus, num_focus, even, num_even, num_anchors)


def _scan(with_pairs, features, mask, focus, num_focus, even, num_even, num_anchors):
    batch, num_tokens, _ = features.shape
    max_rows = max(1, _MAX_PAIRS_MEMORY // (4 * num_tokens**2))
    if with_pairs and batch > max_rows:
        inputs = (features, mask, focus, num_focus, even, num_even, num_anchors)
        parts = [_scan(with_pairs, *part) for part in zip(*(tensor.split(max_rows) for tensor in inputs))]
        anchors, nearest, similarity = (torch.cat(outputs) for outputs in zip(*parts))
        return anchors, nearest, similarity

    anchors = even.clone(memory_format=torch.contiguous_format)
    nearest = torch.empty_like(mask, dtype=torch.long)
    similarity, closest = (torch.empty_like(mask, dtype=torch.float32) for _ in range(2))
    if batch:
        mask, focus = mask.contiguous(), focus.contiguous()
        num_focus, num_even, num_anchors = (count.contiguous() for count in (num_focus, num_even, num_anchors))
        scan = _scan_with_pairs if with_pairs else _scan_without_pairs
        with torch.cuda.device_of(features):  # Triton launches on the current device
            tokens, scale = _scale(features)
            counts = (num_focus, num_even, num_anchors)
            scan(tokens, scale, mask, focus, *counts, closest, anchors, nearest, similarity)
    return anchors, nearest, similarity


def _agrees(torch_path, device, dtype, with_pairs):
    """
    Whether the kernels and `torch_path` choose the same anchors among copies of eleven tokens, zero vectors and
    non-finite tokens: in a row without a mask that begins with two anchors, and in one with a mask and fewer anchors.

    Apart from exact ties, every choice is won by a difference of at least 0.02 in cosine, more than either path rounds
    away, even if `torch_path` multiplies in TF32.
    """
    num_tokens = 132  # more than a block of any kernel, and no multiple of one
    places = torch.arange(num_tokens, device="cpu")
    kind, depth = (places * 7 % 11)[:, None], torch.arange(24, device="cpu")
    tokens = ((2 * kind**2 + 3 * kind * depth + 3 * depth**2 + kind) % 13 - 6).to(torch.float32)
    tokens[[5, 70]] = 0.0
    tokens[[11, 131], 3] = torch.nan
    tokens[64, 0] = -torch.inf
    features = torch.stack([tokens, tokens.flip(0)]).to(device, dtype)
    mask = torch.stack([places >= 0, places % 9 != 4]).to(device)
    focus = torch.full((2, 12), num_tokens, device=device)
    focus[0, :3], focus[1, 0] = torch.tensor([40, 2, 129], device=device), 30
    even = torch.full((2, 11), num_tokens, device=device)
    even[0, :2] = torch.tensor([53, 114], device=device)
    counts = ([3, 1], [2, 0], [9, 6])  # Focus tokens, anchors to begin with, all anchors
    num_focus, num_even, num_anchors = (torch.tensor(count, device=device) for count in counts)

    arguments = (features, mask, focus, num_focus, even, num_even, num_anchors)
    anchors, nearest, similarity = _scan(with_pairs, *arguments)
    expected_anchors, expected_nearest, expected_similarity = torch_path(*arguments)
    has_anchor = expected_similarity > -torch.inf
    return (
        torch.equal(anchors, expected_anchors)
        and torch.equal(nearest[has_anchor], expected_nearest[has_anchor])
        and torch.allclose(similarity, expected_similarity, atol=5e-3)
    )


def _scale(features):
    """
    The tokens times powers of two that keep their squares in range, `(batch, num_tokens, hidden_size)`, in their own
    dtype, which changes no digit; and the reciprocals of their norms, `(batch, num_tokens)`, NaN for tokens that are
    not finite.
    """
    features = features.detach().contiguous()
    # The interpreter multiplies bfloat16 matrices as if they were integers, so there they are float32.
    is_half = features.dtype == torch.float16 or (features.dtype == torch.bfloat16 and not is_interpreted())
    tokens = torch.empty_like(features, dtype=features.dtype if is_half else torch.float32)
    scale = features.new_empty(features.shape[:2], dtype=torch.float32)
    block = min(triton.next_power_of_2(features.shape[2]), 4096)
    _scale_kernel[(scale.numel(),)](features, tokens, scale, features.shape[2], BLOCK=block)
    return tokens, scale


def _scan_with_pairs(
    tokens, scale, mask, focus, num_focus, num_even, num_anchors, closest, anchors, nearest, similarity
):
    batch, num_tokens, _ = tokens.shape
    pairs = _cosines_of_pairs(tokens, scale)
    block = triton.next_power_of_2(num_tokens)
    focus_block = min(block, 128)
    _focus_kernel[(triton.cdiv(num_tokens, focus_block), batch)](
        pairs, mask, focus, num_focus, closest, num_tokens, focus.shape[1], BLOCK=focus_block, num_warps=4
    )
    _scan_kernel[(batch,)](
        *(pairs, scale, closest, num_even, num_anchors, anchors, nearest, similarity),
        *(num_tokens, anchors.shape[1]),
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 16),
    )


def _cosines_of_pairs(tokens, scale):
    """Cosines of all pairs, `(batch, num_tokens, num_tokens)`, float32; not clamped to [-1, 1], NaN if not finite."""
    batch, num_tokens, hidden_size = tokens.shape
    if tokens.dtype == torch.float32:
        # The library's float32 product is faster. It may round a last, incomplete tile differently, so there is none.
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


def _scan_without_pairs(
    tokens, scale, mask, focus, num_focus, num_even, num_anchors, closest, anchors, nearest, similarity
):
    batch, num_tokens, hidden_size = tokens.shape
    sizes = (num_tokens, hidden_size)
    options = {"SIZE": 128, "DEPTH": 32 if tokens.dtype == torch.float32 else 64, "num_warps": 8}
    grid = (triton.cdiv(num_tokens, 128), batch)
    _nearest_kernel[grid](
        *(tokens, scale, focus, num_focus, nearest, closest, *sizes, focus.shape[1]), ONLY_FINITE=False, **options
    )
    closest.clamp_(min=-1.0).masked_fill_(~mask, torch.inf)
    closest.copy_(torch.nn.functional.pad(closest, (0, 1)).scatter_(1, focus, torch.inf)[:, :-1])

    # Each program writes the farthest token of its block; the next step compares the blocks. Two buffers, used in
    # turns, keep what one step reads apart from what it writes.
    size = 16
    blocks = triton.cdiv(num_tokens, size)
    block_cosine = closest.new_full((2, batch, blocks), torch.inf)
    block_token = focus.new_zeros(2, batch, blocks)
    depth = min(triton.next_power_of_2(hidden_size), 512)
    for step in range(-1, anchors.shape[1]):
        _step_kernel[(blocks, batch)](
            *(tokens, scale, num_even, num_anchors, closest, block_cosine, block_token, anchors, *sizes),
            *(anchors.shape[1], step, blocks),
            SIZE=size,
            DEPTH=depth,
            BLOCKS=triton.next_power_of_2(blocks),
            num_warps=4,
        )
    ordered = anchors.sort(dim=1).values
    _nearest_kernel[grid](
        *(tokens, scale, ordered, num_anchors, nearest, similarity, *sizes, anchors.shape[1]),
        ONLY_FINITE=True,
        **options,
    )


@jit
def _scale_kernel(features, tokens, scale, hidden_size, BLOCK: tl.constexpr):
    """Norm and scaled values. One program per token."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    peak = tl.zeros((BLOCK,), tl.float32)
    finite = tl.full((BLOCK,), 1, tl.int32)
    for start in range(0, hidden_size, BLOCK):
        at = start + places
        values = tl.load(features + token * hidden_size + at, mask=at < hidden_size, other=0.0).to(tl.float32)
        finite = finite & (tl.abs(values) < float("inf")).to(tl.int32)
        peak = tl.maximum(peak, tl.abs(values))
    # 2 ** -exponent of the largest entry, computed on the bits of the float.
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
    """One program per square block of cosines. All sums run in the same order, so equal tokens have equal cosines."""
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
    Cosine of each token to the closest Focus token; infinity for tokens that cannot become anchors. One program per
    block of tokens in a row.
    """
    row = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = places < num_tokens
    closest_cosine = tl.full((BLOCK,), -1.0, tl.float32)
    is_candidate = tl.load(mask + row * num_tokens + places, mask=is_token, other=0) != 0
    for index in range(tl.load(num_focus + row)):
        token = tl.load(focus + row * width + index)
        cosines = tl.load(pairs + (row * num_tokens + token) * num_tokens + places, mask=is_token, other=-1.0)
        closest_cosine = tl.maximum(closest_cosine, _in_range(cosines))
        is_candidate = is_candidate & (places != token)
    tl.store(closest + row * num_tokens + places, tl.where(is_candidate, closest_cosine, float("inf")), mask=is_token)


@jit
def _scan_kernel(
    pairs,
    scale,
    closest,
    num_even,
    num_anchors,
    anchors,
    nearest,
    similarity,
    num_tokens,
    max_anchors,
    BLOCK: tl.constexpr,
):
    """
    Anchors one after the other, of which `anchors` holds the first `num_even`, and the nearest anchor of each token.
    One program per row of the batch.
    """
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    is_token = places < num_tokens
    count = tl.load(num_anchors + row).to(tl.int32)
    given = tl.load(num_even + row).to(tl.int32)
    closest_cosine = tl.load(closest + row * num_tokens + places, mask=is_token, other=float("inf"))
    nearest_cosine = tl.full((BLOCK,), float("-inf"), tl.float32)
    nearest_anchor = tl.full((BLOCK,), -1, tl.int32)
    for step in range(count):
        anchor = tl.argmin(closest_cosine, 0, tie_break_left=True)
        even = tl.load(anchors + row * max_anchors + step, mask=step < given, other=0)
        anchor = tl.where(step < given, even.to(tl.int32), anchor)
        tl.store(anchors + row * max_anchors + step, anchor.to(tl.int64))
        cosines = tl.load(pairs + (row * num_tokens + anchor) * num_tokens + places, mask=is_token, other=-1.0)
        anchor_scale = tl.load(scale + row * num_tokens + anchor)
        cosines = _in_range(cosines)
        closest_cosine = tl.where(places == anchor, float("inf"), tl.maximum(closest_cosine, cosines))
        # An anchor that is not finite absorbs nothing.
        cosines = tl.where(anchor_scale == anchor_scale, cosines, float("-inf"))
        is_nearer = (cosines > nearest_cosine) | ((cosines == nearest_cosine) & (anchor < nearest_anchor))
        nearest_cosine = tl.where(is_nearer, cosines, nearest_cosine)
        nearest_anchor = tl.where(is_nearer, anchor, nearest_anchor)
    for start in range(0, max_anchors, BLOCK):
        at = start + places
        tl.store(
            anchors + row * max_anchors + at,
            tl.zeros((BLOCK,), tl.int64) + num_tokens,
            mask=(at >= count) & (at < max_anchors),
        )
    own_scale = tl.load(scale + row * num_tokens + places, mask=is_token, other=1.0)
    nearest_cosine = tl.where(own_scale == own_scale, nearest_cosine, float("-inf"))
    tl.store(nearest + row * num_tokens + places, nearest_anchor.to(tl.int64), mask=is_token)
    tl.store(similarity + row * num_tokens + places, nearest_cosine, mask=is_token)


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
    Which of the first `num_chosen` tokens of `chosen` is most similar to each token; the first among equal ones. One
    program per block of tokens in a row.
    """
    row = tl.program_id(1).to(tl.int64)
    tokens += row * num_tokens * hidden_size
    scale += row * num_tokens
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    is_token = places < num_tokens
    own_scale = tl.load(scale + places, mask=is_token, other=1.0)
    depth = tl.arange(0, DEPTH)
    slots = tl.arange(0, 64)
    count = tl.load(num_chosen + row).to(tl.int32)
    best = tl.full((SIZE,), float("-inf"), tl.float32)
    best_token = tl.full((SIZE,), -1, tl.int64)
    for first in range(0, count, 64):
        is_slot = first + slots < count
        token = tl.load(chosen + row * width + first + slots, mask=is_slot, other=0)
        sums = tl.zeros((64, SIZE), tl.float32)
        for start in range(0, hidden_size, DEPTH):
            at = start + depth
            is_value = at < hidden_size
            one = tl.load(
                tokens + token[:, None] * hidden_size + at[None, :],
                mask=is_slot[:, None] & is_value[None, :],
                other=0.0,
            )
            other = tl.load(
                tokens + places[:, None].to(tl.int64) * hidden_size + at[None, :],
                mask=is_token[:, None] & is_value[None, :],
                other=0.0,
            )
            sums = tl.dot(one, tl.trans(other), sums, input_precision="ieee")
        slot_scale = tl.load(scale + token, mask=is_slot, other=1.0)
        cosines = _in_range(sums * slot_scale[:, None] * own_scale[None, :])
        is_valid = is_slot
        if ONLY_FINITE:
            is_valid = is_valid & (slot_scale == slot_scale)
        cosines = tl.where(is_valid[:, None], cosines, float("-inf"))
        top = tl.max(cosines, 0)
        # The first slot that holds the maximum, and its token.
        slot = tl.min(tl.where(cosines == top[None, :], slots[:, None], 64), 0)
        found = tl.load(chosen + row * width + first + slot, mask=first + slot < count, other=0)
        is_nearer = top > best
        best = tl.where(is_nearer, top, best)
        best_token = tl.where(is_nearer, found, best_token)
    if ONLY_FINITE:
        best = tl.where(own_scale == own_scale, best, float("-inf"))
    tl.store(nearest + row * num_tokens + places, best_token, mask=is_token)
    tl.store(similarity + row * num_tokens + places, best, mask=is_token)


@jit
def _step_kernel(
    tokens,
    scale,
    num_even,
    num_anchors,
    closest,
    block_cosine,
    block_token,
    anchors,
    num_tokens,
    hidden_size,
    max_anchors,
    step,
    num_blocks,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """
    One step of Eq. 5. Its anchor is the farthest of the tokens that the blocks wrote in the last step, or, in the
    first `num_even` steps, the one that `anchors` holds; then each block updates its cosines and writes its own
    farthest token. Step -1 only writes. One program per block of tokens in a row.
    """
    row = tl.program_id(1).to(tl.int64)
    batch = tl.num_programs(1)
    block = tl.program_id(0)
    tokens += row * num_tokens * hidden_size
    scale += row * num_tokens
    closest += row * num_tokens
    places = block * SIZE + tl.arange(0, SIZE)
    is_token = places < num_tokens
    closest_cosine = tl.load(closest + places, mask=is_token, other=float("inf"))
    count = tl.load(num_anchors + row)
    if step >= count:
        if (step >= 0) & (block == 0):
            tl.store(anchors + row * max_anchors + step, tl.zeros((), tl.int64) + num_tokens)
    else:
        if step >= 0:
            blocks = tl.arange(0, BLOCKS)
            last = ((step + 1) % 2 * batch + row) * num_blocks
            cosines_of_blocks = tl.load(block_cosine + last + blocks, mask=blocks < num_blocks, other=float("inf"))
            winner = tl.argmin(cosines_of_blocks, 0, tie_break_left=True)
            anchor = tl.load(block_token + last + winner)
            is_given = step < tl.load(num_even + row)
            even = tl.load(anchors + row * max_anchors + step, mask=is_given, other=0)
            anchor = tl.where(is_given, even, anchor)
            if block == 0:
                tl.store(anchors + row * max_anchors + step, anchor)
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
            closest_cosine = tl.where(places == anchor, float("inf"), tl.maximum(closest_cosine, cosines))
            tl.store(closest + places, closest_cosine, mask=is_token)
        winner = tl.argmin(closest_cosine, 0, tie_break_left=True)
        here = (step % 2 + 2) % 2
        tl.store(block_cosine + (here * batch + row) * num_blocks + block, tl.min(closest_cosine, 0))
        tl.store(block_token + (here * batch + row) * num_blocks + block, (block * SIZE + winner).to(tl.int64))
