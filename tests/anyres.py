"""Pictures of any shape as a base view and tiles, laid out by hand in whole numbers: which token stands where."""

from fractions import Fraction


__all__ = ["best_resolution", "num_views", "pack"]

Token = tuple[int, int, int]  # view, row, column


def best_resolution(size: tuple[int, int], pinpoints: list[list[int]]) -> tuple[int, int]:
    """Of the resolutions `(height, width)`, the one that shows most of a picture, then the one that wastes least."""
    height, width = size

    def rank(resolution):
        scale = min(Fraction(resolution[0], height), Fraction(resolution[1], width))
        shown = min(int(height * scale) * int(width * scale), height * width)
        return -shown, resolution[0] * resolution[1] - shown

    return tuple(min(pinpoints, key=rank))


def num_views(size: tuple[int, int], pinpoints: list[list[int]], pixels: int) -> int:
    """Views of a picture, the base view and tiles of `pixels` x `pixels`."""
    height, width = best_resolution(size, pinpoints)
    return 1 + (height // pixels) * (width // pixels)


def pack(size: tuple[int, int], pinpoints: list[list[int]], pixels: int, side: int) -> list[Token | None]:
    """
    What fills the placeholders of a picture: the base view, then rows of patches that run through all tiles, without
    patches that hold padding alone and with `None`, a newline, at the end. A view has `side` x `side` patches.
    """
    height, width = size
    rows, columns = (length // pixels * side for length in best_resolution(size, pinpoints))
    top = left = 0
    if width * rows > columns * height:  # flatter than the tiles: padding above and below
        top = (rows - height * columns // width) // 2
    else:
        left = (columns - width * rows // height) // 2
    tokens: list[Token | None] = [(0, row, column) for row in range(side) for column in range(side)]
    for row in range(top, rows - top):
        for column in range(left, columns - left):
            tile = row // side * (columns // side) + column // side
            tokens.append((1 + tile, row % side, column % side))
        tokens.append(None)
    return tokens
