"""`pipeline("image-text-to-text")`: prunes, and answers what `generate()` answers row by row."""

import json

import numpy as np
import pytest
import torch
from families import initialize
from isolated import run_isolated
from PIL import Image
from processing.tiny_tokenizers import clip_image_processor, clip_tokenizer, llama_tokenizer
from transformers import LlavaProcessor, pipeline

from fsr_hf import FSRLlavaConfig, FSRLlavaForConditionalGeneration, FSRLlavaProcessor
from fsr_hf.testing.chat_templates import LLAVA_TEMPLATE


PATCHES = 36  # of an image of 42 x 42 pixels
BUDGET = 9
SHORT = "a dog?"
LONG = "is the cat that sits on the left of the tree bigger than the one on the right, which has a green hat on it?"
LONG_CHUNKS = 2  # of 75 tokens, one for each letter


@pytest.fixture(scope="module")
def processor():
    return FSRLlavaProcessor(
        image_processor=clip_image_processor(42),
        tokenizer=llama_tokenizer(),
        query_tokenizer=clip_tokenizer(),
        patch_size=7,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )


@pytest.fixture(scope="module")
def model(processor):
    tower = {"intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = FSRLlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "image_size": 42,
            "patch_size": 7,
            **tower,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 48,
            "vocab_size": len(processor.tokenizer),
            "num_key_value_heads": 2,
            **tower,
        },
        image_token_index=processor.image_token_id,
        image_seq_length=PATCHES,
        fsr_config={
            "num_visual_tokens": BUDGET,
            "text_encoder_config": {
                "hidden_size": 24,
                "vocab_size": len(processor.query_tokenizer),
                "bos_token_id": processor.query_tokenizer.bos_token_id,
                "eos_token_id": processor.query_tokenizer.eos_token_id,
                "projection_dim": 16,
                **tower,
            },
        },
    )
    return initialize(FSRLlavaForConditionalGeneration(config), seed=1)


@pytest.fixture(scope="module")
def pipe(model, processor):
    return pipeline("image-text-to-text", model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)) for shape in ((42, 42, 3), (50, 60, 3))]


@pytest.fixture
def prefills(model):
    """`(rows, length)` of what the language model reads when it reads a prompt."""
    seen = []

    def record(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 1:
            seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    handle = model.get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    yield seen
    handle.remove()


def chat(image, question, *more):
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}, *more]


def plain(question):
    return f"USER: <image>\n{question} ASSISTANT:"


def settings(return_full_text=False):
    """Arguments of a call. New ones for each call, because some pipelines write into `generate_kwargs`."""
    return {
        "generate_kwargs": {"num_visual_tokens": 6, "max_new_tokens": 4},
        "return_full_text": return_full_text,
    }


def answers(model, processor, all_inputs, **kwargs):
    """New ids of each row by itself, and how long its compressed prompt is."""
    ids, lengths = [], []
    for inputs in all_inputs:
        length = inputs["input_ids"].shape[1]
        ids.append(model.generate(**inputs, do_sample=False, **kwargs)[0, length:].tolist())
        lengths.append(length - PATCHES + kwargs.get("num_visual_tokens", BUDGET))
    return ids, lengths


def words(processor, ids):
    """As a pipeline decodes by default."""
    return processor.decode(ids, skip_special_tokens=True)


def encode_chat(processor, messages, **kwargs):
    kwargs = {"add_generation_prompt": True} | kwargs
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


def test_one_chat(pipe, model, processor, images, prefills):
    messages = chat(images[0], SHORT)
    (expected,), (length,) = answers(model, processor, [encode_chat(processor, messages)], max_new_tokens=4)
    prefills.clear()
    (record,) = pipe(messages, max_new_tokens=4, return_full_text=False)
    assert record["generated_text"] == words(processor, expected)
    assert record["input_text"] == messages
    assert prefills == [(1, length)]


