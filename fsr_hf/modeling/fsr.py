"""Focus, Scan, Refine: which visual tokens to keep, and what the kept ones absorb.

The method of "Focus-Scan-Refine: From Human Visual Perception to Efficient Visual Token Pruning" (arXiv 2602.05809),
on tensors alone. Saliency and relevance (Eqs. 1 and 2) depend on the model and are arguments here; Eqs. 3 to 9 follow
below in the paper's order. No shape depends on the values of a tensor, so the host never waits for the device, and all
rows of the batch are computed at once. Eqs. 5 and 8 take most of the time: `host_scan` (CPU) and `scan_kernel` (NVIDIA
GPUs) compute them faster and select the same tokens.
"""

from dataclasses import dataclass

import torch

from ..configuration.configuration_fsr import SELECTION_FIELDS, check_fsr_value
from .host_scan import can_scan_on_host, scan_on_host
from .precision import without_autocast
from .scan_kernel import can_scan_on_gpu, scan_on_gpu


__all__ = ["VisualSelection", "refine_like", "select_visual_tokens"]


@dataclass
class VisualSelection:
    """
    The visual tokens that Focus, Scan and Refine keep, of a batch of pools. The output of a model holds one for each
    image or video: the same fields without the `batch` dimension and padding, where `num_tokens` counts the item's
    placeholders in the prompt.

    Args:
        indices (`torch.LongTensor` of shape `(batch, num_kept)`):
            Positions of the kept tokens among the `num_tokens`, ascending; -1 fills up a row that keeps fewer.
        is_focus (`torch.BoolTensor` of shape `(batch, num_kept)`):
            True for a Focus token, False for a Scan anchor and for padding.
        features (`torch.FloatTensor` of shape `(batch, num_kept, hidden_size)`):
            The kept tokens after Refine, in the dtype of the input; zeros at padding.
        priority (`torch.FloatTensor` of shape `(batch, num_tokens)`):
            Priority of every token in [0, 1] (Eq. 3), float32; 0 at masked columns.
        merged_into (`torch.LongTensor` of shape `(batch, num_tokens)`):
            For a token that Refine merged, the position of its anchor among the `num_tokens`; -1 for every other.
        grid (`torch.LongTensor` of shape `(num_tokens, 3)`), modality (`str`), row (`int`), *optional*:
            Filled in by a model: view or frame, row and column of every token; `"image"` or `"video"`; and the item's
            row of the prompt batch.
    """

    indices: torch.Tensor
    is_focus: torch.Tensor
    features: torch.Tensor
    priority: torch.Tensor
    merged_into: torch.Tensor
    grid: torch.Tensor | None = None
    modality: str | None = None
    row: int | None = None


