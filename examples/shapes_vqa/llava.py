"""The second stage: a projector and a small Llama, trained on questions and answers before a frozen vision tower."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPModel, LlamaTokenizer, LlavaForConditionalGeneration

from fsr_hf.testing.small_llava import llava_config

from .clip import pixel_values
from .data import KINDS, Question, ask_questions
from .optimizer import MasterAdamW, train
from .recipe import Recipe
from .scenes import Scenes, memory_map


__all__ = ["train_llava"]

_IGNORED = -100


def train_llava(
    recipe: Recipe,
    scenes: Scenes,
    clip: CLIPModel,
    tokenizer: LlamaTokenizer,
    folder: Path,
    device: str,
    seed: int,
    compiled: bool,
    log,
) -> LlavaForConditionalGeneration:
    """Train, or load what was trained, and return the model in eval mode."""
    features = _encode_scenes(recipe, scenes, clip, folder / "features.npy", device)
    torch.manual_seed(seed)
    llava = make_llava(recipe, clip, tokenizer).to(device, torch.bfloat16).train()
    llava.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    llava.model.vision_tower.requires_grad_(False)
    decode: Callable = torch.compile(_decode, dynamic=False) if compiled else _decode
    packer = _Packer(tokenizer, recipe)
    before = torch.tensor(packer.before_image, device=device)

    def make_batch(step: int):
        rng = np.random.default_rng((seed, len(KINDS), step))
        numbers = rng.integers(len(scenes.objects), size=recipe.answer_batch)
        rows = [packer.pack(ask_questions(scenes.objects[number], rng), rng) for number in numbers]
        seen = torch.from_numpy(features[numbers]).view(torch.bfloat16)
        return seen, *(torch.tensor(column) for column in zip(*rows))

    def loss_of(*batch):
        seen, input_ids, turns, labels, kinds = (tensor.to(device) for tensor in batch)
        hidden = decode(llava, seen, before, input_ids, turns)
        answered = labels != _IGNORED
        logits = llava.lm_head(hidden[answered]).float()
        labels, kinds = labels[answered], kinds[answered]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        right, is_word = (logits.argmax(-1) == labels).float(), labels != tokenizer.eos_token_id
        figures = {kind: right[(kinds == number) & is_word].mean() for number, kind in enumerate(KINDS)}
        return loss, {kind: value.detach().nan_to_num() for kind, value in figures.items()}

    optimizer = MasterAdamW(llava.parameters(), recipe.learning_rate, recipe.answer_steps)
    train("llava", optimizer, recipe.answer_steps, make_batch, loss_of, folder / "llava.pt", log)
    return llava.eval()


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
def _encode_scenes(recipe: Recipe, scenes: Scenes, clip: CLIPModel, file: Path, device: str) -> np.ndarray:
    """What the frozen tower makes of every scene, `(num_scenes, num_patches, vision_width)`, bfloat16 as int16."""
    done_file = file.with_suffix(".done")
    features = memory_map(file, (len(scenes.objects), recipe.num_patches, recipe.vision_width), np.int16)
    if done_file.exists():
        return features
    for start in tqdm(range(0, len(features), 100), desc="features", unit="batch"):
        pixels = torch.from_numpy(scenes.pixels[start : start + 100]).to(device)
        tower = clip.vision_model
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


def _decode(llava: LlavaForConditionalGeneration, features, before, input_ids, turns) -> torch.Tensor:
    """
    The last hidden states at the tokens after the image.

    Args:
        features: `(batch, num_patches, vision_width)`.
        before: `(num_before,)`, the tokens before the image.
        input_ids, turns: `(batch, length)`.
    """
    model = llava.model.language_model
    embed, batch, length = model.embed_tokens, *input_ids.shape
    image = llava.model.multi_modal_projector(features)
    hidden = torch.cat([embed(before).expand(batch, -1, -1), image, embed(input_ids)], dim=1)
    total = hidden.shape[1]
    turns = torch.nn.functional.pad(turns, (total - length, 0))
    seen = ((turns[:, None] == 0) | (turns[:, None] == turns[..., None])).tril()  # [B, queries, keys]
    mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~seen, -3e38)[:, None]
    positions = model.rotary_emb(hidden, torch.arange(total, device=hidden.device)[None])
    for layer in model.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=positions)
    return model.norm(hidden[:, -length:])
