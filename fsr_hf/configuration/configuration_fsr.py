"""The hyper-parameters of Focus-Scan-Refine, and how a family's config carries them."""

import copy
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from transformers import CLIPTextConfig, PreTrainedConfig, __version__


__all__ = [
    "CLIP_TOWER_SETTINGS",
    "SELECTION_FIELDS",
    "FSRConfig",
    "FSRConfigMixin",
    "check_fsr_value",
    "register_generative_class",
]

# The fields that are arguments of `select_visual_tokens`.
SELECTION_FIELDS = ("alpha", "beta", "rho", "focus_limit", "uniform_scan", "kappa", "focus_mass")
# `fsr_settings` of families with a CLIP tower, measured in docs/quality.md.
CLIP_TOWER_SETTINGS = {"focus_limit": 0.25, "uniform_scan": 1.0, "kappa": None}


def register_generative_class(model_type: str, class_name: str) -> None:
    """Add a family to the table in which `transformers serve` and the any-to-any pipeline look up a `model_type`."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as class_names
    except ImportError:  # not public: a release without the table must still load the folder
        return
    class_names[model_type] = class_name


def _is_number(value: Any, kind: type = float) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        return False
    return -math.inf < value < math.inf  # False for NaN; `math.isfinite` cannot be traced by torch.compile


def _one_of(*allowed: Any):
    return lambda value: any(value is a or (isinstance(a, str) and value == a) for a in allowed)


# What each field may hold: (test, words for the error).
_RULES = {
    "enabled": (_one_of(True, False), "True or False"),
    "num_visual_tokens": (lambda v: v is None or (_is_number(v, int) and v >= 1), "an int >= 1, or None"),
    "retention_ratio": (lambda v: v is None or (_is_number(v) and 0 < v <= 1), "a number in (0, 1], or None"),
    "alpha": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "beta": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "rho": (lambda v: _is_number(v) and 0 < v <= 1, "a number in (0, 1]"),
    "focus_limit": (lambda v: _is_number(v) and 0 < v <= 1, "a number in (0, 1]"),
    "uniform_scan": (lambda v: _is_number(v) and v >= 0, "a number >= 0"),
    "kappa": (lambda v: v is None or (_is_number(v) and v >= 0), "a number >= 0, or None"),
    "focus_mass": (_one_of("all", "budget"), '"all" or "budget"'),
    "relevance": (_one_of("clip_values", "clip", "none", None), '"clip_values", "clip", "none" or None'),
    "invert_relevance": (_one_of(True, False), "True or False"),
    "text_encoder_config": (
        lambda v: isinstance(v, (dict, PreTrainedConfig, type(None))),
        "a CLIPTextConfig, its dict, or None",
    ),
    "pool": (_one_of("view", "item", None), '"view", "item", or None for the family\'s default'),
    "positions": (_one_of("compact", "original", None), '"compact", "original", or None for the family\'s default'),
}
# Fields of older configs, and what is in their place.
_REMOVED = {"newline": "newline tokens of a pruned image or video are always dropped, as its default did"}
# Fields of the text tower, less those that every config has: what `to_dict` writes of it.
_TEXT_FIELDS = {field.name for field in fields(CLIPTextConfig)} - {field.name for field in fields(PreTrainedConfig)}
_BUDGETS = ("num_visual_tokens", "retention_ratio")


def check_fsr_value(name: str, value: Any) -> None:
    """`ValueError` if `value` is not allowed for the field `name` of [`FSRConfig`], with what is."""
    is_allowed, allowed = _RULES[name]
    if not is_allowed(value):
        raise ValueError(f"`{name}={value!r}` is not allowed: `{name}` must be {allowed}.")


def _check_budgets(tokens: Any, ratio: Any) -> None:
    if tokens is not None and ratio is not None:
        raise ValueError(
            f"`num_visual_tokens={tokens}` and `retention_ratio={ratio}` are both set, but a budget is either a "
            "number of tokens or a share of them: set one and leave the other None."
        )


def _list(values: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in sorted(values.items()))


def _refuse_unknown(values: dict[str, Any]) -> None:
    for name in values.keys() & _REMOVED.keys():
        raise ValueError(
            f"FSRConfig has this field no more: {_list({name: values[name]})}: {_REMOVED[name]}. Take it out of "
            "`fsr_config`."
        )
    if values:
        raise ValueError(f"FSRConfig has no field {_list(values)}. Its fields are {', '.join(_RULES)}.")


def _make_text_config(values: dict[str, Any]) -> CLIPTextConfig:
    """A [`CLIPTextConfig`], which by itself would keep an unknown key and never read it."""
    known = {*CLIPTextConfig().to_dict(), "_commit_hash", "attn_implementation", "name_or_path", "torch_dtype"}
    if unknown := {name: value for name, value in values.items() if name not in known}:
        raise ValueError(
            f"`text_encoder_config` has no field {_list(unknown)}. Its fields are those of CLIPTextConfig: "
            f"{', '.join(sorted(_TEXT_FIELDS))}."
        )
    return CLIPTextConfig(**values)


class FSRConfig(PreTrainedConfig):
    r"""
    The hyper-parameters of Focus-Scan-Refine visual-token pruning ([arXiv
    2602.05809](https://arxiv.org/abs/2602.05809)). A model's config holds one as `config.fsr_config`. Every field is
    checked when it is set.

    Args:
        enabled (`bool`, *optional*, defaults to `True`):
            Whether to prune. With `False` the model is bit for bit the stock model.
        num_visual_tokens (`int`, *optional*):
            Budget: how many visual tokens of each image (or video) the language model sees. An image with no more
            tokens than that is not pruned. Setting it clears `retention_ratio`.
        retention_ratio (`float`, *optional*):
            Budget as a share of the tokens of each image (or video), in (0, 1]: `max(1, round(ratio * tokens))`.
            Setting it clears `num_visual_tokens`. With both budgets `None` the family's default holds.
        alpha (`float`, *optional*, defaults to 3.0):
            Exponent of relevance in the priority of a token (Eq. 3).
        beta (`float`, *optional*, defaults to 1.0):
            Exponent of saliency in the priority of a token (Eq. 3).
        rho (`float`, *optional*, defaults to 0.9):
            Share of the priority mass that the Focus tokens must hold, in (0, 1] (Eq. 4).
        focus_limit (`float`, *optional*, defaults to 0.5):
            Largest share of the budget that the Focus tokens fill, in (0, 1]. The paper does not say what happens when
            Eq. 4 asks for more tokens than that. With 1.0 flat scores let Focus fill the budget, and the selection is
            the top tokens by priority; a half leaves Scan at least as many tokens as Focus takes.
        uniform_scan (`float`, *optional*, defaults to 0.0):
            How many tokens Scan spreads evenly over the image before Eq. 5 adds the others, as a multiple of the
            budget times its share of all tokens: with 1.0, of 64 tokens out of 576 seven, of 192 sixty-four. 0 is
            Eq. 5 alone, the paper's formula.
        kappa (`float`, *optional*, defaults to 1.0):
            How many dropped tokens are merged, as a multiple of the number of Scan tokens (Refine). `None`: all.
        focus_mass (`str`, *optional*, defaults to `"all"`):
            The mass that `rho` refers to: of all tokens (`"all"`, the paper), or of the `num_visual_tokens` tokens of
            highest priority (`"budget"`, which leaves room for Scan whenever `rho < 1`).
        relevance (`str`, *optional*):
            Where Eq. 2 comes from. `"clip_values"`: what a patch hands to [CLS] in the last block, against the
            question in CLIP's joint space, less the same against a text without a word, as a mean over 3 x 3 patches.
            `"clip"`: the state of a patch against the question, the paper's formula. `"none"`: no question, saliency
            alone. `None` means `"clip_values"` if there is a `text_encoder_config`.
        invert_relevance (`bool`, *optional*, defaults to `True`):
            With `relevance="clip"`, whether relevance is the negated cosine. The states of CLIP's patches score
            *lower* on the thing that the text names than on the background; `False` is the paper's literal formula.
        text_encoder_config (`CLIPTextConfig` or `dict`, *optional*):
            The CLIP text tower whose weights are in the checkpoint; `None` if there is none.
        pool (`str`, *optional*):
            Which tokens compete with each other: those of a `"view"` (a tile, a frame) or of a whole `"item"` (an
            image, a video). `None` is the family's default.
        positions (`str`, *optional*):
            Positions of the kept tokens: `"compact"` (the prompt closes up) or `"original"` (as in the full prompt).
            `None` is the family's default.

    Example:

    ```python
    >>> from fsr_hf import FSRLlavaConfig

    >>> config = FSRLlavaConfig(fsr_config={"num_visual_tokens": 64})
    >>> config.fsr_config.retention_ratio = 0.25  # clears num_visual_tokens
    ```
    """

    model_type = "fsr"
    base_config_key = "fsr_config"
    sub_configs: ClassVar[dict] = {"text_encoder_config": CLIPTextConfig}
    # The budget that holds where both are None: name and value. A family's config sets it on its own `fsr_config`.
    _family_budget = ("num_visual_tokens", None)

    enabled: bool = True
    num_visual_tokens: int | None = None
    retention_ratio: float | int | None = None
    alpha: float | int = 3.0
    beta: float | int = 1.0
    rho: float | int = 0.9
    focus_limit: float | int = 0.5
    uniform_scan: float | int = 0.0
    kappa: float | int | None = 1.0
    focus_mass: str = "all"
    relevance: str | None = None
    invert_relevance: bool = True
    text_encoder_config: Any = None  # `__setattr__` makes a CLIPTextConfig of a dict
    pool: str | None = None
    positions: str | None = None

    # The fields that somebody named; the others hold a default, in whose place a family may have another.
    _named = frozenset[str]()

    def __new__(cls, *args, **kwargs):
        config = super().__new__(cls)
        object.__setattr__(config, "_named", frozenset(kwargs))
        return config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FSRConfig) and self.to_dict() == other.to_dict()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _RULES:
            check_fsr_value(name, value)
            if self._is_built:
                object.__setattr__(self, "_named", self._named | {name})
        elif self._is_built and not name.startswith("_") and not hasattr(self, name):
            _refuse_unknown({name: value})
        if name == "text_encoder_config" and isinstance(value, dict):
            value = _make_text_config(value)
        super().__setattr__(name, value)
        # Once built, naming one budget clears the other; before that, both are compared in `__post_init__`.
        if name in _BUDGETS and self._is_built:
            other = _BUDGETS[1 - _BUDGETS.index(name)]
            if value is not None:
                super().__setattr__(other, None)
            elif getattr(self, other) is None:
                super().__setattr__(*self._family_budget)

    @property
    def _is_built(self) -> bool:
        return "_attn_implementation_internal" in self.__dict__

    def __post_init__(self, **kwargs):
        # What `PreTrainedConfig` itself reads or writes; anything else is a typo.
        known = {"_commit_hash", "_name_or_path", "name_or_path", "attn_implementation", "model_type", "torch_dtype"}
        _refuse_unknown({name: value for name, value in kwargs.items() if name not in known})
        _check_budgets(self.num_visual_tokens, self.retention_ratio)
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)

    @property
    def uses_relevance(self) -> bool:
        """`bool`: whether patches are compared with the question (`relevance` resolved)."""
        return self.relevance != "none" and (self.relevance is not None or self.text_encoder_config is not None)

    @property
    def reads_values(self) -> bool:
        """`bool`: whether it is their values that are compared, where anything is."""
        return self.relevance != "clip"

    def budget(self, num_tokens: int) -> int:
        """How many of `num_tokens` candidates of one image or video are kept, never more than there are."""
        if self.retention_ratio is not None:
            return max(1, round(self.retention_ratio * num_tokens))
        return min(self.num_visual_tokens or num_tokens, num_tokens)

    def override(self, num_visual_tokens=None, retention_ratio=None, fsr_enabled=None) -> "FSRConfig":
        """A copy for one call, whose arguments of these names win over the stored values."""
        config = copy.copy(self)
        given = {"num_visual_tokens": num_visual_tokens, "retention_ratio": retention_ratio}
        config.update({name: value for name, value in given.items() if value is not None})
        if fsr_enabled is not None:
            if fsr_enabled is not True and fsr_enabled is not False:
                raise ValueError(f"`fsr_enabled={fsr_enabled!r}` is not allowed: it must be True or False.")
            config.enabled = fsr_enabled
        return config

    def for_call(self, arguments: Mapping[str, Any]) -> "FSRConfig":
        """As [`override`], with those of the `arguments` of a call that have these names."""
        names = ("num_visual_tokens", "retention_ratio", "fsr_enabled")
        return self.override(**{name: arguments.get(name) for name in names})

    def update(self, config_dict: dict[str, Any]) -> None:
        """As the stock method; both budgets at once are an error."""
        _check_budgets(*(config_dict.get(name) for name in _BUDGETS))
        super().update(config_dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields of FSR and none that every config has; a parent's `to_dict` takes out `transformers_version`."""
        fields = {name: getattr(self, name) for name in _RULES}
        if self.text_encoder_config is not None:
            text_fields = self.text_encoder_config.to_dict()
            fields["text_encoder_config"] = {
                name: value for name, value in text_fields.items() if name in _TEXT_FIELDS or name == "model_type"
            }
        return {"model_type": self.model_type, "transformers_version": __version__, **fields}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def _refuse_outside(cls: type, values: dict[str, Any]) -> None:
    """Refuse fields of [`FSRConfig`] that are given to the model's config, which would keep and never read them."""
    if values:
        raise ValueError(
            f"{cls.__name__} has no field {_list(values)}: it belongs into `fsr_config`, as in "
            f"`fsr_config={values!r}` or `config.fsr_config.{next(iter(values))} = ...`."
        )


class FSRConfigMixin:
    """
    Gives a stock config the field `fsr_config`. A dict that is assigned changes the named fields and leaves the
    others. An [`FSRConfig`] replaces all of them but the text tower, which belongs to the weights: only a dict that
    names it as `None` takes it away.
    """

    model_type: ClassVar[str]
    _attn_implementation: Any
    # The family's defaults for the fields of FSRConfig that are None.
    fsr_defaults: ClassVar[dict[str, Any]] = {}
    # The family's own, in place of defaults of FSRConfig.
    fsr_settings: ClassVar[dict[str, Any]] = {}
    # Why patches of the family cannot be compared with the question; `None` where they can.
    no_relevance_reason: ClassVar[str | None] = None
    # What is no prediction to Trainer, so that it gathers logits alone, whether a batch was pruned or not.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("cache", "past_key_values", "rope_deltas"),
        *("image_outputs", "video_outputs", "image_hidden_states", "video_hidden_states"),
    ]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "fsr_config":
            value = self._complete_fsr_config(value)
        elif name in _RULES:
            _refuse_outside(type(self), {name: value})
        elif name == "model_type":  # of a stock config that this one is made from
            value = type(self).model_type
        super().__setattr__(name, value)

    def _complete_fsr_config(self, value):
        current = self.__dict__.get("fsr_config")
        if value is None or isinstance(value, dict):
            named, fields = value or {}, dict(self.fsr_settings) if current is None else current.to_dict()
            if any(named.get(name) is not None for name in _BUDGETS):
                fields.update(dict.fromkeys(_BUDGETS))
            config = FSRConfig(**{**fields, **named})
        elif isinstance(value, PreTrainedConfig) and value.model_type == FSRConfig.model_type:
            config = copy.deepcopy(value)
            config.update({name: own for name, own in self.fsr_settings.items() if name not in config._named})
            if config.text_encoder_config is None and current is not None:
                config.text_encoder_config = current.text_encoder_config
        else:
            raise ValueError(
                f"`fsr_config={value!r}` is not allowed: it must be an FSRConfig, a dict of its fields, or None."
            )
        has_budget = any(getattr(config, name) is not None for name in _BUDGETS)
        for name, default in self.fsr_defaults.items():
            if getattr(config, name) is None and not (name in _BUDGETS and has_budget):
                setattr(config, name, default)
            if name in _BUDGETS:
                config._family_budget = (name, default)
        if self.__dict__.get("_attn_implementation_internal") is not None:
            config._attn_implementation = self._attn_implementation
        if self.no_relevance_reason and (config.uses_relevance or config.text_encoder_config is not None):
            raise ValueError(
                '`fsr_config.relevance="clip"` (or `"clip_values"`) and `fsr_config.text_encoder_config` are not '
                f"supported: {self.no_relevance_reason} FSR ranks them by saliency alone here: leave `relevance` at "
                '"none".'
            )
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        _refuse_outside(cls, {name: value for name, value in kwargs.items() if name in _RULES})
        # The stock merge would leave the stored budget beside the new one.
        fsr_config = kwargs.pop("fsr_config", None)
        result = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        if fsr_config is not None:
            config = result[0] if isinstance(result, tuple) else result
            config.fsr_config = fsr_config
        return result
