"""A prompt without the dropped placeholders: columns, ids, mask, positions, and the way back to the caller's."""

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
    "starts_of",
]

# Sampling may draw a placeholder, which no picture fills when the answer comes back in a prompt.
_ADVICE_IF_WRITTEN = (
    " If the model wrote one in an answer, take it out and start without a cache; `suppress_tokens={}` keeps "
    "`generate()` from writing any."
)


@dataclass
class VisualItem:
    """
    One image or video: what a family knows of it from shapes alone, and its place in the prompt. All tensors are on
    the CPU. A placeholder in no pool (a newline) is no candidate, and is dropped when the item is pruned.
    """

    modality: str  # "image" or "video"
    grid: torch.Tensor  # [placeholders, 3]: view or frame, row and column of each; -1 for a newline
    pools: list[torch.Tensor]  # which placeholders of the item compete with each other
    run_lengths: list[int] = field(default_factory=list)  # placeholders of each of its runs; by default one run
    row: int = -1  # row of the batch, filled in by `place_items`
    columns: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # of its placeholders, too

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


def starts_of(lengths: list[int]) -> torch.Tensor:
    """Where each of several parts begins that stand one after the other."""
    return torch.tensor([0, *lengths])[:-1].cumsum(0)


def place_items(input_ids: torch.Tensor, items: list[VisualItem], token_ids: dict[str, int]) -> list[VisualItem]:
    """
    Find the placeholders of the prompt `(batch, length)`, on the CPU, that each item fills. The items come in the
    order of their pixels, and return with `row` and `columns`, in the order of the prompt. `ValueError` if the numbers
    differ, an item would cross into another row, or its placeholders are not the runs that it needs.
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
                f"{modality}s need {sum(lengths)} (each: {lengths}). Build both by the processor, without truncation."
                + (_ADVICE_IF_WRITTEN.format([token_id]) if len(rows) > sum(lengths) else "")
            )
        parts = zip(members, rows.split(lengths), columns.split(lengths))
        for number, (item, item_rows, item_columns) in enumerate(parts):
            item.row, item.columns = int(item_rows[0]), item_columns
            for found in item_columns.split(item.run_lengths):
                start, length = int(found[0]), len(found)
                if int(item_rows[-1]) != item.row or int(found[-1]) != start + length - 1:
                    raise ValueError(
                        f"{modality.capitalize()} tokens do not match the {modality}s: {modality} {number} needs one "
                        f"run of {length} placeholders (id {token_id}) from row {item.row}, column {start} on."
                    )
    return sorted(items, key=lambda item: (item.row, int(item.columns[0])))


@dataclass
class CompressedPrompt:
    """The prompt that the language model sees. Slack fills shorter rows on the left."""

    # [batch, compressed_length]. Slack repeats an id of its row, so that no id is new to a row.
    input_ids: torch.Tensor
    # [batch, compressed_length], 0 at slack. Never `None`: without a mask, gaps in positions mean packed sequences.
    attention_mask: torch.Tensor
    position_ids: torch.Tensor  # [..., batch, compressed_length]
    pruned_rows: torch.Tensor  # [batch], on the CPU: rows that lost a token
    mm_encoder_outputs: dict[str, Any] = field(default_factory=dict)  # the kept visual tokens of each modality
    columns: Any = None  # [batch, compressed_length]: the caller's column of each, -1 for slack
    num_features: int = 0  # kept visual tokens of the batch
    is_padded: bool = False  # whether the mask has a 0
    selections: list[VisualSelection] | None = None  # of each image or video, if asked for


def select_columns(
    attention_mask: torch.Tensor,
    items: list[VisualItem],
    kept: list[int],
    indices: torch.Tensor,
    starts: list[int],
    with_slack: bool = False,
) -> tuple[torch.Tensor, bool]:
    """
    The columns that stay: what the mask lets through from `starts` on, less the placeholders that were dropped. Rows
    end together; padding at either end of a row goes, and slack fills shorter rows on the left.

    All arguments are on the CPU but `indices`, whose values nothing waits for: of the tokens that the placed `items`
    keep, `kept` of each, the places among its placeholders, `(sum(kept),)`. Returns ascending columns of each row,
    `(batch, compressed_length)`, after -1 for slack (one at least, `with_slack`); and whether there is slack, or a
    masked column between words.
    """
    rows, unknown, is_padded = [], -2, False
    for row, (mask, start) in enumerate(zip(attention_mask, starts)):
        own = [(item, count) for item, count in zip(items, kept) if item.row == row]
        is_text = torch.ones_like(mask, dtype=torch.bool)
        for item, _ in own:
            is_text[item.columns] = False
        attended = ((mask != 0) | ~is_text).nonzero()[:, 0]
        attended = attended[attended >= start]
        columns = torch.arange(int(attended[0]), int(attended[-1]) + 1) if len(attended) else attended
        columns = columns[is_text[columns]]
        is_padded |= not mask[columns].all()
        rows.append(torch.cat([columns, columns.new_full((sum(count for _, count in own),), unknown)]))
    width = max(1, *map(len, rows)) + with_slack
    is_padded |= any(len(row) < width for row in rows)
    columns = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=-1) for row in rows])

    slots = (columns.flatten() == unknown).nonzero()[:, 0]  # in the order of the batch, as the items are
    item_columns = torch.cat([columns.new_empty(0), *(item.columns for item in items)])
    offsets = starts_of([item.length for item in items]).repeat_interleave(torch.tensor(kept, dtype=torch.long))
    columns, slots, item_columns, offsets = (
        tensor.to(indices.device, non_blocking=True) for tensor in (columns, slots, item_columns, offsets)
    )
    filled = columns.flatten().index_copy(0, slots, item_columns[offsets + indices])
    return filled.view_as(columns).sort(-1).values, bool(is_padded)


def carry_states(hidden_states: torch.Tensor, columns: torch.Tensor, length: int) -> torch.Tensor:
    """
    Hidden states at the caller's positions, `(batch, length, hidden_size)`: each dropped one holds the state of the
    last kept position before it (the first kept one's, if none is), so that whoever reads logits there reads what the
    language model says after the prefix so far. `hidden_states` are those of the compressed prompt, `columns` its
    columns, ascending after -1 for slack.
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
    """Reject placeholders from the columns `starts` on, in a prompt `(batch, length)` without pixels."""
    ids = list(token_ids.values())
    is_placeholder = torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))
    if count := sum(int(row[start:].sum()) for row, start in zip(is_placeholder, starts)):
        names = ", ".join(f"`{name}`" for name in pixel_inputs)
        raise ValueError(
            f"The prompt has {count} placeholders (ids {ids}) but there are no pixels ({names}) to fill them. Pass "
            "what the processor returns, whole." + _ADVICE_IF_WRITTEN.format(ids)
        )
