"""
What all inner models share beside the contract: they load what outer models saved and what old checkpoints hold, take
another selector, and do the rest of what stock models do.
"""

import copy
import pickle

import oracle
import pytest
import torch
from families import BOS, FAMILIES, Item, models
from old_keys import old_llava_key, old_qwen_key
from oracle import Oracle
from original_llava_video import save_original
from safetensors.torch import load_file, save_file

from fsr_hf.modeling.fsr import VisualSelection, select_visual_tokens


NEW = 6
OLD_KEYS = {
    "llava": old_llava_key,
    "llava_next": old_llava_key,
    "llava_video": old_llava_key,
    "qwen2_5_vl": old_qwen_key,
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def model(family):
    return models(family.name)[0]


@pytest.fixture
def inputs(family):
    return family.inputs(family.rows())


def generate(family, model, rows=None, **options):
    """Greedy tokens after the prompt."""
    inputs = family.inputs(family.rows() if rows is None else rows)
    tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
    return tokens[:, inputs["input_ids"].shape[1] :]


# --- Checkpoints ---


def load_whole(cls, folder, **kwargs):
    model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(key.endswith("lm_head.weight") for key in info["unexpected_keys"])  # of an inner model
    return model


def check_weights(model, expected: dict[str, torch.Tensor]):
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for key, tensor in weights.items():
        assert torch.equal(tensor, expected[key]), key


@torch.no_grad()
def test_inner_model_loads_what_the_outer_one_saved(family, model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    inner = load_whole(type(model.model), tmp_path)
    check_weights(inner, model.model.state_dict())
    assert (inner.text_encoder is not None) == family.has_text_encoder
    assert inner.config.fsr_config.to_dict() == model.config.fsr_config.to_dict()
    assert torch.equal(inner(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    # And what it saves itself, with the names of the stock class.
    inner.save_pretrained(tmp_path / "inner")
    check_weights(load_whole(type(inner), tmp_path / "inner"), model.model.state_dict())


def test_inner_model_refuses_a_random_text_encoder(family, model, tmp_path):
    if not family.has_text_encoder:
        pytest.skip("no text encoder")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {key: tensor for key, tensor in weights.items() if "text_encoder." not in key}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \d+ weights of the CLIP text encoder"):
        type(model.model).from_pretrained(tmp_path)


@pytest.mark.parametrize("is_inner", [False, True], ids=["outer", "inner"])
def test_old_checkpoints_load_whole(family, model, is_inner, tmp_path):
    """With the names of weights that most checkpoints on the Hub have."""
    if family.name not in OLD_KEYS:
        pytest.skip("the keys of this family have not changed")
    stock = models(family.name)[1]
    stock.config.save_pretrained(tmp_path)
    weights = {OLD_KEYS[family.name](key): tensor for key, tensor in stock.state_dict().items()}
    assert not weights.keys() & {"model.multi_modal_projector.linear_1.weight", "model.visual.blocks.0.norm1.weight"}
    assert "model.language_model.norm.weight" not in weights
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    cls, part = (type(model.model), stock.model) if is_inner else (type(model), stock)
    loaded = load_whole(cls, tmp_path, fsr_config={"relevance": "none"})
    check_weights(loaded, part.state_dict())
    assert type(loaded.config) is family.model_class.config_class
    expected = family.reference_class.from_pretrained(tmp_path)
    check_weights(loaded, (expected.model if is_inner else expected).state_dict())


@pytest.mark.parametrize("is_inner", [False, True], ids=["outer", "inner"])
def test_original_checkpoints_of_llava_video_load_whole(is_inner, tmp_path):
    model = models("llava_video")[0]
    save_original(tmp_path, model, mm_spatial_pool_mode="bilinear")
    part = model.model if is_inner else model
    check_weights(load_whole(type(part), tmp_path, config=model.config), part.state_dict())


# --- Another selector ---


def first_tokens(features, saliency, relevance, num_visual_tokens, *, mask=None, max_num_visual_tokens=None, **_):
    """Keeps the first tokens of each pool, as they are."""
    pools, tokens, _ = features.shape
    budgets = torch.as_tensor(num_visual_tokens).expand(pools)
    width = int(budgets.max())
    indices = torch.arange(width).expand(pools, -1)
    indices = indices.masked_fill(indices >= budgets[:, None], -1)
    return VisualSelection(
        indices=indices,
        is_focus=indices >= 0,
        features=features[:, :width],
        priority=torch.zeros(pools, tokens),
        merged_into=torch.full((pools, tokens), -1),
    )


def first_tokens_in_lists(features, saliency, relevance, budget, **_):
    """The same for the oracle."""
    kept = list(range(min(budget, len(features))))
    return kept, set(kept), [0.0] * len(features), {}, {i: features[i] for i in kept}, []


def test_another_selector_is_used(family, monkeypatch):
    model, reference = copy.deepcopy(models(family.name)[0]), models(family.name)[1]
    assert model.selector is select_visual_tokens and model.model.selector is select_visual_tokens
    usual = generate(family, model)
    model.selector = first_tokens
    assert model.model.selector is first_tokens
    monkeypatch.setattr(oracle, "select", first_tokens_in_lists)
    answers = Oracle(family, model, reference)
    prompts = [answers.compress(row) for row in family.rows()]
    expected, logits = answers.decode(prompts, NEW)
    assert torch.equal(generate(family, model), expected)
    assert not torch.equal(expected, usual)
    with torch.no_grad():
        actual = model(**family.inputs(family.rows())).logits[:, -1]
    torch.testing.assert_close(actual, logits[:, 0], rtol=1e-3, atol=1e-4)
    # One model's selector is no other's.
    assert models(family.name)[0].selector is select_visual_tokens
    del model.model.selector
    assert model.selector is select_visual_tokens
    assert torch.equal(generate(family, model), usual)


# --- compress ---


@torch.no_grad()
def test_compressed_prompt(family, model, inputs):
    """What goes to the stock class, and what stays of it: ids, columns and kept tokens."""
    answers = Oracle(family, *models(family.name))
    expected = [answers.compress(row) for row in family.rows()]
    prompt = model.model.compress(**inputs, output_visual_selection=True)
    width, length = max(len(row.columns) for row in expected), inputs["input_ids"].shape[1]
    assert prompt.input_ids.shape == prompt.attention_mask.shape == prompt.columns.shape == (len(expected), width)
    token_ids = list(model.model.placeholder_ids.values())
    assert sorted(token_ids) == sorted(family.placeholder_ids)
    for row, right in enumerate(expected):
        size = len(right.columns)
        assert prompt.columns[row].tolist() == [-1] * (width - size) + [
            column + length - len(right.ids) for column in right.columns
        ]
        assert prompt.input_ids[row, width - size :].tolist() == [right.ids[column] for column in right.columns]
        assert torch.isin(prompt.input_ids[row], torch.tensor(token_ids)).sum() == sum(right.visual)
        assert prompt.attention_mask[row].tolist() == [0] * (width - size) + [1] * size
    assert prompt.num_features == sum(sum(row.visual) for row in expected)
    assert prompt.pruned_rows.tolist() == [any(row.selections) for row in expected] and prompt.is_padded
    kept = {modality: list(output.pooler_output) for modality, output in prompt.mm_encoder_outputs.items()}
    assert sum(len(run) for runs in kept.values() for run in runs) == prompt.num_features
    items = [part for row in family.rows() for part in row if isinstance(part, Item)]
    right = [selection for row in expected for selection in row.selections]
    for item, mine, theirs in zip(items, prompt.selections, right, strict=True):
        assert mine.indices.tolist() == theirs.kept and mine.modality == item.modality
        features = torch.stack([theirs.features[i] for i in theirs.kept])
        torch.testing.assert_close(kept[item.modality].pop(0), features, rtol=1e-3, atol=1e-4)
    assert model.model.compress(**family.inputs([[BOS, 5, 6]], query=False)) is None


def test_relevance_without_a_text_encoder_is_refused(family, inputs, monkeypatch):
    model = copy.deepcopy(models(family.name)[0])
    model.model.text_encoder = None
    monkeypatch.setattr(model.config.fsr_config, "relevance", "clip")
    monkeypatch.setattr(model.model.language_model, "forward", None)
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match=r'`fsr_config\.relevance="clip"` needs a CLIP text encoder.*"none"'):
            call(**inputs)


# --- What stock models do ---


def test_pickle_after_a_call(family, inputs):
    """Where the stock class can be pickled: hidden states are recorded by hooks, which are local functions."""
    model = family.build()
    expected = generate(family, model)
    stock = family.build_reference(model)
    stock.generate(**family.inputs([[BOS, 5, family.item("image"), 7]], query=False), max_new_tokens=1)
    try:
        pickle.dumps(stock)
    except AttributeError:
        pytest.skip("the stock class cannot be pickled")
    with torch.no_grad():
        logits = model(**inputs).logits
    again = pickle.loads(pickle.dumps(model))
    check_weights(again, model.state_dict())
    for either in (again, model):  # what was taken away for it comes back
        assert torch.equal(generate(family, either), expected)
        with torch.no_grad():
            assert torch.equal(either(**inputs).logits, logits)


def test_hidden_states_without_a_cache(family, inputs):
    """Each step has the states of the whole sequence, as in the stock class."""
    model, reference = models(family.name)
    answers = Oracle(family, model, reference)
    prompts = [answers.compress(row) for row in family.rows()]
    expected = answers.decode(prompts, NEW)[0]
    options = {"do_sample": False, "use_cache": False, "return_dict_in_generate": True, "output_hidden_states": True}
    out = model.generate(**inputs, max_new_tokens=NEW, **options)
    assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], expected)
    # Positions with gaps need a mask, which a masked column keeps.
    width = max(len(prompt.columns) for prompt in prompts) + (model.config.fsr_config.positions == "original")
    assert [states[-1].shape[1] for states in out.hidden_states] == list(range(width, width + NEW))
    for row, prompt in enumerate(prompts):
        new_ids = expected[row, : NEW - 1].tolist()
        states = answers.run(prompt, new_ids, output_hidden_states=True).hidden_states
        for mine, theirs in zip(out.hidden_states[-1], states, strict=True):
            size = theirs.shape[1]
            torch.testing.assert_close(mine[row, -size:], theirs[0], rtol=1e-3, atol=1e-4)


def test_flash_attention_gets_a_mask(family, monkeypatch):
    """It reads a jump in the positions of a single row as the start of a packed sequence, if there is no mask."""
    model, _ = models(family.name)
    inputs = family.inputs([[BOS, 5, family.item(), 6, 7]])
    pruned = model.model.compress(**inputs)
    monkeypatch.setattr(model.config.get_text_config(), "_attn_implementation_internal", "flash_attention_2")
    with_flash = model.model.compress(**inputs)
    has_gaps = bool((pruned.position_ids[0].diff() != 1).any() if pruned.position_ids.ndim == 2 else False)
    assert with_flash.attention_mask.shape[1] - pruned.attention_mask.shape[1] == has_gaps
    assert with_flash.attention_mask.all() != has_gaps


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_one_row_without_padding_and_cache(family, positions, options, monkeypatch):
    """`generate` drops a mask of ones; positions with gaps and no mask would be read as packed sequences."""
    model, reference = models(family.name)
    monkeypatch.setattr(model.config.fsr_config, "positions", positions)
    row = [BOS, 5, 6, family.item(seed=20), 7, 10, family.item(seed=21), 11, 12]
    answers = Oracle(family, model, reference)
    prompt = answers.compress(row)
    if positions == "original" and family.positions is None:
        prompt.positions = torch.tensor([prompt.columns])
    if options:
        number = options.get("num_return_sequences", 1)
        expected = answers.beam_search(prompt, NEW, 2)[0][:number]
    else:
        expected = answers.decode([prompt], NEW)[0]
    for use_cache in (False, True):
        assert torch.equal(generate(family, model, [row], use_cache=use_cache, **options), expected)
