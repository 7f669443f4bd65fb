"""Pools: which tokens of an image or video compete with each other, and what each item keeps in the end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .fsr import VisualSelection, refine_like
from .prompt import VisualItem


__all__ = ["KeptTokens", "VisualTokens", "select_from_items", "split_budget"]


@dataclass
class VisualTokens:
    """
    The visual tokens of some items, and their scores.

    Args:
        features (`list[torch.FloatTensor]`):
            For each item, what the stock model puts into its placeholders: `(placeholders, hidden_size)`.
        saliency (`torch.FloatTensor` of shape `(placeholders of all items,)`):
            Eq. 1, item by item. Any number where there is no candidate.
        relevance (`torch.FloatTensor` of shape `(placeholders of all items,)`, *optional*):
            Eq. 2, higher for what is more relevant.
        companions (`list[torch.FloatTensor]`, *optional*):
            For each item, what else the language model reads for its placeholders: `(placeholders, size)`. It is kept
            and merged as the features are, and has no part in the choice.
    """

    features: list[torch.Tensor]
    saliency: torch.Tensor
    relevance: torch.Tensor | None = None
    companions: list[torch.Tensor] | None = None


@dataclass
class KeptTokens:
    """
    What the items keep.

    Args:
        indices (`torch.LongTensor` of shape `(sum(counts),)`):
            The kept placeholders of each item, ascending, item by item.
        features (`torch.FloatTensor` of shape `(sum(counts), hidden_size)`):
            Their tokens after Refine; companions follow in the same rows, `(sum(counts), hidden_size + size)`.
        counts (`list[int]`):
            How many each item keeps.
        selections (`list[VisualSelection]`, *optional*):
            One for each item, if asked for.
    """

    indices: torch.Tensor
    features: torch.Tensor
    counts: list[int]
    selections: list[VisualSelection] | None = None


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
    Select within every pool, and put the pools of an item together again. An item within its budget stays whole.

    Args:
        budgets (`list[int]`):
            Tokens that each item may keep.
        fsr (`FSRConfig`):
            The hyper-parameters.
        selector (`Callable`):
            [`select_visual_tokens`], or what stands for it.
        return_selections (`bool`):
            Whether to make a [`VisualSelection`] for each item, also for those within their budget.
    """
    features = wide = torch.cat(tokens.features)
    if tokens.companions is not None:
        wide = torch.cat([features, torch.cat(tokens.companions)], dim=-1)
    device = features.device
    is_pruned = [budget < item.num_candidates for item, budget in zip(items, budgets)]
    starts = torch.tensor([0, *(item.length for item in items)])[:-1].cumsum(0).tolist()
    # The pools of the items that are selected from: owner, placeholders and budget of each.
    owners, positions, pool_budgets = [], [], []
    for number, item in enumerate(items):
        if is_pruned[number] or return_selections:
            owners += [number] * len(item.pools)
            positions += item.pools
            pool_budgets += split_budget(min(budgets[number], item.num_candidates), [len(pool) for pool in item.pools])
    if not owners:
        counts = [item.length for item in items]
        return KeptTokens(_ranges(counts, device), wide, counts)

    sizes = [len(pool) for pool in positions]
    position = pad_sequence(positions, batch_first=True)  # [pools, tokens]: placeholder of its item
    place = position + torch.tensor([starts[owner] for owner in owners])[:, None]  # placeholder of all items
    position, place = (tensor.to(device, non_blocking=True) for tensor in (position, place))
    width = position.shape[1]
    if len(set(pool_budgets)) == 1 and set(sizes) == {width}:
        mask, budget, max_budget = None, pool_budgets[0], None
    else:
        mask = torch.arange(width, device=device) < torch.tensor(sizes).to(device, non_blocking=True)[:, None]
        budget, max_budget = torch.tensor(pool_budgets).to(device, non_blocking=True), max(pool_budgets)
    selection = selector(
        features[place],
        tokens.saliency.to(device)[place],
        None if tokens.relevance is None else tokens.relevance.to(device)[place],
        budget,
        mask=mask,
        alpha=fsr.alpha,
        beta=fsr.beta,
        rho=fsr.rho,
        focus_limit=fsr.focus_limit,
        kappa=fsr.kappa,
        focus_mass=fsr.focus_mass,
        max_num_visual_tokens=max_budget,
    )

    # Kept tokens as slots of the flattened selection, known on the host; then those of items within their budget.
    slots = torch.cat([torch.arange(n) + pool * selection.indices.shape[1] for pool, n in enumerate(pool_budgets)])
    slots = slots.to(device, non_blocking=True)
    kept_position = position.gather(1, selection.indices.clamp(min=0)).flatten()[slots]
    kept_features = selection.features
    if tokens.companions is not None:
        companions = refine_like(selection, wide[:, features.shape[-1] :][place], fsr.kappa)
        kept_features = torch.cat([kept_features, companions], dim=-1)
    kept_features = kept_features.flatten(0, 1)[slots]
    slot_owners = torch.tensor(owners).repeat_interleave(torch.tensor(pool_budgets))
    selections = None
    if return_selections:
        selections = [
            _item_selection(selection, position, owners, sizes, slot_owners, slots, kept_position, number, item)
            for number, item in enumerate(items)
        ]
        in_pruned = torch.tensor(is_pruned)[slot_owners]
        chosen = in_pruned.nonzero()[:, 0].to(device, non_blocking=True)
        kept_position, kept_features, slot_owners = (
            kept_position[chosen],
            kept_features[chosen],
            slot_owners[in_pruned],
        )
    whole = [item.length if not pruned else 0 for item, pruned in zip(items, is_pruned)]
    counts = [item.length if not pruned else budget for item, pruned, budget in zip(items, is_pruned, budgets)]
    all_owners = torch.cat([slot_owners, torch.arange(len(items)).repeat_interleave(torch.tensor(whole))])
    start = torch.tensor(starts)[all_owners].to(device, non_blocking=True)
    kept_position = torch.cat([kept_position, _ranges(whole, device)])
    whole_places = torch.cat([torch.arange(n) + s for n, s in zip(whole, starts)]).to(device, non_blocking=True)
    kept_features = torch.cat([kept_features, wide[whole_places].to(kept_features.dtype)])
    order = (kept_position + start).argsort()
    return KeptTokens(kept_position[order], kept_features[order], counts, selections)


def _ranges(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths]).to(device, non_blocking=True)


def _item_selection(
    selection, position, owners, sizes, slot_owners, slots, kept_position, number, item
) -> VisualSelection:
    """The [`VisualSelection`] of one image or video, in placeholders of the item."""
    device = position.device
    members = (slot_owners == number).nonzero()[:, 0].to(device, non_blocking=True)
    order = members[kept_position[members].argsort()]
    priority = torch.zeros(item.length, device=device)
    merged_into = torch.full((item.length,), -1, device=device)
    for pool, owner in enumerate(owners):
        if owner == number:
            own = position[pool, : sizes[pool]]
            anchor = selection.merged_into[pool, : sizes[pool]]
            priority[own] = selection.priority[pool, : sizes[pool]]
            merged_into[own] = position[pool, anchor.clamp(min=0)].where(anchor >= 0, -1)
    return VisualSelection(
        indices=kept_position[order],
        is_focus=selection.is_focus.flatten()[slots[order]],
        features=selection.features.flatten(0, 1)[slots[order]],
        priority=priority,
        merged_into=merged_into,
        grid=item.grid,
        modality=item.modality,
        row=item.row,
    )
