"""
The second and the third stage: a projector and a small Llama, trained on questions and answers before a frozen vision
tower. In the second stage they see whole pictures; in the third, most pictures lack some of their tokens.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPModel, LlamaTokenizer, LlavaForConditionalGeneration

from fsr_hf.testing.small_llava import llava_config

from .clip import pixel_values
from .data import KINDS, Object, Question, ask_questions, common_area
from .optimizer import MasterAdamW, train
from .recipe import Recipe
from .scenes import Scenes, memory_map


__all__ = ["encode_scenes", "make_llava", "train_llava", "train_with_dropped_tokens"]

_IGNORED = -100


def train_llava(
    recipe: Recipe,
    scenes: Scenes,
    features: np.ndarray,
    llava: LlavaForConditionalGeneration,
    tokenizer: LlamaTokenizer,
    folder: Path,
    seed: int,
    compiled: bool,
    log,
) -> None:
    """
    The second stage: train `llava` in place, or load what was trained.

    Args:
        features: those of [`encode_scenes`].
    """
    decode: Callable = torch.compile(_decode, dynamic=False) if compiled else _decode
    packer = _Packer(tokenizer, recipe)

    def make_batch(step: int):
        rng = np.random.default_rng((seed, len(KINDS), step))
        _, *batch = _draw_batch(recipe, scenes, features, packer, rng)
        return tuple(batch)

    schedule = {"learning_rate": recipe.learning_rate, "steps": recipe.answer_steps}
    _train("llava", llava, packer, decode, recipe.answer_steps, schedule, make_batch, folder, log)


def train_with_dropped_tokens(
    recipe: Recipe,
    scenes: Scenes,
    features: np.ndarray,
    llava: LlavaForConditionalGeneration,
    tokenizer: LlamaTokenizer,
    folder: Path,
    seed: int,
    compiled: bool,
    log,
) -> None:
    """
    The third stage: go on with `llava`, in place, on pictures that lack tokens, so that it takes pruning as a large
    language model does.

    One step in four has whole pictures. In the others all pictures of a step keep the same number of tokens, a
    random one from an eighteenth of them to all. Which tokens is random, too, by no rule of any pruning method: in
    some pictures the patches of all objects are likelier to stay than the background, in others they are not. Half
    of the pictures keep the positions of the whole prompt, half are numbered anew.

    The result is a weighted mean of the weights before and after the stage (WiSE-FT, arXiv 2109.01903): it answers
    about whole pictures as well as before, and about pictures that lack tokens nearly as well as the trained weights.
    """
    before = {name: parameter.detach().clone() for name, parameter in llava.named_parameters()}
    decode: Callable = torch.compile(_decode, dynamic=True) if compiled else _decode
    packer = _Packer(tokenizer, recipe)

    def make_batch(step: int):
        rng = np.random.default_rng((seed, len(KINDS) + 1, step))
        numbers, *batch = _draw_batch(recipe, scenes, features, packer, rng)
        num_kept = random_budget(recipe.num_patches, rng)
        kept = np.stack([random_tokens(recipe, scenes.objects[number], num_kept, rng) for number in numbers])
        is_original = rng.random(len(numbers)) < 0.5
        return *batch, torch.from_numpy(kept), torch.from_numpy(is_original)

    schedule = {
        "learning_rate": recipe.dropped_learning_rate,
        "steps": recipe.dropped_horizon,
        "last_step": recipe.dropped_steps,
        "cooldown": recipe.dropped_cooldown,
    }
    _train("llava-dropped", llava, packer, decode, recipe.dropped_steps, schedule, make_batch, folder, log)
    share = recipe.dropped_share
    with torch.no_grad():
        for name, parameter in llava.named_parameters():
            parameter.copy_(share * parameter.float() + (1 - share) * before[name].float())


def random_budget(num_patches: int, rng: np.random.Generator) -> int:
    """All tokens one time in four, else from an eighteenth of them on, as often less as more than a quarter or so."""
    if rng.random() < 0.25:
        return num_patches
    return round(num_patches * math.exp(rng.uniform(math.log(1 / 18), 0)))


def random_tokens(recipe: Recipe, objects: Sequence[Object], num_kept: int, rng: np.random.Generator) -> np.ndarray:
    """Which tokens of a picture stay, ascending. The patches of its objects are e^0 to e^4 times as likely to."""
    edge = recipe.patch_size
    steps = range(0, recipe.image_size, edge)
    patches = [(left, top, left + edge, top + edge) for top in steps for left in steps]
    covered = [max((common_area(patch, item.box) for item in objects), default=0) / edge**2 for patch in patches]
    # The highest sums of a weight's logarithm and Gumbel noise are a sample without replacement by these weights.
    scores = rng.uniform(0, 4) * np.array(covered) + rng.gumbel(size=len(patches))
    return np.sort(np.argsort(-scores)[:num_kept])


def _draw_batch(recipe: Recipe, scenes: Scenes, features: np.ndarray, packer: "_Packer", rng: np.random.Generator):
    """The numbers of some scenes; their features; and questions about them, a column of [`_Packer.pack`] each."""
    numbers = rng.integers(len(scenes.objects), size=recipe.answer_batch)
    rows = [packer.pack(ask_questions(scenes.objects[number], rng), rng) for number in numbers]
    seen = torch.from_numpy(features[numbers]).view(torch.bfloat16)
    return numbers, seen, *(torch.tensor(column) for column in zip(*rows))


def _train(
    name: str,
    llava: LlavaForConditionalGeneration,
    packer: "_Packer",
    decode: Callable,
    steps: int,
    schedule: dict[str, Any],
    make_batch: Callable[[int], tuple],
    folder: Path,
    log,
) -> None:
    """
    Train projector and language model on answers, and leave the model in eval mode.

    Args:
        schedule: arguments of [`MasterAdamW`].
    """
    device = llava.device
    llava.train()
    llava.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    for tower, parameter in llava.named_parameters():
        parameter.requires_grad_("vision_tower" not in tower and "text_encoder" not in tower)
    before = torch.tensor(packer.before_image, device=device)

    def loss_of(*batch):
        seen, input_ids, turns, labels, kinds, *dropped = (tensor.to(device) for tensor in batch)
        hidden = decode(llava, seen, before, input_ids, turns, *dropped)
        answered = labels != _IGNORED
        logits = llava.lm_head(hidden[answered]).float()
        labels, kinds = labels[answered], kinds[answered]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        right, is_word = (logits.argmax(-1) == labels).float(), labels != packer.tokenizer.eos_token_id
        figures = {kind: right[(kinds == number) & is_word].mean() for number, kind in enumerate(KINDS)}
        return loss, {kind: value.detach().nan_to_num() for kind, value in figures.items()}

    optimizer = MasterAdamW(llava.parameters(), **schedule)
    train(name, optimizer, steps, make_batch, loss_of, folder / f"{name}.pt", log)
    llava.eval()


def make_llava(recipe: Recipe, clip: CLIPModel, tokenizer: LlamaTokenizer) -> LlavaForConditionalGeneration:
    config = llava_config(
        recipe.size,
        tokenizer,
        clip.config.vision_config,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=2048,
        initializer_range=recipe.width**-0.5,  # at the usual 0.02, so narrow a model attends to all alike for long
    )
    llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    return llava


@torch.no_grad()
def encode_scenes(recipe: Recipe, scenes: Scenes, tower: torch.nn.Module, file: Path, device: str) -> np.ndarray:
    """What the frozen tower makes of every scene, `(num_scenes, num_patches, vision_width)`, bfloat16 as int16."""
    done_file = file.with_suffix(".done")
    features = memory_map(file, (len(scenes.objects), recipe.num_patches, recipe.vision_width), np.int16)
    if done_file.exists():
        return features
    for start in tqdm(range(0, len(features), 100), desc="features", unit="batch"):
        pixels = torch.from_numpy(scenes.pixels[start : start + 100]).to(device)
        hidden = tower(pixel_values(pixels, torch.bfloat16), output_hidden_states=True).hidden_states[-2]
        features[start : start + 100] = hidden[:, 1:].contiguous().view(torch.int16).cpu().numpy()
    done_file.touch()
    return features


class _Packer:
    """
    Many questions about one picture in one row. By themselves they see the picture and not each other, as if each had
    been asked alone; one row in four is a conversation, in which a question sees what came before it.
    """

    def __init__(self, tokenizer: LlamaTokenizer, recipe: Recipe):
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        first = self._ids("USER: <image>")
        self.before_image = first[:-1]
        self.length = recipe.sequence - recipe.num_patches - len(self.before_image)

    def _ids(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text).input_ids
        return self.cache[text]

    def _after(self, start: str, text: str) -> list[int]:
        """The tokens of a text that goes on after `start`."""
        return self._ids(start + text)[len(self._ids(start)) :]

    def pack(self, questions: list[Question], rng: np.random.Generator) -> tuple[list[int], ...]:
        """
        Returns, all of the same length: the tokens after the image; the turn of each, where 0 is seen by all; the
        token to be said after it, or -100; the number of the question's kind.
        """
        is_chat = rng.random() < 0.25
        input_ids, turns, labels, kinds = [], [], [], []
        for turn, question in enumerate(_by_turns(questions, rng), start=1):
            if is_chat and turn > 1:
                prompt = self._after("USER: <image>", f" USER: {question.text} ASSISTANT:")
            else:
                prompt = self._after("USER: <image>", f"\n{question.text} ASSISTANT:")
            answer = self._after("ASSISTANT:", f" {question.answer}")
            if len(input_ids) + len(prompt) + len(answer) > self.length:
                break
            input_ids += prompt + answer
            labels += [_IGNORED] * (len(prompt) - 1) + [*answer, self.tokenizer.eos_token_id]
            turns += [0 if is_chat else turn] * (len(prompt) + len(answer))
            kinds += [KINDS.index(question.kind)] * (len(prompt) + len(answer))
        padding = self.length - len(input_ids)
        fills = (self.tokenizer.pad_token_id, -1, _IGNORED, -1)
        return tuple(c + [fill] * padding for c, fill in zip((input_ids, turns, labels, kinds), fills))


def _by_turns(questions: list[Question], rng: np.random.Generator) -> list[Question]:
    """In random order, one of each kind before the second of any."""
    rank: dict[str, int] = {}
    ranked = []
    for number in rng.permutation(len(questions)):
        question = questions[number]
        rank[question.kind] = rank.get(question.kind, 0) + 1
        ranked.append((rank[question.kind], rng.random(), question))
    return [question for _, _, question in sorted(ranked, key=lambda item: item[:2])]


def _decode(
    llava: LlavaForConditionalGeneration, features, before, input_ids, turns, kept=None, is_original=None
) -> torch.Tensor:
    """
    The last hidden states at the tokens after the image.

    Args:
        features: `(batch, num_patches, vision_width)`.
        before: `(num_before,)`, the tokens before the image.
        input_ids, turns: `(batch, length)`.
        kept: `(batch, num_kept)`, ascending: the patches that the language model sees. By default all.
        is_original: `(batch,)`, whether the others leave gaps in the positions.
    """
    model = llava.model.language_model
    embed, batch, length = model.embed_tokens, *input_ids.shape
    num_before, num_patches = len(before), features.shape[1]
    if kept is not None:
        features = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
    image = llava.model.multi_modal_projector(features)
    hidden = torch.cat([embed(before).expand(batch, -1, -1), image, embed(input_ids)], dim=1)
    total = hidden.shape[1]
    turns = torch.nn.functional.pad(turns, (total - length, 0))
    seen = ((turns[:, None] == 0) | (turns[:, None] == turns[..., None])).tril()  # [B, queries, keys]
    mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~seen, -3e38)[:, None]
    places = torch.arange(total, device=hidden.device)[None]
    if kept is not None:
        first = num_before + kept.shape[1]
        original = torch.cat(
            [
                places[:, :num_before].expand(batch, -1),
                num_before + kept,
                (places[:, first:] + num_patches - kept.shape[1]).expand(batch, -1),
            ],
            dim=1,
        )
        places = torch.where(is_original[:, None], original, places)
    positions = model.rotary_emb(hidden, places)
    for layer in model.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=positions)
    return model.norm(hidden[:, -length:])
