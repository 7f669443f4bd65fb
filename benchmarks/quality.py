"""
How good answers are after pruning: FSR, its ablations and its peers on the same questions and the same model.

The questions are those of Shapes-VQA's test split. An answer is right if greedy decoding gives it, word for word. That
is so if, and only if, with the answer as the continuation of the prompt every token of it, the end of text included,
is the most likely one at its place: one pass for a batch of questions, without decoding. The vision tower and the
scores are computed once for a question, and each method selects from them for the whole batch. What it keeps is asked
about twice: with the positions that it has without pruning ("original"), and numbered anew ("compact"). A few
questions go through `generate()` as well, and the run stops if it does not agree.

Seeds 0 to 99 are for development: whatever was chosen by results was chosen on them. docs/quality.json is of seeds
1000 to 1003.

    python -m benchmarks.quality --seeds 1000,1001,1002,1003 --questions 2000 --json docs/quality.json
    python -m benchmarks.quality_page        # tables and plot of docs/quality.md
"""

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.utils import logging

from benchmarks.selectors import (
    Kept,
    cdpruner,
    divprune,
    fastervlm,
    fsr,
    holov,
    idpruner,
    prunesid,
    random_tokens,
    scope,
    uniform_grid,
    visionzip,
    vispruner,
)
from examples.shapes_vqa.data import HELD_OUT_PAIRS, KINDS, Question, Scene, held_out_questions
from fsr_hf import FSRLlavaConfig, FSRLlavaForConditionalGeneration, FSRLlavaProcessor, select_visual_tokens
from fsr_hf.configuration.configuration_fsr import SELECTION_FIELDS
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder
from fsr_hf.machine import provenance
from fsr_hf.modeling.relevance import patch_values


__all__ = ["BUDGETS", "METHODS", "Batch", "Method", "encode", "focus_sizes", "is_right", "measure", "object_patches"]

# The paper's 192, 128, 64 and 32 of 576 tokens.
BUDGETS = ("1/3", "2/9", "1/9", "1/18")
POSITIONS = ("compact", "original")
# A kind of question that the model itself does not answer is no measure of what pruning costs.
LEAST_ACCURACY = 0.6


def _by_priority(select: Callable[..., Kept]) -> Callable[..., Kept]:
    """A peer that ranks by saliency, given the product with relevance in its place."""

    def select_by_priority(features, saliency, relevance, num_kept: int, **extra) -> Kept:
        priority = _priority(saliency, relevance, alpha=1.0, beta=1.0)
        return select(features, priority, relevance, num_kept, **extra)

    return select_by_priority


def _fsr_without_scan(features, saliency, relevance, num_kept: int, **settings) -> Kept:
    return fastervlm(features, _priority(saliency, relevance, **settings), None, num_kept)


# The package's defaults for LLaVA: what a variant of FSR does not change.
_FSR = FSRLlavaConfig().fsr_config
_DEFAULTS = {name: getattr(_FSR, name) for name in SELECTION_FIELDS}
# The paper's formulas, where it says something of the matter.
_PAPER = {"focus_limit": 1.0, "uniform_scan": 0.0, "kappa": 1.0}


@dataclass(frozen=True)
class Method:
    """
    One line of the table.

    Args:
        label (`str`):
            What it is called in the docs.
        select (`Callable`):
            As in `benchmarks/selectors.py`.
        before_projector (`bool`):
            Whether it works on the features of the vision tower; what it keeps then goes through the projector.
        reads (`str`):
            Where relevance comes from: `"values"`, the package's; `"states"`, the cosine of question and patch; or
            `"negated"`, that times -1.
        needs (`tuple[str, ...]`):
            What else it takes: `"generator"`, `"grid"` or `"keys"`.
        settings (`dict`, *optional*):
            For a variant of FSR: what it changes. `None` for a peer.
    """

    label: str
    select: Callable[..., Kept]
    before_projector: bool = False
    reads: str = "values"
    needs: tuple[str, ...] = ()
    settings: dict[str, Any] | None = None

    @property
    def has_focus(self) -> bool:
        return self.select is fsr


