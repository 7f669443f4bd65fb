"""
FSR's peers: which visual tokens other training-free methods keep, each a function of one form, written from its paper.

    select(features, saliency, relevance, num_kept, **extra) -> kept tokens (batch, num_kept, hidden_size),
                                                                their indices (batch, num_kept)

`features` `(batch, num_tokens, hidden_size)` are the tokens of a batch of pictures, in the space that the method works
in; `saliency` and `relevance` `(batch, num_tokens)` are those of FSR: the attention of [CLS], and how well a token
fits the question, higher for a better fit, `None` without a question; `num_kept` is less than `num_tokens`. Kept
tokens stand in their order in the picture. Everything runs for the whole batch at once, in float32 where tokens are
compared; equal scores go to the lower index.

Where a paper and the code that its authors published differ, the code counts, and the docstring says so. It also names
every deviation from that code that is left.
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
    "idpruner",
    "prunesid",
    "random_tokens",
    "scope",
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


def vispruner(
    features,
    saliency,
    relevance,
    num_kept: int,
    *,
    important_ratio: float = 0.5,
    step: int = 8,
) -> Kept:
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
    contextual token is the sum of a target and the mean of what was merged into it, as in the authors' code. The
    paper keeps 54 + 10, 108 + 20 and 162 + 30 tokens, which gives `contextual_ratio`.

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
    mean = members.float() @ _take(features, merged).float() / members.sum(-1, keepdim=True).clamp(min=1)
    contextual = (_take(features, targets).float() + mean).to(features.dtype)
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

    `features` are the tokens after the projector, as in the authors' code. That code has no chunks of a long question
    with BOS and EOS of their own; questions here are short. Without the small number in the denominator below, a
    constant relevance would be undefined.
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


def holov(features, saliency, relevance, num_kept: int, *, num_crops: int = 16) -> Kept:
    """
    HoloV (NeurIPS 2025, arXiv 2510.02912). The picture is cut into crops, runs of tokens in reading order. Crops
    share the budget in proportion to their mean attention from [CLS], what is left over going to the highest; within
    a crop the tokens with the highest attention win.

    That is the authors' code. It also computes the visual context of the paper, the variance of a token's cosines to
    its crop; but scaled so that it has the same mean as the attention in every crop, it changes no share of the
    budget, and within a crop the code ranks by attention alone. `num_crops` is its default. Where a crop's share is
    more than it has, the code fills up with zeros; here the rest goes to the other crops.
    """
    batch, num_tokens, _ = features.shape
    device = features.device
    parts = torch.arange(num_tokens, device=device).tensor_split(min(num_crops, num_tokens))
    sizes = torch.tensor([len(part) for part in parts], device=device)
    crops = pad_sequence(list(parts), batch_first=True)  # (crops, size)
    is_real = torch.arange(crops.shape[1], device=device) < sizes[:, None]
    scores = saliency.float()[:, crops].masked_fill(~is_real, -torch.inf)
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


def idpruner(
    features,
    saliency,
    relevance,
    num_kept: int,
    *,
    importance_weight: float = 0.5,
) -> Kept:
    """
    IDPruner (arXiv 2602.13315; AngelSlim): maximal marginal relevance. The most important token comes first, then
    always the one with the highest `importance_weight * importance - (1 - importance_weight) * similarity`, where
    importance is min-max normalised and similarity is the cosine to the most similar chosen token. 0.5 is the default
    of the authors' code; `features` are the tokens after the projector, as there.

    That code takes importance from a scorer of its own that was trained for each model (VisionSelector). There is
    none for this model, so it is the attention of [CLS] here.
    """
    cosines = _cosines(features)
    saliency = saliency.float()
    low, high = saliency.amin(-1, keepdim=True), saliency.amax(-1, keepdim=True)
    importance = (saliency - low) / (high - low + 1e-6)
    chosen = importance.argmax(-1, keepdim=True)
    indices = [chosen]
    closest = torch.full_like(importance, -torch.inf)
    for _ in range(num_kept - 1):
        closest = torch.maximum(closest, _take(cosines, chosen)[:, 0]).scatter_(1, chosen, torch.inf)
        chosen = (importance_weight * importance - (1 - importance_weight) * closest).argmax(-1, keepdim=True)
        indices.append(chosen)
    return _keep(features, torch.cat(indices, dim=1))


def scope(features, saliency, relevance, num_kept: int) -> Kept:
    """
    SCOPE (NeurIPS 2025, arXiv 2510.24214). Always the token with the highest product of saliency and coverage gain
    is added: how much closer all tokens come, in sum over their cosines, to the most similar chosen one. A negative
    cosine counts as 0. `features` are those of the vision tower, as in the authors' code, and the exponent of the
    saliency is 1, its default.
    """
    cosines = _cosines(features)
    saliency = saliency.float()
    covered = torch.zeros_like(saliency)
    indices = []
    for _ in range(num_kept):
        gain = (cosines - covered[:, None]).clamp(min=0).sum(-1) * saliency  # rows: the token that would be added
        for chosen in indices:
            gain = gain.scatter(1, chosen, -torch.inf)
        chosen = gain.argmax(-1, keepdim=True)
        covered = torch.maximum(covered, _take(cosines, chosen)[:, 0])
        indices.append(chosen)
    return _keep(features, torch.cat(indices, dim=1))


def prunesid(features, saliency, relevance, num_kept: int) -> Kept:
    """
    PruneSID (ICLR 2026, arXiv 2603.09480). The first principal components of the tokens' features, one for every four
    tokens of the budget, share the tokens among them: a token goes to the component with the largest loading. In each
    group non-maximum suppression by [CLS] attention removes tokens that are too similar to a stronger one. Groups then
    share the budget in proportion to what survives, each at least one token; the survivors come first.

    `features` are those of the vision tower, through a sigmoid for the components, as in the authors' code. Numbers
    that it has for 576 tokens are scaled: similar is above `18 * num_kept / num_tokens` times the mean cosine. Its
    components come from a randomised algorithm, here they are exact; it counts [CLS] as one of the budget, and its
    budget may follow the picture, here it is fixed.
    """
    batch, num_tokens, _ = features.shape
    num_groups = max(1, num_kept // 4)
    states = features.float().sigmoid()
    states = states - states.mean(-1, keepdim=True)
    loadings = torch.linalg.eigh(states @ states.mT).eigenvectors.flip(-1)[..., :num_groups]
    group = loadings.abs().argmax(-1)  # (batch, num_tokens)
    member = (group[:, None] == torch.arange(num_groups, device=group.device)[:, None]).long()  # (batch, groups, ..)
    cosines = _cosines(features)
    pairs = num_tokens * (num_tokens - 1)
    mean = (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(-1)) / pairs
    threshold = 18 * num_kept / num_tokens * mean

    order = _top(saliency, num_tokens)
    # Everything below is in the order of falling attention.
    member = member.gather(2, order[:, None].expand_as(member))
    own = group.gather(1, order)
    similar = cosines.gather(1, order[..., None].expand_as(cosines)).gather(2, order[:, None].expand_as(cosines))
    rivals = (similar > threshold[:, None, None]) & (own[:, :, None] == own[:, None])
    survives = torch.ones_like(order, dtype=torch.bool)
    for place in range(num_tokens - 1):
        later = rivals[:, place, place + 1 :] & survives[:, place, None]
        survives[:, place + 1 :] &= ~later

    counts = member.sum(-1)
    survivors = (member * survives[:, None]).sum(-1)
    most = 5 * max(1, -(-9 * num_kept // num_tokens))
    limits = torch.minimum(survivors, counts.clamp(max=most))
    while (short := limits.sum(-1, keepdim=True) < num_kept).any():
        limits = torch.minimum(limits + short.long(), counts)
    quotas = counts.clamp(max=1)
    others = (num_kept - quotas.sum(-1, keepdim=True)).clamp(min=0)
    shares = (survivors.cumsum(-1) / survivors.sum(-1, keepdim=True) * others).round().long()
    quotas = torch.minimum(quotas + shares.diff(dim=-1, prepend=torch.zeros_like(shares[:, :1])), limits)
    for number in survivors.argsort(dim=-1, descending=True, stable=True).unbind(1):  # fill up, the largest first
        number = number[:, None]
        room = limits.gather(1, number) - quotas.gather(1, number)
        quotas = quotas.scatter_add(1, number, torch.minimum(room, num_kept - quotas.sum(-1, keepdim=True)))

    first = (member * survives[:, None]).cumsum(-1)
    second = survivors[..., None] + (member * ~survives[:, None]).cumsum(-1)
    rank = torch.where(survives[:, None], first, second)  # within the group, from 1
    is_kept = ((rank <= quotas[..., None]) & member.bool()).any(1)
    return _keep(features, order[is_kept].view(batch, num_kept))


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
    "idpruner": idpruner,
    "scope": scope,
    "prunesid": prunesid,
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
