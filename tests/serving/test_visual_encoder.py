"""
The part before the language model as a server runs it, against the transformers model: what is kept, where it stands,
how often the tower runs. Every family.
"""

import pytest
import torch
from families import FAMILIES, Item

from fsr_hf.modeling.pools import VisualTokens
from fsr_hf.serving.checkpoint_names import make_rename
from fsr_hf.serving.positions import PlacedItem, pack_positions, prompt_positions, write_kept_positions
from fsr_hf.serving.tower import TowerCache, VisualEncoder, build_inner, item_positions


class Served:
    """A tiny model of a family, and what a server builds of its weights."""

    def __init__(self, family):
        self.family = family
        self.model = family.build(fsr_config={"positions": "original"})
        self.inner = build_inner(self.model.config)
        weights = self.model.model.state_dict()
        names = {name for name in weights if not name.startswith("language_model.")}
        self.inner.load_state_dict({name: weights[name] for name in names})

    def rows(self):
        """Rows of the common suite; no videos of Qwen3-VL, which are several runs, and which no server takes."""
        rows = self.family.rows()
        if self.family.name == "qwen3_vl":
            rows = [row for row in rows if all(getattr(part, "modality", "") != "video" for part in row)]
        return rows

    def visual(self, inputs, modality):
        """The visual inputs of one modality."""
        is_video = {name: "video" in name or "second" in name for name in self.inner.visual_inputs}
        names = [name for name, video in is_video.items() if video == (modality == "video")]
        return {name: inputs[name] for name in names if name in inputs and name != "mm_token_type_ids"}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=str)
def served(request):
    return Served(request.param)


def run(served, inputs, modality, encoder):
    """What the encoder keeps of the items of a modality, and what the transformers model does: features, indices."""
    prompt = served.model.model.compress(**inputs, output_visual_selection=True)
    visual = served.visual(inputs, modality)
    items = served.inner.build_items(**visual)
    selections = [selection for selection in prompt.selections if selection.modality == modality]
    expected = [(selection.features, selection.indices) for selection in selections]
    query = None
    if served.inner.text_encoder is not None:
        rows = [selection.row for selection in selections]
        question = (inputs["query_input_ids"], inputs["query_attention_mask"])
        query = served.inner.text_encoder.encode_query(*question, less_empty=True)[rows]
    fsr = served.model.config.fsr_config
    budgets = [fsr.budget(item.num_candidates) for item in items]
    kept = encoder(visual, budgets, [bytes([number]) for number in range(len(items))], query)
    return [(part.features, part.indices) for part in kept], expected


@pytest.mark.parametrize("max_tokens", [1, 10**6], ids=["one by one", "at once"])
def test_it_keeps_what_the_model_keeps(served, max_tokens):
    inputs = served.family.inputs(served.rows())
    for modality in dict.fromkeys(part.modality for row in served.rows() for part in row if isinstance(part, Item)):
        encoder = VisualEncoder(served.inner, max_tokens, cache_bytes=0)
        found, expected = run(served, inputs, modality, encoder)
        assert len(found) == len(expected) == encoder.num_encoded > 0
        for (features, indices), (true_features, true_indices) in zip(found, expected):
            assert indices.tolist() == true_indices.tolist()
            size = true_features.shape[1]  # features of earlier blocks follow
            torch.testing.assert_close(features[:, :size], true_features, atol=1e-5, rtol=1e-5)


def test_a_known_picture_needs_no_tower(served):
    inputs = served.family.inputs(served.rows())
    modality = next(part.modality for row in served.rows() for part in row if isinstance(part, Item))
    encoder = VisualEncoder(served.inner, 10**6, cache_bytes=10**9)
    first, _ = run(served, inputs, modality, encoder)
    again, expected = run(served, inputs, modality, encoder)
    assert encoder.num_encoded == len(encoder.cache) == len(expected)
    for (features, indices), (same_features, same_indices) in zip(first, again):
        assert torch.equal(features, same_features) and torch.equal(indices, same_indices)