@pytest.mark.parametrize("kwargs", [{}, {"num_visual_tokens": 6}, {"retention_ratio": 1 / 6}], ids=str)
def test_a_batch_of_chats(pipe, model, processor, images, prefills, kwargs):
    """Questions of one chunk and of two: the pipeline pads prompts and questions, both on the left."""
    chats = [chat(images[0], SHORT), chat(images[1], LONG)]
    inputs = [encode_chat(processor, messages) for messages in chats]
    assert [row["query_input_ids"].shape[1] // 77 for row in inputs] == [1, LONG_CHUNKS]
    budget = {"num_visual_tokens": 6} if kwargs else {}
    expected, lengths = answers(model, processor, inputs, max_new_tokens=4, **budget)
    # The test can tell a lost question from a found one.
    blind = [{name: value for name, value in row.items() if "query" not in name} for row in inputs]
    assert answers(model, processor, blind, max_new_tokens=4, **budget)[0] != expected

    prefills.clear()
    records = pipe(text=chats, batch_size=2, return_full_text=False, generate_kwargs={**kwargs, "max_new_tokens": 4})
    assert prefills == [(2, max(lengths))]
    assert [record[0]["generated_text"] for record in records] == [words(processor, ids) for ids in expected]
    for record, messages in zip(records, chats, strict=True):
        assert record[0]["input_text"] == messages

    prefills.clear()
    one_by_one = pipe(text=chats, return_full_text=False, generate_kwargs={**kwargs, "max_new_tokens": 4})
    assert prefills == [(1, length) for length in lengths]
    assert one_by_one == records


def test_plain_text(pipe, model, processor, images, prefills):
    texts = [plain(SHORT), plain(LONG)]
    inputs = [processor(images=image, text=text, return_tensors="pt") for image, text in zip(images, texts)]
    assert [row["query_input_ids"].shape[1] // 77 for row in inputs] == [1, LONG_CHUNKS]
    expected, lengths = answers(model, processor, inputs, max_new_tokens=4, num_visual_tokens=6)
    expected = [words(processor, ids) for ids in expected]

    prefills.clear()
    (alone,) = pipe(images=images[0], text=texts[0], **settings())
    assert alone["generated_text"] == expected[0]
    # Lists: one call of the processor.
    together = pipe(images=images, text=texts, **settings())
    assert [record["generated_text"] for record in together] == expected
    # Dicts: the pipeline makes the batch.
    rows = ({"images": image, "text": text} for image, text in zip(images, texts))
    batched = list(pipe(rows, batch_size=2, **settings()))
    assert [record[0]["generated_text"] for record in batched] == expected
    assert prefills == [(1, lengths[0]), (2, max(lengths)), (2, max(lengths))]


def test_full_text(pipe, processor, images):
    messages = chat(images[0], SHORT)
    (new,) = pipe(messages, **settings())
    assert new["generated_text"]
    for full_text in (None, True):
        full = pipe(messages, **settings(return_full_text=full_text))
        assert full[0]["generated_text"] == [*messages, {"role": "assistant", "content": new["generated_text"]}]

    (new,) = pipe(images=images[0], text=plain(SHORT), **settings())
    (full,) = pipe(images=images[0], text=plain(SHORT), **settings(return_full_text=None))
    assert full["generated_text"] == plain(SHORT) + new["generated_text"]


def test_token_ids(pipe, model, processor, images):
    """The ids are the caller's whole prompt, all placeholders included, and the answer."""
    messages = chat(images[0], SHORT)
    inputs = encode_chat(processor, messages)
    (expected,), _ = answers(model, processor, [inputs], max_new_tokens=4)
    (record,) = pipe(messages, max_new_tokens=4, return_tensors=True)
    assert record["generated_token_ids"].tolist() == [*inputs["input_ids"][0].tolist(), *expected]


def test_an_answer_that_is_begun(pipe, model, processor, images, prefills):
    """A last message of the assistant is continued; the question is still that of the user."""
    begun = {"role": "assistant", "content": [{"type": "text", "text": "it is"}]}
    messages = chat(images[0], SHORT, begun)
    inputs = encode_chat(processor, messages, add_generation_prompt=False, continue_final_message=True)
    assert torch.equal(inputs["query_input_ids"], encode_chat(processor, messages[:1])["query_input_ids"])
    (expected,), (length,) = answers(model, processor, [inputs], max_new_tokens=4)
    prefills.clear()
    (record,) = pipe(messages, max_new_tokens=4, return_full_text=False)
    assert prefills == [(1, length)]
    assert record["generated_text"] == words(processor, expected)


@pytest.mark.parametrize(
    "kwargs",
    [{"num_beams": 3}, {"repetition_penalty": 1.5}, {"min_new_tokens": 3}, {"prompt_lookup_num_tokens": 2}],
    ids=str,
)
def test_other_ways_to_generate(pipe, model, processor, images, kwargs):
    messages = chat(images[0], SHORT)
    (expected,), _ = answers(model, processor, [encode_chat(processor, messages)], max_new_tokens=6, **kwargs)
    (record,) = pipe(messages, generate_kwargs={**kwargs, "max_new_tokens": 6}, return_full_text=False)
    assert record["generated_text"] == words(processor, expected)


def test_stop_sequence(pipe, processor, images):
    messages = chat(images[0], SHORT)
    (record,) = pipe(messages, max_new_tokens=12, return_full_text=False)
    text = record["generated_text"]
    stop = next(text[at] for at in range(3, len(text)) if text[at] not in text[:at] and not text[at].isspace())
    (stopped,) = pipe(messages, max_new_tokens=12, return_full_text=False, stop_sequence=stop)
    assert stopped["generated_text"] == text[: text.index(stop) + 1]


def test_errors_reach_the_caller(pipe, images):
    messages = chat(images[0], SHORT)
    for kwargs, message in (
        ({"num_visual_tokens": 0}, "num_visual_tokens=0"),
        ({"num_visual_token": 6}, "num_visual_token"),
        ({"num_visual_tokens": 6, "retention_ratio": 0.5}, "both set"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(messages, generate_kwargs={**kwargs, "max_new_tokens": 2})


def test_without_pruning_it_is_the_stock_pipeline(pipe, model, processor, images, prefills):
    messages = chat(images[0], SHORT)
    inputs = encode_chat(processor, messages)
    (record,) = pipe(messages, generate_kwargs={"fsr_enabled": False, "max_new_tokens": 4}, return_full_text=False)
    length = inputs["input_ids"].shape[1]
    assert prefills == [(1, length)]
    ids = model.generate(**inputs, fsr_enabled=False, max_new_tokens=4, do_sample=False)[0, length:]
    assert record["generated_text"] == words(processor, ids)


def test_the_stock_processor(model, processor, images, prefills):
    """It knows no question, so saliency alone decides."""
    stock = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )
    pipe = pipeline("image-text-to-text", model=model, processor=stock, device="cpu")
    chats = [chat(images[0], SHORT), chat(images[1], LONG)]
    expected, lengths = answers(model, stock, [encode_chat(stock, messages) for messages in chats], max_new_tokens=4)
    prefills.clear()
    records = pipe(text=chats, batch_size=2, max_new_tokens=4, return_full_text=False)
    assert prefills == [(2, max(lengths))]
    assert [record[0]["generated_text"] for record in records] == [words(stock, ids) for ids in expected]


CLEAN_PROCESS = """
import json, sys
sys.modules["fsr_hf"] = None  # an import of it fails, installed or not
from PIL import Image
from transformers import pipeline

folder = sys.argv[1]
chats, texts, settings = json.loads(sys.argv[2])
images = [Image.open(f"{folder}/{number}.png") for number in range(2)]
for messages, image in zip(chats, images):
    messages[0]["content"][0]["image"] = image
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True, device="cpu")
prefills = []
pipe.model.get_decoder().register_forward_pre_hook(
    lambda module, args, kwargs: prefills.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
)
report = {
    "chat": [record[0]["generated_text"] for record in pipe(text=chats, batch_size=2, **settings)],
    "text": [record["generated_text"] for record in pipe(images=images, text=texts, **settings)],
    "longest": max(prefills),
    "modules": [name for name in sys.modules if name.startswith("fsr_hf.")],
}
print("REPORT" + json.dumps(report))
"""


def test_from_a_folder(pipe, model, processor, images, tmp_path):
    """In this process, and in one that has never heard of the package."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    chats = [chat(images[0], SHORT), chat(images[1], LONG)]
    texts = [plain(SHORT), plain(LONG)]
    expected = pipe(text=chats, batch_size=2, **settings())
    here = pipeline("image-text-to-text", model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert type(here.model) is FSRLlavaForConditionalGeneration
    assert type(here.processor) is FSRLlavaProcessor
    assert here(text=chats, batch_size=2, **settings()) == expected

    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    arguments = json.dumps([[chat(None, SHORT), chat(None, LONG)], texts, settings()])
    output = run_isolated("-c", CLEAN_PROCESS, tmp_path, arguments, home=tmp_path)
    longest = encode_chat(processor, chats[1])["input_ids"].shape[1] - PATCHES + 6
    assert json.loads(output.partition("REPORT")[2]) == {
        "chat": [record[0]["generated_text"] for record in expected],
        "text": [record["generated_text"] for record in pipe(images=images, text=texts, **settings())],
        "longest": longest,
        "modules": [],
    }