def select_visual_tokens(
    features: torch.Tensor,
    saliency: torch.Tensor,
    relevance: torch.Tensor | None,
    num_visual_tokens: int | torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    alpha: float = 3.0,
    beta: float = 1.0,
    rho: float = 0.9,
    focus_limit: float = 0.5,
    uniform_scan: float = 0.0,
    kappa: float | None = 1.0,
    focus_mass: str = "all",
    max_num_visual_tokens: int | None = None,
) -> VisualSelection:
    """
    Keep the visual tokens that Focus and Scan choose, after Refine has merged others into them (arXiv 2602.05809).

    Each row of the batch is a pool of tokens, selected by itself. Ties go to the lower index. Scores and cosines are
    float32, under autocast too. Gradients flow to `features` through the kept and the merged tokens; the selection and
    the weights of the merge are constants to autograd. A score that is NaN or infinite counts as the smallest finite
    one of its pool. A token with NaN or infinite features has cosine -1 to every other and neither absorbs nor is
    absorbed; a zero vector has cosine 0.

    Args:
        features (`torch.FloatTensor` of shape `(batch, num_tokens, hidden_size)`):
            The visual tokens as the language model would receive them.
        saliency (`torch.FloatTensor` of shape `(batch, num_tokens)`):
            How much attention the vision encoder pays to each token (Eq. 1), in any unit.
        relevance (`torch.FloatTensor` of shape `(batch, num_tokens)`, *optional*):
            How well each token fits the query (Eq. 2), in any unit, higher for a better fit. `None` leaves the term
            out of the priority.
        num_visual_tokens (`int` or `torch.LongTensor` of shape `(batch,)`):
            Tokens to keep in each row, at least 1. A tensor gives each row its own number, and 0 keeps none of a row.
            A row with fewer real tokens keeps them all and merges nothing.
        mask (`torch.BoolTensor` of shape `(batch, num_tokens)`, *optional*):
            True for real tokens. The others are never kept or merged and do not count in any minimum, maximum or sum.
        alpha, beta, rho, focus_limit, uniform_scan, kappa (`float`), focus_mass (`str`), *optional*:
            As the fields of [`FSRConfig`], with its defaults and ranges. Focus takes at most
            `max(1, floor(focus_limit * budget))` tokens, where `budget` is at most the number of a row's real tokens,
            and the first `floor(uniform_scan * budget ** 2 / real tokens)` anchors are spread evenly over the others.
        max_num_visual_tokens (`int`, *optional*):
            Read with a tensor `num_visual_tokens` only: the width of the result and the most that a row keeps. Without
            it the width is `num_tokens`, since the values of a tensor are not read on the host.

    Returns:
        [`VisualSelection`] of width `min(num_visual_tokens, num_tokens)`.

    Raises:
        ValueError: If an argument is outside its range (those of [`FSRConfig`]), a budget is no int of at least 1, or
            a shape or dtype does not fit. The values of tensors are not checked.
    """
    _check_tensors(features, saliency, relevance, mask)
    _check_budgets(features, num_visual_tokens, max_num_visual_tokens)
    settings = (alpha, beta, rho, focus_limit, uniform_scan, kappa, focus_mass)
    for name, value in zip(SELECTION_FIELDS, settings):
        check_fsr_value(name, value)
    batch, num_tokens, _ = features.shape
    device = features.device
    if mask is None:
        mask = torch.ones_like(saliency, dtype=torch.bool)
    if isinstance(num_visual_tokens, torch.Tensor):
        width = num_tokens if max_num_visual_tokens is None else min(max_num_visual_tokens, num_tokens)
        budgets = num_visual_tokens.to(device, non_blocking=True).clamp(max=width)
    else:
        width = min(num_visual_tokens, num_tokens)
        budgets = torch.full((batch,), width, device=device)
    budgets = torch.minimum(budgets, mask.sum(-1))

    with without_autocast(device):
        with torch.no_grad():
            priority = _priority(saliency, relevance, mask, alpha, beta)
            focus, num_focus = _focus(priority, mask, budgets, width, rho, focus_limit, focus_mass)
            num_anchors = budgets - num_focus
            even, num_even = _spread_evenly(mask, focus, budgets, num_anchors, uniform_scan)
            anchors, nearest, similarity = _scan(features, mask, focus, num_focus, even, num_even, num_anchors)
            kept, source = torch.cat([focus, anchors], dim=1).sort(dim=1)
            kept, source = kept[:, :width], source[:, :width]
            is_focus = (kept < num_tokens) & (source < width)
        refined, merged_into = _refine(features, priority, mask, kept, is_focus, nearest, similarity, kappa)
    return VisualSelection(kept.masked_fill(kept == num_tokens, -1), is_focus, refined, priority, merged_into)


