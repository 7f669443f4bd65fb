"""
What FSR must do, computed in another way: scores from the stock towers' own attention maps, selection by a loop over
the equations, embeddings and positions put together by hand, and decoding with the stock class step by step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import torch
from method_reference import reference as select
from transformers import CLIPConfig, CLIPModel


__all__ = ["Layout", "Oracle", "Pool", "Prompt", "Selection", "build_clip", "clip_scores", "split_budget"]


@dataclass
class Pool:
    """
    Candidates that compete with each other.

    Args:
        features (`torch.Tensor` of shape `(tokens, hidden_size)`): As the language model would receive them.
        saliency (`torch.Tensor` of shape `(tokens,)`): Eq. 1.
        relevance (`torch.Tensor` of shape `(tokens,)`, *optional*): Eq. 2, higher for what is more relevant.
        numbers (`list[int]`): Place of each candidate in the run of placeholders.
    """

    features: torch.Tensor
    saliency: torch.Tensor
    relevance: torch.Tensor | None
    numbers: list[int]


@dataclass
class Layout:
    """
    One image or video as the prompt holds it.

    Args:
        run (`torch.Tensor` of shape `(placeholders, hidden_size)`): What the stock model puts into the placeholders.
        pools (`list[Pool]`): Its candidates.
        newlines (`dict[int, list[int]]`): For each newline, its place in the run: the places of the tokens of its row.
        deepstack (`list[torch.Tensor]`): What the first layers of the language model add to the placeholders, one like
            `run` for each layer.
    """

    run: torch.Tensor
    pools: list[Pool]
    newlines: dict[int, list[int]] = field(default_factory=dict)
    deepstack: list[torch.Tensor] = field(default_factory=list)


# --- Scores ---


def build_clip(model) -> CLIPModel | None:
    """The `CLIPModel` whose halves are the vision tower and the text encoder of an FSR model."""
    if model.model.text_encoder is None:
        return None
    text, vision = model.config.fsr_config.text_encoder_config, model.config.vision_config
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=text.projection_dim)
    clip = CLIPModel(config)
    clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    clip.text_model.load_state_dict(model.model.text_encoder.text_model.state_dict())
    clip.text_projection.load_state_dict(model.model.text_encoder.text_projection.state_dict())
    clip.visual_projection.load_state_dict(model.model.text_encoder.visual_projection.state_dict())
    return clip.eval()


@torch.no_grad()
def clip_scores(tower, clip, pixel_values, query, block: int, fsr):
    """
    Saliency and relevance `(views, patches)` of a CLIP tower under eager attention; `block` counts attention maps, and
    the joint space is reached from the penultimate layer. `query`: `(chunks, 77)` ids, or `None` for no relevance.
    """
    outputs = tower(pixel_values, output_attentions=True, output_hidden_states=True)
    saliency = outputs.attentions[block].mean(1)[:, 0, 1:]
    if clip is None or query is None:
        return saliency, None
    if fsr.relevance == "clip":
        cosine = _cosine_to_text(clip, outputs.hidden_states[-2][:, 1:], query)
        return saliency, -cosine if fsr.invert_relevance else cosine
    empty = query[:1].clone()
    empty[0, 1:] = empty[0, -1]  # BOS, then nothing but EOS, with which every chunk ends
    values = _handed_to_cls(tower.encoder.layers[-1], outputs.hidden_states[-2])
    contrast = _cosine_to_text(clip, values, query) - _cosine_to_text(clip, values, empty)
    side = math.isqrt(contrast.shape[1])
    maps = contrast.view(-1, side, side)
    near = [slice(max(0, place - 1), place + 2) for place in range(side)]
    means = [[maps[:, rows, columns].mean((1, 2)) for columns in near] for rows in near]
    return saliency, torch.stack([torch.stack(row, -1) for row in means], -2).flatten(1)


def _cosine_to_text(clip, patches, query):
    image = clip.visual_projection(clip.vision_model.post_layernorm(patches))
    cosines = torch.zeros(image.shape[:2])
    for chunk in query:
        text = clip.get_text_features(chunk[None], attention_mask=torch.ones_like(chunk)[None]).pooler_output[0]
        cosines += torch.cosine_similarity(image, text, dim=-1)
    return cosines / len(query)


def _handed_to_cls(block, states):
    """What the attention of a block puts out for [CLS] if [CLS] looks at one patch alone, for each patch."""
    normed = block.layer_norm1(states)
    number = states.shape[1]
    handed = []
    for patch in range(1, number):
        mask = torch.full((1, 1, number, number), -torch.inf)
        mask[..., patch] = 0.0
        handed.append(block.self_attn(normed, attention_mask=mask)[0][:, 0])
    return torch.stack(handed, dim=1)


# --- Selection ---


@dataclass
class Selection:
    """
    One item after Focus, Scan and Refine; every number is a place in its run of placeholders. `deepstack` has the
    vectors `(layers, hidden_size)` of each kept token.
    """

    kept: list[int]
    focus: set[int]
    priority: dict[int, float]
    merged_into: dict[int, int]
    features: dict[int, torch.Tensor]
    deepstack: dict[int, torch.Tensor]


def split_budget(budget: int, sizes: list[int]) -> list[int]:
    """The budget over pools in proportion to their sizes, by largest remainder, ties to the lower pool."""
    exact = [Fraction(budget * size, sum(sizes)) for size in sizes]
    shares = [int(share) for share in exact]
    while sum(shares) < budget:
        rests = [share - done for share, done in zip(exact, shares)]
        shares[rests.index(max(rests))] += 1
    return shares


def select_item(layout: Layout, fsr) -> Selection | None:
    """The selection of one item under the settings `fsr`; `None` if it is within its budget."""
    total = sum(len(pool.numbers) for pool in layout.pools)
    if fsr.retention_ratio is not None:
        budget = max(1, round(fsr.retention_ratio * total))
    else:
        budget = fsr.num_visual_tokens
    if total <= budget:
        return None
    result = Selection([], set(), {}, {}, {}, {})
    deepstack = torch.stack(layout.deepstack, dim=1) if layout.deepstack else None
    for pool, share in zip(layout.pools, split_budget(budget, [len(pool.numbers) for pool in layout.pools])):
        relevance = pool.relevance
        kept, focus, priority, merged_into, refined, _ = select(
            pool.features.detach().double().tolist(),
            pool.saliency.double().tolist(),
            None if relevance is None else relevance.double().tolist(),
            share,
            alpha=fsr.alpha,
            beta=fsr.beta,
            rho=fsr.rho,
            focus_limit=fsr.focus_limit,
            uniform_scan=fsr.uniform_scan,
            kappa=fsr.kappa,
            focus_mass=fsr.focus_mass,
        )
        numbers = pool.numbers
        result.kept += [numbers[i] for i in kept]
        result.focus |= {numbers[i] for i in focus}
        result.priority |= {numbers[i]: value for i, value in enumerate(priority)}
        result.merged_into |= {numbers[i]: numbers[j] for i, j in merged_into.items()}
        for i in kept:
            members = [i, *(member for member, anchor in merged_into.items() if anchor == i)]
            weights = torch.tensor([priority[member] for member in members])
            if len(members) == 1 or weights.sum() == 0:
                members, weights = [i], torch.ones(1)
            shares = weights / weights.sum()
            # The mean that Eq. 9 comes to, for autograd.
            feature = shares.to(pool.features) @ pool.features[members]
            if deepstack is not None:
                places = [numbers[member] for member in members]
                result.deepstack[numbers[i]] = torch.einsum("m,mlh->lh", shares.to(deepstack), deepstack[places])
            torch.testing.assert_close(feature.double(), torch.tensor(refined[i]).double(), rtol=1e-4, atol=1e-5)
            result.features[numbers[i]] = feature
    result.kept.sort()
    return result


# --- Prompt and decoding ---


@dataclass
class Prompt:
    """
    One row, compressed, without padding.

    Args:
        embeds (`torch.Tensor` of shape `(compressed_length, hidden_size)`): What the language model reads.
        positions (`torch.Tensor` of shape `(..., 1, compressed_length)`): Its positions.
        columns (`list[int]`): Column of each in the full row.
        visual (`list[bool]`): Which of them are visual.
        deepstack (`torch.Tensor` of shape `(visual tokens, layers, hidden_size)`, *optional*): What the first layers
            add to those.
        ids (`list[int]`): The full row.
        selections (`list[Selection | None]`): One for each item.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    columns: list[int]
    visual: list[bool]
    ids: list[int]
    selections: list[Selection | None]
    deepstack: torch.Tensor | None = None


