"""
The published models in their full size, on the meta device: names and shapes of all parameters, and the shapes that a
prompt goes through. There are no values in it, so nothing is loaded and nothing large is computed.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from anyres import num_views, pack
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding
from transformers.models.qwen3_vl import modeling_qwen3_vl

from fsr_hf import (
    FSRLlavaForConditionalGeneration,
    FSRLlavaNextForConditionalGeneration,
    FSRLlavaVideoForConditionalGeneration,
    FSRQwen2_5_VLForConditionalGeneration,
    FSRQwen3VLForConditionalGeneration,
)
from fsr_hf.modeling.guards import get_cache
from fsr_hf.modeling.pools import select_from_items
from fsr_hf.modeling.prompt import select_columns


# openai/clip-vit-large-patch14-336
CLIP_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "projection_dim": 768,
}
VICUNA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
VICUNA_13B = {
    **VICUNA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
MISTRAL_7B = {
    **VICUNA_7B,
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
IMAGE_TOKEN, VIDEO_TOKEN = 32000, 151647


@dataclass(frozen=True)
class Prompt:
    """
    A prompt with one image or video.

    Args:
        inputs (`dict`): What the model takes beside `input_ids`, pixels on the meta device.
        run (`list[int]`): The placeholders, and words between them.
        candidates, kept (`int`): Tokens of it that can be dropped, and those that are left under the default budget.
    """

    inputs: dict[str, Any]
    run: list[int]
    candidates: int
    kept: int


@dataclass(frozen=True)
class Published:
    """
    Args:
        name (`str`): The checkpoint.
        model_class, stock_class, stock_config_class (`type`): Ours and the stock ones.
        config (`dict`): Its config, as far as it differs from the stock defaults.
        parameters (`float`): Of the stock model, in billions, tied weights once.
        prompts (`dict[str, Callable]`): By name.
        has_text_encoder (`bool`): Whether CLIP's text tower goes with it.
    """

    name: str
    model_class: type
    stock_class: type
    stock_config_class: type
    config: dict[str, Any]
    parameters: float
    prompts: dict[str, Callable[[], Prompt]] = field(default_factory=dict)
    has_text_encoder: bool = True

    def __str__(self) -> str:
        return self.name


# ---------------------------------------------------------------------- LLaVA-1.5


def llava_prompt() -> Prompt:
    inputs = {"pixel_values": torch.empty(1, 3, 336, 336, device="meta")}
    return Prompt(inputs, [IMAGE_TOKEN] * 576, 576, 128)


def llava(name: str, text_config: dict[str, Any], parameters: float) -> Published:
    return Published(
        name,
        FSRLlavaForConditionalGeneration,
        LlavaForConditionalGeneration,
        LlavaConfig,
        {"vision_config": CLIP_VISION, "text_config": text_config, "image_token_index": IMAGE_TOKEN},
        parameters,
        {"336x336": llava_prompt},
    )


# ---------------------------------------------------------------------- LLaVA-NeXT

NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def next_prompt(height: int, width: int) -> Prompt:
    tokens = pack((height, width), NEXT_PINPOINTS, 336, 24)
    candidates = len(tokens) - tokens.count(None)
    views = num_views((height, width), NEXT_PINPOINTS, 336)
    inputs = {
        "pixel_values": torch.empty(1, views, 3, 336, 336, device="meta"),
        "image_sizes": torch.tensor([[height, width]]),
    }
    return Prompt(inputs, [IMAGE_TOKEN] * len(tokens), candidates, round(candidates / 9))


NEXT_PROMPTS = {
    f"{height}x{width}": lambda size=(height, width): next_prompt(*size)
    for height, width in ((672, 672), (480, 640), (1000, 300), (20, 1500))
}


def llava_next(name: str, text_config: dict[str, Any], parameters: float) -> Published:
    return Published(
        name,
        FSRLlavaNextForConditionalGeneration,
        LlavaNextForConditionalGeneration,
        LlavaNextConfig,
        {"vision_config": CLIP_VISION, "text_config": text_config, "image_token_index": IMAGE_TOKEN},
        parameters,
        NEXT_PROMPTS,
    )


# ---------------------------------------------------------------------- LLaVA-Video

QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}


def video_prompt(num_frames: int, kept: int) -> Prompt:
    inputs = {"pixel_values_videos": torch.empty(1, num_frames, 3, 384, 384, device="meta")}
    return Prompt(inputs, [VIDEO_TOKEN] * (num_frames * 14 * 15), num_frames * 14 * 14, kept)


LLAVA_VIDEO = Published(
    "LLaVA-Video-7B-Qwen2",
    FSRLlavaVideoForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionConfig,
    {"text_config": QWEN2_7B},
    8.03,
    {"32 frames": lambda: video_prompt(32, 1254), "64 frames": lambda: video_prompt(64, 2509)},
    has_text_encoder=False,
)


# ---------------------------------------------------------------------- Qwen2.5-VL


class HostTensor(torch.Tensor):
    """Keeps its values when it is sent to the device of pixels that have none."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # what is computed from it is a plain tensor

    def to(self, *args, **kwargs):
        return self


