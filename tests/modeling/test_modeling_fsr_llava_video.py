"""LLaVA-Video: its layout, pools of frames, newlines, still pictures, original checkpoints, and what it refuses."""

import functools
import inspect
from dataclasses import replace

import frames
import pytest
import torch
from anyres import num_views
from families import (
    BOS,
    FAMILIES,
    IMAGE_TOKEN,
    LLAVA_VIDEO_PINPOINTS,
    SIGLIP_PIXELS,
    SIGLIP_SIDE,
    SIGLIP_VISION_CONFIG,
    TEXT_CONFIG,
    VIDEO_TOKEN,
    Item,
    llava_video_item,
    llava_video_layout,
    llava_video_picture,
    models,
)
from method_reference import reference as select
from oracle import Oracle
from original_llava_video import ORIGINAL_CONFIG, save_original
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from fsr_hf import FSRLlavaVideoConfig, FSRLlavaVideoForConditionalGeneration
from fsr_hf.hub.original import convert_original_config
from fsr_hf.modeling.guards import VERSION


FAMILY = FAMILIES["llava_video"]
SIDES = {"bilinear": 3, "average": 2}
# Height and width: pictures that are packed patch by patch, and some whose tokens are interpolated.
PLAIN, LARGE = [(40, 65), (30, 30), (20, 100), (100, 20)], [(90, 100), (100, 90), (64, 70)]


@functools.cache
def built(mode):
    """Model and reference with one way to pool frames."""
    model = FAMILY.build(spatial_pool_mode=mode)
    return model, FAMILY.build_reference(model)


@pytest.fixture
def model():
    return models("llava_video")[0]


@pytest.fixture
def settings(monkeypatch):
    """Sets fields of a model's `fsr_config` for one test."""
    return lambda model, **fields: [monkeypatch.setattr(model.config.fsr_config, *field) for field in fields.items()]


@pytest.fixture
def no_stock_videos(monkeypatch):
    """Nothing may embed a video in the stock layout."""

    def fail(*args, **kwargs):
        raise AssertionError("the stock layout of a video was asked for")

    monkeypatch.setattr(LlavaOnevisionModel, "get_video_features", fail)


def oracle(mode="bilinear", pool="item"):
    layout = functools.partial(llava_video_layout, pool=pool, mode=mode)
    return Oracle(replace(FAMILY, layout=layout), *built(mode))


def video(num_frames, seed=0, mode="bilinear"):
    return llava_video_item(num_frames, torch.Generator().manual_seed(seed), SIDES[mode])


def picture(size, seed=0):
    return llava_video_picture(size, torch.Generator().manual_seed(seed))


def rows_of(mode):
    """Videos of different lengths, several in a row, pictures before and after them, and a row of text."""
    return [
        [BOS, 5, 6, video(3, 1, mode), 7, 10, 11],
        [BOS, picture((40, 65), 2), 7, video(2, 3, mode), 8, video(4, 4, mode), 9, picture((90, 100), 5), 12],
        [BOS, 20, 21, 22, 23],
        [BOS, video(1, 6, mode), picture((30, 30), 7), 30],
    ]


def run(model, rows, **kwargs):
    """Selections, and what the language model got in its first call."""
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
    return output.visual_selections, calls[0]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- layout


@pytest.mark.parametrize("mode", SIDES)
@pytest.mark.parametrize("num_frames", [1, 3])
def test_video_features_are_those_of_the_layout(mode, num_frames):
    model, reference = built(mode)
    pixels = torch.cat([video(num_frames, seed).inputs["pixel_values_videos"] for seed in (1, 2)])
    features = model.get_video_features(pixels).pooler_output
    length = num_frames * SIDES[mode] * (SIDES[mode] + 1)
    assert features.shape == (2 * length, 1, TEXT_CONFIG["hidden_size"])  # one video after the other, a token a row
    for clip, run in zip(pixels, features[:, 0].split(length)):
        expected, places = frames.frame_tokens(reference.model, clip, mode)
        close(run, expected)
        newlines = [number for number, place in enumerate(places) if place is None]
        assert torch.equal(run[newlines], model.model.image_newline.expand(len(newlines), -1))


