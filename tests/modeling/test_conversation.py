"""Conversations that go on from a cache: what is new in a prompt, where it stands, and the inputs of each family."""

import copy
import random

import pytest
import torch
from families import BOS, EOS, FAMILIES, PAD, Item, models
from oracle import Oracle
from transformers import DynamicCache

from fsr_hf.modeling.conversation import (
    Conversation,
    continue_positions,
    forget,
    get_conversation,
    remember,
    remember_positions,
)
from fsr_hf.modeling.guards import get_cache


# --- What is new ---


def conversation_of(rows, num_new, num_uncached, dropped=()):
    """
    Rows of `(prompt, answer)`, where an answer that ended early is padded to `num_new`; `dropped` are places in the
    prompts that FSR dropped, the same in each row.
    """
    width = max(len(prompt) for prompt, _ in rows)
    ids = [[PAD] * (width - len(p)) + p + a + [PAD] * (num_new - len(a)) for p, a in rows]
    mask = [[0] * (width - len(p)) + [1] * (len(p) + num_new) for p, _ in rows]
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    columns = [column for column in range(ids.shape[1] - num_uncached) if column not in dropped]
    kept_ids, kept_mask = ids[:, columns], mask[:, columns]
    return Conversation(
        caller_ids=ids,
        caller_mask=mask,
        input_ids=kept_ids,
        attention_mask=kept_mask,
        position_ids=kept_mask.cumsum(-1) - 1,
        pruned_rows=torch.ones(len(rows), dtype=torch.bool),
        num_uncached=num_uncached,
        num_new=num_new,
        end_ids=[EOS, PAD],
    )


def padded(rows, side):
    width = max(map(len, rows)) + 1
    pads = [[PAD] * (width - len(row)) for row in rows]
    ids = torch.tensor([pad + row if side == "left" else row + pad for pad, row in zip(pads, rows)])
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("side", ["left", "right"])
def test_match_finds_the_first_new_token(side):
    """Answers may have ended early; the user may pass their end, or not; padding of a turn is no part of the next."""
    for seed in range(200):
        rng = random.Random(seed)
        num_new, num_uncached = rng.randint(1, 5), rng.choice((0, 1))
        rows, following, expected = [], [], []
        for _ in range(rng.randint(1, 3)):
            prompt = [rng.randint(10, 50) for _ in range(rng.randint(2, 6))]
            answer = [rng.randint(10, 50) for _ in range(rng.randint(0, num_new))]
            said = list(answer)
            if len(answer) < num_new:
                answer = [*answer, EOS]
                said = rng.choice(([*said, EOS], said))
            rows.append((prompt, answer))
            following.append([*prompt, *said, *(rng.randint(60, 90) for _ in range(rng.randint(1, 4)))])
            cached = len(prompt) + num_new - num_uncached
            expected.append(min(len(prompt) + len(said), cached))
        conversation = conversation_of(rows, num_new, num_uncached, dropped=())
        ids, mask = padded(following, side)
        starts, kept_mask = conversation.match(ids, mask)
        firsts = [int(row.nonzero()[0]) for row in mask]
        assert starts == [first + common for first, common in zip(firsts, expected)], seed
        # Of the cache, the tokens that the conversation has, in their places.
        for row, common in enumerate(expected):
            counted = conversation.input_ids[row][kept_mask[row].bool()].tolist()
            assert counted == following[row][:common]
            assert not kept_mask[row, : conversation.length][conversation.attention_mask[row] == 0].any()


def test_match_counts_what_was_dropped():
    """The caller's ids have whole pictures, of which the cache has a part."""
    conversation = conversation_of([([11, 99, 99, 99, 12], [13, 14])], 2, 1, dropped=(1, 3))
    assert conversation.length == 4
    starts, kept_mask = conversation.match(*padded([[11, 99, 99, 99, 12, 13, 14, 15]], "left"))
    assert starts == [7] and kept_mask.tolist() == [[1, 1, 1, 1]]
    # The last new token never ran, so the caller may have another one there.
    assert conversation.match(*padded([[11, 99, 99, 99, 12, 13, 77]], "left"))[0] == [7]


