"""A tiny LLaVA as its repository on the Hub has it, the CLIP of its tower, and the export of both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from old_keys import old_llava_key
from processing.tiny_tokenizers import clip_image_processor, clip_tokenizer, llama_tokenizer
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from fsr_hf import export
from fsr_hf.testing.chat_templates import LLAVA_TEMPLATE


__all__ = ["SIDE", "Checkpoints", "edit_json", "make_checkpoints", "save_stock", "stock_llava", "tiny_clip"]

SIDE = 28  # pixels, 4 x 4 patches


class Checkpoints(NamedTuple):
    stock: Path  # LLaVA, keys as llava-hf/llava-1.5-7b-hf has them
    clip: Path  # the CLIP of its tower
    fsr: Path  # the export of both


def tiny_clip(hidden_size: int = 16, image_size: int = SIDE) -> CLIPModel:
    tower = {"hidden_size": hidden_size, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**tower, "hidden_size": 24, "vocab_size": 200, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**tower, "image_size": image_size, "patch_size": 7}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))


def stock_llava(clip: CLIPModel) -> LlavaForConditionalGeneration:
    tokenizer = llama_tokenizer()
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        text_config=text_config, vision_config=clip.config.vision_config, image_token_id=image_token_id
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    return model


def save_stock(model: LlavaForConditionalGeneration, folder: Path) -> None:
    folder.mkdir()
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file({old_llava_key(key): tensor for key, tensor in model.state_dict().items()}, folder / "model.safetensors")
    LlavaProcessor(
        image_processor=clip_image_processor(SIDE),
        tokenizer=llama_tokenizer(),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)


def make_checkpoints(root: Path) -> Checkpoints:
    torch.manual_seed(0)
    clip = tiny_clip()
    clip.save_pretrained(root / "clip")
    clip_tokenizer().save_pretrained(root / "clip")
    save_stock(stock_llava(clip), root / "stock")
    fsr = export(root / "stock", root / "fsr", text_encoder=root / "clip", fsr_config={"num_visual_tokens": 5})
    return Checkpoints(root / "stock", root / "clip", fsr)


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
