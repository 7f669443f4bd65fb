"""The small trained LLaVA that comes with the package."""

from pathlib import Path


__all__ = ["shapes_vqa_folder"]


def shapes_vqa_folder() -> Path:
    """Its Hub folder: part of an installed package, and beside the package in its repository."""
    package = Path(__file__).parents[1]
    folders = (parent / "checkpoints" / "shapes-vqa" for parent in (package, package.parent))
    return next(folder for folder in folders if folder.is_dir())
