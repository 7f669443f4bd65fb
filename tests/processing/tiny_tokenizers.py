"""Tokenizers small enough to be written down: one token a character, but the real classes and special tokens."""

import string

from transformers import CLIPImageProcessor, CLIPTokenizer, LlamaTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fsr_hf.testing.chat_templates import QWEN_VL_TEMPLATE


__all__ = ["QWEN_VL_TEMPLATE", "clip_image_processor", "clip_tokenizer", "llama_tokenizer", "qwen_tokenizer"]


CHARACTERS = string.ascii_letters + string.digits + string.punctuation


def llama_tokenizer(**kwargs) -> LlamaTokenizer:
    """A LLaMA tokenizer with `<image>`, padding on the left as LLaVA's does."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {character: len(vocab) + n for n, character in enumerate(CHARACTERS + "▁\n")}
    kwargs = {
        "extra_special_tokens": {"image_token": "<image>"},
        "pad_token": "<unk>",
        "padding_side": "left",
    } | kwargs
    return LlamaTokenizer(vocab=vocab, merges=[], **kwargs)


def clip_tokenizer(**kwargs) -> CLIPTokenizer:
    """A CLIP tokenizer: `<|startoftext|>` is 0, `<|endoftext|>` ends and pads and is 1; a lone `a` is one token."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for character in string.ascii_lowercase + string.digits + string.punctuation:
        vocab |= {character: len(vocab), character + "</w>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=[], **({"model_max_length": 77} | kwargs))


def clip_image_processor(side: int = 28) -> CLIPImageProcessor:
    """CLIP's image processor for square images of `side` pixels."""
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def qwen_tokenizer(**kwargs) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer of bytes with the special tokens of Qwen2.5-VL, padding on the left."""
    special = ("image_pad", "video_pad", "vision_start", "vision_end", "im_start", "im_end")
    kwargs = {
        "extra_special_tokens": {f"{name}_token": f"<|{name}|>" for name in special},
        "padding_side": "left",
    } | kwargs
    vocab = {character: number for number, character in enumerate(bytes_to_unicode().values())}
    return Qwen2Tokenizer(vocab=vocab, merges=[], **kwargs)
