"""
A prompt without the dropped placeholders: which columns stay, ids, mask and positions, and the way back to the
caller's positions.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .fsr import VisualSelection


__all__ = [
    "CompressedPrompt",
    "VisualItem",
    "carry_states",
    "check_no_placeholders",
    "compact_positions",
    "infer_attention_mask",
    "place_items",
    "select_columns",
]


@dataclass
class VisualItem:
    """
    One image or video: what a family knows of it from shapes alone, and its place in the prompt. All tensors are on
    the CPU.

    Args:
        modality (`str`):
            `"image"` or `"video"`.
        grid (`torch.LongTensor` of shape `(placeholders, 3)`):
            View or frame, row and column of every placeholder; -1 for a newline.
        pools (`list[torch.LongTensor]`):
            Which placeholders of the item compete with each other. A placeholder in no pool (a newline) is no
            candidate, and is dropped when the item is pruned.
        run_lengths (`list[int]`, *optional*):
            Placeholders of each of its runs. By default they are one run.
        row (`int`, *optional*):
            Row of the batch, filled in by [`place_items`].
        columns (`torch.LongTensor` of shape `(placeholders,)`, *optional*):
            Columns of its placeholders, filled in by [`place_items`].
    """

    modality: str
    grid: torch.Tensor
    pools: list[torch.Tensor]
    run_lengths: list[int] = field(default_factory=list)
    row: int = -1
    columns: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def __post_init__(self):
        self.run_lengths = self.run_lengths or [len(self.grid)]

    @property
    def length(self) -> int:
        """Placeholders of the item."""
        return len(self.grid)

    @property
    def num_candidates(self) -> int:
        """Tokens that can be kept or dropped."""
        return sum(len(pool) for pool in self.pools)


def place_items(input_ids: torch.Tensor, items: list[VisualItem], token_ids: dict[str, int]) -> list[VisualItem]:
    """
    Find the placeholders that each item fills, in the order of the batch.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`):
            The prompt, on the CPU.
        items (`list[VisualItem]`):
            The images and videos, each modality in the order of its pixels.
        token_ids (`dict[str, int]`):
            The placeholder of each modality.

    Returns:
        The same items with `row` and `columns`, in the order of the prompt.

    Raises:
        ValueError: if the numbers differ, an item would cross into another row, or its placeholders are not the runs
            that it needs.
    """
    for modality, token_id in token_ids.items():
        members = [item for item in items if item.modality == modality]
        is_placeholder = input_ids == token_id
        rows, columns = is_placeholder.nonzero(as_tuple=True)
        lengths = [item.length for item in members]
        if len(rows) != sum(lengths):
            raise ValueError(
                f"{modality.capitalize()} features and {modality} tokens do not match: the prompt has {len(rows)} "
                f"placeholders (id {token_id}; by row: {is_placeholder.sum(-1).tolist()}), but the {len(lengths)} "
                f"{modality}s need {sum(lengths)} (each: {lengths}). Build both with the model's processor, and do "
                "not truncate the prompt."
            )
        for number, (item, item_rows, item_columns) in enumerate(
            zip(members, rows.split(lengths), columns.split(lengths))
        ):
            item.row, item.columns = int(item_rows[0]), item_columns
            starts = item_columns[torch.tensor([0, *item.run_lengths[:-1]]).cumsum(0)]
            for start, length, found in zip(starts.tolist(), item.run_lengths, item_columns.split(item.run_lengths)):
                if int(item_rows[-1]) != item.row or int(found[-1]) != start + length - 1:
                    raise ValueError(
                        f"{modality.capitalize()} tokens do not match the {modality}s: {modality} {number} needs one "
                        f"run of {length} placeholders (id {token_id}), but from row {item.row}, column {start} on "
                        "there is a shorter one."
                    )
    return sorted(items, key=lambda item: (item.row, int(item.columns[0])))


@dataclass
class CompressedPrompt:
    """
    The prompt that the language model sees.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, compressed_length)`):
            The caller's ids at the columns that stay. Slack on the left of a shorter row repeats one of its ids, so
            that no id is new to a row.
        attention_mask (`torch.LongTensor` of shape `(batch, compressed_length)`):
            The caller's mask, 0 at slack. Never `None`: positions with gaps and no mask are read as packed sequences.
        position_ids (`torch.LongTensor` of shape `(..., batch, compressed_length)`):
            Positions.
        mm_encoder_outputs (`dict[str, ModelOutput]`):
            The kept visual tokens of each modality, as the stock model takes features that were computed ahead.
        columns (`torch.LongTensor` of shape `(batch, compressed_length)`):
            The caller's column of each column, -1 for slack.
        num_features (`int`):
            Kept visual tokens of the batch.
        is_padded (`bool`):
            Whether the mask has a 0.
        pruned_rows (`torch.BoolTensor` of shape `(batch,)`):
            Rows that lost a token, on the CPU.
        selections (`list[VisualSelection]`, *optional*):
            What was kept of each image or video, if asked for.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    mm_encoder_outputs: dict
    columns: torch.Tensor
    num_features: int
    is_padded: bool
    pruned_rows: torch.Tensor
    selections: list[VisualSelection] | None = None


