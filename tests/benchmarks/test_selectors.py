"""Each peer's selection against a computation of its own, token by token in NumPy, one picture at a time."""

import itertools

import numpy as np
import pytest
import torch

from benchmarks.selectors import (
    SELECTORS,
    cdpruner,
    divprune,
    fastervlm,
    holov,
    idpruner,
    prunesid,
    random_tokens,
    scope,
    uniform_grid,
    visionzip,
    vispruner,
)


BATCH, TOKENS, SIZE = 3, 36, 8
BUDGETS = (1, 2, 5, 12, 30)


@pytest.fixture
def scene():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(BATCH, TOKENS, SIZE, generator=generator)
    saliency = torch.rand(BATCH, TOKENS, generator=generator) ** 4
    relevance = torch.randn(BATCH, TOKENS, generator=generator) / 10
    return features, saliency, relevance


def cosines_of(row):
    row = row.double().numpy()
    row = row / np.linalg.norm(row, axis=-1, keepdims=True)
    return row @ row.T


@pytest.mark.parametrize("num_kept", BUDGETS)
@pytest.mark.parametrize("name", SELECTORS)
def test_form(scene, name, num_kept):
    features, saliency, relevance = scene
    extra = {"generator": torch.Generator().manual_seed(0)} if name == "random" else {}
    kept, indices = SELECTORS[name](features, saliency, relevance, num_kept, **extra)
    assert kept.shape == (BATCH, num_kept, SIZE) and kept.dtype == features.dtype
    assert indices.shape == (BATCH, num_kept) and indices.dtype == torch.long
    assert all(len(set(row)) == num_kept and set(row) <= set(range(TOKENS)) for row in indices.tolist())
    if name not in ("visionzip", "fsr"):  # the two that merge
        assert torch.equal(kept, torch.stack([row[chosen] for row, chosen in zip(features, indices)]))
    if name != "visionzip":
        assert all(row == sorted(row) for row in indices.tolist())
    # Rows do not see each other, and half precision goes in and comes out.
    extra = {"generator": torch.Generator().manual_seed(0)} if name == "random" else {}
    alone, _ = SELECTORS[name](features[:1].bfloat16(), saliency[:1], relevance[:1], num_kept, **extra)
    assert alone.dtype == torch.bfloat16
    if name != "random":
        assert torch.equal(SELECTORS[name](features[1:], saliency[1:], relevance[1:], num_kept)[1], indices[1:])


def test_random_tokens(scene):
    first, again, other = (
        random_tokens(*scene, 12, generator=torch.Generator().manual_seed(seed))[1] for seed in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("num_kept", "places"),
    [
        (4, [(1, 1), (1, 4), (4, 1), (4, 4)]),
        (9, [(row, column) for row in (1, 3, 5) for column in (1, 3, 5)]),
        (5, [(1, 1), (1, 4), (4, 1), (4, 3), (4, 5)]),
        (36, [(row, column) for row in range(6) for column in range(6)]),
    ],
)
def test_uniform_grid(scene, num_kept, places):
    _, indices = uniform_grid(*scene, num_kept)
    assert indices.tolist() == [[6 * row + column for row, column in places]] * BATCH


def test_uniform_grid_of_a_wide_picture(scene):
    _, indices = uniform_grid(*scene, 3, grid=(1, 36))
    assert indices[0].tolist() == [6, 18, 30]


def test_uniform_grid_never_repeats_a_token():
    tokens = torch.zeros(1, 144, 1)
    for num_kept in range(1, 145):
        _, indices = uniform_grid(tokens, tokens[..., 0], None, num_kept)
        assert indices.shape == (1, num_kept) and len(set(indices[0].tolist())) == num_kept


@pytest.mark.parametrize("num_kept", BUDGETS)
def test_fastervlm(scene, num_kept):
    _, saliency, _ = scene
    _, indices = fastervlm(*scene, num_kept)
    for row, chosen in zip(saliency.numpy(), indices.tolist()):
        assert chosen == sorted(np.argsort(-row, kind="stable")[:num_kept])


def test_equal_scores_go_to_the_lower_index(scene):
    features, saliency, _ = scene
    _, indices = fastervlm(features, torch.zeros_like(saliency), None, 5)
    assert indices.tolist() == [[0, 1, 2, 3, 4]] * BATCH