def refine_like(selection: VisualSelection, features: torch.Tensor, kappa: float | None) -> torch.Tensor:
    """
    Refine (Eq. 9) other features of the same tokens, `(batch, num_tokens, size)`, with the anchors and the weights of
    what [`select_visual_tokens`] returned for this `kappa`: `(batch, num_kept, size)`, zeros at padding.
    """
    kept = selection.indices.masked_fill(selection.indices < 0, features.shape[1])
    # Only what the selection merged may merge.
    is_merged = selection.merged_into >= 0
    similarity = torch.zeros_like(selection.priority).masked_fill(~is_merged, -torch.inf)
    mask, is_focus, nearest = torch.ones_like(is_merged), selection.is_focus, selection.merged_into
    with without_autocast(features.device):
        return _refine(features, selection.priority, mask, kept, is_focus, nearest, similarity, kappa)[0]


def _priority(saliency, relevance, mask, alpha, beta):
    """Eq. 3: the product of relevance and saliency, each min-max normalised over its pool. `(batch, num_tokens)`."""
    priority = _power(_min_max(saliency, mask), beta)
    if relevance is not None:
        priority = _power(_min_max(relevance, mask), alpha) * priority
    return priority.masked_fill(~mask, 0.0)


def _min_max(scores, mask):
    """Scores of each pool on [0, 1]; a constant score is all ones, so that it drops out of the product."""
    scores = scores.float().contiguous()
    finite = scores.isfinite() & mask
    low = scores.masked_fill(~finite, torch.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~finite, -torch.inf).amax(-1, keepdim=True)
    # Halves, because the span of finite scores can overflow.
    span = high / 2 - low / 2
    normalized = (torch.where(finite, scores, low) / 2 - low / 2) / span
    return normalized.masked_fill(span <= 0, 1.0)


def _power(scores, exponent):
    """
    `scores ** exponent`, the same for equal scores: each takes the power of the first of its equals in sorted order.
    torch itself computes the elements that fill no vector register by another function, which may round differently.
    """
    if exponent in (0, 1, 2, 3):  # computed by products, which round alike everywhere
        return scores**exponent
    ordered = scores.sort(dim=-1).values
    return (ordered**exponent).gather(-1, torch.searchsorted(ordered, scores))


def _focus(priority, mask, budgets, width, rho, focus_limit, focus_mass):
    """
    Eq. 4: the fewest tokens of highest priority that hold the share `rho` of the mass, up to the share `focus_limit`
    of the budget.

    Returns their positions by descending priority, `(batch, width)`, filled up with `num_tokens`; and how many there
    are, `(batch,)`.
    """
    num_tokens = mask.shape[1]
    order = priority.masked_fill(~mask, -1.0).argsort(dim=-1, descending=True, stable=True)
    # In float32 the sum can stop growing before it reaches the share. MPS has no float64.
    dtype = torch.float32 if mask.device.type == "mps" else torch.float64
    mass = priority.gather(1, order).to(dtype).cumsum(-1)
    total = mass.gather(1, budgets[:, None].clamp(min=1) - 1) if focus_mass == "budget" else mass[:, -1:]
    counts = torch.arange(1, num_tokens + 1, device=mask.device)
    num_focus = counts.expand_as(mass).masked_fill(mass < rho * total, num_tokens).amin(-1)
    limit = (focus_limit * budgets.to(dtype) + 1e-6).floor().clamp(min=1).to(budgets.dtype)
    num_focus = torch.minimum(num_focus, torch.minimum(limit, budgets))
    return order[:, :width].masked_fill(counts[:width] > num_focus[:, None], num_tokens), num_focus


