"""Focus, Scan, Refine against loops in float64 that follow the equations one by one."""

import ast
import itertools
import math
import pathlib
import random
import re
from dataclasses import fields
from fractions import Fraction

import pytest
import torch
from selection_checks import SETTINGS, check_row, exact_pool, same_selection

from fsr_hf.modeling import fsr
from fsr_hf.modeling.fsr import VisualSelection, select_visual_tokens


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
        selection = select_visual_tokens(features, saliency, None, 5, rho=rho, focus_limit=1.0)
        assert selection.indices[selection.is_focus].tolist() == focus
        assert selection.indices.tolist() == [[0, 1, 2, 3, 4]]


def test_focus_may_fill_the_budget_and_can_follow_its_mass_instead():
    features, flat = torch.eye(20)[None], torch.ones(1, 20)
    selection = select_visual_tokens(features, flat, None, 10, focus_limit=1.0)
    assert selection.indices.tolist() == [list(range(10))]
    assert selection.is_focus.all()
    assert (selection.merged_into == -1).all()
    selection = select_visual_tokens(features, flat, None, 10, focus_mass="budget", focus_limit=1.0)
    assert selection.is_focus.tolist() == [[True] * 9 + [False]]


def test_focus_takes_at_most_half_of_the_budget_by_default():
    """On flat scores Eq. 4 asks for 18 of 20 tokens, whatever the budget."""
    features, flat = torch.eye(20)[None], torch.ones(1, 20)
    for budget, num_focus in ((1, 1), (2, 1), (3, 1), (4, 2), (9, 4), (10, 5), (19, 9), (20, 10), (50, 10)):
        selection = select_visual_tokens(features, flat, None, budget)
        assert selection.is_focus.tolist() == [[True] * num_focus + [False] * (min(budget, 20) - num_focus)]
        # One merge for each Scan anchor, as long as there are tokens to merge.
        num_kept = min(budget, 20)
        assert (selection.merged_into >= 0).sum() == min(num_kept - num_focus, 20 - num_kept)


@pytest.mark.parametrize("limit", ["0.01", "0.07", "0.29", "0.5", "0.57", "0.7", "0.9", "0.99", "1"])
def test_focus_limit_is_the_floor_of_its_share_of_a_rows_own_budget(limit):
    """0.29 x 100 is 28.999... in floating point; the expected numbers are computed with fractions."""
    budgets, num_real = torch.arange(101), 90
    mask = (torch.arange(100) < num_real).expand(101, -1)
    flat = torch.ones(101, 100)
    for focus_limit in (float(limit), int(limit)) if limit == "1" else (float(limit),):
        selection = select_visual_tokens(
            torch.eye(100).expand(101, -1, -1), flat, None, budgets, mask=mask, rho=1.0, focus_limit=focus_limit
        )
        expected = [min(k, max(1, math.floor(Fraction(limit) * k))) for k in map(min, range(101), [num_real] * 101)]
        assert selection.is_focus.sum(1).tolist() == expected
        whole = select_visual_tokens(torch.eye(100)[None], flat[:1], None, 100, rho=1.0, focus_limit=focus_limit)
        assert whole.is_focus.sum() == max(1, math.floor(Fraction(limit) * 100))


def test_mass_is_summed_in_float64():
    """In float32 a mass of 1 does not grow by 1e-9, and the first token alone would hold all of it."""
    saliency = torch.full((1, 40), 1e-9)
    saliency[0, 7], saliency[0, 8] = 1.0, 0.0
    selection = select_visual_tokens(torch.eye(40)[None], saliency, None, 40, rho=1.0, focus_limit=1.0)
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
    """Four pools of 60 tokens. Of 24 that they keep at rho=0.6, 9 to 12 are Focus tokens; the rest are anchors."""
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


@pytest.mark.parametrize("num_tokens", [*range(2, 40), 100, 257, 576, 9000])
def test_equal_scores_have_equal_priorities(num_tokens):
    """Four scores in turns, so that each stands in full vector registers and among the elements left over."""
    group = torch.arange(num_tokens) % 4
    scores = torch.tensor([0.5, 0.1, 0.37, 0.9])[group].expand(4, -1)
    features = torch.eye(4)[group].expand(4, -1, -1)
    for exponent in (0.3, 0.5, 0.7, 1.0, 1.7, 2.0, 2.5, 3.0, math.pi, 7.0):
        selection = select_visual_tokens(features, scores, scores, 1, alpha=exponent / 2, beta=exponent)
        assert torch.equal(selection.priority, selection.priority[:, : min(num_tokens, 4)][:, group]), exponent
        assert (selection.indices == scores[0].tolist().index(scores.max())).all()


def test_equal_scores_are_a_tie_with_a_fractional_exponent():
    """A plain power gives index 98, which fills no vector register, a higher priority than index 2."""
    for score in torch.linspace(0.01, 0.99, 99).tolist():
        saliency = torch.tensor([[score, 0.0, score]])[:, torch.arange(99) % 3]
        saliency[0, 1] = 1.0
        selection = select_visual_tokens(torch.eye(99)[None], saliency, None, 2, beta=0.3, focus_limit=1.0, rho=1.0)
        assert selection.indices.tolist() == [[0, 1]], score


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
        ({"num_visual_tokens": 0}, "`num_visual_tokens=0` is not allowed: `num_visual_tokens` must be an int >= 1"),
        ({"num_visual_tokens": -3}, "`num_visual_tokens=-3` is not allowed: .* an int >= 1, or a LongTensor"),
        (
            {"num_visual_tokens": torch.tensor([1, 2, 3])},
            r"of shape \(batch,\) = \(2,\), .* torch.int64 of shape \(3,",
        ),
        ({"num_visual_tokens": torch.tensor([1.0, 2.0])}, r"must be a LongTensor .* but it is torch.float32"),
        (
            {"num_visual_tokens": torch.tensor([1, 2]), "max_num_visual_tokens": 0},
            "`max_num_visual_tokens=0` is not allowed: `max_num_visual_tokens` must be an int >= 1, or None",
        ),
        ({"focus_mass": "half"}, """`focus_mass='half'` is not allowed: `focus_mass` must be "all" or "budget\""""),
        *(
            ({name: value}, re.escape(f"`{name}={value!r}` is not allowed: `{name}` must be an int >= 1"))
            for name in ("num_visual_tokens", "max_num_visual_tokens")
            for value in (True, 3.0, 2.5, "3", [3], math.nan)
        ),
        *(
            ({name: value}, re.escape(f"`{name}={value!r}` is not allowed: `{name}` must be {allowed}"))
            for names, allowed, values in (
                (("rho", "focus_limit"), "a number in (0, 1]", (0, -1, 2, 1.0001)),
                (("alpha", "beta", "uniform_scan"), "a number >= 0", (-1, -1e-9)),
                (("kappa",), "a number >= 0, or None", (-1, -1e-9)),
            )
            for name in names
            for value in (*values, math.nan, math.inf, -math.inf, True, None, "0.5", torch.tensor(0.5))
            if (name, value) != ("kappa", None)
        ),
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
    assert fsr.__all__ == ["VisualSelection", "refine_like", "select_visual_tokens"]
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
