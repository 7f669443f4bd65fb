"""Focus, Scan, Refine against loops in float64 that follow the equations one by one."""

import ast
import itertools
import math
import pathlib
import random
from dataclasses import fields

import pytest
import torch

from fsr_hf.modeling import fsr
from fsr_hf.modeling.fsr import VisualSelection, select_visual_tokens


# --- The reference: one row, plain Python floats. `gaps` collects by how much each decision was won. ---


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


def reference(features, saliency, relevance, budget, alpha, beta, rho, kappa, focus_mass):
    """Returns kept (ascending), focus, priority, merged_into, {kept token: features after Refine}, gaps."""
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
    num_focus, mass = 0, 0.0
    while num_focus == 0 or (mass < rho * total and num_focus < budget):
        mass += priority[order[num_focus]]
        num_focus += 1
        if mass != rho * total:
            gaps.append(abs(mass - rho * total))
    focus = set(order[:num_focus])

    # Eq. 5
    kept = set(focus)
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
    merged = descending(similarity, gaps)[: math.floor(kappa * len(anchors) + 1e-6)]
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
    dict(zip(("alpha", "beta", "rho", "kappa", "focus_mass"), values, strict=True))
    for values in itertools.product((0, 1, 3), (0, 1), (0.3, 0.5, 0.9, 1.0), (0, 0.5, 1, 5), ("all", "budget"))
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


def check_exact_pools(rng, most_tokens):
    """Two pools of the same size, masked, each with its own budget, against the reference."""
    settings = rng.choice(SETTINGS)
    num_tokens = rng.randint(1, most_tokens)
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


@pytest.mark.parametrize("chunk", range(8))
def test_equals_the_loop_with_ties_and_non_finite_values(chunk):
    settings_of_chunk = SETTINGS[chunk::8]
    for seed in range(96):
        rng = random.Random(1000 * chunk + seed)
        settings = settings_of_chunk[seed % len(settings_of_chunk)]
        batch, num_tokens = rng.randint(1, 3), rng.randint(1, 20)
        pools = [exact_pool(rng, num_tokens) for _ in range(batch)]
        hidden_size = min(len(pool[0][0]) for pool in pools)
        features = [[token[:hidden_size] for token in pool[0]] for pool in pools]
        saliency, relevance = ([pool[k] for pool in pools] for k in (1, 2))
        if rng.random() < 0.2:
            relevance = None
        mask = [[True] * num_tokens for _ in range(batch)]
        if rng.random() < 0.5:
            mask = [[rng.random() < 0.8 for _ in range(num_tokens)] for _ in range(batch)]
        budgets = [rng.randint(1, num_tokens + 2)] * batch
        budget, width = budgets[0], min(budgets[0], num_tokens)
        options = {}
        if rng.random() < 0.5:
            budgets = [rng.randint(0, num_tokens + 2) for _ in range(batch)]
            budget, width = torch.tensor(budgets), num_tokens
            if rng.random() < 0.5:
                options["max_num_visual_tokens"] = max(1, *budgets, rng.randrange(num_tokens + 3))
                width = min(options["max_num_visual_tokens"], num_tokens)
        selection = select_visual_tokens(
            torch.tensor(features),
            torch.tensor(saliency),
            None if relevance is None else torch.tensor(relevance),
            budget,
            mask=None if all(map(all, mask)) else torch.tensor(mask),
            **settings,
            **options,
        )
        assert selection.indices.shape == selection.is_focus.shape == (batch, width)
        assert selection.features.shape == (batch, width, hidden_size)
        assert selection.priority.shape == selection.merged_into.shape == (batch, num_tokens)
        for row in range(batch):
            row_relevance = None if relevance is None else relevance[row]
            arguments = (features[row], saliency[row], row_relevance, mask[row], budgets[row], settings)
            assert check_row(selection, row, *arguments), (chunk, seed, row)


@pytest.mark.parametrize("hidden_size", [8, 40])  # below and above half the tokens: a product for each anchor, or one
def test_equals_the_loop_on_continuous_values(hidden_size):
    compared = 0
    for seed, settings in enumerate(random.Random(0).sample(SETTINGS, 60)):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(2, 24, hidden_size, generator=generator) * 3
        saliency, relevance = torch.rand(2, 2, 24, generator=generator)
        budget = 1 + seed % 23
        selection = select_visual_tokens(features, saliency, relevance, budget, **settings)
        for row in range(2):
            arguments = (features[row].tolist(), saliency[row].tolist(), relevance[row].tolist(), [True] * 24)
            compared += check_row(selection, row, *arguments, budget, settings, min_gap=1e-6)
    assert compared > 100


