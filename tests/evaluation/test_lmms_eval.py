"""
lmms-eval with the models of this package: its real CLI on a task of drawn pictures, and each wrapper on a small model.
`make test-lmms-eval` runs this file: lmms-eval has an environment of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clips import write_clip
from drawn_questions import make_inputs, write_task
from PIL import Image
from transformers import AutoModel, AutoProcessor, LlavaForConditionalGeneration

from fsr_hf.demo.run import PICTURES
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder
from fsr_hf.testing.small_families import export_small_model


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: `make test-lmms-eval` installs and tests it")

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from lmms_eval.models.model_utils import gen_metrics


SCRIPT = Path(__file__).parents[1] / "noted_process.py"
QUESTIONS = json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))
PATCHES = 144  # of a picture of the small checkpoint


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The folder of a task on this machine."""
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, "drawn", QUESTIONS)
    return folder


def answer(model, processor, question, **settings):
    """By `generate()` itself: the answer, and the length of the caller's prompt."""
    inputs = make_inputs(processor, PICTURES / question["image"], question["question"]).to(model.dtype)
    out = model.generate(**inputs, **settings, do_sample=False, max_new_tokens=8)
    length = inputs["input_ids"].shape[1]
    return processor.decode(out[0, length:], skip_special_tokens=True), length


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"fsr_enabled": False}, PATCHES), ({"num_visual_tokens": 3}, 3), ({"retention_ratio": 0.25}, 36)],
    ids=str,
)
def test_command_line(task, settings, kept, tmp_path):
    folder = shapes_vqa_folder()
    model_args = ",".join(f"{name}={value}" for name, value in {"pretrained": folder, **settings}.items())
    command = ["lmms-eval", "--model", "fsr_llava", "--model_args", model_args, "--device", "cpu"]
    command += ["--tasks", "drawn", "--include_path", task, "--output_path", tmp_path / "results", "--log_samples"]
    done = subprocess.run(
        [sys.executable, SCRIPT, "installed", tmp_path / "tokens", *command],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = (tmp_path / "results").rglob("*_results.json")
    (samples,) = (tmp_path / "results").rglob("*_samples_drawn.jsonl")
    results = json.loads(results.read_text())
    samples = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])

    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    answers, lengths = zip(*[answer(model, processor, question, **settings) for question in QUESTIONS])
    assert [sample["filtered_resps"] for sample in samples] == list(answers)
    score = sum(text == question["answer"] for text, question in zip(answers, QUESTIONS)) / len(QUESTIONS)
    assert results["results"]["drawn"]["exact_match,none"] == pytest.approx(score)
    assert kept == 3 or score == 1
    read = [length - PATCHES + kept for length in lengths]
    assert sorted(map(int, (tmp_path / "tokens").read_text().split())) == sorted(read)
    throughput = results["throughput"]
    assert throughput["avg_prompt_tokens"] == pytest.approx(sum(lengths) / len(lengths))
    assert throughput["avg_prompt_tokens_read"] == pytest.approx(sum(read) / len(read))


FAMILIES = ["fsr_llava", "fsr_llava_next", "fsr_llava_video", "fsr_qwen2_5_vl", "fsr_qwen3_vl"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folders = {}

    def make(name):
        if name not in folders:
            folders[name] = export_small_model(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return make


def build(name, folder, **kwargs):
    if "qwen" in name:
        kwargs["device_map"] = "cpu"
    return get_model(name)(pretrained=str(folder), device="cpu", **kwargs)


def run(wrapper, messages):
    """Answers of a wrapper to conversations, and what it says of the prompts."""
    wrapper.task_dict = {"task": {"test": messages}}
    options = {"max_new_tokens": 4}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("", lambda doc: copy_messages(doc), dict(options), number, "task", "test"),
            idx=0,
            metadata={"task": "task", "doc_id": number, "repeats": 1},
        )
        for number in range(len(messages))
    ]
    gen_metrics.reset_logged_metrics()
    answers = [result.text for result in wrapper.generate_until(requests)]
    summary = gen_metrics.summarize_logged_metrics()
    return answers, (summary["avg_prompt_tokens"], summary["avg_prompt_tokens_read"])


def copy_messages(messages):
    return [{**message, "content": list(message["content"])} for message in messages]


