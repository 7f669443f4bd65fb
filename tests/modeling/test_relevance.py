"""Relevance against `CLIPModel`, whose halves have the same weights."""

import pytest
import torch
from families import CLIP_TEXT_CONFIG, CLIP_VISION_CONFIG, QUERY_BOS, QUERY_EOS, QUERY_LENGTH, initialize
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from fsr_hf.modeling.relevance import CLIPRelevance, mean_of_neighbours, patch_values


def build(**text_config):
    """A `CLIPModel` and the `CLIPRelevance` with its weights."""
    text_config = {**CLIP_TEXT_CONFIG, **text_config}
    config = CLIPConfig(text_config=text_config, vision_config=CLIP_VISION_CONFIG, projection_dim=16)
    clip = initialize(CLIPModel._from_config(config, attn_implementation="eager"), std=0.3)
    relevance = CLIPRelevance(CLIPTextConfig(**text_config), CLIP_VISION_CONFIG["hidden_size"]).eval()
    weights = {k: v for k, v in clip.state_dict().items() if not k.startswith(("vision_model.", "logit_scale"))}
    relevance.load_state_dict(weights)
    return clip, relevance


@pytest.fixture(scope="module")
def both():
    return build()


def chunk(*words, bos=QUERY_BOS, eos=QUERY_EOS):
    """Ids and mask of one chunk, padded with EOS as CLIP's tokenizer does."""
    ids = [bos, *words, eos]
    padding = QUERY_LENGTH - len(ids)
    return ids + [eos] * padding, [1] * len(ids) + [0] * padding


EMPTY = ([QUERY_EOS] * QUERY_LENGTH, [0] * QUERY_LENGTH)


def query(*rows):
    """`(batch, chunks * 77)` ids and mask of rows of chunks."""
    ids = torch.tensor([[token for ids, _ in row for token in ids] for row in rows])
    return ids, torch.tensor([[bit for _, mask in row for bit in mask] for row in rows])


@torch.no_grad()
def text_features(clip, words, **kwargs):
    """CLIP's own unit vector for one chunk, padded or not."""
    ids = torch.tensor([chunk(*words, **kwargs)[0]])
    short = ids[:, : len(words) + 2]
    features = clip.get_text_features(short, attention_mask=torch.ones_like(short)).pooler_output[0]
    return features / features.norm()


def test_query_is_the_mean_of_its_chunks(both):
    clip, relevance = both
    a, b, c = (3, 4, 5), (50, 6), tuple(range(QUERY_LENGTH - 2))
    one, two, three = (text_features(clip, words) for words in (a, b, c))
    assert not torch.allclose(one, two, atol=0.05)
    rows = [
        [chunk(*a), EMPTY, EMPTY],
        [EMPTY, EMPTY, chunk(*a)],  # empty chunks anywhere
        [EMPTY, chunk(*a), chunk(*b)],
        [chunk(*c), chunk(*a), chunk(*b)],
        [EMPTY, EMPTY, EMPTY],
    ]
    actual = relevance.encode_query(*query(*rows))
    expected = torch.stack([one, one, (one + two) / 2, (one + two + three) / 3, torch.zeros(16)])
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("eos_token_id", [QUERY_EOS, 2])
def test_end_of_text_of_old_and_new_configs(eos_token_id):
    """`openai/clip-*` names 2 as EOS; transformers then takes the largest id for it."""
    clip, relevance = build(eos_token_id=eos_token_id)
    actual = relevance.encode_query(*query([chunk(7, 2, 9)]))
    torch.testing.assert_close(actual[0], text_features(clip, (7, 2, 9)))


def test_less_a_text_without_a_word(both):
    """BOS and EOS are those of a chunk that has them, wherever it stands; a row without a question stays at zero."""
    clip, relevance = both
    a, b, c = (3, 4, 5), (50, 6), tuple(range(QUERY_LENGTH - 2))
    empty, one, two, three = (text_features(clip, words) for words in ((), a, b, c))
    assert not torch.allclose(empty, one, atol=0.05)
    for rows, expected in (
        (
            [[EMPTY, EMPTY], [EMPTY, chunk(*a)], [chunk(*a), chunk(*b)]],
            [0 * one, one - empty, (one + two) / 2 - empty],
        ),
        ([[chunk(*c)], [chunk(*b)]], [three - empty, two - empty]),  # a chunk that is full
        ([[EMPTY], [EMPTY]], [0 * one, 0 * one]),
    ):
        torch.testing.assert_close(relevance.encode_query(*query(*rows), less_empty=True), torch.stack(expected))
    ids, _ = query([chunk(*a)])
    without_mask = relevance.encode_query(ids, torch.ones_like(ids), less_empty=True)
    torch.testing.assert_close(without_mask[0], one - empty)


