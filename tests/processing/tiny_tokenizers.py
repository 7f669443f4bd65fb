"""Tokenizers small enough to be written down: one token a character, but the real classes and special tokens."""

import string

from transformers import CLIPImageProcessor, CLIPTokenizer, LlamaTokenizer


CHARACTERS = string.ascii_letters + string.digits + string.punctuation

# The template of llava-hf/llava-1.5-7b-hf, which llava-v1.6-vicuna shares; string contents render as nothing.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


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
