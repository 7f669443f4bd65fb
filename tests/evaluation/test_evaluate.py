"""
`fsr-hf eval` from end to end: the model that comes with the package answers questions about drawn pictures, and small
models of the other families see how many tokens they should.
"""

import json
import os
import shutil

import pytest
import torch
from clips import write_clip
from drawn_questions import make_inputs
from isolated import ROOT, run_python
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, LlavaConfig
from typer.testing import CliRunner

import fsr_hf
from examples.shapes_vqa.data import held_out_questions
from fsr_hf.cli import app
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder
from fsr_hf.evaluation import answering, evaluate
from fsr_hf.evaluation.questions import load_questions
from fsr_hf.testing.small_families import export_small_model


QUESTIONS, BATCH = 18, 4
BUDGETS = {"unpruned": 144, "48": 48, "0.1": 14}  # visual tokens of 144
OPTIONS = (
    "--budgets",
    "0.1,48",
    "--max-new-tokens",
    6,
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--batch-size",
    BATCH,
)


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fsr_hf.export(shapes_vqa_folder(), tmp_path_factory.mktemp("eval") / "shapes", progress=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for number, (scene, asked) in enumerate(held_out_questions(3, QUESTIONS)):
        scene.image.save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": asked.text, "answer": asked.answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "questions.jsonl"


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "eval"
    result = invoke(model, "--data", data, "--output", output, "--keep", 0.3, *OPTIONS)
    assert result.exit_code == 0, result.output
    return output, result.stdout


@pytest.fixture(scope="module")
def asked_alone(model, data):
    """Answer, and entries of the cache after the prompt, for each budget of each question: one call of generate()."""
    loaded = AutoModel.from_pretrained(model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model)
    options = {"unpruned": {"fsr_enabled": False}, "48": {"num_visual_tokens": 48}, "0.1": {"retention_ratio": 0.1}}
    found = []
    for line in read_lines(data):
        inputs = make_inputs(processor, data.parent / line["image"], line["question"])
        length = inputs["input_ids"].shape[1]
        answers = {}
        for label, budget in options.items():
            tokens = loaded.generate(**inputs, **budget, max_new_tokens=6, do_sample=False)[0, length:]
            answers[label] = processor.decode(tokens, skip_special_tokens=True).strip(), length - 144 + BUDGETS[label]
        found.append(answers)
    return found


def test_answers_tokens_and_scores(finished, data, asked_alone):
    output, _ = finished
    entries, lines = read_lines(output / "answers.jsonl"), read_lines(data)
    assert len(entries) == QUESTIONS
    for entry, line, alone in zip(entries, lines, asked_alone):
        assert (entry["question"], entry["answers"]) == (line["question"], [line["answer"]])
        for label, (answer, length) in alone.items():
            method = entry["methods"][label]
            assert method["answer"] == answer
            assert (method["visual_tokens"], method["prompt_tokens"]) == (BUDGETS[label], length)
            assert method["score"] == (answer.lower() == line["answer"].lower())
    report = json.loads((output / "report.json").read_text())
    assert [method["budget"] for method in report["methods"]] == ["unpruned", "48", "0.1"]
    for method in report["methods"]:
        right = sum(
            alone[method["budget"]][0].lower() == line["answer"].lower() for alone, line in zip(asked_alone, lines)
        )
        assert method["score"] == pytest.approx(right / QUESTIONS)
        assert method["visual_tokens"] == BUDGETS[method["budget"]]
        assert method["prefill"] > 0 and method["decode"] > 0
    unpruned, first, _ = report["methods"]
    assert unpruned["score"] > 0.7  # the model can do it
    assert first["change"] == pytest.approx(first["score"] - unpruned["score"])
    assert first["change_low"] <= first["change"] <= first["change_high"]
    assert first["kept_at_least"] < first["kept"] == pytest.approx(first["score"] / unpruned["score"])
    assert report["smallest_budget"] in ("48", "0.1") and report["pictures"] == QUESTIONS


def test_what_is_printed_and_drawn(finished):
    output, printed = finished
    report = json.loads((output / "report.json").read_text())
    assert max(map(len, printed.splitlines()[:12])) <= 125
    for method in report["methods"]:
        (row,) = [line.split() for line in printed.splitlines() if line.split()[:1] == [method["budget"]]]
        assert row[1:3] == [str(BUDGETS[method["budget"]]), f"{method['score']:.1%}"]
    assert f"95 % confidence: {report['smallest_budget']}." in printed
    with Image.open(output / "report.png") as plot:
        assert min(plot.size) > 500 and len(plot.convert("RGB").getcolors(1 << 20)) > 20


def test_an_interrupted_run_goes_on(finished, model, data, tmp_path, monkeypatch):
    output = shutil.copytree(finished[0], tmp_path / "eval")
    file = output / "records-0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 3 * 5  # five batches, three budgets
    file.write_text("".join(lines[:7]) + lines[7][:40])
    for name in ("report.json", "answers.jsonl"):
        (output / name).unlink()
    calls = []

    def counted(*arguments):
        calls.append(arguments[3:])
        return answering.answer(*arguments)

    monkeypatch.setattr(evaluate, "answer", counted)
    result = invoke(model, "--data", data, "--output", output, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert sum(tokens == 6 for _, tokens in calls) == 8  # the others warm up
    assert "2 of 5 batches are done" in result.stdout
    assert (output / "answers.jsonl").read_bytes() == (finished[0] / "answers.jsonl").read_bytes()

    def fail(*_, **__):
        raise AssertionError("nothing is left to answer")

    monkeypatch.setattr(AutoModel, "from_pretrained", fail)
    result = invoke(model, "--data", data, "--output", output, *OPTIONS, "--metric", "contains")
    assert result.exit_code == 0 and "score: contains" in result.stdout
    for more, expected in ((("--num-frames", 4), "num_frames: 16 there, 4 now"), (("--max-new-tokens", 5), "max_new")):
        result = invoke(model, "--data", data, "--output", output, *OPTIONS, *more)
        assert result.exit_code == 1 and "another run" in result.stderr and expected in result.stderr
    file.write_text("no record\n" + file.read_text())
    result = invoke(model, "--data", data, "--output", output, *OPTIONS)
    assert result.exit_code == 1 and "records-0.jsonl, line 1 is damaged" in result.stderr


def test_other_files_are_another_run(model, data, tmp_path):
    """Whatever is in a small file, and not its size alone."""
    folder = shutil.copytree(model, tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    digest = evaluate.digest_model(str(folder), config)
    assert digest == evaluate.digest_model(str(model), config)
    (folder / "query_tokenizer" / "tokenizer.json").open("a").write(" ")
    assert digest != evaluate.digest_model(str(folder), config)

    picture = tmp_path / "picture.bmp"
    (tmp_path / "questions.jsonl").write_text('{"image": "picture.bmp", "question": "Which colour?", "answer": "red"}')
    digests = set()
    for color in ("red", "blue"):
        Image.new("RGB", (30, 20), color).save(picture)
        digests.add(evaluate._digest_questions(load_questions(tmp_path / "questions.jsonl")))
    assert len(digests) == 2


def test_an_image_that_the_processor_refuses_is_named_before_a_model_is_loaded(tmp_path, monkeypatch):
    """Found on the way, it would cost the answers so far: with the line mended, it is another run."""
    folder = export_small_model("fsr_qwen2_5_vl", tmp_path / "model")
    lines = []
    for name, size in (("usual", (60, 60)), ("long", (600, 6)), ("narrow", (900, 2))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
        lines.append(json.dumps({"image": f"{name}.png", "question": "what ?", "answer": "a cat"}))
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(lines))
    monkeypatch.setattr(AutoModel, "from_pretrained", None)
    result = invoke(folder, "--data", file, "--budgets", "0.5", "--output", tmp_path / "eval")
    assert result.exit_code == 1 and f"{file}, line 3: absolute aspect ratio must be" in result.stderr


def test_two_processes_find_the_same(finished, model, data, tmp_path):
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "fsr_hf"]
    command = [*launch, "eval", model, "--data", data, "--output", tmp_path / "eval", *OPTIONS]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = run_python("-m", *command, cwd=tmp_path, PYTHONPATH=path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.glob("eval/records-*")} == {"records-0.jsonl", "records-1.jsonl"}
    assert done.stdout.count("Written to") == 1
    assert (tmp_path / "eval" / "answers.jsonl").read_bytes() == (finished[0] / "answers.jsonl").read_bytes()


def test_a_family_that_this_version_does_not_have(model, data, tmp_path):
    """Its code comes with the folder."""
    folder = shutil.copytree(model, tmp_path / "other")
    for name in ("config.json", "configuration_fsr_llava.py"):
        file = folder / name
        file.write_text(file.read_text().replace('"fsr_llava"', '"fsr_other"'))
    result = invoke(folder, "--data", data, "--output", tmp_path / "eval", *OPTIONS)
    assert result.exit_code == 1 and not (tmp_path / "eval").exists()
    result = invoke(folder, "--data", data, "--output", tmp_path / "eval", *OPTIONS, "--trust-remote-code")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert [method["visual_tokens"] for method in report["methods"]] == list(BUDGETS.values())


def test_a_prompt_that_was_not_pruned_is_an_error(model, data, monkeypatch):
    loaded, processor = AutoModel.from_pretrained(model), AutoProcessor.from_pretrained(model)
    question = evaluate.load_questions(data)[0]
    inputs = answering.build_inputs(processor, [question], None, 16).to(loaded.dtype)
    generate = loaded.generate
    monkeypatch.setattr(
        loaded, "generate", lambda num_visual_tokens, **kwargs: generate(**{**kwargs, "fsr_enabled": False})
    )
    with pytest.raises(RuntimeError, match=r"at the budget 32 the language model saw \[1\d\d\] tokens"):
        answering.answer(loaded, processor, inputs, 32, 2)


# ---------------------------------------------------------------------- other families


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Pictures and a video: one picture, two, and four seconds."""
    folder = tmp_path_factory.mktemp("mixed")
    Image.effect_noise((336, 336), 80).convert("RGB").save(folder / "a.png")
    Image.effect_noise((448, 280), 80).convert("RGB").save(folder / "b.png")
    write_clip(folder / "clip.mp4", num_frames=10, rate=4, size=(112, 112))
    lines = {
        "one": {"image": "a.png", "question": "what is it ?", "answer": "a cat"},
        "two": {"images": ["a.png", "b.png"], "question": "are they alike ?", "answers": ["no", "not"]},
        "video": {"video": "clip.mp4", "question": "what happens ?", "answer": "nothing"},
    }
    return folder, lines


# Visual tokens unpruned: pixels / 28² of Qwen2.5-VL; of a video, in half as many frames, at least; 14 rows of 15 in a
# frame of LLaVA-Video; LLaVA-1.5 has 24 x 24 of any picture.
@pytest.mark.parametrize(
    ("family", "names", "unpruned"),
    [
        ("fsr_llava", ("one", "two"), [576, 2 * 576]),
        ("fsr_qwen2_5_vl", ("one", "two", "video"), [144, 144 + 160, None]),
        ("fsr_llava_video", ("video",), [8 * 14 * 15]),
    ],
)
def test_families(family, names, unpruned, mixed, tmp_path):
    folder, lines = mixed
    data = folder / f"{family}.jsonl"
    data.write_text("".join(json.dumps(lines[name]) + "\n" for name in names))
    model = export_small_model(family, tmp_path / "model")
    options = ("--budgets", "6", "--max-new-tokens", 3, "--num-frames", 8, "--batch-size", 3, "--device", "cpu")
    result = invoke(model, "--data", data, "--output", tmp_path / "eval", *options, "--instruction", "in one word")
    assert result.exit_code == 0, result.output
    entries = read_lines(tmp_path / "eval" / "answers.jsonl")
    assert len(entries) == len(names)
    for name, entry, expected in zip(names, entries, unpruned):
        assert entry["methods"]["6"]["visual_tokens"] == (12 if name == "two" else 6)
        found = entry["methods"]["unpruned"]["visual_tokens"]
        assert found == expected if expected else found > 6
        tokens = [method["prompt_tokens"] - method["visual_tokens"] for method in entry["methods"].values()]
        assert tokens[0] == tokens[1]  # words


# ---------------------------------------------------------------------- bad input


def test_refuses_before_a_model_is_loaded(model, data, mixed, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(AutoModel, "from_pretrained", fail)
    folder, lines = mixed
    clip, bad = folder / "clip.jsonl", folder / "bad.jsonl"
    clip.write_text(json.dumps(lines["video"]))
    bad.write_text(json.dumps(lines["one"]) + '\n{"question": "what ?", "answer": "a cat"}\n')
    placeholder = folder / "placeholder.jsonl"
    placeholder.write_text(json.dumps({**lines["one"], "question": "<image> What ?"}))
    stock = tmp_path / "stock"
    LlavaConfig().save_pretrained(stock)
    for arguments, code, expected in (
        ((stock, "--data", data), 1, "`fsr-hf export` adds it"),
        ((model, "--data", data, "--budgets", "145,32"), 1, "--budgets 145 is above the number of visual tokens"),
        ((model, "--data", data, "--budgets", "0"), 2, "--budgets 0"),
        ((model, "--data", data, "--budgets", "32,32"), 1, "has one of them twice"),
        ((model, "--data", data, "--metric", "bleu"), 1, "choose one of exact, contains, anls"),
        ((model, "--data", data, "--keep", "98"), 1, "--keep 98.0 is out of range"),
        ((model, "--data", data, "--dtype", "int8"), 1, "--dtype int8"),
        ((model, "--data", data, "--device", "abacus"), 1, "abacus"),
        ((model, "--data", bad), 1, f"{bad}, line 2: has none of them"),
        ((model, "--data", clip), 1, f"{clip}, line 1: `video` is given"),
        ((model, "--data", placeholder), 1, f"{placeholder}, line 1: '<image> What ?' has '<image>'"),
        ((model, "--data", data, "--instruction", "<image>"), 1, "--instruction: '<image>' has '<image>'"),
        ((model, "--data", folder / "none.jsonl"), 1, "no such file"),
        ((tmp_path / "no" / "such" / "model", "--data", data), 1, "neither a folder nor"),
    ):
        result = invoke(*arguments, "--output", tmp_path / "eval")
        assert result.exit_code == code, (arguments, result.output, result.exception)
        (message,) = [line for line in result.stderr.splitlines() if line.startswith("fsr-hf: ")]
        assert expected in message, (arguments, message)
        assert not (tmp_path / "eval").exists()
