"""LLaVA-NeXT: which token belongs to which view, budgets and pools of views, newlines, and what it refuses."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from anyres import num_views, pack
from families import (
    BOS,
    CLIP_VISION_CONFIG,
    FAMILIES,
    NEXT_PINPOINTS,
    NEXT_PIXELS,
    NEXT_SIDE,
    TEXT_CONFIG,
    initialize,
    llava_next_item,
    llava_next_layout,
    models,
)
from oracle import Oracle, split_budget
from transformers import AutoModel

from fsr_hf import FSRLlavaNextConfig, FSRLlavaNextForConditionalGeneration


FAMILY = FAMILIES["llava_next"]
AREA = NEXT_SIDE**2
# Height and width: squares, a little and very wide and tall, and two of which unpadding leaves no tile.
SIZES = [(64, 64), (112, 112), (300, 300), (100, 140), (140, 100), (30, 190), (190, 30), (170, 70), (40, 333)]
THIN = [(20, 1500), (1500, 20)]


@pytest.fixture
def model():
    return models("llava_next")[0]


@pytest.fixture
def settings(model, monkeypatch):
    """Sets fields of the shared model's `fsr_config` for one test."""
    return lambda **fields: [monkeypatch.setattr(model.config.fsr_config, *field) for field in fields.items()]


def oracle(pool="view"):
    layout = functools.partial(llava_next_layout, pool=pool)
    return Oracle(replace(FAMILY, layout=layout), *models("llava_next"))


def item(size, seed=0):
    return llava_next_item(size, torch.Generator().manual_seed(seed))


def row(*sizes):
    """Ids and pictures in turn."""
    parts = [BOS, 5, 6]
    for number, size in enumerate(sizes):
        parts += [item(size, number), 10 + number, 20]
    return parts


def run(model, rows, **kwargs):
    """Selections, and the embeddings and mask that the language model got."""
    calls = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, inputs: calls.append(inputs), with_kwargs=True
    )
    try:
        output = model.generate(
            **FAMILY.inputs(rows),
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_visual_selection=True,
            **kwargs,
        )
    finally:
        hook.remove()
    return output.visual_selections, calls[0]["inputs_embeds"]


def layout_of(size):
    return pack(size, NEXT_PINPOINTS, NEXT_PIXELS, NEXT_SIDE)


def tokens_per_view(size):
    """Candidates of each view, those that are empty included."""
    views = [token[0] for token in layout_of(size) if token is not None]
    return [views.count(view) for view in range(num_views(size, NEXT_PINPOINTS, NEXT_PIXELS))]


# ---------------------------------------------------------------------- layout


@pytest.mark.parametrize("size", SIZES + THIN, ids=str)
def test_grid_says_where_every_placeholder_is(model, size):
    (selection,), _ = run(model, [row(size)], num_visual_tokens=5)
    expected = [token or (-1, -1, -1) for token in layout_of(size)]
    assert selection.grid.tolist() == [list(token) for token in expected]
    assert (selection.modality, selection.row) == ("image", 0)


def test_unpadding_can_empty_every_tile(model):
    assert [tokens_per_view(size) for size in THIN] == [[AREA, 0, 0, 0]] * 2
    wide, tall = THIN
    assert (
        len(layout_of(wide)) == AREA and len(layout_of(tall)) == AREA + 3 * NEXT_SIDE
    )  # a newline for each empty row
    selections, _ = run(model, [row(*THIN)], num_visual_tokens=6)
    for selection in selections:
        assert len(selection.indices) == 6 and selection.indices.max() < AREA


def test_tower_sees_every_view_once_and_no_padding(model):
    batch = FAMILY.inputs([row((100, 140), (30, 190)), row((64, 64)), [BOS, 5]])
    assert batch["pixel_values"].isnan().any()
    calls = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    try:
        model.generate(**batch, max_new_tokens=2)
    finally:
        hook.remove()
    (pixels,) = calls
    assert len(pixels) == sum(
        num_views(size, NEXT_PINPOINTS, NEXT_PIXELS) for size in ((100, 140), (30, 190), (64, 64))
    )
    assert pixels.isfinite().all()


def test_views_of_all_pictures_in_one_stack(model):
    rows = [row((100, 140), (30, 190)), row((64, 64))]
    batch = FAMILY.inputs(rows)
    expected = model.generate(**batch, max_new_tokens=5)
    views = [part.inputs["pixel_values"][0] for parts in rows for part in parts if not isinstance(part, int)]
    batch["pixel_values"] = torch.cat(views)
    assert torch.equal(model.generate(**batch, max_new_tokens=5), expected)
    batch["image_sizes"] = batch["image_sizes"].tolist()
    assert torch.equal(model.generate(**batch, max_new_tokens=5), expected)