class Oracle:
    """
    The right answers for a family's model.

    Args:
        family ([`~families.Family`]): How its items are built and laid out.
        model: The model under test, of which only weights and config are used.
        reference: The stock model with the same weights.
    """

    def __init__(self, family, model, reference):
        self.family = family
        self.config = model.config
        self.reference = reference
        self.clip = build_clip(model) if family.has_text_encoder else None

    def question(self, row) -> torch.Tensor | None:
        """The question of a row in chunks `(chunks, 77)`, `None` for a family without."""
        if self.clip is None:
            return None
        inputs = self.family.inputs([row])
        chunks = inputs["query_input_ids"].unflatten(1, (-1, 77))[0]
        return chunks[inputs["query_attention_mask"].unflatten(1, (-1, 77))[0].any(-1)]

    def compress(self, row, query: bool = True, grad: bool = False, questions=None, **settings: Any) -> Prompt:
        """
        The row of ids and items under the model's config with `settings`; `query=False`: no question; `grad=True`:
        with autograd through everything but the selection and the weights of Refine; `questions`: one for each item,
        in place of the row's own.
        """
        with torch.set_grad_enabled(grad):
            fsr = self.config.fsr_config.override(**settings)
            inputs = self.family.inputs([row])
            chunks = self.question(row) if query else None
            embed = self.reference.get_input_embeddings()
            embeds, columns, visual, selections, ids, deepstack = [], [], [], [], [], []
            for part in row:
                if isinstance(part, int):
                    embeds.append(embed(torch.tensor([part])))
                    columns.append(len(ids))
                    visual.append(False)
                    ids.append(part)
                    continue
                if questions is not None:
                    chunks = questions[len(selections)]
                layout = self.family.layout(self.reference, part, self.clip, chunks, fsr)
                selection = select_item(layout, fsr) if fsr.enabled else None
                selections.append(selection)
                if selection is None:
                    tokens = dict(enumerate(layout.run))
                    deepstack += zip(*layout.deepstack)
                else:
                    tokens = dict(selection.features)
                    deepstack += [selection.deepstack[number] for number in selection.kept if layout.deepstack]
                placeholders = [i for i, token in enumerate(part.token_ids) if token in self.family.placeholder_ids]
                assert len(placeholders) == part.length == len(layout.run)
                for i, token in enumerate(part.token_ids):
                    if i not in placeholders:
                        embeds.append(embed(torch.tensor([token])))
                    elif placeholders.index(i) in tokens:
                        embeds.append(tokens[placeholders.index(i)][None])
                    else:
                        continue
                    columns.append(len(ids) + i)
                    visual.append(i in placeholders)
                ids += part.token_ids
            if fsr.positions == "original" and self.family.positions is None:
                positions = torch.tensor([columns])
            elif fsr.positions == "original":
                positions = self.family.positions(self.reference, inputs)[..., columns]
            else:
                positions = torch.arange(len(columns))[None]
            levels = torch.stack([torch.stack(list(rows)) for rows in deepstack]) if deepstack else None
            return Prompt(torch.cat(embeds), positions, columns, visual, ids, selections, levels)

    @torch.no_grad()
    def logits(self, prompt: Prompt, new_ids: Sequence[int] = ()) -> torch.Tensor:
        """Logits `(compressed_length + new, vocab_size)` of the stock model, which reads everything anew."""
        return self.run(prompt, new_ids).logits[0]

    def run(self, prompt: Prompt, new_ids: Sequence[int] = (), **kwargs):
        """The stock model on the prompt and `new_ids`, without cache and padding."""
        embeds, positions = prompt.embeds, prompt.positions
        if new_ids:
            embeds = torch.cat([embeds, self.reference.get_input_embeddings()(torch.tensor(new_ids))])
            steps = torch.arange(1, len(new_ids) + 1).expand(*positions.shape[:-1], -1)
            positions = torch.cat([positions, positions[..., -1:] + steps], dim=-1)
        kwargs |= {
            "inputs_embeds": embeds[None],
            "attention_mask": torch.ones(1, len(embeds), dtype=torch.long),
            "position_ids": positions,
            "use_cache": False,
        }
        if prompt.deepstack is None:
            return self.reference(**kwargs)
        visual = prompt.visual[: len(prompt.embeds)]  # of a prefix
        added = prompt.deepstack[: sum(visual)].unbind(1)
        outputs = self.reference.model.language_model(
            **kwargs,
            visual_pos_masks=torch.tensor([[*visual, *(False for _ in new_ids)]]),
            deepstack_visual_embeds=list(added),
        )
        logits = self.reference.lm_head(outputs.last_hidden_state)
        return SimpleNamespace(logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def decode(self, prompts: list[Prompt], num_new: int, choose: Callable | None = None):
        """
        `num_new` tokens for each row, one by one: ids `(rows, num_new)`, and the logits `(rows, num_new, vocab_size)`
        that they came from. `choose` takes the full rows with the new ids so far and the logits `(rows, vocab_size)`,
        and returns `(rows,)` ids; by default those of the largest logits.
        """
        new_ids, steps = [[] for _ in prompts], []
        for _ in range(num_new):
            steps.append(torch.stack([self.logits(prompt, ids)[-1] for prompt, ids in zip(prompts, new_ids)]))
            rows = [[*prompt.ids, *ids] for prompt, ids in zip(prompts, new_ids)]
            chosen = choose(rows, steps[-1]) if choose else steps[-1].argmax(-1)
            for ids, token in zip(new_ids, chosen):
                ids.append(int(token))
        return torch.tensor(new_ids), torch.stack(steps, dim=1)

    def beam_search(self, prompt: Prompt, num_new: int, num_beams: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Beams by descending score, `(num_beams, num_new)`, and their mean log-probability; no token ends a beam."""
        beams = [([], 0.0)]
        for _ in range(num_new):
            candidates = []
            for ids, score in beams:
                scores = self.logits(prompt, ids)[-1].log_softmax(-1)
                best = scores.topk(num_beams)
                candidates += [([*ids, int(i)], score + float(value)) for i, value in zip(best.indices, best.values)]
            beams = sorted(candidates, key=lambda beam: -beam[1])[:num_beams]
        return torch.tensor([ids for ids, _ in beams]), torch.tensor([score / num_new for _, score in beams])