@pytest.mark.parametrize("num_kept", BUDGETS)
def test_vispruner(scene, num_kept):
    features, saliency, _ = scene
    _, indices = vispruner(*scene, num_kept, step=3)
    for row, attention, chosen in zip(features, saliency.numpy(), indices.tolist()):
        cosines = cosines_of(row)
        order = sorted(range(TOKENS), key=lambda token: -attention[token])
        important, others = order[: num_kept // 2], order[num_kept // 2 :]
        while len(others) > num_kept - num_kept // 2:
            first, second = others[::2], others[1::2]
            duplicates = sorted(first, key=lambda token: -max(cosines[token, other] for other in second))
            number = min(3, len(others) - (num_kept - num_kept // 2))
            others = duplicates[number:] + second
        assert chosen == sorted(important + others)


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("num_kept", BUDGETS)
def test_visionzip(scene, num_kept, with_keys):
    features, saliency, _ = scene
    keys = torch.randn(BATCH, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    kept, indices = visionzip(*scene, num_kept, keys=keys if with_keys else None)
    num_contextual = {1: 1, 2: 1, 5: 1, 12: 2, 30: 5}[num_kept]
    for number in range(BATCH):
        order = np.argsort(-saliency[number].numpy(), kind="stable")
        dominant = sorted(order[: num_kept - num_contextual].tolist())
        others = [token for token in range(TOKENS) if token not in dominant]
        targets = [others[place * (len(others) // num_contextual)] for place in range(num_contextual)]
        assert indices[number].tolist() == dominant + targets

        cosines = cosines_of((keys if with_keys else features)[number])
        groups = {target: [target] for target in targets}
        for token in others:
            if token not in targets:
                groups[max(targets, key=lambda target: cosines[token, target])].append(token)
        expected = [features[number, token] for token in dominant]
        for target, members in groups.items():  # the target, and the mean of what was merged into it
            merged = features[number, members[1:]].double()
            expected.append((features[number, target] + merged.sum(0) / max(len(merged), 1)).float())
        torch.testing.assert_close(kept[number], torch.stack(expected))


@pytest.mark.parametrize("num_kept", BUDGETS)
def test_divprune(scene, num_kept):
    _, indices = divprune(*scene, num_kept)
    for row, chosen in zip(scene[0], indices.tolist()):
        distance = 1 - cosines_of(row)
        rest = set(range(TOKENS))
        picked = [max(rest, key=lambda token: min(distance[token, other] for other in rest - {token}))]
        while len(picked) < num_kept:
            picked.append(max(rest - set(picked), key=lambda token: min(distance[token, other] for other in picked)))
        assert chosen == sorted(picked)


@pytest.mark.parametrize("with_question", [False, True])
@pytest.mark.parametrize("num_kept", [1, 2, 5, 8])  # features of size 8: the determinant of more tokens is 0
def test_cdpruner(scene, num_kept, with_question):
    features, saliency, relevance = scene
    _, indices = cdpruner(features, saliency, relevance if with_question else None, num_kept)
    for row, fit, chosen in zip(features, relevance.double().numpy(), indices.tolist()):
        kernel = cosines_of(row)
        np.fill_diagonal(kernel, 1.0)
        if with_question:
            weight = (fit - fit.min() + 1e-6) / (fit.max() - fit.min() + 1e-6)
            kernel = np.outer(weight, weight) * kernel
        picked = []
        for _ in range(num_kept):  # straight from the definition: the token that makes the determinant largest
            rest = [token for token in range(TOKENS) if token not in picked]
            picked.append(
                max(rest, key=lambda token: np.linalg.det(kernel[np.ix_([*picked, token], [*picked, token])]))
            )
        assert chosen == sorted(picked)


@pytest.mark.parametrize("num_crops", [4, 5, 36])
@pytest.mark.parametrize("num_kept", BUDGETS)
def test_holov(scene, num_kept, num_crops):
    features, saliency, _ = scene
    saliency = saliency.clone()
    saliency[0, :9] += 3  # a crop that deserves more tokens than it has
    _, indices = holov(features, saliency, None, num_kept, num_crops=num_crops)
    for attention, chosen in zip(saliency.double().numpy(), indices.tolist()):
        crops = [list(part) for part in np.array_split(range(TOKENS), num_crops)]
        weights = np.array([attention[crop].mean() for crop in crops])
        weights /= weights.sum()
        quotas = [min(int(weight * num_kept), len(crop)) for weight, crop in zip(weights, crops)]
        while sum(quotas) < num_kept:
            for number in np.argsort(-weights, kind="stable"):
                if sum(quotas) < num_kept and quotas[number] < len(crops[number]):
                    quotas[number] += 1
        expected = [sorted(crop, key=lambda token: -attention[token])[:quota] for crop, quota in zip(crops, quotas)]
        assert chosen == sorted(itertools.chain(*expected))


@pytest.mark.parametrize("num_kept", BUDGETS)
def test_idpruner(scene, num_kept):
    features, saliency, _ = scene
    _, indices = idpruner(*scene, num_kept, importance_weight=0.3)
    for row, attention, chosen in zip(features, saliency.double().numpy(), indices.tolist()):
        cosines = cosines_of(row)
        importance = (attention - attention.min()) / (attention.max() - attention.min() + 1e-6)
        picked = [int(importance.argmax())]
        while len(picked) < num_kept:
            scores = {t: 0.3 * importance[t] - 0.7 * max(cosines[t, other] for other in picked) for t in range(TOKENS)}
            picked.append(max(set(scores) - set(picked), key=scores.__getitem__))
        assert chosen == sorted(picked)


def coverage(cosines, tokens):
    return sum(max([0.0, *(cosines[t, other] for other in tokens)]) for t in range(TOKENS))


@pytest.mark.parametrize("num_kept", BUDGETS)
def test_scope(scene, num_kept):
    features, saliency, _ = scene
    _, indices = scope(*scene, num_kept)
    for row, attention, chosen in zip(features, saliency.double().numpy(), indices.tolist()):
        cosines = cosines_of(row)
        picked = []
        for _ in range(num_kept):
            gains = {
                t: (coverage(cosines, [*picked, t]) - coverage(cosines, picked)) * attention[t] for t in range(TOKENS)
            }
            picked.append(max(set(gains) - set(picked), key=gains.__getitem__))
        assert chosen == sorted(picked)


@pytest.mark.parametrize("num_kept", (*BUDGETS, 20))
def test_prunesid(scene, num_kept):
    features, saliency, _ = scene
    features = features + torch.tensor([2.0, *[0.0] * (SIZE - 1)])  # with a mean cosine above 0
    _, indices = prunesid(features, saliency, None, num_kept)
    num_groups = max(1, num_kept // 4)
    for row, attention, chosen in zip(features.double().numpy(), saliency.double().numpy(), indices.tolist()):
        states = 1 / (1 + np.exp(-row.T))  # a sample for each feature, a column for each token
        states = states - states.mean(0)
        loadings = np.abs(np.linalg.svd(states)[2][:num_groups])
        groups = [[t for t in range(TOKENS) if loadings[:, t].argmax() == number] for number in range(num_groups)]
        cosines = cosines_of(torch.from_numpy(row))
        threshold = (
            num_kept * 18 / TOKENS * np.mean([cosines[a, b] for a, b in itertools.combinations(range(TOKENS), 2)])
        )
        ranked, survivors = [], []
        for group in groups:
            rest, kept = sorted(group, key=lambda token: -attention[token]), []
            for token in rest:
                if all(cosines[token, other] <= threshold for other in kept):
                    kept.append(token)
            ranked.append(kept + [token for token in rest if token not in kept])
            survivors.append(len(kept))
        most = 5 * -(-9 * num_kept // TOKENS)
        limits = [min(number, most, len(group)) for number, group in zip(survivors, groups)]
        while sum(limits) < num_kept:
            limits = [min(limit + 1, len(group)) for limit, group in zip(limits, groups)]
        least = [min(1, len(group)) for group in groups]
        ends = np.round(np.cumsum(survivors) / sum(survivors) * (num_kept - sum(least))).astype(int)
        quotas = [min(low + share, limit) for low, share, limit in zip(least, np.diff(ends, prepend=0), limits)]
        for number in sorted(range(num_groups), key=lambda number: -survivors[number]):
            quotas[number] += min(limits[number] - quotas[number], num_kept - sum(quotas))
        assert chosen == sorted(itertools.chain(*(tokens[:quota] for tokens, quota in zip(ranked, quotas))))