# ---------------------------------------------------------------------- selection


@pytest.mark.parametrize("pool", ["view", "item"])
@pytest.mark.parametrize("size", SIZES + THIN, ids=str)
def test_selection_is_that_of_a_loop_over_the_pools(model, settings, size, pool):
    settings(pool=pool)
    parts = row(size)
    prompt = oracle(pool).compress(parts, num_visual_tokens=13)
    (expected,) = prompt.selections
    (selection,), embeds = run(model, [parts], num_visual_tokens=13)
    assert selection.indices.tolist() == expected.kept
    assert {i for i, focus in zip(expected.kept, selection.is_focus) if focus} == expected.focus
    merged = {i: anchor for i, anchor in enumerate(selection.merged_into.tolist()) if anchor >= 0}
    assert merged == expected.merged_into
    priority = torch.tensor([expected.priority.get(i, 0.0) for i in range(len(selection.priority))])
    torch.testing.assert_close(selection.priority, priority, rtol=1e-3, atol=1e-5)
    features = torch.stack([expected.features[i] for i in expected.kept])
    torch.testing.assert_close(selection.features, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embeds[0], prompt.embeds, rtol=1e-4, atol=1e-5)


def test_the_cases_above_reach_scan_and_refine():
    selections = [oracle().compress(row(size), num_visual_tokens=13).selections[0] for size in SIZES]
    assert sum(len(selection.focus) < 13 for selection in selections) > len(SIZES) // 2
    assert any(selection.merged_into for selection in selections)


def test_newlines_of_a_pruned_picture_are_dropped(model):
    """One embedding for each word and each kept token, in order, and none of them is the newline."""
    size = (100, 140)
    (selection,), embeds = run(model, [row(size)], num_visual_tokens=8)
    kept = selection.indices.tolist()
    assert len(kept) == 8 and all(layout_of(size)[number] is not None for number in kept)
    assert embeds.shape[1] == 5 + 8
    assert torch.equal(embeds[0, 3:11], selection.features)
    newline = model.model.image_newline
    assert not any(torch.equal(column, newline) for column in embeds[0])


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize("size", SIZES + THIN, ids=str)
@pytest.mark.parametrize("budget", [{"retention_ratio": 1 / 9}, {"retention_ratio": 0.37}, {"num_visual_tokens": 11}])
def test_budget_is_exact_and_in_proportion(model, size, budget):
    sizes = tokens_per_view(size)
    total = budget.get("num_visual_tokens") or max(1, round(budget["retention_ratio"] * sum(sizes)))
    (selection,), embeds = run(model, [row(size)], **budget)
    views = selection.grid[selection.indices, 0].tolist()
    assert [views.count(view) for view in range(len(sizes))] == split_budget(total, sizes)
    assert len(views) == total and embeds.shape[1] == 5 + total


@pytest.mark.parametrize("number", [1, 2, 4])
def test_views_without_budget_are_left_out(model, number):
    size = (112, 112)
    (selection,), _ = run(model, [row(size)], num_visual_tokens=number)
    assert sorted(selection.grid[selection.indices, 0].tolist()) == list(range(number))  # ties: the lower view
    (expected,) = oracle().compress(row(size), num_visual_tokens=number).selections
    assert selection.indices.tolist() == expected.kept