def _spread_evenly(mask, focus, budgets, num_anchors, uniform_scan):
    """
    The anchors that Scan begins with: they stand at equal distances among the tokens that Focus leaves, in reading
    order. There are `uniform_scan` times the budget times its share of the tokens, so that the background gets the
    share of the budget that the budget is of the whole. Eq. 5 alone (`uniform_scan=0`) leaves gaps: it goes where
    tokens differ, and questions that count or compare places ask about everything.

    Returns their positions, ascending, `(batch, width - 1)`, filled up with `num_tokens`; and how many there are,
    `(batch,)`.
    """
    num_tokens, width = mask.shape[1], focus.shape[1]
    dtype = torch.float32 if mask.device.type == "mps" else torch.float64
    share = uniform_scan * budgets.to(dtype) ** 2 / mask.sum(-1).clamp(min=1)
    num_even = torch.minimum((share + 1e-6).floor().to(budgets.dtype), num_anchors)
    place = _without(mask, focus).cumsum(-1)  # among those tokens, from 1
    numbers = torch.arange(1, width, device=mask.device)
    num_left, parts = place[:, -1:], num_even[:, None].clamp(min=1)
    # Of as many equal parts the middle one each: the ceiling of (number - 1/2) * size.
    middle = -((num_left // 2 - numbers * num_left) // parts)
    even = torch.searchsorted(place, middle.contiguous())
    return even.masked_fill(numbers > num_even[:, None], num_tokens), num_even


def _scan(features, mask, focus, num_focus, even, num_even, num_anchors):
    """
    Eqs. 5 and 8, by the fastest code for the device. All of it selects the same tokens.

    Returns the positions of the anchors in the order of their choice, `(batch, width - 1)`, filled up with
    `num_tokens`; and for each token its nearest anchor and the cosine to it, as [`_nearest_anchor`] returns them.
    """
    if can_scan_on_gpu(features, _scan_with_torch):
        return scan_on_gpu(features, mask, focus, num_focus, even, num_even, num_anchors)
    if can_scan_on_host(features):
        return scan_on_host(features, mask, focus, even, num_anchors)
    return _scan_with_torch(features, mask, focus, num_focus, even, num_even, num_anchors)


def _scan_with_torch(features, mask, focus, num_focus, even, num_even, num_anchors):
    """
    Eq. 5: starting from the Focus tokens and the anchors `even`, add one token after the other, each the farthest from
    all chosen so far.

    This is greedy k-center with fixed centres: in the metric sqrt(1 - cos), the farthest token is at most twice as far
    from its nearest kept token as with the best choice of anchors (Eqs. 6 and 7).
    """
    cosines = _Cosines(features)
    num_tokens, width = mask.shape[1], focus.shape[1]
    # Cosine of each token to the closest one chosen so far; infinity takes a token out of the choice.
    closest = torch.full_like(mask, -1.0, dtype=torch.float32)
    for block in focus.split(_BLOCK, dim=1):
        rows = cosines.rows(block.clamp(max=num_tokens - 1)).masked_fill(block[..., None] == num_tokens, -1.0)
        closest = torch.maximum(closest, rows.amax(1))
    closest = closest.masked_fill(~_without(mask, focus), torch.inf)
    anchors = [focus[:, :0]]
    for step in range(width - 1):
        anchor = closest.argmin(-1, keepdim=True)  # the first of equal ones, on all devices
        anchor = torch.where(step < num_even[:, None], even[:, step, None], anchor)
        closest = torch.maximum(closest, cosines.rows(anchor).squeeze(1)).scatter_(1, anchor, torch.inf)
        anchors.append(anchor)
    # No choice depends on a later one, so a row with a smaller budget keeps the first of its anchors.
    counts = torch.arange(1, width, device=mask.device)
    anchors = torch.cat(anchors, dim=1).masked_fill(counts > num_anchors[:, None], num_tokens)
    return anchors, *_nearest_anchor(cosines, anchors)


def _nearest_anchor(cosines, anchors):
    """
    Eq. 8: the anchor that is most similar to each token, and its cosine, both `(batch, num_tokens)`. The cosine is
    -inf if there is no anchor, or if the token is not finite; anchors that are not finite do not count.
    """
    nearest = anchors.new_full(cosines.finite.shape, -1)
    similarity = torch.full_like(cosines.finite, -torch.inf, dtype=torch.float32)
    anchors = anchors.sort(dim=1).values
    for start in range(0, anchors.shape[1], _BLOCK):
        block = anchors[:, start : start + _BLOCK]
        tokens = block.clamp(max=cosines.finite.shape[1] - 1)
        absorbs = (tokens == block) & cosines.finite.gather(1, tokens)
        rows = cosines.rows(tokens).masked_fill(~absorbs[..., None], -torch.inf)  # (batch, block, num_tokens)
        is_closer = rows.amax(1) > similarity
        # argmax takes the first of equal ones, on all devices: the lower index, since anchors are sorted.
        nearest = torch.where(is_closer, tokens.gather(1, rows.argmax(1)), nearest)
        similarity = torch.where(is_closer, rows.amax(1), similarity)
    return nearest, similarity.masked_fill(~cosines.finite, -torch.inf)


def _refine(features, priority, mask, kept, is_focus, nearest, similarity, kappa):
    """
    Eq. 9: merge the dropped tokens that are most similar to their nearest anchor into it, `kappa` for each anchor, or
    all of them.

    Applied to all tokens that an anchor absorbs, the paper's update is the mean of anchor and tokens, weighted by
    priority.

    Returns the kept tokens after Refine, `(batch, width, hidden_size)`, and for each token the anchor that it was
    merged into, or -1, `(batch, num_tokens)`.
    """
    num_tokens, width = mask.shape[1], kept.shape[1]
    is_kept = kept < num_tokens
    can_merge = _without(mask, kept) & (similarity > -torch.inf)
    refined = _take(features, kept.clamp(max=num_tokens - 1)).masked_fill(~is_kept[..., None], 0.0)
    merged_into = torch.full_like(nearest, -1)
    # No row merges more: at least one of its kept tokens is a Focus token.
    num_candidates = num_tokens - 1 if kappa is None else int(min(kappa * (width - 1) + 1e-6, num_tokens - 1))
    if num_candidates == 0:
        return refined, merged_into

    order = similarity.masked_fill(~can_merge, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    candidates = order[:, :num_candidates]
    is_merged = can_merge.gather(1, candidates)
    if kappa is not None:
        # In float32 the product can be off by more than the slack of 1e-6. MPS has no float64.
        dtype = torch.float32 if mask.device.type == "mps" else torch.float64
        num_merged = (kappa * (is_kept & ~is_focus).sum(-1, keepdim=True).to(dtype) + 1e-6).floor()
        is_merged &= torch.arange(num_candidates, device=mask.device) < num_merged
    anchor = nearest.gather(1, candidates)
    merged_into = merged_into.scatter(1, candidates, anchor.masked_fill(~is_merged, -1))

    # Where each candidate goes among the kept tokens; `width` if it is not merged.
    slot = torch.searchsorted(kept.contiguous(), anchor).masked_fill(~is_merged, width)
    weight = priority.gather(1, candidates).masked_fill(~is_merged, 0.0)[..., None]
    own_weight = priority.gather(1, kept.clamp(max=num_tokens - 1))[..., None]
    total = own_weight + _sum_by_slot(weight, slot, width)
    absorbs = torch.nn.functional.pad(torch.zeros_like(is_kept), (0, 1)).scatter(1, slot, True)[:, :width, None]
    changed = absorbs & (total > 0)
    total = total.masked_fill(total == 0, 1.0)

    weight = weight / _take(total, slot.clamp(max=width - 1))
    merged = _take(features, candidates).float().masked_fill(~is_merged[..., None], 0.0)
    mean = own_weight / total * refined.float() + _sum_by_slot(weight * merged, slot, width)
    return torch.where(changed, mean.to(features.dtype), refined), merged_into


# --- Helpers ---


# Chosen tokens whose cosines to all tokens are in memory at once.
_BLOCK = 512
# Matrix products may round the rows of a last, incomplete tile differently. No library has larger tiles of rows.
_TILE = 64


class _Cosines:
    """Cosines in float32 between some tokens of each pool and all tokens of that pool, `(batch, k, num_tokens)`."""

    def __init__(self, features):
        features = features.float()
        # Dividing by the largest entry first keeps the squares of the norm in range.
        peak = torch.maximum(features.amax(-1, keepdim=True), -features.amin(-1, keepdim=True))
        unit = features / peak.masked_fill(peak == 0, 1.0)
        norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        self.finite = peak.isfinite().squeeze(-1)
        unit = unit.div_(norm.masked_fill_(norm == 0, 1.0))
        # Padded to whole tiles, so that equal tokens have equal cosines wherever they stand.
        self.num_tokens = unit.shape[1]
        self.unit = torch.nn.functional.pad(unit, (0, 0, 0, -self.num_tokens % _TILE))
        # One product for all pairs is faster than one for each anchor. It takes at most twice the memory of features.
        self.pairs = self._between(self.unit) if self.num_tokens <= 2 * unit.shape[2] else None

    def _between(self, tokens):
        # A token with non-finite features has NaN in each of its cosines.
        cosines = (tokens @ self.unit.mT).clamp_(-1.0, 1.0).nan_to_num_(nan=-1.0)
        return cosines[..., : self.num_tokens]

    def rows(self, tokens):
        """Cosines of the tokens at the positions `tokens` `(batch, k)` to all, `(batch, k, num_tokens)`."""
        return self._between(_take(self.unit, tokens)) if self.pairs is None else _take(self.pairs, tokens)


def _take(tensor, tokens):
    """Rows `tokens` `(batch, k)` of a tensor `(batch, num_tokens, size)`: `(batch, k, size)`."""
    return tensor.gather(1, tokens[..., None].expand(-1, -1, tensor.shape[-1]))


def _without(mask, tokens):
    """`mask` with False at `tokens` `(batch, k)`, where `num_tokens` stands for no token."""
    return torch.nn.functional.pad(mask, (0, 1)).scatter(1, tokens, False)[:, :-1]


def _sum_by_slot(values, slot, width):
    """
    Sums of the `values` `(batch, k, size)` that have the same `slot` `(batch, k)`: `(batch, width, size)`.

    `index_add` adds in a fixed order on the CPU only; elsewhere a matrix product does.
    """
    batch, _, size = values.shape
    if values.device.type == "cpu":
        slot = slot + torch.arange(batch)[:, None] * (width + 1)
        sums = values.new_zeros(batch * (width + 1), size).index_add(0, slot.flatten(), values.flatten(0, 1))
        return sums.view(batch, width + 1, size)[:, :width]
    return (slot[:, None] == torch.arange(width, device=slot.device)[:, None]).to(values.dtype) @ values


def _check_tensors(features, saliency, relevance, mask):
    if features.ndim != 3 or features.shape[1] == 0:
        raise ValueError(
            "`features` must have the shape (batch, num_tokens, hidden_size) with at least one token, but its shape "
            f"is {tuple(features.shape)}."
        )
    shape = features.shape[:2]
    for name, tensor in (("saliency", saliency), ("relevance", relevance), ("mask", mask)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"`{name}` must have the shape (batch, num_tokens) = {tuple(shape)} of `features`, but its shape is "
                f"{tuple(tensor.shape)}."
            )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"`mask` must be a bool tensor, but its dtype is {mask.dtype}: pass `mask.bool()`.")


def _check_budgets(features, num_visual_tokens, max_num_visual_tokens):
    found = {}
    if not isinstance(num_visual_tokens, torch.Tensor):
        found["num_visual_tokens"] = (num_visual_tokens, "or a LongTensor of shape (batch,)")
    elif num_visual_tokens.dtype != torch.long or num_visual_tokens.shape != features.shape[:1]:
        raise ValueError(
            f"A tensor `num_visual_tokens` must be a LongTensor of shape (batch,) = {tuple(features.shape[:1])}, but "
            f"it is {num_visual_tokens.dtype} of shape {tuple(num_visual_tokens.shape)}."
        )
    if max_num_visual_tokens is not None:
        found["max_num_visual_tokens"] = (max_num_visual_tokens, "or None")
    for name, (value, other) in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}={value!r}` is not allowed: `{name}` must be an int >= 1, {other}.")
