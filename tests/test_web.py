"""
The web demo, by its client and in a browser, and the Space that is made of it.

What the language model saw is counted at its door. Right answers are those of `questions.json`, and the length of a
prompt is that of the text which the chat template should make of it.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from hub.hub_server import HubServer
from huggingface_hub import RepoCard
from PIL import Image
from transformers import AutoProcessor
from transformers.models.llama.modeling_llama import LlamaModel
from typer.testing import CliRunner

from fsr_hf.cli import app
from fsr_hf.demo.shapes_vqa import example_questions, shapes_vqa_folder
from fsr_hf.demo.web import Chat, build_app, launch
from fsr_hf.explain import load_fsr_model
from fsr_hf.hub.space import write_space
from fsr_hf.testing.small_families import export_small_model


NUM_TOKENS, BUDGET = 144, 16  # of the small LLaVA: 12 x 12 patches, a ninth
EXAMPLES = {example.image.stem: example for example in example_questions()}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without a screen, and without the connections that the browser makes of its own.
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def seen():
    """The lengths of all prompts that the language model got."""
    lengths = []
    stock_forward = LlamaModel.forward

    def forward(self, *args, **kwargs):
        if kwargs["inputs_embeds"].shape[1] > 1:
            lengths.append(kwargs["inputs_embeds"].shape[1])
        return stock_forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaModel, "forward", forward)
        yield lengths


@pytest.fixture(scope="module")
def url(seen):
    """The app of the small LLaVA."""
    demo, port = build_app(str(shapes_vqa_folder()), "cpu", max_new_tokens=8), free_port()
    launch(demo, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}"
    demo.close()


@pytest.fixture
def client(url):
    return Client(url, verbose=False)


def num_text_tokens(*said: str) -> int:
    """Of a conversation, by the chat template: BOS, `USER:`, a line's end after the image, `ASSISTANT:`, spaces."""
    tokenizer = AutoProcessor.from_pretrained(shapes_vqa_folder()).tokenizer
    text = "".join(
        f"USER: {'<image>' if turn == 0 else ''}{chr(10) if turn == 0 else ''}{words} "
        if turn % 2 == 0
        else f"ASSISTANT: {words} "
        for turn, words in enumerate(said)
    )
    return len(tokenizer(text + "ASSISTANT:")["input_ids"]) - 1  # less the image's


def texts(chat) -> list[str]:
    return [message["content"][0]["text"] for message in chat]


def numbers(html) -> dict[str, list[str]]:
    rows = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", html)
    return {heading: cells for heading, *cells in rows}


def test_a_conversation(client, seen):
    """The second question goes on in it, with another budget; the picture of the kept tokens follows."""
    example = EXAMPLES["relation"]
    image = handle_file(example.image)
    seen.clear()
    unpruned, pruned, table, kept, _ = client.predict(image, example.question, BUDGET, api_name="/ask")
    assert texts(unpruned) == texts(pruned) == [example.question, example.answer] == [example.question, "red star"]
    text = num_text_tokens(example.question)
    assert seen == [text + NUM_TOKENS, text + BUDGET]
    rows = numbers(table)
    assert rows["Visual tokens"] == [str(NUM_TOKENS), str(BUDGET), "9.0 ×"]
    assert rows["Tokens seen by the language model"][:2] == [str(length) for length in seen]
    first = Image.open(kept).convert("RGB")
    assert first.width == 1000

    second = "Is there a blue heart in the picture?"
    seen.clear()
    unpruned, pruned, table, kept, _ = client.predict(image, second, 48, api_name="/ask")
    assert texts(unpruned) == texts(pruned) == [example.question, "red star", second, "no"]
    text = num_text_tokens(example.question, "red star", second)
    assert seen == [text + NUM_TOKENS, text + 48]
    assert numbers(table)["Visual tokens"] == [str(NUM_TOKENS), "48", "3.0 ×"]
    assert Image.open(kept).convert("RGB").tobytes() != first.tobytes()

    seen.clear()  # the slider: the last question again, the pruned side alone
    pruned, table, _ = client.predict(image, 24, api_name="/revise")
    assert texts(pruned)[:3] == [example.question, "red star", second] and len(texts(pruned)) == 4
    assert seen == [text + 24] and numbers(table)["Visual tokens"][:2] == [str(NUM_TOKENS), "24"]

    other = EXAMPLES["reading"]  # another picture, another conversation
    unpruned, *_ = client.predict(handle_file(other.image), other.question, BUDGET, api_name="/ask")
    assert texts(unpruned) == [other.question, other.answer]


