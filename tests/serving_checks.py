"""What the tests of all families need: an engine's answers, and those of the transformers model."""

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import fsr_hf  # noqa: F401  the Auto classes find the model and its processor


__all__ = ["TOKENS", "Reference", "drawn_picture", "drawn_video", "needs_vllm", "run_engine"]

TOKENS = 8
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm")


def run_engine(tmp_path: Path, folder: Path, batches: list[list[dict[str, Any]]], **options: Any) -> list[dict]:
    """The answers of a vLLM engine to batches of prompts, see `serving_engine.py`."""
    jobs, results = tmp_path / "jobs.pickle", tmp_path / "results.pickle"
    options = {"model": str(folder), "max_model_len": 4096, **options}
    jobs.write_bytes(pickle.dumps((options, batches)))
    command = [sys.executable, str(Path(__file__).with_name("serving_engine.py")), str(jobs), str(results)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return pickle.loads(results.read_bytes())


def drawn_picture(seed: int, width: int, height: int) -> Image.Image:
    """Squares of random colours: parts of the picture differ, and pictures of two seeds do."""
    rng = np.random.default_rng(seed)
    squares = Image.fromarray((rng.random((6, 6, 3)) * 255).astype("uint8"))
    return squares.resize((width, height), Image.Resampling.NEAREST)


def drawn_video(seed: int, num_frames: int, width: int, height: int) -> np.ndarray:
    """Frames `(num_frames, height, width, 3)`."""
    return np.stack([np.asarray(drawn_picture(100 * seed + frame, width, height)) for frame in range(num_frames)])


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[float]
    kept: list[list[int]]
    length: int


class Reference:
    """The transformers model of a folder, which `tests/oracle.py` checks elsewhere."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def answer(self, prompt: str, processor_kwargs: dict[str, Any], **generate_kwargs: Any) -> Answer:
        inputs = self.processor(text=[prompt], return_tensors="pt", **processor_kwargs)
        length = inputs["input_ids"].shape[1]
        is_pruned = bool(processor_kwargs) and generate_kwargs.get("fsr_enabled", True)
        output = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
            output_visual_selection=is_pruned,
            **generate_kwargs,
        )
        tokens = output.sequences[0, length:].tolist()
        logprobs = [float(step[0].log_softmax(-1)[token]) for step, token in zip(output.logits, tokens)]
        if is_pruned:
            kept = [selection.indices.tolist() for selection in output.visual_selections]
            length -= sum(len(selection.priority) - len(selection.indices) for selection in output.visual_selections)
        else:  # of one image or video at most
            placeholders = torch.tensor(list(self.model.model.placeholder_ids.values()))
            count = int(torch.isin(inputs["input_ids"], placeholders).sum())
            kept = [list(range(count))] if count else []
        return Answer(tokens, logprobs, kept, length)
