"""Qwen3-VL: attention received, features of every depth, timestamps of videos, positions, refusals."""

import copy

import numpy as np
import pytest
import torch
from families import (
    BOS,
    FAMILIES,
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    Item,
    initialize,
    models,
    qwen3_item,
    qwen3_layout,
)
from oracle import Oracle
from received import attention_maps, received_attention
from tiny_qwen import save_checkpoint
from transformers import AutoModel, AutoProcessor, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from fsr_hf import FSRQwen3VLConfig, FSRQwen3VLForConditionalGeneration, select_visual_tokens
from fsr_hf.modeling.fsr import refine_like
from fsr_hf.modeling.guards import VERSION


FAMILY = FAMILIES["qwen3_vl"]
MERGE = 2  # patches of a token, along an edge
GRIDS = [(1, 8, 12), (1, 14, 2), (1, 2, 2), (3, 6, 10), (2, 4, 6)]
DEPTHS = 2


@pytest.fixture
def model():
    return models("qwen3_vl")[0]


@pytest.fixture
def reference():
    """The stock model with the same weights and eager attention."""
    return models("qwen3_vl")[1]


@pytest.fixture
def settings(model, monkeypatch):
    """Sets fields of the shared model's `fsr_config` for one test."""
    return lambda **fields: [monkeypatch.setattr(model.config.fsr_config, *field) for field in fields.items()]


def item(grid, seed=0, modality="image"):
    return qwen3_item(grid, torch.Generator().manual_seed(seed), modality)


def video(grid, seed=0):
    return item(grid, seed, "video")


def pixels_of(*grids, seed=0):
    grid = torch.tensor(grids)
    pixels = torch.randn(int(grid.prod(-1).sum()), 96, generator=torch.Generator().manual_seed(seed))
    return pixels, grid


def mixed_rows():
    """Images and videos of several sizes in one row and in one batch, in every order, and a row without any."""
    return [
        [BOS, 5, item((1, 6, 10), 1), 7, video((3, 6, 6), 2), 8, item((1, 4, 4), 3), 9, 10],
        [BOS, video((2, 4, 8), 4), 6, item((1, 8, 8), 5), item((1, 10, 4), 6), 7, video((2, 6, 6), 7), 11],
        [BOS, 20, 21, 22],
        [BOS, item((1, 2, 2), 8), 30, video((4, 4, 6), 9), 31, 32],
    ]


def decode(model, rows, num_new=8, **options):
    """Greedy tokens after the prompt."""
    inputs = FAMILY.inputs(rows)
    tokens = model.generate(**inputs, max_new_tokens=num_new, **{"do_sample": False, **options})
    return tokens[:, inputs["input_ids"].shape[1] :]


def select(model, rows, **options):
    return model.generate(
        **FAMILY.inputs(rows),
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_visual_selection=True,
        **options,
    ).visual_selections


def oracle():
    return Oracle(FAMILY, *models("qwen3_vl"))


def oracle_tokens(rows, num_new=8, **options):
    return oracle().decode([oracle().compress(row, **options) for row in rows], num_new)[0]