@torch.no_grad()
def test_get_video_features_takes_what_the_stock_method_takes(model):
    """Its arguments by place, `output_hidden_states`, `return_dict`; and the numbers of frames after them."""
    stock = list(inspect.signature(LlavaOnevisionModel.get_video_features).parameters)
    ours = list(inspect.signature(type(model.model).get_video_features).parameters)
    assert ours == [*stock[:-1], "video_num_frames", stock[-1]]
    pixels = FAMILY.inputs([[BOS, video(2, 1), video(3, 2)]])["pixel_values_videos"]
    assert pixels.isnan().any()
    numbers = torch.tensor([2, 3])
    expected = model.get_video_features(pixels, video_num_frames=numbers).pooler_output
    assert len(expected) == 5 * 12 and expected.isfinite().all()
    inner = model.model.get_video_features
    for method in (inner, model.get_video_features):
        for kwargs in ({"output_hidden_states": False}, {"output_hidden_states": True}, {"return_dict": True}):
            assert torch.equal(method(pixels, video_num_frames=numbers, **kwargs).pooler_output, expected)
        outputs = method(pixels, video_num_frames=numbers, return_dict=False)
        assert torch.equal(next(part for part in outputs if len(part) == 60), expected)
    assert torch.equal(inner(pixels, None, None, numbers).pooler_output, expected)
    assert torch.equal(inner(pixels, -1, "full", numbers.tolist()).pooler_output, expected)
    assert not torch.allclose(inner(pixels, -2, "full", numbers).pooler_output, expected)


@pytest.mark.parametrize("mode, tokens", [("bilinear", 14 * 15), ("average", 13 * 14)])
def test_tokens_of_a_full_size_frame(mode, tokens):
    config = FSRLlavaVideoConfig(spatial_pool_mode=mode)
    with torch.device("meta"):
        model = FSRLlavaVideoForConditionalGeneration(config)
    pixels = torch.empty(1, 32, 3, 384, 384, device="meta")
    features = model.get_video_features(pixels).pooler_output
    assert features.shape == (32 * tokens, 1, config.text_config.hidden_size)
    (item,) = model.model.build_items(pixel_values_videos=pixels)
    assert item.length == 32 * tokens
    assert item.num_candidates == 32 * {"bilinear": 196, "average": 169}[mode]
    assert config.fsr_config.budget(item.num_candidates) == {"bilinear": 1254, "average": 1082}[mode]


@pytest.mark.parametrize("unpruned", [{"fsr_enabled": False}, {"num_visual_tokens": 10**6}, {"retention_ratio": 1}])
@pytest.mark.parametrize("mode", SIDES)
def test_unpruned_is_the_layout_token_for_token(mode, unpruned, no_stock_videos):
    """Before the language model, in `generate` and in `forward`."""
    model, _ = built(mode)
    rows = rows_of(mode)
    inputs = FAMILY.inputs(rows)
    prompts = [oracle(mode).compress(row, fsr_enabled=False) for row in rows]
    expected, logits = oracle(mode).decode(prompts, 6)
    sequences = model.generate(**inputs, **unpruned, max_new_tokens=6, do_sample=False)
    assert torch.equal(sequences[:, inputs["input_ids"].shape[1] :], expected)
    close(model(**inputs, **unpruned).logits[:, -1], logits[:, 0])
    calls = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, inputs: calls.append(inputs), with_kwargs=True
    )
    model.generate(**inputs, **unpruned, max_new_tokens=1)
    hook.remove()
    for prompt, embeds, mask in zip(prompts, calls[0]["inputs_embeds"], inputs["attention_mask"]):
        assert len(prompt.embeds) == mask.sum()
        close(embeds[-len(prompt.embeds) :], prompt.embeds)


def test_disabled_by_the_config(settings, no_stock_videos):
    model, _ = built("bilinear")
    settings(model, enabled=False)
    inputs = FAMILY.inputs(rows_of("bilinear"))
    prompts = [oracle().compress(row) for row in rows_of("bilinear")]
    assert all(selection is None for prompt in prompts for selection in prompt.selections)
    sequences = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=2)
    expected = [oracle().beam_search(prompt, 5, 2)[0][0] for prompt in prompts]
    assert torch.equal(sequences[:, inputs["input_ids"].shape[1] :], torch.stack(expected))
    # The loss is the stock one: it is for the caller to mask the labels of placeholders.
    mask = inputs["attention_mask"]
    labels = inputs["input_ids"].masked_fill(mask.cumsum(-1) < 2, -100)  # padding says nothing about a first token
    scores = torch.cat([oracle().logits(prompt)[:-1] for prompt in prompts])
    targets = torch.cat([torch.tensor(prompt.ids[1:]) for prompt in prompts])
    close(model(**inputs, labels=labels).loss, torch.nn.functional.cross_entropy(scores, targets))


