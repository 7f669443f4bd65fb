"""
Invariants: what reaches the language model is what was compressed, whatever version of transformers runs the code.

A Hub folder keeps this code as it was, and transformers moves on. So nothing is taken for granted between the call of
`generate()` and the language model: each step compares numbers that the host knows already, and a difference raises.
"""

import inspect
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationMixin
from transformers import __version__ as transformers_version
from transformers.utils import logging


__all__ = [
    "VERSION",
    "Draft",
    "PlacementCounter",
    "PromptGuard",
    "active_guard",
    "cache_length",
    "check_outputs",
    "count_placed",
    "get_cache",
    "guarded",
    "is_filled",
    "is_unpruned",
    "name_cache",
    "unpruned",
    "warn_if_untested",
]

logger = logging.get_logger(__name__)

# The newest transformers that this code was tested on. `CHANGELOG.md` has the range of each release.
TESTED_UP_TO = (5, 24)
VERSION = tuple(map(int, re.findall(r"\d+", transformers_version)[:2]))

# What the installed version calls the cache: 5.24 renamed it.
_CACHE_NAMES = ("cache", "past_key_values")
_NAMES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_CACHE_NAME = next((name for name in _CACHE_NAMES if name in _NAMES), _CACHE_NAMES[VERSION < (5, 24)])
_UNPRUNED = "unpruned"
_calls = threading.local()


def warn_if_untested() -> None:
    """One warning if transformers is newer than what this code was tested on."""
    if VERSION > TESTED_UP_TO and os.environ.get("FSR_SILENCE_VERSION_WARNING") != "1":
        logger.warning_once(
            f"FSR was tested with transformers up to {TESTED_UP_TO[0]}.{TESTED_UP_TO[1]}; this is "
            f"{transformers_version}. Check it with `fsr-hf verify --run FOLDER`. FSR_SILENCE_VERSION_WARNING=1 ends "
            "this warning."
        )


