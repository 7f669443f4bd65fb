"""
The part of a model that makes visual tokens, run by transformers: towers, projector, scores and selection, without the
language model. Nothing here knows vLLM.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..hub.families import FAMILIES
from ..modeling.pools import VisualTokens, select_from_items
from ..modeling.prompt import VisualItem
from ..modeling.relevance import CLIPRelevance


__all__ = ["KeptItem", "TowerCache", "VisualEncoder", "build_inner", "item_positions"]


class _PatchVectors(CLIPRelevance):
    """As CLIPRelevance, but leaves the product with the question to the caller: patches serve many questions."""

    def forward(self, patches: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return self.embed_patches(patches)


def build_inner(config: Any) -> Any:
    """The inner FSR model of a config (`FSRLlavaModel`, ...) with an empty language model, of random weights."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, None
    (outer,) = (family.model for family in FAMILIES if family.config.model_type == config.model_type)
    inner = outer.inner_class(config)
    del inner.language_model
    if inner.text_encoder is not None:
        inner.text_encoder = _PatchVectors(config.fsr_config.text_encoder_config, config.vision_config.hidden_size)
    return inner.eval().requires_grad_(False)


def item_positions(inner: Any, item: VisualItem, visual: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """
    Where the placeholders of an unpruned image or video stand.

    Args:
        inner (`FSRModelMixin`):
            From [`build_inner`].
        item (`VisualItem`):
            The image or video.
        visual (`dict`):
            Its own visual inputs.

    Returns:
        Positions after the token before it, `(axes, placeholders)`, and how many positions the text after it is on.
    """
    ids = torch.full((1, item.length + 2), -1)
    ids[0, 1:-1] = inner.placeholder_ids[item.modality]
    positions = inner.full_position_ids(ids, torch.ones_like(ids), **visual).reshape(-1, ids.shape[1])
    start = positions[:, :1] + 1
    return positions[:, 1:-1] - start, int(positions[0, -1] - start[0, 0])


@dataclass
class KeptItem:
    """
    What an image or a video keeps.

    Args:
        features (`torch.FloatTensor` of shape `(num_kept, hidden_size)`):
            Its tokens after Refine; features of earlier blocks follow in the same rows, where a family has them.
        indices (`torch.LongTensor` of shape `(num_kept,)`):
            Which of its placeholders they are, ascending.
    """

    features: torch.Tensor
    indices: torch.Tensor


class TowerCache:
    """
    Visual tokens and scores of the last pictures and videos, so that a new question about one does not run the tower
    again. They lie in the memory of the host: what the device has left belongs to the KV cache.

    Args:
        max_bytes (`int`):
            The most that it holds; what was used longest ago goes first. 0 turns it off.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._entries: OrderedDict[bytes, VisualTokens] = OrderedDict()

    def get(self, key: bytes, device: torch.device) -> VisualTokens | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return _move(self._entries[key], device)

    def put(self, key: bytes, tokens: VisualTokens) -> None:
        size = sum(tensor.nbytes for tensor in _tensors(tokens))
        if size > self.max_bytes or key in self._entries:
            return
        # A copy of its own: the tensors may be views into those of a whole batch.
        self._entries[key] = _move(tokens, torch.device("cpu"), copy=True)
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= sum(tensor.nbytes for tensor in _tensors(oldest))

    def __len__(self) -> int:
        return len(self._entries)


def _tensors(tokens: VisualTokens) -> list[torch.Tensor]:
    parts = [*tokens.features, tokens.saliency, tokens.relevance, *(tokens.companions or ())]
    return [part for part in parts if part is not None]


def _move(tokens: VisualTokens, device: torch.device, copy: bool = False) -> VisualTokens:
    def move(tensor):
        return None if tensor is None else tensor.detach().to(device, copy=copy)

    return VisualTokens(
        [move(tokens.features[0])],
        move(tokens.saliency),
        move(tokens.relevance),
        None if tokens.companions is None else [move(tokens.companions[0])],
    )


class VisualEncoder:
    """
    From pixels to the kept tokens of a batch of images or videos, each with a budget and a question of its own.

    Args:
        inner (`FSRModelMixin`):
            From [`build_inner`], with its weights.
        max_tokens (`int`):
            Unpruned tokens that the tower makes at once, at least one item: the caller counts kept ones, and would
            hand over as many more as are dropped.
        cache_bytes (`int`):
            See [`TowerCache`].
        take_items (`Callable`, *optional*):
            In place of `inner.take_items`.
    """

    def __init__(self, inner: Any, max_tokens: int, cache_bytes: int, take_items: Callable | None = None):
        self.inner, self.max_tokens = inner, max_tokens
        self.cache = TowerCache(cache_bytes)
        self.take_items = take_items or inner.take_items
        # Items that went through the tower.
        self.num_encoded = 0

    @torch.no_grad()
    def __call__(
        self,
        visual: dict[str, Any],
        budgets: list[int],
        keys: list[bytes],
        query: torch.Tensor | None = None,
    ) -> list[KeptItem]:
        """
        Args:
            visual (`dict`):
                Visual inputs of images or of videos, as the inner model takes them.
            budgets (`list[int]`):
                Tokens that each item may keep.
            keys (`list[bytes]`):
                Of each item: equal for equal visual inputs.
            query (`torch.FloatTensor` of shape `(items, projection_dim)`, *optional*):
                The question of each item, from [`~CLIPRelevance.encode_query`].

        Returns:
            `list[KeptItem]`: one for each item.
        """
        items = self.inner.build_items(**visual)
        if not len(items) == len(budgets) == len(keys):
            raise ValueError(f"{len(items)} images or videos have {len(budgets)} budgets and {len(keys)} keys.")
        tokens = self._encode(items, visual, keys)
        relevance = None
        if query is not None:
            relevance = torch.cat([part.relevance @ question for part, question in zip(tokens, query)])
        joined = VisualTokens(
            [part.features[0] for part in tokens],
            torch.cat([part.saliency for part in tokens]),
            relevance,
            None if tokens[0].companions is None else [part.companions[0] for part in tokens],  # type: ignore[index]
        )
        fsr = self.inner.config.fsr_config
        kept = select_from_items(joined, items, budgets, fsr, self.inner.selector, False)
        return [KeptItem(*parts) for parts in zip(kept.features.split(kept.counts), kept.indices.split(kept.counts))]

    def _encode(self, items: list[VisualItem], visual: dict[str, Any], keys: list[bytes]) -> list[VisualTokens]:
        device = next(self.inner.parameters()).device
        found: dict[bytes, VisualTokens] = {}
        missing: dict[bytes, int] = {}  # one number for pictures that are the same
        for number, key in enumerate(keys):
            tokens = self.cache.get(key, device)
            if tokens is not None:
                found[key] = tokens
            else:
                missing.setdefault(key, number)
        for numbers in self._parts(items, missing.values()):
            encoded = self._run([items[number] for number in numbers], numbers, visual)
            for number, tokens in zip(numbers, encoded):
                found[keys[number]] = tokens
                self.cache.put(keys[number], tokens)
        return [found[key] for key in keys]

    def _parts(self, items: list[VisualItem], numbers: Iterable[int]) -> list[list[int]]:
        parts: list[list[int]] = []
        room = 0
        for number in numbers:
            if items[number].length > room:
                parts.append([])
                room = max(self.max_tokens, items[number].length)
            parts[-1].append(number)
            room -= items[number].length
        return parts

    def _run(self, items: list[VisualItem], numbers: list[int], visual: dict[str, Any]) -> list[VisualTokens]:
        taken: dict[str, list[int]] = {modality: [] for modality in self.inner.placeholder_ids}
        taken[items[0].modality] = numbers
        for item in items:
            item.row = 0
        self.num_encoded += len(items)
        # `_PatchVectors` reads no question; that there is one asks for its vectors.
        query = torch.zeros(1, 0) if self.inner.config.fsr_config.uses_relevance else None
        tokens, _ = self.inner.encode_items(items, query, **self.take_items(taken, **visual))
        lengths = [item.length for item in items]
        parts = zip(
            tokens.features,
            tokens.saliency.split(lengths),
            [None] * len(items) if tokens.relevance is None else tokens.relevance.split(lengths),
            [None] * len(items) if tokens.companions is None else tokens.companions,
        )
        return [
            VisualTokens([features], saliency, relevance, None if companions is None else [companions])
            for features, saliency, relevance, companions in parts
        ]