def test_pictures_alone_run_the_stock_class_unpruned():
    model, _ = built("bilinear")
    stock = FAMILY.build_reference(model, attn_implementation="sdpa")
    inputs = FAMILY.inputs([[BOS, picture((40, 65)), 5, 6], [BOS, 7, picture((90, 100), 1), 8]])
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output, expected = model.generate(**inputs, fsr_enabled=False, **options), stock.generate(**inputs, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(map(torch.equal, output.logits, expected.logits))


def test_tower_sees_frames_once_and_no_padding(model):
    batch = FAMILY.inputs(rows_of("bilinear"))
    assert batch["pixel_values_videos"].isnan().any() and batch["pixel_values"].isnan().any()
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model.generate(**batch, max_new_tokens=2)
    finally:
        hook.remove()
    views = [num_views(size, LLAVA_VIDEO_PINPOINTS, SIGLIP_PIXELS) for size in ((40, 65), (90, 100), (30, 30))]
    assert sorted(map(len, seen)) == sorted([3 + 2 + 4 + 1, sum(views)])
    assert all(pixels.isfinite().all() for pixels in seen)


# ---------------------------------------------------------------------- selection


@pytest.mark.parametrize("pool", ["item", "view"])
@pytest.mark.parametrize("mode", SIDES)
def test_selection_is_that_of_a_loop_over_the_pools(settings, mode, pool):
    model, _ = built(mode)
    settings(model, pool=pool)
    rows = rows_of(mode)
    prompts = [oracle(mode, pool).compress(row, num_visual_tokens=4) for row in rows]
    selections, call = run(model, rows, num_visual_tokens=4)
    expected = [selection for prompt in prompts for selection in prompt.selections]
    assert len(selections) == len(expected) == 7
    items = [part for row in rows for part in row if isinstance(part, Item)]
    for selection, right, item in zip(selections, expected, items):
        assert selection.modality == item.modality
        if right is None:  # a frame of 2 x 2 tokens is within its budget
            assert (mode, item.length) == ("average", 6)
            continue
        assert len(selection.indices) == 4
        assert selection.indices.tolist() == right.kept
        assert {i for i, focus in zip(right.kept, selection.is_focus) if focus} == right.focus
        assert {i: int(j) for i, j in enumerate(selection.merged_into) if j >= 0} == right.merged_into
        close(selection.features, torch.stack([right.features[i] for i in right.kept]))
    for prompt, embeds, mask in zip(prompts, call["inputs_embeds"], call["attention_mask"]):
        assert mask.sum() == len(prompt.embeds)
        close(embeds[-len(prompt.embeds) :], prompt.embeds)


@pytest.mark.parametrize("budget", [{}, {"retention_ratio": 0.2}, {"num_visual_tokens": 35}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
    ],
    ids=str,
)
def test_several_videos_of_a_row(options, budget):
    """
    The stock class takes the tokens of all videos as one tensor, and splits it by rows, for beams, and by chunks of
    the prompt. A budget of 35 leaves some of the videos whole.
    """
    if "prefill_chunk_size" in options and VERSION < (5, 23):
        pytest.skip("transformers splits visual tokens wrongly between chunks")
    model, _ = built("bilinear")
    rows = [
        [BOS, video(3, 1), 7, video(2, 2), 8, picture((40, 65), 3), 9, video(4, 4), 10, 11, 12, 13, 10, 11],
        [BOS, 5, video(2, 5), video(4, 6), 10, 11, 12, 10, 11],
    ]
    rows = rows[:1] if "prompt_lookup_num_tokens" in options else rows  # candidates take one row
    prompts = [oracle().compress(row, **budget) for row in rows]
    if budget.get("num_visual_tokens") == 35:
        assert {selection is None for prompt in prompts for selection in prompt.selections} == {True, False}
    if "num_beams" in options:
        expected = torch.stack([oracle().beam_search(prompt, 8, 2)[0][0] for prompt in prompts])
    else:
        expected = oracle().decode(prompts, 8)[0]
    if "num_return_sequences" in options:
        options, expected = {**options, "num_beams": 2}, [oracle().beam_search(p, 8, 2)[0] for p in prompts]
        expected = torch.cat(expected)
    inputs = FAMILY.inputs(rows)
    sequences = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options, **budget)
    assert torch.equal(sequences[:, inputs["input_ids"].shape[1] :], expected)