def name_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments with the cache under the name that the installed version has for it."""
    for name in _CACHE_NAMES:
        if name != _CACHE_NAME and name in kwargs and _CACHE_NAME not in kwargs:
            kwargs[_CACHE_NAME] = kwargs.pop(name)
    return kwargs


def get_cache(values: Any) -> Any:
    """The cache in an output, or in keyword arguments under either of its names."""
    cache = values.get(_CACHE_NAME)
    if cache is None and type(values) is dict:  # outputs warn of the other name
        cache = next((values[name] for name in _CACHE_NAMES if values.get(name) is not None), None)
    return cache


def cache_length(cache: Any) -> int | None:
    """Entries of a cache; `None` if only the device knows, as for a static cache on a GPU."""
    length = 0 if cache is None else cache.get_seq_length()
    if isinstance(length, torch.Tensor):
        return int(length) if length.device.type == "cpu" else None
    return int(length)


def is_filled(cache: Any) -> bool:
    """Whether a cache holds anything. Waits for the device if only that knows."""
    return cache is not None and int(cache.get_seq_length()) > 0


class PromptGuard:
    """
    The numbers of one compressed prompt, and how much of it the model has been fed.

    Args:
        model (`torch.nn.Module`):
            The inner model whose calls are checked.
        length (`int`):
            Columns of the compressed prompt, those in the cache among them.
        past_length (`int`):
            Columns that the cache holds already.
        num_features (`int`):
            Visual tokens that fill placeholders of the prompt.
        is_padded (`bool`):
            Whether the mask has a 0, so that it must not get lost.
    """

    def __init__(self, model: torch.nn.Module, length: int, past_length: int, num_features: int, is_padded: bool):
        self.model = model
        self.length = length
        self.num_features = num_features
        self.is_padded = is_padded
        self.past_length = past_length
        self.columns_fed = past_length
        self.features_fed = 0
        self.is_started = False
        self.cache: Any = None

    def check_inputs(self, num_new: int, num_features: int, kwargs: dict[str, Any]) -> None:
        """Before a call of the model with `num_new` columns and `num_features` visual tokens."""
        cache, mask = get_cache(kwargs), kwargs.get("attention_mask")
        if self.is_started and (cache is None or cache is not self.cache):
            # Another prompt, such as that of `guidance_scale`; or a step without a cache, which has the prompt again.
            if cache is None and self.cache is None and kwargs.get("position_ids") is not None:
                self._check_features(num_features)
            return
        cached = cache_length(cache)
        if not self.is_started and cached not in (None, self.past_length):
            _fail("the cache before the prompt", f"{self.past_length} entries", cached)
        self.is_started, self.cache = True, cache
        if kwargs.get("position_ids") is None:
            _fail("`position_ids`", "the positions of the compressed prompt", None)
        if mask is None and self.is_padded:
            _fail("`attention_mask`", "the mask of a padded prompt", None)
        width = None if cached is None else cached + num_new
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and width not in (None, mask.shape[1]):
            _fail("the width of `attention_mask`", f"{width}, cache and new tokens", mask.shape[1])
        self.columns_fed += num_new
        self.features_fed += num_features
        if self.columns_fed >= self.length:
            self.check_end()

    def _check_features(self, found: int) -> None:
        if found < self.num_features:
            _fail("the visual tokens that the model was fed", self.num_features, found)

    def check_end(self) -> None:
        """After the prompt: the model has been fed all of it."""
        if self.columns_fed < self.length:
            _fail("the prompt that the model was fed", f"{self.length} columns", self.columns_fed)
        self._check_features(self.features_fed)


def check_outputs(placed: int, num_features: int, cached: int | None, num_new: int, outputs: Any) -> None:
    """After a call of the model: its features filled placeholders, and its cache has grown by the new columns."""
    if placed != num_features:
        _fail("the visual tokens that filled placeholders", num_features, placed)
    after = cache_length(get_cache(outputs))
    if get_cache(outputs) is not None and None not in (cached, after) and after != cached + num_new:  # type: ignore
        _fail("the cache after the call", f"{cached} + {num_new} entries", after)


def _fail(what: str, expected: Any, found: Any) -> None:
    raise RuntimeError(
        f"FSR stops here, since the answer would be wrong: {what} should be {expected}, but is {found}. This code was "
        f"tested with transformers up to {TESTED_UP_TO[0]}.{TESTED_UP_TO[1]}, and this is {transformers_version}. "
        "Use a tested version or a newer release of fsr-hf, or pass `fsr_enabled=False`, and please report it."
    )


def active_guard() -> Any:
    """The [`PromptGuard`] of the `generate()` that this thread is in; `None` outside, and in a trace of the code."""
    return None if torch.compiler.is_compiling() else getattr(_calls, "guard", None)


@contextmanager
def guarded(guard: Any) -> Iterator[None]:
    """Calls of the model in this context, in this thread, run the prompt of `guard`."""
    before = getattr(_calls, "guard", None)
    _calls.guard = guard
    try:
        yield
    finally:
        _calls.guard = before


class Draft:
    """
    An FSR model drafts for another model. transformers hands an assistant the visual tokens of the prompt and drops
    them before its first step; without them its candidates are poor.

    Args:
        mm_encoder_outputs (`dict`, *optional*):
            The visual tokens.
    """

    def __init__(self, mm_encoder_outputs: dict | None):
        self.mm_encoder_outputs = mm_encoder_outputs

    def take(self, hidden_size: int) -> dict | None:
        """The visual tokens, once, if they are as wide as the embeddings of the model that drafts."""
        outputs, self.mm_encoder_outputs = self.mm_encoder_outputs, None
        fits = outputs and all(output.pooler_output[0].shape[-1] == hidden_size for output in outputs.values())
        return outputs if fits else None


def unpruned():
    """A context in which prompts with pixels run as in the stock model: it was decided that nothing is pruned."""
    return guarded(_UNPRUNED)


def is_unpruned(guard: Any) -> bool:
    """Whether `guard` stands for a context of [`unpruned`]."""
    return guard == _UNPRUNED


class PlacementCounter:
    """Counts the visual tokens that find their placeholders in one call of the model."""

    def __enter__(self) -> "PlacementCounter":
        self.before, self.placed = getattr(_calls, "placement", None), 0
        _calls.placement = self
        return self

    def __exit__(self, *_) -> None:
        _calls.placement = self.before


def count_placed(*features: Any) -> None:
    """Note that these features, of shape `(..., hidden_size)` or `None`, fill placeholders."""
    counter = getattr(_calls, "placement", None)
    if counter is not None:
        counter.placed += sum(part.shape[:-1].numel() for part in features if isinstance(part, torch.Tensor))
