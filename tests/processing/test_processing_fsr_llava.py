"""The LLaVA processor: which words become the query, how they are tokenized, and that all else is the stock class."""

import copy
import logging
import shutil

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from processing.queries import BOS, EOS, MISTRAL_TEMPLATE, QUERY_KEYS, assert_queries, chat, hand_made, ids_of, turn
from processing.tiny_tokenizers import clip_image_processor, clip_tokenizer, llama_tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    pipeline,
)

from fsr_hf.processing import FSRLlavaProcessor
from fsr_hf.testing.chat_templates import LLAVA_TEMPLATE


VICUNA = "A chat between a curious human and an assistant: polite answers to the human's questions."

# LLaVA-OneVision on Qwen2, Qwen2-VL (its own system prompt, string contents too), LLaMA-2 (the system prompt inside
# the turn), Vicuna with the end token of training, and one that reads strings alone.
ONEVISION_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + c['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<|vision_start|><image><|vision_end|>' }}"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set first = '<<SYS>>\n' + messages[0]['content'][0]['text'] "
    "+ '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}"
    "{% endif %}{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '<s>[INST] ' + (first if loop.first else '') }}{% for c in m['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'][0]['text'] + ' </s>' }}{% endif %}{% endfor %}"
)
VICUNA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'][0]['text'] + ' ' }}{% else %}"
    "{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
STRING_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m['role'].title() + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
TEMPLATES = {
    "llava": (LLAVA_TEMPLATE, {}),
    "mistral": (MISTRAL_TEMPLATE, {}),
    "onevision": (ONEVISION_TEMPLATE, {"eos_token": "<|im_end|>"}),
    "qwen": (QWEN_TEMPLATE, {"eos_token": "<|im_end|>", "bos_token": None}),
    "llama2": (LLAMA2_TEMPLATE, {}),
    "vicuna": (VICUNA_TEMPLATE, {}),
}


def build(chat_template=LLAVA_TEMPLATE, cls=FSRLlavaProcessor, **tokenizer_kwargs):
    query_tokenizer = {"query_tokenizer": clip_tokenizer()} if cls is FSRLlavaProcessor else {}
    return cls(
        image_processor=clip_image_processor(),
        tokenizer=llama_tokenizer(**tokenizer_kwargs),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
        num_additional_image_tokens=1,
        **query_tokenizer,
    )


@pytest.fixture(scope="module")
def processor():
    return build()


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))


# --- tokenization ---------------------------------------------------------------------------------------------------


def test_a_short_query_is_what_clip_itself_would_read(processor):
    inputs = processor(text="x", query="What is it?", return_tensors="pt")
    clip = processor.query_tokenizer("What is it?", padding="max_length", max_length=77, return_tensors="pt")
    assert torch.equal(inputs["query_input_ids"], clip["input_ids"])
    assert torch.equal(inputs["query_attention_mask"], clip["attention_mask"])
    assert inputs["query_input_ids"].dtype == inputs["query_attention_mask"].dtype == torch.int64


@pytest.mark.parametrize("tokens, chunks", [(1, 1), (74, 1), (75, 1), (76, 2), (150, 2), (151, 3), (160, 3)])
def test_a_long_query_is_cut_into_chunks_with_their_own_ends(processor, tokens, chunks):
    query = " ".join("abcdefghij"[n % 10] for n in range(tokens))
    inputs = processor(text="x", query=query, return_tensors="pt")
    assert inputs["query_input_ids"].shape == inputs["query_attention_mask"].shape == (1, 77 * chunks)
    for n, (ids, mask) in enumerate(
        zip(inputs["query_input_ids"].view(chunks, 77), inputs["query_attention_mask"].view(chunks, 77), strict=True)
    ):
        content = ids_of(query, processor)[75 * n : 75 * (n + 1)]
        assert ids.tolist() == [BOS, *content, EOS] + [EOS] * (75 - len(content))
        assert mask.tolist() == [1] * (len(content) + 2) + [0] * (75 - len(content))


def test_rows_with_fewer_chunks_end_in_padding(processor):
    long = "a " * 100
    inputs = processor(text=["x", "y", "z"], query=["what?", long, ""], padding=True, return_tensors="pt")
    assert inputs["query_input_ids"].shape == (3, 154)
    assert_queries(inputs, ["what?", long, ""], processor)
    assert inputs["query_attention_mask"].view(3, 2, 77).any(-1).tolist() == [[True, False], [True, True], [False] * 2]


