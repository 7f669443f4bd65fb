"""The commands `demo` and `explain`, the small LLaVAs that they are shown on, and their refusals."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPModel, LlavaForConditionalGeneration, LlavaProcessor
from typer.testing import CliRunner

from fsr_hf import export
from fsr_hf.cli import app
from fsr_hf.demo.run import PICTURES, run_demo
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder
from fsr_hf.hub.families import FAMILIES
from fsr_hf.testing.small_llava import TINY, SmallLlava, save_small_llava


QUESTION = "Which colour is it?"
PATCHES, PATCH = 24, 14


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny LLaVA: `stock`, its `clip`, and `fsr`, the export of both."""
    root = tmp_path_factory.mktemp("small")
    save_small_llava(root / "stock", root / "clip", TINY)
    some_are_dropped = {"kappa": 1.0}  # by default all are merged
    export(root / "stock", root / "fsr", text_encoder=root / "clip", fsr_config=some_are_dropped, progress=False)
    return root


@pytest.fixture(scope="module")
def mosaic(folders):
    """A picture of 336 pixels, which the processor neither resizes nor crops, one colour a patch; and the colours."""
    colours = np.random.default_rng(0).integers(0, 256, (PATCHES, PATCHES, 3), dtype=np.uint8)
    Image.fromarray(colours.repeat(PATCH, 0).repeat(PATCH, 1)).save(folders / "mosaic.png")
    return folders / "mosaic.png", colours


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", [[], ["export"], ["demo"], ["explain"], ["space"]])
def test_help_has_an_example_or_the_commands(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    words = ("export", "demo", "explain") if not command else (f"fsr-hf {command[0]}",)
    if command != ["export"]:
        assert all(word in result.output for word in words)


@pytest.mark.parametrize("command", [[], ["export"]])
def test_help_covers_the_families(command):
    lines = invoke(*command, "--help").output.splitlines()
    names = ("LLaVA-1.5", "LLaVA-NeXT", "Qwen2.5-VL", "Qwen3-VL", "LLaVA-Video")
    for name, family in zip(names, FAMILIES, strict=True):
        (line,) = [line for line in lines if line.startswith(f"    {name} ")]
        budget = family.config().fsr_config
        default = f"{budget.num_visual_tokens} tokens" if budget.num_visual_tokens else None
        default = default or str(Fraction(budget.retention_ratio).limit_denominator(10))
        assert f"  {default}  " in line and line.endswith("videos") == (name in names[2:])
        assert len(line) <= 80


# ---------------------------------------------------------------------- the small LLaVA


def test_the_small_llava_is_a_stock_llava_with_the_proportions_of_llava_1_5(folders):
    model, info = LlavaForConditionalGeneration.from_pretrained(folders / "stock", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    vision = model.config.vision_config
    assert (vision.image_size, vision.patch_size, model.config.vision_feature_layer) == (336, 14, -2)
    processor = LlavaProcessor.from_pretrained(folders / "stock")
    inputs = processor(
        images=Image.new("RGB", (640, 480)), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576

    clip = CLIPModel.from_pretrained(folders / "clip")
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        of_clip = clip.vision_model(pixels, output_hidden_states=True).hidden_states
        of_llava = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(of_clip, of_llava))


def test_the_small_tokenizer_knows_words_and_spells_the_rest(folders):
    tokenizer = LlavaProcessor.from_pretrained(folders / "stock").tokenizer
    ids = tokenizer("the cup is red", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁the", "▁cup", "▁is", "▁red"]
    for text in ("a cupboard, isn't it?", "Größe: 3 µm\n名前"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


# ---------------------------------------------------------------------- demo


def test_demo(capfd):
    """Right answers of the trained LLaVA with a ninth of the tokens, sizes of the larger one, and no warnings."""
    lines = []
    answers, costs = run_demo(device="cpu", repeats=1, echo=lines.append)
    assert capfd.readouterr().err == ""
    entries = json.loads((PICTURES / "questions.json").read_text())
    assert [(q["image"], q["question"]) for q in answers["questions"]] == [
        (e["image"], e["question"]) for e in entries
    ]
    for question, entry in zip(answers["questions"], entries):
        assert [run["answer"] for run in question["runs"].values()] == [entry["answer"]] * 2 == [question["right"]] * 2
    small = AutoModel.from_pretrained(shapes_vqa_folder()).config
    config, size = small.text_config, SmallLlava()
    for model, kept, (layers, width, bytes_each) in (
        (
            answers,
            [small.image_seq_length, small.image_seq_length // 9],
            (config.num_hidden_layers, config.hidden_size, 2),
        ),
        (costs, [576, 192, 64], (size.num_layers, size.hidden_size, 4)),
    ):
        assert (model["model"], model["code"]) == ("FSRLlavaForConditionalGeneration", "modeling_fsr_llava")
        for question in model["questions"]:
            runs = list(question["runs"].values())
            assert [run["visual_tokens"] for run in runs] == kept
            assert len({run["length"] - run["visual_tokens"] for run in runs}) == 1  # the text
            assert [run["cache_bytes"] for run in runs] == [
                run["length"] * layers * 2 * width * bytes_each for run in runs
            ]
            assert min(run["prefill"] for run in runs) > 0
    text = "\n".join(lines)
    assert max(map(len, text.splitlines())) <= 100
    assert all(entry["question"] in text and entry["answer"] in text for entry in entries)
    assert "5 of 5 right   5 of 5 right" in text and "random" in text
    assert re.search(r"^FSR, 64 +64 +9\.0x ", text, flags=re.MULTILINE)


def test_demo_of_a_folder(folders):
    result = invoke("demo", folders / "fsr", "--max-new-tokens", 2, "--repeats", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "576" in result.output and "128" in result.output


def test_demo_refuses(folders):
    for folder, words in (("stock", "without FSR"), ("nowhere/at/all", "neither a folder nor")):
        result = invoke("demo", folders / folder)
        assert (result.exit_code, words in result.stderr) == (1, True), result.output


# ---------------------------------------------------------------------- explain


def selected(folder, image, **options):
    """Indices and focus of the kept tokens, and the anchors of the merged ones, asked of the model itself."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=f"USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=3, return_dict_in_generate=True, output_visual_selection=True, **options
    )
    return output.visual_selections[0]


def rings_and_middles(picture):
    """
    Median colour of the outline and of the inside of each cell, `(24, 24, 3)` each. The picture is 1000 pixels wide,
    so 24 cells of 38 pixels between margins of 44; the text above does not reach the right edge.
    """
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[1] == 1000
    top = int(np.flatnonzero((pixels[:, 950] != 255).any(-1))[0])
    cells = pixels[top : top + 912, 44:956].reshape(24, 38, 24, 38, 3).transpose(0, 2, 1, 3, 4)
    ring = np.zeros((38, 38), dtype=bool)
    ring[1:37, 1:37] = True
    ring[3:35, 3:35] = False
    inside = np.zeros((38, 38), dtype=bool)
    inside[8:30, 8:30] = True
    return np.median(cells[:, :, ring], 2), np.median(cells[:, :, inside], 2)


@pytest.mark.parametrize("budget", [None, 40])
def test_explain_draws_what_was_kept(folders, mosaic, tmp_path, budget):
    file, colours = mosaic
    options = {} if budget is None else {"num_visual_tokens": budget}
    arguments = [] if budget is None else ["--num-visual-tokens", budget]
    result = invoke(
        "explain", folders / "fsr", file, QUESTION, "-o", tmp_path / "out.png", "--max-new-tokens", 3, *arguments
    )
    assert result.exit_code == 0, result.output
    expected = selected(folders / "fsr", Image.open(file), **options)
    kept, focus = len(expected.indices), int(expected.is_focus.sum())
    merged = int((expected.merged_into >= 0).sum())
    assert kept == (budget or 128) and 0 < focus < kept and merged > 0
    assert f"{kept} of 576 visual tokens kept, {focus} Focus and {kept - focus} Scan; {merged} merged" in result.output

    rings, middles = rings_and_middles(Image.open(tmp_path / "out.png"))
    rings, middles, seen = rings.reshape(576, 3), middles.reshape(576, 3), colours.reshape(576, 3).astype(float)
    fate = np.array(["dropped"] * 576, dtype=object)
    fate[expected.indices.numpy()] = np.where(expected.is_focus.numpy(), "focus", "scan")
    fate[(expected.merged_into >= 0).numpy()] = "merged"
    orange, blue, dark = (np.array(c) for c in ((250, 130, 16), (40, 135, 240), (14, 18, 26)))
    assert abs(rings[fate == "focus"] - orange).max() < 4
    assert abs(rings[fate == "scan"] - blue).max() < 4
    # A line may run along a row of cells and through a median, but not through many.
    for name, colour, share in (
        ("focus", orange, 0.75),
        ("scan", blue, 0.75),
        ("merged", dark, 0.6),
        ("dropped", dark, 0.36),
    ):
        wanted = colour + share * (seen[fate == name] - colour)
        close = (abs(middles[fate == name] - wanted).max(-1) < 14).mean()
        assert close > 0.9, (name, close)


@pytest.mark.parametrize("name", ["out.jpg", "out.webp"])
def test_explain_writes_other_formats(folders, mosaic, tmp_path, name):
    result = invoke("explain", folders / "fsr", mosaic[0], QUESTION, "-o", tmp_path / name, "--max-new-tokens", 1)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / name).width == 1000


def test_explain_refuses(folders, mosaic, tmp_path):
    image = mosaic[0]
    (tmp_path / "words.png").write_text("no picture")
    for arguments, code, words in (
        ((folders / "fsr", tmp_path / "missing.png", QUESTION), 2, "no file"),
        ((folders / "fsr", tmp_path / "words.png", QUESTION), 2, "not an image"),
        ((folders / "fsr", image, QUESTION, "-o", tmp_path / "out.gif"), 2, ".webp"),
        ((folders / "fsr", image, QUESTION, "-o", tmp_path / "no" / "out.png"), 2, "no folder"),
        ((folders / "stock", image, QUESTION), 1, "without FSR"),
        ((tmp_path, image, QUESTION), 1, "model_type"),
        ((tmp_path / "no" / "such" / "model", image, QUESTION), 1, "neither a folder nor"),
        ((folders / "fsr", image, QUESTION, "--num-visual-tokens", 0), 1, "num_visual_tokens=0"),
        ((folders / "fsr", image, QUESTION, "--num-visual-tokens", 9, "--retention-ratio", 0.5), 1, "both set"),
        ((folders / "fsr", image, QUESTION, "--device", "abacus"), 1, "device"),
    ):
        if "-o" not in arguments:
            arguments += ("-o", tmp_path / "out.png")
        result = invoke("explain", *arguments)
        assert result.exit_code == code, (arguments, result.output)
        message = [line for line in result.stderr.splitlines() if line.startswith("fsr-hf: ")]
        assert len(message) == 1 and words in message[0], (arguments, result.stderr)
        assert "Traceback" not in result.output
    assert not (tmp_path / "out.png").exists()
