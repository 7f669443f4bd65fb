"""Weights that are elsewhere until their module is called: accelerate's offloading and the shards of FSDP2."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


__all__ = ["is_sharded", "offloaded_params_loaded", "sharded_params_gathered"]


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


@contextmanager
def sharded_params_gathered(*modules: Any) -> Iterator[None]:
    """
    The parameters of modules that FSDP2 shards (`fully_shard`) are whole in this context, in which parts of the
    modules are called and the modules themselves are not. None of them may be in the middle of its own `forward()`:
    the context ends with shards.
    """
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "unshard"):
                module.unshard()
                stack.callback(module.reshard)
        yield


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards a part of `module`: then all processes have to call the same modules in the same order."""
    return any(hasattr(part, "unshard") for part in module.modules())