def test_nothing_truncates_the_query_and_nobody_warns_of_its_length():
    processor = build()  # a tokenizer warns once
    processor.query_tokenizer.backend_tokenizer.enable_truncation(77)  # as some saved CLIP tokenizers do
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        inputs = processor(text="x", query="a " * 160, return_tensors="pt", truncation=True, max_length=4)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert_queries(inputs, ["a " * 160], processor)
    assert not [record.getMessage() for record in records]


def test_another_pad_token_fills_the_chunks(processor):
    processor = copy.deepcopy(processor)
    processor.query_tokenizer.pad_token = "!"
    ids = processor(text="x", query="a b")["query_input_ids"][0]
    a, b = ids_of("a b", processor)
    assert ids == [BOS, a, b, EOS] + [processor.query_tokenizer.pad_token_id] * 73
    assert processor.query_tokenizer.pad_token_id not in (BOS, EOS)


def test_a_special_token_in_the_words_does_not_end_the_chunk(processor):
    inputs = processor(text="x", query="a <|endoftext|> <|startoftext|> b", return_tensors="pt")
    assert_queries(inputs, ["a b"], processor)


# --- the query of a conversation ------------------------------------------------------------------------------------


def test_the_last_message_of_the_user_is_the_query(processor, image):
    conversation = [
        turn("system", VICUNA),
        turn("user", image, "what is this?"),
        turn("assistant", "a dog"),
        turn("user", "what color", "is the dog?"),
    ]
    before = copy.deepcopy(conversation[1]["content"][1:]), len(conversation)
    assert_queries(chat(processor, conversation), ["what color is the dog?"], processor)
    assert_queries(chat(processor, conversation, add_generation_prompt=True), ["what color is the dog?"], processor)
    assert_queries(chat(processor, [*conversation, turn("assistant", "brown")]), ["what color is the dog?"], processor)
    assert_queries(chat(processor, conversation[:2]), ["what is this?"], processor)
    assert (conversation[1]["content"][1:], len(conversation)) == before


def test_string_contents():
    processor = build(QWEN_TEMPLATE)
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is this?"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "what color is\n the dog?"},
    ]
    assert_queries(chat(processor, conversation), ["what color is the dog?"], processor)
    assert_queries(chat(processor, conversation[:3]), ["what is this?"], processor)
    conversation[1]["content"] = "<image>\nwhat is <image>?</s>"
    assert processor.queries_from_conversations([conversation[:2]]) == ["what is ?"]


@pytest.mark.parametrize(
    "conversation",
    [[], [turn("system", VICUNA)], [turn("user")], [{"role": "user", "content": None}], [turn("user", "  \n ")]],
)
def test_no_words_no_query(processor, conversation):
    assert processor.queries_from_conversations([conversation]) == [""]


def test_an_image_alone_has_an_empty_query(processor, image):
    inputs = chat(processor, [turn("user", image)])
    assert inputs["query_input_ids"].tolist() == [[EOS] * 77]
    assert inputs["query_attention_mask"].tolist() == [[0] * 77]


def test_a_batch_of_conversations(processor, image):
    long = "a " * 90
    conversations = [
        [turn("user", image, "first?"), turn("assistant", "no"), turn("user", "second?")],
        [turn("user", image, long, image)],
        [turn("user", "no image")],
    ]
    inputs = chat(processor, conversations, processor_kwargs={"padding": True})
    assert inputs["input_ids"].shape[0] == 3 and inputs["pixel_values"].shape[0] == 3
    assert_queries(inputs, ["second?", long, "no image"], processor)


def test_an_explicit_query_wins_over_the_messages(processor, image):
    conversations = [[turn("user", image, "first?")], [turn("user", "second?")]]
    kwargs = {"padding": True}
    assert_queries(chat(processor, conversations[0], query="other"), ["other"], processor)
    assert_queries(chat(processor, conversations[0], query=""), [""], processor)
    assert_queries(chat(processor, conversations, query="other", processor_kwargs=kwargs), ["other"] * 2, processor)
    assert_queries(chat(processor, conversations, query=["a", "b"], processor_kwargs=kwargs), ["a", "b"], processor)
    kwargs = kwargs | {"query": ["a", "b"]}
    assert_queries(chat(processor, conversations, processor_kwargs=kwargs), ["a", "b"], processor)


