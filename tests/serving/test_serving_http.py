"""LLaVA-1.5 behind vLLM's HTTP server, by the `openai` client: budgets, errors, many at a time, memory over time."""

import base64
import io
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving_checks import TOKENS, Reference, drawn_picture, needs_vllm

from fsr_hf.testing.vllm_server import serve


pytestmark = needs_vllm

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "checkpoints/shapes-vqa"
SERVER_BUDGET, QUESTION = 32, "What is above the green star?"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = [
        *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--trust-request-mm-kwargs"),
        *("--hf-overrides", f'{{"fsr_config": {{"num_visual_tokens": {SERVER_BUDGET}}}}}'),
        *("--additional-config", '{"fsr_tower_cache_mib": 2}', "--mm-processor-cache-gb", "0.01"),
    ]
    with serve(FOLDER, tmp_path_factory.mktemp("server") / "log.txt", *options) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url, api_key="none", timeout=300, max_retries=0)


@pytest.fixture(scope="module")
def reference():
    return Reference(FOLDER)


def data_url(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(client, picture, question=QUESTION, max_tokens=TOKENS, **settings):
    url = data_url(picture)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"mm_processor_kwargs": settings} if settings else {}
    return client.chat.completions.create(
        model="fsr",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=max_tokens,
        extra_body={"add_special_tokens": True, "ignore_eos": True, "min_tokens": max_tokens, **body},
    )


def expected_answer(reference, picture, question=QUESTION, **settings):
    answer = reference.answer(f"USER: <image>\n{question} ASSISTANT:", {"images": [picture]}, **settings)
    return reference.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip(), answer.length


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_visual_tokens": 8}, {"retention_ratio": 0.5}, {"fsr_enabled": False}],
    ids=["of the server", "tokens", "ratio", "unpruned"],
)
def test_the_budget_of_a_request(client, reference, settings):
    picture = drawn_picture(1, 144, 144)
    found = ask(client, picture, **settings)
    text, length = expected_answer(reference, picture, **(settings or {"num_visual_tokens": SERVER_BUDGET}))
    assert found.choices[0].message.content.strip() == text
    assert found.usage.prompt_tokens == length


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_visual_tokens": 0}, "num_visual_tokens=0"),
        ({"retention_ratio": 2}, "retention_ratio=2"),
        ({"num_visual_tokens": 8, "retention_ratio": 0.5}, "both set"),
        ({"num_visual_token": 8}, "Did you mean `num_visual_tokens`"),
    ],
)
def test_a_bad_budget_is_a_bad_request(client, settings, words):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match=words) as error:
        ask(client, drawn_picture(1, 144, 144), **settings)
    assert error.value.status_code == 400


def test_the_page_of_the_docs(server, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(encoding="utf-8"), re.DOTALL)
    block = block.replace("http://localhost:8000/v1", server.url).replace('model="llava"', 'model="fsr"')
    exec(compile(block, "docs/serving.md", "exec"), {"url": data_url(drawn_picture(1, 144, 144))})
    *_, prompt_tokens = capsys.readouterr().out.split()
    assert 64 < int(prompt_tokens) < 64 + 40  # `num_visual_tokens`, and some words


def test_many_at_a_time(client, reference):
    """Pictures, questions and budgets of 24 requests do not mix."""
    pictures = [drawn_picture(seed, 144, 144) for seed in range(4)]
    jobs = [
        (picture, question, budget)
        for picture in pictures
        for question in (QUESTION, "Which color does the cross have?")
        for budget in (8, 16, 48)
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: ask(client, job[0], job[1], num_visual_tokens=job[2]), jobs))
    expected = [expected_answer(reference, picture, text, num_visual_tokens=k)[0] for picture, text, k in jobs]
    assert [answer.choices[0].message.content.strip() for answer in found] == expected


def test_memory_stays_flat(client, server):
    """300 requests about 300 pictures, through caches that hold a few of them."""

    def ask_about(seeds):
        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(lambda seed: ask(client, drawn_picture(seed, 144, 144), max_tokens=2), seeds):
                assert found.usage.completion_tokens == 2
        return server.resident_mib()

    after = [ask_about(range(first, first + 100)) for first in (1000, 1100, 1200)]
    assert after[2] - after[0] < 40, after