def test_newlines_of_a_pruned_video_are_dropped():
    """One embedding for each word and each kept token, in order, and none of them is the newline."""
    model, _ = built("bilinear")
    (selection,), call = run(model, [[BOS, video(4), 5]], num_visual_tokens=11)
    embeds, newline = call["inputs_embeds"][0], model.model.image_newline
    assert len(embeds) == 2 + 11 and (selection.grid[selection.indices, 2] >= 0).all()
    assert torch.equal(embeds[1:-1], selection.features)
    assert not any(torch.equal(column, newline) for column in embeds)


def test_every_frame_gets_a_share(settings):
    model, _ = built("bilinear")
    settings(model, pool="view")
    for budget, expected in ((6, [2, 2, 2]), (8, [3, 3, 2]), (2, [1, 1, 0])):
        (selection,), _ = run(model, [[BOS, video(3), 5]], num_visual_tokens=budget)
        assert selection.grid[selection.indices, 0].bincount(minlength=3).tolist() == expected


@pytest.mark.parametrize("mode", SIDES)
def test_grid_of_a_video(mode):
    model, reference = built(mode)
    (selection,), _ = run(model, [[BOS, video(3, mode=mode), 5]], num_visual_tokens=5)
    _, places = frames.frame_tokens(reference.model, video(3, mode=mode).inputs["pixel_values_videos"][0], mode)
    lines = [(frame, row) for frame in range(3) for row in range(SIDES[mode])]
    newlines = iter([(*line, -1) for line in lines])
    assert selection.grid.tolist() == [list(place or next(newlines)) for place in places]
    assert (selection.modality, selection.row) == ("video", 0)


@pytest.mark.parametrize("pool", ["item", "view"])
@pytest.mark.parametrize("size", PLAIN + LARGE, ids=str)
def test_pictures(settings, size, pool):
    """Tokens of a large picture lie between patches, so all of them are one pool."""
    model, _ = built("bilinear")
    settings(model, pool=pool)
    item = picture(size)
    (selection,), _ = run(model, [[BOS, item, 5]], num_visual_tokens=11)
    layout = llava_video_layout(built("bilinear")[1], item, None, None, pool=pool)
    (right,) = oracle(pool=pool).compress([BOS, item, 5], num_visual_tokens=11).selections
    assert selection.indices.tolist() == right.kept and len(right.kept) == 11
    assert (len(layout.pools) == 1) == (pool == "item" or size in LARGE)
    views = selection.grid[:, 0]
    assert (selection.grid[views < 0] == -1).all()
    assert [int(number) for number in (views < 0).nonzero()] == [*layout.newlines]
    if size in PLAIN:
        for pool_of in llava_video_layout(built("bilinear")[1], item, None, None, pool="view").pools:
            assert len(set(views[pool_of.numbers].tolist())) == 1
    assert views.max() < item.inputs["pixel_values"].shape[1]
    assert (selection.grid[views >= 0, 1:] < SIGLIP_SIDE).all() and (selection.grid[views >= 0] >= 0).all()


def test_nearest_patch_of_an_interpolated_token(model):
    """Rows and columns of patches that run through the tiles are visited in order, from the first to the last."""
    (selection,), _ = run(model, [[BOS, picture((90, 100)), 5]], num_visual_tokens=5)
    grid = selection.grid[SIGLIP_SIDE**2 :]
    grid = grid[grid[:, 0] > 0]
    side = round(len(grid) ** 0.5)
    rows = (grid[:, 0] - 1) // 2 * SIGLIP_SIDE + grid[:, 1]
    columns = (grid[:, 0] - 1) % 2 * SIGLIP_SIDE + grid[:, 2]
    columns, rows = columns.view(-1, side), rows.view(-1, side)
    assert (rows == rows[:, :1]).all() and (columns == columns[:1]).all()
    assert (columns[0].diff() > 0).all() and (rows[:, 0].diff() > 0).all()
    assert columns[0, 0] == 0 and columns[0, -1] == 2 * SIGLIP_SIDE - 1


