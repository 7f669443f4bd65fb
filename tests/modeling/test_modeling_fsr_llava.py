"""What LLaVA-1.5 alone has: choices of the feature layer, and what it cannot prune."""

import dataclasses
import logging

import pytest
import torch
from families import BOS, CLIP_TEXT_CONFIG, FAMILIES, models
from oracle import Layout, Oracle, Pool, clip_scores
from safetensors.torch import save_file
from transformers import SiglipVisionConfig
from transformers.utils.logging import warning_once

from fsr_hf import FSRLlavaConfig, FSRLlavaForConditionalGeneration


FAMILY = FAMILIES["llava"]


@pytest.fixture
def inputs():
    return FAMILY.inputs(FAMILY.rows())


def layout_of_layer(layer):
    """As the family's layout, with the block of another feature layer; relevance stays that of the penultimate one."""

    def layout(reference, item, clip, query, fsr):
        pixels = item.inputs["pixel_values"]
        block = layer - 1 if layer > 0 else layer
        saliency, relevance = clip_scores(reference.model.vision_tower, clip, pixels, query, block=block, fsr=fsr)
        run = torch.cat(list(reference.get_image_features(pixels, vision_feature_layer=layer).pooler_output))
        return Layout(run, [Pool(run, saliency[0], None if relevance is None else relevance[0], list(range(36)))])

    return layout


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 2, 4])
def test_feature_layers(inputs, layer):
    """The block whose output is the selected layer: 0-based block 3 for -1 of 4, 2 for -2, and so on."""
    model, reference = models("llava")
    oracle = Oracle(dataclasses.replace(FAMILY, layout=layout_of_layer(layer)), model, reference)
    expected = oracle.decode([oracle.compress(row) for row in FAMILY.rows()], 4)[0]
    options = {"max_new_tokens": 4, "do_sample": False}
    length = inputs["input_ids"].shape[1]
    assert torch.equal(model.generate(**inputs, **options, vision_feature_layer=layer)[:, length:], expected)
    other = FAMILY.build(vision_feature_layer=layer)
    assert torch.equal(other.generate(**inputs, **options)[:, length:], expected)
    with torch.no_grad():
        logits = model(**inputs, vision_feature_layer=layer).logits
    assert torch.equal(logits[:, -1].argmax(-1), expected[:, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, -1]}, r"`vision_feature_layer=\[-2, -1\]` is not supported: FSR needs one int"),
        ({"vision_feature_layer": 0}, "`vision_feature_layer=0` is not supported"),
        ({"vision_feature_layer": -5}, "`vision_feature_layer=-5` is not supported: .*, 1 to 4 or -4 to -1,"),
        ({"vision_feature_layer": -7}, "`vision_feature_layer=-7` is not supported"),
        ({"vision_feature_layer": 5}, "`vision_feature_layer=5` is not supported"),
        ({"vision_feature_layer": 99}, "`vision_feature_layer=99` is not supported"),
        ({"vision_feature_select_strategy": "full"}, '`vision_feature_select_strategy="full"` is not supported'),
        (
            {"vision_config": SiglipVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)},
            '`vision_config.model_type="siglip_vision_model"` is not supported: FSR reads saliency',
        ),
        ({"fsr_config": {"relevance": "clip"}}, '`fsr_config.relevance="clip"` needs a CLIP text encoder'),
    ],
    ids=str,
)
def test_refused_configs(changes, message):
    config = FSRLlavaConfig(**{**FAMILY.config, **changes})
    with pytest.raises(ValueError, match=message):
        FSRLlavaForConditionalGeneration(config)


@pytest.mark.parametrize(
    "options",
    [
        *({"vision_feature_layer": layer} for layer in ([-2, -1], 0, 5, 99, -5, -7)),
        {"vision_feature_select_strategy": "full"},
    ],
    ids=str,
)
def test_refused_for_a_call(inputs, options):
    model, _ = models("llava")
    calls = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda *args: calls.append(args))
    try:
        for call in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2)):
            with pytest.raises(ValueError, match=f"`{next(iter(options))}=.* is not supported"):
                call(**inputs, **options)
    finally:
        handle.remove()
    assert not calls


def test_pixels_of_other_shapes(inputs):
    model, _ = models("llava")
    for pixels in (inputs["pixel_values"][0], inputs["pixel_values"][None]):
        with pytest.raises(
            ValueError, match=r"`pixel_values` must have the shape \(images, channels, height, width\)"
        ):
            model.generate(**{**inputs, "pixel_values": pixels}, max_new_tokens=2)


def build_without_text_encoder(**fsr_config):
    config = FSRLlavaConfig(**FAMILY.config, fsr_config={"num_visual_tokens": 9, "rho": 0.5, **fsr_config})
    model = FSRLlavaForConditionalGeneration(config).eval()
    weights = {k: v for k, v in models("llava")[0].state_dict().items() if "text_encoder." not in k}
    model.load_state_dict(weights)
    return model


