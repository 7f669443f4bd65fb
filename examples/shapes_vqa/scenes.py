"""The scenes of a training run, drawn once and kept on disk."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .data import Object, make_scene, place_objects


__all__ = ["Scenes", "memory_map"]

_CHUNK = 500


class Scenes:
    """
    Pictures `(num_scenes, size, size, 3)`, uint8, and their objects. Drawn in all cores, and taken up again where an
    earlier run stopped.
    """

    def __init__(self, folder: Path, count: int, size: int):
        self.pixels = memory_map(folder / "scenes.npy", (count, size, size, 3), np.uint8)
        done_file = folder / "scenes.done"
        done = int(done_file.read_text()) if done_file.exists() else 0
        chunks = [range(start, min(start + _CHUNK, count)) for start in range(done, count, _CHUNK)]
        with ProcessPoolExecutor() as processes, tqdm(total=count, initial=done, desc="scenes", unit="") as bar:
            for chunk, pixels in zip(chunks, processes.map(partial(_draw, size=size), chunks)):
                self.pixels[chunk.start : chunk.stop] = pixels
                done_file.write_text(str(chunk.stop))
                bar.update(len(chunk))
        self.objects: list[tuple[Object, ...]] = [place_objects(seed, size) for seed in range(count)]


def _draw(seeds: range, size: int) -> np.ndarray:
    return np.stack([np.asarray(make_scene(seed, size).image) for seed in seeds])


def memory_map(file: Path, shape: tuple[int, ...], dtype) -> np.ndarray:
    if file.exists():
        array = np.load(file, mmap_mode="r+")
        if array.shape == shape:
            return array
        raise ValueError(
            f"{file} has the shape {array.shape}, not {shape}: it is of another recipe. Remove its folder."
        )
    return np.lib.format.open_memmap(file, mode="w+", shape=shape, dtype=dtype)