def test_the_query_survives_processor_arguments_beside_the_templates_own(processor, image):
    # The pipeline passes them so. transformers 5.17 then forgets all `processor_kwargs`.
    conversation = [turn("user", image, "first?")]
    assert_queries(chat(processor, conversation, query="other", padding=True), ["other"], processor)


def test_the_query_of_a_conversation_ends_with_the_call(processor, image):
    chat(processor, [turn("user", image, "first?")])
    with pytest.raises(jinja2.TemplateError):
        chat(processor, [turn("user", image, "first?")], chat_template="{{ raise_exception('no') }}")
    assert_queries(processor(text="USER: second? ASSISTANT:"), ["second?"], processor)


def test_without_tokenization_only_the_prompt_comes_back(processor, image):
    conversation = [turn("user", image, "first?")]
    prompt = "USER: <image>\nfirst? ASSISTANT:"
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == prompt
    assert processor.apply_chat_template([conversation], add_generation_prompt=True) == [prompt]
    with pytest.raises(ValueError, match=r"'other'.*`tokenize=True`"):
        processor.apply_chat_template(conversation, query="other")
    ids = chat(processor, conversation, return_dict=False)
    assert torch.equal(ids, chat(processor, conversation)["input_ids"])


# --- the query of a text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_markers_of_a_template_are_found(name, add_generation_prompt, image):
    template, tokens = TEMPLATES[name]
    extra = {"image_token": "<image>"} | {f"qwen_{n}_token": token for n, token in enumerate(QWEN_TOKENS)}
    processor = build(template, extra_special_tokens=extra, **tokens)
    system, first = turn("system", VICUNA), turn("user", image, "what is this?")
    answer, second = turn("assistant", "a dog that runs"), turn("user", "what does\nUSER say?")
    for conversation, expected in [
        ([first], "what is this?"),
        ([system, first], "what is this?"),
        ([first, answer], "what is this?"),
        ([first, answer, second], "what does USER say?"),
        ([system, first, answer, second], "what does USER say?"),
        ([system, first, answer, second, answer], "what does USER say?"),
        ([first, answer, second, answer, second, answer, turn("user", "and now?")], "and now?"),
    ]:
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt)
        if name == "llava" and add_generation_prompt and conversation[-1] is answer:
            continue  # two headers of an answer, and nothing between them that tells an answer from a question
        assert processor.queries_from_text([prompt]) == [expected], prompt
        assert processor.queries_from_text([prompt.strip()]) == [expected], prompt


@pytest.mark.parametrize(
    "text, query",
    [
        ("USER: <image>\nwhat is it? ASSISTANT:", "what is it?"),
        ("USER: <image>\nwhat is it?\nASSISTANT:", "what is it?"),
        ("<image>\nUSER: what is it?\nASSISTANT:", "what is it?"),
        ("<s>USER:<image>what is it?ASSISTANT: a dog</s>", "what is it?"),
        (f"{VICUNA} USER: <image>\nwhat is it? ASSISTANT:", "what is it?"),
        (f"{VICUNA} USER: <image>\nfirst? ASSISTANT: a dog</s>USER: second? ASSISTANT: a cat</s>", "second?"),
        ("USER: <image>\nwhat does USER: mean? ASSISTANT: a name", "what does USER: mean?"),
        ("USER: <image>\nwhat does ASSISTANT: mean? ASSISTANT:", "what does ASSISTANT: mean?"),
        (
            "USER: a? ASSISTANT: b</s>USER: is it USER: or ASSISTANT: there?\nASSISTANT: ",
            "is it USER: or ASSISTANT: there?",
        ),
        ("<image>\nwho is ASSISTANT:, and why ASSISTANT: ? ASSISTANT:", "who is ASSISTANT:, and why ASSISTANT: ?"),
        ("USER: what? ASSISTANT: the word ASSISTANT: is there", "what?"),
        ("USER: <image><image>\n ASSISTANT:", ""),
        ("<image>\nwhat is it? ASSISTANT: a dog", "what is it?"),
        ("<image>\nwhat is it?", "what is it?"),
        ("what <image> is\n\n it?", "what is it?"),
        ("what is the user: an assistant?", "what is the user: an assistant?"),
        ("", ""),
        ("<image>", ""),
    ],
)
def test_texts_written_by_hand(processor, text, query):
    assert processor.queries_from_text([text]) == [query]