METHODS = {
    "unpruned": Method(
        "Unpruned", lambda features, *_: (features, features.new_empty(len(features), 0, dtype=torch.long))
    ),
    "random": Method("Random", random_tokens, needs=("generator",)),
    "uniform": Method("Uniform grid", uniform_grid, needs=("grid",)),
    "cls": Method("FasterVLM ([CLS] attention)", fastervlm),
    "vispruner": Method("VisPruner", vispruner, before_projector=True),
    "visionzip": Method("VisionZip", visionzip, before_projector=True, needs=("keys",)),
    "divprune": Method("DivPrune", divprune),
    "cdpruner": Method("CDPruner", cdpruner, reads="negated"),
    "holov": Method("HoloV", holov),
    "idpruner": Method("IDPruner", idpruner),
    "scope": Method("SCOPE", scope, before_projector=True),
    "prunesid": Method("PruneSID", prunesid, before_projector=True),
    "visionzip-values": Method(
        "VisionZip, relevance by values", _by_priority(visionzip), before_projector=True, needs=("keys",)
    ),
    "cdpruner-values": Method("CDPruner, relevance by values", cdpruner),
    "idpruner-values": Method("IDPruner, relevance by values", _by_priority(idpruner)),
    "scope-values": Method("SCOPE, relevance by values", _by_priority(scope), before_projector=True),
    "fsr": Method("FSR", fsr, settings={}),
    "fsr-paper": Method("FSR, the literal formulas", fsr, reads="states", settings=_PAPER),
    "fsr-earlier": Method("FSR, the defaults of before", fsr, reads="negated", settings=_PAPER | {"focus_limit": 0.5}),
    "fsr-states": Method("relevance of the patches' own states", fsr, reads="states", settings={}),
    "fsr-negated": Method("the same, negated", fsr, reads="negated", settings={}),
    "fsr-alpha0": Method("α = 0: no relevance", fsr, settings={"alpha": 0.0}),
    "fsr-no-even": Method("`uniform_scan=0`: Eq. 5 alone", fsr, settings={"uniform_scan": 0.0}),
    "fsr-kappa1": Method("κ = 1", fsr, settings={"kappa": 1.0}),
    "fsr-no-refine": Method("κ = 0: no Refine", fsr, settings={"kappa": 0.0}),
    "fsr-limit0.5": Method("`focus_limit=0.5`", fsr, settings={"focus_limit": 0.5}),
    "fsr-limit1": Method("`focus_limit=1`", fsr, settings={"focus_limit": 1.0}),
    "fsr-no-scan": Method("no Scan: top K by priority", _fsr_without_scan, settings={}),
    "fsr-beta0": Method("β = 0: no saliency", fsr, settings={"beta": 0.0}),
    "fsr-rho0.5": Method("ρ = 0.5", fsr, settings={"rho": 0.5}),
    "fsr-mass-budget": Method('`focus_mass="budget"`', fsr, settings={"focus_mass": "budget"}),
    "fsr-before-projector": Method("Scan and Refine before the projector", fsr, before_projector=True, settings={}),
}


@dataclass
class Batch:
    """
    Questions with everything that a method selects from, in rows.

    Args:
        prefix (`torch.LongTensor` of shape `(prefix_length,)`):
            Ids of the prompt before the picture, the same in every prompt.
        suffix (`torch.LongTensor` of shape `(batch, suffix_length)`):
            Ids after the picture: the rest of the prompt, and the answer; padded on the right.
        starts (`torch.LongTensor` of shape `(batch,)`):
            Column of `suffix` where the answer starts.
        answers (`torch.LongTensor` of shape `(batch, answer_length)`):
            Ids of the answer and of the end of text; padded with -1.
        patches (`torch.FloatTensor` of shape `(batch, num_tokens, vision_hidden_size)`):
            Features of the vision tower.
        tokens (`torch.FloatTensor` of shape `(batch, num_tokens, hidden_size)`):
            The same after the projector.
        keys (`torch.FloatTensor` of shape `(batch, num_tokens, head_dim)`):
            Keys of the block that saliency comes from, averaged over heads.
        saliency (`torch.FloatTensor` of shape `(batch, num_tokens)`):
            Eq. 1.
        relevance (`torch.FloatTensor` of shape `(batch, num_tokens)`):
            As the package computes it by default: the mean of `value_contrast` over the 3 x 3 patches around each.
        cosine (`torch.FloatTensor` of shape `(batch, num_tokens)`):
            Eq. 2 as it is written, of the patches' own states.
        name_cosine (`torch.FloatTensor` of shape `(batch, num_tokens)`):
            The same for the name of the object in question, such as "a red star"; of no meaning without one.
        value_cosine (`torch.FloatTensor` of shape `(batch, num_tokens)`):
            Eq. 2 of what a patch hands to [CLS] in the last block.
        value_contrast (`torch.FloatTensor` of shape `(batch, num_tokens)`):
            `value_cosine`, less that of a question without a word.
        on_object (`torch.BoolTensor` of shape `(batch, num_tokens)`):
            Patches of the object in question; none without one.
        on_other (`torch.BoolTensor` of shape `(batch, num_tokens)`):
            Patches of other objects, and not of it; none without an object in question.
        grid (`tuple[int, int]`):
            Rows and columns of patches.
    """

    prefix: torch.Tensor
    suffix: torch.Tensor
    starts: torch.Tensor
    answers: torch.Tensor
    patches: torch.Tensor
    tokens: torch.Tensor
    keys: torch.Tensor
    saliency: torch.Tensor
    relevance: torch.Tensor
    cosine: torch.Tensor
    name_cosine: torch.Tensor
    value_cosine: torch.Tensor
    value_contrast: torch.Tensor
    on_object: torch.Tensor
    on_other: torch.Tensor
    grid: tuple[int, int]


