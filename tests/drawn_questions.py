"""Drawn questions of the small checkpoint: as the processor makes a prompt of one, and as a task of lmms-eval."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fsr_hf.demo.run import PICTURES


__all__ = ["make_inputs", "write_task"]

_TASK = """
task: {name}
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function drawn_pictures.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def make_inputs(processor: Any, picture: Path, question: str) -> Any:
    """A prompt of one row, of a picture and what is asked about it."""
    image = {"type": "image", "image": Image.open(picture).convert("RGB")}
    return processor.apply_chat_template(
        [{"role": "user", "content": [image, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def write_task(folder: Path, name: str, questions: Iterable[dict[str, str]]) -> None:
    """Write the task `name` of entries of questions.json into `folder`, with its data."""
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "image": Image.open(PICTURES / row["image"]).convert("RGB")} for row in questions]
    data = folder / f"{name}-data"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(data)
    (folder / f"{name}.yaml").write_text(_TASK.format(name=name, data=data))
    (folder / "drawn_pictures.py").write_text("def pictures(doc):\n    return [doc['image']]\n")
