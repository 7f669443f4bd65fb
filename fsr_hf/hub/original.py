"""Checkpoints in the layout of LLaVA-Video's own code: their config, and the processor that they come without."""

import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlavaOnevisionImageProcessor, LlavaOnevisionVideoProcessor

from ..configuration.configuration_fsr_llava_video import FSRLlavaVideoConfig
from ..processing.processing_fsr_llava_video import FSRLlavaVideoProcessor


__all__ = ["CHAT_TEMPLATE", "convert_original_config", "is_original_config", "make_processor"]

# The conversation format of Qwen2, with `<image>` and `<video>` where they stand in a message.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% for part in parts %}"
    "{% if part['type'] in ('image', 'video') %}{{ '<' + part['type'] + '>\n' }}"
    "{% elif part['type'] == 'text' and message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] }}{% endgeneration %}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

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
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    "use_cache",
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


def make_processor(folder: Path, config: Any) -> FSRLlavaVideoProcessor:
    """
    The processor of an original checkpoint: views and frames of its tower's size without cropping, pixels in [-1, 1],
    32 frames of a video file, and the conversation format of Qwen2. Its tokenizer gets two tokens more, `<image>` and
    `<video>`, whose ids go into the config.

    Args:
        folder (`Path`):
            The checkpoint, with the files of its tokenizer.
        config ([`FSRLlavaVideoConfig`]):
            The model's config.
    """
    placeholders = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=placeholders, padding_side="left")
    config.image_token_id, config.video_token_id = tokenizer.image_token_id, tokenizer.video_token_id
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"{folder} has {config.text_config.vocab_size} token embeddings, too few for the {len(tokenizer)} tokens "
            "of its tokenizer with `<image>` and `<video>`."
        )
    side = config.vision_config.image_size
    pixels = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return FSRLlavaVideoProcessor(
        LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(**pixels, num_frames=32),
        num_image_tokens=(side // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=CHAT_TEMPLATE,
        vision_aspect_ratio=config.vision_aspect_ratio,
        spatial_pool_mode=config.spatial_pool_mode,
    )