def test_several_pictures_of_a_row_have_no_tiles():
    """The stock class shows them one view each, with one newline at the end."""
    model, reference = built("bilinear")
    area = SIGLIP_SIDE**2
    pixels = torch.randn(3, 5, 3, SIGLIP_PIXELS, SIGLIP_PIXELS, generator=torch.Generator().manual_seed(3))
    pixels[1:, 1:] = torch.nan
    sizes, numbers = torch.tensor([[40, 65], [40, 65], [90, 100]]), torch.tensor([1, 2])
    visual = {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": numbers}
    runs = reference.get_image_features(pixels, sizes, batch_num_images=numbers).pooler_output
    assert [len(run) for run in runs[1:]] == [area + 1] * 2
    row, other = ([BOS] + [IMAGE_TOKEN] * len(runs[0]) + [5] * 40), [BOS, 6]
    other += [IMAGE_TOKEN] * (area + 1) + [7] + [IMAGE_TOKEN] * (area + 1)
    length = max(len(row), len(other))
    ids = torch.tensor([[0] * (length - len(ids)) + ids for ids in (row, other)])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), **visual}
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_visual_selection": True}
    selections = model.generate(**inputs, num_visual_tokens=6, **options).visual_selections
    assert [len(selection.grid) for selection in selections] == [len(run) for run in runs]
    assert selections[1].grid[-1].tolist() == [-1, -1, -1]
    scores = frames.received_attention(reference.model.vision_tower, pixels[1:, 0])
    for selection, run, score in zip(selections[1:], runs[1:], scores):
        settings_of = {"alpha": 3, "beta": 1, "rho": 0.2, "kappa": 1, "focus_mass": "all"}
        kept, *_ = select(run[:-1].double().tolist(), score.double().tolist(), None, 6, **settings_of)
        assert selection.indices.tolist() == kept
    visual = {"pixel_values": pixels[1:], "image_sizes": sizes[1:], "batch_num_images": numbers[1:]}
    out = model(torch.tensor([other]), **visual, num_visual_tokens=6, output_hidden_states=True)
    assert out.hidden_states[0].shape[1] == 3 + 2 * 6


@pytest.mark.parametrize("layer", [-2, 1, -1, 3])
def test_saliency_is_of_the_block_whose_output_is_used(layer):
    model, reference = built("bilinear")
    item = video(2)
    layer_of = layer if layer < 0 else layer - 1 - SIGLIP_VISION_CONFIG["num_hidden_layers"]
    scores = frames.received_attention(reference.model.vision_tower, item.inputs["pixel_values_videos"][0], layer_of)
    maps = torch.cat([frames.pool(view.view(5, 5, 1), "bilinear").flatten() for view in scores])
    (selection,), _ = run(model, [[BOS, item, 5]], num_visual_tokens=5, vision_feature_layer=layer)
    priority = selection.priority[selection.grid[:, 2] >= 0]
    close(priority, (maps - maps.min()) / (maps.max() - maps.min()))


def test_attention_stays_in_its_frame(model):
    """Another frame changes neither the features nor the saliency of a frame."""
    first, second = video(2, seed=1), video(2, seed=2)
    pixels = first.inputs["pixel_values_videos"].clone()
    pixels[:, 1] = second.inputs["pixel_values_videos"][:, 1]
    inner, ids = model.model, torch.tensor([[VIDEO_TOKEN] * 24])
    one, other = (
        inner.encode_items(inner.place_items(ids, inner.build_items(**visual)), None, **visual)[0]
        for visual in ({"pixel_values_videos": first.inputs["pixel_values_videos"]}, {"pixel_values_videos": pixels})
    )
    assert one.saliency.shape == (24,) and [len(run) for run in one.features] == [24]
    close(one.saliency[:12], other.saliency[:12])
    close(one.features[0][:12], other.features[0][:12])
    assert not torch.allclose(one.saliency[12:], other.saliency[12:])
    assert not torch.allclose(one.features[0][12:], other.features[0][12:])


