"""
The model families, each as a tiny model with random weights: one `Family` for each.

A family says how to build its model and one image or video of it, and tells the oracle what that item is: its pools of
candidates with their scores, and its newlines. Everything else in the common suite follows from that.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyres
import frames
import torch
from oracle import Layout, Pool, clip_scores
from received import received_attention
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from fsr_hf.modeling.modeling_fsr_llava import FSRLlavaForConditionalGeneration
from fsr_hf.modeling.modeling_fsr_llava_next import FSRLlavaNextForConditionalGeneration
from fsr_hf.modeling.modeling_fsr_llava_video import FSRLlavaVideoForConditionalGeneration
from fsr_hf.modeling.modeling_fsr_qwen2_5_vl import FSRQwen2_5_VLForConditionalGeneration
from fsr_hf.modeling.modeling_fsr_qwen3_vl import FSRQwen3VLForConditionalGeneration


__all__ = ["FAMILIES", "Family", "Item", "initialize", "llava_next_item", "llava_next_layout", "models"]

# CLIP's text tower: ids below QUERY_BOS are words.
QUERY_BOS, QUERY_EOS, QUERY_LENGTH = 98, 99, 77
# The language model: PAD, BOS, EOS, then words up to FIRST_SPECIAL, then a family's own special tokens.
PAD, BOS, EOS, FIRST_SPECIAL, VOCAB_SIZE = 0, 1, 2, 190, 200

TEXT_CONFIG = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
CLIP_VISION_CONFIG = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 84,
    "patch_size": 14,
    "projection_dim": 16,
}
CLIP_TEXT_CONFIG = {
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
    "max_position_embeddings": QUERY_LENGTH,
    "bos_token_id": QUERY_BOS,
    "eos_token_id": QUERY_EOS,
}


def initialize(model, seed: int = 0, std: float = 0.2):
    """Random weights with more spread than the usual ones, so that attention is not flat and greedy tokens vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, std if parameter.ndim > 1 else std / 2, generator=generator)
    # No EOS: how long an answer is does not depend on chance. A test that wants one names it.
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS)
    return model.eval()


@dataclass
class Item:
    """
    One image or video.

    Args:
        modality (`str`): `"image"` or `"video"`.
        token_ids (`list[int]`): What stands for it in a prompt: its placeholders, and what belongs around them.
        inputs (`dict[str, torch.Tensor]`): Its share of the model's inputs; `Family.collate` joins them.
        length (`int`): Its placeholders.
    """

    modality: str
    token_ids: list[int]
    inputs: dict[str, torch.Tensor]
    length: int


def _concatenate(items: list[Item]) -> dict[str, torch.Tensor]:
    names = dict.fromkeys(name for item in items for name in item.inputs)
    return {name: torch.cat([item.inputs[name] for item in items if name in item.inputs]) for name in names}