# An end of turn that only the turns before the last one get.
OPEN_TEMPLATE = ONEVISION_TEMPLATE.replace("{{ '<|im_end|>' }}", "{{ '' if loop.last else '<|im_end|>' }}")


@pytest.mark.parametrize(
    "template, text",
    [
        (QWEN_TEMPLATE, "<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\na dog<|im_end|>"),
        (QWEN_TEMPLATE, "<|im_start|>user\n<image>\nwhat?\n<|im_start|>assistant\na dog"),
        (LLAMA2_TEMPLATE, "[INST] <image>\nwhat? [/INST]"),
        (LLAMA2_TEMPLATE, "[INST] first? [/INST] a dog </s>[INST] <image>what? [/INST] a cat"),
        (OPEN_TEMPLATE, "be brief<|im_start|>user <image>\nwhat?<|im_end|><|im_start|>assistant\n"),
    ],
    ids=["no system prompt", "no end of turn", "no bos", "bos of the first turn alone", "end between turns alone"],
)
def test_texts_that_differ_from_what_the_template_writes(template, text):
    assert build(template).queries_from_text([text]) == ["what?"]


def test_a_template_that_reads_strings_alone():
    text = "### User:\n<image>\nwhat is it?\n### Assistant:\n"
    assert build(STRING_TEMPLATE).queries_from_text([text]) == ["what is it?"]


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ messages | length }}"])
def test_without_a_usable_template_the_whole_text_is_the_query(template):
    assert build(template).queries_from_text(["<image>\nUSER: what is it?"]) == ["USER: what is it?"]


def test_the_template_of_the_tokenizer_and_the_default_of_several_serve_as_well():
    processor = build(None)
    processor.tokenizer.chat_template = LLAVA_TEMPLATE
    assert processor.queries_from_text(["USER: what? ASSISTANT:"]) == ["what?"]
    assert build({"default": LLAVA_TEMPLATE, "rag": "x"}).queries_from_text(["USER: what? ASSISTANT:"]) == ["what?"]
    assert build({"rag": "x"}).queries_from_text(["USER: what?"]) == ["USER: what?"]


def test_a_plain_call_and_a_chat_give_the_same_inputs(processor, image):
    conversation = [turn("system", VICUNA + " "), turn("user", image, "what is it?")]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    plain = processor(images=image, text=prompt, return_tensors="pt")
    chatted = chat(processor, conversation, add_generation_prompt=True)
    assert plain.keys() == chatted.keys()
    assert all(torch.equal(plain[key], chatted[key]) for key in plain)
    assert_queries(plain, ["what is it?"], processor)


def test_a_batch_of_texts(processor, image):
    texts = ["USER: <image>\nfirst? ASSISTANT:", "USER: second one? ASSISTANT: yes"]
    inputs = processor(images=[image], text=texts, padding=True, return_tensors="pt")
    assert_queries(inputs, ["first?", "second one?"], processor)
    inputs = processor(images=[image], text=texts, query=["a", "b"], padding=True, return_tensors="pt")
    assert_queries(inputs, ["a", "b"], processor)
    inputs = processor(images=[image], text=texts, query="a", padding=True, return_tensors="pt")
    assert_queries(inputs, ["a", "a"], processor)


@pytest.mark.parametrize("query", [3, {"a": 1}, [1, 2], ["a", None], ["a", ["b"]]])
def test_a_query_of_the_wrong_type_is_refused(processor, query):
    with pytest.raises(ValueError, match="`query` must be a string") as error:
        processor(text=["x", "y"], query=query)
    assert repr(query) in str(error.value)