@pytest.mark.parametrize("num_frames, kept", [(32, 1254), (64, 2509)])
def test_videos_of_the_published_size(num_frames, kept):
    """27 x 27 patches a frame, a fifth of the tokens; nothing but the widths is small."""
    vision_config = {**SIGLIP_VISION_CONFIG, "image_size": 27, "patch_size": 1}
    text_config = {**FAMILY.config["text_config"], "max_position_embeddings": 32768}
    fsr_config = {"num_visual_tokens": None, "retention_ratio": 0.2}
    model = FAMILY.build(vision_config=vision_config, text_config=text_config, fsr_config=fsr_config)
    pixels = torch.randn(1, num_frames, 3, 27, 27, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[BOS, *[VIDEO_TOKEN] * (num_frames * 14 * 15), 5, 6]])
    output = model.generate(
        input_ids=ids,
        pixel_values_videos=pixels,
        max_new_tokens=2,
        return_dict_in_generate=True,
        output_visual_selection=True,
    )
    (selection,) = output.visual_selections
    assert len(selection.indices) == len(selection.indices.unique()) == kept
    assert output.past_key_values.get_seq_length() == 3 + kept + 1
    assert (selection.grid[selection.indices, 2] >= 0).all()


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pixel_values_videos": (2, 3, 35, 35)}, r"videos, frames, channels, 35, 35.*\(2, 3, 35, 35\)"),
        ({"pixel_values_videos": (1, 2, 3, 35, 28)}, r"35, 35.*\(1, 2, 3, 35, 28\)"),
        ({"pixel_values_videos": (1, 0, 3, 35, 35)}, "`video_num_frames` is .0.*at least 1 frame"),
        ({"video_num_frames": torch.tensor([0])}, "`video_num_frames` is .0.*at least 1 frame"),
        ({"video_num_frames": torch.tensor([3])}, "`video_num_frames` is .3.*up to 2 frames"),
        ({"video_num_frames": torch.tensor([1, 1])}, "`video_num_frames` is .1, 1.*1 videos"),
        ({"video_num_frames": torch.tensor([1])}, "24 placeholders .id 198.*need 12"),
        ({"num_visual_tokens": 0}, "`num_visual_tokens=0`.*>= 1"),
        ({"retention_ratio": 0.0}, "`retention_ratio=0.0`"),
        ({"vision_feature_layer": [-1, -2]}, r"`vision_feature_layer=\[-1, -2\]`.*one int"),
        ({"vision_feature_layer": 0}, "`vision_feature_layer=0`"),
        ({"vision_feature_layer": 99}, "`vision_feature_layer=99`.*1 to 3 or -3 to -1"),
        ({"vision_feature_layer": -7}, "`vision_feature_layer=-7`"),
        ({"vision_feature_select_strategy": "default"}, '"default"` is not supported'),
        ({"pixel_values": (1, 3, 3, 35, 35)}, "`pixel_values` need `image_sizes`"),
        (
            {"pixel_values": (1, 5, 3, 35, 35), "image_sizes": torch.tensor([[40, 65]])},
            "Image features.*0 placeholders",
        ),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit(model, change, message):
    inputs = FAMILY.inputs([[BOS, video(2), 5]])
    del inputs["video_num_frames"]
    inputs |= {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in change.items()}
    for call in (model.generate, model):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


def test_batch_num_images_that_does_not_add_up(model):
    inputs = FAMILY.inputs([[BOS, picture((40, 65)), 5]])
    with pytest.raises(ValueError, match=r"`batch_num_images` \[2\] adds up to 2 images.*has 1"):
        model.generate(**inputs, batch_num_images=torch.tensor([2]))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vision_config": {"model_type": "clip_vision_model"}}, '"clip_vision_model"` is not supported.*SigLIP'),
        ({"vision_feature_layer": [-1, -2]}, r"`vision_feature_layer=\[-1, -2\]`"),
        ({"vision_feature_layer": -9}, "`vision_feature_layer=-9`"),
        ({"vision_feature_layer": 99}, "`vision_feature_layer=99`.*1 to 3 or -3 to -1"),
        ({"vision_feature_select_strategy": "default"}, '"default"` is not supported'),
        ({"spatial_pool_mode": "max"}, '`spatial_pool_mode=.max.`.*"bilinear" or "average"'),
        ({"fsr_config": {"relevance": "clip"}}, "saliency alone"),
        ({"fsr_config": {"text_encoder_config": {}}}, "saliency alone"),
        ({"fsr_config": {"num_visual_tokens": 0}}, "`num_visual_tokens=0`"),
    ],
    ids=str,
)
def test_configs_that_are_not_supported(fields, message):
    with pytest.raises(ValueError, match=message):
        FSRLlavaVideoForConditionalGeneration(FSRLlavaVideoConfig(**{**FAMILY.config, **fields}))