Example = tuple[Scene, Question]


# ---------------------------------------------------------------- one batch


def load(folder: str | os.PathLike, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """The model, with FSR's defaults whatever its config says, and its processor."""
    model = FSRLlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    for name in (*_DEFAULTS, "relevance", "positions"):
        setattr(model.config.fsr_config, name, getattr(_FSR, name))
    if model.config.fsr_config.text_encoder_config is None:
        raise ValueError(
            f"{folder} has no text encoder: export it with `text_encoder=`, for relevance to the question."
        )
    return model, FSRLlavaProcessor.from_pretrained(folder)


def prompts(processor, examples: Sequence[Example]):
    """The inputs of the model as a user makes them, padded on the left."""
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": asked.text}]}]
        for scene, asked in examples
    ]
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def encode(model, processor, examples: Sequence[Example]) -> Batch:
    """Run the towers for a batch of questions, each about a picture of its own."""
    inputs = prompts(processor, examples).to(model.device)
    text_encoder = model.model.text_encoder
    query = (inputs["query_input_ids"], inputs["query_attention_mask"])
    question, contrast = (text_encoder.encode_query(*query, less_empty=less_empty) for less_empty in (False, True))
    outputs, saliency, relevance = model.model.run_clip_tower(
        inputs["pixel_values"].to(model.dtype), list(range(len(examples))), contrast
    )
    tower = model.model.vision_tower
    num_layers = tower.config.num_hidden_layers
    layer = model.config.vision_feature_layer % (num_layers + 1)
    attention = tower.encoder.layers[layer - 1].self_attn
    keys = attention.k_proj(tower.encoder.layers[layer - 1].layer_norm1(outputs.hidden_states[layer - 1][:, 1:]))
    objects = [None if asked.target is None else scene.objects[asked.target] for scene, asked in examples]
    names = ["" if item is None else f"a {item.color} {item.shape}" for item in objects]
    named = processor.tokenize_queries(names)
    name = text_encoder.encode_query(*(torch.tensor(ids, device=model.device) for ids in named.values()))
    states = outputs.hidden_states[num_layers - 1]
    values = tower.post_layernorm(patch_values(tower.encoder.layers[-1], states))
    states = tower.post_layernorm(states[:, 1:])
    size = tower.config.image_size // tower.config.patch_size
    patch_size = tower.config.patch_size
    on_object = object_patches([None if item is None else item.box for item in objects], size, patch_size)
    on_other = torch.stack(
        [
            object_patches(
                [None if item is None else other.box for other in scene.objects if other is not item], size, patch_size
            ).any(0)
            for item, (scene, _) in zip(objects, examples)
        ]
    )

    prefix, suffix, starts, answers = _text(model, processor, inputs, [asked.answer for _, asked in examples])
    return Batch(
        prefix=prefix.to(model.device),
        suffix=suffix.to(model.device),
        starts=starts.to(model.device),
        answers=answers.to(model.device),
        patches=outputs.hidden_states[layer][:, 1:],
        tokens=torch.stack(list(outputs.pooler_output)),
        keys=keys.unflatten(-1, (attention.num_heads, -1)).mean(-2),
        saliency=saliency,
        relevance=relevance,
        cosine=text_encoder(states, question),
        name_cosine=text_encoder(states, name),
        value_cosine=text_encoder(values, question),
        value_contrast=text_encoder(values, contrast),
        on_object=on_object.to(model.device),
        on_other=(on_other & ~on_object).to(model.device),
        grid=(size, size),
    )


