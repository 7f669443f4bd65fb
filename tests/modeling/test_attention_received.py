"""Attention received, against maps written out in float64, and what it needs in memory."""

import sys

import pytest
import torch
from isolated import ROOT, run_python
from received import queries_and_keys, received_by_maps

from fsr_hf.modeling import saliency
from fsr_hf.modeling.saliency import attention_received


@pytest.mark.parametrize("block_scores", [1, 100, 2**24])
@pytest.mark.parametrize("lengths", [[37], [20, 1, 16], [9] * 4 + [1]])
def test_equals_the_maps_written_out(lengths, block_scores, monkeypatch):
    monkeypatch.setattr(saliency, "_BLOCK_SCORES", block_scores)
    query, key = queries_and_keys(37)
    received = attention_received(query, key, lengths, 0.3)
    torch.testing.assert_close(received.double(), received_by_maps(query, key, lengths, 0.3), rtol=1e-5, atol=1e-8)
    for segment in received.split(lengths):
        torch.testing.assert_close(segment.sum(), torch.tensor(1.0))


def test_columns_are_summed_not_rows():
    """One key that every query looks at receives it all, though its own query looks everywhere alike."""
    query, key = torch.zeros(2, 6, 1, 4)
    query[:, 0, 0] = 50.0
    query[2] = 0.0
    key[2, 0, 0] = 1.0
    received = attention_received(query, key, [6], 1.0)
    expected = torch.tensor([1.0, 1, 31, 1, 1, 1]) / 36
    torch.testing.assert_close(received, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """1 + 1/512 is 1 in bfloat16: sums in the dtype of the input would be off by far more than its rounding."""
    query, key = (tensor.to(dtype) for tensor in queries_and_keys(700, heads=2))
    with torch.autocast("cpu", torch.bfloat16):
        received = attention_received(query, key, [700], 0.3)
    assert received.dtype == torch.float32
    torch.testing.assert_close(received.double(), received_by_maps(query, key, [700], 0.3), rtol=1e-5, atol=1e-8)


def test_scores_far_out_stay_finite():
    query, key = queries_and_keys(12)
    received = attention_received(query * 1e4, key * 1e4, [12], 1.0)
    torch.testing.assert_close(
        received.double(), received_by_maps(query * 1e4, key * 1e4, [12], 1.0), rtol=1e-5, atol=1e-8
    )


def test_no_gradient_and_inputs_unchanged():
    query, key = (tensor.requires_grad_() for tensor in queries_and_keys(10))
    before = query.detach().clone()
    assert not attention_received(query, key, [4, 6], 0.5).requires_grad
    assert torch.equal(query, before)


MEMORY = """
import resource, torch
from fsr_hf.modeling.saliency import attention_received
tokens, heads, head_dim = 6144, 16, 16
query, key = torch.randn(2, tokens, heads, head_dim)
attention_received(query[:64], key[:64], [64], 0.1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention_received(query, key, [tokens], 0.1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_does_not_grow_with_the_square(tmp_path):
    """All maps of these 6,144 tokens are 2,304 MiB; a block is 4 MiB, and copies of query and key are 6 MiB each."""
    done = run_python("-c", MEMORY, cwd=tmp_path, path=[ROOT])
    assert done.returncode == 0 and float(done.stdout) < 150, done.stderr