@torch.no_grad()
def test_values_are_what_attention_hands_to_cls(both):
    """Where all heads look at one patch alone, [CLS] receives the value of that."""
    clip, _ = both
    block = clip.vision_model.encoder.layers[-1]
    states = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(4))
    values = patch_values(block, states)
    assert values.shape == (2, 36, 32)
    normed = block.layer_norm1(states)
    for patch in (1, 20, 36):
        mask = torch.full((1, 1, 37, 37), -torch.inf)
        mask[..., patch] = 0.0
        received = block.self_attn(normed, attention_mask=mask)[0][:, 0]
        torch.testing.assert_close(values[:, patch - 1], received)


def test_mean_of_neighbours():
    values = torch.randn(3, 4 * 5, 2, generator=torch.Generator().manual_seed(5))
    expected = torch.empty_like(values)
    maps = values.view(3, 4, 5, 2)
    for row in range(4):
        for column in range(5):
            near = maps[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            expected[:, 5 * row + column] = near.mean((1, 2))
    torch.testing.assert_close(mean_of_neighbours(values, 4, 5), expected)
    torch.testing.assert_close(mean_of_neighbours(values[..., 0], 4, 5), expected[..., 0])
    assert not mean_of_neighbours(torch.zeros(1, 20), 4, 5).any()


@torch.no_grad()
def test_cosine_of_patches_and_question(both):
    clip, relevance = both
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 84, 84, generator=generator)
    hidden_states = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    patches = clip.vision_model.post_layernorm(hidden_states[:, 1:])
    embeddings = relevance.encode_query(*query([chunk(3, 4), chunk(8, 9)], [chunk(60, 61), EMPTY]))
    actual = relevance(patches, embeddings)
    projected = clip.visual_projection(patches)
    first = [torch.cosine_similarity(projected[0], text_features(clip, words), dim=-1) for words in ((3, 4), (8, 9))]
    second = torch.cosine_similarity(projected[1], text_features(clip, (60, 61)), dim=-1)
    torch.testing.assert_close(actual, torch.stack([(first[0] + first[1]) / 2, second]))
    assert actual.shape == (2, 36)
    assert actual.std() > 0.05


def test_no_question_makes_a_constant(both):
    """All patches are alike to it, so that relevance drops out of the priority."""
    patches = torch.randn(1, 36, 32, generator=torch.Generator().manual_seed(2))
    assert not both[1](patches, torch.zeros(1, 16)).any()


def test_frozen(both):
    relevance = build()[1]
    for change in (lambda m: m, lambda m: m.train(), lambda m: m.requires_grad_(True), lambda m: m.requires_grad_()):
        assert change(relevance) is relevance
        assert not any(module.training for module in relevance.modules())
        assert not any(parameter.requires_grad for parameter in relevance.parameters())
    # Loading sets the flag of each parameter, and ends with `eval()`.
    for parameter in relevance.parameters():
        parameter.requires_grad = True
    assert not any(parameter.requires_grad for parameter in relevance.eval().parameters())
    patches = torch.randn(1, 36, 32, requires_grad=True)
    ids, mask = query([chunk(3, 4)])
    assert not relevance(patches, relevance.encode_query(ids, mask)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(both, dtype):
    patches = torch.randn(1, 36, 32, generator=torch.Generator().manual_seed(3))
    ids, mask = query([chunk(3, 4, 5)])
    expected = both[1](patches, both[1].encode_query(ids, mask))
    half = build()[1].to(dtype)
    actual = half(patches.to(dtype), half.encode_query(ids, mask))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = both[1](patches, both[1].encode_query(ids, mask))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02)
