"""The manifest of a Hub folder: what every file of it should hold, so that a copy of it can be checked."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..version import __version__


__all__ = ["MANIFEST", "Fingerprint", "compare_manifest", "folder_files", "read_manifest", "write_manifest"]

MANIFEST = "fsr_manifest.json"
_CARD = "README.md"  # people edit it on the Hub, and nothing loads it
# What may not be there unlisted: loading it, or loading in the presence of it, runs code.
_RUNS_CODE = (".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".so", ".pyc")


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


def folder_files(folder: Path) -> list[str]:
    """The files of a Hub folder as paths within it: all but its card, its manifest, and what git and caches keep."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if not any(part.startswith(".") or part == "__pycache__" for part in path.parts)
        and path.as_posix() not in (MANIFEST, _CARD)
    )


def write_manifest(folder: str | os.PathLike, names: Iterable[str] | None = None) -> None:
    """Writes the manifest of the files `names` in `folder`, by default of all of them."""
    folder = Path(folder)
    names = folder_files(folder) if names is None else sorted(names)
    files = {name: Fingerprint.of(folder / name)._asdict() for name in names}
    content = {"fsr_hf": __version__, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> tuple[str, dict[str, Fingerprint]]:
    """
    The version of the package that wrote the manifest in `folder`, and the files that it lists.

    Raises:
        `ValueError`: if there is none, or it is not one.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{MANIFEST} is missing: not a folder of fsr-hf, or saved without the package")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        files = {name: Fingerprint(int(e["size"]), str(e["sha256"])) for name, e in content["files"].items()}
        return str(content["fsr_hf"]), files
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error!r}") from error


def compare_manifest(folder: Path, elsewhere: dict[str, Fingerprint] | None = None) -> list[str]:
    """
    How `folder` differs from its manifest, a line for each file.

    Args:
        folder (`Path`): The folder.
        elsewhere (`dict[str, Fingerprint]`, *optional*): What a server says of files that are not in `folder`.

    Raises:
        `ValueError`: if there is no manifest.
    """
    _, listed = read_manifest(folder)
    elsewhere = elsewhere or {}
    present = {*folder_files(folder), *elsewhere}
    differences = []
    for name, wanted in sorted(listed.items()):
        if name not in present:
            differences.append(f"{name} is missing")
            continue
        size = elsewhere[name].size if name in elsewhere else (folder / name).stat().st_size
        if size != wanted.size:
            differences.append(f"{name} has {size} bytes, not {wanted.size}")
        elif (elsewhere[name] if name in elsewhere else Fingerprint.of(folder / name)) != wanted:
            differences.append(f"{name} has other contents")
    for name in sorted(present - listed.keys()):
        if name.endswith(_RUNS_CODE):
            differences.append(f"{name} is not in the manifest")
    return differences
