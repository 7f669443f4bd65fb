"""What two processes ask a model, and how they compare models. Imports nothing of the package."""

import hashlib

import numpy as np
import torch
from PIL import Image


__all__ = ["digest", "make_inputs", "make_messages"]


def digest(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def make_messages(model_type: str) -> list[dict]:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 120, 120, 3), dtype=np.uint8)
    if "video" in model_type:
        item = {"type": "video", "video": pixels}
    else:
        item = {"type": "image", "image": Image.fromarray(pixels[0])}
    return [{"role": "user", "content": [item, {"type": "text", "text": "a red dog?"}]}]


def make_inputs(processor, model_type: str):
    return processor.apply_chat_template(
        make_messages(model_type),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