def seen_by_the_language_model(model, call):
    """The keyword arguments of its first call."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs), with_kwargs=True
    )
    try:
        call()
    finally:
        hook.remove()
    return seen[0]


# --- Saliency ---


def saliency_of(model, pixels, grid, modality="image"):
    with torch.no_grad():
        names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
        return torch.cat(model.model.encode(modality, **dict(zip(names[modality], (pixels, grid))))[2])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("grids", [GRIDS[:1], GRIDS[3:4], GRIDS], ids=["image", "video", "several"])
def test_saliency_is_the_attention_received_in_the_last_block(model, reference, grids, attention):
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    pixels, grid = pixels_of(*grids)
    saliency = saliency_of(model, pixels, grid, "video" if len(grids) == 1 and grids[0][0] > 1 else "image")
    expected = received_attention(reference.model.visual, pixels, grid)
    torch.testing.assert_close(saliency, expected, rtol=1e-4, atol=1e-7)
    assert expected.std() > 0.1 * expected.mean()
    # Each image or frame hands out 1 for each of its queries.
    areas = [h * w // MERGE**2 for t, h, w in grids for _ in range(t)]
    for part in saliency.split(areas):
        torch.testing.assert_close(part.sum() * MERGE**2, torch.tensor(1.0))
    # What the test can tell apart: another block, and attention across frames.
    before = received_attention(reference.model.visual, pixels, grid, block=-2)
    assert (before - expected).abs().max() > 100 * (saliency - expected).abs().max()
    assert [maps.shape[-1] for maps in attention_maps(reference.model.visual, pixels, grid)] == [4 * n for n in areas]


def test_the_input_of_the_last_block_is_what_it_reads(model, monkeypatch):
    """Which of the recorded hidden states that is depends on the version of transformers."""
    pixels, grid = pixels_of((1, 6, 10), (1, 4, 4))
    seen, scored = [], []
    score = model.model.saliency
    monkeypatch.setattr(model.model, "saliency", lambda states, grid: scored.append(states) or score(states, grid))
    hook = model.model.visual.blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        saliency_of(model, pixels, grid)
    finally:
        hook.remove()
    assert torch.equal(*seen, *scored)
    with torch.no_grad():
        outputs = model.get_image_features(pixels, grid, output_hidden_states=[2, 3], return_dict=True)
    assert sum(states is not None for states in outputs.hidden_states) == 2  # no more are kept


# --- Features of every depth ---


def depths_by_hand(rows, **options):
    """For each depth, what is added to the visual tokens of the batch in the order of the prompt: `(tokens, 48)`."""
    prompts = [oracle().compress(row, **options) for row in rows]
    return torch.cat([prompt.deepstack for prompt in prompts if prompt.deepstack is not None]).unbind(1), prompts


@pytest.mark.parametrize("budget", [{"num_visual_tokens": 5}, {"retention_ratio": 0.5}], ids=str)
def test_every_depth_is_pruned_and_merged_and_in_order(model, budget):
    """Images and videos in one prompt, some of them within their budget."""
    rows = mixed_rows()
    expected, prompts = depths_by_hand(rows, **budget)
    for call in (lambda: decode(model, rows, num_new=1, **budget), lambda: model(**FAMILY.inputs(rows), **budget)):
        with torch.no_grad():
            seen = seen_by_the_language_model(model, call)
        width = max(len(prompt.visual) for prompt in prompts)
        visual = [[False] * (width - len(prompt.visual)) + prompt.visual for prompt in prompts]
        assert seen["visual_pos_masks"].tolist() == visual
        assert len(seen["deepstack_visual_embeds"]) == len(expected) == DEPTHS
        for actual, rows_of_depth in zip(seen["deepstack_visual_embeds"], expected):
            torch.testing.assert_close(actual, rows_of_depth, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_depths_out_of_order_would_be_seen(model, monkeypatch):
    """What the test above and the common suite can tell apart."""
    rows, make = mixed_rows(), model.model.make_output
    expected = oracle_tokens(rows)
    assert torch.equal(decode(model, rows), expected)

    def swapped(features, output):
        made = make(features, output)
        made.deepstack_features = made.deepstack_features[::-1]
        return made

    def unpruned(features, output):
        made = make(features, output)
        made.deepstack_features[1] = output.deepstack_features[1]
        return made

    monkeypatch.setattr(model.model, "make_output", swapped)
    assert not torch.equal(decode(model, rows), expected)
    monkeypatch.setattr(model.model, "make_output", unpruned)
    with pytest.raises((RuntimeError, IndexError)):
        decode(model, rows)


def test_anchors_are_merged_at_every_depth(model, settings):
    """Without Refine the kept tokens have their own rows; with it, the anchors that absorb have others."""
    rows = [[BOS, item((1, 12, 12), 3), 7]]
    layout = qwen3_layout(models("qwen3_vl")[1], rows[0][1], None, None)
    (selection,) = select(model, rows, num_visual_tokens=12)
    absorbs = torch.isin(selection.indices, selection.merged_into)
    assert 2 < absorbs.sum() < len(absorbs) and not (absorbs & selection.is_focus).any()
    for kappa in (1.0, 0.0):
        settings(kappa=kappa)
        seen = seen_by_the_language_model(model, lambda: decode(model, rows, num_new=1, num_visual_tokens=12))
        for level, own in zip(seen["deepstack_visual_embeds"], layout.deepstack, strict=True):
            is_own = torch.isclose(level, own[selection.indices], rtol=1e-4, atol=1e-6).all(-1)
            assert is_own.tolist() == (~absorbs).tolist() if kappa else is_own.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_refine_of_the_same_features_is_the_same(dtype):
    """In pools of several sizes and budgets, with more and fewer merged tokens than anchors."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 40, 8, generator=generator).to(dtype)
    mask = torch.arange(40) < torch.tensor([40, 25, 3])[:, None]
    budgets = torch.tensor([12, 7, 5])
    for kappa in (0.0, 0.5, 1.0, 5.0):
        selection = select_visual_tokens(
            features, torch.rand(3, 40, generator=generator), None, budgets, mask=mask, kappa=kappa, rho=0.3
        )
        assert (selection.merged_into >= 0).any() == (kappa > 0)
        refined = refine_like(selection, torch.cat([features, -2 * features], dim=-1), kappa)
        # Sums may differ in the order of their terms.
        torch.testing.assert_close(refined, torch.cat([selection.features, -2 * selection.features], dim=-1))
        for row, kept in enumerate(selection.indices):
            for slot, token in enumerate(kept.tolist()):
                if token < 0:
                    assert not refined[row, slot].any()
                elif token not in selection.merged_into[row]:
                    assert torch.equal(refined[row, slot, :8], features[row, token])


