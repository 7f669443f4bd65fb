"""
LLaVA-Video's layout, written down once more in loops: frames of patches, pooled over space, with a newline after every
row of every frame. And the attention that patches receive, from the maps of the stock tower.
"""

import math

import torch


__all__ = ["frame_tokens", "pool", "received_attention", "resize"]


def resize(grid: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`(height, width, size)` to `(rows, columns, size)` by linear interpolation between the centres of cells."""
    resized = grid.new_zeros(rows, columns, grid.shape[-1])
    for row in range(rows):
        for column in range(columns):
            for y, weight_y in _neighbours(row, rows, len(grid)):
                for x, weight_x in _neighbours(column, columns, grid.shape[1]):
                    resized[row, column] += weight_y * weight_x * grid[y, x]
    return resized


def _neighbours(number: int, cells: int, length: int) -> list[tuple[int, float]]:
    """The cells, of `length`, between whose centres the centre of cell `number` of `cells` lies, and their weights."""
    centre = min(max((number + 0.5) * length / cells - 0.5, 0.0), length - 1.0)
    low = math.floor(centre)
    return [(low, 1 - (centre - low)), (min(low + 1, length - 1), centre - low)]


def pool(frame: torch.Tensor, mode: str) -> torch.Tensor:
    """One frame `(side, side, size)` at half of its side: rounded up with "bilinear", down with "average"."""
    side = len(frame)
    if mode == "bilinear":
        return resize(frame, math.ceil(side / 2), math.ceil(side / 2))
    rows = [
        [frame[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((0, 1)) for column in range(side // 2)]
        for row in range(side // 2)
    ]
    return torch.stack([torch.stack(row) for row in rows])


@torch.no_grad()
def received_attention(tower, pixels: torch.Tensor, block: int = -1) -> torch.Tensor:
    """What each patch of each view receives in a block of a SigLIP tower with eager attention: `(views, patches)`."""
    assert tower.config._attn_implementation == "eager"
    maps = tower(pixels, output_attentions=True).attentions[block]  # [views, heads, queries, keys]
    return maps.mean(dim=(1, 2))


def frame_tokens(model, frames: torch.Tensor, mode: str = "bilinear") -> tuple[torch.Tensor, list]:
    """
    What fills the placeholders of a video, `(placeholders, hidden_size)`, and (frame, row, column) of each, `None` for
    a newline. `model` is a stock LlavaOnevision, `frames` are `(frames, channels, height, width)`.
    """
    patches = model.vision_tower(frames, output_hidden_states=True).hidden_states[-1]
    side = math.isqrt(patches.shape[1])
    tokens, places = [], []
    for number, frame in enumerate(model.multi_modal_projector(patches)):
        pooled = pool(frame.view(side, side, -1), mode)
        for row, line in enumerate(pooled):
            tokens += [*line, model.image_newline]
            places += [*((number, row, column) for column in range(len(line))), None]
    return torch.stack(tokens), places
