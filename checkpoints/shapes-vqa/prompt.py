# Generated from fsr_hf 0.1.0 (fsr_hf.modeling.prompt), do not edit.
"""
A prompt without the dropped placeholders: ids, mask, positions, labels, and the way back to the caller's positions.
"""

from dataclasses import dataclass

import torch


__all__ = ["CompressedPrompt", "PromptLayout", "VisualItem", "find_visual_items", "lay_out", "restore_logits"]


@dataclass
class VisualItem:
    """
    One image or video in the caller's prompt: a run of placeholders.

    Args:
        modality (`str`):
            `"image"` or `"video"`.
        row (`int`):
            Row of the batch.
        start (`int`):
            First column of the run.
        length (`int`):
            Placeholders in the run.
    """

    modality: str
    row: int
    start: int
    length: int


def find_visual_items(
    input_ids: torch.Tensor, token_id: int, lengths: list[int], modality: str = "image"
) -> list[VisualItem]:
    """
    Match the placeholders of a prompt with the images (or videos) that fill them, in the order of the batch.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`):
            The prompt, on the CPU.
        token_id (`int`):
            The placeholder.
        lengths (`list[int]`):
            Placeholders that each item needs.
        modality (`str`, *optional*, defaults to `"image"`):
            `"image"` or `"video"`.

    Raises:
        ValueError: if the numbers differ, an item would cross into another row, or its placeholders are not one run.
    """
    rows, columns = (input_ids == token_id).nonzero(as_tuple=True)
    found = len(rows)
    if found != sum(lengths):
        per_row = (input_ids == token_id).sum(-1).tolist()
        raise ValueError(
            f"{modality.capitalize()} features and {modality} tokens do not match: the prompt has {found} "
            f"placeholders (id {token_id}; by row: {per_row}), but the {len(lengths)} {modality}s need {sum(lengths)} "
            f"(each: {lengths}). Build both with the model's processor, and do not truncate the prompt."
        )
    items, first = [], 0
    for number, length in enumerate(lengths):
        last = first + length - 1
        row, start = int(rows[first]), int(columns[first])
        if int(rows[last]) != row or int(columns[last]) != start + length - 1:
            raise ValueError(
                f"{modality.capitalize()} tokens do not match the {modality}s: {modality} {number} needs one run of "
                f"{length} placeholders (id {token_id}), but from row {row}, column {start} on there is a shorter one."
            )
        items.append(VisualItem(modality, row, start, length))
        first = last + 1
    return items


