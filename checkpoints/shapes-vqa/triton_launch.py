# Generated from fsr_hf 0.1.0 (fsr_hf.modeling.triton_launch), do not edit.
"""When Triton's kernels run in place of torch's operations."""

from functools import cache
from typing import Any

import torch
from transformers.utils import logging


try:
    import triton
    import triton.language as tl
except ImportError:  # another system than Linux, or a build of torch without it

    class tl:  # type: ignore[no-redef]
        constexpr = int  # in the signatures of kernels

    triton: Any = None  # type: ignore[no-redef]


__all__ = ["can_launch", "is_interpreted", "jit", "tl", "triton"]

logger = logging.get_logger(__name__)


def jit(function):
    """
    `triton.jit` where there is Triton; elsewhere the function, which nothing calls. Numbers that no address depends on
    have one compiled form.
    """
    return function if triton is None else triton.jit(function, do_not_specialize=["most", "width", "step"])


@jit
def _double_kernel(values, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(values + places, 2 * tl.load(values + places))


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: `TRITON_INTERPRET=1`, for tests without a GPU."""
    return triton is not None and not isinstance(_double_kernel, triton.JITFunction)


def can_launch(tensor: torch.Tensor) -> bool:
    """Whether kernels can work on `tensor`: on NVIDIA's GPUs from Ampere on, outside of traces of the code."""
    if triton is None or torch.compiler.is_compiling():
        return False
    if is_interpreted():
        return tensor.device.type == "cpu"
    return tensor.is_cuda and _works(tensor.device)


@cache
def _works(device: torch.device) -> bool:
    """Whether a kernel compiles and runs: the first one needs a C compiler, too."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with torch.cuda.device(device):
            _double_kernel[(1,)](torch.zeros(16, device=device), COUNT=16)
    except Exception as error:
        logger.warning(f"Triton does not work on {device}, so FSR selects tokens with torch alone, slower: {error}")
        return False
    return True
