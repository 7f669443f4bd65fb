"""Scan on the CPU against the loop over anchors that other devices run, and against the equations in float64."""

import random
import sys

import pytest
import torch
from isolated import ROOT, run_python
from selection_checks import check_exact_pools, same_selection

from fsr_hf.modeling import fsr, host_scan
from fsr_hf.modeling.fsr import select_visual_tokens


@pytest.fixture
def small_pools(monkeypatch):
    """So that a few tokens take as many rounds as thousands do."""
    monkeypatch.setattr(host_scan, "_SMALL", 0)
    monkeypatch.setattr(host_scan, "_TILE", 2)
    monkeypatch.setattr(host_scan, "_MAX_PART", 8)
    monkeypatch.setattr(host_scan, "_MIN_CANDIDATES", 4)
    monkeypatch.setattr(host_scan, "_MAX_CANDIDATES", 6)


@pytest.mark.parametrize("chunk", range(4))
def test_equals_the_equations_with_ties_and_non_finite_values(chunk, small_pools):
    for seed in range(100):
        check_exact_pools(random.Random(5000 + 1000 * chunk + seed), max_tokens=24)


def tokens(kind: str, number: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, width, generator=generator)
    which = torch.randint(0, 12, (number,), generator=generator)
    features = {
        "random": noise,
        "clusters": torch.randn(12, width, generator=generator)[which] + 0.1 * noise,
        # A pool full of one cluster yields one anchor.
        "tight clusters": torch.randn(12, width, generator=generator)[which] * 10 + 0.01 * noise,
        "copies": noise.sign()[which * 7],  # of tokens whose cosines are exact, and so are ties of other tokens
        "signs": noise.sign(),
        "constant": torch.ones(number, width),
        "zero": torch.zeros(number, width),
        "holes": noise.masked_fill(which[:, None] < 4, 0.0),
        "not finite": noise.masked_fill(which[:, None] == 3, torch.nan).masked_fill(which[:, None] == 5, torch.inf),
        "huge": noise * torch.logspace(-30, 30, number)[:, None],
        "one line": torch.outer(torch.linspace(-1, 1, number), noise[0]) + noise[1],
    }[kind]
    return features.contiguous()


KINDS = [
    *("random", "clusters", "tight clusters", "copies", "signs", "constant", "zero", "holes", "not finite", "huge"),
    "one line",
]


@pytest.mark.parametrize("width", [64, 256])  # below and above half the tokens: all pairs may be computed, or not
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_anchor_after_the_other(kind, width, monkeypatch):
    number = 500
    for seed, (budget, rho) in enumerate(((2, 1e-6), (90, 0.3), (260, 0.5), (490, 0.5))):
        features = torch.stack([tokens(kind, number, width, seed), tokens("random", number, width, seed + 9)])
        saliency = torch.rand(2, number, generator=torch.Generator().manual_seed(seed)) ** 8  # K_F < 170 at rho 0.5
        mask = torch.arange(number) != torch.tensor([[seed], [number + 1]])
        arguments = (features, saliency, None, budget)
        selection = select_visual_tokens(*arguments, mask=mask, rho=rho)
        with monkeypatch.context() as patch:
            patch.setattr(fsr, "can_scan_on_host", lambda features: False)
            expected = select_visual_tokens(*arguments, mask=mask, rho=rho)
        assert (~expected.is_focus).sum() > 0
        for either in (selection, expected):
            either.features.nan_to_num_()
        if kind in ("one line", "tight clusters"):  # many angles are equal up to rounding
            focus, other = (set(s.indices[0][s.is_focus[0]].tolist()) for s in (selection, expected))
            assert focus == other
            assert coverage(features[0], selection.indices[0]) < coverage(features[0], expected.indices[0]) + 1e-3
        else:
            same_selection(selection, expected, rtol=1e-5, atol=1e-5)


