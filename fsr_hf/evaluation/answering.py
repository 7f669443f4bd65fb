"""Asks a model the questions of `fsr-hf eval`, unpruned and at every budget, and writes down what it answers."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

from ..bench import Method, synchronize
from ..processing.processing_fsr_llava_video import sample_frames
from ..processing.video_files import read_video
from .questions import Question


__all__ = ["UNPRUNED", "Budget", "Records", "answer", "build_inputs", "find_items", "label", "options_of"]

Budget = int | float | None  # tokens, a share, or unpruned
UNPRUNED = "unpruned"


def label(budget: Budget) -> str:
    """The budget as files and tables have it."""
    return UNPRUNED if budget is None else str(budget)


def options_of(budget: Budget) -> dict[str, Any]:
    """Arguments of `generate` for a budget, whether the checkpoint prunes by itself or not."""
    return {"fsr_enabled": budget is not None} | Method(label(budget), budget).options


def build_inputs(processor: Any, questions: Sequence[Question], instruction: str | None, num_frames: int) -> Any:
    """What the processor makes of a batch of questions, padded on the left."""
    conversations, metadata = [], []
    for question in questions:
        content: list[dict[str, Any]] = [{"type": "image", "image": opens()} for opens in question.images]
        if question.video is not None:
            choose = partial(sample_frames, num_frames=num_frames)
            frames, facts = read_video(processor.video_processor, str(question.video), choose)
            content.append({"type": "video", "video": frames})
            metadata.append(facts)
        text = question.text if instruction is None else f"{question.text}\n{instruction}"
        conversations.append([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])
    settings: dict[str, Any] = {"padding": True, "padding_side": "left"}
    if metadata:
        settings |= {"video_metadata": metadata, "do_sample_frames": False}
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=settings,
    )


def find_items(model: Any, inputs: Any) -> list[Any]:
    """The images and videos of a prompt, with row, placeholders and candidates; the model needs no weights."""
    inner = model.model
    visual = inner.pop_visual(dict(inputs))
    return inner.place_items(inputs["input_ids"].cpu(), inner.build_items(**visual))


class _Clock(StoppingCriteria):
    """Never stops, and remembers when each new token was there."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _watching(language_model: torch.nn.Module) -> Iterator[list[list[int]]]:
    """A list to which each call of the language model adds how many tokens of each row it may attend to."""
    seen: list[list[int]] = []

    def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        embeddings, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise RuntimeError(f"the language model got a mask of {mask.ndim} dimensions, which is not counted.")
        widths = [embeddings.shape[1]] * len(embeddings) if mask is None else mask.sum(-1).tolist()
        if not seen:  # the prompt; afterwards come single tokens
            seen.append([int(width) for width in widths])

    handle = language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def answer(model: Any, processor: Any, inputs: Any, budget: Budget, max_new_tokens: int) -> dict[str, Any]:
    """
    Answer a batch of questions by greedy decoding.

    Returns:
        `answers` (`list[str]`), `prompt_tokens` and `visual_tokens` (`list[int]`, what the language model saw of each
        row), `prefill` (`float`, seconds from the call to the first new token, towers and selection included) and
        `decode` (`float`, seconds for each token after it, `None` if there is none).

    Raises:
        `RuntimeError`: if the language model saw other tokens than the budget says.
    """
    length, items = inputs["input_ids"].shape[1], find_items(model, inputs)
    words = inputs["attention_mask"].sum(-1).tolist()
    expected = list(words)
    method = Method(label(budget), budget)
    for item in items:
        words[item.row] -= item.length
        kept = method.kept(item.num_candidates)
        if kept < item.num_candidates:
            expected[item.row] -= item.length - kept
    clock = _Clock(model.device)
    with _watching(model.model.language_model) as seen:
        synchronize(model.device)
        start = time.perf_counter()
        output = model.generate(
            **inputs,
            **options_of(budget),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            stopping_criteria=[clock],
        )
    if seen != [expected]:
        raise RuntimeError(
            f"at the budget {label(budget)} the language model saw {seen[0] if seen else None} tokens of each row, in "
            f"place of {expected}. `fsr-hf verify --run` checks the code of a folder under this transformers."
        )
    first, *rest = clock.times
    return {
        "answers": [text.strip() for text in processor.batch_decode(output[:, length:], skip_special_tokens=True)],
        "prompt_tokens": seen[0],
        "visual_tokens": [found - text for found, text in zip(seen[0], words)],
        "prefill": first - start,
        "decode": (rest[-1] - first) / len(rest) if rest else None,
    }


class Records:
    """
    What has been answered, in a folder: one line of JSON for each batch and budget, written when it is done.

    Args:
        folder (`Path`):
            Where the files are, one for each process.
        process (`int`):
            The number of this process.
    """

    def __init__(self, folder: Path, process: int):
        self._folder = folder
        self._file = folder / f"records-{process}.jsonl"

    def read(self) -> dict[tuple[int, str], dict[str, Any]]:
        """
        The records of all processes, by batch and label.

        Raises:
            `ValueError`: for a file that is damaged.
        """
        found = {}
        for file in sorted(self._folder.glob("records-*.jsonl")):
            lines = file.read_text(encoding="utf-8").split("\n")
            for number, line in enumerate(lines[:-1], start=1):  # a last line without an end was interrupted
                try:
                    record = json.loads(line)
                    found[record["batch"], record["budget"]] = record
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{file}, line {number} is damaged: delete the line, or the folder.") from error
        return found

    def drop_interrupted(self) -> None:
        """Cut off what an interrupted process has left of a line."""
        for file in self._folder.glob("records-*.jsonl"):
            text = file.read_bytes()
            end = text.rfind(b"\n") + 1
            if end < len(text):
                file.write_bytes(text[:end])

    def add(self, record: dict[str, Any]) -> None:
        """Write a record."""
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
