"""What a request may say about FSR, in vLLM's `mm_processor_kwargs`."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any


__all__ = ["SETTINGS", "budget_settings", "without_settings"]

# Under the names of the model's `generate()` and of the processor.
SETTINGS = frozenset({"num_visual_tokens", "retention_ratio", "fsr_enabled", "query"})


def without_settings(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are the stock processor's."""
    return {name: value for name, value in kwargs.items() if name not in SETTINGS}


def budget_settings(fsr: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    The budget of a request, whoever set it: one entry, the same for requests that mean the same.

    Args:
        fsr (`FSRConfig`):
            The server's settings.
        kwargs (`dict`):
            The `mm_processor_kwargs` of the request.

    Returns:
        `dict` with one of `num_visual_tokens`, `retention_ratio` and `fsr_enabled=False`.

    Raises:
        `ValueError`: for a budget that is not allowed, for two, and for a misspelt name.
    """
    for name in kwargs.keys() - SETTINGS:
        for meant in get_close_matches(name, SETTINGS, n=1, cutoff=0.75):
            raise ValueError(f"`mm_processor_kwargs` has `{name}`, which nothing reads. Did you mean `{meant}`?")
    query = kwargs.get("query")
    if query is not None and not isinstance(query, str):
        raise ValueError(f"`query={query!r}` is not allowed: it must be one text, which holds for the whole request.")
    fsr = fsr.for_call(kwargs)
    if not fsr.enabled:
        return {"fsr_enabled": False}
    if fsr.retention_ratio is not None:
        return {"retention_ratio": fsr.retention_ratio}
    return {"num_visual_tokens": fsr.num_visual_tokens}
