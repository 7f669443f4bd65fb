"""What LLaVA-NeXT and LLaVA-Video share: pictures as a base view and tiles, rows that end with a newline."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from .prompt import VisualItem


__all__ = ["count_views", "image_items", "list_sizes", "make_item", "take_views", "tiles_of"]


def list_sizes(image_sizes) -> list[list[int]]:
    """`image_sizes` as a list of `[height, width]`."""
    if image_sizes is None:
        raise ValueError(
            "`pixel_values` need `image_sizes`, the height and width of each image before preprocessing: the tokens "
            "of a picture depend on its shape. Pass all that the processor returns."
        )
    sizes = [list(size) if isinstance(size, (list, tuple)) else size.tolist() for size in image_sizes]
    if not all(isinstance(size, list) and len(size) == 2 and min(size) >= 1 for size in sizes):
        raise ValueError(f"`image_sizes` must hold the height and width of each image, but is {sizes}.")
    return sizes


def tiles_of(image_sizes, config: Any) -> list[tuple[int, int]]:
    """Rows and columns of the tiles of each image."""
    pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
    return [get_anyres_image_grid_shape(size, pinpoints, side) for size in list_sizes(image_sizes)]


def count_views(tiles: list[tuple[int, int]]) -> list[int]:
    """Views of each image that the tower sees: the base view and the tiles."""
    return [1 + rows * columns for rows, columns in tiles]


def take_views(pixel_values: torch.Tensor, num_views: list[int], images: list[int]) -> torch.Tensor:
    """The pixels of some images: `(images, views, ...)`, or all views in one `(views, ...)`."""
    if pixel_values.ndim == 5:
        return pixel_values[images]
    parts = pixel_values.split(num_views)
    return torch.cat([parts[image] for image in images])


def image_items(pixel_values: torch.Tensor, tiles: list[tuple[int, int]], pack: Callable, config: Any):
    """
    The items of a call, after a check that there are pixels for all views of all images. The stock class packs, for
    each patch, whether it is of a tile, its row and its column as if they were a feature: `pack(views, newline)`
    makes `(placeholders, 3)` of the `(views, area, 3)` of each image. Rows and columns count on from tile to tile,
    since LLaVA-OneVision interpolates a large picture as a whole.
    """
    _check_views(pixel_values, count_views(tiles))
    side = config.vision_config.image_size // config.vision_config.patch_size
    patches = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    parts = []
    for rows, columns in tiles:
        corners = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[:, None] * side
        views = [(0.0, patches[None]), (1.0, corners + patches)]
        parts.append(torch.cat([torch.nn.functional.pad(view, (1, 0), value=is_tile) for is_tile, view in views]))
    items = []
    for run, (_, columns) in zip(pack(parts, torch.full((3,), -1.0, dtype=torch.double)), tiles):
        nearest = run.round().long()  # an interpolated token goes by the nearest patch
        is_tile, row, column = nearest.unbind(-1)
        view = torch.where(is_tile > 0, 1 + row // side * columns + column // side, 0)
        grid = torch.stack([view, row % side, column % side], dim=-1).masked_fill(is_tile[:, None] < 0, -1)
        is_interpolated = not torch.equal(run, nearest.double())  # tokens between patches, maybe of two views
        items.append(make_item("image", grid, view * 0 if is_interpolated else view, config))
    return items


def make_item(modality: str, grid: torch.Tensor, view: torch.Tensor, config: Any) -> VisualItem:
    """An item whose newlines, in no pool, have -1 in the last column of `grid`; a pool for each `view`, or one."""
    is_newline = grid[:, -1] < 0
    view = view if config.fsr_config.pool == "view" else view * 0
    pools = [((view == v) & ~is_newline).nonzero()[:, 0] for v in view[~is_newline].unique().tolist()]
    return VisualItem(modality, grid, pools)


def _check_views(pixel_values: torch.Tensor, num_views: list[int]) -> None:
    shape = tuple(pixel_values.shape)
    if len(shape) not in (4, 5):
        raise ValueError(
            "`pixel_values` must have the shape (images, views, channels, height, width) or (views, channels, height, "
            f"width), but its shape is {shape}."
        )
    if len(shape) == 5:
        fits = shape[0] == len(num_views) and shape[1] >= max(num_views)
        found = f"{shape[0]} images of up to {shape[1]} views"
    else:
        fits, found = shape[0] == sum(num_views), f"{shape[0]} views"
    if not fits:
        raise ValueError(
            f"`pixel_values` of shape {shape} hold {found}, but `image_sizes` and `config.image_grid_pinpoints` tell "
            f"of {len(num_views)} images of {num_views} views. The image processor needs the `image_grid_pinpoints` "
            "of the config, and both inputs the same images."
        )
