"""Qwen2.5-VL: attention received, the order of windows, images and videos in one prompt, positions, refusals."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from families import (
    BOS,
    FAMILIES,
    IMAGE_TOKEN,
    QWEN_VISION_CONFIG,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    Item,
    initialize,
    models,
    qwen_item,
)
from old_keys import old_qwen_key
from oracle import Oracle
from received import attention_maps, received_attention, window_order
from safetensors.torch import save_file
from tiny_qwen import save_checkpoint
from transformers import (
    AutoModel,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    StaticCache,
)

from fsr_hf import FSRQwen2_5_VLConfig, FSRQwen2_5_VLForConditionalGeneration


FAMILY = FAMILIES["qwen2_5_vl"]
MERGE, SIDE = 2, 2  # patches of a token and tokens of a window, along an edge
# Whole windows, one token over, thin, one window or less; videos of one slice and of several.
GRIDS = [(1, 8, 12), (1, 6, 10), (1, 14, 2), (1, 2, 2), (1, 10, 10), (3, 6, 10), (2, 4, 6)]


@pytest.fixture
def model():
    return models("qwen2_5_vl")[0]


@pytest.fixture
def reference():
    """The stock model with the same weights and eager attention."""
    return models("qwen2_5_vl")[1]


@pytest.fixture
def settings(model, monkeypatch):
    """Sets fields of the shared model's `fsr_config` for one test."""
    return lambda **fields: [monkeypatch.setattr(model.config.fsr_config, *field) for field in fields.items()]


def item(grid, seed=0, seconds=None):
    """An image, or a video if there is a number of `seconds` between its slices."""
    built = qwen_item(grid, torch.Generator().manual_seed(seed), "image" if seconds is None else "video")
    if seconds is not None:
        built.inputs["second_per_grid_ts"] = torch.tensor([float(seconds)])
    return built


def pixels_of(*grids, seed=0):
    grid = torch.tensor(grids)
    pixels = torch.randn(int(grid.prod(-1).sum()), 96, generator=torch.Generator().manual_seed(seed))
    return pixels, grid


def mixed_rows():
    """Images and videos of several sizes in one row and in one batch, in every order, and a row without any."""
    return [
        [BOS, 5, item((1, 6, 10), 1), 7, item((3, 6, 6), 2, 1), 8, item((1, 4, 4), 3), 9, 10],
        [BOS, item((2, 4, 8), 4, 2), 6, item((1, 8, 8), 5), item((1, 10, 4), 6), 7, item((2, 6, 6), 7, 1), 11],
        [BOS, 20, 21, 22],
        [BOS, item((1, 2, 2), 8), 30, item((4, 4, 6), 9, 3), 31, 32],
    ]


def decode(model, rows, num_new=8, **settings):
    """Greedy tokens after the prompt."""
    inputs = FAMILY.inputs(rows)
    tokens = model.generate(**inputs, max_new_tokens=num_new, do_sample=False, **settings)
    return tokens[:, inputs["input_ids"].shape[1] :]


def select(model, rows, **settings):
    return model.generate(
        **FAMILY.inputs(rows),
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_visual_selection=True,
        **settings,
    ).visual_selections


def oracle_tokens(rows, num_new=8, **settings):
    oracle = Oracle(FAMILY, *models("qwen2_5_vl"))
    return oracle.decode([oracle.compress(row, **settings) for row in rows], num_new)[0]


