"""The manifest of a Hub folder: what every file of it should hold, so that a copy of it can be checked."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from ..version import __version__
from .files import is_known, read_json


__all__ = [
    "CARD",
    "MANIFEST",
    "Fingerprint",
    "Manifest",
    "compare_manifest",
    "folder_files",
    "read_manifest",
    "write_manifest",
]

MANIFEST = "fsr_manifest.json"
CARD = "README.md"
# What may be there unlisted: texts and pictures for people, which no loader looks for. Anything else may be loaded.
_FOR_PEOPLE = (
    *("*.md", "LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt"),
    *("*.gif", "*.jpeg", "*.jpg", "*.mp4", "*.png", "*.svg", "*.webp"),
)


class Fingerprint(NamedTuple):
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> "Fingerprint":
        digest = hashlib.sha256()
        with open(file, "rb") as reader:
            while block := reader.read(1 << 22):
                digest.update(block)
        return cls(file.stat().st_size, digest.hexdigest())


class Manifest(NamedTuple):
    """
    What a manifest says.

    Args:
        version (`str`): Of the package that wrote it.
        files (`Mapping[str, Fingerprint]`): What each file should hold.
    """

    version: str
    files: Mapping[str, Fingerprint]

    @property
    def lists_code_alone(self) -> bool:
        """Whether `save_pretrained` wrote it, which does not know what else will be in the folder."""
        return all(name.endswith(".py") for name in self.files)


def folder_files(folder: Path) -> list[str]:
    """
    The files of a Hub folder as paths within it, and links to folders: all but the manifest, and what git and caches
    keep.
    """
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(
        path.as_posix()
        for path in paths
        if not any(part.startswith(".") or part == "__pycache__" for part in path.parts)
        and path.as_posix() != MANIFEST
    )


def write_manifest(folder: str | os.PathLike, names: Iterable[str] | None = None) -> None:
    """
    Writes the manifest of the files `names` in `folder`, by default of all of them. The card is listed, so that
    `export(..., force=True)` knows whether somebody edited it; it is not compared, since people edit cards on the Hub.
    """
    folder = Path(folder)
    names = folder_files(folder) if names is None else sorted(names)
    files = {name: Fingerprint.of(folder / name)._asdict() for name in names}
    content = {"fsr_hf": __version__, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """
    The manifest in `folder`.

    Raises:
        `ValueError`: if there is none, or it is not one.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{MANIFEST} is missing: not a folder of fsr-hf, or saved without the package")
    try:
        content = read_json(file)
        files = {name: Fingerprint(int(e["size"]), str(e["sha256"])) for name, e in content["files"].items()}
        return Manifest(str(content["fsr_hf"]), files)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {type(error).__name__}: {error}") from error


def compare_manifest(
    folder: Path,
    manifest: Manifest,
    elsewhere: Mapping[str, Fingerprint] | None = None,
    *,
    allow_code_alone: bool = False,
) -> list[str]:
    """
    How `folder` differs from a manifest, a line for each file: what is listed and is not there or holds something
    else, and what is there and not listed, unless it is for people.

    Args:
        folder (`Path`): The folder.
        manifest ([`Manifest`]): What it should hold.
        elsewhere (`Mapping[str, Fingerprint]`, *optional*): What a server says of files that are not in `folder`.
        allow_code_alone (`bool`, *optional*, defaults to `False`):
            Whether a manifest that lists the code alone is enough for weights and settings, under their known names.
    """
    elsewhere = elsewhere or {}
    present = {*folder_files(folder), *elsewhere} - {CARD}
    differences = []
    for name, wanted in sorted(manifest.files.items()):
        if name == CARD:
            continue
        if name not in present or not (name in elsewhere or (folder / name).is_file()):
            differences.append(f"{name} is missing")
            continue
        size = elsewhere[name].size if name in elsewhere else (folder / name).stat().st_size
        if size != wanted.size:
            differences.append(f"{name} has {size} bytes, not {wanted.size}")
        elif (elsewhere[name] if name in elsewhere else Fingerprint.of(folder / name)) != wanted:
            differences.append(f"{name} has other contents")
    unlisted = sorted(
        name
        for name in present - manifest.files.keys()
        if not any(fnmatchcase(name, pattern) for pattern in _FOR_PEOPLE)
    )
    if manifest.lists_code_alone:
        expected = [name for name in unlisted if name == "config.json" or _is_weights(name) or is_known(name)]
        unlisted = sorted({*unlisted} - {*expected})
        if expected and not allow_code_alone:
            differences.append(
                f"{MANIFEST} lists the code alone, as `save_pretrained` leaves it, and nothing tells what the other "
                f"files should hold: {', '.join(expected)}. `fsr-hf push` lists them all"
            )
    return [*differences, *(f"{name} is not in the manifest" for name in unlisted)]


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
