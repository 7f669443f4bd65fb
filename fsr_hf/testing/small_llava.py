"""A small LLaVA-1.5, and the CLIP of its vision tower, as stock checkpoints made without a download."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
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


__all__ = [
    "CHAT_TEMPLATE",
    "SmallLlava",
    "answer_in_words",
    "clip_config",
    "clip_image_processor",
    "export_small_llava",
    "llava_config",
    "llava_processor",
    "save_small_clip",
    "save_small_llava",
    "word_tokenizer",
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


# What the language model can say. A word is one token with the space before it.
_WORDS = """
a about above across all an and animal apple are around at band bark bath beach bear beside big bird black
blue boat book bowl bread bright brown building bus but car cat chair child circle city clear cloud coat
coffee cold colour corner cup dark day desk dog door ear earth empty eye face field fire flag floor flower
food four from front full garden glass gold grass gray green ground hair half hand hat head hill holding horse
hot house image in inside is it lake leaf left letter light line long looking man many metal mirror moon
morning mountain near new night no not number of old on one open orange over paper path person picture plant
plate pointing purple quiet rain red right river road rocket room round row saucer sea seat shadow shape ship
shirt sign silver sitting sky sleeping small smiling smoke snow some soft space spoon square standing star
stone street suit sun table tall that the there three tower train tree triangle two umbrella under view wall
warm watching water wave what wheel which white wide wind window with woman wood writing yellow yes young
""".split()  # noqa: SIM905

# The template of llava-hf/llava-1.5-7b-hf.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
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
    tokenizer = _clip_tokenizer()
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
    is_word[tokenizer.convert_tokens_to_ids(["▁" + word for word in _WORDS])] = 1
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
        chat_template=CHAT_TEMPLATE,
    )


def word_tokenizer(words: Iterable[str] = _WORDS, **special_tokens: str) -> LlamaTokenizer:
    """A LLaMA tokenizer that knows `words` and `special_tokens`, and spells everything else in letters and bytes."""
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"])
    tokens |= dict.fromkeys(chr(code) for code in range(33, 127))
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(1, len(word) + 1):  # letter by letter: "▁" + "c", "▁c" + "u", "▁cu" + "p"
            merges["▁" + word[: end - 1], word[end - 1]] = None
            tokens["▁" + word[:end]] = None
    return LlamaTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=list(merges),
        pad_token="<unk>",
        padding_side="left",
        model_max_length=4096,
        extra_special_tokens=special_tokens,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without its merges: text in bytes, the last one of a word marked."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
