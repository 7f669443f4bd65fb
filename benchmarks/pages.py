"""Pages of the docs, whose tables come from results: `<!-- begin NAME -->`, what is generated, `<!-- end NAME -->`."""

import re
from collections.abc import Callable, Mapping


__all__ = ["fill"]


def fill(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """
    The page with its blocks written anew, and the words around them as they were.

    Raises:
        `ValueError`: if the page lacks a block, or has one that nothing fills.
    """
    names = re.findall(r"<!-- begin (\S+) -->", text)
    if sorted(names) != sorted(blocks):
        raise ValueError(f"the page must have each of these blocks once: {', '.join(blocks)}; it has {names}.")

    def write(match: re.Match) -> str:
        return f"<!-- begin {match[1]} -->\n{blocks[match[1]]()}\n<!-- end {match[1]} -->"

    return re.sub(r"<!-- begin (\S+) -->\n.*?<!-- end \1 -->", write, text, flags=re.DOTALL)