# --- Single rules, with numbers worked out by hand. ---


def signs(*rows):
    return torch.tensor([rows], dtype=torch.float32)


def test_priority_is_a_product_of_powers():
    selection = select_visual_tokens(
        torch.eye(3)[None], torch.tensor([[2.0, 4.0, 6.0]]), torch.tensor([[-1.0, 0.0, -0.5]]), 1
    )
    assert selection.priority.tolist() == [[0.0, 0.5, 0.125]]
    assert selection.priority.dtype == torch.float32
    assert selection.indices.tolist() == [[1]]


def test_focus_is_the_smallest_set_that_holds_the_mass():
    saliency = torch.tensor([[4.0, 1.0, 0.0, 2.0, 1.0]])  # of a mass of 8: 4, then 6, 7 and 8
    features = torch.eye(5)[None]
    for rho, focus in ((0.5, [0]), (0.51, [0, 3]), (0.75, [0, 3]), (0.76, [0, 1, 3]), (0.9, [0, 1, 3, 4])):
        selection = select_visual_tokens(features, saliency, None, 5, rho=rho)
        assert selection.indices[selection.is_focus].tolist() == focus
        assert selection.indices.tolist() == [[0, 1, 2, 3, 4]]


def test_focus_is_clipped_to_the_budget_and_can_follow_its_mass_instead():
    features, flat = torch.eye(20)[None], torch.ones(1, 20)
    selection = select_visual_tokens(features, flat, None, 10)
    assert selection.indices.tolist() == [list(range(10))]
    assert selection.is_focus.all()
    assert (selection.merged_into == -1).all()
    selection = select_visual_tokens(features, flat, None, 10, focus_mass="budget")
    assert selection.is_focus.tolist() == [[True] * 9 + [False]]


def test_mass_is_summed_in_float64():
    """In float32 a mass of 1 does not grow by 1e-9, and the first token alone would hold all of it."""
    saliency = torch.full((1, 40), 1e-9)
    saliency[0, 7], saliency[0, 8] = 1.0, 0.0
    selection = select_visual_tokens(torch.eye(40)[None], saliency, None, 40, rho=1.0)
    assert selection.is_focus.sum() == 39
    assert not selection.is_focus[0, 8]


def test_no_priority_at_all_leaves_one_focus_token():
    saliency, relevance = torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    features = signs([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, -1, -1], [1, 1, 1, -1])
    selection = select_visual_tokens(features, saliency, relevance, 2)
    assert not selection.priority.any()
    assert selection.indices.tolist() == [[0, 2]]
    assert selection.is_focus.tolist() == [[True, False]]
    # Token 3 is merged with weight 0 into an anchor of weight 0, which therefore stays as it is.
    assert selection.merged_into.tolist() == [[-1, -1, -1, 2]]
    assert torch.equal(selection.features[0], features[0, [0, 2]])


