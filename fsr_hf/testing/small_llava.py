"""A small LLaVA-1.5, and the CLIP of its vision tower, as stock checkpoints made without a download."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.utils import logging

from ..hub.export import export
from .chat_templates import LLAVA_TEMPLATE
from .small_tokenizers import WORDS, byte_tokenizer, word_tokenizer


__all__ = [
    "TINY",
    "SmallLlava",
    "answer_in_words",
    "clip_config",
    "clip_image_processor",
    "export_small_llava",
    "llava_config",
    "llava_processor",
    "save_small_clip",
    "save_small_llava",
]


@dataclass(frozen=True)
class SmallLlava:
    """
    Sizes of the model. What FSR works on is LLaVA-1.5's own in any case: [CLS] and patches, 576 of them by default,
    features from the last block but one, a projector of two layers.

    The default has 75 million weights in the language model, so that, as in a real LLaVA, most of the time of a prompt
    goes into it and little into the vision tower.
    """

    image_size: int = 336
    patch_size: int = 14

    hidden_size: int = 768
    num_layers: int = 10
    vision_hidden_size: int = 192
    vision_num_layers: int = 6
    text_hidden_size: int = 128
    text_num_layers: int = 4
    projection_dim: int = 128
    head_dim: int = 64

    @property
    def num_patches(self) -> int:
        """Of a picture, and so its visual tokens."""
        return (self.image_size // self.patch_size) ** 2


# Of no use but to see that everything runs.
TINY = SmallLlava(
    hidden_size=64,
    num_layers=2,
    vision_hidden_size=32,
    vision_num_layers=3,
    text_hidden_size=32,
    text_num_layers=2,
    projection_dim=16,
    head_dim=16,
)


def save_small_llava(
    folder: str | os.PathLike, clip_folder: str | os.PathLike, size: SmallLlava | None = None, seed: int = 0
) -> None:
    """
    Save a stock LLaVA of random weights to `folder`, and the CLIP model that its vision tower is taken from to
    `clip_folder`, each with its tokenizer: two folders like `llava-hf/llava-1.5-7b-hf` and
    `openai/clip-vit-large-patch14-336`.
    """
    size = size or SmallLlava()
    tokenizer = word_tokenizer(image_token="<image>")
    torch.manual_seed(seed)
    clip, image_processor = save_small_clip(clip_folder, size)
    # At the usual initializer_range, 0.02, answers repeat one word.
    config = llava_config(size, tokenizer, clip.config.vision_config, initializer_range=0.05)
    llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    answer_in_words(llava, tokenizer)
    llava.save_pretrained(folder)
    llava_processor(size, image_processor, tokenizer).save_pretrained(folder)


def export_small_llava(root: Path, size: SmallLlava | None = None) -> Path:
    """Build the small LLaVA in folders of `root`, and export it with FSR; the exported folder."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        save_small_llava(root / "llava", root / "clip", size)
    finally:
        if bars:
            logging.enable_progress_bar()
    return export(root / "llava", root / "llava-fsr", text_encoder=root / "clip", progress=False)


def save_small_clip(folder: str | os.PathLike, size: SmallLlava) -> tuple[CLIPModel, CLIPImageProcessor]:
    """Save a CLIP of random weights with its tokenizer, like `openai/clip-vit-large-patch14-336`."""
    tokenizer = byte_tokenizer()
    image_processor = clip_image_processor(size)
    clip = CLIPModel(clip_config(size, tokenizer))
    with torch.no_grad():
        for layer in clip.vision_model.encoder.layers:
            # Random weights attend to all patches alike. So do not trained ones, on which few patches stand out.
            layer.self_attn.q_proj.weight.mul_(9)
            layer.self_attn.k_proj.weight.mul_(9)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return clip, image_processor


def answer_in_words(model: Any, tokenizer: LlamaTokenizer) -> None:
    """Greedy decoding never takes a token whose output weights are 0: answers are words, and do not end early."""
    is_word = torch.zeros(len(tokenizer), 1)
    is_word[tokenizer.convert_tokens_to_ids(["▁" + word for word in WORDS])] = 1
    with torch.no_grad():
        model.lm_head.weight.mul_(is_word)


def clip_config(size: SmallLlava, tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Both towers."""
    return CLIPConfig(
        projection_dim=size.projection_dim,
        vision_config={
            "hidden_size": size.vision_hidden_size,
            "intermediate_size": 4 * size.vision_hidden_size,
            "num_hidden_layers": size.vision_num_layers,
            "num_attention_heads": max(1, size.vision_hidden_size // size.head_dim),
            "image_size": size.image_size,
            "patch_size": size.patch_size,
            "projection_dim": size.projection_dim,
        },
        text_config={
            "hidden_size": size.text_hidden_size,
            "intermediate_size": 4 * size.text_hidden_size,
            "num_hidden_layers": size.text_num_layers,
            "num_attention_heads": max(1, size.text_hidden_size // size.head_dim),
            "max_position_embeddings": 77,
            "projection_dim": size.projection_dim,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )


def clip_image_processor(size: SmallLlava) -> CLIPImageProcessor:
    """Squares of the model's size, with CLIP's mean and deviation."""
    edge = size.image_size
    return CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})


def llava_config(size: SmallLlava, tokenizer: LlamaTokenizer, vision_config: Any, **text_config: Any) -> LlavaConfig:
    """The whole model; `text_config` are further fields of the language model's config."""
    heads = max(1, size.hidden_size // size.head_dim)
    fields = {
        "hidden_size": size.hidden_size,
        "intermediate_size": 8 * size.hidden_size // 3,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    return LlavaConfig(
        text_config=LlamaConfig(**fields | text_config),
        vision_config=vision_config,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=size.num_patches,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )


def llava_processor(
    size: SmallLlava, image_processor: CLIPImageProcessor, tokenizer: LlamaTokenizer
) -> LlavaProcessor:
    """With the settings of `llava-hf/llava-1.5-7b-hf`."""
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=size.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
