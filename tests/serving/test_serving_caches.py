"""LLaVA-1.5 in vLLM, with trained weights: caches by picture, question and budget; errors; the stock model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_checks import Reference, needs_vllm, run_engine

from examples.shapes_vqa.data import held_out_questions


pytestmark = needs_vllm

FOLDER = Path(__file__).parents[2] / "checkpoints/shapes-vqa"
PROMPT = "USER: <image>\n{} ASSISTANT:"
LENGTH = 512
FIRST, SECOND = "What is above the green star?", "Which color does the cross have?"


@pytest.fixture(scope="module")
def questions():
    return [(scene.image, question.text) for scene, question in held_out_questions(7, 20, 144)]


def ask(picture, question, **settings):
    pictures = picture if isinstance(picture, list) else [picture]
    prompt = PROMPT.replace("<image>", "<image>" * len(pictures)).format(question)
    data = {"image": pictures}
    uuids = {"multi_modal_uuids": {"image": [settings.pop("uuid")]}} if "uuid" in settings else {}
    return {"prompt": prompt, "multi_modal_data": data, "mm_processor_kwargs": settings, **uuids}


def mixed(questions):
    """Requests of several budgets."""
    return [ask(*q, num_visual_tokens=budget) for q, budget in zip(questions, [8, 16, 48, 100, 144] * 4)]


@pytest.fixture(scope="module")
def results(tmp_path_factory, questions):
    """By name, the results of batches that one engine answers one after the other."""
    picture, other = questions[3][0], questions[5][0]
    batches = {
        "mixed": mixed(questions),
        "unpruned": [ask(*q, fsr_enabled=False) for q in questions],
        # The matrix: each batch differs from the first in one thing.
        "picture A, question 1": [ask(picture, FIRST, num_visual_tokens=64)],
        "the same": [ask(picture, FIRST, num_visual_tokens=64)],
        "question 2": [ask(picture, SECOND, num_visual_tokens=64)],
        "budget": [ask(picture, FIRST, num_visual_tokens=63)],
        "picture B": [ask(other, FIRST, num_visual_tokens=64)],
        "more words, the same query": [ask(picture, FIRST + " Tell me.", num_visual_tokens=64, query=FIRST)],
        "one uuid, two questions": [
            ask(picture, FIRST, num_visual_tokens=64, uuid="a"),
            ask(picture, SECOND, num_visual_tokens=64, uuid="a"),
        ],
        "two pictures": [ask([picture, other], FIRST, num_visual_tokens=32)],
        "long question": [ask(picture, FIRST * 20, num_visual_tokens=16), ask(picture, FIRST, num_visual_tokens=16)],
        "ten questions": [ask(picture, f"{SECOND} {number}") for number in range(10)],
        "no budget": [ask(picture, FIRST, num_visual_tokens=0)],
        "two budgets": [ask(picture, FIRST, num_visual_tokens=8, retention_ratio=0.5)],
        "too many positions": [ask([picture] * 15, FIRST, num_visual_tokens=8)],
        "misspelt": [ask(picture, FIRST, num_visual_token=8)],
        "still serves": [ask(picture, FIRST, num_visual_tokens=64)],
    }
    folder = tmp_path_factory.mktemp("engine")
    found = run_engine(
        folder, FOLDER, list(batches.values()), max_model_len=LENGTH, max_num_batched_tokens=96, max_num_seqs=8,
        limit_mm_per_prompt={"image": 15},
    )  # fmt: skip
    return dict(zip(batches, found))


@pytest.fixture(scope="module")
def reference():
    return Reference(FOLDER)


def test_mixed_budgets_answer_as_transformers(results, reference, questions):
    result = results["mixed"]
    expected = [
        reference.answer(PROMPT.format(text), {"images": [picture]}, num_visual_tokens=budget)
        for (picture, text), budget in zip(questions, [8, 16, 48, 100, 144] * 4)
    ]
    assert result["tokens"] == [answer.tokens for answer in expected]
    assert result["lengths"] == [answer.length for answer in expected]
    assert sorted(result["kept"]) == sorted(run for answer in expected for run in answer.kept)


def test_compiled_answers_are_the_same(tmp_path, results, questions):
    (found,) = run_engine(tmp_path, FOLDER, [mixed(questions)], enforce_eager=False, max_model_len=LENGTH)
    assert found["is_compiled"] and not results["mixed"]["is_compiled"]
    assert found["tokens"] == results["mixed"]["tokens"] and sorted(found["kept"]) == sorted(results["mixed"]["kept"])


def test_two_pictures_and_long_questions_answer_as_transformers(results, reference, questions):
    picture, other = questions[3][0], questions[5][0]
    answer = reference.answer(
        PROMPT.replace("<image>", "<image><image>").format(FIRST), {"images": [picture, other]}, num_visual_tokens=32
    )
    assert results["two pictures"]["tokens"] == [answer.tokens] and len(answer.kept) == 2
    for number, text in enumerate([FIRST * 20, FIRST]):
        answer = reference.answer(PROMPT.format(text), {"images": [picture]}, num_visual_tokens=16)
        assert results["long question"]["tokens"][number] == answer.tokens


def test_caches_by_picture_question_and_budget(results):
    """Prompts of 64 visual tokens and a block of 32: of a hit, at least one block of visual tokens is shared."""
    hits = {name: result.get("prefix_hits") for name, result in results.items()}
    kept = {name: result.get("kept") for name, result in results.items()}
    assert hits["picture A, question 1"] == [0] and len(kept["picture A, question 1"][0]) == 64
    assert hits["the same"][0] >= 64 and kept["the same"] == []
    for name in ("question 2", "budget", "picture B"):
        assert hits[name] == [0] and len(kept[name]) == 1, name
    assert kept["question 2"][0] != kept["picture A, question 1"][0]
    assert hits["more words, the same query"][0] >= 64
    assert kept["more words, the same query"] in ([], kept["picture A, question 1"])
    assert results["still serves"]["tokens"] == results["picture A, question 1"]["tokens"]


def test_a_uuid_does_not_join_two_questions(results):
    assert sorted(results["one uuid, two questions"]["kept"]) == sorted(
        results["picture A, question 1"]["kept"] + results["question 2"]["kept"]
    )
    assert results["one uuid, two questions"]["tokens"] == [
        *results["picture A, question 1"]["tokens"],
        *results["question 2"]["tokens"],
    ]


def test_ten_questions_about_a_picture_run_the_tower_once(results):
    assert results["mixed"]["num_encoded"] == 20
    assert results["unpruned"]["num_encoded"] == results["ten questions"]["num_encoded"] == 0
    assert len(results["ten questions"]["kept"]) == 10


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no budget", "num_visual_tokens=0"),
        ("two budgets", "both set"),
        ("misspelt", "Did you mean"),
        ("too many positions", "positions, 2040 of them for visual tokens that are dropped"),  # 15 x (144 - 8)
    ],
)
def test_a_bad_budget_is_refused_with_our_words(results, name, words):
    assert words in results[name]["error"]


def test_unpruned_is_the_stock_model(tmp_path, results, questions):
    """The same weights as a stock LLaVA, which vLLM runs by its own class."""
    folder = tmp_path / "stock"
    folder.mkdir()
    config = json.loads((FOLDER / "config.json").read_text())
    del config["fsr_config"]
    config |= {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    processor = json.loads((FOLDER / "processor_config.json").read_text())
    processor.pop("auto_map", None)
    processor["processor_class"] = "LlavaProcessor"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(FOLDER / name, folder)
    weights = load_file(FOLDER / "model.safetensors")
    # vLLM's tower has this level, which transformers 5 saves no more.
    names = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in weights}
    stock = {names[name]: weight.to(torch.float32) for name, weight in weights.items() if "text_encoder." not in name}
    save_file(stock, folder / "model.safetensors", metadata={"format": "pt"})
    batch = [{**ask(*q), "mm_processor_kwargs": {}} for q in questions]
    (found,) = run_engine(tmp_path, folder, [batch], is_fsr=False, max_model_len=LENGTH, max_num_seqs=8)
    assert found["tokens"] == results["unpruned"]["tokens"] and found["lengths"] == results["unpruned"]["lengths"]