@pytest.mark.parametrize(
    ("following", "message"),
    [
        ([[11, 12, 20, 21]], "`input_ids` has 1 rows, but the cache holds 2"),
        ([[11, 12, 13, 22], [41, 42, 51, 52]], "in row 0, token 2 of the conversation is 13, but 20"),
        ([[11, 12, 20, 21, 22], [41, 42, 51, 53, 54]], "in row 1, token 3 of the conversation is 53, but 52"),
        ([[11], [41, 42, 51, 52, 53]], "in row 0, token 1 of the conversation is missing, but 12"),
        ([[11, 12, 20, 21, 22], [41, 42, 51, 52]], "nothing after what the cache holds in row 1"),
        ([[10, 11, 12, 20, 21], [41, 42, 51, 52, 53]], "in row 0, token 0"),
    ],
    ids=str,
)
def test_match_refuses_what_does_not_begin_with_the_cache(following, message):
    conversation = conversation_of([([11, 12], [20, 21]), ([41, 42], [51, 52])], 2, 0)
    with pytest.raises(ValueError, match=message):
        conversation.match(*padded(following, "left"))


# --- What a cache remembers ---


def filled_cache(rows=2, length=5, layers=2, seed=0):
    cache = DynamicCache()
    states = torch.randn(2, layers, rows, 2, length, 4, generator=torch.Generator().manual_seed(seed))
    for layer in range(layers):
        cache.update(states[0, layer], states[1, layer], layer)
    return cache


def conversation_for(cache):
    length = cache.get_seq_length()
    return conversation_of([([11, 12, 13], [20] * (length - 2)), ([41, 42, 43], [50] * (length - 2))], length - 2, 1)


def test_a_cache_as_it_was_left():
    cache = filled_cache()
    assert get_conversation(cache) is None
    conversation = conversation_for(cache)
    assert conversation.length == cache.get_seq_length()
    remember(cache, conversation)
    assert get_conversation(cache) is conversation
    assert get_conversation(copy.deepcopy(cache)).input_ids.tolist() == conversation.input_ids.tolist()
    forget(cache)
    assert get_conversation(cache) is None
    forget(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cache: cache.crop(-1), r"it has 4 entries, but `generate` left 5"),
        (lambda cache: cache.update(*torch.zeros(2, 2, 2, 1, 4), 0), "it has 6 entries, but `generate` left 5"),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), "its keys are not those"),
        (lambda cache: cache.batch_select_indices(torch.tensor([0])), "its keys are not those"),
        (lambda cache: cache.layers[-1].keys.add_(1), "its keys are not those"),
    ],
    ids=["cropped", "added to", "reordered", "rows taken", "written to"],
)
def test_a_cache_that_was_changed_is_refused(change, message):
    cache = filled_cache()
    remember(cache, conversation_for(cache))
    change(cache)
    with pytest.raises(ValueError, match=f"cannot go on from this cache: {message}.*without a cache"):
        get_conversation(cache)


def test_a_cache_that_only_knows_positions_is_refused():
    cache = filled_cache()
    remember_positions(cache, torch.arange(5)[None])
    with pytest.raises(ValueError, match=r"filled by `forward\(\)` or by a call that returned several sequences"):
        get_conversation(cache)
    assert get_conversation(DynamicCache()) is None


@pytest.mark.parametrize("axes", [(), (4,)], ids=["one axis", "four axes"])
def test_positions_of_the_next_tokens(axes):
    """They go on from the last position of each row, however many entries the cache has."""
    cache = filled_cache()
    positions = torch.tensor([[0, 1, 4, 7, 9], [0, 0, 1, 2, 30]]).expand(*axes, -1, -1)
    remember_positions(cache, positions)
    mask = torch.ones(2, 8)
    expected = torch.tensor([[10, 11, 12], [31, 32, 33]]).expand(*axes, -1, -1)
    assert torch.equal(continue_positions(mask, 3, 2, cache), expected)
    assert torch.equal(continue_positions(None, 3, 2, cache), expected)
    assert torch.equal(continue_positions(None, 3, 4, cache), expected.repeat_interleave(2, -2))  # two beams a row
    with pytest.raises(ValueError, match=r"`attention_mask` has 9 columns, but the cache .* new tokens have 8"):
        continue_positions(torch.ones(2, 9), 3, 2, cache)
    for layer in range(2):
        cache.update(*torch.zeros(2, 2, 2, 3, 4), layer)
    assert torch.equal(continue_positions(None, 1, 2, cache), expected[..., -1:] + 1)
    assert continue_positions(None, 1, 2, filled_cache()) is None
    cache.reset()
    assert continue_positions(None, 3, 2, cache) is None and not hasattr(cache, "fsr_position_offset")


