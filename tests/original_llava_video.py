"""Checkpoints as LLaVA-Video's own code saves them: its config, its names of weights."""

import json
from pathlib import Path
from typing import Any

import torch
from families import SIGLIP_VISION_CONFIG, TEXT_CONFIG
from safetensors.torch import save_file


__all__ = ["ORIGINAL_CONFIG", "ORIGINAL_NAMES", "save_original"]

ORIGINAL_CONFIG = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava",
    "add_faster_video": False,
    "hidden_act": "silu",
    "image_aspect_ratio": "anyres_max_2",
    "image_grid_pinpoints": "(1x1),...,(2x3)",
    "mm_hidden_size": 32,
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "average",
    "mm_spatial_pool_stride": 2,
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "siglip-of-the-tests",
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "torch_dtype": "float32",
    "vision_config": SIGLIP_VISION_CONFIG,
    **TEXT_CONFIG,
}
ORIGINAL_NAMES = (
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.language_model.", "model."),
)


def save_original(folder: Path, model: torch.nn.Module, **config: Any) -> None:
    """The weights of `model` as LLaVA-Video's own code saves them."""
    weights = {}
    for name, weight in model.state_dict().items():
        for ours, original in ORIGINAL_NAMES:
            if name.startswith(ours):
                name = original + name.removeprefix(ours)
                break
        weights[name] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, **config}))
