"""The small trained LLaVA that comes with the package."""

from pathlib import Path

from ..package_data import data_folder


__all__ = ["shapes_vqa_folder"]


def shapes_vqa_folder() -> Path:
    """Its weights, config, tokenizers and processor; the package has the code, and `export` puts both together."""
    return data_folder("checkpoints") / "shapes-vqa"