# ---------------------------------------------------------------------- checkpoints


def test_original_checkpoint(tmp_path):
    model, _ = built("average")
    save_original(tmp_path, model)
    ids = {"image_token_index": IMAGE_TOKEN, "video_token_index": VIDEO_TOKEN}
    config = FSRLlavaVideoConfig.from_dict(convert_original_config(ORIGINAL_CONFIG), **ids)
    loaded, info = FSRLlavaVideoForConditionalGeneration.from_pretrained(
        tmp_path, config=config, dtype="auto", output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = model.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    config = loaded.config
    assert (config.spatial_pool_mode, config.vision_aspect_ratio) == ("average", "anyres_max_2")
    assert config.image_grid_pinpoints == [[35 * row, 35 * column] for row in (1, 2) for column in (1, 2, 3)]
    assert config.text_config.rope_parameters["rope_theta"] == 500000.0
    assert (config.text_config.num_key_value_heads, config.text_config.model_type) == (2, "qwen2")
    assert (config.model_type, config.fsr_config.retention_ratio) == ("fsr_llava_video", 0.2)
    assert loaded.dtype == torch.float32

    # What is saved has the names of the stock class, and loads there and here.
    loaded.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert not any("mm_projector" in name or "vision_tower.vision_tower" in name for name in names)
    for cls in (FSRLlavaVideoForConditionalGeneration, LlavaOnevisionForConditionalGeneration):
        again, info = cls.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items())
    config = FSRLlavaVideoConfig.from_pretrained(tmp_path / "saved")
    assert config.to_diff_dict() == loaded.config.to_diff_dict()


def test_an_original_config_is_refused_outside_of_an_export(tmp_path):
    save_original(tmp_path, built("bilinear")[0])
    for cls in (FSRLlavaVideoConfig, FSRLlavaVideoForConditionalGeneration):
        with pytest.raises(ValueError, match=r"layout of LLaVA-Video's own code.*fsr-hf export"):
            cls.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("mm_newline_position", "one_token", "`mm_newline_position='one_token'`.*'grid'"),
        ("add_faster_video", True, "`add_faster_video=True`"),
        ("mm_spatial_pool_stride", 4, "`mm_spatial_pool_stride=4`"),
        ("mm_spatial_pool_mode", "max", "`spatial_pool_mode='max'`"),
        ("image_aspect_ratio", "pad", "`image_aspect_ratio='pad'`"),
        ("vision_config", None, "`mm_vision_tower='siglip-of-the-tests'`.*google/siglip-so400m-patch14-384"),
    ],
)
def test_original_configs_that_are_not_supported(field, value, message):
    with pytest.raises(ValueError, match=message):
        FSRLlavaVideoConfig.from_dict(convert_original_config({**ORIGINAL_CONFIG, field: value}))


def test_config_of_the_published_checkpoint():
    published = {name: value for name, value in ORIGINAL_CONFIG.items() if name not in ("vision_config", "image_size")}
    published |= {
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[384 * row, 384 * column] for row in range(1, 7) for column in range(1, 7)],
        "mm_spatial_pool_mode": "bilinear",
        "image_token_index": 151647,
        "hidden_size": 3584,
        "vocab_size": 152064,
    }
    config = FSRLlavaVideoConfig.from_dict(convert_original_config(published))
    default = FSRLlavaVideoConfig()
    assert config.vision_config.to_dict() == default.vision_config.to_dict()
    assert config.image_grid_pinpoints == default.image_grid_pinpoints
    assert (config.image_token_id, config.video_token_id) == (151646, 151647)
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (3584, 152064)


@pytest.mark.parametrize("old", [True, False])
def test_stock_checkpoint(tmp_path, old):
    """With the names of the stock class, and with those that it wrote before transformers 4.52."""
    _, reference = built("bilinear")
    if old:
        reference.save_pretrained(tmp_path)
        names = load_file(tmp_path / "model.safetensors").keys()
        assert {name.partition(".")[0] for name in names} >= {"language_model", "vision_tower", "image_newline"}
    else:
        reference.config.save_pretrained(tmp_path)
        save_file(reference.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = FSRLlavaVideoForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = reference.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    assert loaded.config.image_grid_pinpoints == LLAVA_VIDEO_PINPOINTS