def qwen_prompt(modality: str, *grid: int, side: int = 14) -> Prompt:
    pixels, grids, token = {
        "image": ("pixel_values", "image_grid_thw", 151655),
        "video": ("pixel_values_videos", "video_grid_thw", 151656),
    }[modality]
    pixel_values = torch.empty(math.prod(grid), 3 * 2 * side**2, device="meta")
    inputs = {pixels: pixel_values, grids: torch.tensor([grid]).as_subclass(HostTensor)}
    candidates = math.prod(grid) // 4
    return Prompt(inputs, [token] * candidates, candidates, candidates // 2)


def qwen(name: str, parameters: float, hidden_size: int, text_config: dict[str, Any], **config: Any) -> Published:
    vision = {"hidden_size": 1280, "out_hidden_size": hidden_size, "tokens_per_second": 2, "intermediate_size": 3420}
    text = {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": hidden_size,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        **text_config,
    }
    return Published(
        name,
        FSRQwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        {"text_config": text, **config, "vision_config": {**vision, **config.get("vision_config", {})}},
        parameters,
        {
            "504x728": lambda: qwen_prompt("image", 1, 36, 52),
            "32 frames": lambda: qwen_prompt("video", 16, 10, 12),
        },
        has_text_encoder=False,
    )


def qwen_text(intermediate_size: int, num_layers: int, num_heads: int, num_key_value_heads: int, **fields: Any):
    return {
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        **fields,
    }


LARGE_TOWER = {"vision_config": {"intermediate_size": 3456}}
QWEN = [
    qwen("Qwen2.5-VL-3B", 3.75, 2048, qwen_text(11008, 36, 16, 2, vocab_size=151936), tie_word_embeddings=True),
    qwen("Qwen2.5-VL-7B", 8.29, 3584, qwen_text(18944, 28, 28, 4)),
    qwen("Qwen2.5-VL-32B", 33.45, 5120, qwen_text(27648, 64, 40, 8), **LARGE_TOWER),
    qwen("Qwen2.5-VL-72B", 73.41, 8192, qwen_text(29568, 80, 64, 8), **LARGE_TOWER),
]


# ---------------------------------------------------------------------- Qwen3-VL


def qwen3_prompt(modality: str, *grid: int) -> Prompt:
    """A timestamp of 6 tokens before each frame of a video."""
    prompt = qwen_prompt(modality, *grid, side=16)
    if modality == "video":
        area = len(prompt.run) // grid[0]
        prompt.run[:] = [*range(50, 56), 151652, *prompt.run[:area], 151653] * grid[0]
    return prompt


def qwen3(name: str, parameters: float, hidden_size: int, text_config: dict[str, Any], **config: Any) -> Published:
    small = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    text = {
        "model_type": "qwen3_vl_text",
        "hidden_size": hidden_size,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
        **text_config,
    }
    vision = {**(small if hidden_size < 4096 else {}), "out_hidden_size": hidden_size}
    return Published(
        name,
        FSRQwen3VLForConditionalGeneration,
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        {"text_config": text, "vision_config": vision, **config},
        parameters,
        {
            "576x832": lambda: qwen3_prompt("image", 1, 36, 52),
            "32 frames": lambda: qwen3_prompt("video", 16, 10, 12),
        },
        has_text_encoder=False,
    )


QWEN3 = [
    qwen3("Qwen3-VL-2B", 2.13, 2048, qwen_text(6144, 28, 16, 8), tie_word_embeddings=True),
    qwen3("Qwen3-VL-4B", 4.44, 2560, qwen_text(9728, 36, 32, 8), tie_word_embeddings=True),
    qwen3("Qwen3-VL-8B", 8.77, 4096, qwen_text(12288, 36, 32, 8)),
    qwen3("Qwen3-VL-32B", 33.36, 5120, qwen_text(25600, 64, 64, 8)),
]


PUBLISHED = [
    llava("llava-1.5-7b", VICUNA_7B, 7.06),
    llava("llava-1.5-13b", VICUNA_13B, 13.35),
    llava_next("llava-v1.6-vicuna-7b", VICUNA_7B, 7.06),
    llava_next("llava-v1.6-mistral-7b", MISTRAL_7B, 7.57),
    llava_next("llava-v1.6-vicuna-13b", VICUNA_13B, 13.35),
    LLAVA_VIDEO,
    *QWEN,
    *QWEN3,
]
# Every model reads a picture. Sizes of a family differ in nothing that knows of time, so one of them reads the video.
PROMPTS = [
    pytest.param(model, name, id=f"{model}-{name}")
    for model in PUBLISHED
    for name in model.prompts
    if name != "32 frames" or model in (LLAVA_VIDEO, QWEN[0], QWEN3[0])
]


@functools.cache
def build(name: str):
    published = next(published for published in PUBLISHED if published.name == name)
    fsr_config = {"text_encoder_config": CLIP_TEXT} if published.has_text_encoder else None
    config = published.model_class.config_class(**published.config, fsr_config=fsr_config)
    with torch.device("meta"):
        model = published.model_class(config).eval()
    for module in model.modules():
        if isinstance(module, (Qwen2_5_VLVisionRotaryEmbedding, modeling_qwen3_vl.Qwen3VLVisionRotaryEmbedding)):
            # Positions come from grids, which have values here, and meet frequencies, which have none.
            module.register_forward_pre_hook(lambda _, args: (args[0], args[1].to("meta")))
    return model


@pytest.fixture(autouse=True)
def interpolation_without_values(monkeypatch):
    """How Qwen3-VL's tower interpolates its position embeddings comes from grids, too."""
    name = "get_vision_interpolation_indices_and_weights"
    original = getattr(modeling_qwen3_vl, name)
    monkeypatch.setattr(
        modeling_qwen3_vl, name, lambda *args, **kwargs: [part.to("meta") for part in original(*args, **kwargs)]
    )


def shapes(model) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("published", PUBLISHED, ids=str)
def test_parameters_are_those_of_the_stock_class_and_the_text_tower(published):
    with torch.device("meta"):
        stock = published.stock_class(published.stock_config_class(**published.config))
    expected = shapes(stock)
    assert round(sum(parameter.numel() for parameter in stock.parameters()) / 1e9, 2) == published.parameters
    if published.has_text_encoder:
        with torch.device("meta"):
            clip = CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=768))
        text_side = ("text_model.", "text_projection.", "visual_projection.")
        expected |= {
            f"model.text_encoder.{name}": shape for name, shape in shapes(clip).items() if name.startswith(text_side)
        }
    assert shapes(build(published.name)) == expected


