"""
Asks models about pictures, in several ways each, and measures. `fsr-hf demo` runs this file in a process of its own
that knows torch and transformers and has never heard of this package: all of FSR comes with the checkpoint.

    python -I compare.py REQUEST.json RESULT.json
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any


if __name__ == "__main__":
    sys.modules["fsr_hf"] = None  # type: ignore[assignment]  # an import of it fails, installed or not

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging


__all__ = ["generate"]


class Clock(BaseStreamer):
    """The time at which the prompt comes by, and then each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model, inputs, **options) -> tuple[Any, dict[str, Any]]:
    """
    One call of `generate` with one picture: its output, and what was measured.

    Returns:
        `prefill` (`float`): seconds from the call to the first new token, towers and selection included.
        `seconds` (`float`): of the whole call.
        `length` (`int`): tokens that the language model saw before the first new one: entries of its KV cache.
        `visual_tokens` (`int`): how many of them came from the picture.
        `cache_bytes` (`int`): the size of the KV cache then.
    """
    clock = Clock()
    start = time.perf_counter()
    outputs = model.generate(**inputs, do_sample=False, return_dict_in_generate=True, streamer=clock, **options)
    seconds = time.perf_counter() - start
    times = clock.times[1:]
    cache: Any = outputs["cache" if "cache" in outputs else "past_key_values"]  # transformers 5.24 renamed it
    cached = cache.get_seq_length()
    length = cached - (len(times) - 1)  # the last token has been chosen, not cached
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) * length // cached
    input_ids = inputs["input_ids"]
    placeholders = int((input_ids == model.config.image_token_id).sum())
    return outputs, {
        "prefill": times[0] - start,
        "seconds": seconds,
        "length": length,
        "visual_tokens": placeholders - (input_ids.shape[1] - length),
        "cache_bytes": cache_bytes,
    }


def measure(
    model, processor, messages: list[dict], runs: dict[str, dict], max_new_tokens: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """
    Ask a question `repeats` times, by each of the `runs` in turn, names and arguments of `generate`: medians of the
    times, and the rest once.
    """
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, model.dtype)
    calls: dict[str, list] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, options in runs.items():
            calls[name].append(generate(model, inputs, max_new_tokens=max_new_tokens, **options))
    results = {}
    for name, repeated in calls.items():
        outputs, measured = repeated[-1]
        answer = processor.decode(outputs.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        results[name] = {
            **{field: measured[field] for field in ("length", "visual_tokens", "cache_bytes")},
            "prefill": statistics.median(run["prefill"] for _, run in repeated),
            "answer": answer.strip(),
        }
    return results


def compare(folder: str, device: str, questions: list, runs: dict, max_new_tokens: int, repeats: int) -> dict:
    """All about one model: what it is, and what [`measure`] says of each question."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).to(device)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    results: list[dict[str, Any]] = []
    for image, question in questions:
        content = [{"type": "image", "image": Image.open(image).convert("RGB")}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        if not results:  # the first calls of a process are slow
            measure(model, processor, messages, runs, max_new_tokens=2, repeats=1)
        measured = measure(model, processor, messages, runs, max_new_tokens, repeats)
        results.append({"image": Path(image).name, "question": question, "runs": measured})
    return {
        "model": type(model).__name__,
        "code": type(model).__module__.rpartition(".")[2],
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device),
        "num_threads": torch.get_num_threads(),
        "questions": results,
    }


if __name__ == "__main__":
    logging.disable_progress_bar()
    request_file, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps([compare(**job) for job in json.loads(request_file.read_text())]))
