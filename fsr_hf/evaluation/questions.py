"""The questions of `fsr-hf eval`: read from JSON lines or by the datasets library, and checked one by one."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps


__all__ = ["Question", "load_questions"]

_VISUAL = ("image", "images", "video")
_MAX_NAMED = 5  # bad lines that an error names


@dataclass(frozen=True)
class Question:
    """
    A question with its right answers.

    Args:
        place (`str`):
            Where it stands, for errors, such as `"questions.jsonl, line 3"`.
        text (`str`):
            What is asked.
        answers (`tuple[str, ...]`):
            Right answers, or ten people's.
        visual (`str`):
            Names its images or its video: questions with the same one are no independent evidence.
        images (`tuple[Callable, ...]`):
            Each returns a `PIL.Image.Image`.
        sizes (`tuple[tuple[int, int], ...]`):
            Their widths and heights, in pixels.
        video (`Path`, *optional*):
            A file.
    """

    place: str
    text: str
    answers: tuple[str, ...]
    visual: str
    images: tuple[Callable[[], Image.Image], ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    video: Path | None = None


def load_questions(data: str | os.PathLike, split: str | None = None) -> list[Question]:
    """
    Read questions. Each has `question`, `answer` or `answers`, and one of `image`, `images` and `video`; other fields
    do not matter. Files are relative to `data`.

    Args:
        data (`str` or `os.PathLike`):
            A file of JSON lines, a parquet file, or a folder with a dataset: saved by `save_to_disk`, or of files that
            `datasets.load_dataset` takes.
        split (`str`, *optional*):
            Which part of a dataset to take, where it has several.

    Raises:
        `ImportError`: for a dataset without the datasets library.
        `OSError`: if there is no such file.
        `ValueError`: for lines that are no questions; the first ones are named with their numbers.
    """
    data = Path(data)
    if not data.exists():
        raise FileNotFoundError(f"--data {data}: there is no such file or folder.")
    if data.is_dir() or data.suffix == ".parquet":
        lines = _dataset_rows(data, split)
    elif split is not None:
        raise ValueError(f"--split {split}: {data} is no dataset. Leave it out.")
    else:
        lines = _json_lines(data)
    questions, bad = [], []
    for place, line in lines:
        try:
            questions.append(_question(place, line))
        except (OSError, ValueError) as error:
            bad.append(f"{place}: {error}")
    if bad:
        more = f" And {len(bad) - _MAX_NAMED} more bad lines." if len(bad) > _MAX_NAMED else ""
        raise ValueError(" ".join(bad[:_MAX_NAMED]) + more)
    if not questions:
        raise ValueError(f"--data {data} has no questions.")
    return questions


# What stands for one question: its fields, with visual ones as (name, what opens it), or the error of reading it.
_Line = tuple[str, dict[str, Any] | ValueError]


def _json_lines(file: Path) -> Iterator[_Line]:
    with open(file, "rb") as lines:
        for number, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            place = f"{file}, line {number}"
            try:
                line = json.loads(text.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield place, ValueError(f"is not UTF-8 ({error}).")
                continue
            except ValueError as error:
                yield place, ValueError(f"is not JSON ({error}).")
                continue
            if not isinstance(line, dict):
                yield place, ValueError('is no JSON object such as {"image": ..., "question": ..., "answer": ...}.')
                continue
            yield place, _with_files(line, file.parent)


def _with_files(line: dict[str, Any], folder: Path) -> dict[str, Any] | ValueError:
    """The line, with its images as names and what opens them."""
    images = line.get("images") if line.get("images") is not None else line.get("image")
    names = images if isinstance(images, list) else [] if images is None else [images]
    if not all(isinstance(name, str) for name in names):
        return ValueError(f"`image` or `images` is {images!r}, but has to be the name of a file, or a list of names.")
    files = [folder / name for name in names]
    return {**line, "_images": [(str(file), partial(_open_image, file)) for file in files], "_folder": folder}


def _dataset_rows(data: Path, split: str | None) -> Iterator[_Line]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"--data {data} is read by the datasets library: `pip install datasets`.") from error
    if not data.is_dir():
        dataset = datasets.load_dataset("parquet", data_files=str(data))
    elif (data / "dataset_dict.json").exists() or (data / "state.json").exists():
        dataset = datasets.load_from_disk(str(data))
    else:
        dataset = datasets.load_dataset(str(data))
    if isinstance(dataset, dict):
        if split is None and len(dataset) > 1:
            raise ValueError(f"--data {data} has the parts {', '.join(dataset)}: choose one by --split.")
        if split is not None and split not in dataset:
            raise ValueError(f"--split {split}: {data} has {', '.join(dataset)}.")
        dataset = dataset[split or next(iter(dataset))]
    columns = [name for name in _VISUAL[:2] if name in dataset.column_names]
    for name in columns:  # what is encoded stays so until it is asked for
        feature = datasets.Image(decode=False)
        dataset = dataset.cast_column(name, feature if name == "image" else datasets.Sequence(feature))
    folder = data if data.is_dir() else data.parent
    for number in range(len(dataset)):
        row = dataset[number]
        images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
        column = "images" if row.get("images") else "image"
        opened = [
            (_name_of(image, folder), partial(_open_row_image, dataset, number, column, place, folder))
            for place, image in enumerate(images)
        ]
        yield f"{data}, row {number + 1}", {**row, "_images": opened, "_folder": folder}


def _name_of(image: dict[str, Any], folder: Path) -> str:
    if image.get("bytes"):
        return hashlib.sha256(image["bytes"]).hexdigest()
    return str(folder / image["path"])


def _open_row_image(dataset: Any, number: int, column: str, place: int, folder: Path) -> Image.Image:
    value = dataset[number][column]
    image = value[place] if column == "images" else value
    return _open_image(io.BytesIO(image["bytes"]) if image.get("bytes") else folder / image["path"])


def _open_image(file: Path | io.BytesIO) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(file)).convert("RGB")  # upright, as transformers opens files


def _question(place: str, line: dict[str, Any] | ValueError) -> Question:
    """
    Raises:
        `OSError`, `ValueError`: if it is none, without the name of the line.
    """
    if isinstance(line, ValueError):
        raise line
    text = line.get("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`question` is {text!r}, but has to be a text.")
    answers = _answers(line)
    given = [name for name in _VISUAL if line.get(name) is not None]
    if len(given) != 1:
        found = "has none of them" if not given else f"has {' and '.join(given)}"
        raise ValueError(f"{found}: a question needs one of `image`, `images` and `video`.")
    if given == ["video"]:
        video = line["video"]
        if not isinstance(video, str):
            raise ValueError(f"`video` is {type(video).__name__}, but has to be the name of a file.")
        file = line["_folder"] / video
        if not file.is_file():
            raise FileNotFoundError(f"`video`: there is no file {file}.")
        return Question(place, text, answers, str(file), video=file)
    images = line["_images"]
    if not images:
        raise ValueError("`images` is empty: a question needs at least one.")
    sizes = tuple(_size_of(name, opens) for name, opens in images)
    names = "\n".join(name for name, _ in images)
    return Question(place, text, answers, names, images=tuple(opens for _, opens in images), sizes=sizes)


def _size_of(name: str, opens: Callable[[], Image.Image]) -> tuple[int, int]:
    try:
        return opens().size
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no image {name}.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is no image that Pillow can read ({error}).") from error


def _answers(line: dict[str, Any]) -> tuple[str, ...]:
    answers = line.get("answers") if line.get("answers") is not None else line.get("answer")
    both = line.get("answers") is not None and line.get("answer") is not None
    if both and not isinstance(line["answers"], list):
        raise ValueError("has `answer` and `answers`: give one of them.")
    listed = answers if isinstance(answers, list) else [] if answers is None else [answers]
    # VQAv2 has {"answer": ..., "answer_id": ...}.
    listed = [entry.get("answer") if isinstance(entry, dict) else entry for entry in listed]
    if not listed:
        raise ValueError("has no answer: `answer` is a text, `answers` a list of them.")
    for entry in listed:
        if isinstance(entry, bool) or not isinstance(entry, (str, int, float)) or not str(entry).strip():
            raise ValueError(f"an answer is {entry!r}, but has to be a text or a number.")
    return tuple(str(entry) for entry in listed)
