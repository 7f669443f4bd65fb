"""
Small checkpoints of random weights, exported as the published ones are, for the examples of model cards: a family's
class and everything that its processor needs.
"""

from pathlib import Path

from hub import test_export, test_export_llava_next
from processing.test_processing_fsr_llava import QWEN_TEMPLATE
from processing.tiny_tokenizers import LLAVA_TEMPLATE, clip_image_processor, clip_tokenizer, llama_tokenizer
from transformers import (
    LlavaOnevisionImageProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from fsr_hf import FSRLlavaVideoConfig, FSRLlavaVideoForConditionalGeneration, FSRLlavaVideoProcessor, export
from fsr_hf.hub.original import CHAT_TEMPLATE


__all__ = ["STAND_INS"]

SIDE = 168  # 24 x 24 patches of 7 pixels, as many as in LLaVA-1.5


def _save_clip(folder: Path, image_size: int):
    clip = test_export.tiny_clip(image_size=image_size)
    clip.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return clip


def llava(folder: Path) -> Path:
    clip = _save_clip(folder / "clip", SIDE)
    test_export.stock_llava(clip).save_pretrained(folder / "stock")
    LlavaProcessor(
        image_processor=clip_image_processor(SIDE),
        tokenizer=llama_tokenizer(),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder / "stock")
    return export(folder / "stock", folder / "fsr", text_encoder=folder / "clip", progress=False)


def llava_next(folder: Path) -> Path:
    clip = _save_clip(folder / "clip", test_export_llava_next.SIDE)
    (folder / "stock").mkdir()
    test_export_llava_next.save_stock(clip, folder / "stock")
    return export(folder / "stock", folder / "fsr", text_encoder=folder / "clip", progress=False)


def qwen2_5_vl(folder: Path) -> Path:
    tokens = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = llama_tokenizer(
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        | {f"extra_{number}_token": token for number, token in enumerate(tokens)}
    )
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [2],
            "out_hidden_size": 32,
        },
        text_config={
            "model_type": "qwen2_5_vl_text",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "stock")
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE.replace("<image>", "<|image_pad|>"),
    ).save_pretrained(folder / "stock")
    return export(folder / "stock", folder / "fsr", progress=False)


def llava_video(folder: Path) -> Path:
    tokenizer = llama_tokenizer(extra_special_tokens={"image_token": "<image>", "video_token": "<video>"})
    side = 35  # pixels, 5 x 5 patches, pooled to 3 x 3
    config = FSRLlavaVideoConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": 7,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side]],
    )
    FSRLlavaVideoForConditionalGeneration(config).save_pretrained(folder / "source")
    pixels = {"size": {"height": side, "width": side}}
    FSRLlavaVideoProcessor(
        LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(**pixels, num_frames=4),
        num_image_tokens=25,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder / "source")
    return export(folder / "source", folder / "fsr", progress=False)


# By `model_type`.
STAND_INS = {
    "fsr_llava": llava,
    "fsr_llava_next": llava_next,
    "fsr_llava_video": llava_video,
    "fsr_qwen2_5_vl": qwen2_5_vl,
}
