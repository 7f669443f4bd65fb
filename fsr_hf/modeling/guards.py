"""
Invariants: what reaches the language model is what was compressed, whatever version of transformers runs the code.

A Hub folder keeps this code as it was, and transformers moves on. So nothing is taken for granted between the call of
`generate()` and the language model: each step compares numbers that the host knows already, and a difference raises.
"""

import inspect
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin
from transformers import __version__ as transformers_version
from transformers.utils import logging


__all__ = [
    "UNPRUNED",
    "VERSION",
    "Draft",
    "PromptGuard",
    "active_guard",
    "cache_length",
    "count_placed",
    "get_cache",
    "guarded",
    "is_filled",
    "name_cache",
    "run_checked",
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
# In place of a `PromptGuard`: prompts with pixels run as in the stock model, since it was decided to prune nothing.
UNPRUNED = "unpruned"
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


@dataclass
class PromptGuard:
    """The numbers of one compressed prompt, and how much of it the model has been fed."""

    model: torch.nn.Module  # the inner model whose calls are checked
    length: int  # columns of the compressed prompt, those in the cache among them
    past_length: int  # columns that the cache holds already
    num_features: int  # visual tokens that fill placeholders of the prompt
    is_padded: bool  # whether the mask has a 0, so that it must not get lost
    features_fed: int = 0
    is_started: bool = False
    cache: Any = None

    def __post_init__(self):
        self.columns_fed = self.past_length

    def check_inputs(self, num_new: int, num_features: int, kwargs: dict[str, Any]) -> None:
        """Before a call of the model with `num_new` columns and `num_features` visual tokens."""
        cache, mask = get_cache(kwargs), kwargs.get("attention_mask")
        if self.is_started and (cache is None or cache is not self.cache):
            # Another prompt, such as that of `guidance_scale`; or a step without a cache, which has the prompt again.
            if cache is None and self.cache is None and kwargs.get("position_ids") is not None:
                self._check_features(num_features)
            return
        cached = cache_length(cache)
        is_empty = self.is_started or cached in (None, self.past_length)
        _expect(is_empty, "the cache before the prompt", f"{self.past_length} entries", cached)
        self.is_started, self.cache = True, cache
        has_positions = kwargs.get("position_ids") is not None
        _expect(has_positions, "`position_ids`", "the positions of the compressed prompt", None)
        _expect(mask is not None or not self.is_padded, "`attention_mask`", "the mask of a padded prompt", None)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and cached is not None:
            width, found = cached + num_new, mask.shape[1]
            _expect(width == found, "the width of `attention_mask`", f"{width}, cache and new tokens", found)
        self.columns_fed += num_new
        self.features_fed += num_features
        if self.columns_fed >= self.length:
            self.check_end()

    def _check_features(self, found: int) -> None:
        _expect(found >= self.num_features, "the visual tokens that the model was fed", self.num_features, found)

    def check_end(self) -> None:
        """After the prompt: the model has been fed all of it."""
        is_whole = self.columns_fed >= self.length
        _expect(is_whole, "the prompt that the model was fed", f"{self.length} columns", self.columns_fed)
        self._check_features(self.features_fed)


def _expect(is_so: bool, what: str, expected: Any, found: Any) -> None:
    if not is_so:
        raise RuntimeError(
            f"FSR stops here, since the answer would be wrong: {what} should be {expected}, but is {found}. This code "
            f"was tested with transformers up to {TESTED_UP_TO[0]}.{TESTED_UP_TO[1]}, and this is "
            f"{transformers_version}. Use a tested version or a newer release of fsr-hf, or pass `fsr_enabled=False`, "
            "and please report it."
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


@dataclass
class Draft:
    """
    An FSR model drafts for another model. transformers hands an assistant the visual tokens of the prompt and drops
    them before its first step; without them its candidates are poor.
    """

    mm_encoder_outputs: dict[str, Any] | None

    def take(self, hidden_size: int) -> dict[str, Any] | None:
        """The visual tokens, once, if they are as wide as the embeddings of the model that drafts."""
        outputs, self.mm_encoder_outputs = self.mm_encoder_outputs, None
        fits = outputs and all(output.pooler_output[0].shape[-1] == hidden_size for output in outputs.values())
        return outputs if fits else None


def run_checked(forward: Callable, num_features: int, inputs: dict[str, Any]) -> Any:
    """Run the model on a prompt: its features have to fill placeholders, its cache to grow by the new columns."""
    cached, num_new = cache_length(get_cache(inputs)), inputs["input_ids"].shape[1]
    before, _calls.placed = getattr(_calls, "placed", None), 0
    try:
        outputs, placed = forward(**inputs), _calls.placed
    finally:
        _calls.placed = before
    _expect(placed == num_features, "the visual tokens that filled placeholders", num_features, placed)
    after = None if get_cache(outputs) is None else cache_length(get_cache(outputs))
    if cached is not None and after is not None:
        _expect(after == cached + num_new, "the cache after the call", f"{cached} + {num_new} entries", after)
    return outputs


def count_placed(*features: Any) -> None:
    """Note that these features, of shape `(..., hidden_size)` or `None`, fill placeholders."""
    if getattr(_calls, "placed", None) is not None:
        _calls.placed += sum(part.shape[:-1].numel() for part in features if isinstance(part, torch.Tensor))
