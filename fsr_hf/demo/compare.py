"""
Asks questions about photographs, unpruned and pruned, and measures. `fsr-hf demo` runs this file in a process of its
own that knows torch and transformers and has never heard of this package: all of FSR comes with the checkpoint.

    python -I compare.py REQUEST.json RESULT.json
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any


sys.modules["fsr_hf"] = None  # type: ignore[assignment]  # from here on an import of it fails, installed or not

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModel, AutoProcessor, pipeline  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402
from transformers.utils import logging  # noqa: E402


class Clock(BaseStreamer):
    """The time at which the prompt comes by, and then each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


# Arguments of `generate` for the two runs that are compared.
RUNS: dict[str, dict[str, Any]] = {"unpruned": {"fsr_enabled": False}, "pruned": {"output_visual_selection": True}}


def generate(model, inputs, **options) -> tuple[Any, dict[str, Any]]:
    """
    One call of `generate`: its output, and what was measured.

    Returns:
        `prefill` (`float`): seconds from the call to the first new token, towers and selection included.
        `steps` (`list[float]`): seconds from each new token to the next.
        `length` (`int`): entries of the KV cache after the prefill.
        `cache_bytes` (`int`): their size.
    """
    clock = Clock()
    start = time.perf_counter()
    outputs = model.generate(**inputs, do_sample=False, return_dict_in_generate=True, streamer=clock, **options)
    times = clock.times[1:]
    cache: Any = outputs.get("cache", outputs.get("past_key_values"))  # transformers 5.24 renamed it
    cached = cache.get_seq_length()
    length = cached - (len(times) - 1)  # the last token has been chosen, not cached
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) * length // cached
    return outputs, {
        "prefill": times[0] - start,
        "steps": [later - earlier for earlier, later in itertools.pairwise(times)],
        "length": length,
        "cache_bytes": cache_bytes,
    }


def measure(model, processor, messages: list[dict], max_new_tokens: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Ask a question `repeats` times, unpruned and pruned by turns: medians of the times, and the rest once."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, model.dtype)
    calls: dict[str, list] = {name: [] for name in RUNS}
    for _ in range(repeats):
        for name, options in RUNS.items():
            calls[name].append(generate(model, inputs, max_new_tokens=max_new_tokens, **options))
    prompt_length = inputs["input_ids"].shape[1]
    num_placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    results = {}
    for name, runs in calls.items():
        outputs, measured = runs[-1]
        results[name] = {
            "length": measured["length"],
            "cache_bytes": measured["cache_bytes"],
            "prefill": statistics.median(run["prefill"] for _, run in runs),
            "per_token": statistics.median(step for _, run in runs for step in run["steps"]),
            "num_visual_tokens": num_placeholders - (prompt_length - measured["length"]),
            "num_focus": sum(int(selection.is_focus.sum()) for selection in outputs.get("visual_selections") or []),
            "answer": processor.decode(outputs.sequences[0, prompt_length:], skip_special_tokens=True).strip(),
        }
    return results


def main(request: dict[str, Any]) -> dict[str, Any]:
    logging.disable_progress_bar()
    folder, device = request["folder"], request["device"]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).to(device)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    pipe = pipeline("image-text-to-text", model=folder, device=device, trust_remote_code=True)

    results: list[dict[str, Any]] = []
    for image, question in request["questions"]:
        content = [{"type": "image", "image": Image.open(image).convert("RGB")}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        if not results:  # the first calls of a process are slow
            measure(model, processor, messages, max_new_tokens=2, repeats=1)
        result: dict[str, Any] = {"image": Path(image).name, "question": question}
        result |= measure(model, processor, messages, request["max_new_tokens"], request["repeats"])
        output = pipe(
            text=messages,
            max_new_tokens=request["max_new_tokens"],
            return_full_text=False,
            generate_kwargs={"do_sample": False},
        )
        result["pipeline"] = output[0]["generated_text"].strip()
        results.append(result)
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
    request_file, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps(main(json.loads(request_file.read_text()))))
