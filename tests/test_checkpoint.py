"""The trained LLaVA that comes with the package: right answers, in every way in which a model is used."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from isolated import run_isolated
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from typer.testing import CliRunner

from examples.shapes_vqa.checkpoint import keep_data
from examples.shapes_vqa.data import ask_questions, held_out_questions, make_scene
from fsr_hf.cli import app
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder
from fsr_hf.hub.card_checks import check_card
from fsr_hf.hub.verify import check_loads, verify


ROOT = Path(__file__).parents[1]
FOLDER = shapes_vqa_folder()
SETTINGS = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "query_tokenizer/tokenizer.json",
    "query_tokenizer/tokenizer_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
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


def files_of(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_the_folder_holds_data_alone():
    """Weights and settings that the package's classes load. The package has the code, docs/ the results."""
    files = files_of(FOLDER)
    assert files == SETTINGS | {"README.md", "model.safetensors"}
    assert sum((FOLDER / name).stat().st_size for name in files) <= 15_000_000
    for file in FOLDER.rglob("*.json"):
        assert "auto_map" not in json.loads(file.read_text())
    model, info = AutoModelForImageTextToText.from_pretrained(FOLDER, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.config.fsr_config.num_visual_tokens == model.config.image_seq_length // 9


def test_the_readme_loads_it(monkeypatch):
    text = (FOLDER / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    monkeypatch.chdir(ROOT)
    exec(block, names)
    assert names["model"].config.model_type == "fsr_llava"
    text_config = names["model"].config.fsr_config.text_encoder_config
    assert names["processor"].query_tokenizer.vocab_size == text_config.vocab_size


def test_an_export_adds_the_code(tmp_path):
    """A Hub folder that loads without the package, and the way back: the data of it that git keeps."""
    command = re.search(r"^fsr-hf (export .*)$", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)[1]
    arguments = command.replace("checkpoints/shapes-vqa", str(FOLDER)).replace(" shapes-vqa-fsr", f" {tmp_path}/fsr")
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output
    folder = tmp_path / "fsr"
    assert verify(folder) == [] and check_loads(folder) == []
    assert "# Shapes-VQA with FSR" in (folder / "README.md").read_text()
    assert check_card((folder / "README.md").read_text(), folder) == []
    script = f"""
import sys
sys.modules["fsr_hf"] = None
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(type(model).__name__, type(processor).__name__, type(processor.query_tokenizer).__name__)
"""
    assert run_isolated("-c", script, home=tmp_path).split() == [
        "FSRLlavaForConditionalGeneration",
        "FSRLlavaProcessor",
        "CLIPTokenizer",
    ]

    keep_data(folder, tmp_path / "kept")
    assert files_of(tmp_path / "kept") == SETTINGS | {"model.safetensors"}
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    original = load_file(FOLDER / "model.safetensors")
    assert kept.keys() == original.keys() and all(torch.equal(kept[name], original[name]) for name in kept)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "kept" / name).read_text())


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
        weight += 4 * noise * weight.norm() / noise.norm()
        before = damaged(**held_out).loss.item()
    assert before > 2 * whole
    projector = r".*multi_modal_projector\.linear_[12]"
    adapted = get_peft_model(damaged, LoraConfig(r=16, lora_alpha=32, target_modules=projector, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-3)
    for step in range(30):
        adapted.train()
        adapted(**labelled(processor, list(training_examples(24 * step)))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = adapted.eval().merge_and_unload()(**held_out).loss.item()
    assert after - whole < 0.85 * (before - whole), (whole, before, after)