def coverage(features: torch.Tensor, kept: torch.Tensor) -> float:
    """How far a token can be from all that are kept, as sqrt(1 - cos)."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return (1 - unit @ unit[kept].mT).clamp(min=0).sqrt().amin(-1).max().item()


@pytest.mark.parametrize("part", [host_scan._MAX_PART, 256])
def test_equal_tokens_are_a_tie_wherever_they_stand(part, monkeypatch):
    """In the products for a pool and in those for all tokens, or for parts of them."""
    monkeypatch.setattr(host_scan, "_MAX_PART", part)
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        number, distinct = 257 + 23 * seed, 150
        which = torch.randint(0, distinct, (number,), generator=generator)
        features = torch.randn(distinct, 333, generator=generator)[which]
        saliency = torch.rand(1, number, generator=generator)
        selection = select_visual_tokens(features[None], saliency, None, 120, rho=1e-6)
        first = [which.tolist().index(token) for token in which.tolist()]
        anchors = selection.indices[0][~selection.is_focus[0]].tolist()
        assert [first[index] for index in anchors] == anchors


@pytest.mark.parametrize("number", [1, 63, 64, 257, 1025, 4096, 6300])
def test_columns_of_products_have_one_size(number):
    """Products of different sizes may round in different ways. Only the last part may be a copy."""
    tokens = torch.arange(float(number))[:, None].expand(-1, 3).contiguous()
    parts = host_scan._split(tokens)
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) % host_scan._TILE == 0
    joined = torch.cat(parts)
    assert torch.equal(joined[:number], tokens)
    assert not joined[number:].any()
    storage = tokens.untyped_storage().data_ptr()
    whole = parts if number % host_scan._TILE == 0 else parts[:-1]
    assert all(part.untyped_storage().data_ptr() == storage for part in whole)
    assert len(parts[-1]) <= host_scan._MAX_PART or number % host_scan._TILE == 0


@pytest.mark.parametrize("number", [400, 1500])  # few tokens, of which all pairs come next, and more
def test_all_pairs_end_a_search_that_finds_few(monkeypatch, number):
    """One anchor a pool: after a few of them the loop goes on as if all tokens were in the pool."""
    sizes = []
    original = host_scan._farthest_first

    def watched(closest, pairs, indices, bound, max_anchors):
        sizes.append(len(indices))
        return original(closest, pairs, indices, bound, min(max_anchors, 1) if len(indices) < number else max_anchors)

    monkeypatch.setattr(host_scan, "_farthest_first", watched)
    features, saliency = tokens("random", number, 800, 0)[None], torch.rand(1, number) ** 8
    selection = select_visual_tokens(features, saliency, None, 200, rho=0.3)
    assert sizes[0] == 128
    assert sizes[-1] == number
    assert len(sizes) == (2 if number == 400 else 7)
    monkeypatch.setattr(fsr, "can_scan_on_host", lambda features: False)
    same_selection(selection, select_visual_tokens(features, saliency, None, 200, rho=0.3), rtol=1e-5, atol=1e-5)


def test_compiled_code_takes_the_loop():
    torch.compiler.reset()
    features, saliency = tokens("random", 300, 160, 1)[None], torch.rand(1, 300) ** 8
    expected = select_visual_tokens(features, saliency, None, 12, rho=0.3)
    compiled = torch.compile(select_visual_tokens, fullgraph=True, backend="eager")
    same_selection(compiled(features, saliency, None, 12, rho=0.3), expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


MEMORY = """
import resource, torch
from fsr_hf.modeling.fsr import select_visual_tokens
features, saliency = torch.randn(1, 20_000, 64), torch.rand(1, 20_000) ** 20
select_visual_tokens(features[:, :2000], saliency[:, :2000], None, 200, rho=0.1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
selection = select_visual_tokens(features, saliency, None, 1000, rho=0.1)
assert (~selection.is_focus).sum() > 500
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_does_not_grow_with_the_square(tmp_path):
    """All pairs of these 20,000 tokens are 1,526 MiB, and those of anchors and tokens 76 MiB."""
    done = run_python("-c", MEMORY, cwd=tmp_path, path=[ROOT])
    assert done.returncode == 0 and float(done.stdout) < 150, done.stderr