def test_scores_of_any_magnitude():
    features = torch.eye(12)[None]
    steps = torch.tensor([[0, 3, 1, 4, 2, 4, 0, 1, 3, 2, 1, 0]])
    expected = select_visual_tokens(features, steps.float(), None, 6)
    for scale, shift in ((2.0**126, -(2.0**127)), (2.0**-100, 0.0), (0.125, 2.0)):
        scores = (steps.double() * scale + shift).float()
        selection = select_visual_tokens(features, scores, None, 6)
        assert torch.equal(selection.priority, expected.priority)
        assert torch.equal(selection.indices, expected.indices)


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
@pytest.mark.parametrize("num_tokens", [10, 30])
def test_features_of_any_magnitude(scale, num_tokens):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, num_tokens, 8, generator=generator)
    saliency = torch.rand(1, num_tokens, generator=generator) ** 4
    expected = select_visual_tokens(features, saliency, None, 7, rho=0.5)
    assert (expected.merged_into >= 0).any()
    selection = select_visual_tokens(features * scale, saliency, None, 7, rho=0.5)
    assert torch.equal(selection.indices, expected.indices)
    assert torch.equal(selection.merged_into, expected.merged_into)
    assert torch.equal(selection.features, expected.features * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(4, 90, 64, generator=generator).to(dtype)
    saliency, relevance = torch.rand(2, 4, 90, generator=generator).to(dtype)
    selection = select_visual_tokens(features, saliency, relevance, 40, rho=0.4)
    expected = select_visual_tokens(features.float(), saliency.float(), relevance.float(), 40, rho=0.4)
    assert (expected.is_focus.sum(1) < 20).all()
    assert selection.features.dtype == dtype
    assert torch.equal(selection.priority, expected.priority)
    assert torch.equal(selection.indices, expected.indices)
    assert torch.equal(selection.merged_into, expected.merged_into)
    assert torch.equal(selection.features, expected.features.to(dtype))


def test_number_of_merges_is_the_floor_of_the_product():
    """0.29 x 100 is 28.999... in float64, and 0.53 x 100 in float32 falls below 53 by more than the slack."""
    num_tokens = 800
    saliency = torch.zeros(1, num_tokens)
    saliency[0, 0] = 1.0
    features = torch.randn(1, num_tokens, 2, generator=torch.Generator().manual_seed(3))
    for kappa, num_anchors in ((0.29, 100), (0.53, 100), (1.3, 90), (0.65, 340), (1.1, 300)):
        selection = select_visual_tokens(features, saliency, None, num_anchors + 1, kappa=kappa)
        assert selection.is_focus.sum() == 1
        expected = round(kappa * 100) * num_anchors // 100
        assert (selection.merged_into >= 0).sum() == expected


def test_non_finite_features_are_far_from_everything_and_never_merge():
    features = signs([1, 1, 1, 1], [1, 1, 1, -1], [1, math.nan, 1, 1], [1, 1, 1, 1], [math.inf, 1, 1, 1])
    saliency = torch.tensor([[2.0, 0.0, 0.0, 1.0, 0.0]])
    selection = select_visual_tokens(features, saliency, None, 3, rho=0.5, kappa=5)
    assert selection.indices.tolist() == [[0, 2, 4]]
    assert (selection.merged_into == -1).all()
    assert torch.equal(selection.features.nan_to_num(7), features[:, [0, 2, 4]].nan_to_num(7))
    # Opposite to the Focus token and as far as a token can be, 1 comes before 2 and absorbs 3 alone.
    features = signs([1, 1, 1, 1], [-1, -1, -1, -1], [1, math.nan, 1, 1], [-1, -1, -1, 1])
    selection = select_visual_tokens(features, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), None, 2, kappa=5)
    assert selection.indices.tolist() == [[0, 1]]
    assert selection.merged_into.tolist() == [[-1, -1, -1, 1]]
    features = signs([1, 1, 1, 1], [1, 1, 1, -1], [1, -1, -1, -1], [math.nan, 1, 1, 1], [1, 1, 1, -1])
    saliency = torch.tensor([[4.0, 1.0, 1.0, 1.0, 0.0]])
    selection = select_visual_tokens(features, saliency, None, 3, rho=0.1, kappa=5)
    assert selection.indices.tolist() == [[0, 2, 3]]
    assert selection.merged_into.tolist() == [[-1, 2, -1, -1, 2]]
    assert selection.features.isfinite()[0, :2].all()


def test_no_token_is_farther_than_an_opposite_one():
    """Rounding would put some of the cosines below -1, and so the token of index 2 before the one of index 1."""
    generator = torch.Generator().manual_seed(10)
    focus = torch.randn(100, 1, 7, generator=generator)
    features = torch.cat([focus, torch.full_like(focus, math.nan), -focus], dim=1)
    selection = select_visual_tokens(features, torch.tensor([[1.0, 0.0, 0.0]]).expand(100, -1), None, 2)
    assert (selection.indices == torch.tensor([0, 1])).all()


def test_zero_vectors_have_cosine_zero():
    features = signs([1, 1, 1, 1], [1, 1, 1, -1], [0, 0, 0, 0], [0, 0, 0, 0])
    saliency = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    # cos 0.5 and 0 to the Focus token: the first zero vector is farther, and no closer to the second one.
    selection = select_visual_tokens(features, saliency, None, 3)
    assert selection.indices.tolist() == [[0, 2, 3]]
    assert selection.merged_into.tolist() == [[-1, 2, -1, -1]]