# --- The inputs of each family, turn by turn ---


def converse(family, turns, change=lambda inputs: inputs, settings=None, **options):
    """
    One row, in turns of ids and items; each answer is the oracle's, and only what is new is encoded and run. Answers
    have no placeholders: in the next turn, each would ask for a pixel.
    """
    placeholders = list(family.placeholder_ids)
    model, reference = models(family.name)
    answers = Oracle(family, model, reference)
    row, questions, cache = [], [], None

    def choose_word(rows, logits):
        return logits.index_fill(1, torch.tensor(placeholders), -torch.inf).argmax(-1)

    tower, seen = model.get_submodule(family.tower), []
    hook = tower.register_forward_pre_hook(lambda _, args, kwargs: seen.append(True), with_kwargs=True)
    try:
        for parts in turns:
            row += parts
            new = sum(isinstance(part, Item) for part in parts)
            questions += [answers.question(row)] * new
            seen.clear()
            out = model.generate(
                **change(family.inputs([row])),
                past_key_values=cache,
                max_new_tokens=4,
                do_sample=False,
                return_dict_in_generate=True,
                suppress_tokens=placeholders,
                **options,
            )
            assert bool(seen) == bool(new)
            prompt = answers.compress(row, questions=questions, **(settings or {}))
            expected = answers.decode([prompt], 4, choose_word)[0]
            assert torch.equal(out.sequences[:, -4:], expected), parts
            assert get_cache(out).get_seq_length() == len(prompt.columns) + 3
            cache = get_cache(out)
            row += expected[0].tolist()
    finally:
        hook.remove()


def turns_of(family, kinds=None):
    kinds = list(family.kinds if kinds is None else kinds) * 2
    return [
        [BOS, 5, family.item(kinds[0], 1), 7, 10],
        [11, family.item(kinds[1], 2), 12, family.item(kinds[2 % len(kinds)], 3), 13],
        [14, 15],
        [16, family.item(kinds[3 % len(kinds)], 4), 17],
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_kind_of_item_in_each_turn(name):
    family = FAMILIES[name]
    kinds = family.kinds[:1] if len(family.kinds) == 1 else (*family.kinds[1:], family.kinds[0])
    for turns in (turns_of(family), turns_of(family, kinds)):
        converse(family, turns)


def test_views_of_all_pictures_in_one_stack():
    """LLaVA-NeXT's other form of pixels, and sizes in a list."""
    family = FAMILIES["llava_next"]

    def change(inputs):
        pixels = inputs["pixel_values"].flatten(0, 1)
        inputs["pixel_values"] = pixels[~pixels.isnan().flatten(1).any(1)]
        inputs["image_sizes"] = inputs["image_sizes"].tolist()
        return inputs

    converse(family, turns_of(family), change)


def test_numbers_of_frames_in_a_list():
    family = FAMILIES["llava_video"]

    def change(inputs):
        if "video_num_frames" in inputs:
            inputs["video_num_frames"] = inputs["video_num_frames"].tolist()
        if "image_sizes" in inputs:
            inputs["image_sizes"] = inputs["image_sizes"].tolist()
        return inputs

    converse(family, turns_of(family), change)
    converse(family, turns_of(family, ["video"]), change)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_seconds_of_videos(positions, monkeypatch):
    """Qwen2.5-VL's positions count them, for each video its own."""
    family = FAMILIES["qwen2_5_vl"]
    monkeypatch.setattr(models(family.name)[0].config.fsr_config, "positions", positions)
    turns = turns_of(family, ["video"])
    for number, part in enumerate(part for parts in turns for part in parts if isinstance(part, Item)):
        part.inputs["second_per_grid_ts"] = torch.tensor([1.0 + 2 * number])
    converse(family, turns)
    as_list = {"second_per_grid_ts"}
    converse(family, turns, lambda inputs: {k: v.tolist() if k in as_list else v for k, v in inputs.items()})


@pytest.mark.parametrize("name", FAMILIES)
def test_budget_of_each_turn(name):
    """A budget of the call; pictures within it, some or all, stay whole in the cache."""
    family = FAMILIES[name]
    for budget in (
        {"num_visual_tokens": 16},
        {"num_visual_tokens": 30},
        {"retention_ratio": 0.6},
        {"retention_ratio": 1},
    ):
        converse(family, turns_of(family), settings=budget, **budget)
