"""
Triton's kernels against the equations, on small shapes: `test_kernels.py` runs this file in Triton's interpreter, on
the CPU, which has to be chosen before triton is imported.
"""

import random

import pytest
import torch
from received import queries_and_keys, received_by_maps
from selection_checks import check_exact_pools, same_selection

from fsr_hf.modeling import fsr, scan_kernel, triton_launch
from fsr_hf.modeling import saliency as saliency_module
from fsr_hf.modeling.fsr import select_visual_tokens
from fsr_hf.modeling.saliency import attention_received
from fsr_hf.modeling.triton_launch import can_launch, is_interpreted


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Each test has to launch kernels. `kernel_trust_checks.py` tests the check that comes before, skipped here."""
    assert is_interpreted() and can_launch(torch.zeros(1))
    monkeypatch.setattr(triton_launch, "_have_agreed", lambda *args: True)
    calls = []
    for owner, name in ((fsr, "scan_on_gpu"), (saliency_module, "received_on_gpu")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original: calls.append(1) or original(*a))
    yield
    assert calls


@pytest.fixture(params=["pairs", "no pairs"])
def way(request, monkeypatch):
    """Cosines of all pairs at once, or when they are needed."""
    if request.param == "no pairs":
        monkeypatch.setattr(scan_kernel, "_MAX_PAIRS", 0)


@pytest.mark.parametrize("chunk", range(2))
def test_equals_the_equations_with_ties_and_non_finite_values(chunk, way):
    for seed in range(12):
        check_exact_pools(random.Random(9000 + 1000 * chunk + seed), max_tokens=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_torch(dtype, way, monkeypatch):
    """More tokens than a block holds, a hidden size that is no multiple of one."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 150, 90, generator=generator).to(dtype)
    features[0, 3], features[1, 140], features[0, 149] = 0.0, torch.inf, torch.nan
    saliency, relevance = torch.rand(2, 2, 150, generator=generator) ** 2
    mask = torch.rand(2, 150, generator=generator) < 0.9
    arguments = (features, saliency, relevance, torch.tensor([24, 15]))
    options = {"mask": mask, "rho": 0.4, "max_num_visual_tokens": 24}
    selection = select_visual_tokens(*arguments, **options)
    monkeypatch.setattr(fsr, "can_scan_on_gpu", lambda *args: False)
    expected = select_visual_tokens(*arguments, **options)
    assert (~expected.is_focus & (expected.indices >= 0)).sum() > 18
    for either in (selection, expected):
        either.features.nan_to_num_(posinf=7.0)
    same_selection(selection, expected, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-5)


def test_equal_tokens_are_a_tie_in_any_number(way):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(0, 9, (70 + 20 * seed,), generator=generator)
        features = torch.randn(9, 50 + seed, generator=generator)[which].half()
        saliency = torch.rand(1, len(which), generator=generator)
        selection = select_visual_tokens(features[None], saliency, None, 6, rho=1e-6)
        first = [which.tolist().index(token) for token in which.tolist()]
        anchors = selection.indices[0][~selection.is_focus[0]].tolist()
        assert len(anchors) == 5
        assert [first[index] for index in anchors] == anchors


def test_rows_that_do_not_fit_into_memory_together(monkeypatch):
    features, saliency = torch.randn(3, 40, 16), torch.rand(3, 40) ** 4
    expected = select_visual_tokens(features, saliency, None, 12, rho=0.3)
    monkeypatch.setattr(scan_kernel, "_MAX_PAIRS_MEMORY", 2 * 4 * 40**2)
    calls = []
    original = scan_kernel._cosines_of_pairs
    monkeypatch.setattr(scan_kernel, "_cosines_of_pairs", lambda *a: calls.append(len(a[0])) or original(*a))
    same_selection(select_visual_tokens(features, saliency, None, 12, rho=0.3), expected)
    assert calls == [2, 1]


def test_features_of_any_magnitude():
    features, saliency = torch.randn(1, 60, 24), torch.rand(1, 60) ** 6
    scales = 2.0 ** torch.arange(-100, 101, 200 / 59).round()[:60, None]
    expected = select_visual_tokens(features, saliency, None, 20, rho=0.3)
    for scaled in (features * scales, features * 2.0**110, features * 2.0**-110):
        assert torch.equal(select_visual_tokens(scaled, saliency, None, 20, rho=0.3).indices, expected.indices)


def test_gradients_are_those_of_torch(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 30, 16, generator=generator, requires_grad=True)
    saliency, upstream = torch.rand(2, 30, generator=generator) ** 6, torch.randn(2, 10, 16, generator=generator)
    (select_visual_tokens(features, saliency, None, 10, rho=0.3).features * upstream).sum().backward()
    found, features.grad = features.grad, None
    monkeypatch.setattr(fsr, "can_scan_on_gpu", lambda *args: False)
    (select_visual_tokens(features, saliency, None, 10, rho=0.3).features * upstream).sum().backward()
    torch.testing.assert_close(found, features.grad)


@pytest.mark.parametrize("lengths", [[37], [20, 1, 16], [9] * 4 + [1], [150, 70]])
def test_attention_received(lengths):
    query, key = queries_and_keys(sum(lengths))
    received = attention_received(query, key, lengths, 0.3)
    torch.testing.assert_close(received.double(), received_by_maps(query, key, lengths, 0.3), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_received_in_half_precision(dtype):
    query, key = (tensor.to(dtype) for tensor in queries_and_keys(200, heads=2, head_dim=20))
    views = torch.stack([query, key], dim=2).unbind(2)  # not contiguous
    received = attention_received(*views, [130, 70], 0.3)
    assert received.dtype == torch.float32
    torch.testing.assert_close(received.double(), received_by_maps(query, key, [130, 70], 0.3), rtol=1e-5, atol=1e-8)


def test_attention_received_stays_finite():
    query, key = (tensor * 1e4 for tensor in queries_and_keys(12))
    received = attention_received(query, key, [12], 1.0)
    torch.testing.assert_close(received.double(), received_by_maps(query, key, [12], 1.0), rtol=1e-5, atol=1e-8)