def test_rows_without_tokens_or_budget_are_padding():
    features = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[True] * 6, [False] * 6, [True] * 6])
    selection = select_visual_tokens(features, torch.rand(3, 6), None, torch.tensor([2, 4, 0]), mask=mask)
    assert selection.indices.shape == (3, 6)
    assert (selection.indices[0] >= 0).tolist() == [True, True, False, False, False, False]
    for row in (1, 2):
        assert (selection.indices[row] == -1).all()
        assert not selection.is_focus[row].any()
        assert not selection.features[row].any()
        assert (selection.merged_into[row] == -1).all()
    assert not selection.priority[1].any()


def test_an_empty_batch():
    selection = select_visual_tokens(torch.zeros(0, 5, 4), torch.zeros(0, 5), torch.zeros(0, 5), 3)
    assert selection.indices.shape == (0, 3)
    assert selection.features.shape == (0, 3, 4)


def test_width_bounds_the_budgets():
    features = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(5))
    saliency = torch.rand(2, 9, generator=torch.Generator().manual_seed(6))
    bounded = select_visual_tokens(features, saliency, None, torch.tensor([3, 8]), max_num_visual_tokens=5)
    for row, budget in enumerate((3, 5)):
        alone = select_visual_tokens(features[row : row + 1], saliency[row : row + 1], None, budget)
        assert torch.equal(bounded.indices[row, :budget], alone.indices[0])
        assert torch.equal(bounded.features[row, :budget], alone.features[0])
    assert bounded.indices.shape == (2, 5)
    assert bounded.indices[0, 3:].tolist() == [-1, -1]


# --- Properties of the paper. ---


def distance(features):
    """The metric sqrt(1 - cos) between all tokens, in float64."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return (1 - unit @ unit.mT).clamp(min=0).sqrt()


def test_coverage_is_within_twice_the_optimum():
    """Eqs. 6 and 7, on clusters as well: there, a set that leaves out one cluster breaks the bound."""
    for seed in range(80):
        generator = torch.Generator().manual_seed(seed)
        num_tokens, hidden_size, budget = 10, 3 + seed % 3, 3 + seed % 3
        features = torch.randn(num_tokens, hidden_size, generator=generator)
        if seed % 2:
            centers = torch.nn.functional.normalize(torch.randn(budget, hidden_size, generator=generator), dim=-1)
            noise = 0.01 * torch.randn(num_tokens, hidden_size, generator=generator)
            features = centers[torch.arange(num_tokens) % budget] + noise
        saliency = torch.rand(num_tokens, generator=generator) ** 6
        selection = select_visual_tokens(features[None], saliency[None], None, budget, rho=0.5)
        focus = set(selection.indices[selection.is_focus].tolist())
        num_anchors = budget - len(focus)
        distances = distance(features)

        def radius(kept, distances=distances):
            return distances[:, sorted(kept)].amin(1).max().item()

        others = [i for i in range(num_tokens) if i not in focus]
        optimum = min(radius(focus.union(anchors)) for anchors in itertools.combinations(others, num_anchors))
        assert radius(selection.indices[0].tolist()) <= 2 * optimum + 1e-6


@pytest.fixture(scope="module")
def pools():
    """Four pools of 60 tokens that keep 24, of which 7 to 15 are Focus tokens, and merge others into their anchors."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(4, 60, 48, generator=generator)
    saliency = torch.rand(4, 60, generator=generator)
    relevance = torch.rand(4, 60, generator=generator)
    return features, saliency, relevance


