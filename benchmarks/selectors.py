"""
FSR's peers: which visual tokens other training-free methods keep, each a function of one form, written from its paper.

    select(features, saliency, relevance, num_kept, **extra) -> kept tokens (batch, num_kept, hidden_size),
                                                                their indices (batch, num_kept)

`features` `(batch, num_tokens, hidden_size)` are the tokens of a batch of pictures, in the space that the method works
in; `saliency` and `relevance` `(batch, num_tokens)` are those of FSR: the attention of [CLS], and how well a token
fits the question, higher for a better fit, `None` without a question; `num_kept` is less than `num_tokens`. Kept
tokens stand in their order in the picture. Everything runs for the whole batch at once, in float32 where tokens are
compared; equal scores go to the lower index.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from fsr_hf import select_visual_tokens


__all__ = [
    "SELECTORS",
    "cdpruner",
    "divprune",
    "fastervlm",
    "fsr",
    "holov",
    "random_tokens",
    "uniform_grid",
    "visionzip",
    "vispruner",
]

Kept = tuple[torch.Tensor, torch.Tensor]


def fsr(features, saliency, relevance, num_kept: int, **settings) -> Kept:
    """Focus-Scan-Refine (arXiv 2602.05809), of this package. `settings`: those of `select_visual_tokens`."""
    selection = select_visual_tokens(features, saliency, relevance, num_kept, **settings)
    return selection.features, selection.indices


def random_tokens(features, saliency, relevance, num_kept: int, *, generator: torch.Generator | None = None) -> Kept:
    """Any `num_kept` tokens, another set for each picture. `generator` lives on the CPU."""
    scores = torch.rand(saliency.shape, generator=generator).to(features.device)
    return _keep(features, _top(scores, num_kept))


def uniform_grid(features, saliency, relevance, num_kept: int, *, grid: tuple[int, int] | None = None) -> Kept:
    """
    The same tokens of every picture: rows at equal distances, and in each row tokens at equal distances.

    Args:
        grid (`tuple[int, int]`, *optional*):
            Rows and columns of the picture, by default those of the squarest grid of so many tokens.
    """
    num_tokens = features.shape[1]
    height, width = grid or _squarest_grid(num_tokens)
    num_rows = min(max(round((num_kept * height / width) ** 0.5), -(-num_kept // width)), height, num_kept)
    indices = []
    for number in range(num_rows):
        row = int((number + 0.5) * height / num_rows)
        columns = (number + 1) * num_kept // num_rows - number * num_kept // num_rows
        indices += [row * width + int((column + 0.5) * width / columns) for column in range(columns)]
    return _keep(features, torch.tensor(indices, device=features.device).expand(len(features), -1))


def fastervlm(features, saliency, relevance, num_kept: int) -> Kept:
    """FasterVLM, "[CLS] Attention is All You Need" (arXiv 2412.01818v1): the tokens that [CLS] looks at most."""
    return _keep(features, _top(saliency, num_kept))


def vispruner(features, saliency, relevance, num_kept: int, *, important_ratio: float = 0.5, step: int = 8) -> Kept:
    """
    VisPruner, "Beyond Text-Visual Attention" (ICCV 2025, arXiv 2412.01818v2). A share of the budget goes to the tokens
    that [CLS] looks at most. Of the others duplicates are removed until the rest of the budget is left: they stand by
    falling attention, every other one is in the first of two groups, and the `step` tokens of the first group that are
    most similar to a token of the second go, again and again.

    In the paper `features` are those of the vision tower, before the projector.
    """
    num_tokens = features.shape[1]
    num_important = int(num_kept * important_ratio)
    num_diverse = num_kept - num_important
    order = saliency.float().argsort(dim=-1, descending=True, stable=True)
    important, others = order[:, :num_important], order[:, num_important:]
    cosines = _cosines(features)
    while others.shape[1] > num_diverse:
        first, second = others[:, ::2], others[:, 1::2]
        number = min(step, others.shape[1] - num_diverse, first.shape[1])
        pairs = first[:, :, None] * num_tokens + second[:, None]
        between = cosines.flatten(1).gather(1, pairs.flatten(1)).view_as(pairs)
        distinct = between.amax(-1).argsort(dim=-1, descending=True, stable=True)[:, number:]
        others = torch.cat([first.gather(1, distinct), second], dim=1)
    return _keep(features, torch.cat([important, others], dim=1))


def visionzip(
    features,
    saliency,
    relevance,
    num_kept: int,
    *,
    keys: torch.Tensor | None = None,
    contextual_ratio: float = 10 / 64,
) -> Kept:
    """
    VisionZip (CVPR 2025, arXiv 2412.04467). The dominant tokens are those that [CLS] looks at most. Of the others,
    some at equal distances are targets; each of the rest is merged into the target with the most similar key, and a
    contextual token is the mean of a target and what was merged into it. The paper keeps 54 + 10, 108 + 20 and
    162 + 30 tokens, which gives `contextual_ratio`.

    The dominant tokens come first, then the contextual ones; the index of a contextual token is that of its target.
    The paper counts [CLS] as one of the dominant tokens; it is no visual token here.

    Args:
        keys (`torch.FloatTensor` of shape `(batch, num_tokens, head_dim)`, *optional*):
            The keys of the block that saliency comes from, averaged over heads. By default the features stand in for
            them. In the paper `features` are those of the vision tower, before the projector.
    """
    batch, num_tokens, _ = features.shape
    num_contextual = max(1, round(num_kept * contextual_ratio))
    dominant = _top(saliency, num_kept - num_contextual).sort(-1).values
    is_other = torch.ones(batch, num_tokens, dtype=torch.bool, device=features.device).scatter(1, dominant, False)
    others = is_other.int().argsort(dim=-1, descending=True, stable=True)[:, : num_tokens - dominant.shape[1]]

    places = range(0, others.shape[1], others.shape[1] // num_contextual)[:num_contextual]
    targets = others[:, list(places)]
    merged = others[:, sorted(set(range(others.shape[1])) - set(places))]
    unit = normalize((features if keys is None else keys).float(), dim=-1)
    nearest = (_take(unit, merged) @ _take(unit, targets).mT).argmax(-1)  # (batch, merged)
    members = nearest[:, None] == torch.arange(num_contextual, device=features.device)[:, None]  # (batch, targets, ..)
    total = _take(features, targets).float() + members.float() @ _take(features, merged).float()
    contextual = (total / (1 + members.sum(-1, keepdim=True))).to(features.dtype)
    return torch.cat([_take(features, dominant), contextual], dim=1), torch.cat([dominant, targets], dim=1)


def divprune(features, saliency, relevance, num_kept: int) -> Kept:
    """
    DivPrune (CVPR 2025, arXiv 2503.02175): the max-min diversity problem, solved greedily. The first token is the one
    whose nearest other token is farthest away, in cosine distance; then always the one farthest from all chosen.

    In the paper `features` are the tokens after the projector.
    """
    cosines = _cosines(features)
    others = cosines.clone()
    others.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    chosen = others.amax(-1).argmin(-1, keepdim=True)
    indices = [chosen]
    closest = torch.full_like(cosines[:, 0], -torch.inf)
    for _ in range(num_kept - 1):
        closest = torch.maximum(closest, _take(cosines, chosen)[:, 0]).scatter_(1, chosen, torch.inf)
        chosen = closest.argmin(-1, keepdim=True)
        indices.append(chosen)
    return _keep(features, torch.cat(indices, dim=1))


def cdpruner(features, saliency, relevance, num_kept: int) -> Kept:
    """
    CDPruner (NeurIPS 2025, arXiv 2506.10967): greedy MAP inference of a determinantal point process whose kernel is
    the cosine of two tokens times the relevance of both, min-max normalised; without a question, the cosine alone. The
    fast algorithm of Chen et al. (arXiv 1709.05135) grows the Cholesky factor of the chosen rows token by token.

    In the paper `features` are those of the vision tower, before the projector.
    """
    kernel = _cosines(features)
    kernel.diagonal(dim1=1, dim2=2).fill_(1.0)  # rounded, the first choice among equals would be by chance
    if relevance is not None:
        relevance = relevance.float()
        low, high = relevance.amin(-1, keepdim=True), relevance.amax(-1, keepdim=True)
        weight = (relevance - low + 1e-6) / (high - low + 1e-6)
        kernel = weight[:, :, None] * kernel * weight[:, None]
    gain = kernel.diagonal(dim1=1, dim2=2).clone()  # what a token would add to the determinant
    factor = kernel.new_zeros(len(kernel), num_kept, kernel.shape[1])
    indices = []
    for step in range(num_kept):
        chosen = gain.argmax(-1, keepdim=True)
        done = factor[:, :step]
        column = done.gather(2, chosen[:, None].expand(-1, step, -1))  # (batch, step, 1)
        row = _take(kernel, chosen)[:, 0] - (column.mT @ done)[:, 0]
        best = gain.gather(1, chosen)
        # As in Chen et al.: what is left has no more to add, but here the budget is filled up all the same.
        factor[:, step] = torch.where(best > 1e-10, row / best.clamp(min=1e-10).sqrt(), 0.0)
        gain = (gain - factor[:, step] ** 2).scatter_(1, chosen, -torch.inf)
        indices.append(chosen)
    return _keep(features, torch.cat(indices, dim=1))


def holov(features, saliency, relevance, num_kept: int, *, num_crops: int = 16, context_weight: float = 0.09) -> Kept:
    """
    HoloV (NeurIPS 2025, arXiv 2510.02912). The picture is cut into crops, runs of tokens in reading order. The score
    of a token is its attention from [CLS] plus its visual context: the variance of its cosines to the other tokens of
    its crop, scaled to the crop's attention and weighted. Crops share the budget in proportion to their mean scores,
    what is left over going to the highest; within a crop the highest scores win. A crop takes no more than it has.

    Numbers are the defaults of the authors' code, which within a crop ranks by attention alone. `features` are the
    tokens after the projector.
    """
    batch, num_tokens, _ = features.shape
    device = features.device
    parts = torch.arange(num_tokens, device=device).tensor_split(min(num_crops, num_tokens))
    sizes = torch.tensor([len(part) for part in parts], device=device)
    crops = pad_sequence(list(parts), batch_first=True)  # (crops, size)
    is_real = torch.arange(crops.shape[1], device=device) < sizes[:, None]
    unit = normalize(features.float(), dim=-1)[:, crops]  # (batch, crops, size, hidden_size)
    is_other = is_real[:, :, None] & is_real[:, None] & ~torch.eye(crops.shape[1], dtype=torch.bool, device=device)
    count = is_other.sum(-1).clamp(min=1)  # (crops, size)
    cosines = unit @ unit.mT
    mean = (cosines * is_other).sum(-1) / count
    context = ((cosines - mean[..., None]) ** 2 * is_other).sum(-1) / count
    attention = saliency.float()[:, crops] * is_real
    scale = attention.sum(-1, keepdim=True) / context.sum(-1, keepdim=True).clamp(min=1e-12)
    scores = (attention + context_weight * scale * context).masked_fill(~is_real, -torch.inf)

    weights = scores.masked_fill(~is_real, 0.0).sum(-1) / sizes  # (batch, crops)
    weights = weights / weights.sum(-1, keepdim=True)
    quotas = torch.minimum((weights * num_kept).floor().long(), sizes)
    while (left := num_kept - quotas.sum(-1, keepdim=True)).any():
        order = weights.masked_fill(quotas == sizes, -1.0).argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)
        quotas += (rank < left) & (quotas < sizes)
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    is_kept = ((rank < quotas[..., None]) & is_real)[:, is_real]  # crops are runs, so this is the order of the picture
    return _keep(features, is_kept.nonzero()[:, 1].view(batch, num_kept))


# By the names of `benchmarks/quality.py`.
SELECTORS: dict[str, Callable[..., Kept]] = {
    "random": random_tokens,
    "uniform": uniform_grid,
    "cls": fastervlm,
    "vispruner": vispruner,
    "visionzip": visionzip,
    "divprune": divprune,
    "cdpruner": cdpruner,
    "holov": holov,
    "fsr": fsr,
}


def _top(scores, number):
    """Positions of the highest scores, the lower index first among equal ones."""
    return scores.float().argsort(dim=-1, descending=True, stable=True)[:, :number]


def _cosines(features):
    unit = normalize(features.float(), dim=-1)
    return unit @ unit.mT


def _take(tensor, indices):
    return tensor.gather(1, indices[..., None].expand(-1, -1, tensor.shape[-1]))


def _keep(features, indices):
    indices = indices.sort(-1).values
    return _take(features, indices), indices


def _squarest_grid(num_tokens):
    height = next(side for side in range(int(num_tokens**0.5), 0, -1) if num_tokens % side == 0)
    return height, num_tokens // height
