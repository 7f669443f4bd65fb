"""
Models of random weights to measure: the published ones in full size, and scaled ones that a CPU can run.

Times, FLOPs and memory depend on sizes, and answers on weights: there is no download, and no answer is looked at.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from fsr_hf.hub.families import FAMILIES


__all__ = ["MODELS", "Prompt", "build", "make_inputs"]

MODELS = {family.config.model_type.removeprefix("fsr_"): family for family in FAMILIES}


@dataclass(frozen=True)
class Prompt:
    """
    A row of a prompt: text with one picture or video in its middle.

    Args:
        size (`int`, *optional*, defaults to 0):
            Patches on a side of a picture for Qwen2.5-VL, frames of a video for LLaVA-Video; the others have one size:
            336 x 336 pixels, and 672 x 672 in 2 x 2 tiles.
        text (`int`, *optional*, defaults to 80):
            Tokens of text. With 80, LLaVA-1.5-7B needs the FLOPs that the paper reports.
    """

    size: int = 0
    text: int = 80


# ---------------------------------------------------------------------- sizes


def _clip(hidden_size: int, num_layers: int) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 64,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }


def _clip_text(hidden_size: int, num_layers: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 64,
        "vocab_size": 49408,
        "projection_dim": 768,
    }


def _llama(hidden_size: int, intermediate_size: int, num_layers: int) -> dict[str, Any]:
    heads = hidden_size // 128
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
    }


def _qwen2(hidden_size: int, intermediate_size: int, num_layers: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 128,
        "num_key_value_heads": kv_heads,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    }


def _qwen2_5_vl(vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return {
        "vision_config": {**vision, "out_hidden_size": text["hidden_size"], "tokens_per_second": 2},
        "text_config": {**text, "model_type": "qwen2_5_vl_text", "rope_parameters": rope},
    }


def _siglip(hidden_size: int, intermediate_size: int, num_layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }


# As llava-hf/llava-1.5-7b-hf, llava-hf/llava-v1.6-vicuna-7b-hf with the grid of the published results (2880 tokens),
# Qwen/Qwen2.5-VL-7B-Instruct and lmms-lab/LLaVA-Video-7B-Qwen2.
_GRID = {"image_grid_pinpoints": [[672, 672]]}
_VICUNA, _QWEN2 = _llama(4096, 11008, 32), _qwen2(3584, 18944, 28, 4)
_VISION_7B = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
_FULL = {
    "llava": {"vision_config": _clip(1024, 24), "text_config": _VICUNA, "text_encoder": _clip_text(768, 12)},
    "llava_next": {
        **_GRID,
        "vision_config": _clip(1024, 24),
        "text_config": _VICUNA,
        "text_encoder": _clip_text(768, 12),
    },
    "qwen2_5_vl": _qwen2_5_vl({**_VISION_7B, "fullatt_block_indexes": [7, 15, 23, 31]}, _QWEN2),
    "llava_video": {"vision_config": _siglip(1152, 4304, 26, 16), "text_config": _QWEN2},
}
# Tower, text tower and language model have the shares of the FLOPs that they have in full size.
_SMALL_QWEN2 = {**_qwen2(1024, 5376, 8, 2), "vocab_size": 32064, "bos_token_id": 1, "eos_token_id": 2}
_SCALED = {
    "llava": {
        "vision_config": _clip(320, 8),
        "text_config": _llama(1024, 2752, 16),
        "text_encoder": _clip_text(256, 3),
    },
    "llava_next": {
        **_GRID,
        "vision_config": _clip(256, 6),
        "text_config": _llama(1024, 2752, 8),
        "text_encoder": _clip_text(192, 3),
    },
    "qwen2_5_vl": _qwen2_5_vl(
        {"hidden_size": 384, "intermediate_size": 1024, "depth": 8, "num_heads": 6, "fullatt_block_indexes": [7]},
        _SMALL_QWEN2,
    ),
    "llava_video": {"vision_config": _siglip(320, 1280, 8, 5), "text_config": _SMALL_QWEN2},
}
# For tests, which look at everything but times.
_TINY_QWEN2 = {**_qwen2(128, 128, 1, 1), "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2}
_TINY_LLAMA = {**_llama(128, 128, 1), "vocab_size": 1000}
_TINY = {
    "llava": {"vision_config": _clip(64, 2), "text_config": _TINY_LLAMA, "text_encoder": _clip_text(64, 1)},
    "llava_next": {
        **_GRID,
        "vision_config": _clip(64, 2),
        "text_config": _TINY_LLAMA,
        "text_encoder": _clip_text(64, 1),
    },
    "qwen2_5_vl": _qwen2_5_vl(
        {"hidden_size": 64, "intermediate_size": 64, "depth": 2, "num_heads": 2, "fullatt_block_indexes": [1]},
        _TINY_QWEN2,
    ),
    "llava_video": {"vision_config": _siglip(64, 64, 2, 2), "text_config": _TINY_QWEN2},
}
_SIZES = {"full": _FULL, "scaled": _SCALED, "tiny": _TINY}


def build(family: str, size: str, device: str, dtype: torch.dtype):
    """
    A model of random weights, made where it will run: a full-size one never goes through the memory of the host.

    The scores of random weights are flat, so that Focus would fill all of the budget that it may. `rho` is set so low
    that Focus is one token, and Scan has the most to do that it can have.

    Args:
        family (`str`):
            A key of `MODELS`.
        size (`str`):
            `"full"`, `"scaled"` or `"tiny"`.
        device (`str`):
            Such as `"cuda"`; `"meta"` gives a model that has shapes and no values.
        dtype (`torch.dtype`):
            Of its weights.
    """
    fields = dict(_SIZES[size][family])
    settings = {"rho": 1e-9}
    if (text_encoder := fields.pop("text_encoder", None)) is not None:
        settings["text_encoder_config"] = text_encoder
    if family in ("llava", "llava_next"):
        fields["image_token_index"] = _special_ids(fields)[0]
    else:
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        fields |= dict(zip(names[: 4 if family == "qwen2_5_vl" else 2], _special_ids(fields)))
    config = MODELS[family].config(**fields, fsr_config=settings)
    torch.manual_seed(0)
    with torch.device(device):
        return MODELS[family].model._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def _special_ids(fields: dict[str, Any]) -> list[int]:
    """The last ids of the vocabulary."""
    size = fields["text_config"]["vocab_size"]
    return [size - 4, size - 3, size - 2, size - 1]


# ---------------------------------------------------------------------- prompts


def make_inputs(model, family: str, prompt: Prompt, batch_size: int) -> dict[str, Any]:
    """What the processor of the family would make of `batch_size` prompts: pixels of noise, and random words."""
    config = model.config
    options = {"device": model.device, "dtype": model.dtype}
    before, after = [], []
    if family == "llava":
        visual = {"pixel_values": torch.randn(batch_size, 3, 336, 336, **options)}
        token, number = config.image_token_id, 576
    elif family == "llava_next":
        visual = {
            "pixel_values": torch.randn(batch_size, 5, 3, 336, 336, **options),
            "image_sizes": torch.tensor([[672, 672]] * batch_size),
        }
        token, number = config.image_token_id, 5 * 576 + 48  # a newline for each row of the tiles
    elif family == "qwen2_5_vl":
        grid = (1, prompt.size, prompt.size)
        visual = {
            "pixel_values": torch.randn(batch_size * math.prod(grid), 3 * 2 * 14 * 14, **options),
            "image_grid_thw": torch.tensor([grid] * batch_size),
        }
        token, number = config.image_token_id, math.prod(grid) // 4
        before, after = [config.vision_start_token_id], [config.vision_end_token_id]
    else:
        visual = {"pixel_values_videos": torch.randn(batch_size, prompt.size, 3, 384, 384, **options)}
        token, number = config.video_token_id, prompt.size * 14 * 15

    num_words = prompt.text - len(before) - len(after)
    words = torch.randint(3, 900, (num_words,)).tolist()
    middle = num_words // 2
    row = [*words[:middle], *before, *[token] * number, *after, *words[middle:]]
    host = "cpu" if model.device.type == "meta" else model.device
    input_ids = torch.tensor([row] * batch_size, device=host)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **visual}
    if family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (input_ids == token).long()
        inputs["image_grid_thw"] = inputs["image_grid_thw"].to(host)
    if family in ("llava", "llava_next"):
        query = [49406, *torch.randint(1000, 40000, (12,)).tolist(), 49407]
        query = torch.tensor([query + [49407] * (77 - len(query))] * batch_size, device=host)
        inputs |= {"query_input_ids": query, "query_attention_mask": torch.ones_like(query)}
    return inputs
