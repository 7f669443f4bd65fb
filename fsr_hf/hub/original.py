"""Checkpoints in the layout of LLaVA-Video's own code, which come with a tokenizer and no processor."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlavaOnevisionImageProcessor, LlavaOnevisionVideoProcessor

from ..processing.processing_fsr_llava_video import FSRLlavaVideoProcessor


__all__ = ["CHAT_TEMPLATE", "make_processor"]

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
