"""What the tests of every path of `select_visual_tokens` share: pools whose ties are exact, and comparisons."""

import itertools
import math

import torch
from method_reference import reference

from fsr_hf.modeling.fsr import select_visual_tokens


__all__ = ["SETTINGS", "check_exact_pools", "check_row", "exact_pool", "same_selection"]


def check_row(selection, row, features, saliency, relevance, mask, budget, settings, min_gap=0.0):
    """Compare one row of a selection with the reference; False if some decision was too close to call."""
    real = [i for i, is_real in enumerate(mask) if is_real]
    kept, focus, priority, merged_into, refined, gaps = reference(
        [features[i] for i in real],
        [saliency[i] for i in real],
        None if relevance is None else [relevance[i] for i in real],
        budget,
        **settings,
    )
    if gaps and min(gaps) < min_gap:
        return False
    width = selection.indices.shape[1]
    padding = width - len(kept)
    assert selection.indices[row].tolist() == [real[i] for i in kept] + [-1] * padding
    assert selection.is_focus[row].tolist() == [i in focus for i in kept] + [False] * padding
    expected = [-1] * len(mask)
    for token, anchor in merged_into.items():
        expected[real[token]] = real[anchor]
    assert selection.merged_into[row].tolist() == expected
    expected = torch.zeros(len(mask), dtype=torch.float64)
    if priority:
        expected[real] = torch.tensor(priority, dtype=torch.float64)
        torch.testing.assert_close(selection.priority[row].double(), expected, rtol=1e-6, atol=1e-7)
    for slot, token in enumerate(kept):
        values = selection.features[row, slot]
        original = torch.tensor(features[real[token]])
        if token not in merged_into.values():
            assert torch.equal(values.view(torch.int32), original.view(torch.int32))
        expected = torch.tensor(refined[token], dtype=torch.float64)
        torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert not selection.features[row, len(kept) :].any()
    return True


SETTINGS = [
    dict(zip(("alpha", "beta", "rho", "focus_limit", "uniform_scan", "kappa", "focus_mass"), values, strict=True))
    for values in itertools.product(
        (0, 1, 3),
        (0, 1),
        (0.3, 0.5, 0.9, 1.0),
        (0.3, 0.5, 1.0),
        (0, 0, 0.5, 1, 2.5),
        (0, 0.5, 1, 5, None),
        ("all", "budget"),
    )
]


def exact_pool(rng, num_tokens):
    """
    Values whose scores, sums and cosines are exact in float32, so that every tie is one there too.

    Scores are 0, 1 or 2; features are signs in 4 or 16 dimensions, scaled by powers of two, or zero. In 4 dimensions
    most pools hold several copies of a direction, and more than 8 tokens are too many for the product of all pairs.
    """
    hidden_size = rng.choice((4, 16))
    scores = [[float(rng.randrange(3)) for _ in range(num_tokens)] for _ in range(2)]
    if rng.random() < 0.15:
        scores[rng.randrange(2)] = [rng.choice((0.0, 7.0))] * num_tokens
    features = []
    for _ in range(num_tokens):
        scale = rng.choice((0.0, 0.25, 1.0, 1.0, 1.0, 8.0))
        features.append([rng.choice((-scale, scale)) for _ in range(hidden_size)])
    if rng.random() < 0.3:
        for values in (*scores, *features):
            if rng.random() < 0.3:
                values[rng.randrange(len(values))] = rng.choice((math.nan, math.inf, -math.inf))
    if rng.random() < 0.05:
        scores[rng.randrange(2)] = [rng.choice((math.nan, math.inf, -math.inf)) for _ in range(num_tokens)]
    return features, scores[0], scores[1]


def check_exact_pools(rng, max_tokens):
    """Two pools of the same size, masked, each with its own budget, against the reference."""
    settings = rng.choice(SETTINGS)
    num_tokens = rng.randint(1, max_tokens)
    pools = [exact_pool(rng, num_tokens) for _ in range(2)]
    hidden_size = min(len(pool[0][0]) for pool in pools)
    features = [[token[:hidden_size] for token in pool[0]] for pool in pools]
    saliency, relevance = ([pool[k] for pool in pools] for k in (1, 2))
    mask = [[rng.random() < 0.9 for _ in range(num_tokens)] for _ in range(2)]
    budgets = [rng.randint(0, num_tokens + 2) for _ in range(2)]
    selection = select_visual_tokens(
        torch.tensor(features),
        torch.tensor(saliency),
        torch.tensor(relevance),
        torch.tensor(budgets),
        mask=torch.tensor(mask),
        **settings,
    )
    for row in range(2):
        assert check_row(
            selection, row, features[row], saliency[row], relevance[row], mask[row], budgets[row], settings
        )


def same_selection(one, other, rtol=0.0, atol=0.0):
    for field in ("indices", "is_focus", "merged_into"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    for field in ("priority", "features"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=rtol, atol=atol)