def _text(model, processor, inputs, answers: list[str]):
    """`prefix`, `suffix`, `starts` and `answers` of a [`Batch`], on the CPU."""
    tokenizer = processor.tokenizer
    prefixes, suffixes, starts, targets = [], [], [], []
    for ids, mask, answer in zip(inputs["input_ids"].cpu(), inputs["attention_mask"].cpu(), answers):
        ids = ids[mask.bool()]
        places = (ids == model.config.image_token_id).nonzero()[:, 0]
        prefixes.append(ids[: places[0]])
        suffix = ids[places[-1] + 1 :]
        # A word after the prompt is one with a space before it.
        before, both = tokenizer([":", f": {answer}"], add_special_tokens=False)["input_ids"]
        target = [*both[len(before) :], tokenizer.eos_token_id]
        starts.append(len(suffix))
        suffixes.append(torch.cat([suffix, torch.tensor(target[:-1], dtype=torch.long)]))
        targets.append(torch.tensor(target))
    if any(not torch.equal(prefix, prefixes[0]) for prefix in prefixes):
        raise ValueError("The prompts differ before the picture: the picture must come first in the chat template.")
    return (
        prefixes[0],
        pad_sequence(suffixes, batch_first=True, padding_value=tokenizer.eos_token_id),
        torch.tensor(starts),
        pad_sequence(targets, batch_first=True, padding_value=-1),
    )


def object_patches(boxes: Sequence[tuple | None], size: int, patch_size: int) -> torch.Tensor:
    """Which of `size` x `size` patches a box (left, top, right, bottom) covers at least half: `(boxes, patches)`."""
    corners = torch.tensor([(0, 0, 0, 0) if box is None else tuple(box) for box in boxes]).view(-1, 4).float()
    edges = torch.arange(size) * patch_size

    def shared(low, high):  # of an axis, in pixels: (boxes, size)
        return (torch.minimum(high, edges + patch_size) - torch.maximum(low, edges)).clamp(min=0)

    left, top, right, bottom = corners[:, :, None].unbind(1)
    area = shared(top, bottom)[:, :, None] * shared(left, right)[:, None]
    return (2 * area >= patch_size**2).flatten(1)


def relevance_of(method: Method, batch: Batch) -> torch.Tensor:
    """What a method takes for relevance, `(batch, num_tokens)`."""
    return {"values": batch.relevance, "states": batch.cosine, "negated": -batch.cosine}[method.reads]


def select(model, method: Method, batch: Batch, num_kept: int, generator: torch.Generator | None = None) -> Kept:
    """What a method keeps, as the language model receives it, and the indices."""
    extra = {name: generator if name == "generator" else getattr(batch, name) for name in method.needs}
    if method.settings is not None:
        extra |= _DEFAULTS | method.settings
    features = batch.patches if method.before_projector else batch.tokens
    kept, indices = method.select(features, batch.saliency, relevance_of(method, batch), num_kept, **extra)
    return model.model.multi_modal_projector(kept) if method.before_projector else kept, indices


def is_right(model, batch: Batch, visual: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
    """
    Whether greedy decoding after these visual tokens gives the answer: `(batch,)`.

    Args:
        visual: `(batch, kept, hidden_size)`.
        indices: `(batch, kept)`, where they stood among all tokens, to keep the positions of the whole prompt; `None`
            numbers what is left anew.
    """
    embed = model.get_input_embeddings()
    positions = {}
    if indices is not None:
        indices, order = indices.sort(-1)
        visual = visual.gather(1, order[..., None].expand_as(visual))
        before = len(batch.prefix)
        after = torch.arange(batch.suffix.shape[1], device=visual.device) + before + batch.tokens.shape[1]
        parts = (torch.arange(before, device=visual.device), before + indices, after)
        ids = torch.cat([part.expand(len(visual), -1) for part in parts], dim=1)
        # Without a mask, gaps in the positions would be read as the borders of packed sequences.
        positions = {"position_ids": ids, "attention_mask": torch.ones_like(ids)}
    prefix = embed(batch.prefix).expand(len(visual), -1, -1)
    embeds = torch.cat([prefix, visual.to(prefix.dtype), embed(batch.suffix)], dim=1)
    # Attention is causal and padding comes last: no mask of it is needed.
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False, **positions).last_hidden_state
    offset = embeds.shape[1] - batch.suffix.shape[1] - 1
    places = offset + batch.starts[:, None] + torch.arange(batch.answers.shape[1], device=embeds.device)
    places = places.clamp(max=embeds.shape[1] - 1)
    hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    return ((model.lm_head(hidden).argmax(-1) == batch.answers) | (batch.answers < 0)).all(-1)


def _priority(saliency, relevance, *, alpha, beta, **_) -> torch.Tensor:
    """Eq. 3 alone: what the method computes on its way to keep one token."""
    return select_visual_tokens(saliency[..., None], saliency, relevance, 1, alpha=alpha, beta=beta).priority


def focus_sizes(priority: torch.Tensor, num_kept: int, *, rho: float, focus_mass: str, **_) -> torch.Tensor:
    """Eq. 4, before the limit of Focus cuts it: how many tokens hold the share `rho` of the mass. `(batch,)`."""
    mass = priority.double().sort(dim=-1, descending=True).values.cumsum(-1)
    total = mass[:, num_kept - 1 if focus_mass == "budget" else -1, None]
    return (mass < rho * total).sum(-1) + 1