@pytest.mark.parametrize("number", [960, 640, 320])
def test_published_setting_has_five_equal_pools(number):
    """A square picture in 2 x 2 tiles of 336 pixels: 5 views of 576 tokens, and 48 newlines, which are dropped."""
    config = FSRLlavaNextConfig(
        vision_config={**CLIP_VISION_CONFIG, "image_size": 336, "hidden_size": 16, "num_hidden_layers": 2},
        text_config={"model_type": "llama", **TEXT_CONFIG, "hidden_size": 16, "max_position_embeddings": 4096},
        image_token_index=199,
        image_grid_pinpoints=[[672, 672]],
        fsr_config={"num_visual_tokens": number, "focus_mass": "budget", "relevance": "none"},
    )
    model = initialize(FSRLlavaNextForConditionalGeneration(config))
    output = model.generate(
        input_ids=torch.tensor([[BOS] + [199] * (5 * 576 + 48) + [5]]),
        pixel_values=torch.randn(1, 5, 3, 336, 336, generator=torch.Generator().manual_seed(0)),
        image_sizes=torch.tensor([[500, 500]]),
        max_new_tokens=2,
        return_dict_in_generate=True,
        output_visual_selection=True,
    )
    (selection,) = output.visual_selections
    assert (selection.grid[:, 0] < 0).sum() == 48
    assert selection.grid[selection.indices, 0].bincount().tolist() == [number // 5] * 5
    assert output.past_key_values.get_seq_length() == 2 + number + 1
    # The pools have nothing to do with each other: each is what it is alone, and none of them is all Focus.
    focus = torch.stack([selection.is_focus[selection.grid[selection.indices, 0] == view] for view in range(5)]).sum(1)
    assert (focus < number // 5).all()
    for view in range(5):
        own = selection.priority[selection.grid[:, 0] == view]
        assert own.min() == 0 and own.max() == 1


def test_default_is_a_ninth():
    config = FSRLlavaNextConfig()
    fsr = config.fsr_config
    assert (fsr.retention_ratio, fsr.num_visual_tokens) == (1 / 9, None)
    assert (fsr.pool, fsr.positions) == ("view", "original")
    assert fsr.budget(2880) == 320
    assert FSRLlavaNextConfig(fsr_config={"num_visual_tokens": 640}).fsr_config.retention_ratio is None


# ---------------------------------------------------------------------- pictures within the budget


@pytest.mark.parametrize("pool", ["view", "item"])
def test_a_picture_within_the_budget_stays_bit_for_bit(model, settings, pool):
    """Beside pruned ones, in their row and in other rows; its newlines stay."""
    settings(pool=pool)
    sizes = [[(1500, 20), (100, 140)], [(30, 190), (20, 1500), (1500, 20)], [], [(1500, 20)]]
    rows = [row(*row_sizes) for row_sizes in sizes]
    selections, embeds = run(model, rows, num_visual_tokens=AREA)
    reference = oracle(pool)
    prompts = [reference.compress(parts, num_visual_tokens=AREA) for parts in rows]
    assert [s is None for prompt in prompts for s in prompt.selections] == [True, False, False, True, True, True]
    for prompt, got in zip(prompts, embeds):
        torch.testing.assert_close(got[-len(prompt.embeds) :], prompt.embeds, rtol=1e-4, atol=1e-5)
    images = [part for parts in rows for part in parts if not isinstance(part, int)]
    batch = FAMILY.collate(images)
    runs = model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output
    whole = embeds[3, -2 - len(runs[5]) : -2]
    assert len(runs[5]) == AREA + 3 * NEXT_SIDE and torch.equal(whole, runs[5])
    first = embeds.shape[1] - len(prompts[0].embeds) + 3
    assert torch.equal(embeds[0, first : first + len(runs[0])], runs[0])
    for selection, image in zip(selections, images):
        assert len(selection.indices) == AREA  # candidates only, pruned or not
        assert len(selection.grid) == image.length


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_positions(settings, positions):
    """Kept tokens and the words after them are where they were in the full prompt, and decoding goes on from there."""
    settings(positions=positions)
    model, reference = models("llava_next")
    rows = [row((100, 140), (20, 1500)), row((30, 190)), [BOS, 5, 6, 7]]
    family = replace(FAMILY, positions=lambda _, inputs: inputs["attention_mask"].cumsum(-1) - 1)
    answers = Oracle(family, model, reference)
    prompts = [answers.compress(parts) for parts in rows]
    last = len(prompts[0].ids if positions == "original" else prompts[0].embeds) - 1
    assert prompts[0].positions[0, -1] == last
    assert len(prompts[0].ids) > len(prompts[0].embeds)
    expected, _ = answers.decode(prompts, 6)
    inputs = FAMILY.inputs(rows)
    new = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, expected)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("budget", [12, 10**6], ids=["pruned", "whole"])
def test_gradient_of_the_newline(model, budget):
    """It learns where it is read: from pictures within their budget."""
    batch = FAMILY.inputs([row((100, 140))])
    model.zero_grad()
    model(**batch, labels=batch["input_ids"], num_visual_tokens=budget).loss.backward()
    gradient = model.model.image_newline.grad
    assert (gradient is not None and bool(gradient.any())) == (budget > 12)
    model.zero_grad()


def test_offloaded_newline(model):
    """No call of a module would load `image_newline`: all pruned, one whole beside pruned ones, none pruned."""
    accelerate = pytest.importorskip("accelerate")
    batch = FAMILY.inputs([row((100, 140), (20, 1500)), row((30, 190))])
    budgets = ({}, {"num_visual_tokens": AREA}, {"num_visual_tokens": 10**6}, {"fsr_enabled": False})
    expected = [model.generate(**batch, max_new_tokens=4, **budget) for budget in budgets]
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert offloaded.model.image_newline.device.type == "meta"
    for budget, tokens in zip(budgets, expected):
        assert torch.equal(offloaded.generate(**batch, max_new_tokens=4, **budget), tokens)
        assert offloaded.model.image_newline.device.type == "meta"


# ---------------------------------------------------------------------- other backbones, checkpoints


def test_mistral():
    text_config = {"model_type": "mistral", **TEXT_CONFIG, "sliding_window": None}
    model = FAMILY.build(text_config=text_config)
    reference = FAMILY.build_reference(model, text_config=text_config)
    assert type(model.model.language_model).__name__ == "MistralModel"
    rows = FAMILY.rows()
    inputs = FAMILY.inputs(rows)
    answers = Oracle(FAMILY, model, reference)
    expected, _ = answers.decode([answers.compress(parts) for parts in rows], 6)
    new = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(new, expected)


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is FSRLlavaNextForConditionalGeneration
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.image_grid_pinpoints == NEXT_PINPOINTS
    assert loaded.config.fsr_config.to_dict() == model.config.fsr_config.to_dict()
    batch = FAMILY.inputs(FAMILY.rows())
    assert torch.equal(loaded.generate(**batch, max_new_tokens=4), model.generate(**batch, max_new_tokens=4))
    changed = AutoModel.from_pretrained(tmp_path, image_grid_pinpoints=[[112, 112]])
    assert changed.config.image_grid_pinpoints == [[112, 112]]


# ---------------------------------------------------------------------- refused before any work


def without(name):
    return lambda batch: batch.pop(name)


def changed(**changes):
    """`name=function` of the old value."""
    return lambda batch: batch.update({name: change(batch[name]) for name, change in changes.items()})


REFUSED = {
    "no sizes": (without("image_sizes"), "image_sizes"),
    "no pixels": (without("pixel_values"), "pixel_values"),
    "a size too many": (changed(image_sizes=lambda sizes: torch.cat([sizes, sizes[:1]])), "image_sizes"),
    "a size too few": (changed(image_sizes=lambda sizes: sizes[:1]), "image_sizes"),
    "sizes of three": (changed(image_sizes=lambda sizes: sizes[:, [0, 1, 1]]), "height and width"),
    "one size for all": (changed(image_sizes=lambda sizes: sizes[0]), "height and width"),
    "a size of nothing": (changed(image_sizes=lambda sizes: sizes * 0), "height and width"),
    "an image too few": (changed(pixel_values=lambda pixels: pixels[:1]), "1 images"),
    "a view too few": (changed(pixel_values=lambda pixels: pixels[:, :4]), "4 views"),
    "a stack of too few views": (changed(pixel_values=lambda pixels: pixels.flatten(0, 1)[:7]), "7 views"),
    "pixels of one view": (changed(pixel_values=lambda pixels: pixels[0, 0]), "must have the shape"),
    "sizes in the wrong order": (changed(image_sizes=lambda sizes: sizes.flip(-1)), "do not match"),
    "a placeholder too few": (
        changed(input_ids=lambda ids: ids.where(ids.cumsum(-1) != BOS + 5 + 6 + 199, 7)),
        "match",
    ),
    "a list of layers": (lambda batch: batch.update(vision_feature_layer=[-2, -1]), "vision_feature_layer"),
    "no block": (lambda batch: batch.update(vision_feature_layer=0), "vision_feature_layer"),
    "a block too far": (lambda batch: batch.update(vision_feature_layer=5), "vision_feature_layer=5"),
    "a block before the first": (lambda batch: batch.update(vision_feature_layer=-7), "vision_feature_layer=-7"),
    "[CLS] among the tokens": (lambda batch: batch.update(vision_feature_select_strategy="full"), "full"),
    "nothing to keep": (lambda batch: batch.update(num_visual_tokens=0), "num_visual_tokens=0"),
    "a share of nothing": (lambda batch: batch.update(retention_ratio=0.0), "retention_ratio=0.0"),
    "two budgets": (lambda batch: batch.update(num_visual_tokens=9, retention_ratio=0.5), "both"),
}


@pytest.mark.parametrize("method", ["generate", "forward"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(model, name, method):
    change, message = REFUSED[name]
    if name == "no pixels" and method == "forward":
        pytest.skip("while decoding, a sampled placeholder is legal")
    batch = FAMILY.inputs([row((100, 140)), row((30, 190))])
    change(batch)
    calls = []
    hooks = [
        module.register_forward_pre_hook(lambda *args: calls.append(args))
        for module in (model.model.vision_tower, model.model.text_encoder.text_model, model.model.language_model)
    ]
    try:
        with pytest.raises(ValueError, match=message):
            getattr(model, method)(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    assert not calls


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16}}, "siglip_vision_model"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        ({"vision_feature_layer": 99}, "vision_feature_layer=99"),
        ({"vision_feature_layer": -7}, "vision_feature_layer=-7"),
        ({"vision_feature_select_strategy": "full"}, "full"),
    ],
)
def test_configs_that_cannot_be_pruned(change, message):
    with pytest.raises(ValueError, match=message):
        FSRLlavaNextForConditionalGeneration(FAMILY.build_config(**change))