def record(model, name="position_ids"):
    """The values of an argument of the language model, call by call, and what removes the hook."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs[name]), with_kwargs=True
    )
    return seen, hook


# --- Saliency ---


def saliency_of(model, pixels, grid, modality="image"):
    inner = model.model
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
    visual = dict(zip(names[modality], (pixels, grid)))
    with torch.no_grad():
        tokens, outputs = inner.encode_items(inner.build_items(**visual), None, **visual)
    assert list(outputs) == [modality] and tokens.relevance is None
    assert [len(run) for run in tokens.features] == (grid.prod(-1) // MERGE**2).tolist()
    return tokens.saliency


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("grids", [GRIDS[:1], GRIDS[5:6], GRIDS], ids=["image", "video", "several"])
def test_saliency_is_the_attention_received_in_the_last_block(model, reference, grids, attention):
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    pixels, grid = pixels_of(*grids)
    saliency = saliency_of(model, pixels, grid, "video" if len(grids) == 1 and grids[0][0] > 1 else "image")
    expected = received_attention(reference.model.visual, pixels, grid)
    torch.testing.assert_close(saliency, expected, rtol=1e-4, atol=1e-7)
    assert expected.std() > 0.1 * expected.mean()
    # Each slice hands out 1 for each of its queries.
    areas = [h * w // MERGE**2 for t, h, w in grids for _ in range(t)]
    for part in saliency.split(areas):
        torch.testing.assert_close(part.sum() * MERGE**2, torch.tensor(1.0))


def test_window_order_and_another_block_would_be_wrong(model, reference):
    """What the test above can tell apart."""
    pixels, grid = pixels_of((1, 8, 12), (2, 6, 10))
    saliency = saliency_of(model, pixels, grid)
    order = window_order(grid, SIDE, MERGE)
    assert sorted(order) == list(range(len(order))) != order
    expected = received_attention(reference.model.visual, pixels, grid)
    in_windows = expected[order]
    before = received_attention(reference.model.visual, pixels, grid, block=-2)
    # The last block sees whole slices, the one before it windows.
    shapes = [tuple(maps.shape[1:]) for maps in attention_maps(reference.model.visual, pixels, grid)]
    assert shapes == [(96, 96), (60, 60), (60, 60)]
    windows = {tuple(maps.shape[1:]) for maps in attention_maps(reference.model.visual, pixels, grid, block=-2)}
    assert windows == {(16, 16), (8, 8), (4, 4)}
    for wrong in (in_windows, before, before[order]):
        assert (wrong - expected).abs().max() > 100 * (saliency - expected).abs().max()
        assert wrong.argsort().tolist() != saliency.argsort().tolist()


def test_the_input_of_the_last_block_is_what_it_reads(model, monkeypatch):
    """Which of the recorded hidden states that is depends on the version of transformers."""
    pixels, grid = pixels_of((1, 6, 10), (1, 4, 4))
    seen, scored = [], []
    hook = model.model.visual.blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    score = model.model.saliency
    monkeypatch.setattr(model.model, "saliency", lambda states, grid: scored.append(states) or score(states, grid))
    try:
        saliency_of(model, pixels, grid)
    finally:
        hook.remove()
    assert torch.equal(*seen, *scored)
    with torch.no_grad():
        outputs = model.get_image_features(pixels, grid, output_hidden_states=[1, 2], return_dict=True)
    assert sum(states is not None for states in outputs.hidden_states) == 2  # no more are kept


def test_half_precision_scores_in_float32(model, reference):
    half = copy.deepcopy(model).to(torch.bfloat16)
    pixels, grid = pixels_of((1, 12, 12))
    saliency = saliency_of(half, pixels, grid)
    assert saliency.dtype == torch.float32
    expected = received_attention(reference.model.visual, pixels, grid)
    torch.testing.assert_close(saliency, expected, rtol=0.3, atol=1e-3)  # the tower's own rounding
    assert len({round(value, 7) for value in saliency.tolist()}) == len(saliency)


# --- Images and videos in one prompt ---


@pytest.mark.parametrize(
    "budget", [{"num_visual_tokens": 5}, {"retention_ratio": 0.5}, {"num_visual_tokens": 16}], ids=str
)
def test_images_and_videos_mixed(model, budget):
    """The last budget leaves some of the items whole."""
    rows = mixed_rows()
    expected = oracle_tokens(rows, **budget)
    assert torch.equal(decode(model, rows, **budget), expected)
    alone = [decode(model, [row], **budget)[0] for row in rows]
    assert torch.equal(torch.stack(alone), expected)


def test_selections_come_in_the_order_of_the_prompt(model):
    rows = mixed_rows()
    items = [(number, part) for number, row in enumerate(rows) for part in row if isinstance(part, Item)]
    selections = select(model, rows, num_visual_tokens=5)
    assert [(s.row, s.modality) for s in selections] == [(number, part.modality) for number, part in items]
    assert [s.modality for s in selections].count("video") == 4
    for selection, (_, part) in zip(selections, items):
        t, h, w = next(value for name, value in part.inputs.items() if name.endswith("grid_thw"))[0].tolist()
        grid = [[k, i, j] for k in range(t) for i in range(h // MERGE) for j in range(w // MERGE)]
        assert selection.grid.tolist() == grid
        assert len(selection.indices) == min(5, part.length)
        alone = select(model, [[BOS, part, 7]], num_visual_tokens=5)[0]
        assert selection.indices.tolist() == alone.indices.tolist()
        torch.testing.assert_close(selection.priority, alone.priority, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, [8, 14, 12]), (0.01, [1, 1, 1]), (0.35, [5, 9, 8]), (1.0, None)])
def test_a_ratio_is_one_of_each_item(model, ratio, kept):
    rows = [[BOS, item((1, 6, 10)), 5, item((3, 6, 6), seconds=1), 6], [BOS, item((1, 4, 24)), 7]]
    lengths = [part.length for row in rows for part in row if isinstance(part, Item)]
    assert lengths == [15, 27, 24]
    kept = kept or lengths
    assert [len(selection.indices) for selection in select(model, rows, retention_ratio=ratio)] == kept


def test_default_budget_is_half(model):
    config = FSRQwen2_5_VLConfig(**FAMILY.config)
    fsr = config.fsr_config
    assert (fsr.retention_ratio, fsr.num_visual_tokens) == (0.5, None)
    assert (fsr.relevance, fsr.pool, fsr.positions) == ("none", "item", "original")
    built = initialize(FSRQwen2_5_VLForConditionalGeneration(config))
    assert [len(s.indices) for s in select(built, [[BOS, item((1, 6, 10)), 5]])] == [8]


def test_pools_of_slices(model, settings):
    """With `pool="view"` each slice of a video is selected by itself; an image is one view."""
    settings(pool="view")
    video, image = item((3, 6, 8), 1, seconds=1), item((1, 6, 10), 2)
    rows = [[BOS, video, 5, image, 6]]
    selections = select(model, rows, num_visual_tokens=8)
    counts = torch.bincount(selections[0].grid[selections[0].indices][:, 0], minlength=3)
    assert counts.tolist() == [3, 3, 2]
    # A slice as a video of its own: with no more than that slice, attention and tokens are the same.
    area = 6 * 8
    for number, share in enumerate(counts.tolist()):
        pixels = video.inputs["pixel_values_videos"][number * area : (number + 1) * area]
        inputs = {**video.inputs, "pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[1, 6, 8]])}
        part = Item("video", [VISION_START] + [VIDEO_TOKEN] * 12 + [VISION_END], inputs, 12)
        alone = select(model, [[BOS, part, 5]], num_visual_tokens=share)[0]
        mine = selections[0].grid[selections[0].indices][:, 0] == number
        assert selections[0].indices[mine].tolist() == (alone.indices + 12 * number).tolist()
        torch.testing.assert_close(selections[0].features[mine], alone.features, rtol=1e-4, atol=1e-5)
    settings(pool="item")
    assert select(model, rows, num_visual_tokens=8)[1].indices.tolist() == selections[1].indices.tolist()
    assert select(model, rows, num_visual_tokens=8)[0].indices.tolist() != selections[0].indices.tolist()


def test_more_slices_than_budget(model, settings):
    settings(pool="view")
    rows = [[BOS, item((4, 4, 4), seconds=1), 5]]
    selection = select(model, rows, num_visual_tokens=3)[0]
    assert selection.grid[selection.indices][:, 0].tolist() == [0, 1, 2]
    assert decode(model, rows, num_visual_tokens=3).shape == (1, 8)


# --- Positions ---


def positions_by_hand(row):
    """Time, height and width of every id of a row, as the Qwen2.5-VL report defines them: `(3, length)`."""
    positions, now = [], 0
    for part in row:
        if isinstance(part, int):
            positions.append((now, now, now))
            now += 1
            continue
        t, h, w = next(value for name, value in part.inputs.items() if name.endswith("grid_thw"))[0].tolist()
        h, w = h // MERGE, w // MERGE
        interval = QWEN_VISION_CONFIG["tokens_per_second"] * int(part.inputs.get("second_per_grid_ts", [0])[0])
        positions.append((now, now, now))  # vision start
        now += 1
        positions += [(now + k * interval, now + i, now + j) for k in range(t) for i in range(h) for j in range(w)]
        now += max(h, w)
        positions.append((now, now, now))  # vision end
        now += 1
    return torch.tensor(positions).T


def test_kept_tokens_and_new_ones_have_the_positions_of_the_full_prompt(model):
    rows = mixed_rows()
    oracle = Oracle(FAMILY, *models("qwen2_5_vl"))
    prompts = [oracle.compress(row, num_visual_tokens=5) for row in rows]
    seen, hook = record(model)
    decode(model, rows, num_new=4, num_visual_tokens=5)
    pruned = list(seen)
    seen.clear()
    decode(model, rows, num_new=4, fsr_enabled=False)
    hook.remove()
    width = max(len(prompt.columns) for prompt in prompts)
    assert pruned[0].shape == (4, len(rows), width)
    for number, (row, prompt) in enumerate(zip(rows, prompts)):
        length = len(prompt.columns)
        expected = positions_by_hand(row)
        assert torch.equal(pruned[0][1:, number, -length:], expected[:, prompt.columns])
        assert pruned[0][0, number, -length:].tolist() == list(range(length))
        for step in range(1, 4):
            assert pruned[step][1:, number].tolist() == [[int(expected[0, -1]) + step]] * 3
            assert int(pruned[step][0, number]) == length - 1 + step
    for step in range(1, 4):  # as the full prompt goes on
        assert torch.equal(pruned[step][1:], seen[step][1:])


def test_compact_positions(model, settings):
    """What is left of the prompt is numbered one by one."""
    settings(positions="compact")
    rows = mixed_rows()
    oracle = Oracle(FAMILY, *models("qwen2_5_vl"))
    prompts = [oracle.compress(row, num_visual_tokens=5) for row in rows]
    expected = oracle.decode(prompts, 6)[0]
    seen, hook = record(model)
    assert torch.equal(decode(model, rows, num_new=6, num_visual_tokens=5), expected)
    hook.remove()
    for number, prompt in enumerate(prompts):
        length = len(prompt.columns)
        assert seen[0][:, number, -length:].tolist() == [list(range(length))] * 4
        assert seen[1][:, number].flatten().tolist() == [length] * 4
    settings(positions="original")
    assert not torch.equal(decode(model, rows, num_new=6, num_visual_tokens=5), expected)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_compact_positions_are_decided_by_row(model, settings, options):
    """A row that loses nothing keeps the stock positions, beside pruned rows as alone."""
    settings(positions="compact")
    whole = [BOS, 5, item((1, 4, 4), 1), 7, item((2, 4, 2), 2, 1), 8, 9]
    pruned = [BOS, item((1, 6, 10), 3), 7, item((1, 4, 4), 4), 8]
    text = [BOS, 20, 21, 22]
    rows = [whole, pruned, text]
    stock = FAMILY.build_reference(model, attn_implementation="sdpa")
    seen, hook = record(model)
    together = decode(model, rows, num_visual_tokens=4, **options)
    hook.remove()
    inputs = FAMILY.inputs([whole])
    alone = [decode(model, [row], num_visual_tokens=4, **options) for row in rows]
    assert torch.equal(together, torch.cat(alone))
    expected = stock.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    assert torch.equal(together[0], expected[0, inputs["input_ids"].shape[1] :])
    # The first call has the rows in turn, each as often as there are beams.
    copies = seen[0].shape[1] // len(rows)
    by_hand = positions_by_hand(whole)
    assert torch.equal(seen[0][1:, 0, -by_hand.shape[1] :], by_hand)
    assert by_hand[:, -1].tolist() != [by_hand.shape[1] - 1] * 3
    length = len(Oracle(FAMILY, *models("qwen2_5_vl")).compress(pruned, num_visual_tokens=4).columns)
    assert seen[0][:, copies, -length:].tolist() == [list(range(length))] * 4


def test_seconds_between_slices_count(model):
    """Time goes into the positions, so it changes logits, and `None` is one second."""
    fast, slow = ([BOS, 5, item((4, 6, 6), 1, seconds), 7, 8] for seconds in (1, 5))
    assert positions_by_hand(fast).max() < positions_by_hand(slow).max()
    logits = []
    with torch.no_grad():
        for row in (fast, slow):
            logits.append(model(**FAMILY.inputs([row]), logits_to_keep=1).logits)
        inputs = FAMILY.inputs([fast])
        del inputs["second_per_grid_ts"]
        assert torch.equal(model(**inputs, logits_to_keep=1).logits, logits[0])
        inputs["second_per_grid_ts"] = [1.0]
        assert torch.equal(model(**inputs, logits_to_keep=1).logits, logits[0])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_token_types_are_found_if_missing(model, reference):
    rows = mixed_rows()
    inputs = FAMILY.inputs(rows)
    expected = decode(model, rows)
    del inputs["mm_token_type_ids"]
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options)[:, length:], expected)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**FAMILY.inputs(rows)).logits)
    # Unpruned it is the stock model, which takes an image for text without them.
    stock = FAMILY.build_reference(model, attn_implementation="sdpa")
    for setting in ({"fsr_enabled": False}, {"retention_ratio": 1.0}):
        assert torch.equal(model.generate(**inputs, **options, **setting), stock.generate(**inputs, **options))


def steps(model, inputs, **settings):
    """A decoding loop by hand, without positions and mask: yields one greedy token after the other."""
    inputs = {**inputs, "use_cache": True}
    while True:
        with torch.no_grad():  # not around `yield`
            out = model(**inputs, **settings)
        inputs = {"input_ids": out.logits[:, -1:].argmax(-1), "past_key_values": out.past_key_values}
        yield int(inputs["input_ids"])


def test_calls_in_turn_do_not_share_positions():
    """
    The stock class keeps the offset of positions on the model, where the next call finds it. Loops over several
    prompts, pruned, unpruned and text, taken in turn, go on as each would alone.
    """
    model = FAMILY.build()
    first = [BOS, 5, item((3, 8, 10), 1, 1), 7, 8]
    second = [BOS, item((1, 12, 4), 2), 6, item((1, 4, 4), 3), 9]
    text = [BOS, 20, 21, 22, 23]
    expected = {
        "first": oracle_tokens([first], 6)[0].tolist(),
        "second": oracle_tokens([second], 6)[0].tolist(),
        "unpruned": oracle_tokens([first], 6, fsr_enabled=False)[0].tolist(),
        "text": oracle_tokens([text], 6)[0].tolist(),
    }
    assert len({str(tokens) for tokens in expected.values()}) == 4
    decode(model, [second])  # leaves nothing either
    decode(model, [first], fsr_enabled=False)
    inputs = FAMILY.inputs([first])
    loops = {
        "first": steps(model, inputs),
        "text": steps(model, FAMILY.inputs([text])),
        "unpruned": steps(model, inputs, fsr_enabled=False),
        "second": steps(model, FAMILY.inputs([second])),
    }
    tokens = {name: [] for name in loops}
    for step in range(6):
        for name, loop in loops.items():
            tokens[name].append(next(loop))
        if step == 2:
            assert decode(model, [second], num_new=6)[0].tolist() == expected["second"]
    assert tokens == expected


def test_text_after_images_is_that_of_a_fresh_model(model):
    stock = FAMILY.build_reference(model, attn_implementation="sdpa")
    text = FAMILY.inputs([[BOS, 20, 21, 22], [BOS, 23, 24]])
    embeds = {
        "inputs_embeds": model.get_input_embeddings()(text["input_ids"]),
        "attention_mask": text["attention_mask"],
    }
    with torch.no_grad():
        expected = [stock(**inputs).logits for inputs in (text, embeds)]
        expected.append(stock.generate(**text, max_new_tokens=6, do_sample=False))
        for settings in ({}, {"fsr_enabled": False}):
            for call in (
                lambda settings=settings: decode(model, mixed_rows(), **settings),
                lambda settings=settings: model(**FAMILY.inputs(mixed_rows()), **settings),
            ):
                call()
                actual = [model(**inputs).logits for inputs in (text, embeds)]
                call()
                actual.append(model.generate(**text, max_new_tokens=6, do_sample=False))
                assert all(map(torch.equal, actual, expected))


def test_a_cache_that_was_emptied_starts_anew(model):
    """The mark of a pruned prompt does not outlive its entries."""
    row, text = [BOS, 5, item((1, 8, 8)), 7], [BOS, 20, 21, 22]
    with torch.no_grad():
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        model(**FAMILY.inputs([row]), past_key_values=cache)
        cache.reset()
        out = model(**FAMILY.inputs([text]), past_key_values=cache)
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=cache)
    assert [int(token), int(out.logits[0, -1].argmax())] == oracle_tokens([text], 2)[0].tolist()


# --- What is refused ---


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"image_grid_thw": None}, "`pixel_values` need `image_grid_thw`.*None"),
        ({"image_grid_thw": torch.tensor([1, 6, 10])}, r"`image_grid_thw`.*of shape \(3,\)"),
        ({"image_grid_thw": [[1, 6, 10], [1, 4, 4]]}, r"`image_grid_thw`.*in a tensor.*\[\[1, 6, 10\]"),
        (
            {"image_grid_thw": torch.tensor([[1, 6, 10]])},
            r"`pixel_values` of shape \(76, 96\) hold 76 patches.*need 60",
        ),
        ({"image_grid_thw": torch.tensor([[1, 6, 10], [1, 4, 6]])}, r"1 rows|2 rows.*need 84"),
        ({"image_grid_thw": torch.tensor([[1, 5, 12], [1, 4, 4]])}, r"\[1, 5, 12\] for image 0.*multiples of 2"),
        ({"image_grid_thw": torch.tensor([[1, 6, 10], [0, 4, 4]])}, r"\[0, 4, 4\] for image 1.*at least 1"),
        ({"pixel_values": torch.zeros(75, 96)}, r"`pixel_values` of shape \(75, 96\) hold 75 patches.*need 76"),
        ({"pixel_values": None}, "`image_grid_thw` has 2 rows, but there are no `pixel_values`"),
        (
            {"pixel_values": None, "image_grid_thw": None},
            "Image features and image tokens do not match.*19 placeholders",
        ),
        ({"video_grid_thw": None}, "`pixel_values_videos` need `video_grid_thw`"),
        ({"video_grid_thw": torch.tensor([[0, 6, 6]])}, r"\[0, 6, 6\] for video 0.*An empty video has no tokens"),
        ({"video_grid_thw": torch.tensor([[2, 6, 6]])}, r"`pixel_values_videos`.*108 patches.*need 72"),
        ({"second_per_grid_ts": torch.tensor([1.0, 2.0])}, "`second_per_grid_ts` has 2 numbers for 1 videos"),
        ({"image_grid_thw": torch.tensor([[1, 4, 4], [1, 6, 10]])}, "image 0 needs|image 1 needs"),
        ({"num_visual_tokens": 0}, "`num_visual_tokens=0` is not allowed"),
        ({"retention_ratio": 0.0}, "`retention_ratio=0.0` is not allowed"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else None,
)
def test_bad_input_is_refused_before_any_work(model, monkeypatch, change, error):
    row = [BOS, item((1, 6, 10), 1), 7, item((3, 6, 6), 2, 1), 8, item((1, 4, 4), 3), 9]
    inputs = {**FAMILY.inputs([row]), **change}

    def work(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(model.model.visual, "forward", work)
    monkeypatch.setattr(model.model.language_model, "forward", work)
    with pytest.raises(ValueError, match=error):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match=error):
        model(**inputs)


def test_no_images_beside_a_video(model):
    """Some collators pass tensors without rows."""
    row = [BOS, item((3, 6, 6), 1, 1), 7]
    empty = {"pixel_values": torch.zeros(0, 96), "image_grid_thw": torch.zeros(0, 3, dtype=torch.long)}
    out = model.generate(**FAMILY.inputs([row]), **empty, max_new_tokens=8, do_sample=False)
    assert torch.equal(out[:, -8:], oracle_tokens([row]))


def test_images_side_by_side_are_refused(model):
    """Positions cannot tell where one ends: the stock class fails on them, far from the cause."""
    parts = [item((1, 4, 4), seed) for seed in range(2)]
    for part in parts:
        part.token_ids = [IMAGE_TOKEN] * part.length
    with pytest.raises(ValueError, match=r"in row 0, two stand side by side at column 5.*vision_end_token_id"):
        decode(model, [[BOS, *parts, 7]])
    video = item((1, 4, 4), 3, 1)
    video.token_ids = [VIDEO_TOKEN] * video.length
    assert torch.equal(decode(model, [[BOS, parts[0], video, 7]]), oracle_tokens([[BOS, parts[0], video, 7]]))


def test_relevance_is_refused(model, settings):
    for field in ({"relevance": "clip"}, {"text_encoder_config": {"hidden_size": 24}}):
        with pytest.raises(ValueError, match=r'`fsr_config\.relevance="clip"`.*comes from no CLIP'):
            FSRQwen2_5_VLConfig(**FAMILY.config, fsr_config=field)
    settings(relevance="clip")
    with pytest.raises(
        ValueError, match=r'`fsr_config\.relevance="clip"` needs a CLIP text encoder.*set it to "none"'
    ):
        decode(model, [[BOS, item((1, 4, 4)), 7]], num_visual_tokens=2)


def test_a_question_for_clip_is_not_read(model):
    row = [BOS, item((1, 8, 8)), 7]
    query = {"query_input_ids": torch.zeros(1, 77, dtype=torch.long)}
    out = model.generate(**FAMILY.inputs([row]), **query, max_new_tokens=8, do_sample=False)
    assert torch.equal(out[:, -8:], decode(model, [row]))


@pytest.mark.parametrize("change", [{"fullatt_block_indexes": [0, 1]}, {"depth": 4}, {"depth": 1}], ids=str)
def test_towers_without_full_attention_at_the_end_are_refused(change):
    config = FSRQwen2_5_VLConfig(**{**FAMILY.config, "vision_config": {**QWEN_VISION_CONFIG, **change}})
    with pytest.raises(ValueError, match=r"`vision_config.depth=\d` and `vision_config.fullatt_block_indexes"):
        FSRQwen2_5_VLForConditionalGeneration(config)


# --- The class ---


def test_stays_a_stock_class_to_trainer(model):
    assert model.accepts_loss_kwargs is False and model.model.accepts_loss_kwargs is False


@pytest.mark.parametrize("is_tied", [False, True], ids=["7B", "tied as 3B"])
def test_old_checkpoint_loads_whole(tmp_path, is_tied):
    config = FAMILY.reference_config_class(**FAMILY.config, tie_word_embeddings=is_tied)
    stock = initialize(Qwen2_5_VLForConditionalGeneration(config))
    weights = {old_qwen_key(key): tensor.clone() for key, tensor in stock.state_dict().items()}
    if is_tied:
        del weights["lm_head.weight"]
    assert all(key.startswith(("visual.", "model.", "lm_head.")) and ".visual." not in key for key in weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # As Qwen's repositories have it: the language model's fields at the top.
    fields = config.to_dict()
    fields = {**fields.pop("text_config"), **fields, "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    fields["vision_config"]["model_type"] = "qwen2_5_vl"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model, info = FSRQwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for key, tensor in stock.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    row = [BOS, 5, item((1, 8, 8)), 7]
    model.generation_config, stock.generation_config = (copy.deepcopy(stock.generation_config) for _ in range(2))
    assert torch.equal(decode(model, [row], fsr_enabled=False), decode(stock, [row]))
    model.save_pretrained(tmp_path / "new")
    again = AutoModel.from_pretrained(tmp_path / "new")
    assert type(again) is FSRQwen2_5_VLForConditionalGeneration
    assert torch.equal(decode(again, [row]), decode(model, [row]))


# --- With the stock processor ---


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_with_the_stock_processor(tmp_path):
    save_checkpoint(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is Qwen2_5_VLProcessor
    video = np.stack([picture(48, 40, seed) for seed in range(6)])
    turns = [
        [
            {"type": "image", "image": picture(40, 64)},
            {"type": "text", "text": "and"},
            {"type": "video", "video": video},
            {"type": "text", "text": "what?"},
        ],
        [{"type": "text", "text": "no picture"}],
        [
            {"type": "image", "image": picture(64, 24, 1)},
            {"type": "image", "image": picture(24, 24, 2)},
            {"type": "text", "text": "which one is it?"},
        ],
    ]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}] for content in turns],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert inputs["image_grid_thw"].tolist() == [[1, 10, 16], [1, 16, 6], [1, 6, 6]]
    assert inputs["video_grid_thw"].tolist() == [[3, 12, 10]]
    out = model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_visual_selection=True,
    )
    length = inputs["input_ids"].shape[1]
    assert [(s.row, s.modality, len(s.indices)) for s in out.visual_selections] == [
        (0, "image", 20),
        (0, "video", 45),
        (2, "image", 12),
        (2, "image", 4),
    ]
    assert len(processor.batch_decode(out.sequences[:, length:], skip_special_tokens=True)) == 3
    # Against the stock class on what was kept: embeddings and positions of the full prompt, without the dropped ones.
    stock = FAMILY.reference_class._from_config(FAMILY.reference_config_class(**stock_config(model)))
    stock.load_state_dict(model.state_dict())
    stock.eval()
    assert torch.equal(out.sequences[:, length:], decode_kept(stock, inputs, out.visual_selections, 6))


def stock_config(model):
    fields = model.config.to_dict()
    return {name: fields[name] for name in FAMILY.config}


@torch.no_grad()
def decode_kept(stock, inputs, selections, num_new):
    """Greedy decoding of every row by the stock class from the tokens of `selections`."""
    ids = inputs["input_ids"]
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask", "mm_token_type_ids")
    positions, _ = stock.model.get_rope_index(ids, **{name: inputs[name] for name in names})
    embeds = stock.get_input_embeddings()(ids)
    is_kept = inputs["attention_mask"].bool()
    for row in range(len(ids)):
        column = 0
        for selection in (s for s in selections if s.row == row):
            placeholder = stock.config.image_token_id if selection.modality == "image" else stock.config.video_token_id
            column += int((ids[row, column:] == placeholder).nonzero()[0])
            run = slice(column, column + len(selection.grid))
            assert (ids[row, run] == placeholder).all()
            is_kept[row, run] = False
            is_kept[row, column + selection.indices] = True
            embeds[row, column + selection.indices] = selection.features
            column = run.stop
    tokens = []
    for row in range(len(ids)):
        words, places, new = embeds[row, is_kept[row]], positions[:, row, is_kept[row]], []
        for _ in range(num_new):
            out = stock(
                inputs_embeds=words[None],
                position_ids=places[:, None],
                attention_mask=torch.ones(1, len(words), dtype=torch.long),
                use_cache=False,
            )
            new.append(out.logits[0, -1].argmax())
            words = torch.cat([words, stock.get_input_embeddings()(new[-1])[None]])
            places = torch.cat([places, places[:, -1:] + 1], dim=1)
        tokens.append(torch.stack(new))
    return torch.stack(tokens)


def test_a_long_video_of_many_slices(model):
    """Time runs ahead of height and width: text after the video stands before its last slices."""
    row = [BOS, item((12, 4, 4), 1, 4), 7, 8]
    positions = positions_by_hand(row)
    assert positions[0].max() > positions[0, -1]
    assert torch.equal(decode(model, [row], num_visual_tokens=6), oracle_tokens([row], num_visual_tokens=6))
    assert math.prod((12, 4, 4)) // 4 == row[1].length
