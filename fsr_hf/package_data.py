"""Where the data of the package is."""

from pathlib import Path


__all__ = ["data_folder"]


def data_folder(name: str) -> Path:
    """A folder of data: part of an installed package, and beside the package in its repository."""
    package = Path(__file__).parent
    return next(folder for folder in (package / name, package.parent / name) if folder.is_dir())