def area_under_curve(scores: torch.Tensor, on_object: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    The probability that a patch of the object has a higher score than one of the others, ties counted half:
    `(batch,)`, NaN where there is no pair of such patches.
    """
    above = (scores[:, :, None] > scores[:, None]) + 0.5 * (scores[:, :, None] == scores[:, None])
    pairs = on_object[:, :, None] & others[:, None]
    return (above * pairs).sum((1, 2)) / pairs.sum((1, 2))


# ---------------------------------------------------------------- a run


@dataclass
class Tally:
    """What is measured of a method at a budget, question by question, in the order of the questions."""

    right: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))  # by positions
    recall: list[torch.Tensor] = field(default_factory=list)
    focus: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))


def measure(
    model,
    processor,
    methods: Sequence[str],
    budgets: Sequence[int],
    seeds: Sequence[int],
    questions: int,
    batch_size: int = 128,
    progress: bool = False,
    positions: str = "compact",
) -> dict[str, Any]:
    """
    Ask everything, and sum up.

    Args:
        methods (`list[str]`): Keys of `METHODS`; `"unpruned"` is added if it is missing.
        budgets (`list[int]`): Tokens to keep.
        seeds (`list[int]`): Each gives questions of its own.
        questions (`int`): Number of questions of a seed.
        positions (`str`): The results that are not of both are of these.

    Returns:
        `dict[str, Any]`: what is written as JSON, less what the run as a whole adds.
    """
    methods = ["unpruned", *(name for name in methods if name != "unpruned")]
    config = model.config.vision_config
    num_tokens = (config.image_size // config.patch_size) ** 2
    tallies: dict[tuple[str, int], Tally] = defaultdict(Tally)
    areas: dict[str, dict[str, list[torch.Tensor]]] = {"all": defaultdict(list), "objects": defaultdict(list)}
    asked: list[tuple[int, str]] = []
    held_out: list[bool | None] = []
    checked = None
    bar = tqdm(total=len(seeds) * questions, unit="question", disable=not progress)
    for seed in seeds:
        examples = list(held_out_questions(seed, questions, config.image_size))
        if checked is None:
            checked = check_generate(model, processor, examples[:40], budgets[len(budgets) // 2], positions)
        examples.sort(key=lambda example: len(example[1].text))  # of one length, little is padding
        for first in range(0, questions, batch_size):
            part = examples[first : first + batch_size]
            with torch.inference_mode():
                batch = encode(model, processor, part)
                for name, scores in _object_scores(batch).items():
                    for against, others in (("all", ~batch.on_object), ("objects", batch.on_other)):
                        areas[against][name].append(area_under_curve(scores, batch.on_object, others).cpu())
                for budget in [num_tokens, *budgets]:
                    known: list[Known] = []
                    for name in ["unpruned"] if budget == num_tokens else methods[1:]:
                        generator = torch.Generator().manual_seed((seed * questions + first) * num_tokens + budget)
                        _tally(tallies[name, budget], model, METHODS[name], batch, budget, generator, known)
            asked += [(seed, question.kind) for _, question in part]
            held_out += [_is_held_out(*example) for example in part]
            bar.update(len(part))
    bar.close()
    return {
        "num_tokens": num_tokens,
        "questions": questions,
        "seed": seeds[0],
        "seeds": list(seeds),
        "checked": checked,
        "positions": positions,
        "fsr": _DEFAULTS | {"relevance": "clip_values"},
        **summarize(tallies, asked, num_tokens, positions),
        "sign": {
            against: _summarize_areas(of_scores, [kind for _, kind in asked]) for against, of_scores in areas.items()
        },
        "pairs": _summarize_pairs(
            torch.cat(tallies["unpruned", num_tokens].right[positions]), torch.cat(areas["all"]["name"]), held_out
        ),
    }


# Visual tokens, their indices, and the verdicts by positions.
Known = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def _tally(tally: Tally, model, method: Method, batch: Batch, budget: int, generator, known: list[Known]) -> None:
    visual, indices = select(model, method, batch, budget, generator)
    right = _verdicts(model, batch, visual, indices, known)
    known.append((visual, indices, right))
    for positions, verdicts in right.items():
        tally.right[positions].append(verdicts.cpu())
    if indices.numel():
        kept = torch.zeros_like(batch.on_object).scatter(1, indices, True)
        tally.recall.append(((kept & batch.on_object).sum(-1) / batch.on_object.sum(-1)).cpu())
    if method.has_focus:
        settings = _DEFAULTS | method.settings
        for name, given in (("with_query", relevance_of(method, batch)), ("without_query", None)):
            priority = _priority(batch.saliency, given, **settings)
            tally.focus[name].append(focus_sizes(priority, budget, **settings).cpu())


def _verdicts(
    model, batch: Batch, visual: torch.Tensor, indices: torch.Tensor, known: list[Known]
) -> dict[str, torch.Tensor]:
    """`is_right` by positions, less the work for rows that another method has kept the very same tokens of."""
    right = {positions: torch.zeros_like(batch.starts, dtype=torch.bool) for positions in POSITIONS}
    is_open = torch.ones_like(batch.starts, dtype=torch.bool)
    for other, other_indices, verdicts in known:
        same = is_open & (visual == other).flatten(1).all(-1) & (indices == other_indices).all(-1)
        right = {positions: torch.where(same, verdicts[positions], right[positions]) for positions in POSITIONS}
        is_open = is_open & ~same
    if is_open.any():
        rest = replace(
            batch, suffix=batch.suffix[is_open], starts=batch.starts[is_open], answers=batch.answers[is_open]
        )
        whole = indices.numel() == 0  # nothing is pruned: both are the same
        right["compact"][is_open] = is_right(model, rest, visual[is_open])
        right["original"][is_open] = (
            right["compact"][is_open] if whole else is_right(model, rest, visual[is_open], indices[is_open])
        )
    return right


def _object_scores(batch: Batch) -> dict[str, torch.Tensor]:
    return {
        "question": batch.cosine,
        "name": batch.name_cosine,
        "values": batch.value_cosine,
        "contrast": batch.value_contrast,
        "relevance": batch.relevance,
        "saliency": batch.saliency,
        "priority": _priority(batch.saliency, batch.relevance, **_DEFAULTS),
        "priority-states": _priority(batch.saliency, batch.cosine, **_DEFAULTS),
        "priority-negated": _priority(batch.saliency, -batch.cosine, **_DEFAULTS),
    }


def check_generate(
    model, processor, examples: Sequence[Example], budget: int, positions: str = "compact"
) -> dict[str, int]:
    """
    Ask some questions by `generate()`, from pixels, and compare.

    Raises:
        `RuntimeError`: if more than one verdict in ten differs. (A few may in half precision, where two tokens are
            all but equally likely and the batch is padded in another way.)
    """
    agree = 0
    with torch.inference_mode():
        batch = encode(model, processor, examples)
        inputs = prompts(processor, examples).to(model.device, model.dtype)
        length = batch.answers.shape[1]
        num_tokens = batch.tokens.shape[1]
        for name, kept, options in (
            ("unpruned", num_tokens, {"fsr_enabled": False}),
            ("fsr", budget, {"num_visual_tokens": budget}),
        ):
            model.config.fsr_config.positions = positions
            output = model.generate(**inputs, max_new_tokens=length, do_sample=False, **options)
            texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            visual, indices = select(model, METHODS[name], batch, kept)
            keeps_positions = positions == "original" and indices.numel()
            verdicts = is_right(model, batch, visual, indices if keeps_positions else None).tolist()
            for text, verdict, (_, question) in zip(texts, verdicts, examples):
                agree += (text.strip() == question.answer) == verdict
    if agree < 0.9 * 2 * len(examples):
        raise RuntimeError(
            f"Of {2 * len(examples)} answers, generate() gives another verdict on {2 * len(examples) - agree} than "
            "the pass over the answer's tokens: what is measured is not what a user gets."
        )
    return {"answers": 2 * len(examples), "agree": agree}


# ---------------------------------------------------------------- statistics


def summarize(
    tallies: dict[tuple[str, int], Tally],
    asked: Sequence[tuple[int, str]],
    num_tokens: int,
    positions: str = "compact",
) -> dict[str, Any]:
    """`results` and what belongs to them. `asked` has seed and kind of every question."""
    seeds = sorted({seed for seed, _ in asked})
    of_seed = {seed: torch.tensor([other == seed for other, _ in asked]) for seed in seeds}
    of_kind = {kind: torch.tensor([other == kind for _, other in asked]) for kind in KINDS}
    of_kind = {kind: chosen for kind, chosen in of_kind.items() if chosen.any()}
    by_positions = {
        key: {mode: torch.cat(parts).double() for mode, parts in tally.right.items()} for key, tally in tallies.items()
    }
    right = {key: values[positions] for key, values in by_positions.items()}
    unpruned = right["unpruned", num_tokens]
    base = {kind: unpruned[chosen].mean().item() for kind, chosen in of_kind.items()}
    measured = [kind for kind, accuracy in base.items() if accuracy >= LEAST_ACCURACY]

    results = []
    for (name, budget), tally in tallies.items():
        values = right[name, budget]
        by_kind = {kind: values[chosen].mean().item() for kind, chosen in of_kind.items()}
        accuracies = [values[of_seed[seed]].mean().item() for seed in seeds]
        retained = [a / _or_nan(unpruned[of_seed[seed]].mean().item()) for a, seed in zip(accuracies, seeds)]
        result = {
            "method": name,
            "budget": budget,
            "accuracy": values.mean().item(),
            "retained": values.mean().item() / _or_nan(unpruned.mean().item()),
            "by_kind": by_kind,
            "retained_by_kind": {kind: by_kind[kind] / base[kind] for kind in measured},
            "by_seed": accuracies,
            "interval": over_seeds(accuracies) or binomial(int(values.sum()), len(values)),
            "retained_interval": over_seeds(retained),
            "binomial_interval": binomial(int(values.sum()), len(values)),
        }
        if name != "unpruned":
            result["positions"] = {}
            for mode, other in by_positions[name, budget].items():
                result["positions"][mode] = {
                    "accuracy": other.mean().item(),
                    "retained": other.mean().item() / _or_nan(unpruned.mean().item()),
                    "gain_over_compact": paired(other - by_positions[name, budget]["compact"]),
                }
                if ("fsr", budget) in right:
                    result["positions"][mode]["against_fsr"] = paired(other - right["fsr", budget])
            if ("fsr", budget) in right:
                result["against_fsr"] = paired(values - right["fsr", budget])
        if tally.recall:
            recall = torch.cat(tally.recall)
            result["object_recall"] = recall[recall.isfinite()].mean().item() if recall.isfinite().any() else None
        if tally.focus:
            result["focus"] = {
                given: _summarize_focus(torch.cat(sizes), budget, METHODS[name])
                for given, sizes in tally.focus.items()
            }
        results.append(result)
    return {
        "results": _finite(results),
        "left_out": {kind: accuracy for kind, accuracy in base.items() if kind not in measured},
    }


def _summarize_focus(sizes: torch.Tensor, budget: int, method: Method) -> dict[str, float]:
    """Of K_F / K, where K_F is cut to the limit of Focus; and how often the limit cuts, and leaves Scan no room."""
    limit = max(1, int((_DEFAULTS | method.settings)["focus_limit"] * budget + 1e-6))
    sizes_cut = sizes.clamp(max=limit)
    low, median, high = (sizes_cut.double() / budget).quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    return {
        "median": median,
        "low": low,
        "high": high,
        "at_limit": (sizes > limit).double().mean().item(),
        "scan_empty": (sizes_cut >= budget).double().mean().item(),
        "tokens": sizes.double().median().item(),
    }


def _summarize_areas(areas: dict[str, list[torch.Tensor]], kinds: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"questions": 0, "auc": {}}
    for name, parts in areas.items():
        values = torch.cat(parts).double()
        known = values.isfinite()
        by_kind = {kind: known & torch.tensor([other == kind for other in kinds]) for kind in KINDS}
        result["questions"] = int(known.sum())
        result["auc"][name] = {
            **paired(values[known]),
            "by_kind": {kind: values[chosen].mean().item() for kind, chosen in by_kind.items() if chosen.any()},
        }
    return _finite(result)


def _is_held_out(scene: Scene, question: Question) -> bool | None:
    """Whether no caption told CLIP of the pair of the one object that a question names, if it names one."""
    return None if question.target is None else scene.objects[question.target].pair in HELD_OUT_PAIRS


def _summarize_pairs(right: torch.Tensor, areas: torch.Tensor, held_out: Sequence[bool | None]) -> dict[str, Any]:
    """Of the unpruned model: right answers, and the AUC of the cosine to the name of the object in question."""
    result = {}
    for name, wanted in (("held_out", True), ("others", False)):
        chosen = torch.tensor([value is wanted for value in held_out])
        known = areas[chosen & areas.isfinite()].double()
        accuracy = right[chosen].double().mean().item()
        result[name] = {"questions": int(chosen.sum()), "accuracy": accuracy, "auc": known.mean().item()}
    return _finite(result)


# Of Student's distribution, two-sided, 95 %, by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def over_seeds(values: Sequence[float]) -> list[float] | None:
    """The 95 % interval of the mean of a few independent values, or `None` for a single one."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    half = _STUDENT.get(count - 1, 2.0) * spread
    return [mean - half, mean + half]


def binomial(successes: int, trials: int) -> list[float]:
    """The 95 % interval of a share, after Wilson."""
    z = 1.959964
    share = successes / trials
    center = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return [center - half, center + half]


def paired(values: torch.Tensor) -> dict[str, Any]:
    """Mean of many independent values, and its 95 % interval."""
    mean = values.mean().item()
    half = 1.959964 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": mean, "interval": [mean - half, mean + half]}


def _or_nan(value: float) -> float:
    return value or math.nan


def _finite(value):
    """JSON knows no NaN; six digits are more than there is to know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


# ---------------------------------------------------------------- command line


def parse_budgets(text: str, num_tokens: int) -> list[int]:
    """`"1/9,1/18"` or `"16,8"`: tokens to keep, without repetition."""
    budgets: dict[int, None] = {}
    for part in text.split(","):
        try:
            value = Fraction(part.strip())
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"budget {part!r} is neither a number of tokens nor a share such as 1/9.") from None
        tokens = round(value * num_tokens) if "/" in part else value
        if tokens != int(tokens) or not 1 <= tokens < num_tokens:
            raise ValueError(f"budget {part.strip()!r} must keep 1 to {num_tokens - 1} of the {num_tokens} tokens.")
        budgets[int(tokens)] = None
    return list(budgets)


def parse_methods(text: str) -> list[str]:
    names = list(METHODS) if text == "all" else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {', '.join(map(repr, unknown))}; known are {', '.join(METHODS)}.")
    return list(dict.fromkeys(names))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description="Accuracy of pruned answers, FSR and its peers."
    )
    parser.add_argument("--seed", type=int, help="one seed (default: 0)")
    parser.add_argument("--seeds", help="several seeds, such as 0,1,2, each with questions of its own")
    parser.add_argument("--questions", type=int, default=2000, help="questions of each seed (default: 2000)")
    parser.add_argument("--methods", default="all", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument(
        "--budgets", default=",".join(BUDGETS), help="numbers of tokens, or shares (default: %(default)s)"
    )
    parser.add_argument(
        "--positions",
        choices=POSITIONS,
        default=_FSR.positions,
        help="of what is not shown with both (default: the package's, %(default)s)",
    )
    parser.add_argument("--model", help="an FSR folder of the LLaVA-1.5 family (default: the package's own)")
    parser.add_argument("--batch-size", type=int, default=128, help="questions at a time (default: 128)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32 (default: the checkpoint's own)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    try:
        methods = parse_methods(options.methods)
        if options.seed is not None and options.seeds is not None:
            raise ValueError("give --seed or --seeds, not both.")
        seeds = [int(seed) for seed in (options.seeds or str(options.seed or 0)).split(",")]
        if min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must differ and be at least 0, and are {seeds}.")
        if options.questions < len(KINDS) or options.batch_size < 1:
            raise ValueError(
                f"--questions must be at least {len(KINDS)}, one of each kind, and --batch-size at least 1."
            )
        if options.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"--dtype {options.dtype} must be auto, bfloat16 or float32.")
        if options.json is not None and not options.json.absolute().parent.is_dir():
            raise ValueError(f"--json {options.json}: there is no folder {options.json.absolute().parent}.")
        folder = options.model or shapes_vqa_folder()
        vision = FSRLlavaConfig.from_pretrained(folder).vision_config
        budgets = parse_budgets(options.budgets, (vision.image_size // vision.patch_size) ** 2)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    logging.disable_progress_bar()
    started = time.perf_counter()
    model, processor = load(folder, options.dtype, options.device)
    result = measure(
        model,
        processor,
        methods,
        budgets,
        seeds,
        options.questions,
        options.batch_size,
        progress=sys.stderr.isatty(),
        positions=options.positions,
    )
    result |= {
        "model": Path(folder).name,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": options.device,
        "seconds": round(time.perf_counter() - started, 1),
        **provenance(),
    }
    for line in report(result):
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def report(result: dict[str, Any]) -> Iterator[str]:
    """The accuracies as a table: a line for each method, a column for each budget."""
    budgets = list(dict.fromkeys(row["budget"] for row in result["results"]))
    rows: dict[str, dict[int, float]] = defaultdict(dict)
    for row in result["results"]:
        rows[row["method"]][row["budget"]] = row["accuracy"]
    yield f"{'tokens kept':24}" + "".join(f"{budget:>8}" for budget in budgets)
    for name, values in rows.items():
        cells = (f"{values[budget]:8.1%}" if budget in values else " " * 8 for budget in budgets)
        yield f"{name:24}" + "".join(cells)
    yield (
        f"{len(result['seeds'])} x {result['questions']} questions, {result['model']} in {result['dtype']}, "
        f"{result['seconds']:.0f} s on {result['machine']}, {result['threads']} threads; generate() agrees on "
        f"{result['checked']['agree']} of {result['checked']['answers']} answers."
    )


if __name__ == "__main__":
    main()
