"""Tokenizers that are made without a download: LLaMA's, of a few hundred words, and CLIP's, of bytes."""

from collections.abc import Iterable

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, LlamaTokenizer


__all__ = ["WORDS", "byte_tokenizer", "word_tokenizer"]

# What the language model can say. A word is one token with the space before it.
WORDS = """
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


def word_tokenizer(words: Iterable[str] = WORDS, **special_tokens: str) -> LlamaTokenizer:
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


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without its merges: text in bytes, the last one of a word marked."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
