# Generated from fsr_hf 0.1.0 (fsr_hf.modeling.pools), do not edit.
"""Pools: which tokens of an image or video compete with each other, and what each item keeps in the end."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from .fsr import VisualSelection, select_visual_tokens
from .prompt import VisualItem


__all__ = ["VisualPools", "pool_views", "select_from_pools", "split_budget"]


@dataclass
class VisualPools:
    """
    The visual tokens of a batch as the method sees them: pools of tokens that compete with each other.

    Args:
        features (`torch.FloatTensor` of shape `(pools, tokens, hidden_size)`):
            Tokens as the language model would receive them.
        saliency (`torch.FloatTensor` of shape `(pools, tokens)`):
            Eq. 1.
        relevance (`torch.FloatTensor` of shape `(pools, tokens)`, *optional*):
            Eq. 2, higher for what is more relevant.
        items (`list[int]`):
            The image or video that each pool belongs to. The pools of one item stand together.
        sizes (`list[int]`):
            Real tokens of each pool; they come first, the rest of a row is padding.
        numbers (`torch.LongTensor` of shape `(pools, tokens)`, *optional*):
            Position of each token in its item's run of placeholders; `None` if pools are whole items in order.
        runs (`list[torch.Tensor]`):
            For each item, the rows of the stock `get_image_features().pooler_output`: `(placeholders, hidden_size)`.
        grid (`list[torch.Tensor]`):
            For each item, view or frame, row and column of every placeholder: `(placeholders, 3)`.
        newlines (`list[torch.Tensor]`, *optional*):
            For each item, the position in its run of the newline that ends the row of every placeholder, -1 for none:
            `(placeholders,)`, on the CPU. `None` for a family without newlines.
    """

    features: torch.Tensor
    saliency: torch.Tensor
    relevance: torch.Tensor | None
    items: list[int]
    sizes: list[int]
    numbers: torch.Tensor | None
    runs: list[torch.Tensor]
    grid: list[torch.Tensor]
    newlines: list[torch.Tensor] | None = None


def pool_views(
    runs: list[torch.Tensor],
    views: list[torch.Tensor],
    saliency: torch.Tensor,
    relevance: torch.Tensor | None,
    grid: list[torch.Tensor],
    newlines: list[torch.Tensor] | None = None,
) -> VisualPools:
    """
    One pool for each view of each item.

    Args:
        runs, grid, newlines (`list[torch.Tensor]`):
            For each item, as in [`VisualPools`].
        views (`list[torch.LongTensor]`):
            For each item, the view of every placeholder, on the CPU: `(placeholders,)`; -1 for what is no candidate. A
            view that is empty has no pool.
        saliency (`torch.FloatTensor` of shape `(placeholders of all items,)`):
            Eq. 1.
        relevance (`torch.FloatTensor` of shape `(placeholders of all items,)`, *optional*):
            Eq. 2.
    """
    items, numbers, places, first = [], [], [], 0
    for item, view_of in enumerate(views):
        for view in view_of.unique().tolist():
            if view >= 0:
                items.append(item)
                numbers.append((view_of == view).nonzero()[:, 0])
                places.append(numbers[-1] + first)
        first += len(view_of)
    features = torch.cat(list(runs))
    number, place = (
        pad_sequence(parts, batch_first=True).to(features.device, non_blocking=True) for parts in (numbers, places)
    )
    return VisualPools(
        features=features[place],
        saliency=saliency.to(features.device)[place],
        relevance=None if relevance is None else relevance.to(features.device)[place],
        items=items,
        sizes=[len(pool) for pool in numbers],
        numbers=number,
        runs=runs,
        grid=grid,
        newlines=newlines,
    )


def split_budget(budget: int, sizes: list[int]) -> list[int]:
    """`budget` tokens over pools in proportion to their sizes: largest remainder, ties to the earlier pool."""
    total = sum(sizes)
    shares = [budget * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda pool: -(budget * sizes[pool] % total))
    for pool in by_remainder[: budget - sum(shares)]:
        shares[pool] += 1
    return shares


def select_from_pools(
    pools: VisualPools,
    items: list[VisualItem],
    budgets: list[int],
    is_pruned: list[bool],
    fsr,
    return_selections: bool,
):
    """
    Select within every pool, and put the pools of an item together again.

    Returns:
        The kept tokens of all items, one after the other, as positions in their runs `(sum(kept),)` and features
        `(sum(kept), hidden_size)`; how many each item keeps; and the [`VisualSelection`] of each item, if asked for.
    """
    if not any(is_pruned) and not return_selections:
        return *_whole_runs(pools), None
    device = pools.features.device
    num_pools, width, _ = pools.features.shape
    members = [[pool for pool, owner in enumerate(pools.items) if owner == item] for item in range(len(items))]
    pool_budgets = [0] * num_pools
    for item, budget in enumerate(budgets):
        if not is_pruned[item] and not return_selections:
            continue  # its run stays whole; selecting all of it would take the most steps of all
        sizes = [pools.sizes[pool] for pool in members[item]]
        for pool, share in zip(members[item], split_budget(budget, sizes)):
            pool_budgets[pool] = share
    is_uniform = len(set(pool_budgets)) == 1 and set(pools.sizes) == {width}
    if is_uniform:
        mask, number, most = None, pool_budgets[0], None
    else:
        sizes = torch.tensor(pools.sizes).to(device, non_blocking=True)
        mask = torch.arange(width, device=device) < sizes[:, None]
        number, most = torch.tensor(pool_budgets).to(device, non_blocking=True), max(pool_budgets)
    selection = select_visual_tokens(
        pools.features,
        pools.saliency,
        pools.relevance,
        number,
        mask=mask,
        alpha=fsr.alpha,
        beta=fsr.beta,
        rho=fsr.rho,
        kappa=fsr.kappa,
        focus_mass=fsr.focus_mass,
        max_num_visual_tokens=most,
    )
    numbers = pools.numbers if pools.numbers is not None else torch.arange(width, device=device).expand(num_pools, -1)
    kept_numbers = numbers.gather(1, selection.indices.clamp(min=0))
    kept = [sum(pool_budgets[pool] for pool in members[item]) for item in range(len(items))]
    if not any(is_pruned):
        indices, features, kept = _whole_runs(pools)
    elif is_uniform and pools.numbers is None:
        indices, features = kept_numbers.flatten(), selection.features.flatten(0, 1)
    else:
        indices, features, kept = _join_pools(pools, selection, kept_numbers, pool_budgets, is_pruned)
    if any(is_pruned) and pools.newlines is not None and fsr.newline == "keep":
        indices, features, kept = _add_newlines(pools, indices, features, kept)
    selections = None
    if return_selections:
        selections = [
            _item_selection(pools, selection, kept_numbers, numbers, pool_budgets, members[item], item, items[item])
            for item in range(len(items))
        ]
    return indices, features, kept, selections


def _whole_runs(pools):
    """The tokens of every item, newlines and all."""
    kept = [len(run) for run in pools.runs]
    indices = torch.cat([torch.arange(number) for number in kept]).to(pools.features.device, non_blocking=True)
    return indices, torch.cat(list(pools.runs)), kept


def _join_pools(pools, selection, kept_numbers, pool_budgets, is_pruned):
    """The kept tokens of every item in the order of its run; an item within its budget keeps its whole run."""
    device, width = kept_numbers.device, kept_numbers.shape[1]
    places, owners = [], []
    for pool, budget in enumerate(pool_budgets):
        if is_pruned[pools.items[pool]]:
            places.append(torch.arange(pool * width, pool * width + budget))
            owners.append(torch.full((budget,), pools.items[pool]))
    places, owners = (torch.cat(parts).to(device, non_blocking=True) for parts in (places, owners))
    indices, features = [kept_numbers.flatten()[places]], [selection.features.flatten(0, 1)[places]]
    owners = [owners]
    kept = [0] * len(is_pruned)
    for pool, budget in enumerate(pool_budgets):
        kept[pools.items[pool]] += budget
    for item, run in enumerate(pools.runs):
        if not is_pruned[item]:
            kept[item] = len(run)
            indices.append(torch.arange(len(run), device=device))
            features.append(run.to(pools.features))
            owners.append(torch.full((len(run),), item, device=device))
    indices, features, owners = (torch.cat(parts) for parts in (indices, features, owners))
    order = (owners * max(len(run) for run in pools.runs) + indices).argsort()
    return indices[order], features[order], kept


def _add_newlines(pools, indices, features, kept):
    """
    The kept tokens, and the newline of every row that holds one. How many rows do depends on the scores, so the host
    waits for the device once.
    """
    lengths = [len(run) for run in pools.runs]
    total = sum(lengths)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    ends = torch.cat([line.where(line < 0, line + start) for line, start in zip(pools.newlines, starts)])
    ends = ends.where(ends >= 0, total).to(indices.device, non_blocking=True)  # `total` stands for none
    places = indices + starts.repeat_interleave(torch.tensor(kept)).to(indices.device, non_blocking=True)

    runs = torch.cat(pools.runs).to(features).index_copy(0, places, features)
    is_kept = torch.zeros(total + 1, dtype=torch.bool, device=indices.device)
    is_kept = is_kept.index_fill(0, places, True).index_fill(0, ends[places], True)[:total].cpu()
    rows = [chosen.nonzero()[:, 0] for chosen in is_kept.split(lengths)]
    indices = torch.cat(rows).to(indices.device, non_blocking=True)
    features = runs[is_kept.nonzero()[:, 0].to(runs.device, non_blocking=True)]
    return indices, features, [len(row) for row in rows]


def _item_selection(pools, selection, kept_numbers, numbers, pool_budgets, members, number, item) -> VisualSelection:
    """The [`VisualSelection`] of one image or video, in positions of its run."""
    device = kept_numbers.device
    indices = torch.cat([kept_numbers[pool, : pool_budgets[pool]] for pool in members])
    order = indices.argsort()
    priority = torch.zeros(item.length, device=device)
    merged_into = torch.full((item.length,), -1, device=device)
    for pool in members:
        own = numbers[pool, : pools.sizes[pool]]
        anchor = selection.merged_into[pool, : pools.sizes[pool]]
        priority[own] = selection.priority[pool, : pools.sizes[pool]]
        merged_into[own] = numbers[pool, anchor.clamp(min=0)].where(anchor >= 0, -1)
    return VisualSelection(
        indices=indices[order],
        is_focus=torch.cat([selection.is_focus[pool, : pool_budgets[pool]] for pool in members])[order],
        features=torch.cat([selection.features[pool, : pool_budgets[pool]] for pool in members])[order],
        priority=priority,
        merged_into=merged_into,
        grid=pools.grid[number],
        modality=item.modality,
        row=item.row,
    )
