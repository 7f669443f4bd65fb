"""The LLaVA-NeXT processor: the stock one but for the query, and as many placeholders as the model has tokens."""

import numpy as np
import pytest
import torch
from anyres import pack
from families import (
    CLIP_TEXT_CONFIG,
    CLIP_VISION_CONFIG,
    NEXT_PINPOINTS,
    NEXT_PIXELS,
    NEXT_SIDE,
    TEXT_CONFIG,
    initialize,
)
from PIL import Image
from processing.queries import MISTRAL_TEMPLATE, QUERY_KEYS, assert_queries, chat, turn
from processing.tiny_tokenizers import clip_tokenizer, llama_tokenizer
from transformers import AutoProcessor, LlavaNextImageProcessor, LlavaNextProcessor

from fsr_hf import FSRLlavaNextConfig, FSRLlavaNextForConditionalGeneration, FSRLlavaNextProcessor
from fsr_hf.modeling.guards import get_cache
from fsr_hf.testing.chat_templates import LLAVA_TEMPLATE


SIZES = [(64, 64), (100, 140), (30, 190), (170, 70), (20, 1500), (1500, 20)]  # height and width


def build(cls=FSRLlavaNextProcessor, chat_template=LLAVA_TEMPLATE, pixels=NEXT_PIXELS, pinpoints=NEXT_PINPOINTS):
    return cls(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": pixels},
            crop_size={"height": pixels, "width": pixels},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=llama_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
        num_additional_image_tokens=1,
        **({"query_tokenizer": clip_tokenizer()} if cls is FSRLlavaNextProcessor else {}),
    )


def picture(size):
    height, width = size
    return Image.fromarray(np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor():
    return build()


@pytest.fixture(scope="module")
def model(processor):
    vocab_size = len(processor.tokenizer)
    query_tokenizer = processor.query_tokenizer
    ends = {"bos_token_id": query_tokenizer.bos_token_id, "eos_token_id": query_tokenizer.eos_token_id}
    config = FSRLlavaNextConfig(
        vision_config={**CLIP_VISION_CONFIG, "image_size": NEXT_PIXELS},
        text_config={"model_type": "llama", **TEXT_CONFIG, "vocab_size": vocab_size},
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=NEXT_PINPOINTS,
        fsr_config={"text_encoder_config": {**CLIP_TEXT_CONFIG, "vocab_size": len(query_tokenizer), **ends}},
    )
    return initialize(FSRLlavaNextForConditionalGeneration(config))


@pytest.mark.parametrize("template", [LLAVA_TEMPLATE, MISTRAL_TEMPLATE], ids=["vicuna", "mistral"])
def test_all_but_the_query_is_stock(template):
    processor, stock = build(chat_template=template), build(LlavaNextProcessor, template)
    conversation = [
        turn("user", picture(SIZES[1]), "what?"),
        turn("assistant", "a dog"),
        turn("user", picture(SIZES[2]), "and now?"),
    ]
    calls = [
        lambda p: p(images=picture(SIZES[0]), text="<image> what?", return_tensors="pt"),
        lambda p: p(images=[picture(size) for size in SIZES[:3]], text=["<image><image>", "<image>"], padding=True),
        lambda p: p(text="no image", return_tensors="pt"),
        lambda p: chat(p, conversation, add_generation_prompt=True),
    ]
    for call in calls:
        expected, got = call(stock), call(processor)
        assert set(got) == {*expected, *QUERY_KEYS}
        for key in expected:
            for row, stock_row in zip(got[key], expected[key], strict=True):
                assert np.array_equal(np.asarray(row), np.asarray(stock_row)), key
    assert_queries(chat(processor, conversation, add_generation_prompt=True), ["and now?"], processor)
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    images = [picture(size) for size in SIZES[1:3]]
    assert_queries(processor(images=images, text=text, return_tensors="pt"), ["and now?"], processor)
    assert processor.model_input_names == [*stock.model_input_names, *QUERY_KEYS]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_placeholders_are_those_of_the_model(processor, model, size):
    inputs = processor(images=picture(size), text="USER: <image>\nwhat is it? ASSISTANT:", return_tensors="pt")
    tokens = pack(size, NEXT_PINPOINTS, NEXT_PIXELS, NEXT_SIDE)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == len(tokens)
    output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, output_visual_selection=True)
    (selection,) = output.visual_selections
    assert len(selection.grid) == len(tokens)
    candidates = len(tokens) - tokens.count(None)
    assert len(selection.indices) == round(candidates / 9)
    words = inputs["input_ids"].shape[1] - len(tokens)
    assert get_cache(output).get_seq_length() == words + len(selection.indices) + 2


