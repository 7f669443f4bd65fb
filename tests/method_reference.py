"""
Focus, Scan, Refine (arXiv 2602.05809, Eqs. 3 to 9) for one pool of tokens, in loops over plain Python floats; and the
attention that each token receives, from whole maps in float64.
"""

import itertools
import math
from fractions import Fraction


__all__ = ["reference"]


def min_max(scores):
    finite = [score for score in scores if math.isfinite(score)]
    if not finite or min(finite) == max(finite):
        return [1.0] * len(scores)
    low, high = min(finite), max(finite)
    return [((score if math.isfinite(score) else low) - low) / (high - low) for score in scores]


def cosine(u, v):
    if not all(map(math.isfinite, u + v)):
        return -1.0
    norms = math.sqrt(sum(a * a for a in u)) * math.sqrt(sum(b * b for b in v))
    return sum(a * b for a, b in zip(u, v, strict=True)) / norms if norms else 0.0


def descending(values, gaps):
    """Indices of `values`, a dict, from the largest to the smallest value; the lower index first among equals."""
    order = sorted(values, key=lambda i: (-values[i], i))
    gaps.extend(values[i] - values[j] for i, j in itertools.pairwise(order) if values[i] != values[j])
    return order


def evenly(left, count):
    """`count` of the tokens `left`: of that many parts of equal size, the token in the middle of each."""
    size = Fraction(len(left), count) if count else 0
    middles = [number * size + size / 2 for number in range(count)]  # on a line on which each token has length 1
    if len(left) % 2:  # the half of an odd number of tokens is rounded down
        middles = [middle + Fraction(1, 2 * count) for middle in middles]
    return [left[math.ceil(middle) - 1] for middle in middles]


def reference(
    features, saliency, relevance, budget, *, alpha, beta, rho, kappa, focus_mass, focus_limit=0.5, uniform_scan=0.0
):
    """
    One pool of tokens, all of them real.

    Returns kept (ascending), focus, priority, merged_into, {kept token: features after Refine}, gaps. `gaps` are the
    margins by which decisions were won; a small one means that rounding may turn the decision.
    """
    num_tokens, gaps = len(features), []
    if num_tokens == 0 or budget == 0:
        return [], set(), [], {}, {}, gaps
    cos = [[cosine(u, v) for v in features] for u in features]
    finite = [all(map(math.isfinite, v)) for v in features]

    # Eq. 3
    priority = [s**beta for s in min_max(saliency)]
    if relevance is not None:
        priority = [r**alpha * p for r, p in zip(min_max(relevance), priority, strict=True)]

    # Eq. 4
    budget = min(budget, num_tokens)
    order = descending(dict(enumerate(priority)), gaps)
    total = math.fsum(priority[i] for i in (order if focus_mass == "all" else order[:budget]))
    limit = max(1, math.floor(focus_limit * budget + 1e-6))
    num_focus, mass = 0, 0.0
    while num_focus == 0 or (mass < rho * total and num_focus < limit):
        mass += priority[order[num_focus]]
        num_focus += 1
        if mass != rho * total:
            gaps.append(abs(mass - rho * total))
    focus = set(order[:num_focus])

    # Eq. 5, after the anchors at equal distances
    left = [i for i in range(num_tokens) if i not in focus]
    num_even = min(math.floor(uniform_scan * budget**2 / num_tokens + 1e-6), budget - num_focus)
    kept = focus | set(evenly(left, num_even))
    while len(kept) < budget:
        distance = {i: min(1 - cos[i][j] for j in kept) for i in range(num_tokens) if i not in kept}
        kept.add(descending(distance, gaps)[0])
    anchors = sorted(kept - focus)

    # Eq. 8
    assigned, similarity = {}, {}
    for i in range(num_tokens):
        candidates = {j: cos[i][j] for j in anchors if finite[j]}
        if i not in kept and finite[i] and candidates:
            assigned[i] = descending(candidates, gaps)[0]
            similarity[i] = candidates[assigned[i]]
    merged = descending(similarity, gaps)
    if kappa is not None:
        merged = merged[: math.floor(kappa * len(anchors) + 1e-6)]
    merged_into = {i: assigned[i] for i in merged}

    # Eq. 9, token by token
    weight, refined = list(priority), {j: list(features[j]) for j in kept}
    for i in sorted(merged):
        j = merged_into[i]
        if weight[j] + priority[i] > 0:
            refined[j] = [
                (weight[j] * a + priority[i] * b) / (weight[j] + priority[i])
                for a, b in zip(refined[j], features[i], strict=True)
            ]
        weight[j] += priority[i]
    return sorted(kept), focus, priority, merged_into, refined, gaps