@dataclass(frozen=True)
class Family:
    """
    Args:
        name (`str`): For test ids.
        model_class, config (`type`, `dict`): The class under test; the arguments of its tiny config but `fsr_config`.
        reference_class, reference_config_class (`type`): The stock classes. The oracle decodes with them.
        make_item (`Callable`): `(kind, generator)` to [`Item`].
        layout (`Callable`): `(reference model, item, clip, query, fsr_config)` to [`~oracle.Layout`], for the oracle.
            `clip` is a `CLIPModel` with the weights of tower and text encoder or `None`; `query` is `(chunks, 77)` ids
            or `None`.
        placeholder_ids (`tuple[int, ...]`): Ids that pixels fill.
        is_stock (`bool`): Whether the unpruned model is the reference model itself.
        kinds (`tuple[str, ...]`): What `make_item` can make; the first is the usual one.
        fsr_config (`dict`): The budget of the tiny model, well below the candidates of any item, and its text encoder.
        collate (`Callable`): Items of a batch, in order, to the model's inputs.
        more_inputs (`Callable`): `input_ids` to more inputs of the model, such as token types.
        positions (`Callable`, *optional*): `(reference model, inputs)` to positions `(..., batch, length)` of the full
            prompt, if kept tokens keep them; `None` if the prompt closes up.
        supports_guidance (`bool`): Whether `guidance_scale` works.
        tower, language_model (`str`): Where the vision tower and the language model are.
    """

    name: str
    model_class: type
    config: dict[str, Any]
    reference_class: type
    reference_config_class: type
    make_item: Callable[[str, torch.Generator], Item]
    layout: Callable[..., Layout]
    placeholder_ids: tuple[int, ...]
    is_stock: bool = True
    kinds: tuple[str, ...] = ("image",)
    fsr_config: dict[str, Any] = field(default_factory=dict)
    collate: Callable[[list[Item]], dict[str, torch.Tensor]] = _concatenate
    more_inputs: Callable[[torch.Tensor], dict[str, torch.Tensor]] = lambda input_ids: {}
    positions: Callable[..., torch.Tensor] | None = None
    supports_guidance: bool = True
    tower: str = "model.vision_tower"
    language_model: str = "model.language_model"

    def __str__(self) -> str:
        return self.name

    @property
    def has_text_encoder(self) -> bool:
        return "text_encoder_config" in self.fsr_config

    def build_config(self, fsr_config: dict[str, Any] | None = None, **kwargs: Any) -> PreTrainedConfig:
        """The tiny config; `fsr_config` overrides fields of the tiny one."""
        fields = {**self.fsr_config, **(fsr_config or {})}
        if fsr_config and fsr_config.get("retention_ratio") is not None:
            fields.pop("num_visual_tokens", None)
        return self.model_class.config_class(**{**self.config, **kwargs}, fsr_config=fields)

    def build(self, seed: int = 0, fsr_config: dict[str, Any] | None = None, **kwargs: Any):
        """The tiny model under test; `kwargs` go to its config."""
        return initialize(self.model_class(self.build_config(fsr_config, **kwargs)), seed)

    def build_reference(self, model, attn_implementation: str = "eager", **kwargs: Any):
        """The stock model with the weights of `model`; under eager attention, the oracle can read its maps."""
        config = self.reference_config_class(**{**self.config, **kwargs})
        reference = self.reference_class._from_config(
            config, attn_implementation=attn_implementation, dtype=model.dtype
        )
        weights = {name: value for name, value in model.state_dict().items() if "text_encoder." not in name}
        reference.load_state_dict(weights)
        reference.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS)
        return reference.eval()

    def item(self, kind: str | None = None, seed: int = 0) -> Item:
        return self.make_item(kind or self.kinds[0], torch.Generator().manual_seed(seed))

    def rows(self, seed: int = 0) -> list[list[int | Item]]:
        """A batch to prune: rows of different lengths with one item, two items, none, and one of each further kind."""
        first, second = self.kinds[0], self.kinds[1 % len(self.kinds)]
        rows: list[list[int | Item]] = [
            [BOS, 5, 6, self.item(first, seed), 7, 10, 11, 12],
            [BOS, self.item(second, seed + 1), 7, 8, self.item(first, seed + 2), 13, 14, 15, 16, 17],
            [BOS, 20, 21, 22, 23, 24, 25],
        ]
        return rows + [[BOS, 30 + k, self.item(kind, seed + 3 + k), 31, 32] for k, kind in enumerate(self.kinds[2:])]

    def inputs(self, rows: Sequence[Sequence[int | Item]], padding_side: str = "left", query: bool = True):
        """
        The model's inputs for rows of ids and items. A row's question depends on its ids alone, so that the row alone
        has the same.
        """
        all_ids = [
            [token for part in row for token in (part.token_ids if isinstance(part, Item) else [part])] for row in rows
        ]
        length = max(map(len, all_ids))
        pads = [(length - len(ids), 0) if padding_side == "left" else (0, length - len(ids)) for ids in all_ids]
        input_ids = torch.tensor([[PAD] * left + ids + [PAD] * right for ids, (left, right) in zip(all_ids, pads)])
        mask = torch.tensor([[0] * left + [1] * len(ids) + [0] * right for ids, (left, right) in zip(all_ids, pads)])
        inputs = {"input_ids": input_ids, "attention_mask": mask, **self.more_inputs(input_ids)}
        items = [part for row in rows for part in row if isinstance(part, Item) and part.inputs]
        if items:
            inputs |= self.collate(items)
        if query and self.has_text_encoder:
            inputs |= self.query([sum(ids) % 50 for ids in all_ids])
        return inputs

    def query(self, words: Sequence[int], chunks: int = 2) -> dict[str, torch.Tensor]:
        """
        A question for each row, in `chunks` chunks of CLIP's length. A row uses some of them, on the left or on the
        right: where the empty ones are has no meaning.
        """
        input_ids = torch.full((len(words), chunks, QUERY_LENGTH), QUERY_EOS)
        input_ids[..., 0] = QUERY_BOS
        mask = torch.zeros_like(input_ids)
        for row, word in enumerate(words):
            for chunk in range(1 + word % chunks):
                chunk = -1 - chunk if word % 3 else chunk
                length = 2 + (word + 5 * chunk) % 9
                input_ids[row, chunk, 1 : 1 + length] = (torch.arange(length) * 7 + word * 13 + chunk * 3) % QUERY_BOS
                mask[row, chunk, : length + 2] = 1
        return {"query_input_ids": input_ids.flatten(1), "query_attention_mask": mask.flatten(1)}


