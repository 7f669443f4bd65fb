"""
Whether the code in a Hub folder still prunes rightly under the installed transformers: `fsr-hf verify --run FOLDER`.

The folder's own classes build its tiny twin, a model of the same architecture with few random weights. `generate()` on
pruned prompts has to give what a loop over its parts gives: the language model on embeddings put together by hand,
without a cache, one token after the other.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .files import read_json


__all__ = ["check_run"]

_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_window_layers": 2,
}
_CLIP_TEXT = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_QWEN_TOWER = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 48}
_SIDE = 4  # patches on a side of a picture
_BUDGET = 5
_STEPS = 8


def check_run(folder: str | os.PathLike) -> list[str]:
    """
    Runs the code in a Hub folder on the folder's tiny twin.

    Args:
        folder (`str` or `os.PathLike`):
            An exported folder. **Its code is run**: check it first ([`verify`]).

    Returns:
        `list[str]`: a line for each difference, none if all is well.

    Raises:
        `ValueError`: for a folder without code.
    """
    folder = Path(folder)
    model = _build_twin(folder)
    rows = [[7, 8, None, 9, 10, 11, 12, 10, 11], [13, None, 14, 15, None, 16, 17]]  # None is an image or a video
    inputs = _make_inputs(model, rows)
    prompt = model.model.compress(**inputs, num_visual_tokens=_BUDGET)
    if prompt is None or prompt.input_ids.shape[1] >= inputs["input_ids"].shape[1]:
        return ["`compress()` did not prune a prompt over its budget"]
    expected = _decode_by_hand(model, prompt)
    options = {"num_visual_tokens": _BUDGET, "max_new_tokens": _STEPS, "do_sample": False}
    return list(_compare(model, inputs, options, expected))


def _compare(model: Any, inputs: dict[str, Any], options: dict[str, Any], expected: torch.Tensor) -> Iterator[str]:
    length = inputs["input_ids"].shape[1]
    one = _make_inputs(model, [[7, 8, None, 9, 10, 11, 12, 10, 11]])
    expected_one = _decode_by_hand(model, model.model.compress(**one, num_visual_tokens=_BUDGET))
    ways: dict[str, tuple[dict[str, Any], dict[str, Any], torch.Tensor]] = {
        "greedy decoding": (inputs, {}, expected),
        "a static cache": (inputs, {"cache_implementation": "static", "disable_compile": True}, expected),
        "no cache": (inputs, {"use_cache": False}, expected),
        "prompt lookup": (one, {"prompt_lookup_num_tokens": 2}, expected_one),
    }
    for name, (prompt, more, tokens) in ways.items():
        try:
            found = model.generate(**prompt, **options, **more)[:, prompt["input_ids"].shape[1] :]
        except Exception as error:  # whatever an unknown version raises
            yield f"{name}: {type(error).__name__}: {error}"
            continue
        if not torch.equal(found, tokens):
            yield f"{name}: tokens {found.tolist()} in place of {tokens.tolist()}"
    with torch.no_grad():
        logits = model(**inputs, num_visual_tokens=_BUDGET).logits
    if logits.shape[1] != length or not torch.equal(logits[:, -1].argmax(-1), expected[:, 0]):
        yield "`forward()` gives another next token than the language model on the compressed prompt"


def _build_twin(folder: Path) -> Any:
    settings = read_json(folder / "config.json")
    auto_map = settings.get("auto_map") or {}
    if not {"AutoConfig", "AutoModel"} <= auto_map.keys():
        raise ValueError(f"{folder} has no code (`auto_map` in config.json): `fsr-hf export` writes it along.")
    config_class, model_class = (
        get_class_from_dynamic_module(auto_map[name], str(folder)) for name in ("AutoConfig", "AutoModel")
    )
    for name in ("auto_map", "dtype", "torch_dtype", "architectures"):
        settings.pop(name, None)
    text, vision = settings["text_config"], settings["vision_config"]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if "mrope_section" in rope:
        rope["mrope_section"] = [2, 2, 2]
    text |= _TEXT
    text.pop("layer_types", None)
    if "depth" in vision:
        vision |= _QWEN_TOWER
        if "fullatt_block_indexes" in vision:
            vision["fullatt_block_indexes"] = [2]
        if "deepstack_visual_indexes" in vision:
            vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    else:
        side = _SIDE * vision["patch_size"]
        vision |= {**_TOWER, "image_size": side, "projection_dim": 16}
        settings["vision_feature_layer"] = -2 if settings.get("vision_feature_layer", -2) != -1 else -1
        if "image_grid_pinpoints" in settings:
            settings["image_grid_pinpoints"] = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    if settings["fsr_config"].get("text_encoder_config"):
        settings["fsr_config"]["text_encoder_config"] |= _CLIP_TEXT
    config = config_class.from_dict(settings)
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.2 if parameter.ndim > 1 else 0.1, generator=generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _make_inputs(model: Any, rows: list[list[int | None]]) -> dict[str, Any]:
    """The inputs of rows of ids. `None` stands for an image, or a video where the family is one for videos."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    count = sum(row.count(None) for row in rows)
    vision = config.vision_config
    modality, text_side = "image", getattr(model.model, "text_encoder", None)
    visual: dict[str, Any]
    if hasattr(vision, "depth"):
        side = 4 * vision.spatial_merge_size
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        visual = {
            "pixel_values": torch.randn(count * side**2, size, generator=generator),
            "image_grid_thw": torch.tensor([[1, side, side]] * count),
        }
    else:
        pixels = (3, vision.image_size, vision.image_size)
        if hasattr(config, "spatial_pool_mode"):
            modality = "video"
            visual = {"pixel_values_videos": torch.randn(count, 3, *pixels, generator=generator)}
        elif hasattr(config, "image_grid_pinpoints"):
            visual = {
                "pixel_values": torch.randn(count, 5, *pixels, generator=generator),
                "image_sizes": torch.tensor([[2 * vision.image_size] * 2] * count),
            }
        else:
            visual = {"pixel_values": torch.randn(count, *pixels, generator=generator)}
    token = model.model.placeholder_ids[modality]
    lengths = iter([item.length for item in model.model.build_items(**visual)])
    ids = [[t for part in row for t in ([part] if part is not None else [token] * next(lengths))] for row in rows]
    width = max(map(len, ids))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        **visual,
    }
    if text_side is not None:
        settings = config.fsr_config.text_encoder_config
        query = torch.randint(3, 90, (len(rows), text_side.chunk_length), generator=generator)
        query[:, 0], query[:, 9:] = settings.bos_token_id, settings.eos_token_id
        inputs |= {"query_input_ids": query, "query_attention_mask": torch.ones_like(query)}
    return inputs


