"""The trained LLaVA that comes with the package: right answers, in every way in which a model is used."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from examples.shapes_vqa.data import ask_questions, held_out_questions, make_scene
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder


FOLDER = shapes_vqa_folder()
COUNT = 100


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def questions():
    return list(held_out_questions(2**20, COUNT))  # of a seed that no benchmark uses


def prompt(question):
    return f"USER: <image>\n{question.text} ASSISTANT:"


def ask(model, processor, examples, **options) -> list[str]:
    inputs = processor(
        images=[[scene.image] for scene, _ in examples],
        text=[prompt(question) for _, question in examples],
        padding=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, **options)
    return [
        text.strip()
        for text in processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def accuracy(answers, examples) -> float:
    return sum(answer == question.answer for answer, (_, question) in zip(answers, examples)) / len(examples)


def test_the_folder_is_what_an_export_makes():
    """Small, whole, and with the code of this version."""
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 15_000_000
    command = [sys.executable, "-m", "fsr_hf.cli", "verify", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = Path(__file__).parents[1] / "docs" / "quality.json"
    assert (FOLDER / "quality.json").read_bytes() == measured.read_bytes()
    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    assert model.dtype == torch.bfloat16
    assert model.config.fsr_config.num_visual_tokens == model.config.image_seq_length // 9


def test_accuracy_at_budgets(model, processor, questions):
    unpruned = accuracy(ask(model, processor, questions, fsr_enabled=False), questions)
    pruned = {k: accuracy(ask(model, processor, questions, num_visual_tokens=k), questions) for k in (48, 16, 1)}
    assert unpruned > 0.84
    assert pruned[48] > 0.68 * unpruned and pruned[16] > 0.55 * unpruned
    assert pruned[1] < pruned[16]  # a single token cannot tell


def test_the_picture_decides(model, processor, questions):
    """With somebody else's picture the answers are guesses."""
    swapped = [(other, question) for (other, _), (_, question) in zip(questions[5:] + questions[:5], questions)]
    assert accuracy(ask(model, processor, swapped), questions) < 0.55


def test_a_batch_answers_like_its_rows(model, processor, questions):
    examples = questions[:20]
    assert ask(model, processor, examples) == [ask(model, processor, [example])[0] for example in examples]


def test_beams_and_a_chat(model, processor, questions):
    examples = questions[:20]
    greedy = ask(model, processor, examples)
    beams = ask(model, processor, examples, num_beams=3)
    assert sum(a == b for a, b in zip(greedy, beams)) >= 18
    scene = make_scene(0, split="test")
    content = [{"type": "image", "image": scene.image}, {"type": "text", "text": "How many objects are there?"}]
    chat = [{"role": "user", "content": content}]
    words = ("zero", "one", "two", "three", "four", "five")
    for turn in ("Is there a red square?", "Count the objects."):
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_visual_tokens=48)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert answer in (*words, "yes", "no")
        chat += [
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            {"role": "user", "content": [{"type": "text", "text": turn}]},
        ]


def test_pipeline(model, processor, questions):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    examples = questions[:10]
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": s.image}, {"type": "text", "text": q.text}]}]
        for s, q in examples
    ]
    outputs = pipe(
        messages, max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False}, batch_size=5
    )
    assert [output[0]["generated_text"].strip() for output in outputs] == ask(model, processor, examples)


def labelled(processor, examples):
    """Questions with the answer and the end of text as labels."""
    texts = [f"{prompt(question)} {question.answer}</s>" for _, question in examples]
    images = [[scene.image] for scene, _ in examples]
    batch = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (_, question) in enumerate(examples):
        end = int(batch["attention_mask"][row].sum())
        start = end - 1 - len(processor.tokenizer(f" {question.answer}", add_special_tokens=False).input_ids)
        labels[row, start:end] = batch["input_ids"][row, start:end]
    return batch | {"labels": labels}


def training_examples(first: int, size: int = 24):
    rng = np.random.default_rng(first)
    for seed in range(first, first + size):
        scene = make_scene(seed)
        questions = ask_questions(scene.objects, rng)
        yield scene, questions[rng.integers(len(questions))]


def test_lora_recovers_a_damaged_adapter(model, processor, questions):
    """The projector is spoilt; LoRA on it, trained with pruning on, mends it in part."""
    torch.manual_seed(0)
    damaged = copy.deepcopy(model)
    damaged.config.fsr_config.num_visual_tokens = 48
    held_out = labelled(processor, questions)
    weight = damaged.model.multi_modal_projector.linear_2.weight
    with torch.no_grad():
        whole = damaged(**held_out).loss.item()
        noise = torch.randn(len(weight), 8) @ torch.randn(8, weight.shape[1])
        weight += 8 * noise * weight.norm() / noise.norm()
        before = damaged(**held_out).loss.item()
    assert before > 2 * whole
    projector = r".*multi_modal_projector\.linear_[12]"
    adapted = get_peft_model(damaged, LoraConfig(r=16, lora_alpha=32, target_modules=projector, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    for step in range(30):
        adapted.train()
        adapted(**labelled(processor, list(training_examples(24 * step)))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = adapted.eval().merge_and_unload()(**held_out).loss.item()
    assert after - whole < 0.7 * (before - whole), (whole, before, after)
