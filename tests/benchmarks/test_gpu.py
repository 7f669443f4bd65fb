"""`benchmarks.gpu` without a GPU: its checks on the CPU, and the command in Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest
import torch
from isolated import ROOT, run_python

from benchmarks import gpu
from benchmarks.efficiency import Case
from benchmarks.efficiency_docs import checks_block
from benchmarks.models import Prompt
from fsr_hf.modeling.fsr import _scan_with_torch


def test_scan_is_measured_against_the_equations():
    """What torch chooses is right in float64; each damage to it is seen."""
    seen = 0
    for is_exact, arguments in gpu.scan_problems(60, 60, "cpu"):
        if is_exact:
            continue
        anchors, nearest, similarity = _scan_with_torch(*arguments)
        assert gpu.scan_excess(arguments, (anchors, nearest, similarity)) < gpu.TOLERANCE
        given, count = int(arguments[5][0]), int(arguments[6][0])
        if count - given < 3 or arguments[0].shape[1] < 20:
            continue
        seen += 1
        damaged = anchors.clone()
        damaged[0, given:count] = damaged[0, given:count].flip(0)
        assert gpu.scan_excess(arguments, (damaged, nearest, similarity)) > gpu.TOLERANCE
        damaged[0, :count] = damaged[0, 0]
        assert gpu.scan_excess(arguments, (damaged, nearest, similarity)) == float("inf")
        other = anchors[:, :1].expand_as(nearest)
        assert gpu.scan_excess(arguments, (anchors, other, similarity)) > gpu.TOLERANCE
        assert gpu.scan_excess(arguments, (anchors, nearest, similarity + 0.01)) > gpu.TOLERANCE
    assert seen >= 5


def test_selections_under_attention(monkeypatch):
    monkeypatch.setitem(gpu.efficiency.CASES, "tiny", [Case("llava", "tiny", Prompt(), 2)])
    found = gpu.compare_attention("cpu", "tiny")
    assert not found["failed"]
    assert found["kept_in_common"]["llava, eager, float32"] == 1.0
    assert found["kept_in_common"]["llava, sdpa, bfloat16"] >= 0.9


COMMANDS = """
import sys
from benchmarks import gpu
for more in (["--limit", "0"], [], []):
    gpu.main([*sys.argv[1:], *more])
    print("end of a call")
"""


def test_the_command_in_the_interpreter(tmp_path):
    """Three calls, of which the last finds all done. The interpreter has to be chosen before triton is imported."""
    pytest.importorskip("triton")
    arguments = ("--quick", "--problems", "3", "--output", str(tmp_path), "--parts", "kernels", "fixed")
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second, third, _ = done.stdout.split("end of a call\n")
    assert first == "left for the next call: kernels, fixed\n"
    assert "done before" not in second and third.count("done before") == 2
    kernels = json.loads((tmp_path / "gpu-cpu.json").read_text())["kernels"]
    assert kernels["problems"] == 3 and not kernels["failed"]
    assert 0 < kernels["scan_excess"] < 1e-5 and 0 < kernels["attention_error"] < 1e-3
    assert json.loads((tmp_path / "growth-cpu.json").read_text())["fixed"]["points"]
    (tmp_path / "gpu-cpu.json").rename(tmp_path / "gpu-cuda.json")
    assert "3 problems each, up to 60 tokens: 0 wrong" in checks_block(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    done = run_python("-m", "benchmarks.gpu", cwd=ROOT, path=[ROOT])
    assert done.returncode == 2
    assert "torch finds no GPU" in done.stderr
