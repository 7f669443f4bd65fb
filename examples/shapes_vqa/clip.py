"""
The first stage: a CLIP, trained contrastively on captions of windows of scenes, of close-ups, and of whole scenes.

Scenes with a held-out pair of shape and colour are left out. The close-ups of a batch show few pairs of shape and
colour, so that the digits and letters tell their captions apart.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from fsr_hf.testing.small_llava import clip_config

from .data import HELD_OUT_PAIRS, Object, caption, common_area
from .optimizer import MasterAdamW, train
from .recipe import Recipe
from .scenes import Scenes


__all__ = ["pixel_values", "train_clip"]


def pixel_values(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """From `(batch, height, width, 3)` in uint8 to what CLIP sees, `(batch, 3, height, width)`."""
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(dtype)


def train_clip(
    recipe: Recipe, scenes: Scenes, tokenizer: CLIPTokenizer, folder: Path, device: str, seed: int, compiled: bool, log
) -> CLIPModel:
    """Train, or load what was trained, and return the model in eval mode."""
    torch.manual_seed(seed)
    clip = CLIPModel(clip_config(recipe.size, tokenizer)).to(device, torch.bfloat16).train()
    # On a CPU, the backward pass of the fused attention kernel is slower than plain matrix products.
    clip.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    encode: Callable = torch.compile(_encode, dynamic=False) if compiled else _encode
    side = recipe.image_size // recipe.patch_size

    def loss_of(pixels, windows, input_ids, keys):
        pixels, windows, input_ids, keys = (tensor.to(device) for tensor in (pixels, windows, input_ids, keys))
        images = encode(clip, pixel_values(_jitter(pixels), torch.bfloat16), windows)
        texts = clip.text_projection(clip.text_model(input_ids=input_ids).pooler_output)
        return _contrastive_loss(images, texts, clip.logit_scale, keys)

    captioned = _captioned(scenes)
    by_pair = _by_pair(scenes, captioned)

    def make_batch(stage: int, batch: int, window: int, alike: bool, step: int):
        rng = np.random.default_rng((seed, stage, step))
        drawn = _draw_alike(by_pair, batch, rng) if alike else _draw(scenes, captioned, batch, rng)
        numbers = [number for number, _ in drawn]
        corners = [_place_window(item.box, window, side, recipe.patch_size, rng) for _, item in drawn]
        edge = window * recipe.patch_size
        pixels = np.empty((batch, edge, edge, 3), np.uint8)
        captions, keys = [], []
        for row, (number, (x, y)) in enumerate(zip(numbers, corners)):
            left, top = x * recipe.patch_size, y * recipe.patch_size
            pixels[row] = scenes.pixels[number, top : top + edge, left : left + edge]
            seen = [item for item in scenes.objects[number] if _share(item.box, left, top, edge) > 0.6]
            captions.append(caption(seen, rng))
            keys.append(hash(tuple(sorted((o.shape, o.color, o.character or "") for o in seen))))
        columns, rows = torch.tensor(corners).unbind(1)
        steps = torch.arange(window)
        windows = (rows[:, None, None] + steps[:, None]) * side + columns[:, None, None] + steps
        input_ids = tokenizer(captions, padding="max_length", max_length=_text_length(window, side), truncation=True)
        return torch.from_numpy(pixels), windows.flatten(1), torch.tensor(input_ids.input_ids), torch.tensor(keys)

    stages = (
        ("clip-crops", recipe.crop_steps, recipe.crop_batch, side // 2, False),
        ("clip-close", recipe.close_steps, recipe.crop_batch, side * 5 // 12, True),
        ("clip-scenes", recipe.scene_steps, recipe.scene_batch, side, False),
    )
    for stage, (name, steps, *batch) in enumerate(stages):
        optimizer = MasterAdamW(clip.parameters(), recipe.clip_learning_rate / (1 + (stage > 0)), steps)
        train(name, optimizer, steps, partial(make_batch, stage, *batch), loss_of, folder / f"{name}.pt", log)
    return clip.eval()


def _encode(clip: CLIPModel, pixels: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """
    Embeddings of pictures, or of windows of pictures, each patch at the position that it has in the whole picture.

    Args:
        pixels: `(batch, 3, height, width)`.
        windows: `(batch, num_patches)`, the number of each patch in the whole picture.
    """
    tower = clip.vision_model
    table = tower.embeddings.position_embedding.weight
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + table[windows + 1]
    first = (tower.embeddings.class_embedding + table[0]).expand(len(pixels), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([first, patches], dim=1))
    for layer in tower.encoder.layers:
        hidden = layer(hidden, attention_mask=None)
    return clip.visual_projection(tower.post_layernorm(hidden[:, 0]))


def _contrastive_loss(images, texts, logit_scale, keys):
    """CLIP's loss, in which all captions that say the same of a picture are right for it."""
    images, texts = normalize(images.float(), dim=-1), normalize(texts.float(), dim=-1)
    logits = images @ texts.T * logit_scale.float().exp().clamp(max=100)
    same = (keys[:, None] == keys).float()
    targets = same / same.sum(-1, keepdim=True)
    loss = (
        torch.nn.functional.cross_entropy(logits, targets) + torch.nn.functional.cross_entropy(logits.T, targets)
    ) / 2
    hits = same.gather(1, logits.argmax(-1, keepdim=True)).mean()
    return loss, {"retrieved": hits.detach()}