@pytest.mark.parametrize("query", [[], ["a"], ["a", "b", "c"]])
def test_a_query_for_another_number_of_rows_is_refused(processor, image, query):
    for call in (
        lambda: processor(text=["x", "y"], query=query),
        lambda: chat(processor, [[turn("user", "x")]] * 2, query=query),
    ):
        with pytest.raises(ValueError, match="2 rows") as error:
            call()
        assert repr(query) in str(error.value)


@pytest.mark.parametrize("name", ["qurey", "Query", "queries", "query_", "qery"])
def test_a_misspelt_query_is_refused(processor, image, name):
    message = f"`{name}` is no argument of the processor. Did you mean `query`"
    with pytest.raises(ValueError, match=message):
        processor(images=image, text="USER: <image> x ASSISTANT:", **{name: "cat"})
    for options in ({name: "cat"}, {"processor_kwargs": {name: "cat"}}):
        with pytest.raises(ValueError, match=message):
            chat(processor, [turn("user", image, "x")], **options)


# --- all else is stock ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [None, "np", "pt"])
def test_everything_else_is_the_stock_processor(processor, image, tensors):
    stock = build(cls=LlavaProcessor)
    text = ["USER: <image>\nwhat? ASSISTANT:", "USER: <image> and <image>? ASSISTANT: yes"]
    conversation = [turn("user", image, "what?"), turn("assistant", "a dog"), turn("user", "and now?")]
    calls = [
        lambda p: p([image] * 3, text, padding=True, return_tensors=tensors),
        lambda p: p(images=image, text=text[0], return_tensors=tensors),
        lambda p: p(images=image, text=text[0], text_kwargs={"return_tensors": tensors}),
        lambda p: p(text="no image", return_tensors=tensors),
        lambda p: p(text=["two", "ids"], return_tensors=tensors, return_mm_token_type_ids=True),
        lambda p: p(images=image, text=text[0], max_length=80, padding="max_length", return_tensors=tensors),
        lambda p: chat(p, conversation, return_tensors=tensors, add_generation_prompt=True),
        lambda p: chat(
            p, [conversation, conversation[:1]], return_tensors=tensors, processor_kwargs={"padding": True}
        ),
        lambda p: chat(p, conversation[:2], return_tensors=tensors, continue_final_message=True),
        lambda p: chat(p, conversation, return_tensors=tensors, return_assistant_tokens_mask=True),
    ]
    for number, call in enumerate(calls):
        expected, got = call(stock), call(processor)
        assert set(got) == {*expected, *QUERY_KEYS}, number
        for key in expected:
            assert type(got[key]) is type(expected[key]), (number, key)
            for row, stock_row in zip(got[key], expected[key], strict=True):  # a row may be longer than another
                assert np.array_equal(np.asarray(row), np.asarray(stock_row)), (number, key)
        for key in QUERY_KEYS:
            assert type(got[key]) is type(expected["input_ids"]), (number, key)
            assert np.asarray(got[key]).dtype == np.int64


def test_answers_alone_are_the_assistants(processor, image):
    conversation = [turn("user", image, "what?"), turn("assistant", "a dog"), turn("user", "and now?")]
    inputs = chat(processor, conversation, return_assistant_tokens_mask=True)
    ids, mask = (np.asarray(inputs[name]).reshape(-1) for name in ("input_ids", "assistant_masks"))
    assert processor.decode(ids[mask == 1]).strip() == "a dog"


def test_images_alone_have_no_rows(processor, image):
    stock = build(cls=LlavaProcessor)
    assert set(processor(images=image, return_tensors="pt")) == set(stock(images=image, return_tensors="pt"))
    assert_queries(processor(images=image, query="what?", return_tensors="pt"), ["what?"], processor)


def test_a_call_with_nothing_is_refused(processor):
    with pytest.raises(ValueError, match="at least one input"):
        processor()


def test_the_arguments_of_the_call_are_left_alone(processor):
    text, query = ["USER: a ASSISTANT:", "b"], ["c", "d"]
    processor(text=text, query=query, padding=True)
    assert (text, query) == (["USER: a ASSISTANT:", "b"], ["c", "d"])


def test_model_input_names(processor):
    stock = build(cls=LlavaProcessor).model_input_names
    assert processor.model_input_names == [*stock, *QUERY_KEYS]


