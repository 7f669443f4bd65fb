"""A tiny Qwen2.5-VL or Qwen3-VL with FSR as a checkpoint, with its processor."""

from families import FAMILIES, initialize
from processing.tiny_tokenizers import qwen_tokenizer
from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from fsr_hf.testing.chat_templates import QWEN_VL_TEMPLATE


__all__ = ["save_checkpoint"]

_PROCESSORS = {
    "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
}


def save_checkpoint(folder, name="qwen2_5_vl"):
    """A checkpoint of a family with a processor, as `from_pretrained` finds it."""
    family, tokenizer = FAMILIES[name], qwen_tokenizer()
    processor_class, video_processor_class = _PROCESSORS[name]
    edges = {"shortest_edge": 8 * 8, "longest_edge": 96 * 96}
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": edges}
    processor_class(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=video_processor_class(**sizes, do_sample_frames=False, cap_pixels_per_frame=False),
        chat_template=QWEN_VL_TEMPLATE,
    ).save_pretrained(folder)
    special = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in special])
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text_config = {**family.config["text_config"], "vocab_size": len(tokenizer), "eos_token_id": 256}
    config = {**family.config, **dict(zip(names, ids)), "text_config": text_config}
    initialize(family.model_class(family.model_class.config_class(**config))).save_pretrained(folder)
