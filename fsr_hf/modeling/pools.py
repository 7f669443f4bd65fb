"""Pools: which tokens of an image or video compete with each other, and what each item keeps in the end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..configuration.configuration_fsr import SELECTION_FIELDS
from .fsr import VisualSelection, refine_like
from .prompt import VisualItem, starts_of


__all__ = ["KeptTokens", "VisualTokens", "select_from_items", "split_budget"]


@dataclass
class VisualTokens:
    """The visual tokens of some items, and their scores."""

    features: list[torch.Tensor]  # of each item, what the stock model puts into its placeholders: [placeholders, D]
    saliency: torch.Tensor  # [placeholders of all items], Eq. 1; any number where there is no candidate
    relevance: torch.Tensor | None = None  # the same for Eq. 2, higher for what is more relevant
    # Of each item, what else the language model reads for its placeholders, [placeholders, size]: kept and merged as
    # the features are, without a part in the choice.
    companions: list[torch.Tensor] | None = None


@dataclass
class KeptTokens:
    """What the items keep."""

    indices: torch.Tensor  # [sum(counts)]: the kept placeholders of each item, ascending, item by item
    features: torch.Tensor  # [sum(counts), D + size]: their tokens and companions after Refine
    counts: list[int]  # how many each item keeps
    selections: list[VisualSelection] | None = None  # one for each item, if asked for


def split_budget(budget: int, sizes: list[int]) -> list[int]:
    """`budget` tokens over pools in proportion to their sizes: largest remainder, ties to the earlier pool."""
    total = sum(sizes)
    shares = [budget * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda pool: -(budget * sizes[pool] % total))
    for pool in by_remainder[: budget - sum(shares)]:
        shares[pool] += 1
    return shares


def select_from_items(
    tokens: VisualTokens,
    items: list[VisualItem],
    budgets: list[int],
    fsr: Any,
    selector: Callable[..., VisualSelection],
    return_selections: bool,
) -> KeptTokens:
    """
    Select within every pool by `selector`, [`select_visual_tokens`] or what stands for it, and put the pools of an
    item together again. An item within its budget stays whole; it has a [`VisualSelection`], too, if they are asked
    for. `fsr` is the [`FSRConfig`].
    """
    features = wide = torch.cat(tokens.features)
    if tokens.companions is not None:
        wide = torch.cat([features, torch.cat(tokens.companions)], dim=-1)
    device = features.device
    lengths = [item.length for item in items]
    starts = starts_of(lengths).tolist()
    is_pruned = [budget < item.num_candidates for item, budget in zip(items, budgets)]
    # The pools that are selected from, in placeholders of all items, and their shares of the budgets.
    pools, shares = list[torch.Tensor](), list[int]()
    rows: dict[int, range] = {}  # the pools of each item
    for number, (item, budget) in enumerate(zip(items, budgets)):
        if is_pruned[number] or return_selections:
            rows[number] = range(len(pools), len(pools) + len(item.pools))
            pools += [pool + starts[number] for pool in item.pools]
            shares += split_budget(min(budget, item.num_candidates), [len(pool) for pool in item.pools])
    if not pools:
        indices = torch.cat([torch.arange(length) for length in lengths])
        return KeptTokens(indices.to(device, non_blocking=True), wide, lengths)

    sizes = [len(pool) for pool in pools]
    places = pad_sequence(pools, batch_first=True).to(device, non_blocking=True)  # [pools, tokens]
    if len(set(shares)) == 1 and set(sizes) == {places.shape[1]}:
        mask, budget, max_budget = None, shares[0], None
    else:
        limits = torch.tensor(sizes).to(device, non_blocking=True)[:, None]
        mask = torch.arange(places.shape[1], device=device) < limits
        budget, max_budget = torch.tensor(shares).to(device, non_blocking=True), max(shares)
    selection = selector(
        features[places],
        tokens.saliency.to(device)[places],
        None if tokens.relevance is None else tokens.relevance.to(device)[places],
        budget,
        mask=mask,
        max_num_visual_tokens=max_budget,
        **{name: getattr(fsr, name) for name in SELECTION_FIELDS},
    )
    kept_features = selection.features  # [pools, width, D]
    if tokens.companions is not None:
        companions = refine_like(selection, wide[:, features.shape[-1] :][places], fsr.kappa)
        kept_features = torch.cat([kept_features, companions], dim=-1)
    kept_places = places.gather(1, selection.indices.clamp(min=0))

    # How many tokens of a pool are kept is known on the host. Those of an item are then put in its order.
    all_places, all_features, counts = [], [], []
    for number, length in enumerate(lengths):
        if is_pruned[number]:
            all_places += [kept_places[row, : shares[row]] for row in rows[number]]
            all_features += [kept_features[row, : shares[row]] for row in rows[number]]
        else:
            end = starts[number] + length
            all_places.append(torch.arange(starts[number], end, device=device))
            all_features.append(wide[starts[number] : end].to(kept_features.dtype))
        counts.append(budgets[number] if is_pruned[number] else length)
    place = torch.cat(all_places)
    order = place.argsort()
    first = torch.tensor(starts).repeat_interleave(torch.tensor(counts)).to(device, non_blocking=True)
    selections = None
    if return_selections:
        selections = [
            _item_selection(selection, places - start, kept_places - start, sizes, shares, rows[number], item)
            for number, (item, start) in enumerate(zip(items, starts))
        ]
    return KeptTokens(place[order] - first, torch.cat(all_features)[order], counts, selections)


def _item_selection(selection, places, kept_places, sizes, shares, rows, item) -> VisualSelection:
    """The [`VisualSelection`] of one image or video, whose pools are `rows`, in placeholders of the item."""
    order = torch.cat([kept_places[row, : shares[row]] for row in rows]).argsort()
    indices, is_focus, features = (
        torch.cat([values[row, : shares[row]] for row in rows])[order]
        for values in (kept_places, selection.is_focus, selection.features)
    )
    priority = torch.zeros(item.length, device=places.device)
    merged_into = torch.full((item.length,), -1, device=places.device)
    for row in rows:
        own, anchor = places[row, : sizes[row]], selection.merged_into[row, : sizes[row]]
        priority[own] = selection.priority[row, : sizes[row]]
        merged_into[own] = own[anchor.clamp(min=0)].where(anchor >= 0, -1)
    return VisualSelection(indices, is_focus, features, priority, merged_into, item.grid, item.modality, item.row)