# --- LLaVA-1.5 ---

IMAGE_TOKEN = 199


def _llava_item(kind: str, generator: torch.Generator) -> Item:
    pixels = torch.randn(1, 3, 84, 84, generator=generator)
    return Item("image", [IMAGE_TOKEN] * 36, {"pixel_values": pixels}, 36)


def _llava_layout(reference, item: Item, clip, query, fsr=None) -> Layout:
    pixels = item.inputs["pixel_values"]
    saliency, relevance = clip_scores(reference.model.vision_tower, clip, pixels, query, block=-2, fsr=fsr)
    run = torch.cat(list(reference.get_image_features(pixels).pooler_output))
    pool = Pool(run, saliency[0], None if relevance is None else relevance[0], list(range(36)))
    return Layout(run, [pool])


LLAVA = Family(
    name="llava",
    model_class=FSRLlavaForConditionalGeneration,
    config={
        "vision_config": CLIP_VISION_CONFIG,
        "text_config": {"model_type": "llama", **TEXT_CONFIG},
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": 36,
    },
    reference_class=LlavaForConditionalGeneration,
    reference_config_class=LlavaConfig,
    make_item=_llava_item,
    layout=_llava_layout,
    placeholder_ids=(IMAGE_TOKEN,),
    fsr_config={"num_visual_tokens": 9, "rho": 0.5, "text_encoder_config": CLIP_TEXT_CONFIG},
)


# --- LLaVA-NeXT ---

NEXT_PIXELS, NEXT_SIDE = 56, 4  # of a view
NEXT_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
NEXT_SIZES = {"image": (100, 140), "wide": (30, 190), "tall": (170, 70)}  # height and width


def llava_next_item(size: tuple[int, int], generator: torch.Generator, pinpoints=NEXT_PINPOINTS) -> Item:
    """A picture of any height and width."""
    views = anyres.num_views(size, pinpoints, NEXT_PIXELS)
    inputs = {
        "pixel_values": torch.randn(1, views, 3, NEXT_PIXELS, NEXT_PIXELS, generator=generator),
        "image_sizes": torch.tensor([size]),
    }
    length = len(anyres.pack(size, pinpoints, NEXT_PIXELS, NEXT_SIDE))
    return Item("image", [IMAGE_TOKEN] * length, inputs, length)


def _llava_next_collate(items: list[Item]) -> dict[str, torch.Tensor]:
    """Views that pad a picture are NaN: nothing may look at them."""
    most = max(item.inputs["pixel_values"].shape[1] for item in items)
    pixels = torch.full((len(items), most, 3, NEXT_PIXELS, NEXT_PIXELS), torch.nan)
    for padded, item in zip(pixels, items):
        views = item.inputs["pixel_values"][0]
        padded[: len(views)] = views
    return {"pixel_values": pixels, "image_sizes": torch.cat([item.inputs["image_sizes"] for item in items])}


def llava_next_layout(reference, item: Item, clip, query, fsr=None, pool: str = "view") -> Layout:
    """The item in pools of one view each, or as one pool."""
    pixels, sizes = item.inputs["pixel_values"], item.inputs["image_sizes"]
    saliency, relevance = clip_scores(reference.model.vision_tower, clip, pixels[0], query, block=-2, fsr=fsr)
    run = torch.cat(list(reference.get_image_features(pixels, sizes).pooler_output))
    tokens = anyres.pack(tuple(sizes[0].tolist()), reference.config.image_grid_pinpoints, NEXT_PIXELS, NEXT_SIDE)
    members: dict[int, list[int]] = {}
    newlines: dict[int, list[int]] = {}
    line: list[int] = []
    for number, token in enumerate(tokens):
        if token is None:
            newlines[number], line = line, []
        else:
            members.setdefault(token[0] if pool == "view" else 0, []).append(number)
            line += [number] if token[0] > 0 else []
    pools = []
    for numbers in members.values():
        views, rows, columns = zip(*(tokens[number] for number in numbers))
        places = torch.tensor(views), torch.tensor(rows) * NEXT_SIDE + torch.tensor(columns)
        cosine = None if relevance is None else relevance[places]
        pools.append(Pool(run[numbers], saliency[places], cosine, numbers))
    return Layout(run, pools, newlines)


