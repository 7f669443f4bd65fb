"""The tokenizers of the small LLaVA: every word of the data set is one token."""

from collections import Counter
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, LlamaTokenizer

from fsr_hf.testing.small_tokenizers import word_tokenizer

from .data import words


__all__ = ["make_clip_tokenizer", "make_tokenizer"]


def make_tokenizer() -> LlamaTokenizer:
    """The tokenizer of the language model."""
    return word_tokenizer(["USER", "ASSISTANT", *words()], image_token="<image>")


def make_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, with merges that are learned from the words of the data set."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(sorted({word.lower() for word in words()}))
    tokens = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)])
    tokens |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _learn_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """
    Byte-pair encoding, up to whole words: the most frequent pair first, of equally frequent ones the last in the
    alphabet. (The trainer of `tokenizers` breaks such ties in another way in every run.)
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges = []
    while counts := Counter(pair for parts in spelled for pair in pairwise(parts)):
        merge = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(merge)
        for parts in spelled:
            for place in range(len(parts) - 2, -1, -1):
                if tuple(parts[place : place + 2]) == merge:
                    parts[place : place + 2] = ["".join(merge)]
    return merges
