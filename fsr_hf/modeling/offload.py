"""Weights that accelerate keeps elsewhere until their module is called."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


__all__ = ["offloaded_params_loaded"]


@contextmanager
def offloaded_params_loaded(module: nn.Module) -> Iterator[None]:
    """
    The parameters that `module` holds itself, such as `image_newline`, are at hand in this context, in which a method
    reads them and the module is not called. Modules within it need no help: they are called.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