LLAVA_NEXT = Family(
    name="llava_next",
    model_class=FSRLlavaNextForConditionalGeneration,
    config={
        "vision_config": {**CLIP_VISION_CONFIG, "image_size": NEXT_PIXELS},
        "text_config": {"model_type": "llama", **TEXT_CONFIG},
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": NEXT_SIDE**2,
        "image_grid_pinpoints": NEXT_PINPOINTS,
    },
    reference_class=LlavaNextForConditionalGeneration,
    reference_config_class=LlavaNextConfig,
    make_item=lambda kind, generator: llava_next_item(NEXT_SIZES[kind], generator),
    layout=llava_next_layout,
    placeholder_ids=(IMAGE_TOKEN,),
    kinds=tuple(NEXT_SIZES),
    fsr_config={"num_visual_tokens": 12, "rho": 0.4, "text_encoder_config": CLIP_TEXT_CONFIG},
    collate=_llava_next_collate,
)


# --- Qwen2.5-VL ---

VIDEO_TOKEN, VISION_START, VISION_END = 198, 196, 197
QWEN_VISION_CONFIG = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "window_size": 16,  # windows of 2 x 2 tokens
    "fullatt_block_indexes": [2],
    "out_hidden_size": TEXT_CONFIG["hidden_size"],
    "tokens_per_second": 2,
}
QWEN_GRIDS = {"image": (1, 6, 10), "video": (3, 6, 6), "tall": (1, 14, 6)}  # in patches; 2 x 2 of them are a token


def qwen_item(grid: tuple[int, int, int], generator: torch.Generator, modality: str = "image") -> Item:
    """An image or a video of any size."""
    pixels = torch.randn(math.prod(grid), 3 * 2 * 4 * 4, generator=generator)
    length = math.prod(grid) // 4
    if modality == "image":
        token, inputs = IMAGE_TOKEN, {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}
    else:
        inputs = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])}
        token, inputs["second_per_grid_ts"] = VIDEO_TOKEN, torch.tensor([1.0])
    return Item(modality, [VISION_START] + [token] * length + [VISION_END], inputs, length)


def _qwen_token_types(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mm_token_type_ids": (input_ids == IMAGE_TOKEN).int() + 2 * (input_ids == VIDEO_TOKEN).int()}


def _qwen_layout(reference, item: Item, clip, query, fsr=None) -> Layout:
    pixels, grid = list(item.inputs.values())[:2]
    features = reference.get_image_features if item.modality == "image" else reference.get_video_features
    run = torch.cat(list(features(pixels, grid).pooler_output))
    saliency = received_attention(reference.model.visual, pixels, grid)
    return Layout(run, [Pool(run, saliency, None, list(range(len(run))))])


def _qwen_positions(reference, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    return reference.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0]


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    model_class=FSRQwen2_5_VLForConditionalGeneration,
    config={
        "vision_config": QWEN_VISION_CONFIG,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            **TEXT_CONFIG,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        },
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    },
    reference_class=Qwen2_5_VLForConditionalGeneration,
    reference_config_class=Qwen2_5_VLConfig,
    make_item=lambda kind, generator: qwen_item(QWEN_GRIDS[kind], generator, "video" if kind == "video" else "image"),
    layout=_qwen_layout,
    placeholder_ids=(IMAGE_TOKEN, VIDEO_TOKEN),
    kinds=tuple(QWEN_GRIDS),
    fsr_config={"num_visual_tokens": 8, "rho": 0.3},
    more_inputs=_qwen_token_types,
    positions=_qwen_positions,
    supports_guidance=False,
    tower="model.visual",
)


# --- Qwen3-VL ---


def qwen3_item(grid: tuple[int, int, int], generator: torch.Generator, modality: str = "image") -> Item:
    """An image or a video of any size; before each frame of a video stands its timestamp, of one or two words."""
    item = qwen_item(grid, generator, modality)
    if modality == "video":
        del item.inputs["second_per_grid_ts"]
        frames, area = grid[0], item.length // grid[0]
        item.token_ids = []
        for frame in range(frames):
            item.token_ids += [*range(100 + frame, 101 + frame + frame % 2)]
            item.token_ids += [VISION_START, *[VIDEO_TOKEN] * area, VISION_END]
    return item


