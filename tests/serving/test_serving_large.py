"""LLaVA-1.5 and Qwen2.5-VL as large models are served, on two ranks or in bfloat16, against the transformers model."""

from pathlib import Path

import pytest
import torch
from serving_checks import Reference, drawn_picture, needs_vllm, run_engine

from examples.shapes_vqa.data import held_out_questions
from fsr_hf.testing.small_families import export_small_model


pytestmark = needs_vllm

LLAVA = "USER: <image>\n{} ASSISTANT:"
QWEN = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
SIZES = [(504, 280), (140, 420), (336, 336), (280, 196), (84, 112), (616, 308)]


@pytest.fixture(scope="module", params=["LLaVA-1.5", "Qwen2.5-VL"])
def served(request, tmp_path_factory):
    """A folder; and requests, each a prompt, a picture and what it may keep."""
    if request.param == "LLaVA-1.5":
        questions = [(scene.image, question.text) for scene, question in held_out_questions(7, 12, 144)]
        budgets = [{"num_visual_tokens": number} for number in (8, 16, 48, 100)] * 3
        requests = [(LLAVA.format(text), picture, budget) for (picture, text), budget in zip(questions, budgets)]
        return Path(__file__).parents[2] / "checkpoints/shapes-vqa", requests
    pictures = [drawn_picture(seed, *size) for seed, size in enumerate(SIZES)]
    budgets = [{"retention_ratio": ratio} for ratio in (0.5, 0.2, 0.1)] * 2
    requests = [(QWEN.format("how many trees"), picture, budget) for picture, budget in zip(pictures, budgets)]
    return export_small_model("fsr_qwen2_5_vl", tmp_path_factory.mktemp("qwen")), requests


def ask_engine(tmp_path, served, at_once, **options):
    """The answers to all requests, handed over together or each by itself."""
    folder, requests = served
    batch = [
        {"prompt": prompt, "multi_modal_data": {"image": [picture]}, "mm_processor_kwargs": budget}
        for prompt, picture, budget in requests
    ]
    batches = [batch] if at_once else [[request] for request in batch]
    limits = {"image": 1, "video": 0}
    return run_engine(tmp_path, folder, batches, max_model_len=512, limit_mm_per_prompt=limits, **options)


def ask_transformers(served, dtype):
    folder, requests = served
    reference = Reference(folder, dtype)
    return [reference.answer(prompt, {"images": [picture]}, **budget) for prompt, picture, budget in requests]


def test_two_ranks_answer_as_one(tmp_path, served):
    (found,) = ask_engine(tmp_path, served, True, tensor_parallel_size=2, distributed_executor_backend="mp")
    expected = ask_transformers(served, torch.float32)
    assert len(found["kept_by_rank"]) == 2 and found["kept_by_rank"][0] == found["kept_by_rank"][1]
    assert sorted(found["kept"]) == sorted(run for answer in expected for run in answer.kept)
    assert found["tokens"] == [answer.tokens for answer in expected]
    for logprobs, answer in zip(found["logprobs"], expected):
        assert logprobs == pytest.approx(answer.logprobs, abs=2e-4)


def test_bfloat16_keeps_the_same_tokens(tmp_path, served):
    """One by one: in this precision, scores depend on what is in the tower's batch, there as here."""
    found = ask_engine(tmp_path, served, False, dtype="bfloat16")
    expected = ask_transformers(served, torch.bfloat16)
    assert [result["lengths"] for result in found] == [[answer.length] for answer in expected]
    assert [result["kept"] for result in found] == [answer.kept for answer in expected]