def test_an_image_token_of_another_name():
    processor = build(extra_special_tokens={"image_token": "<pic>"})
    assert (processor.image_token, processor.image_token_id) == ("<pic>", processor.tokenizer.image_token_id)
    assert processor.queries_from_text(["<pic> what?"]) == ["what?"]


# --- saving and loading ---------------------------------------------------------------------------------------------


def test_three_generations(processor, image, tmp_path):
    conversation = [turn("user", image, "What is " + "it? " * 90)]
    expected = chat(processor, conversation, add_generation_prompt=True)
    files, configs = [], []
    loaded = processor
    for generation in range(3):
        folder = tmp_path / str(generation)
        loaded.save_pretrained(folder)
        loaded = FSRLlavaProcessor.from_pretrained(folder)
        assert type(loaded.query_tokenizer) is type(processor.query_tokenizer)
        assert type(loaded.tokenizer) is type(processor.tokenizer)
        assert (loaded.patch_size, loaded.chat_template) == (14, LLAVA_TEMPLATE)
        got = chat(loaded, conversation, add_generation_prompt=True)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got)
        files.append(sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()))
        configs.append(loaded.to_dict())
    assert files[0] == files[1] == files[2]
    assert "query_tokenizer/tokenizer.json" in files[0]
    assert configs[0] == configs[1] == configs[2]


def test_a_folder_without_its_query_tokenizer_is_refused(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "query_tokenizer")
    with pytest.raises(ValueError, match=r"`query_tokenizer` must be a `CLIPTokenizer` with a vocabulary.*subfolder"):
        FSRLlavaProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("query_tokenizer", [None, "llama"])
def test_only_the_tokenizer_of_clip_will_do(query_tokenizer):
    query_tokenizer = query_tokenizer and llama_tokenizer()
    with pytest.raises(ValueError, match="`query_tokenizer` must be a `CLIPTokenizer`"):
        FSRLlavaProcessor(clip_image_processor(), llama_tokenizer(), query_tokenizer, patch_size=14)


# --- pipeline and other families ------------------------------------------------------------------------------------


class RecordingLlava(LlavaForConditionalGeneration):
    """Keeps what `generate()` receives, and answers with the prompt itself."""

    def generate(self, input_ids=None, **kwargs):
        self.received.append({"input_ids": input_ids, **kwargs})
        return input_ids


@pytest.fixture(scope="module")
def pipe(processor):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
        text_config=LlamaConfig(**sizes, vocab_size=len(processor.tokenizer)),
        image_token_index=processor.image_token_id,
    )
    model = RecordingLlava(config)
    model.received = []
    return pipeline("image-text-to-text", model=model, processor=processor, device="cpu")


def received(pipe, *args, **kwargs):
    pipe.model.received = []
    pipe(*args, **kwargs)
    return pipe.model.received


def test_the_pipeline_hands_the_query_to_the_model(pipe, processor, image):
    conversation = [turn("user", image, "first?"), turn("assistant", "a dog"), turn("user", "second?")]
    (inputs,) = received(pipe, text=conversation)
    assert_queries(inputs, ["second?"], processor)
    (inputs,) = received(pipe, images=image, text=f"{VICUNA} USER: <image>\nfirst? ASSISTANT:")
    assert_queries(inputs, ["first?"], processor)
    (inputs,) = received(pipe, text=conversation, query="other")
    assert_queries(inputs, ["other"], processor)
    (inputs,) = received(pipe, text=conversation, processor_kwargs={"query": "other"})
    assert_queries(inputs, ["other"], processor)


def test_a_batch_in_the_pipeline_pads_whole_chunks(pipe, processor, image):
    long = "a " * 90
    conversations = [[turn("user", image, "first?")], [turn("user", image, long)]]
    (inputs,) = received(pipe, text=conversations, batch_size=2)
    ids, mask = (inputs[key].view(2, 2, 77) for key in QUERY_KEYS)
    assert mask.any(-1).tolist() == [[False, True], [True, True]]  # the tokenizer pads on the left
    assert [ids[0, 1].tolist(), mask[0, 1].tolist()] == list(hand_made("first?", processor))
    assert [ids[1].flatten().tolist(), mask[1].flatten().tolist()] == list(hand_made(long, processor))