@dataclass
class PromptLayout:
    """
    Where each column of the compressed prompt comes from.

    Args:
        columns (`torch.LongTensor` of shape `(batch, compressed_length)`):
            The caller's column of each column, -1 for slack.
        slots (`torch.LongTensor` of shape `(kept,)`):
            The visual tokens in the flattened `columns`, item by item.
    """

    columns: torch.Tensor
    slots: torch.Tensor

    @property
    def is_visual(self) -> torch.Tensor:
        """`torch.BoolTensor` of shape `(batch, compressed_length)`: the columns of visual tokens."""
        mask = torch.zeros_like(self.columns, dtype=torch.bool)
        return mask.flatten().index_fill(0, self.slots, True).view_as(mask)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """`values` `(..., batch, length)` of the caller's columns; slack gets that of column 0."""
        columns = self.columns.clamp(min=0)
        return values.gather(-1, columns.expand(*values.shape[:-1], -1))

    def attention_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """The mask `(batch, compressed_length)`: the caller's, and 0 at slack."""
        return self.gather(attention_mask).masked_fill(self.columns < 0, 0)

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """
        The labels `(batch, compressed_length)`: -100 at visual tokens and slack, and at the caller's first column,
        which no position predicts and which slack must not.
        """
        return self.gather(labels).masked_fill((self.columns <= 0) | self.is_visual, -100)

    def embeds(self, embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Embeddings `(batch, compressed_length, hidden_size)` with the kept visual tokens `(kept, hidden_size)`."""
        features = features.to(embeds.device, embeds.dtype)
        return embeds.flatten(0, 1).index_copy(0, self.slots.to(embeds.device), features).view_as(embeds)


def lay_out(
    attention_mask: torch.Tensor, items: list[VisualItem], kept: list[int], indices: torch.Tensor
) -> PromptLayout:
    """
    Lay out the compressed prompt. Rows end together, without the caller's trailing padding; as many of the leading
    padding columns are taken along as there is room for, and slack fills what is left. All but `indices` is known on
    the host.

    Args:
        attention_mask (`torch.LongTensor` of shape `(batch, length)`):
            The caller's mask, on the CPU.
        items (`list[VisualItem]`):
            The images and videos, by row and column.
        kept (`list[int]`):
            How many tokens each item keeps.
        indices (`torch.LongTensor` of shape `(sum(kept),)`):
            Which ones, as positions in the item's run, item by item.
    """
    batch, length = attention_mask.shape
    visual = -2
    rows = []
    for row in range(batch):
        parts, end = [], 0
        for item, number in zip(items, kept):
            if item.row == row:
                parts += [torch.arange(end, item.start), torch.full((number,), visual)]
                end = item.start + item.length
        rows.append(torch.cat([*parts, torch.arange(end, length)]))
    # A row loses the padding after it, and as much of the padding before it as it takes.
    spans = []
    for row, mask in zip(rows, attention_mask):
        attended = ((row == visual) | mask[row.clamp(min=0)].bool()).nonzero()
        spans.append((int(attended[0]), int(attended[-1]) + 1) if len(attended) else (len(row) - 1, len(row)))
    width = max(end - start for start, end in spans)
    columns = torch.full((batch, width), -1)
    for target, source, (_, end) in zip(columns, rows, spans):
        source = source[max(end - width, 0) : end]
        target[width - len(source) :] = source

    slots = (columns.flatten() == visual).nonzero()[:, 0]
    starts = torch.tensor([item.start for item in items]).repeat_interleave(torch.tensor(kept))
    columns, slots, starts = (tensor.to(indices.device, non_blocking=True) for tensor in (columns, slots, starts))
    return PromptLayout(columns.flatten().index_copy(0, slots, starts + indices).view_as(columns), slots)


@dataclass
class CompressedPrompt:
    """
    The prompt that the language model sees.

    Args:
        layout (`PromptLayout`):
            Where its columns come from.
        input_ids (`torch.LongTensor` of shape `(batch, compressed_length)`):
            The caller's ids; slack repeats the row's first id, so that no id is new to a row.
        inputs_embeds (`torch.FloatTensor` of shape `(batch, compressed_length, hidden_size)`):
            Their embeddings, with the kept visual tokens in their slots.
        attention_mask (`torch.LongTensor` of shape `(batch, compressed_length)`):
            The caller's mask, 0 at slack. Never `None`: positions with gaps and no mask are read as packed sequences.
        position_ids (`torch.LongTensor` of shape `(..., batch, compressed_length)`):
            Positions.
    """

    layout: PromptLayout
    input_ids: torch.Tensor
    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


def restore_logits(
    logits: torch.Tensor, columns: torch.Tensor, length: int, logits_to_keep: int | torch.Tensor
) -> torch.Tensor:
    """
    Logits at the caller's positions, zeros where a position was dropped.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, kept, vocab_size)`):
            Logits of the last `kept` columns of the compressed prompt.
        columns (`torch.LongTensor` of shape `(batch, compressed_length)`):
            The caller's column of each column, -1 for slack.
        length (`int`):
            Length of the caller's prompt.
        logits_to_keep (`int` or `torch.Tensor`):
            In the caller's positions: the last so many (0: all), or indices `(positions,)` or `(batch, positions)`, or
            a mask `(batch, length)`.
    """
    first = max(length - logits_to_keep, 0) if isinstance(logits_to_keep, int) and logits_to_keep > 0 else 0
    batch, kept, vocab_size = logits.shape
    # What has no place goes to a last column, which is cut off.
    target = columns[:, -kept:] - first
    target = target.where(target >= 0, length - first)
    rows = torch.arange(batch, device=logits.device)[:, None].expand_as(target)
    full = logits.new_zeros(batch, length - first + 1, vocab_size)
    full = full.index_put((rows, target.to(logits.device)), logits)[:, :-1]
    if isinstance(logits_to_keep, int):
        return full
    if logits_to_keep.dtype == torch.bool and logits_to_keep.ndim == 2:
        return full[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return full.take_along_dim(logits_to_keep[..., None], dim=1)
    return full[:, logits_to_keep]
