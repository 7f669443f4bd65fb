"""
Positions of kept tokens in a server that counts kept tokens: where text stands is known ahead from the sizes of the
images and videos, where a kept token stands once it is chosen. Tensors alone; vLLM's hooks are in `vllm_model`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


__all__ = ["PlacedItem", "pack_positions", "prompt_positions", "write_kept_positions"]

# A kept token's position travels to the language model as numbers beside its features. bfloat16 holds integers up to
# this one.
_BASE = 256


class PlacedItem(NamedTuple):
    """
    An image or a video in a prompt.

    Args:
        offset (`int`):
            Its first column.
        num_kept (`int`):
            Its columns.
        span (`int`):
            How many positions it takes.
    """

    offset: int
    num_kept: int
    span: int


def pack_positions(features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Put positions beside features.

    Args:
        features (`torch.FloatTensor` of shape `(num_kept, size)`):
            Of any dtype.
        positions (`torch.LongTensor` of shape `(axes, num_kept)`):
            Below 65,536.

    Returns:
        `torch.FloatTensor` of shape `(num_kept, size + 2 * axes)`.
    """
    digits = torch.cat([positions // _BASE, positions % _BASE]).T
    return torch.cat([features, digits.to(features)], dim=1)


def prompt_positions(length: int, items: Sequence[PlacedItem], axes: int) -> tuple[torch.Tensor, int]:
    """
    Positions of a prompt, in three rows, as vLLM keeps them.

    With three axes, these are time, height and width; those of kept tokens are still to come. With one axis, the first
    row has the positions. The second has the position that an image or video begins at, and the third the first
    position after the prompt, so that writing kept tokens into the first row twice does no harm.

    Args:
        length (`int`):
            Columns of the prompt.
        items (`list[PlacedItem]`):
            Its images and videos, by ascending offset.
        axes (`int`):
            1 or 3.

    Returns:
        `torch.LongTensor` of shape `(3, length)`, and what the positions of new tokens are ahead of their columns.
    """
    rows = torch.empty(length, dtype=torch.long)
    column = position = 0
    for offset, num_kept, span in items:
        rows[column:offset] = torch.arange(position, position + offset - column)
        position += offset - column
        rows[offset : offset + num_kept] = position
        column, position = offset + num_kept, position + span
    rows[column:] = torch.arange(position, position + length - column)
    end = position + length - column
    positions = rows.repeat(3, 1)
    if axes == 1:
        positions[2] = end
    return positions, end - length


def write_kept_positions(
    positions: torch.Tensor, is_visual: torch.Tensor, embeds: Sequence[torch.Tensor], num_computed: int, axes: int
) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """
    Take positions from beside features, and write them into those of the prompt.

    Args:
        positions (`torch.LongTensor` of shape `(3, length)`):
            From [`prompt_positions`], or from this function.
        is_visual (`torch.BoolTensor` of shape `(length,)`):
            Which columns are visual tokens.
        embeds (`list[torch.FloatTensor]`):
            Tokens as [`pack_positions`] made them: those of the visual columns from `num_computed` on, or the first of
            these, item by item.
        num_computed (`int`):
            Columns before.
        axes (`int`):
            1 or 3.

    Returns:
        The features, the positions, and what those of new tokens are ahead of their columns.
    """
    positions = positions.clone()
    length = positions.shape[1]
    if embeds:
        columns = is_visual.nonzero()[:, 0]
        columns = columns[columns >= num_computed][: sum(len(part) for part in embeds)]
        digits = torch.cat([part[:, -2 * axes :] for part in embeds]).to(positions.device).round().long().T
        offsets = digits[:axes] * _BASE + digits[axes:]
        if axes == 1:
            positions[0, columns] = positions[1, columns] + offsets[0]
        else:
            # The column before an image or a video is text: between two of them, there always is some.
            text = torch.where(is_visual, -1, torch.arange(length, device=is_visual.device)).cummax(0).values[columns]
            starts = torch.where(text < 0, 0, positions[0, text.clamp(min=0)] + 1)
            positions[:, columns] = starts + offsets
        embeds = [part[:, : -2 * axes] for part in embeds]
    end = int(positions[2, 0]) if axes == 1 else int(positions.max()) + 1
    return list(embeds), positions, end - length