def _jitter(pixels: torch.Tensor) -> torch.Tensor:
    """Each picture a little brighter or darker, with more or less contrast."""
    gain = torch.empty(len(pixels), 1, 1, 1, device=pixels.device).uniform_(0.8, 1.2)
    shift = torch.empty_like(gain).uniform_(-20, 20)
    return ((pixels.float() - 128) * gain + 128 + shift).clamp(0, 255)


def _captioned(scenes: Scenes) -> np.ndarray:
    """The numbers of the scenes without a held-out pair."""
    return np.flatnonzero([HELD_OUT_PAIRS.isdisjoint(item.pair for item in objects) for objects in scenes.objects])


def _draw(scenes: Scenes, captioned: np.ndarray, batch: int, rng) -> list[tuple[int, Object]]:
    """Scenes, and an object of each."""
    numbers = rng.choice(captioned, size=batch)
    return [(n, scenes.objects[n][rng.integers(len(scenes.objects[n]))]) for n in numbers]


def _by_pair(scenes: Scenes, captioned: np.ndarray) -> list[list[tuple[int, Object]]]:
    """For each shape and colour, every object of it that has a character and is not hidden, with its scene."""
    found: dict[tuple[str, str], list[tuple[int, Object]]] = {}
    for number in captioned:
        for item in scenes.objects[number]:
            if item.character is not None and item.visible > 0.95:
                found.setdefault(item.pair, []).append((number, item))
    return [found[pair] for pair in sorted(found)]


def _draw_alike(by_pair: list[list[tuple[int, Object]]], batch: int, rng) -> list[tuple[int, Object]]:
    """Objects of two to six pairs of shape and colour, each with its scene."""
    pairs = rng.choice(len(by_pair), size=min(rng.integers(2, 7), len(by_pair)), replace=False)
    return [by_pair[pair][rng.integers(len(by_pair[pair]))] for pair in rng.choice(pairs, size=batch)]


def _place_window(box: tuple[int, ...], window: int, side: int, patch: int, rng) -> tuple[int, int]:
    """Left and upper patch of a window that holds the box of an object."""
    if window == side:
        return 0, 0
    left, top, right, bottom = box

    def corner(low: int, high: int) -> int:
        first, last = max(0, -(-high // patch) - window), min(low // patch, side - window)
        return int(rng.integers(min(first, last), max(first, last) + 1))

    return corner(left, right), corner(top, bottom)


def _share(box: tuple[int, ...], left: int, top: int, edge: int) -> float:
    """The share of a box that a window shows."""
    return common_area(box, (left, top, left + edge, top + edge)) / common_area(box, box)


def _text_length(window: int, side: int) -> int:
    return 77 if window == side else 40
