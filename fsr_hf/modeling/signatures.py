"""The arguments that FSR adds to the stock methods: their names, docs and signatures, and misspelt ones."""

import inspect
from difflib import get_close_matches
from functools import cache, wraps
from typing import Any

from ..configuration.configuration_fsr import SELECTION_FIELDS
from .guards import name_cache


__all__ = ["FSR_ARGUMENTS", "adopt_signature", "check_arguments"]

# What calls of the models take beside the arguments of the stock classes.
FSR_ARGUMENTS = {
    "query_input_ids": "torch.LongTensor | None",
    "query_attention_mask": "torch.LongTensor | None",
    "num_visual_tokens": "int | None",
    "retention_ratio": "float | None",
    "fsr_enabled": "bool | None",
}
_FSR_DOCS = """
        query_input_ids (`torch.LongTensor` of shape `(batch, chunks * 77)`, *optional*):
            The question in ids of CLIP's tokenizer, made by the model's processor.
        query_attention_mask (`torch.LongTensor` of shape `(batch, chunks * 77)`, *optional*):
            Its mask. Chunks whose mask is 0 are skipped.
        num_visual_tokens (`int`, *optional*):
            Budget of each image or video for this call, in place of the config's.
        retention_ratio (`float`, *optional*):
            The same as a share of its tokens. Not both.
        fsr_enabled (`bool`, *optional*):
            Whether to prune in this call, in place of the config's `enabled`.
"""
# Fields of the config that a call cannot change, and names near to those that it can.
_NO_ARGUMENTS = (*SELECTION_FIELDS, "relevance", "invert_relevance", "pool")
_NEAR = {"retention": "retention_ratio", "budget": "num_visual_tokens", "enabled": "fsr_enabled"}


def adopt_signature(cls: type, name: str, intro: str, own: dict[str, str], docs: str = "") -> None:
    """
    Give `cls` its own copy of the mixin's method `name`, with the signature of the stock class: what reads
    signatures (Trainer's choice of columns, the checks of `generate`, `help`) finds the stock arguments and FSR's,
    `own` with their types. `intro` and `docs` are the docstring, less the docs of FSR's common arguments. Nothing
    happens where no stock class stands behind the mixin.
    """
    method = getattr(cls, name)
    stock_class = next((c for c in cls.__mro__ if c.__module__.startswith("transformers.") and name in vars(c)), None)
    if stock_class is None:
        return
    stock = inspect.signature(getattr(stock_class, name))
    names = [p.name for p in stock.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    @wraps(method)
    def wrapper(self, *args, **kwargs):
        if len(args) > len(names):
            raise TypeError(f"{cls.__name__}.{name}() takes {len(names)} positional arguments, but got {len(args)}.")
        return method(self, **dict(zip(names, args)), **name_cache(kwargs))

    *parameters, var_keyword = stock.parameters.values()
    parameters += [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for key, kind in own.items()
        if key not in stock.parameters
    ]
    wrapper.__signature__ = stock.replace(parameters=[*parameters, var_keyword])  # type: ignore[attr-defined]
    rest = f"All other arguments are those of [`{stock_class.__name__}.{name}`]."
    wrapper.__doc__ = f"{intro}\n\n    Args:{_FSR_DOCS}{docs}\n    {rest}"
    wrapper.__qualname__ = f"{cls.__name__}.{name}"
    setattr(cls, name, wrapper)


@cache
def _meant(name: str) -> str | None:
    """The argument of FSR that a misspelt `name` stands for. A generation config has some 80 names in each call."""
    return _NEAR.get(name) or next(iter(get_close_matches(name, FSR_ARGUMENTS, n=1, cutoff=0.8)), None)


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Reject misspelt FSR arguments (the stock `forward` swallows them) and settings that a call cannot change."""
    for name in kwargs.keys() - FSR_ARGUMENTS.keys():
        if name in _NO_ARGUMENTS:
            raise ValueError(f"`{name}` is no argument of a call: set `model.config.fsr_config.{name}`.")
        if meant := _meant(name):
            raise ValueError(f"`{name}` is no argument of the model. Did you mean `{meant}`?")
