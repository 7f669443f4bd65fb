"""
`transformers serve`, unedited, asked by the `openai` client over loopback: right answers, and the language model reads
the pruned prompt. With the package, and in a process that has never heard of it.
"""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import AutoModelForMultimodalLM, AutoProcessor

from fsr_hf import export
from fsr_hf.demo.run import PICTURES
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder
from fsr_hf.hub.families import FAMILIES
from fsr_hf.testing.small_families import export_small_model


openai = pytest.importorskip("openai", reason="transformers[serving] is not installed")
pytest.importorskip("uvicorn", reason="transformers[serving] is not installed")

from transformers.cli.serving.model_manager import ModelManager  # noqa: E402
from transformers.cli.serving.utils import Modality  # noqa: E402


SCRIPT = Path(__file__).with_name("noted_process.py")
PATCHES, DEFAULT = 144, 16  # of a picture of the small checkpoint, and its budget
QUESTIONS = json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))


class Server:
    """A server in a process of its own, its client, and what its language model reads."""

    def __init__(self, folder: Path, home: Path, *options: str, mode: str):
        self.folder, self.home = folder, home
        self.tokens = home / "tokens"
        self.tokens.touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = (home / "log").open("w+")
        isolated = ["-I"] if mode == "hidden" else []
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        self.process = subprocess.Popen(
            [
                sys.executable,
                *isolated,
                SCRIPT,
                mode,
                self.tokens,
                "transformers",
                "serve",
                folder,
                *address,
                *options,
            ],
            cwd=home,
            env={**os.environ, "HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        url = f"http://127.0.0.1:{self.port}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        self.processor = AutoProcessor.from_pretrained(folder)

    def wait(self) -> None:
        for _ in range(240):
            if self.process.poll() is not None:
                break
            with suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10).close()
                return
            time.sleep(0.5)
        raise AssertionError(f"the server does not answer:\n{self.read_log()[-4000:]}")

    def read_log(self) -> str:
        return (self.home / "log").read_text()

    def has_logged(self, message: str) -> bool:
        """Within 10 seconds: a reply may arrive before its traceback is written."""
        for _ in range(100):
            if message in self.read_log():
                return True
            time.sleep(0.1)
        return False

    def read(self) -> list[int]:
        """How many tokens the language model read of each prompt since the last call."""
        numbers = [int(number) for number in self.tokens.read_text().split()]
        self.tokens.write_text("")
        return numbers

    def ask(self, messages, stream=False, max_tokens=8, **generation_config):
        body = {"generation_config": json.dumps(generation_config)} if generation_config else {}
        return self.client.chat.completions.create(
            model=str(self.folder), messages=messages, stream=stream, max_tokens=max_tokens, extra_body=body
        )

    def answer(self, messages, **kwargs) -> str:
        return self.ask(messages, **kwargs).choices[0].message.content

    def length(self, messages, kept: int | None) -> int:
        """Of the prompt that the language model should read, by the processor's count of words and patches."""
        turns = []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
            turns.append({"role": message["role"], "content": parts})
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        images = ids.count(self.processor.image_token_id)
        assert images == prompt.count("<image>")
        return len(ids) - images + images * (PATCHES if kept is None else kept)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        self.log.close()


@pytest.fixture(scope="module", params=["clean", "package"])
def server(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    if request.param == "clean":
        folder = export(shapes_vqa_folder(), home / "shapes-vqa-fsr", progress=False, verify=False)
        server = Server(folder, home, "--trust-remote-code", mode="hidden")
    else:  # no code in the folder; a server that would batch continuously if the model could
        server = Server(shapes_vqa_folder(), home, "--continuous-batching", mode="imported")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def picture(name: str) -> dict:
    data = base64.b64encode((PICTURES / name).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def chat(question: dict) -> list[dict]:
    content = [picture(question["image"]), {"type": "text", "text": question["question"]}]
    return [{"role": "user", "content": content}]


def test_answers(server):
    server.read()
    for question in QUESTIONS:
        reply = server.ask(chat(question))
        assert reply.choices[0].message.content == question["answer"]
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.prompt_tokens == server.length(chat(question), kept=None)  # the caller's prompt
        assert server.read() == [server.length(chat(question), kept=DEFAULT)]
    if "--continuous-batching" in server.process.args:
        assert server.has_logged("does not support continuous batching. Falling back to sequential generation")


def test_stream_and_second_turn(server):
    messages = chat(QUESTIONS[0])
    server.read()
    chunks = [chunk.choices[0] for chunk in server.ask(messages, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == QUESTIONS[0]["answer"]
    assert chunks[-1].finish_reason == "stop"
    assert server.read() == [server.length(messages, kept=DEFAULT)]
    messages += [
        {"role": "assistant", "content": QUESTIONS[0]["answer"]},
        {"role": "user", "content": "How many cyan objects are there?"},
    ]
    assert server.answer(messages) == "one"
    assert server.read() == [server.length(messages, kept=DEFAULT)]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"num_visual_tokens": 24}, 24), ({"retention_ratio": 0.25}, 36), ({"fsr_enabled": False}, None)],
    ids=str,
)
def test_budget_of_a_request(server, settings, kept):
    server.read()
    assert server.answer(chat(QUESTIONS[0]), **settings) == QUESTIONS[0]["answer"]
    assert server.read() == [server.length(chat(QUESTIONS[0]), kept)]


def test_requests_at_once(server):
    """Questions of different pictures and budgets, each answered as if it were alone."""
    budgets = [16, 24, 36, 48, 60]
    server.read()
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        replies = [pool.submit(server.answer, chat(q), num_visual_tokens=k) for q, k in zip(QUESTIONS, budgets)]
        answers = [reply.result() for reply in replies]
    assert answers == [question["answer"] for question in QUESTIONS]
    lengths = [server.length(chat(question), budget) for question, budget in zip(QUESTIONS, budgets)]
    assert sorted(server.read()) == sorted(lengths)


def test_a_bad_budget_is_refused(server):
    server.read()
    for settings, message in (
        ({"num_visual_tokens": 0}, "`num_visual_tokens=0` is not allowed: `num_visual_tokens` must be an int >= 1"),
        ({"num_visual_token": 9}, "`num_visual_token` is no argument of the model. Did you mean `num_visual_tokens`?"),
    ):
        with pytest.raises(openai.InternalServerError):
            server.answer(chat(QUESTIONS[0]), **settings)
        assert server.has_logged(message)
    with pytest.raises(openai.APIError):
        list(server.ask(chat(QUESTIONS[0]), stream=True, num_visual_tokens=0))
    assert server.read() == []
    assert server.answer(chat(QUESTIONS[1])) == QUESTIONS[1]["answer"]  # it goes on


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.config.model_type)
def test_every_family_is_loaded(family, tmp_path):
    """By the server's own loader, and taken for a model of pictures."""
    manager = ModelManager(device="cpu")
    try:
        folder = export_small_model(family.config.model_type, tmp_path)
        model, processor = manager.load_model_and_processor(manager.process_model_name(str(folder)))
        assert type(model) is family.model
        assert manager.get_model_modality(model, processor) is Modality.MULTIMODAL
        assert type(AutoModelForMultimodalLM.from_pretrained(folder)) is family.model
    finally:
        manager.shutdown()