def test_half_precision_at_every_depth(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    rows = [[BOS, item((1, 12, 12), 3), 7, video((2, 4, 8), 4), 8]]
    seen = seen_by_the_language_model(half, lambda: decode(half, rows, num_new=1))
    assert [level.dtype for level in seen["deepstack_visual_embeds"]] == [torch.bfloat16] * DEPTHS
    assert {len(level) for level in seen["deepstack_visual_embeds"]} == {16}


def test_gradients_reach_the_tower_by_the_depths_of_merged_tokens(model):
    """The first deepstack merger is used by its depth alone."""
    model = copy.deepcopy(model)
    inputs = FAMILY.inputs([[BOS, item((1, 8, 8), 3), 7, 8, 9]])
    model(**inputs, labels=inputs["input_ids"], num_visual_tokens=4).loss.backward()
    for merger in model.model.visual.deepstack_merger_list:
        assert merger.linear_fc2.weight.grad.abs().sum() > 0


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


def test_beams_keep_images_and_videos_of_a_row_together(model):
    rows = mixed_rows()[:2]
    expected = torch.stack([oracle().beam_search(oracle().compress(row), 6, 3)[0][0] for row in rows])
    assert torch.equal(decode(model, rows, num_new=6, num_beams=3), expected)


@pytest.mark.skipif(VERSION < (5, 23), reason="transformers splits visual tokens wrongly between chunks")
@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_chunks_of_the_prompt_have_their_own_rows_of_each_depth(model, size):
    """Chunks end within images, within frames and between them; some have images and video, some neither."""
    rows = mixed_rows()[:2]
    assert torch.equal(decode(model, rows, prefill_chunk_size=size), oracle_tokens(rows))


def test_default_budget_is_half_of_an_image_or_a_video():
    config = FSRQwen3VLConfig(**FAMILY.config)
    fsr = config.fsr_config
    assert (fsr.retention_ratio, fsr.num_visual_tokens) == (0.5, None)
    assert (fsr.relevance, fsr.pool, fsr.positions) == ("none", "item", "original")
    built = initialize(FSRQwen3VLForConditionalGeneration(config))
    assert [len(s.indices) for s in select(built, [[BOS, item((1, 6, 10)), 5, video((3, 6, 6)), 6]])] == [8, 14]


# --- Timestamps ---


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_timestamps_stay_where_nothing_of_a_frame_is_kept(model, budget):
    rows = [[BOS, video((4, 4, 6), 9), 7], [BOS, 20, video((3, 6, 6), 2), 21, item((1, 4, 4), 3), 8]]
    inputs = FAMILY.inputs(rows)
    prompt = model.model.compress(**inputs, num_visual_tokens=budget, output_visual_selection=True)
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"])):
        full = ids[mask.bool()]
        is_visual = torch.isin(full, torch.tensor(FAMILY.placeholder_ids))
        is_kept = ~is_visual
        columns = (is_visual.nonzero()[:, 0]).split([item.length for item in rows[row] if isinstance(item, Item)])
        for selection, places in zip((s for s in prompt.selections if s.row == row), columns, strict=True):
            assert len(selection.indices) == min(budget, len(places))
            is_kept[places[selection.indices]] = True
        assert prompt.input_ids[row][prompt.attention_mask[row].bool()].tolist() == full[is_kept].tolist()
    frames = prompt.selections[0].grid[prompt.selections[0].indices][:, 0]
    assert budget >= 4 or len(set(frames.tolist())) < 4
    assert torch.equal(decode(model, rows, num_visual_tokens=budget), oracle_tokens(rows, num_visual_tokens=budget))


def test_frames_as_pools(model, settings):
    """With `pool="view"` each frame is selected by itself, with an equal share of the budget."""
    settings(pool="view")
    rows = [[BOS, video((3, 6, 8), 1), 5, item((1, 6, 10), 2), 6]]
    expected = oracle()
    expected.family = copy.copy(FAMILY)
    object.__setattr__(expected.family, "layout", lambda *args: qwen3_layout(*args, pool="view"))
    prompt = expected.compress(rows[0], num_visual_tokens=8)
    selections = select(model, rows, num_visual_tokens=8)
    assert [s.indices.tolist() for s in selections] == [s.kept for s in prompt.selections]
    assert torch.bincount(selections[0].grid[selections[0].indices][:, 0], minlength=3).tolist() == [3, 3, 2]
    assert torch.equal(decode(model, rows, num_visual_tokens=8), expected.decode([prompt], 8)[0])
    settings(pool="item")
    assert select(model, rows, num_visual_tokens=8)[0].indices.tolist() != selections[0].indices.tolist()


def test_frames_without_a_timestamp_between_them_are_refused(model):
    """Positions cannot tell where one ends: the stock class fails on them, far from the cause."""
    part = video((2, 4, 4), 3)
    part.token_ids = [VISION_START, *[VIDEO_TOKEN] * part.length, VISION_END]
    with pytest.raises(
        ValueError, match=r"in row 0, two stand side by side at column 6\..*between the frames of a video"
    ):
        decode(model, [[BOS, part, 7]])
    parts = [item((1, 4, 4), seed) for seed in range(2)]
    for part in parts:
        part.token_ids = [IMAGE_TOKEN] * part.length
    with pytest.raises(ValueError, match=r"in row 0, two .* side by side at column 5.*vision_end_token_id"):
        decode(model, [[BOS, *parts, 7]])
    # A frame cut in two by a word has the number of placeholders, but not the runs.
    part = video((2, 4, 4), 3)
    middle = part.token_ids.index(VIDEO_TOKEN) + 2
    part.token_ids = [*part.token_ids[:middle], 9, *part.token_ids[middle:]]
    with pytest.raises(ValueError, match=r"Video tokens do not match the videos: video 0 needs one run of 4"):
        decode(model, [[BOS, part, 7]])


# --- Positions ---


def positions_by_hand(row):
    """Time, height and width of every id of a row: each frame of a video is laid out as an image. `(3, length)`."""
    positions, now = [], 0
    for part in row:
        tokens = [part] if isinstance(part, int) else part.token_ids
        height = width = 0
        if isinstance(part, Item):
            _, height, width = (n // MERGE for n in list(part.inputs.values())[1][0].tolist())
        place = 0
        for number, token in enumerate(tokens):
            if token in FAMILY.placeholder_ids:
                positions.append((now, now + place // width, now + place % width))
                place += 1
                if number + 1 == len(tokens) or tokens[number + 1] != token:
                    now, place = now + max(height, width), 0
            else:
                positions.append((now, now, now))
                now += 1
    return torch.tensor(positions).T


def test_kept_tokens_and_new_ones_have_the_positions_of_the_full_prompt(model):
    rows = mixed_rows()
    prompts = [oracle().compress(row, num_visual_tokens=5) for row in rows]
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs["position_ids"]), with_kwargs=True
    )
    decode(model, rows, num_new=4, num_visual_tokens=5)
    hook.remove()
    for number, (row, prompt) in enumerate(zip(rows, prompts)):
        length, expected = len(prompt.columns), positions_by_hand(row)
        assert torch.equal(seen[0][1:, number, -length:], expected[:, prompt.columns])
        assert seen[0][0, number, -length:].tolist() == list(range(length))
        for step in range(1, 4):
            assert seen[step][1:, number].tolist() == [[int(expected[0, -1]) + step]] * 3
            assert int(seen[step][0, number]) == length - 1 + step


def test_compact_positions(model, settings):
    settings(positions="compact")
    rows = mixed_rows()
    assert torch.equal(decode(model, rows, num_visual_tokens=5), oracle_tokens(rows, num_visual_tokens=5))


# --- What is refused ---


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"image_grid_thw": None}, "`pixel_values` need `image_grid_thw`.*None"),
        ({"video_grid_thw": torch.tensor([[2, 6, 6]])}, r"`pixel_values_videos`.*108 patches.*need 72"),
        (
            {"video_grid_thw": torch.tensor([[1, 18, 6]])},
            "Video tokens do not match the videos: video 0 needs one run",
        ),
        ({"pixel_values_videos": None}, "`video_grid_thw` has 1 rows, but there are no `pixel_values_videos`"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_bad_input_is_refused_before_any_work(model, monkeypatch, change, error):
    inputs = {**FAMILY.inputs([[BOS, item((1, 6, 10), 1), 7, video((3, 6, 6), 2), 8]]), **change}

    def work(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(model.model.visual, "forward", work)
    monkeypatch.setattr(model.model.language_model, "forward", work)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=error):
            call(**inputs)


def test_relevance_and_a_tower_of_one_block_are_refused():
    for field in ({"relevance": "clip"}, {"text_encoder_config": {"hidden_size": 24}}):
        with pytest.raises(ValueError, match=r'`fsr_config\.relevance="clip"`.*comes from no CLIP'):
            FSRQwen3VLConfig(**FAMILY.config, fsr_config=field)
    vision = {**FAMILY.config["vision_config"], "depth": 1, "deepstack_visual_indexes": [0]}
    with pytest.raises(ValueError, match=r"`vision_config\.depth=1` is not supported"):
        FSRQwen3VLForConditionalGeneration(FSRQwen3VLConfig(**{**FAMILY.config, "vision_config": vision}))


# --- The class ---


@pytest.mark.parametrize("is_tied", [False, True], ids=["8B", "tied as 2B and 4B"])
def test_stock_checkpoint_loads_whole(tmp_path, is_tied):
    stock = Qwen3VLForConditionalGeneration(
        FAMILY.reference_config_class(**FAMILY.config, tie_word_embeddings=is_tied)
    )
    initialize(stock).save_pretrained(tmp_path)
    model, info = FSRQwen3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for key, tensor in stock.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    row = [BOS, 5, item((1, 8, 8)), 7]
    assert torch.equal(decode(model, [row], fsr_enabled=False), decode(stock, [row]))
    model.save_pretrained(tmp_path / "new")
    again = AutoModel.from_pretrained(tmp_path / "new")
    assert type(again) is FSRQwen3VLForConditionalGeneration
    assert torch.equal(decode(again, [row]), decode(model, [row]))


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_with_the_stock_processor(tmp_path):
    """A video between two pictures, and a prompt of words."""
    save_checkpoint(tmp_path, "qwen3_vl")
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is Qwen3VLProcessor
    frames = np.stack([picture(48, 40, seed) for seed in range(6)])
    content = [
        {"type": "image", "image": picture(40, 64)},
        {"type": "video", "video": frames},
        {"type": "image", "image": picture(64, 24, 1)},
        {"type": "text", "text": "what?"},
    ]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": parts}] for parts in (content, [{"type": "text", "text": "no picture"}])],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    lengths = [int(grid.prod()) // 4 for name in ("image_grid_thw", "video_grid_thw") for grid in inputs[name]]
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    outputs = []
    seen = seen_by_the_language_model(
        model, lambda: outputs.append(model.generate(**inputs, **options, output_visual_selection=True))
    )
    selections = outputs[0].visual_selections
    assert [selection.modality for selection in selections] == ["image", "video", "image"]
    kept = [len(selection.indices) for selection in selections]
    assert kept == [round(lengths[number] / 2) for number in (0, 2, 1)]
    assert int(seen["visual_pos_masks"].sum()) == sum(kept)
    assert [len(level) for level in seen["deepstack_visual_embeds"]] == [sum(kept)] * DEPTHS
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.count(" seconds>") == int(inputs["video_grid_thw"][0, 0]) == 3
