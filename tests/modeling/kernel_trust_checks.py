"""
Kernels that are broken on purpose, and sound ones: `test_kernels.py` runs this file in Triton's interpreter, on the
CPU, which has to be chosen before triton is imported.
"""

import logging

import pytest
import torch
from received import queries_and_keys
from selection_checks import same_selection

from fsr_hf.modeling import fsr, received_kernel, saliency, scan_kernel, triton_launch
from fsr_hf.modeling.fsr import select_visual_tokens
from fsr_hf.modeling.saliency import attention_received


@pytest.fixture(autouse=True)
def warnings(monkeypatch):
    """Each test starts as a process does: no kernel has run, and nothing was said. The list collects warnings."""
    assert triton_launch.is_interpreted()
    triton_launch._have_agreed.cache_clear()
    logging.Logger.warning_once.cache_clear()
    messages = []
    monkeypatch.setattr(triton_launch.logger, "warning", messages.append)
    yield messages
    triton_launch._have_agreed.cache_clear()


class Broken:
    """A kernel with something done to its arguments before or after it runs."""

    def __init__(self, kernel, before=lambda *args: None, after=lambda *args: None):
        self.kernel, self.before, self.after = kernel, before, after

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.before(*args)
            self.kernel[grid](*args, **options)
            self.after(*args)

        return launch


def fail(*args):
    raise RuntimeError("ptxas failed")


def blur_ties(pairs, *_):
    """The last digits of cosines fall with the index, so that the last of equal tokens is the farthest."""
    pairs.sub_(torch.arange(pairs.shape[-1]) * 1e-7)


BREAKS = {
    "does not compile": ("_scan_kernel", {"before": fail}),
    "other anchors": ("_scan_kernel", {"after": lambda *args: args[5].copy_(args[5].flip(1))}),
    "other ties": ("_focus_kernel", {"before": blur_ties}),
    "not a number": ("_scale_kernel", {"after": lambda *args: args[2].fill_(torch.nan)}),
    "does not launch": ("_step_kernel", {"before": fail}),
    "other farthest token": ("_step_kernel", {"after": lambda *args: args[6].add_(1).clamp_(max=39)}),
    "other nearest anchor": ("_nearest_kernel", {"after": lambda *args: args[4].sub_(1)}),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_scan_kernel_falls_back_to_torch(name, monkeypatch, warnings):
    generator = torch.Generator().manual_seed(0)
    features, saliency = torch.randn(2, 40, 16, generator=generator), torch.rand(2, 40, generator=generator)
    with monkeypatch.context() as patch:
        patch.setattr(fsr, "can_scan_on_gpu", lambda *args: False)
        expected = select_visual_tokens(features, saliency, None, 12)
    kernel, damage = BREAKS[name]
    if kernel in ("_step_kernel", "_nearest_kernel"):
        monkeypatch.setattr(scan_kernel, "_MAX_PAIRS", 0)
    monkeypatch.setattr(scan_kernel, kernel, Broken(getattr(scan_kernel, kernel), **damage))
    for _ in range(2):
        same_selection(select_visual_tokens(features, saliency, None, 12), expected)
    (message,) = warnings
    assert "`scan_kernel`" in message and "on cpu" in message
    assert ("RuntimeError: ptxas failed" if damage.get("before") is fail else "another result than torch") in message


@pytest.mark.parametrize(
    ("kernel", "damage", "reason"),
    [
        ("_logs_kernel", {"before": fail}, "RuntimeError: ptxas failed"),
        ("_logs_kernel", {"after": lambda *args: args[3][:, -33:].add_(0.1)}, "another result than torch"),
        ("_columns_kernel", {"after": lambda *args: args[4].mul_(1.1)}, "another result than torch"),
    ],
)
def test_a_broken_attention_kernel_falls_back_to_torch(kernel, damage, reason, monkeypatch, warnings):
    query, key = queries_and_keys(60)
    expected = saliency._received_in_blocks(query, key, [40, 20], 0.3)
    monkeypatch.setattr(received_kernel, kernel, Broken(getattr(received_kernel, kernel), **damage))
    for _ in range(2):
        assert torch.equal(attention_received(query, key, [40, 20], 0.3), expected)
    (message,) = warnings
    assert "`received_kernel`" in message and "on cpu" in message and reason in message


def test_sound_kernels_are_checked_once_and_then_run(monkeypatch, warnings):
    checked, launched = [], []
    for module, owner, name in ((scan_kernel, fsr, "scan_on_gpu"), (received_kernel, saliency, "received_on_gpu")):
        agrees, run = module._agrees, getattr(owner, name)
        monkeypatch.setattr(module, "_agrees", lambda *a, agrees=agrees: checked.append(a[1:]) or agrees(*a))
        monkeypatch.setattr(owner, name, lambda *a, run=run, name=name: launched.append(name) or run(*a))
    cpu = torch.device("cpu")
    features = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    query, key = queries_and_keys(60)
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        select_visual_tokens(features.to(dtype), features[..., 0], None, 12)
        attention_received(query.to(dtype), key.to(dtype), [40, 20], 0.3)
    assert checked == [
        *((cpu, torch.float32, True), (cpu, torch.float32)),
        *((cpu, torch.bfloat16, True), (cpu, torch.bfloat16)),
    ]
    monkeypatch.setattr(scan_kernel, "_MAX_PAIRS", 39)
    select_visual_tokens(features, features[..., 0], None, 12)
    assert checked[4:] == [(cpu, torch.float32, False)]
    assert launched == ["scan_on_gpu", "received_on_gpu"] * 3 + ["scan_on_gpu"]
    assert not warnings


def test_no_choice_of_the_small_problem_is_a_close_one(monkeypatch):
    """Noise of almost one percent, the same for equal tokens, changes none: rounding cannot make kernels disagree."""
    problems = []

    def keep(*arguments):
        problems.append(arguments)
        return fsr._scan_with_torch(*arguments)

    assert scan_kernel._agrees(keep, torch.device("cpu"), torch.float32, True)
    ((features, *others),) = problems
    anchors, nearest, similarity = fsr._scan_with_torch(features, *others)
    has_anchor = similarity > -torch.inf
    assert (anchors < 132).sum(1).tolist() == [9, 6]
    tokens, which = features.nan_to_num(9.0).flatten(0, 1).unique(dim=0, return_inverse=True)
    for seed in range(20):
        noise = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) / 64 - 1 / 128
        noisy = features * (1 + noise[which].view_as(features))
        other_anchors, other_nearest, _ = fsr._scan_with_torch(noisy, *others)
        assert torch.equal(other_anchors, anchors)
        assert torch.equal(other_nearest[has_anchor], nearest[has_anchor])