def test_focus_tokens_stay_bit_for_bit_and_the_rest_in_the_convex_hull(pools):
    features, saliency, relevance = pools
    features = features.clone()
    features[..., 0] = 1.0  # stays 1 only if the weights sum to 1
    selection = select_visual_tokens(features, saliency, relevance, 24, rho=0.6, kappa=2)
    assert ((selection.is_focus.sum(1) >= 5) & (selection.is_focus.sum(1) <= 18)).all()
    num_changed = 0
    for row in range(4):
        for slot, token in enumerate(selection.indices[row].tolist()):
            group = (selection.merged_into[row] == token).nonzero()[:, 0].tolist()
            refined = selection.features[row, slot]
            if not group:
                assert torch.equal(refined, features[row, token])
                continue
            assert not selection.is_focus[row, slot]
            hull = features[row, [token, *group]]
            assert ((refined >= hull.amin(0) - 1e-6) & (refined <= hull.amax(0) + 1e-6)).all()
            torch.testing.assert_close(refined[0].item(), 1.0, rtol=0, atol=2e-7)
            weights = selection.priority[row, [token, *group]].double()
            expected = (weights[:, None] * hull.double()).sum(0) / weights.sum()
            torch.testing.assert_close(refined.double(), expected, rtol=1e-6, atol=1e-6)
            num_changed += 1
    assert num_changed > 20