def test_positions_are_those_of_the_model(served):
    """Of a row alone: counted ahead from sizes, written once tokens are chosen."""
    for row in served.rows():
        inputs = served.family.inputs([row])
        prompt = served.model.model.compress(**inputs, output_visual_selection=True)
        if prompt is None or not prompt.selections:
            continue
        is_visual = torch.isin(prompt.input_ids[0], torch.tensor(list(served.inner.placeholder_ids.values())))
        columns = is_visual.nonzero()[:, 0]
        placed, embeds, numbers = [], [], {"image": 0, "video": 0}
        for selection in prompt.selections:
            taken = {modality: [] for modality in served.inner.placeholder_ids}
            taken[selection.modality] = [numbers[selection.modality]]
            visual = served.visual(inputs, selection.modality)
            item = served.inner.build_items(**visual)[numbers[selection.modality]]
            own = served.inner.take_items(taken, **visual)
            if "second_per_grid_ts" in visual:
                own["second_per_grid_ts"] = visual["second_per_grid_ts"][taken["video"]]
            numbers[selection.modality] += 1
            positions, span = item_positions(served.inner, item, own)
            placed.append(PlacedItem(int(columns[0]), len(selection.indices), span))
            columns = columns[len(selection.indices) :]
            embeds.append(pack_positions(selection.features, positions[:, selection.indices]))
        axes = 3 if served.inner.has_position_axes else 1
        length = prompt.input_ids.shape[1]
        positions, delta = prompt_positions(length, placed, axes)
        _, positions, same_delta = write_kept_positions(positions, is_visual, embeds, 0, axes)
        expected = prompt.position_ids.reshape(-1, length)[-axes:]
        assert positions[:axes].tolist() == expected.tolist()
        assert delta == same_delta == int(expected.max()) + 1 - length


def test_the_cache_is_bounded():
    def tokens(value):
        return VisualTokens([torch.full((10, 4), value)], torch.zeros(10))  # 200 bytes

    cache, cpu = TowerCache(450), torch.device("cpu")
    for key in b"abc":
        cache.put(bytes([key]), tokens(float(key)))
        assert cache.num_bytes <= 450
        cache.get(b"a", cpu)
    assert [key for key in b"abc" if cache.get(bytes([key]), cpu) is not None] == list(
        b"ac"
    )  # "b" was used longest ago
    assert float(cache.get(b"c", cpu).features[0][0, 0]) == ord("c") and cache.num_bytes == 400
    cache.put(b"d", VisualTokens([torch.zeros(1000, 4)], torch.zeros(1000)))
    assert len(cache) == 2
    assert TowerCache(0).put(b"a", tokens(0.0)) is None and TowerCache(0).get(b"a", cpu) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.vision_tower.encoder.w", "tower.vision_tower.encoder.w"),
        ("vision_tower.vision_model.encoder.w", "tower.vision_tower.encoder.w"),
        ("model.vision_tower.vision_tower.vision_model.encoder.w", "tower.vision_tower.encoder.w"),
        ("model.mm_projector.0.w", "tower.multi_modal_projector.linear_1.w"),
        ("multi_modal_projector.linear_1.w", "tower.multi_modal_projector.linear_1.w"),
        ("model.text_encoder.text_model.w", "tower.text_encoder.text_model.w"),
        ("model.image_newline", "tower.image_newline"),
        ("visual.blocks.w", "tower.visual.blocks.w"),
        ("vision_tower.vision_model.head.w", None),
        ("model.language_model.layers.w", "language_model.model.layers.w"),
        ("language_model.model.layers.w", "language_model.model.layers.w"),
        ("language_model.lm_head.w", "language_model.lm_head.w"),
        ("model.layers.w", "language_model.model.layers.w"),
        ("lm_head.w", "language_model.lm_head.w"),
    ],
)
def test_names_of_all_checkpoints(name, expected):
    tower = [
        "vision_tower.encoder.w",
        "multi_modal_projector.linear_1.w",
        "text_encoder.text_model.w",
        "image_newline",
    ]
    assert make_rename([*tower, "visual.blocks.w"])(name) == expected


def test_names_where_the_tower_has_one_more_level():
    assert make_rename(["vision_tower.vision_model.w"])("model.vision_tower.w") == "tower.vision_tower.vision_model.w"
