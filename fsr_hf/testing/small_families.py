"""
A small model of each family, exported with FSR, made without a download.

Weights are random and few. What FSR works on has the published models' own layout: pictures of 336 x 336 pixels,
tiles, 2 x 2 merges, frames of 27 x 27 patches pooled to 14 x 14, newlines.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from ..configuration.configuration_fsr_llava_video import FSRLlavaVideoConfig
from ..hub.export import export
from ..hub.original import CHAT_TEMPLATE as LLAVA_VIDEO_CHAT_TEMPLATE
from ..modeling.modeling_fsr_llava_video import FSRLlavaVideoForConditionalGeneration
from ..processing.processing_fsr_llava_video import FSRLlavaVideoProcessor
from .chat_templates import LLAVA_TEMPLATE, QWEN_VL_TEMPLATE
from .small_llava import TINY, answer_in_words, save_small_clip, save_small_llava
from .small_tokenizers import word_tokenizer


__all__ = ["SMALL_FAMILIES", "export_small_model"]

_HALF = [0.5, 0.5, 0.5]  # mean and deviation of pixels, in SigLIP and Qwen3-VL
_QWEN_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2}


def export_small_model(model_type: str, folder: str | os.PathLike) -> Path:
    """
    Make a small model of a family, and export it.

    Args:
        model_type (`str`):
            A key of `SMALL_FAMILIES`.
        folder (`str` or `os.PathLike`):
            Is made, with the checkpoint that is exported in `stock`, CLIP in `clip`, and the result in `fsr`.

    Returns:
        `Path`: the exported folder.
    """
    folder = Path(folder)
    torch.manual_seed(0)
    SMALL_FAMILIES[model_type](folder / "stock", folder / "clip")
    text_encoder = folder / "clip" if (folder / "clip").exists() else None
    return export(folder / "stock", folder / "fsr", text_encoder=text_encoder, progress=False)


def _save_llava(folder: Path, clip_folder: Path) -> None:
    save_small_llava(folder, clip_folder, TINY)


def _save_llava_next(folder: Path, clip_folder: Path) -> None:
    tokenizer = word_tokenizer(image_token="<image>")
    clip, _ = save_small_clip(clip_folder, TINY)
    config = LlavaNextConfig(
        vision_config=clip.config.vision_config,
        text_config={"model_type": "llama", **_text_config(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaNextForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 336},
            crop_size={"height": 336, "width": 336},
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    _save(model, processor, folder)


def _save_qwen2_5_vl(folder: Path, clip_folder: Path) -> None:
    tokenizer, ids = _qwen_tokenizer()
    text_config = _text_config(tokenizer)
    config = Qwen2_5_VLConfig(
        vision_config={
            **_QWEN_VISION,
            "depth": 3,
            "fullatt_block_indexes": [2],
            "out_hidden_size": text_config["hidden_size"],
            "tokens_per_second": 2,
        },
        text_config={
            "model_type": "qwen2_5_vl_text",
            **text_config,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        **ids,
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=True),
        chat_template=QWEN_VL_TEMPLATE,
    )
    _save(Qwen2_5_VLForConditionalGeneration(config), processor, folder)


def _save_qwen3_vl(folder: Path, clip_folder: Path) -> None:
    tokenizer, ids = _qwen_tokenizer()
    text_config = _text_config(tokenizer)
    config = Qwen3VLConfig(
        vision_config={
            **_QWEN_VISION,
            "depth": 4,
            "deepstack_visual_indexes": [0, 1],
            "out_hidden_size": text_config["hidden_size"],
        },
        text_config={
            "model_type": "qwen3_vl_text",
            **text_config,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
        },
        **ids,
    )
    pixels = {"patch_size": 16, "image_mean": _HALF, "image_std": _HALF}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            **pixels, size={"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(do_sample_frames=False, cap_pixels_per_frame=True),
        chat_template=QWEN_VL_TEMPLATE,
    )
    _save(Qwen3VLForConditionalGeneration(config), processor, folder)


def _qwen_tokenizer() -> tuple[Any, dict[str, int]]:
    """A tokenizer with the special tokens of Qwen-VL, and the ids of those that the config names."""
    names = ("image_pad", "video_pad", "vision_start", "vision_end", "im_start", "im_end")
    tokens = {name: f"<|{name}|>" for name in names}
    tokenizer = word_tokenizer(
        image_token=tokens["image_pad"],
        video_token=tokens["video_pad"],
        **{f"{name}_token": tokens[name] for name in names[2:]},
    )
    fields = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return tokenizer, {field: tokenizer.convert_tokens_to_ids(tokens[name]) for field, name in zip(fields, names)}


def _save_llava_video(folder: Path, clip_folder: Path) -> None:
    tokenizer = word_tokenizer(image_token="<image>", video_token="<video>")
    config = FSRLlavaVideoConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **_text_config(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
    )
    pixels = {"size": {"height": 384, "width": 384}, "image_mean": _HALF, "image_std": _HALF}
    processor = FSRLlavaVideoProcessor(
        LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(**pixels, num_frames=8),
        chat_template=LLAVA_VIDEO_CHAT_TEMPLATE,
    )
    _save(FSRLlavaVideoForConditionalGeneration(config), processor, folder)


def _text_config(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # vLLM has no smaller heads on a CPU
        "num_key_value_heads": 1,
        "max_position_embeddings": 16384,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
    }


def _save(model: Any, processor: Any, folder: Path) -> None:
    answer_in_words(model, processor.tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# How the checkpoint to export is made, by the `model_type` that it gets.
SMALL_FAMILIES: dict[str, Callable[[Path, Path], None]] = {
    "fsr_llava": _save_llava,
    "fsr_llava_next": _save_llava_next,
    "fsr_qwen2_5_vl": _save_qwen2_5_vl,
    "fsr_qwen3_vl": _save_qwen3_vl,
    "fsr_llava_video": _save_llava_video,
}
