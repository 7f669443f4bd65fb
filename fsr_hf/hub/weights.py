"""The weights of a checkpoint as files: which file holds which tensor, CLIP's two sides, and copies of them all."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .files import find_file, read_json


__all__ = [
    "INDEX",
    "PICKLE",
    "WEIGHTS",
    "Clip",
    "check_vision_tower",
    "find_weights",
    "open_clip",
    "open_tensors",
    "read_text_side",
    "some_of",
    "write_weights",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
_ROWS = 256  # of each matrix that are compared
_SAME_TOWER = 0.5  # cosine; see `check_vision_tower`


def find_weights(folder: Path) -> dict[str, Path]:
    """
    Which file holds each tensor; of a single file and an index the file wins, as in transformers.

    Raises:
        `ValueError`: if there are none, if a file is damaged, or if the index names what is not a file of the folder.
    """
    if (folder / WEIGHTS).is_file():
        with open_tensors(find_file(folder, WEIGHTS)) as tensors:
            return dict.fromkeys(tensors.keys(), folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} has no {WEIGHTS} and no {INDEX}. Pickled weights (.bin, .pt, .pth, .ckpt) are refused: opening "
            "one can run code that is in it: `from_pretrained(...)`, then `save_pretrained(...)`, converts them."
        )
    index = find_file(folder, INDEX)
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(content.get("metadata"), dict):
        raise ValueError(
            f'{index} needs a `weight_map`, `{{"tensor": "file"}}`, and `metadata`, `{{"total_size": bytes}}`: take '
            "the file from its source again."
        )
    shards = {*map(str, weight_map.values())}
    strange = sorted(name for name in shards if os.path.basename(name) != name or not name.endswith(".safetensors"))
    if strange:
        raise ValueError(
            f"{index}: `weight_map` may only name .safetensors files beside it, without a path: {some_of(strange)}."
        )
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{folder} lacks shards that {INDEX} names: {some_of(missing)}.")
    files = {name: find_file(folder, name) for name in shards}
    return {name: files[shard] for name, shard in weight_map.items()}


def open_tensors(file: Path) -> Any:
    """A safetensors file, open; a damaged one is a `ValueError` that names it."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or incomplete: {error}. Take it from its source again.") from error