def test_placeholders_of_videos_are_no_words():
    processor = build()
    processor.video_token = "<video>"  # as a family with videos sets it
    assert processor.queries_from_text(["USER: <video>\nwhat happens <image> here?"]) == ["what happens here?"]


def test_empty_lists_are_none(processor, image):
    """Some callers give `images` and `videos` whether there are any or not."""
    expected = processor(text="USER: what? ASSISTANT:", return_tensors="pt")
    inputs = processor(images=[], text="USER: what? ASSISTANT:", videos=[], return_tensors="pt")
    assert inputs.keys() == expected.keys()
    options = {"images": image, "text": "USER: <image>\nwhat? ASSISTANT:", "return_tensors": "pt"}
    expected = processor(**options)
    for videos in ([], ()):
        inputs = processor(**options, videos=videos)
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], value) for name, value in expected.items())


def test_a_video_is_refused(processor):
    video = torch.zeros(2, 3, 28, 28)
    with pytest.raises(ValueError, match="takes images alone"):
        processor(text="<video> what happens?", videos=[video], return_tensors="pt")
    with pytest.raises(ValueError, match="takes images alone"):
        content = [{"type": "video", "video": video}, {"type": "text", "text": "what happens?"}]
        chat(processor, [{"role": "user", "content": content}])


# --- the query that the model reads from ids ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_stands_behind_the_turn_with_the_image_does_not_change_its_query(name, image):
    template, tokens = TEMPLATES[name]
    extra = {"image_token": "<image>"} | {f"qwen_{n}_token": token for n, token in enumerate(QWEN_TOKENS)}
    processor = build(template, extra_special_tokens=extra, **tokens)
    processor.tokenizer.padding_side = "left"
    system, first = turn("system", VICUNA), turn("user", image, "what is this?")
    for before, question in [([], first), ([system], first), ([first, turn("assistant", "a dog")], first)]:
        inputs = chat(processor, [*before, question], add_generation_prompt=True)
        for answer in (
            "",
            "a cat </s>",
            "a cat </s> USER: really? ASSISTANT: [INST] yes [/INST] <|im_start|>user\nno",
        ):
            answer_ids = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
            ids = torch.cat([torch.full((1, 3), 7), inputs["input_ids"], answer_ids.long()], dim=1)
            mask = torch.ones_like(ids)
            mask[:, :3] = 0
            read = dict(zip(QUERY_KEYS, processor.read_queries(ids, mask)))
            assert_queries(read, ["what is this?"], processor)


def test_rows_without_an_image_have_no_query(processor, image):
    rows = [[turn("user", image, "what is this?")], [turn("user", "who?")]]
    inputs = chat(processor, rows, add_generation_prompt=True, processor_kwargs={"padding": True})
    read = dict(zip(QUERY_KEYS, processor.read_queries(inputs["input_ids"], inputs["attention_mask"])))
    assert_queries(read, ["what is this?", ""], processor)


def test_a_bound_query_is_not_emitted_and_not_saved(image, tmp_path):
    processor, model = build(), torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    model[0].query_reader = None
    processor.bind_query(model, None)
    question = [turn("user", image, "what is this?")]
    assert not set(QUERY_KEYS) & set(chat(processor, question))
    inputs = chat(processor, question, add_generation_prompt=True)
    read = model[0].query_reader(inputs["input_ids"], inputs["attention_mask"])
    assert_queries(dict(zip(QUERY_KEYS, read)), ["what is this?"], processor)
    for call in (lambda: processor(text="a", query="b"), lambda: chat(processor, question, query="b")):
        with pytest.raises(ValueError, match=r"`query` is 'b', but `bind_query` was called"):
            call()
    processor.save_pretrained(tmp_path)
    assert_queries(chat(FSRLlavaProcessor.from_pretrained(tmp_path), question), ["what is this?"], processor)


def test_what_cannot_be_bound_is_refused(processor):
    with pytest.raises(ValueError, match="`bind_query` takes models of FSR, and `Linear` is none"):
        processor.bind_query(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="`bind_query` needs a `chat_template`"):
        build(chat_template=None).bind_query()
    ids = processor.tokenizer("USER: <image> what is it?", return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match=r"Row 0 of `input_ids` does not show where the user's turn"):
        processor.read_queries(ids, torch.ones_like(ids))