def chat(image, text):
    return [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, small):
    """At two budgets, and unpruned: shorter prompts, and the answers of `generate()` on what the wrapper passed."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (200, 300, 3), generator=generator, dtype=torch.uint8)
    messages = [chat(Image.fromarray(pixels.numpy()), "what is in the picture?")]
    wrapper = build(name, small(name), num_visual_tokens=5)
    assert type(wrapper.model).__name__ == wrapper.fsr_class.__name__
    calls = []
    decoder = wrapper.model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    generate = type(wrapper.model).generate
    passed = []

    def keep(self, **kwargs):
        passed.append(kwargs)
        return generate(self, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(wrapper.model), "generate", keep)
        answers, (caller, read) = run(wrapper, messages)
    (inputs,) = passed
    placeholders = int((inputs["input_ids"] == wrapper.model.config.image_token_id).sum())
    assert placeholders > 20
    assert caller == inputs["input_ids"].shape[1]
    assert read == calls[0] == caller - placeholders + 5
    tokenizer = wrapper.tokenizer
    out = wrapper.model.generate(**inputs, num_visual_tokens=5)
    assert answers == [tokenizer.decode(out[0, int(caller) :], skip_special_tokens=True)]
    wrapper.model.config.fsr_config.num_visual_tokens = 9
    assert run(wrapper, messages)[1] == (caller, caller - placeholders + 9)
    wrapper.model.config.fsr_config.enabled = False
    assert run(wrapper, messages)[1] == (caller, caller)


@pytest.mark.parametrize("name", ["fsr_llava_video", "fsr_qwen2_5_vl", "fsr_qwen3_vl"])
def test_videos(name, small, tmp_path):
    frames = "max_frames_num" if name == "fsr_llava_video" else "max_num_frames"
    wrapper = build(name, small(name), num_visual_tokens=5, **{frames: 4})
    passed = []
    wrapper.model.register_forward_pre_hook(lambda module, args, kwargs: passed.append(kwargs), with_kwargs=True)
    clip = write_clip(tmp_path / "clip.mp4")
    messages = [chat(str(clip), "what happens?")]
    messages[0][0]["content"][0]["type"] = "video"
    _, (caller, read) = run(wrapper, messages)
    wrapper.model.config.fsr_config.enabled = False
    passed.clear()
    assert run(wrapper, messages)[1] == (caller, caller)
    placeholders = int((passed[0]["input_ids"] == wrapper.model.config.video_token_id).sum())
    if name == "fsr_llava_video":
        assert placeholders == 4 * 14 * 15  # a frame: 14 rows of 14 tokens and a newline
    assert placeholders > 5
    assert read == caller - placeholders + 5


@pytest.mark.parametrize("name", FAMILIES)
def test_words_alone(name, small):
    wrapper = build(name, small(name))
    _, (caller, read) = run(wrapper, [[{"role": "user", "content": [{"type": "text", "text": "what is a picture?"}]}]])
    assert caller == read > 4


def test_a_batch(small):
    """Rows of two questions about one picture: the longer one is the width of both."""
    wrapper = build("fsr_qwen2_5_vl", small("fsr_qwen2_5_vl"), batch_size=2, num_visual_tokens=5)
    picture = Image.new("RGB", (200, 300), "red")
    short, long = chat(picture, "what?"), chat(picture, "what is in the picture?")
    alone = [run(wrapper, [messages]) for messages in (short, long)]
    answers, lengths = run(wrapper, [short, long])
    assert answers == [answer for (answer,), _ in alone]
    assert lengths == max(length for _, length in alone)


def test_budgets_of_model_args(small):
    config = build("fsr_llava", small("fsr_llava"), retention_ratio=0.5).model.config.fsr_config
    assert (config.num_visual_tokens, config.retention_ratio, config.enabled) == (None, 0.5, True)
    assert not build("fsr_llava", small("fsr_llava"), fsr_enabled=False).model.config.fsr_config.enabled


def test_bad_arguments_are_refused_before_weights_are_loaded(small, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    folder = small("fsr_llava")
    monkeypatch.setattr(get_model("fsr_llava").fsr_class, "from_pretrained", load)
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", load)
    for name, path, kwargs, message in (
        ("fsr_llava", folder, {"num_visual_tokens": 0}, "`num_visual_tokens=0` is not allowed"),
        ("fsr_llava", folder, {"num_visual_tokens": 4, "retention_ratio": 0.5}, "both set"),
        ("fsr_llava", folder.parent / "stock", {}, "of the type llava, .* `fsr-hf export` makes them"),
        ("fsr_llava_next", folder, {}, "of the type fsr_llava, .* use --model fsr_llava"),
    ):
        with pytest.raises(ValueError, match=message):
            build(name, path, **kwargs)


def test_a_failure_ends_the_run(small, monkeypatch):
    """The wrapper alone would score an empty answer."""
    wrapper = build("fsr_llava", small("fsr_llava"))
    messages = [chat(Image.new("RGB", (64, 64)), "what?")]

    def fail(self, **kwargs):
        raise ValueError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(wrapper.model), "generate", fail)
        with pytest.raises(RuntimeError, match="The model failed: no memory"):
            run(wrapper, messages)
    assert len(run(wrapper, messages)[0]) == 1  # nothing is left behind


def test_a_budget_that_prunes_nothing_is_said(small, monkeypatch):
    wrapper = build("fsr_llava", small("fsr_llava"), num_visual_tokens=100_000)
    warnings = []
    monkeypatch.setattr("fsr_hf.evaluation.lmms_eval_models.logger.warning", warnings.append)
    run(wrapper, [chat(Image.new("RGB", (64, 64)), "what?")])
    (warning,) = warnings
    assert "pruned nothing" in warning and "num_visual_tokens=100000" in warning