def qwen3_layout(reference, item: Item, clip, query, fsr=None, pool: str = "item") -> Layout:
    pixels, grid = item.inputs.values()
    features = reference.get_image_features if item.modality == "image" else reference.get_video_features
    outputs = features(pixels, grid)
    run = torch.cat(list(outputs.pooler_output))
    saliency = received_attention(reference.model.visual, pixels, grid)
    frames = int(grid[0, 0]) if pool == "view" else 1
    pools = [
        Pool(run[numbers], saliency[numbers], None, numbers.tolist())
        for numbers in torch.arange(len(run)).chunk(frames)
    ]
    return Layout(run, pools, deepstack=[torch.cat(list(rows)) for rows in outputs.deepstack_features])


QWEN3_VL = Family(
    name="qwen3_vl",
    model_class=FSRQwen3VLForConditionalGeneration,
    config={
        "vision_config": {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "out_hidden_size": TEXT_CONFIG["hidden_size"],
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
        },
        "text_config": {
            "model_type": "qwen3_vl_text",
            **TEXT_CONFIG,
            "num_hidden_layers": 3,
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 2, 2],
                "mrope_interleaved": True,
            },
        },
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    },
    reference_class=Qwen3VLForConditionalGeneration,
    reference_config_class=Qwen3VLConfig,
    make_item=lambda kind, generator: qwen3_item(QWEN_GRIDS[kind], generator, "video" if kind == "video" else "image"),
    layout=qwen3_layout,
    placeholder_ids=(IMAGE_TOKEN, VIDEO_TOKEN),
    kinds=tuple(QWEN_GRIDS),
    fsr_config={"num_visual_tokens": 8, "rho": 0.3},
    more_inputs=_qwen_token_types,
    positions=_qwen_positions,
    supports_guidance=False,
    tower="model.visual",
)


# --- LLaVA-Video ---

SIGLIP_PIXELS, SIGLIP_SIDE = 35, 5  # of a frame or a view: an odd number of patches is pooled to 3 or to 2
SIGLIP_VISION_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIGLIP_PIXELS,
    "patch_size": SIGLIP_PIXELS // SIGLIP_SIDE,
    "vision_use_head": False,
}
LLAVA_VIDEO_PINPOINTS = [[35, 70], [70, 35], [70, 70], [105, 35], [35, 105]]
LLAVA_VIDEO_SIZES = {"image": (40, 65), "large": (90, 100)}  # the tokens of a large picture are interpolated
LLAVA_VIDEO_MAX_VIEWS = 2


def llava_video_item(num_frames: int, generator: torch.Generator, side: int = 3) -> Item:
    """A video, whose frames are pooled to `side` x `side`."""
    pixels = torch.randn(1, num_frames, 3, SIGLIP_PIXELS, SIGLIP_PIXELS, generator=generator)
    length = num_frames * side * (side + 1)
    return Item("video", [VIDEO_TOKEN] * length, {"pixel_values_videos": pixels}, length)


def llava_video_picture(size: tuple[int, int], generator: torch.Generator) -> Item:
    """A picture of any height and width."""
    views = anyres.num_views(size, LLAVA_VIDEO_PINPOINTS, SIGLIP_PIXELS)
    pixels = torch.randn(1, views, 3, SIGLIP_PIXELS, SIGLIP_PIXELS, generator=generator)
    _, rows, columns = _picture_rows(size)
    length = SIGLIP_SIDE**2 + rows * (columns + 1)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([size])}
    return Item("image", [IMAGE_TOKEN] * length, inputs, length)


def _picture_rows(size: tuple[int, int]) -> tuple[list[list[anyres.Token]], int, int]:
    """The rows of patches that run through the tiles, and how many rows and columns they are interpolated to."""
    lines: list[list[anyres.Token]] = [[]]
    for token in anyres.pack(size, LLAVA_VIDEO_PINPOINTS, SIGLIP_PIXELS, SIGLIP_SIDE)[SIGLIP_SIDE**2 :]:
        if token is None:
            lines.append([])
        else:
            lines[-1].append(token)
    rows, columns = len(lines) - 1, len(lines[0])
    excess = math.sqrt(rows * columns / (LLAVA_VIDEO_MAX_VIEWS * SIGLIP_SIDE**2))
    if excess > 1.1:
        rows, columns = int(rows / excess), int(columns / excess)
    return lines[:-1], rows, columns


def _llava_video_make(kind: str, generator: torch.Generator) -> Item:
    if kind == "video":
        return llava_video_item(int(torch.randint(2, 5, (1,), generator=generator)), generator)
    return llava_video_picture(LLAVA_VIDEO_SIZES[kind], generator)


