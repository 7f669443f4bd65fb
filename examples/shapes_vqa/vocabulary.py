"""The tokenizers of the small LLaVA: every word of the data set is one token."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, LlamaTokenizer

from fsr_hf.demo.small_llava import word_tokenizer

from .data import words


__all__ = ["make_clip_tokenizer", "make_tokenizer"]


def make_tokenizer() -> LlamaTokenizer:
    """The tokenizer of the language model."""
    return word_tokenizer(["USER", "ASSISTANT", *words()], image_token="<image>")


def make_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, with merges that are learned from the words of the data set."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sorted({word.lower() for word in words()}), trainer)
    learned = tokenizer.get_vocab(with_added_tokens=False)
    tokens = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet)])
    tokens |= dict.fromkeys(sorted(learned, key=learned.__getitem__))
    tokens |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