def test_several_pictures_and_a_batch(processor, model):
    rows = [
        [turn("user", picture(SIZES[1]), picture(SIZES[4]), "which is wider?")],
        [turn("user", "no picture?")],
        [turn("user", picture(SIZES[3]), "what?"), turn("assistant", "a dog"), turn("user", "and?")],
    ]
    options = {"add_generation_prompt": True, "processor_kwargs": {"padding": True}}
    inputs = chat(processor, rows, **options)
    assert inputs["pixel_values"].shape[:2] == (3, 5) and inputs["image_sizes"].tolist() == [
        list(size) for size in (SIZES[1], SIZES[4], SIZES[3])
    ]
    assert_queries(inputs, ["which is wider?", "no picture?", "and?"], processor)
    answers = model.generate(**inputs, max_new_tokens=5)[:, inputs["input_ids"].shape[1] :]
    for row, answer in zip(rows, answers):
        alone = chat(processor, [row], **options)
        if not any(part["type"] == "image" for message in row for part in message["content"]):
            alone = {key: value for key, value in alone.items() if key not in ("pixel_values", "image_sizes")}
        assert torch.equal(model.generate(**alone, max_new_tokens=5)[0, alone["input_ids"].shape[1] :], answer)


def test_published_setting():
    """The grid of the published results: every picture in 2 x 2 tiles, and 5 x 576 tokens if it is a square."""
    processor = build(pixels=336, pinpoints=[[672, 672]])
    inputs = processor(images=picture((200, 200)), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 5, 3, 336, 336)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 5 * 576 + 48
    inputs = processor(images=picture((200, 300)), text="<image>", return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 576 + 32 * 48 + 32  # unpadded: not square


def test_saved_and_loaded(processor, tmp_path):
    conversation = [turn("user", picture(SIZES[1]), "what is it?")]
    expected = chat(processor, conversation, add_generation_prompt=True)
    loaded = processor
    for generation in range(2):
        folder = tmp_path / str(generation)
        loaded.save_pretrained(folder)
        assert (folder / "query_tokenizer" / "tokenizer.json").is_file()
        loaded = AutoProcessor.from_pretrained(folder)
        assert type(loaded) is FSRLlavaNextProcessor
        assert (loaded.patch_size, loaded.num_additional_image_tokens) == (14, 1)
        assert loaded.vision_feature_select_strategy == "default"
        assert loaded.image_processor.image_grid_pinpoints == NEXT_PINPOINTS
        got = chat(loaded, conversation, add_generation_prompt=True)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got)
    changed = AutoProcessor.from_pretrained(folder, image_grid_pinpoints=[[112, 112]])
    assert changed.image_processor.image_grid_pinpoints == [[112, 112]]


@pytest.mark.parametrize("query_tokenizer", [None, "llama"])
def test_only_the_tokenizer_of_clip_will_do(processor, query_tokenizer):
    query_tokenizer = query_tokenizer and llama_tokenizer()
    with pytest.raises(ValueError, match="`query_tokenizer` must be a `CLIPTokenizer`"):
        FSRLlavaNextProcessor(processor.image_processor, processor.tokenizer, query_tokenizer, patch_size=14)