def _llava_video_collate(items: list[Item]) -> dict[str, torch.Tensor]:
    """Views that pad a picture and frames that pad a video are NaN: nothing may look at them."""
    inputs = {}
    for name in ("pixel_values", "pixel_values_videos"):
        parts = [item.inputs[name][0] for item in items if name in item.inputs]
        if parts:
            inputs[name] = torch.full((len(parts), max(map(len, parts)), *parts[0].shape[1:]), torch.nan)
            for padded, part in zip(inputs[name], parts):
                padded[: len(part)] = part
        if parts and name == "pixel_values":
            inputs["image_sizes"] = torch.cat([i.inputs["image_sizes"] for i in items if "image_sizes" in i.inputs])
        elif parts:
            inputs["video_num_frames"] = torch.tensor([len(part) for part in parts])
    return inputs


def llava_video_layout(
    reference, item: Item, clip, query, fsr=None, pool: str = "item", mode: str = "bilinear"
) -> Layout:
    """The item as one pool, or in pools of one frame (or view, where its tokens belong to one) each."""
    if item.modality == "video":
        frames_of = item.inputs["pixel_values_videos"][0]
        run, places = frames.frame_tokens(reference.model, frames_of, mode)
        received = frames.received_attention(reference.model.vision_tower, frames_of)
        maps = [frames.pool(view.view(SIGLIP_SIDE, SIGLIP_SIDE, 1), mode) for view in received]
        scores = [None if place is None else maps[place[0]][place[1], place[2], 0] for place in places]
        views = [None if place is None else place[0] for place in places]
    else:
        pixels, sizes = item.inputs["pixel_values"], item.inputs["image_sizes"]
        run = torch.cat(list(reference.get_image_features(pixels, sizes).pooler_output))
        received = frames.received_attention(reference.model.vision_tower, pixels[0])
        received = received.view(-1, SIGLIP_SIDE, SIGLIP_SIDE)
        lines, rows, columns = _picture_rows(tuple(sizes[0].tolist()))
        picture = torch.stack([torch.stack([received[token] for token in line]) for line in lines])
        is_large = picture.shape != (rows, columns)
        picture = frames.resize(picture[..., None], rows, columns)[..., 0] if is_large else picture
        scores, views = list(received[0].flatten()), [0] * SIGLIP_SIDE**2
        for row, line in enumerate(picture):
            scores += [*line, None]
            views += [0 if is_large else lines[row][column][0] for column in range(columns)] + [None]
    members: dict[int, list[int]] = {}
    newlines: dict[int, list[int]] = {}
    line = []
    for number, view in enumerate(views):
        if view is None:
            newlines[number], line = line, []
        else:
            members.setdefault(view if pool == "view" else 0, []).append(number)
            line += [number] if item.modality == "video" or number >= SIGLIP_SIDE**2 else []
    pools = [Pool(run[n], torch.stack([scores[i] for i in n]), None, n) for n in members.values()]
    return Layout(run, pools, newlines)


LLAVA_VIDEO = Family(
    name="llava_video",
    model_class=FSRLlavaVideoForConditionalGeneration,
    config={
        "vision_config": SIGLIP_VISION_CONFIG,
        "text_config": {"model_type": "qwen2", **TEXT_CONFIG},
        "image_token_index": IMAGE_TOKEN,
        "video_token_index": VIDEO_TOKEN,
        "image_grid_pinpoints": LLAVA_VIDEO_PINPOINTS,
        "vision_aspect_ratio": f"anyres_max_{LLAVA_VIDEO_MAX_VIEWS}",
    },
    reference_class=LlavaOnevisionForConditionalGeneration,
    reference_config_class=LlavaOnevisionConfig,
    make_item=_llava_video_make,
    layout=llava_video_layout,
    placeholder_ids=(IMAGE_TOKEN, VIDEO_TOKEN),
    is_stock=False,
    kinds=("video", *LLAVA_VIDEO_SIZES),
    fsr_config={"num_visual_tokens": 9, "rho": 0.2},
    collate=_llava_video_collate,
)


FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAVA, LLAVA_NEXT, QWEN2_5_VL, QWEN3_VL, LLAVA_VIDEO)
}


@functools.cache
def models(name: str):
    """The tiny model of a family and its reference, built once. A test that changes one puts it back."""
    family = FAMILIES[name]
    model = family.build()
    return model, family.build_reference(model)
