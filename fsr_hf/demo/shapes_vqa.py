"""The small trained LLaVA that comes with the package, and drawn pictures to ask it about."""

import json
from pathlib import Path
from typing import NamedTuple

from ..package_data import data_folder


__all__ = ["PICTURES", "Example", "example_questions", "shapes_vqa_folder"]

# Drawn pictures and, in questions.json, what is asked about each and what is right.
PICTURES = Path(__file__).with_name("pictures")


class Example(NamedTuple):
    """
    Args:
        image (`Path`): A picture.
        question (`str`): What to ask about it.
        answer (`str`): What is right.
    """

    image: Path
    question: str
    answer: str


def shapes_vqa_folder() -> Path:
    """Its weights, config, tokenizers and processor; the package has the code, and `export` puts both together."""
    return data_folder("checkpoints") / "shapes-vqa"


def example_questions() -> list[Example]:
    """A question about each picture."""
    entries = json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))
    return [Example(PICTURES / entry["image"], entry["question"], entry["answer"]) for entry in entries]
