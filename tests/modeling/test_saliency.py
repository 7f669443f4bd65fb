"""
The [CLS] row of a block, against the attention maps that the tower itself returns under eager attention; and which
block a feature layer names.
"""

from types import SimpleNamespace

import pytest
import torch
from families import CLIP_VISION_CONFIG, initialize
from transformers import CLIPVisionConfig, CLIPVisionModel

from fsr_hf.modeling.saliency import cls_attention, resolve_feature_layer


@pytest.fixture(scope="module")
def tower():
    config = CLIPVisionConfig(**CLIP_VISION_CONFIG)
    return initialize(CLIPVisionModel._from_config(config, attn_implementation="eager"), std=0.3)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 84, 84, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(tower, pixels, **kwargs):
    return tower(pixels, output_hidden_states=True, **kwargs)


def test_equals_the_maps_of_the_tower(tower, pixels):
    outputs = run(tower, pixels, output_attentions=True)
    assert len(outputs.attentions) == 4
    for number, attention in enumerate(outputs.attentions):
        row = cls_attention(tower.encoder.layers[number], outputs.hidden_states[number])
        assert row.shape == (3, 36)
        assert row.dtype == torch.float32
        torch.testing.assert_close(row, attention[:, :, 0, 1:].mean(1), rtol=1e-5, atol=1e-8)
        # The column of [CLS] is left out, and what is left is not scaled up to 1.
        torch.testing.assert_close(row.sum(-1), 1 - attention[:, :, 0, 0].mean(1))
        assert (row.sum(-1) < 0.999).all()
    assert outputs.attentions[2][:, :, 0, 1:].mean(1).std() > 0.003  # the maps are not flat


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(tower, pixels, dtype):
    """Softmax and the mean are float32, so what is lost is the rounding of the projections."""
    expected = run(tower, pixels, output_attentions=True)
    half = CLIPVisionModel(tower.config).to(dtype)
    half.load_state_dict(tower.state_dict())
    row = cls_attention(half.encoder.layers[1], expected.hidden_states[1].to(dtype))
    assert row.dtype == torch.float32
    torch.testing.assert_close(row, expected.attentions[1][:, :, 0, 1:].mean(1), rtol=0.1, atol=1e-3)
    assert row.bfloat16().float().ne(row).any()


def test_autocast(tower, pixels):
    hidden_states = run(tower, pixels).hidden_states[1]
    expected = cls_attention(tower.encoder.layers[1], hidden_states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = cls_attention(tower.encoder.layers[1], hidden_states)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row, expected, rtol=0.1, atol=1e-3)


def test_modules_are_called(tower, pixels):
    """Adapters and quantised layers replace a module's `forward`, not its weight."""

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, hidden_states):
            return self.base(hidden_states) * 0.5

    hidden_states = run(tower, pixels).hidden_states[1]
    expected = cls_attention(tower.encoder.layers[1], hidden_states)
    adapted = initialize(CLIPVisionModel._from_config(tower.config, attn_implementation="eager"), std=0.3)
    assert torch.equal(cls_attention(adapted.encoder.layers[1], hidden_states), expected)
    attention = adapted.encoder.layers[1].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    row = cls_attention(adapted.encoder.layers[1], hidden_states)
    maps = run(adapted, pixels, output_attentions=True).attentions[1]
    torch.testing.assert_close(row, maps[:, :, 0, 1:].mean(1), rtol=1e-5, atol=1e-8)
    assert not torch.allclose(row, expected)


def test_no_gradient(tower, pixels):
    hidden_states = run(tower, pixels).hidden_states[1].requires_grad_()
    assert not cls_attention(tower.encoder.layers[1], hidden_states).requires_grad


def config_of(tower, layer=-2):
    return SimpleNamespace(vision_config=tower.config, vision_feature_layer=layer)


@pytest.mark.parametrize("layer", [-4, -3, -2, -1, 1, 2, 3, 4])
def test_feature_layers(tower, pixels, layer):
    """As an index of hidden states, which begin with what the first block reads."""
    states = run(tower, pixels).hidden_states
    for number in (resolve_feature_layer(config_of(tower), layer), resolve_feature_layer(config_of(tower, layer))):
        assert 1 <= number <= 4
        assert torch.equal(states[number], states[layer])


@pytest.mark.parametrize("layer", [0, 5, 99, -5, -7, True, 2.0, "2", [1], [-2, -1], (3,)], ids=str)
def test_refused_feature_layers(tower, layer):
    for config, argument in ((config_of(tower, layer), None), (config_of(tower), layer)):
        with pytest.raises(ValueError, match=r"`vision_feature_layer=.* 1 to 4 or -4 to -1, since saliency") as error:
            resolve_feature_layer(config, argument)
        assert f"`vision_feature_layer={layer!r}`" in str(error.value)