@pytest.mark.parametrize(("published", "name"), PROMPTS)
@torch.no_grad()
def test_shapes_of_a_compressed_prompt(published, name):
    model, prompt = build(published.name), published.prompts[name]()
    fsr, hidden_size = model.config.fsr_config, model.config.get_text_config().hidden_size
    ids = torch.tensor([[1, 2, *prompt.run, 3, 4, 5]])
    inner = model.model
    items = inner.place_items(ids, inner.build_items(**prompt.inputs))
    (item,) = items
    placeholders = [c for c, token in enumerate(ids[0].tolist()) if token in inner.placeholder_ids.values()]
    assert item.row == 0 and item.columns.tolist() == placeholders
    assert item.num_candidates == prompt.candidates
    budget = fsr.budget(prompt.candidates)
    assert budget == prompt.kept < prompt.candidates

    query = None
    if published.has_text_encoder:
        chunks = torch.zeros(1, 2 * 77, dtype=torch.long, device="meta")
        query = inner.text_encoder.encode_query(chunks, torch.ones_like(chunks))
        assert query.shape == (1, CLIP_TEXT["projection_dim"])
    tokens, outputs = inner.encode_items(items, query, **prompt.inputs)
    assert [run.shape for run in tokens.features] == [(len(placeholders), hidden_size)]
    assert tokens.saliency.shape == (len(placeholders),) and (tokens.relevance is None) == (query is None)
    kept = select_from_items(tokens, items, [budget], fsr, model.selector, True)
    assert kept.counts == [budget] and kept.indices.shape == (budget,)
    # Beside its features, a token of Qwen3-VL has those of each depth.
    depths = getattr(model.config.vision_config, "deepstack_visual_indexes", [])
    assert kept.features.shape == (budget, hidden_size * (1 + len(depths)))
    (selection,) = kept.selections
    assert selection.features.shape == (budget, hidden_size) and selection.grid.shape == (len(placeholders), 3)
    assert list(outputs) == [item.modality]

    length = ids.shape[1] - len(placeholders) + budget
    columns, _ = select_columns(torch.ones_like(ids), items, kept.counts, torch.arange(budget), [0])
    assert columns.shape == (1, length)
    embeds = model.get_input_embeddings()(ids.gather(1, columns).to("meta"))
    outputs = inner.language_model(inputs_embeds=embeds, use_cache=True)  # the mask would be looked at
    assert outputs.last_hidden_state.shape == (1, length, hidden_size)
    assert get_cache(outputs).get_seq_length() == length
