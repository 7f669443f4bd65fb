"""Budgets over pools, and items put together again from their pools, against the reference pool by pool."""

import itertools
import random

import pytest
import torch
from method_reference import reference
from oracle import split_budget as split_by_fractions

from fsr_hf.configuration.configuration_fsr import FSRConfig
from fsr_hf.modeling.fsr import select_visual_tokens
from fsr_hf.modeling.pools import VisualTokens, select_from_items, split_budget
from fsr_hf.modeling.prompt import VisualItem


SIZE = 6
SETTINGS = {"rho": 0.4, "focus_limit": 0.5, "kappa": 1.0, "alpha": 3.0, "beta": 1.0, "focus_mass": "all"}


def test_split_of_a_budget_is_the_largest_remainder():
    for sizes in itertools.product(range(1, 7), repeat=3):
        for budget in range(sum(sizes) + 1):
            shares = split_budget(budget, list(sizes))
            assert shares == split_by_fractions(budget, list(sizes))
            assert sum(shares) == budget and all(share <= size for share, size in zip(shares, sizes))
    assert split_budget(640, [576] * 5) == [128] * 5


def make_items(rng: random.Random) -> list[VisualItem]:
    """Items of one to three pools, whose placeholders and newlines stand in any order."""
    items = []
    for number in range(rng.randint(1, 4)):
        sizes = [rng.randint(1, 9) for _ in range(rng.randint(1, 3))]
        owner = [pool for pool, size in enumerate(sizes) for _ in range(size)] + [-1] * rng.randint(0, 4)
        rng.shuffle(owner)
        pools = [torch.tensor([place for place, o in enumerate(owner) if o == pool]) for pool in range(len(sizes))]
        grid = torch.tensor([[o, place, 0] if o >= 0 else [-1] * 3 for place, o in enumerate(owner)])
        items.append(VisualItem(rng.choice(("image", "video")), grid, pools, row=number // 2))
    return items


def make_tokens(items: list[VisualItem], seed: int, has_relevance: bool) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(item.length, SIZE, generator=generator) for item in items]
    length = sum(item.length for item in items)
    saliency, relevance = torch.rand(2, length, generator=generator)
    return VisualTokens(features, saliency, relevance if has_relevance else None)


def expected_of(tokens: VisualTokens, items: list[VisualItem], number: int, budget: int):
    """What the reference keeps of one item in each of its pools, in placeholders of the item; and the closest call."""
    start, item = sum(other.length for other in items[:number]), items[number]
    kept, focus, priority, merged_into, features, gaps = [], set(), {}, {}, {}, []
    for pool, share in zip(item.pools, split_by_fractions(budget, [len(pool) for pool in item.pools])):
        places = pool.tolist()
        scores = [
            None if score is None else score[start + pool].tolist() for score in (tokens.saliency, tokens.relevance)
        ]
        values = tokens.features[number][pool].tolist()
        result = reference(values, *scores, share, **SETTINGS)
        kept += [places[i] for i in result[0]]
        focus |= {places[i] for i in result[1]}
        # A pool without a share has priorities, too.
        ranked = result if share else reference(values, *scores, 1, **SETTINGS)
        priority |= {places[i]: value for i, value in enumerate(ranked[2])}
        merged_into |= {places[i]: places[j] for i, j in result[3].items()}
        features |= {places[i]: value for i, value in result[4].items()}
        gaps += result[5]
    return sorted(kept), focus, priority, merged_into, features, gaps


@pytest.mark.parametrize("has_relevance", [False, True])
@pytest.mark.parametrize("return_selections", [False, True])
def test_items_keep_what_the_reference_keeps_of_their_pools(has_relevance, return_selections):
    whole = pruned = 0
    for seed in range(40):
        rng = random.Random(seed)
        items = make_items(rng)
        budgets = [rng.randint(1, item.num_candidates + 2) for item in items]
        tokens = make_tokens(items, seed, has_relevance)
        fsr = FSRConfig(num_visual_tokens=1, **SETTINGS)
        kept = select_from_items(tokens, items, budgets, fsr, select_visual_tokens, return_selections)
        right = [expected_of(tokens, items, n, min(budgets[n], items[n].num_candidates)) for n in range(len(items))]
        if min((abs(gap) for result in right for gap in result[5]), default=1) < 1e-5:
            continue  # rounding may turn a decision
        indices, features = kept.indices.split(kept.counts), kept.features.split(kept.counts)
        for number, (item, budget) in enumerate(zip(items, budgets)):
            places, focus, priority, merged_into, refined, _ = right[number]
            if budget >= item.num_candidates:  # newlines stay, and every bit
                whole += 1
                assert indices[number].tolist() == list(range(item.length))
                assert torch.equal(features[number], tokens.features[number])
            else:
                pruned += 1
                assert kept.counts[number] == budget and indices[number].tolist() == places
                torch.testing.assert_close(features[number], torch.tensor([refined[place] for place in places]))
            if return_selections:
                selection = kept.selections[number]
                assert selection.indices.tolist() == places
                assert {p for p, is_focus in zip(places, selection.is_focus) if is_focus} == focus
                assert {p: int(a) for p, a in enumerate(selection.merged_into) if a >= 0} == merged_into
                values = torch.tensor([priority.get(place, 0.0) for place in range(item.length)])
                torch.testing.assert_close(selection.priority, values, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(selection.features, torch.tensor([refined[place] for place in places]))
                assert selection.grid is item.grid
                assert (selection.modality, selection.row) == (item.modality, item.row)
        assert return_selections or kept.selections is None
    assert whole > 10 and pruned > 30


def test_nothing_to_select_never_asks_the_selector():
    items = make_items(random.Random(0))
    tokens = make_tokens(items, 0, False)
    budgets = [item.num_candidates for item in items]
    fsr = FSRConfig(num_visual_tokens=1)

    def fail(*args, **kwargs):
        raise AssertionError("an item within its budget was selected from")

    kept = select_from_items(tokens, items, budgets, fsr, fail, False)
    assert torch.equal(kept.features, torch.cat(tokens.features)) and kept.selections is None
    assert kept.counts == [item.length for item in items]
    assert kept.indices.tolist() == [place for item in items for place in range(item.length)]


def test_what_a_selector_is_given():
    """All pools of pruned items at once, padded; the mask and the budgets say what is real."""
    pools = [[torch.tensor([0, 2]), torch.tensor([1, 3, 4])], [torch.arange(6)], [torch.arange(2)]]
    items = [
        VisualItem("image", torch.zeros(length, 3, dtype=torch.long), pool) for length, pool in zip((5, 6, 2), pools)
    ]
    tokens = make_tokens(items, 1, True)
    fsr = FSRConfig(num_visual_tokens=1, **{**SETTINGS, "kappa": 0.5})
    calls = []

    def record(features, saliency, relevance, budget, **options):
        calls.append((features, saliency, relevance, budget, options))
        return select_visual_tokens(features, saliency, relevance, budget, **options)

    kept = select_from_items(tokens, items, [3, 4, 2], fsr, record, False)
    ((features, saliency, relevance, budget, options),) = calls
    assert features.shape == (3, 6, SIZE) and budget.tolist() == [1, 2, 4]
    assert options["mask"].sum(1).tolist() == [2, 3, 6]
    assert options["max_num_visual_tokens"] == 4 and options["kappa"] == 0.5
    assert torch.equal(features[1, :3], tokens.features[0][[1, 3, 4]])
    assert torch.equal(saliency[1, :3], tokens.saliency[[1, 3, 4]])
    assert torch.equal(relevance[2], tokens.relevance[5:11])
    assert kept.counts == [3, 4, 2]


def test_half_precision_keeps_its_dtype():
    items = make_items(random.Random(3))
    tokens = make_tokens(items, 3, True)
    tokens.features = [run.bfloat16() for run in tokens.features]
    kept = select_from_items(
        tokens, items, [1] * len(items), FSRConfig(num_visual_tokens=1), select_visual_tokens, True
    )
    assert kept.features.dtype == torch.bfloat16
    assert all(selection.features.dtype == torch.bfloat16 for selection in kept.selections)