@pytest.fixture
def warnings(caplog):
    """What the library logs, without the memory of `warning_once`."""
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.propagate = True
    warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records if "FSR" in record.getMessage()]
    transformers_logger.propagate = False


def test_no_text_encoder_is_saliency_alone(inputs, warnings):
    model, reference = models("llava")
    oracle = Oracle(FAMILY, model, reference)
    expected = oracle.decode([oracle.compress(row, query=False) for row in FAMILY.rows()], 4)[0]
    options = {"max_new_tokens": 4, "do_sample": False}
    silent = build_without_text_encoder(relevance="none")
    assert torch.equal(silent.generate(**inputs, **options)[:, -4:], expected)
    assert warnings() == []
    plain = build_without_text_encoder()
    assert plain.model.text_encoder is None
    for _ in range(2):
        assert torch.equal(plain.generate(**inputs, **options)[:, -4:], expected)
    assert len(warnings()) == 1
    assert "no CLIP text encoder" in warnings()[0]


def test_one_warning_where_a_question_is_missing(inputs, warnings):
    model, _ = models("llava")
    model.generate(**inputs, max_new_tokens=2)
    assert warnings() == []
    without = {name: value for name, value in inputs.items() if not name.startswith("query_")}
    for _ in range(2):
        model.generate(**without, max_new_tokens=2)
    assert len(warnings()) == 1
    assert "no `query_input_ids`" in warnings()[0]
    mask = inputs["query_attention_mask"].clone()
    mask[0] = 0
    model.generate(**{**inputs, "query_attention_mask": mask}, max_new_tokens=2)
    assert len(warnings()) == 2
    assert "A row has no question" in warnings()[1]


def test_row_without_an_image_needs_no_question(inputs, warnings):
    model, _ = models("llava")
    mask = inputs["query_attention_mask"].clone()
    mask[2] = 0
    model.generate(**{**inputs, "query_attention_mask": mask}, max_new_tokens=2)
    assert warnings() == []


def test_images_that_touch():
    model, reference = models("llava")
    oracle = Oracle(FAMILY, model, reference)
    rows = [[BOS, FAMILY.item(seed=1), FAMILY.item(seed=2), 5], [FAMILY.item(seed=3), FAMILY.item(seed=4)]]
    expected = oracle.decode([oracle.compress(row) for row in rows], 4)[0]
    assert torch.equal(model.generate(**FAMILY.inputs(rows), max_new_tokens=4, do_sample=False)[:, -4:], expected)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_positions(inputs, options, positions):
    """Kept tokens and text where they were in the full prompt, or one after the other; decoding goes on from there."""
    model = FAMILY.build(fsr_config={"positions": positions})
    family = dataclasses.replace(FAMILY, positions=lambda _, inputs: inputs["attention_mask"].cumsum(-1) - 1)
    oracle = Oracle(family, model, models("llava")[1])
    prompts = [oracle.compress(row) for row in FAMILY.rows()]
    expected = oracle.decode(prompts, 6)[0]
    if "num_beams" in options:
        expected = torch.stack([oracle.beam_search(prompt, 6, 2)[0][0] for prompt in prompts])
    others = FAMILY.build(fsr_config={"positions": "compact" if positions == "original" else "original"})
    other = Oracle(family, others, models("llava")[1])
    assert not torch.equal(other.decode([other.compress(FAMILY.rows()[0])], 6)[0], expected[:1])
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(out[:, -6:], expected)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_positions_with_candidates(positions):
    model = FAMILY.build(fsr_config={"positions": positions})
    family = dataclasses.replace(FAMILY, positions=lambda _, inputs: inputs["attention_mask"].cumsum(-1) - 1)
    oracle = Oracle(family, model, models("llava")[1])
    row = [BOS, 5, FAMILY.item(), 10, 11, 12, 13, 14, 10, 11]
    expected = oracle.decode([oracle.compress(row)], 10)[0]
    for options in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": FAMILY.build(seed=0)}):
        out = model.generate(**FAMILY.inputs([row]), max_new_tokens=10, do_sample=False, **options)
        assert torch.equal(out[:, -10:], expected), options


def test_missing_text_encoder_weights_are_refused(tmp_path):
    """They would be random."""
    model = build_without_text_encoder()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .* weights of the CLIP text encoder"):
        FSRLlavaForConditionalGeneration.from_pretrained(
            tmp_path, fsr_config={"text_encoder_config": CLIP_TEXT_CONFIG}
        )


def test_checkpoint_of_the_old_layout(tmp_path):
    """`language_model.model.*` and `language_model.lm_head`, as `llava-hf/llava-1.5-7b-hf` has them."""
    model, _ = models("llava")
    model.save_pretrained(tmp_path)
    old = {}
    for name, value in model.state_dict().items():
        name = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        name = name.replace("model.multi_modal_projector", "multi_modal_projector")
        old[name] = value.contiguous()
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = FSRLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
