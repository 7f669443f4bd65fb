"""
Files of a folder that somebody else made: which of them are read, where they have to lie, and what their JSON may say.
"""

import json
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


__all__ = ["check_sizes", "find_file", "foreign_code", "is_known", "known_files", "read_json"]

_TOKENIZER_FILES = (
    *("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "vocab.json", "vocab.txt"),
)
# What a checkpoint of ours holds beside weights, config and code: a file of another name stays where it is.
_READ_BY_LOADERS = (
    *_TOKENIZER_FILES,
    *(f"query_tokenizer/{name}" for name in _TOKENIZER_FILES),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
# ... and what is written for people.
_READ_BY_PEOPLE = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt", "USE_POLICY.md")
_COUNTS = ("depth", "num_hidden_layers")
_SIZES = (
    *_COUNTS,
    *("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_heads", "num_key_value_heads"),
    *("patch_size", "vocab_size"),
)


def read_json(file: Path) -> dict[str, Any]:
    """
    The object in a JSON file.

    Raises:
        `ValueError`: naming the file, if it holds anything else.
    """
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}. Take the file from its source again.") from error
    if not isinstance(content, dict):
        kind = {list: "a list", str: "a string", type(None): "null", bool: "a truth value"}.get(
            type(content), "a number"
        )
        raise ValueError(f"{file} holds {kind}, but has to hold a JSON object: take the file from its source again.")
    return content


def find_file(folder: Path, name: str) -> Path:
    """
    The file called `name` in `folder`, which may be a link within it. In the cache of the Hub, where every file is a
    link, it may lie among the blobs of the same repository.

    Raises:
        `ValueError`: if it leads out of the folder.
    """
    root = folder.resolve()
    in_cache = re.search(r"^(.*/models--[^/]+)/snapshots/[^/]+$", root.as_posix())
    roots = [root, Path(in_cache[1]) / "blobs"] if in_cache else [root]
    try:
        file = (folder / name).resolve()
    except RuntimeError as error:  # a link to itself
        raise ValueError(f"{folder / name} is a link to itself: remove it.") from error
    if not any(file.is_relative_to(root) for root in roots):
        raise ValueError(
            f"{folder / name} leads out of the folder, to {file}: put the file itself there, or remove the link."
        )
    return folder / name


def known_files(folder: Path) -> list[str]:
    """
    The files of a checkpoint that an export copies, as paths within `folder`: a list of known names.

    Raises:
        `ValueError`: if one of them leads out of the folder.
    """
    patterns = (*_READ_BY_LOADERS, *_READ_BY_PEOPLE)
    names = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    return sorted(name for name in names if find_file(folder, name).is_file())


def is_known(name: str) -> bool:
    """Whether an export would copy a file of this name."""
    return any(fnmatchcase(name, pattern) for pattern in (*_READ_BY_LOADERS, *_READ_BY_PEOPLE))


def foreign_code(content: Any, auto_map: Mapping[str, str]) -> Iterator[str]:
    """
    Where the content of a JSON file sends a loader for code or weights that are not in the folder, at any depth.

    Args:
        content (`Any`): What the file holds.
        auto_map (`Mapping[str, str]`): The `auto_map` of the family; what names anything else is foreign.
    """
    pending = [content]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending += part
        for key, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, int):  # in a vocabulary, the number of the word `key`
                continue
            if key == "auto_map":
                if not isinstance(value, dict) or not value.items() <= auto_map.items():
                    yield f"`auto_map` names other code: {value}"
            elif key in ("audio_tokenizer", "custom_pipelines", "transformers_weights"):
                yield f"`{key}` names other code or weights: {value}"
            elif key.endswith("attn_implementation") and "/" in str(value):
                yield f"`{key}` names a kernel of the Hub: {value}"
            else:
                pending.append(value)


def check_sizes(file: Path, content: Any, num_tensors: int) -> None:
    """
    Checks the sizes in a `config.json`, at any depth: transformers divides by some of them, and builds as many layers
    as it says.

    Raises:
        `ValueError`: naming the field, if one is below 1, or if there are more layers than tensors in the weights.
    """
    pending = [("", content)]
    while pending:
        place, part = pending.pop()
        for key, value in part.items():
            if isinstance(value, dict):
                pending.append((f"{place}{key}.", value))
            elif key in _SIZES and isinstance(value, int | float) and value < 1:
                raise ValueError(f"{file}: `{place}{key}` is {value}, but has to be at least 1.")
            elif key in _COUNTS and isinstance(value, int | float) and value > num_tensors:
                raise ValueError(f"{file}: `{place}{key}` is {value}, but the weights are {num_tensors} tensors.")
