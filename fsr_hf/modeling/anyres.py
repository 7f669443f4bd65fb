"""What LLaVA-NeXT and LLaVA-Video share: pictures as a base view and tiles, rows that end with a newline."""

import torch


__all__ = ["check_views", "list_sizes", "newlines_of_rows"]


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


def check_views(pixel_values: torch.Tensor, num_views: list[int]) -> None:
    """Whether there are pixels for all views of all images."""
    shape = tuple(pixel_values.shape)
    if len(shape) == 5:
        fits, found = shape[0] == len(num_views), f"{shape[0]} images"
        if fits and num_views:
            fits, found = shape[1] >= max(num_views), f"{shape[1]} views for each image"
    elif len(shape) == 4:
        fits, found = shape[0] == sum(num_views), f"{shape[0]} views"
    else:
        raise ValueError(
            "`pixel_values` must have the shape (images, views, channels, height, width) or (views, channels, height, "
            f"width), but its shape is {shape}."
        )
    if not fits:
        raise ValueError(
            f"`pixel_values` of shape {shape} hold {found}, but `image_sizes` and `config.image_grid_pinpoints` tell "
            f"of {len(num_views)} images of {num_views} views. The image processor needs the `image_grid_pinpoints` "
            "of the config, and both inputs the same images."
        )


def newlines_of_rows(is_newline: torch.Tensor, first: int = 0) -> torch.Tensor:
    """
    The place of the newline that ends the row of each placeholder, `(placeholders,)`: the next one, and -1 for the
    `first` placeholders, whose rows have none.
    """
    ends = is_newline.nonzero()[:, 0]
    newlines = torch.full_like(is_newline, -1, dtype=torch.long)
    if len(ends):
        newlines[first:] = ends[torch.searchsorted(ends, torch.arange(first, len(is_newline)))]
    return newlines
