"""What a cache remembers of the compressed prompt in it: conversations and a caller's own loop go on from there."""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch


__all__ = [
    "Conversation",
    "continue_positions",
    "forget",
    "get_conversation",
    "remember",
    "remember_positions",
]

_NEXT_POSITION = "fsr_position_offset"
_CONVERSATION = "fsr_conversation"


@dataclass
class Conversation:
    """The sequences whose keys and values are in a cache."""

    caller_ids: torch.Tensor  # [batch, caller_length]: what the caller has seen, whole prompts and answers
    caller_mask: torch.Tensor  # [batch, caller_length]
    input_ids: torch.Tensor  # [batch, cached]: what the cache holds of them
    attention_mask: torch.Tensor  # [batch, cached]
    position_ids: torch.Tensor  # [..., batch, cached]
    pruned_rows: torch.Tensor  # [batch], on the CPU: rows that lost a token
    num_uncached: int  # how many of the last of `caller_ids` are not in the cache: the last new token never ran
    num_new: int  # how many of the last of `caller_ids` were generated
    end_ids: list[int]  # EOS and padding, which a row that ended early has behind its answer
    fingerprint: torch.Tensor | None = None  # [batch, size]: the last keys of the cache

    @property
    def length(self) -> int:
        """Entries of the cache."""
        return self.input_ids.shape[1]

    def match(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """
        Where the new part of the whole conversation, two tensors `(batch, length)` on the CPU, begins: the first new
        column of each row, and the mask `(batch, cached)` of what still counts in the cache. (A row that ended before
        the others has EOS or padding there that is no part of the conversation.) `ValueError` if a row does not begin
        with what the cache holds of it, or has nothing new.
        """
        if len(input_ids) != len(self.caller_ids):
            raise ValueError(
                f"`input_ids` has {len(input_ids)} rows, but the cache holds {len(self.caller_ids)}: a conversation "
                "goes on with the same rows in the same order."
            )
        old_ids, old_mask = self.caller_ids.cpu(), self.caller_mask.cpu()
        kept_mask = self.attention_mask.cpu().clone()
        starts = []
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask)):
            columns = mask.nonzero()[:, 0]
            new = ids[columns].tolist()
            old = old_ids[row][old_mask[row].bool()].tolist()
            old = old[: len(old) - self.num_uncached]
            required, answer = len(old), self.num_new - self.num_uncached
            while answer > 0 and old[required - 1] in self.end_ids:
                required, answer = required - 1, answer - 1
            common = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
            if common < required:
                found = new[common] if common < len(new) else "missing"
                raise ValueError(
                    f"`input_ids` does not begin with what the cache holds: in row {row}, token {common} of the "
                    f"conversation is {found}, but {old[common]} in the cache. Pass the whole conversation with the "
                    "answers as `generate` returned them, or leave the cache out."
                )
            if common == len(new):
                raise ValueError(f"`input_ids` has nothing after what the cache holds in row {row}.")
            entries = kept_mask[row].nonzero()[:, 0]
            kept_mask[row, entries[len(entries) - (len(old) - common) :]] = 0
            starts.append(int(columns[common]))
        return starts, kept_mask


def _fingerprint(cache: Any, length: int) -> torch.Tensor | None:
    """The last cached keys of each row in the last layer: `(batch, heads * head_dim)`."""
    keys = getattr(cache.layers[-1], "keys", None) if getattr(cache, "layers", None) else None
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4 or keys.shape[2] == 0:
        return None
    return keys[:, :, min(length, keys.shape[2]) - 1].detach().flatten(1).float().clone()


def remember(cache: Any, conversation: Conversation) -> None:
    """Keep `conversation` with the cache."""
    conversation.fingerprint = _fingerprint(cache, conversation.length)
    setattr(cache, _CONVERSATION, conversation)
    remember_positions(cache, conversation.position_ids)


def forget(cache: Any) -> None:
    """The cache holds something else now."""
    for name in (_CONVERSATION, _NEXT_POSITION):
        if hasattr(cache, name):
            delattr(cache, name)


def remember_positions(cache: Any, position_ids: torch.Tensor) -> None:
    """Keep where a caller's own loop goes on: the position of the next token, less its number in the cache."""
    setattr(cache, _NEXT_POSITION, position_ids[..., -1:] + 1 - position_ids.shape[-1])


def get_conversation(cache: Any) -> Conversation | None:
    """The conversation in a cache, `None` if FSR wrote none; `ValueError` if the cache is not as FSR left it."""
    if not hasattr(cache, _NEXT_POSITION) or not (entries := _entries(cache)):
        return None
    conversation = getattr(cache, _CONVERSATION, None)
    if conversation is None:
        _refuse("it was filled by `forward()` or by a call that returned several sequences for a prompt")
    if entries != conversation.length:
        _refuse(f"it has {entries} entries, but `generate` left {conversation.length}: it was cropped or added to")
    found, expected = _fingerprint(cache, entries), conversation.fingerprint
    if expected is not None and (
        found is None or found.shape != expected.shape or not torch.allclose(found, expected.to(found.device))
    ):
        _refuse("its keys are not those that `generate` left: it was reordered or written to")
    return conversation


def _entries(cache: Any) -> int:
    return int(cache.get_seq_length())


def _refuse(reason: str) -> NoReturn:
    raise ValueError(
        f"The conversation cannot go on from this cache: {reason}. Pass the whole conversation without a cache."
    )


def continue_positions(attention_mask: torch.Tensor | None, num_new: int, batch: int, cache: Any):
    """
    Positions `(..., batch, num_new)` of a step of a caller's own loop after a compressed prompt; `None` for a cache
    without one. (The stock class would count entries, or go on from what another call left behind.) `ValueError` if
    the mask is not as wide as the cache and the new tokens.
    """
    offset = getattr(cache, _NEXT_POSITION, None)
    if offset is None:
        return None
    cached = _entries(cache)
    if not cached:  # emptied, and used anew
        forget(cache)
        return None
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] != cached + num_new:
        raise ValueError(
            f"`attention_mask` has {attention_mask.shape[1]} columns, but the cache of the compressed prompt and the "
            f"new tokens have {cached + num_new}. Its columns are those of the cache, not of the caller's prompt."
        )
    offset = offset.repeat_interleave(batch // offset.shape[-2], dim=-2)
    return offset + torch.arange(cached, cached + num_new, device=offset.device)
