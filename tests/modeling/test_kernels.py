"""
Triton's kernels: right in its interpreter, compiled for the GPUs that they are meant for, and not missed where there
is no Triton. On a machine with a GPU they run as they are.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, models
from isolated import ROOT, run_python

from fsr_hf.modeling import compression, fsr, received_kernel, scan_kernel
from fsr_hf.modeling import saliency as saliency_module
from fsr_hf.modeling.fsr import select_visual_tokens
from fsr_hf.modeling.saliency import attention_received
from fsr_hf.modeling.triton_launch import can_launch


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    files = [str(Path(__file__).with_name(name)) for name in ("kernel_checks.py", "kernel_trust_checks.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


TOKENS = {"num_tokens": "i32", "hidden_size": "i32"}
SCORES = {"query": "*T", "key": "*T", "table": "*i32", "logs": "*fp32", "tokens": "i32", "heads": "i32"}
SCORES |= {"head_dim": "i32", "scale": "fp32"}
NEAREST = {"tokens": "*T", "scale": "*fp32", "chosen": "*i64", "num_chosen": "*i64", "nearest": "*i64"}
NEAREST |= {"similarity": "*fp32", "width": "i32"}
SCAN = {"pairs": "*fp32", "scale": "*fp32", "closest": "*fp32", "num_even": "*i64"}
SCAN |= {
    "num_anchors": "*i64",
    "anchors": "*i64",
    "nearest": "*i64",
    "similarity": "*fp32",
    "num_tokens": "i32",
    "max_anchors": "i32",
}
STEP = {
    "tokens": "*T",
    "scale": "*fp32",
    "num_even": "*i64",
    "num_anchors": "*i64",
    "closest": "*fp32",
    "block_cosine": "*fp32",
    "block_token": "*i64",
}
STEP |= {"anchors": "*i64", "max_anchors": "i32", "step": "i32", "num_blocks": "i32"}
FOCUS = {"pairs": "*fp32", "mask": "*i1", "focus": "*i64", "num_focus": "*i64", "closest": "*fp32"}
# Kernel, types of its arguments (T: of the features), constants, warps, types of features.
KERNELS = {
    "_scale_kernel": ({"features": "*T", "tokens": "*T", "scale": "*fp32"} | TOKENS, {"BLOCK": 4096}, 4),
    "_pairs_kernel": (
        {"tokens": "*T", "scale": "*fp32", "pairs": "*fp32"} | TOKENS,
        {"SIZE": 128, "DEPTH": 64},
        8,
    ),
    "_focus_kernel": (FOCUS | {"num_tokens": "i32", "width": "i32"}, {"BLOCK": 128}, 4),
    "_scan_kernel": (SCAN, {"BLOCK": 8192}, 16),
    "_nearest_kernel": (NEAREST | TOKENS, {"ONLY_FINITE": True, "SIZE": 128, "DEPTH": 32}, 8),
    "_step_kernel": (STEP | TOKENS, {"SIZE": 16, "DEPTH": 512, "BLOCKS": 1024}, 4),
    "_logs_kernel": (SCORES, {"DEPTH": 128}, 8),
    "_columns_kernel": (SCORES | {"received": "*fp32"}, {"DEPTH": 128}, 8),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("architecture", [80, 86, 90])
def test_kernels_compile(name, architecture, monkeypatch, tmp_path):
    """For Ampere and Hopper, without one at hand: a kernel that interprets may still be none to the compiler."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    kernel = getattr(scan_kernel, name, None) or getattr(received_kernel, name)
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("in the interpreter")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types, constants, warps = KERNELS[name]
    for dtype, torch_dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "_pairs_kernel" and dtype == "fp32":
            continue  # torch's product is better
        if "DEPTH" in constants and name in ("_logs_kernel", "_columns_kernel"):
            constants = constants | dict(zip(("ROWS", "COLUMNS"), received_kernel._TILES[torch_dtype]))
        signature = {arg: types.get(arg, "constexpr").replace("T", dtype) for arg in kernel.arg_names}
        try:
            target = compiler.GPUTarget("cuda", architecture, 32)
            source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
        except Exception as error:
            pytest.skip(f"another Triton: {error}")
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        assert "cubin" in compiled.asm
        # Shared memory of a program on RTX 3090 and 4090, which have the least.
        assert compiled.metadata.shared <= 99 * 1024