@torch.no_grad()
def _decode_by_hand(model: Any, prompt: Any) -> torch.Tensor:
    """Greedy tokens `(batch, steps)` of the language model on the compressed prompt."""
    ids, mask, positions = prompt.input_ids, prompt.attention_mask, prompt.position_ids
    embed = model.get_input_embeddings()
    embeds, is_visual, depths = embed(ids), torch.zeros_like(ids, dtype=torch.bool), None
    for modality, output in prompt.mm_encoder_outputs.items():
        own = ids == model.model.placeholder_ids[modality]
        features = output.pooler_output
        embeds[own] = features.flatten(0, 1) if isinstance(features, torch.Tensor) else torch.cat(features)
        is_visual |= own
        if getattr(output, "deepstack_features", None) is not None:
            depths = [torch.cat(list(level)) for level in output.deepstack_features]
    tokens: list[torch.Tensor] = []
    for _ in range(_STEPS):
        more = {} if depths is None else {"visual_pos_masks": is_visual, "deepstack_visual_embeds": depths}
        states = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, **more
        ).last_hidden_state
        tokens.append(model.lm_head(states[:, -1]).argmax(-1))
        embeds = torch.cat([embeds, embed(tokens[-1])[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        is_visual = torch.nn.functional.pad(is_visual, (0, 1))
    return torch.stack(tokens, dim=1)