def test_a_budget_that_drops_nothing(client, seen):
    example = EXAMPLES["counting"]
    seen.clear()
    _, pruned, table, kept, _ = client.predict(
        handle_file(example.image), example.question, NUM_TOKENS, api_name="/ask"
    )
    assert texts(pruned) == [example.question, example.answer] and Path(kept).is_file()
    assert seen[0] == seen[1] and numbers(table)["Visual tokens"] == [str(NUM_TOKENS)] * 2 + ["1.0 ×"]


def test_two_visitors_do_not_meet(url, client):
    example, other = EXAMPLES["attribute"], Client(url, verbose=False)
    for number, visitor in enumerate((client, other, client)):
        unpruned, *_ = visitor.predict(handle_file(example.image), example.question, BUDGET, api_name="/ask")
        assert len(unpruned) == (4 if number == 2 else 2)


def test_what_is_refused(client):
    example = EXAMPLES["counting"]
    image = handle_file(example.image)
    for arguments, words in (
        ((None, example.question, BUDGET), "picture first"),
        ((image, "  ", BUDGET), "question first"),
        ((image, example.question, 0), "0"),
        ((image, example.question, NUM_TOKENS + 1), str(NUM_TOKENS)),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(*arguments, api_name="/ask")


def test_in_a_browser(url, tmp_path):
    """A picture is uploaded, a question asked, the slider moved, and a second question goes on."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine: on Debian, apt-get install chromium")
    example = EXAMPLES["relation"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url, wait_until="domcontentloaded")
        page.set_input_files("input[type=file]", example.image)
        page.locator("img[src*='relation']").wait_for()
        page.locator("#question textarea").fill(example.question)
        page.get_by_role("button", name="Ask", exact=True).click()
        kept = page.locator("#kept img")
        kept.wait_for()
        first = kept.get_attribute("src")
        assert page.locator("#pruned").inner_text().split("\n\n")[-1].strip() == "red star"
        row = page.locator("#numbers tr", has_text="Visual tokens")
        assert row.inner_text().split()[-4:] == ["144", "16", "9.0", "×"]

        slider = page.locator("#budget input[type=range]")
        slider.focus()
        for _ in range(8):
            slider.press("ArrowRight")
        slider.dispatch_event("pointerup")
        page.wait_for_function("document.querySelector('#numbers').innerText.includes('6.0 ×')")
        moved = kept.get_attribute("src")

        page.locator("#question textarea").fill("Is there a blue heart in the picture?")
        page.locator("#question textarea").press("Enter")
        page.wait_for_function(
            "old => document.querySelector('#kept img').src != old && "
            "[...document.querySelectorAll('#pruned .bot')].some(e => e.innerText.includes('no'))",
            arg=moved,
        )
        for chat in ("#unpruned", "#pruned"):
            said = page.locator(chat).inner_text()
            assert said.index(example.question) < said.index("red star") < said.index("blue heart")
        assert first != moved and not errors
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()


# ---------------------------------------------------------------------- other families, the command line


@pytest.mark.parametrize(
    ("model_type", "default", "num_tokens", "candidates"),
    [
        # 24 x 24 patches, and 36 rows of 48 of the tiles, with a newline each
        ("fsr_llava_next", 11, 576 + 36 * 49, 576 + 36 * 48),
        ("fsr_qwen2_5_vl", 50, 23 * 17, 23 * 17),
        ("fsr_qwen3_vl", 50, 20 * 15, 20 * 15),
        ("fsr_llava_video", 20, 27 * 27 + 40 * 55, 27 * 27 + 40 * 54),
    ],
)
def test_other_families(tmp_path, model_type, default, num_tokens, candidates):
    """Their budget is a share, and a picture has as many tokens as follow from its size, here 640 x 480."""
    chat = Chat(*load_fsr_model(str(export_small_model(model_type, tmp_path)), "cpu"), max_new_tokens=3)
    assert chat.is_share and (chat.max_budget, chat.default_budget) == (100, default)
    image = Image.effect_noise((640, 480), 80).convert("RGB")
    answer, before, picture = chat.answer(image, [], "What is it?", None)
    assert len(answer.split()) == 3 and picture is None
    _, after, picture = chat.answer(image, [("What is it?", answer)], "And behind it?", 25)
    assert picture.width == 1000
    assert (before["visual_tokens"], after["visual_tokens"]) == (num_tokens, round(candidates / 4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "TAKEN"], "cannot listen on port TAKEN of 127.0.0.1"),
        (["nowhere/at/all"], "neither a folder nor"),
        (["STOCK"], "without FSR"),
    ],
)
def test_the_command_refuses(tmp_path, arguments, words):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = str(listener.getsockname()[1])
        free = [] if "--port" in arguments else ["--port", str(free_port())]
        names = {"TAKEN": taken, "STOCK": str(tmp_path)}
        result = invoke("demo", *(names.get(argument, argument) for argument in arguments), "--web", *free)
    assert result.exit_code == 1 and words.replace("TAKEN", taken) in result.stderr, result.output


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsr_hf.demo.web", None)
    result = invoke("demo", "--web")
    assert result.exit_code == 1 and "pip install 'fsr-hf[web]'" in result.stderr


# ---------------------------------------------------------------------- the Space


@contextmanager
def running(folder: Path, log: Path):
    """The app of a Space, as Hugging Face runs it; its address."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=output, stderr=output
        )
        try:
            while process.poll() is None:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
                    break
                time.sleep(0.2)
            assert process.poll() is None, log.read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def test_a_space_goes_up_and_runs(tmp_path):
    """`hf upload` takes the folder; what the Hub then has runs by itself, on its own copy of the package."""
    result = invoke("space", tmp_path / "space")
    assert result.exit_code == 0 and f"hf upload org/name {tmp_path / 'space'} --type space" in result.stdout
    with HubServer() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        environment["HF_HUB_OFFLINE"] = "0"
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "org/fsr", tmp_path / "space"]
        done = subprocess.run([*command, "--type", "space"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = hub.repositories["org/fsr"].commits[hub.repositories["org/fsr"].branches["main"]]
    there = tmp_path / "there"
    for name, file in files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(file.content)
    made = {path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*")}
    assert {name for name in made if (tmp_path / "space" / name).is_file()} == files.keys() - {".gitattributes"}

    card = RepoCard.load(there / "README.md", repo_type="space").data.to_dict()
    assert (card["sdk"], card["app_file"], card["license"]) == ("gradio", "app.py", "apache-2.0")
    assert "models" not in card and len(card["short_description"]) <= 60
    pins = dict(re.findall(r"^(\S+)==([\w.]+)$", (there / "requirements.txt").read_text(), flags=re.MULTILINE))
    assert {"torch", "transformers", "accelerate", "pillow"} <= pins.keys() and "gradio" not in pins

    web = there / "fsr_hf/demo/web.py"  # a mark that tells its own package from the one installed here
    web.write_text(web.read_text().replace("Time in all", "In this Space"))
    example = EXAMPLES["attribute"]
    with running(there, tmp_path / "log") as url:
        _, pruned, table, *_ = Client(url, verbose=False).predict(
            handle_file(example.image), example.question, BUDGET, api_name="/ask"
        )
    assert texts(pruned) == [example.question, example.answer]
    assert numbers(table)["Visual tokens"][:2] == [str(NUM_TOKENS), str(BUDGET)]
    assert "In this Space" in table


def test_a_space_of_a_folder_or_an_id(tmp_path, monkeypatch):
    folder = export_small_model("fsr_qwen2_5_vl", tmp_path)
    space = write_space(tmp_path / "space", folder)
    assert (space / "model/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert 'MODEL = "model"' in (space / "app.py").read_text()

    monkeypatch.setattr("fsr_hf.hub.space.check_fsr_model", lambda model: None)  # there is no Hub here
    space = write_space(tmp_path / "of-an-id", "org/llava-1.5-7b-fsr")
    assert not (space / "model").exists() and 'MODEL = "org/llava-1.5-7b-fsr"' in (space / "app.py").read_text()
    assert RepoCard.load(space / "README.md", repo_type="space").data.to_dict()["models"] == ["org/llava-1.5-7b-fsr"]


def test_a_space_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock/config.json").write_text('{"model_type": "llava"}')
    for arguments, words in (
        ([tmp_path / "full"], "is not empty"),
        ([tmp_path / "new", "--model", tmp_path / "stock"], "without FSR"),
        ([tmp_path / "new", "--model", "nowhere/at/all"], "neither a folder nor"),
    ):
        result = invoke("space", *arguments)
        assert result.exit_code == 1 and words in result.stderr, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"full", "stock"}