WITHOUT = """
import sys
sys.modules["triton"] = None  # what a machine without it comes to
import torch
from fsr_hf.modeling import triton_launch
from fsr_hf.modeling.fsr import select_visual_tokens
from fsr_hf.modeling.saliency import attention_received
assert triton_launch.triton is None and not triton_launch.can_launch(torch.zeros(1))
selection = select_visual_tokens(torch.eye(8)[None], torch.arange(8.0)[None], None, 3)
attention_received(torch.ones(4, 2, 8), torch.ones(4, 2, 8), [4], 1.0)
print(selection.indices.tolist())
"""


def test_works_without_triton(tmp_path):
    expected = select_visual_tokens(torch.eye(8)[None], torch.arange(8.0)[None], None, 3).indices
    done = run_python("-c", WITHOUT, cwd=tmp_path, path=[ROOT])
    assert done.returncode == 0 and done.stdout.strip() == str(expected.tolist()), done.stderr


def test_kernels_are_for_gpus():
    for device in ("cpu", "meta"):
        assert not can_launch(torch.zeros(1, device=device))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("number", "width", "budget"), [(576, 4096, 64), (2880, 1024, 640), (9000, 256, 300)])
def test_selection_on_a_gpu_is_that_of_the_cpu(number, width, budget, dtype):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, number, width, generator=generator).to(dtype)
    saliency, relevance = torch.rand(2, 2, number, generator=generator) ** 4
    assert scan_kernel.can_scan_on_gpu(features.cuda(), fsr._scan_with_torch)
    selection = select_visual_tokens(features.cuda(), saliency.cuda(), relevance.cuda(), budget, rho=0.5)
    expected = select_visual_tokens(features, saliency, relevance, budget, rho=0.5)
    assert (~expected.is_focus).any()
    for row in range(2):
        one, other = ({*s.indices[row].tolist()} for s in (selection, expected))
        assert len(one & other) >= 0.98 * budget  # sums in another order


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_received_on_a_gpu_is_that_of_the_cpu(dtype):
    query, key = torch.randn(2, 3000, 16, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    lengths = [1000, 1, 729, 1270]
    assert received_kernel.can_receive_on_gpu(query.cuda(), saliency_module._received_in_blocks)
    received = attention_received(query.cuda(), key.cuda(), lengths, 80**-0.5)
    torch.testing.assert_close(received.cpu(), attention_received(query, key, lengths, 80**-0.5), rtol=1e-3, atol=1e-7)


@cuda
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("number", [576, 9000])
def test_selection_does_not_wait_for_the_gpu(number, grad):
    features = torch.randn(2, number, 512, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
    saliency, relevance = torch.rand(2, 2, number, device="cuda")
    query, key = torch.randn(2, 2 * number, 4, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.rand(2, number, device="cuda") < 0.9

    def select_all():
        select_visual_tokens(features, saliency, relevance, 64, rho=0.5)
        budgets = torch.tensor([64, 32])
        select_visual_tokens(features, saliency, None, budgets, mask=mask, max_num_visual_tokens=64)
        attention_received(query, key, [number] * 2, 0.1)

    select_all()  # compiling and the check of the kernels wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_all()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_compression_does_not_wait_for_the_gpu(name, monkeypatch):
    """From the towers to the kept tokens and their places; ids and masks are copied to the host before."""
    family, model = FAMILIES[name], copy.deepcopy(models(name)[0]).cuda()
    inputs = {key: value.cuda() for key, value in family.inputs(family.rows()).items()}
    model.generate(**inputs, max_new_tokens=8, do_sample=False)  # compiling and the check of the kernels wait
    calls = []

    def watch(owner, attribute):
        original = getattr(owner, attribute)

        def watched(*args, **kwargs):
            calls.append(attribute)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return original(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(owner, attribute, watched)

    watch(model.model, "encode_items")
    watch(compression, "select_from_items")
    watch(compression, "select_columns")
    model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert calls == ["encode_items", "select_from_items", "select_columns"]