def some_of(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Clip(NamedTuple):
    """
    A CLIP checkpoint.

    Args:
        folder (`Path`): Where it lies.
        tensors (`Mapping[str, Callable]`):
            By the name of each tensor, what maps it from its file; its pages are given back with the tensor.
    """

    folder: Path
    tensors: Mapping[str, Callable[[], torch.Tensor]]


def open_clip(folder: Path) -> Clip:
    """The CLIP checkpoint in `folder`, of safetensors, or of pickled tensors: reading those runs nothing."""
    if not (folder / PICKLE).is_file() or list(folder.glob("*.safetensors")):
        return Clip(folder, {name: _reader(file, name) for name, file in find_weights(folder).items()})
    file = find_file(folder, PICKLE)
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return Clip(folder, {name: tensor.detach for name, tensor in stored.items()})
    except Exception as error:  # of all kinds for a damaged file
        raise ValueError(
            f"`text_encoder` {file} holds more than tensors, or is damaged, and is refused: {type(error).__name__}."
        ) from error


def _reader(file: Path, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with open_tensors(file) as stored:
            try:
                return stored.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{file} lacks {name}, which {INDEX} promises: {error}.") from error

    return read


def read_text_side(clip: Clip, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """
    The tensors of CLIP's text side, mapped from the file.

    Args:
        clip ([`Clip`]): The CLIP checkpoint.
        shapes (`Mapping[str, torch.Size]`): The shapes that the model has for them, by their names in CLIP.

    Raises:
        `ValueError`: if one is missing or of another shape.
    """
    tensors = {name: clip.tensors[name]() for name in shapes.keys() & clip.tensors.keys()}
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(shape):
            raise ValueError(
                f"`text_encoder` {clip.folder}: {name} should be of shape {tuple(shape)}, "
                f"but {'is missing' if found is None else f'is of shape {found}'}."
            )
    return tensors


def check_vision_tower(clip: Clip, weights: Mapping[str, Path]) -> None:
    """
    Checks that a vision tower came from a CLIP checkpoint, by its weights: the cosine between a matrix of the one and
    of the other, averaged over all matrices that both have, has to be above 0.5. It is 1 for a copy in any dtype, also
    for one without the last blocks; a tower that was trained further stays close to where it began (noise as large as
    the weights themselves would still leave 0.7); between towers that were trained apart it is about 0. Of each matrix
    256 rows are read, one matrix at a time, so that memory does not grow with the model.

    Args:
        clip ([`Clip`]): The CLIP checkpoint.
        weights (`Mapping[str, Path]`): Which file holds each tensor of the checkpoint with the tower.

    Raises:
        `ValueError`: if the tower came from elsewhere.
    """
    fault = f"`text_encoder` {clip.folder} is not the CLIP that the vision tower came from: "
    of_clip = {
        name.partition("vision_model.")[2]: read
        for name, read in clip.tensors.items()
        if name.endswith(".weight") and "vision_model." in name
    }
    of_tower = {
        name.rpartition("vision_tower.")[2].removeprefix("vision_model."): _reader(file, name)
        for name, file in weights.items()
        if "vision_tower." in name
    }
    cosines = []
    for name in sorted(of_clip.keys() & of_tower.keys()):
        ours, theirs = of_tower[name](), of_clip[name]()
        if theirs.ndim < 2 or not ours.is_floating_point():  # all norms are alike, and quantized weights are packed
            continue
        if ours.shape != theirs.shape:
            raise ValueError(f"{fault}{name} is of shape {tuple(theirs.shape)}, but {tuple(ours.shape)} in the tower.")
        ours, theirs = ours[:_ROWS].flatten().double(), theirs[:_ROWS].flatten().double()
        cosines.append(torch.cosine_similarity(ours, theirs, dim=0).item())
    if not cosines:
        raise ValueError(f"{fault}they have no matrix in common.")
    if not (mean := sum(cosines) / len(cosines)) > _SAME_TOWER:  # or it is nan
        raise ValueError(
            f"{fault}the mean cosine of their matrices is {mean:.2f}, and above {_SAME_TOWER} even for a tower that "
            "was trained further. Name the right one, or leave `text_encoder` out."
        )


def write_weights(
    weights: Mapping[str, Path], text_side: Mapping[str, torch.Tensor], folder: Path, *, link: bool, progress: bool
) -> None:
    """
    Copies the files of `weights` to `folder` as they are, adds a shard of the tensors of `text_side`, and writes an
    index if there is more than one file.
    """
    files = sorted(set(weights.values()))
    count = len(files) + bool(text_side)
    shard_names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    if count == 1:
        shard_names = [WEIGHTS]
    new_names = dict(zip(files, shard_names, strict=False))
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, disable=not progress) as bar:
        for file, name in new_names.items():
            bar.set_description(name)
            copy_shard(file, folder / name, bar, link)
    if text_side:
        _save_tensors(text_side, folder / shard_names[-1])
    if count > 1:
        weight_map = {name: new_names[file] for name, file in weights.items()}
        weight_map |= dict.fromkeys(text_side, shard_names[-1])
        total_size = sum(_payload_size(folder / name) for name in shard_names)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if text_side:
        shutil.copymode(folder / INDEX, folder / shard_names[-1])  # safetensors makes files for their owner alone


def copy_shard(source: Path, target: Path, bar: tqdm, link: bool) -> None:
    """Copies a file in blocks, or makes `target` another name of it."""
    if link:
        with suppress(OSError):  # another file system: copy
            os.link(source.resolve(), target)
            bar.update(target.stat().st_size)
            return
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while block := reader.read(1 << 24):
            writer.write(block)
            bar.update(len(block))


def _save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"{file} cannot be written: {error}. Is the disk full?") from error


def _payload_size(file: Path) -> int:
    """Bytes of the tensors in a safetensors file: all but the header and its length, 8 bytes."""
    with open(file, "rb") as reader:
        return file.stat().st_size - 8 - int.from_bytes(reader.read(8), "little")