def same_selection(one, other, rtol=0.0, atol=0.0):
    for field in ("indices", "is_focus", "merged_into"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    for field in ("priority", "features"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=rtol, atol=atol)


def row_of(selection, row):
    names = ("indices", "is_focus", "features", "priority", "merged_into")
    return VisualSelection(**{name: getattr(selection, name)[row : row + 1] for name in names})


def test_a_row_in_a_batch_equals_the_row_alone(pools):
    features, saliency, relevance = pools
    batch = select_visual_tokens(features, saliency, relevance, 24, rho=0.6)
    for row in range(4):
        alone = select_visual_tokens(*(tensor[row : row + 1] for tensor in pools), 24, rho=0.6)
        same_selection(row_of(batch, row), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("garbage", [0.0, 1e30, math.nan, math.inf])
@pytest.mark.parametrize("where", ["left", "right", "between"])
def test_padding_columns_change_nothing(pools, garbage, where):
    features, saliency, relevance = (tensor[:1] for tensor in pools)
    total = 80
    real = {"left": range(20, 80), "right": range(60), "between": [i for i in range(80) if i % 4]}[where]
    real = torch.tensor(list(real))
    padded = torch.full((1, total, features.shape[-1]), garbage)
    padded[:, real] = features
    scores = torch.full((2, 1, total), garbage)
    scores[0, :, real], scores[1, :, real] = saliency, relevance
    mask = torch.zeros(1, total, dtype=torch.bool)
    mask[:, real] = True
    selection = select_visual_tokens(padded, *scores, 24, mask=mask, rho=0.6)
    expected = select_visual_tokens(features, saliency, relevance, 24, rho=0.6)
    assert (expected.merged_into >= 0).any()
    assert torch.equal(selection.indices, real[expected.indices])
    assert torch.equal(selection.is_focus, expected.is_focus)
    torch.testing.assert_close(selection.features, expected.features, rtol=1e-6, atol=1e-6)
    assert torch.equal(selection.priority[:, real], expected.priority)
    assert not selection.priority[~mask].any()
    merged_into = torch.where(expected.merged_into < 0, -1, real[expected.merged_into])
    assert torch.equal(selection.merged_into[:, real], merged_into)
    assert (selection.merged_into[~mask] == -1).all()


def test_everything_is_kept_if_the_budget_allows(pools):
    features, saliency, relevance = pools
    expected = select_visual_tokens(features, saliency, relevance, 60)
    for budget in (61, 1000, torch.full((4,), 70)):
        same_selection(select_visual_tokens(features, saliency, relevance, budget), expected)
    assert torch.equal(expected.features, features)
    assert (expected.merged_into == -1).all()
    assert 0 < expected.is_focus.sum() < 240


def test_both_ways_to_the_cosines_select_the_same(pools, monkeypatch):
    features, saliency, relevance = pools
    expected = select_visual_tokens(features, saliency, relevance, 24, rho=0.6)
    build = fsr._Cosines.__init__

    def without_pairs(self, features):
        build(self, features)
        assert self.pairs is not None
        self.pairs = None

    monkeypatch.setattr(fsr._Cosines, "__init__", without_pairs)
    same_selection(select_visual_tokens(features, saliency, relevance, 24, rho=0.6), expected)


def test_the_product_of_all_pairs_is_at_most_twice_the_features():
    for num_tokens, is_built in ((16, True), (17, False)):
        cosines = fsr._Cosines(torch.ones(1, num_tokens, 8))
        assert (cosines.pairs is not None) == is_built
        assert cosines.rows(torch.tensor([[1, 4]])).tolist() == [[[pytest.approx(1.0)] * num_tokens] * 2]


# --- Autograd, autocast, compilation, devices. ---


def test_gradients_reach_the_features_through_kept_and_merged_tokens(pools):
    features, saliency, relevance = (tensor.clone().requires_grad_() for tensor in pools)
    with torch.no_grad():
        features[0, 3], features[1, 5] = math.nan, math.inf
    selection = select_visual_tokens(features, saliency, relevance, 24, rho=0.6)
    assert not selection.priority.requires_grad
    upstream = torch.randn(selection.features.shape, generator=torch.Generator().manual_seed(8))
    (selection.features * upstream).sum().backward()
    assert saliency.grad is None
    assert relevance.grad is None

    expected = torch.zeros_like(features)
    num_merged = 0
    for row in range(4):
        for slot, token in enumerate(selection.indices[row].tolist()):
            group = [token, *(selection.merged_into[row] == token).nonzero()[:, 0].tolist()]
            weights = selection.priority[row, group] if len(group) > 1 else torch.ones(1)
            expected[row, group] += (weights / weights.sum())[:, None] * upstream[row, slot]
            num_merged += len(group) - 1
    assert num_merged > 20
    torch.testing.assert_close(features.grad, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_finite_beside_padding_and_zero_weights():
    features = signs([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, -1, -1], [1, 1, 1, -1], [math.nan] * 4).requires_grad_()
    saliency, relevance = torch.tensor([[0.0, 1.0, 0.0, 1.0, 9.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0, 9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    selection = select_visual_tokens(features, saliency, relevance, torch.tensor([2]), mask=mask)
    selection.features.sum().backward()
    assert features.grad.tolist() == [[[1.0] * 4, [0.0] * 4, [1.0] * 4, [0.0] * 4, [0.0] * 4]]


def test_autocast_changes_nothing(pools):
    expected = select_visual_tokens(*pools, 24, rho=0.6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        selection = select_visual_tokens(*pools, 24, rho=0.6)
        assert torch.is_autocast_enabled("cpu")
    same_selection(selection, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(pools, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(select_visual_tokens, fullgraph=True, backend="eager", dynamic=dynamic)
    features, saliency, relevance = pools
    mask = torch.rand(4, 60, generator=torch.Generator().manual_seed(9)) < 0.8
    budgets = torch.tensor([5, 0, 12, 3])
    for budget, options in ((8, {}), (budgets, {"max_num_visual_tokens": 12, "mask": mask, "focus_mass": "budget"})):
        expected = select_visual_tokens(features, saliency, relevance, budget, rho=0.5, **options)
        same_selection(compiled(features, saliency, relevance, budget, rho=0.5, **options), expected)
    # Half of the tokens: more than twice the features, so the other way to the cosines.
    expected = select_visual_tokens(features[..., :8], saliency, None, 6, rho=0.5)
    same_selection(compiled(features[..., :8], saliency, None, 6, rho=0.5), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("hidden_size", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_read_on_the_host(hidden_size, dtype):
    """A tensor on the meta device has no values: whatever reads one, or needs one for a shape, is an error there."""
    meta = torch.device("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device=meta).sum().item()
    features = torch.empty(3, 40, hidden_size, device=meta, dtype=dtype, requires_grad=True)
    scores = torch.empty(3, 40, device=meta, dtype=dtype)
    mask = torch.empty(3, 40, device=meta, dtype=torch.bool)
    for budget, options in (
        (10, {}),
        (torch.empty(3, device=meta, dtype=torch.long), {"max_num_visual_tokens": 10}),
        (torch.ones(3, dtype=torch.long), {"max_num_visual_tokens": 10, "focus_mass": "budget"}),
    ):
        selection = select_visual_tokens(features, scores, scores, budget, mask=mask, **options)
        assert selection.indices.shape == selection.is_focus.shape == (3, 10)
        assert selection.features.shape == (3, 10, hidden_size)
        assert selection.features.dtype == dtype
        assert selection.priority.shape == selection.merged_into.shape == (3, 40)
        assert {getattr(selection, name).device for name in ("indices", "features", "priority")} == {meta}
        selection.features.sum().backward()


def test_inputs_stay_as_they_are(pools):
    copies = [tensor.clone() for tensor in pools]
    mask, budgets = torch.ones(4, 60, dtype=torch.bool), torch.tensor([90, 3, 1, 0])
    select_visual_tokens(*pools, budgets, mask=mask)
    assert all(map(torch.equal, copies, pools))
    assert mask.all()
    assert budgets.tolist() == [90, 3, 1, 0]


# --- The interface. ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.zeros(6, 4)}, r"`features` must have the shape .* its shape is \(6, 4\)"),
        ({"features": torch.zeros(2, 0, 4)}, r"`features` .* at least one token, but its shape is \(2, 0, 4\)"),
        ({"saliency": torch.zeros(2, 5)}, r"`saliency` must have the shape .* = \(2, 6\) .* its shape is \(2, 5\)"),
        ({"relevance": torch.zeros(1, 6)}, r"`relevance` must have the shape .* = \(2, 6\) .* its shape is \(1, 6\)"),
        (
            {"mask": torch.ones(6, dtype=torch.bool)},
            r"`mask` must have the shape .* = \(2, 6\) .* its shape is \(6,\)",
        ),
        ({"mask": torch.ones(2, 6)}, r"`mask` must be a bool tensor, but its dtype is torch.float32"),
        ({"num_visual_tokens": 0}, "`num_visual_tokens` must be at least 1, but it is 0"),
        ({"num_visual_tokens": -3}, "`num_visual_tokens` must be at least 1, but it is -3"),
        (
            {"num_visual_tokens": torch.tensor([1, 2, 3])},
            r"of shape \(batch,\) = \(2,\), .* torch.int64 of shape \(3,",
        ),
        ({"num_visual_tokens": torch.tensor([1.0, 2.0])}, r"must be a LongTensor .* but it is torch.float32"),
        (
            {"num_visual_tokens": torch.tensor([1, 2]), "max_num_visual_tokens": 0},
            "`max_num_visual_tokens` must be at least 1, but it is 0",
        ),
        ({"focus_mass": "half"}, """`focus_mass` must be "all" or "budget", but it is 'half'"""),
    ],
)
def test_errors_name_the_argument_and_the_value(changes, message):
    arguments = {
        "features": torch.zeros(2, 6, 4),
        "saliency": torch.zeros(2, 6),
        "relevance": torch.zeros(2, 6),
        "num_visual_tokens": 3,
    }
    select_visual_tokens(**arguments)
    with pytest.raises(ValueError, match=message):
        select_visual_tokens(**(arguments | changes))


def test_the_file_stands_alone():
    """It becomes a flat file of a Hub repository. A reader needs torch alone, and finds the equations here."""
    tree = ast.parse(pathlib.Path(fsr.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports if not getattr(node, "level", 0)] == [
        "from dataclasses import dataclass",
        "import torch",
    ]
    assert fsr.__all__ == ["VisualSelection", "select_visual_tokens"]
    names = [field.name for field in fields(VisualSelection)]
    assert names == ["indices", "is_focus", "features", "priority", "merged_into", "grid", "modality", "row"]
    selection = select_visual_tokens(torch.eye(3)[None], torch.ones(1, 3), None, 2)
    assert (selection.grid, selection.modality, selection.row) == (None, None, None)


def test_equal_tokens_are_a_tie_in_any_number():
    """The matrix product behind the cosines must not tell equal tokens apart by where they stand."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        number, distinct, width = (
            int(torch.randint(*span, (1,), generator=generator)) for span in ((20, 150), (5, 10), (8, 200))
        )
        tokens = torch.randn(distinct, width, generator=generator)
        which = torch.randint(0, distinct, (number,), generator=generator)
        selection = select_visual_tokens(
            tokens[which][None], torch.rand(1, number, generator=generator), None, 4, rho=1e-6
        )
        first = [which.tolist().index(token) for token in which.tolist()]
        kept, is_focus = selection.indices[0].tolist(), selection.is_focus[0].tolist()
        focus = {int(which[index]) for index, is_one in zip(kept, is_focus) if is_one}
        anchors = [index for index, is_one in zip(kept, is_focus) if not is_one]
        assert len({int(which[index]) for index in anchors} | focus) == min(4, len(set(which.tolist())))
        assert all(index == first[index] for index in anchors), seed
