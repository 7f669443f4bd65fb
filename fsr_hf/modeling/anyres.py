"""What LLaVA-NeXT and LLaVA-Video share: pictures as a base view and tiles, rows that end with a newline."""

import torch


__all__ = ["check_views", "list_sizes", "split_views", "take_views"]


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


def split_views(view: torch.Tensor, is_newline: torch.Tensor) -> list[torch.Tensor]:
    """
    The pools of an image or a video: of each view that has any, its placeholders.

    Args:
        view (`torch.LongTensor` of shape `(placeholders,)`), is_newline (`torch.BoolTensor`, same shape):
            View of each placeholder, and which of them are newlines, in no pool.
    """
    return [((view == v) & ~is_newline).nonzero()[:, 0] for v in view[~is_newline].unique().tolist()]


def take_views(pixel_values: torch.Tensor, num_views: list[int], images: list[int]) -> torch.Tensor:
    """The pixels of some images: `(images, views, ...)`, or all views in one `(views, ...)`."""
    if pixel_values.ndim == 5:
        return pixel_values[images]
    parts = pixel_values.split(num_views)
    return torch.cat([parts[image] for image in images]) if images else pixel_values[:0]
