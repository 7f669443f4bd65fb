"""Speed only: when Triton's kernels run in place of torch's operations."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers.utils import logging


try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux, or a build of torch without Triton

    class tl:  # type: ignore[no-redef]
        constexpr = int  # in the signatures of kernels

    triton: Any = None  # type: ignore[no-redef]


__all__ = ["can_launch", "is_interpreted", "is_trusted", "jit", "tl", "triton"]

logger = logging.get_logger(__name__)


def jit(function):
    """
    `triton.jit`; without Triton the plain function, which is then never called. Triton compiles a kernel anew where
    an integer argument is 1 or a multiple of 16; for the arguments named here that would gain nothing.
    """
    return function if triton is None else triton.jit(function, do_not_specialize=["max_anchors", "width", "step"])


@jit
def _empty_kernel():
    pass


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: `TRITON_INTERPRET=1`, for tests without a GPU."""
    return triton is not None and not isinstance(_empty_kernel, triton.JITFunction)


def can_launch(tensor: torch.Tensor) -> bool:
    """Whether kernels are meant for `tensor`: NVIDIA GPUs from Ampere on, outside of code that is being traced."""
    if triton is None or torch.compiler.is_compiling():
        return False
    if is_interpreted():
        return tensor.device.type == "cpu"
    return tensor.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def is_trusted(tensor: torch.Tensor, agrees: Callable[..., bool], torch_path: Callable, *variant: Any) -> bool:
    """
    Whether kernels may compute what `torch_path` computes for `tensor`: they are meant for its device, and on that
    device they have agreed with `torch_path` on a small problem.

    The small problem is run once per process for each device, dtype and variant, and waits for the device. If it
    fails, one warning says so.

    Args:
        tensor (`torch.Tensor`):
            The input, of which device and dtype count.
        agrees (`Callable`):
            Runs the small problem on both paths: called as `agrees(torch_path, device, dtype, *variant)`, returns
            whether the results are the same.
        torch_path (`Callable`):
            The function that does the same by torch's operations.
        variant (`Any`):
            What else decides which kernels run.
    """
    return can_launch(tensor) and _have_agreed(agrees, torch_path, tensor.device, tensor.dtype, *variant)


@cache
def _have_agreed(agrees, torch_path, device, dtype, *variant):
    try:
        if agrees(torch_path, device, dtype, *variant):
            return True
        reason = "on a small problem they gave another result than torch"
    except Exception as error:  # no C compiler, a kernel that does not compile or launch
        reason = f"{type(error).__name__}: {error}"
    logger.warning_once(
        f"FSR selects visual tokens on {device} by torch's operations, which give the same tokens but are slower. It "
        f"does not use the Triton kernels of `{agrees.__module__.rpartition('.')[2]}`: {reason}."
    )
    return False
