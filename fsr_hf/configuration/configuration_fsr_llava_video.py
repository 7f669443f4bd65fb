"""Configuration of LLaVA-Video with FSR."""

import re
from typing import Any, ClassVar, Literal

from transformers import LlavaOnevisionConfig, PreTrainedConfig

from .configuration_fsr import FSRConfig, FSRConfigMixin
from .remote_code import RemoteCodeMixin


__all__ = ["FSRLlavaVideoConfig", "convert_original_config", "is_original_config"]

# The towers that original checkpoints name, less the last block, which nothing reads.
_TOWERS: dict[str, dict[str, Any]] = {
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }
}
# Of the language model, as Qwen2Config calls them.
_TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "use_cache",
    ),
    *("rope_theta", "rope_scaling", "use_sliding_window", "sliding_window", "max_window_layers", "attention_dropout"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
# What an original config may say of parts that are built in one way here.
_FIXED = {
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_stride": 2,
    "add_faster_video": False,
}


class FSRLlavaVideoConfig(RemoteCodeMixin, FSRConfigMixin, LlavaOnevisionConfig):
    r"""
    [`LlavaOnevisionConfig`] with an [`FSRConfig`] and the video tokens of LLaVA-Video: the patches of a frame are
    pooled to half of their rows and columns, and every row of every frame ends with a newline. By default a video, or
    an image, keeps a fifth of its tokens.

    It also reads the `config.json` of an original checkpoint, such as `lmms-lab/LLaVA-Video-7B-Qwen2`.

    Args:
        spatial_pool_mode (`str`, *optional*, defaults to `"bilinear"`):
            How frames are pooled. For 27 x 27 patches: `"bilinear"`, to 14 x 14, or `"average"`, to 13 x 13.
        fsr_config (`FSRConfig` or `dict`, *optional*):
            The hyper-parameters of the pruning. There is no relevance: the text side of SigLIP is no part of it. All
            other arguments are those of [`LlavaOnevisionConfig`].

    Example:

    ```python
    >>> from fsr_hf import FSRLlavaVideoConfig, FSRLlavaVideoForConditionalGeneration

    >>> config = FSRLlavaVideoConfig(fsr_config={"retention_ratio": 0.3})
    >>> model = FSRLlavaVideoForConditionalGeneration(config)
    ```
    """

    model_type = "fsr_llava_video"
    sub_configs: ClassVar[dict] = {**LlavaOnevisionConfig.sub_configs, "fsr_config": FSRConfig}
    fsr_defaults: ClassVar[dict] = {
        "retention_ratio": 0.2,
        "relevance": "none",
        "pool": "item",
        "positions": "compact",
    }

    spatial_pool_mode: Literal["bilinear", "average"] = "bilinear"
    no_relevance_reason: ClassVar[str | None] = (
        "no CLIP shares a space with the patches of a SigLIP tower, and SigLIP's own text "
        "side is not part of the model."
    )

    fsr_config: dict | PreTrainedConfig | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "spatial_pool_mode" and value not in ("bilinear", "average"):
            raise ValueError(f'`spatial_pool_mode={value!r}` is not allowed: it must be "bilinear" or "average".')
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if is_original_config(config_dict):
            config_dict = convert_original_config(config_dict)
        return super().from_dict(config_dict, **kwargs)


def is_original_config(config: dict[str, Any]) -> bool:
    """Whether this is the `config.json` of a checkpoint of LLaVA-Video's own code."""
    return "mm_vision_tower" in config and "LlavaQwenForCausalLM" in (config.get("architectures") or ())


def convert_original_config(config: dict[str, Any]) -> dict[str, Any]:
    """
    The fields of [`FSRLlavaVideoConfig`] from the `config.json` of an original checkpoint.

    That file describes the vision tower by its name alone; a field `vision_config` takes precedence. The ids of its
    placeholders are of no use, since its code puts them into no prompt: they become those of [`LlavaOnevisionConfig`].

    Raises:
        `ValueError`: for a tower, a newline layout or another part that this class does not have.
    """
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"`{name}={config[name]!r}` of the original config is not supported: this class has {value!r}."
            )
    vision_config = config.get("vision_config") or _TOWERS.get(config["mm_vision_tower"])
    if vision_config is None:
        raise ValueError(
            f"`mm_vision_tower={config['mm_vision_tower']!r}` of the original config is not known; known are "
            f"{', '.join(_TOWERS)}. Put the fields of another SigLIP tower into the config as `vision_config`."
        )
    aspect_ratio = config.get("image_aspect_ratio", "anyres_max_9")
    if not re.fullmatch(r"anyres_max_\d+", aspect_ratio):
        raise ValueError(
            f"`image_aspect_ratio={aspect_ratio!r}` of the original config is not supported, only anyres_max_N is."
        )
    converted = {
        "architectures": ["FSRLlavaVideoForConditionalGeneration"],
        "model_type": FSRLlavaVideoConfig.model_type,
        "vision_config": vision_config,
        "text_config": {"model_type": "qwen2", **{name: config[name] for name in _TEXT_FIELDS if name in config}},
        "vision_aspect_ratio": aspect_ratio,
        "spatial_pool_mode": config.get("mm_spatial_pool_mode", "bilinear"),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }
    pinpoints = config.get("image_grid_pinpoints")
    if isinstance(pinpoints, str):  # "(1x1),...,(6x6)": rows and columns of tiles, from the first to the last
        (top, left), *_, (bottom, right) = [map(int, pair) for pair in re.findall(r"(\d+)\s*x\s*(\d+)", pinpoints)]
        side = vision_config["image_size"]
        rows, columns = range(top, bottom + 1), range(left, right + 1)
        pinpoints = [[row * side, column * side] for row in rows for column in columns]
    if pinpoints is not None:
        converted["image_grid_pinpoints"] = [list(point) for point in pinpoints]
    if (dtype := config.get("dtype", config.get("torch_dtype"))) is not None:
        converted["dtype"] = dtype
    return converted