def select_columns(
    attention_mask: torch.Tensor,
    items: list[VisualItem],
    kept: list[int],
    indices: torch.Tensor,
    starts: list[int],
    with_slack: bool = False,
) -> torch.Tensor:
    """
    The columns that stay: what the mask lets through from `starts` on, less the placeholders that were dropped. Rows
    end together; padding at either end of a row goes, and slack fills shorter rows on the left.

    Args:
        attention_mask (`torch.LongTensor` of shape `(batch, length)`):
            The caller's mask, on the CPU.
        items (`list[VisualItem]`):
            The images and videos, placed.
        kept (`list[int]`):
            How many tokens each item keeps.
        indices (`torch.LongTensor` of shape `(sum(kept),)`):
            Which of its placeholders, item by item. The only argument on the device: nothing waits for its values.
        starts (`list[int]`):
            The first column of each row that counts.
        with_slack (`bool`, *optional*, defaults to `False`):
            Whether every row begins with a column of slack.

    Returns:
        `torch.LongTensor` of shape `(batch, compressed_length)`: ascending columns of each row, after -1 for slack.
    """
    rows, unknown = [], -2
    for row, (mask, start) in enumerate(zip(attention_mask, starts)):
        is_text = torch.ones_like(mask, dtype=torch.bool)
        number = 0
        for item, count in zip(items, kept):
            if item.row == row:
                is_text[item.columns] = False
                number += count
        attended = ((mask != 0) | ~is_text).nonzero()[:, 0]
        attended = attended[attended >= start]
        columns = torch.arange(int(attended[0]), int(attended[-1]) + 1) if len(attended) else attended
        rows.append(torch.cat([columns[is_text[columns]], columns.new_full((number,), unknown)]))
    width = max(1, *map(len, rows)) + with_slack
    columns = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=-1) for row in rows])

    slots = (columns.flatten() == unknown).nonzero()[:, 0]
    # In the order of the batch, as the slots are.
    item_columns = torch.cat([item.columns for item in items]) if items else columns.new_empty(0)
    offsets = (
        torch.tensor([0, *(item.length for item in items)])[:-1]
        .cumsum(0)
        .repeat_interleave(torch.tensor(kept, dtype=torch.long))
    )
    columns, slots, item_columns, offsets = (
        tensor.to(indices.device, non_blocking=True) for tensor in (columns, slots, item_columns, offsets)
    )
    kept_columns = item_columns[offsets + indices] if items else item_columns
    return columns.flatten().index_copy(0, slots, kept_columns).view_as(columns).sort(-1).values


def carry_states(hidden_states: torch.Tensor, columns: torch.Tensor, length: int) -> torch.Tensor:
    """
    Hidden states at the caller's positions: each dropped one holds the state of the last kept position before it, so
    that whoever reads logits there reads what the language model says after the prefix so far.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch, compressed_length, hidden_size)`):
            States of the compressed prompt.
        columns (`torch.LongTensor` of shape `(batch, compressed_length)`):
            The caller's column of each, ascending after -1 for slack.
        length (`int`):
            Length of the caller's prompt.

    Returns:
        `torch.FloatTensor` of shape `(batch, length, hidden_size)`; before the first kept position, that one's state.
    """
    positions = torch.arange(length, device=columns.device).expand(len(columns), -1)
    source = torch.searchsorted(columns.contiguous(), positions.contiguous(), right=True) - 1
    first = (columns < 0).sum(-1, keepdim=True).clamp(max=columns.shape[1] - 1)
    source = torch.maximum(source, first).to(hidden_states.device)
    return hidden_states.gather(1, source[..., None].expand(-1, -1, hidden_states.shape[-1]))


def compact_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count what the mask lets through: `(batch, length)`."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def infer_attention_mask(input_ids: torch.Tensor, pad_token_id: int | None, eos_token_id: Any) -> torch.Tensor:
    """The mask that transformers would infer: from padding, if the prompt has any and it is not EOS."""
    eos = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    if pad_token_id is None or pad_token_id in eos:
        return torch.ones_like(input_ids)
    return input_ids.ne(pad_token_id).long()


def check_no_placeholders(
    input_ids: torch.Tensor, starts: list[int], token_ids: dict[str, int], pixel_inputs: tuple[str, ...]
) -> None:
    """
    Reject placeholders from the columns `starts` on, in a prompt `(batch, length)` without pixels.

    Raises:
        ValueError: if there is one.
    """
    ids = list(token_ids.values())
    is_placeholder = torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))
    count = sum(int(row[start:].sum()) for row, start in zip(is_placeholder, starts))
    if count:
        raise ValueError(
            f"The prompt has {count} placeholders (ids {ids}) but there are no pixels "
            f"({', '.join(f'`{name}`' for name in pixel_inputs)}) to fill them. Pass what the processor returns, "
            "whole."
        )
