"""The data set of the small trained LLaVA, its tokenizers, and its training."""

import json
import re
from collections import Counter
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, LlavaForConditionalGeneration

from examples.shapes_vqa import clip as first_stage
from examples.shapes_vqa import llava as second_stage
from examples.shapes_vqa.clip import pixel_values
from examples.shapes_vqa.data import (
    COLORS,
    HELD_OUT_PAIRS,
    KINDS,
    SHAPES,
    ask_questions,
    caption,
    held_out_questions,
    make_scene,
    place_objects,
    words,
)
from examples.shapes_vqa.optimizer import MasterAdamW
from examples.shapes_vqa.recipe import RECIPES, Recipe
from examples.shapes_vqa.scenes import Scenes
from examples.shapes_vqa.train import run, run_from
from examples.shapes_vqa.vocabulary import make_clip_tokenizer, make_tokenizer
from fsr_hf import export


NUMBERS = ["zero", "one", "two", "three", "four", "five"]
TINY = Recipe(
    image_size=96,
    num_scenes=12,
    vision_width=64,
    vision_layers=2,
    text_width=64,
    text_layers=1,
    projection_dim=16,
    crop_batch=4,
    crop_steps=2,
    close_steps=2,
    scene_batch=3,
    scene_steps=2,
    width=64,
    intermediate=64,
    layers=2,
    sequence=220,
    answer_batch=2,
    answer_steps=4,
    dropped_steps=4,
    dropped_horizon=6,
    dropped_cooldown=2,
)


# ---------------------------------------------------------------------- data


def test_a_scene_is_its_seed():
    for split in ("train", "test"):
        first, second = make_scene(5, split=split), make_scene(5, split=split)
        assert first.objects == second.objects and first.image.tobytes() == second.image.tobytes()
    assert make_scene(5).objects == place_objects(5)
    assert make_scene(5).objects != make_scene(5, split="test").objects
    assert make_scene(5, size=288).image.size == (288, 288)
    assert [(o.shape, o.color, o.character) for o in make_scene(5, size=288).objects] == [
        (o.shape, o.color, o.character) for o in make_scene(5).objects
    ]
    with pytest.raises(ValueError, match="'validation'"):
        make_scene(5, split="validation")


def test_clip_is_not_told_of_the_held_out_pairs(tmp_path):
    scenes = Scenes(tmp_path, 400, 24)
    captioned = first_stage._captioned(scenes)
    pairs = [
        {item.pair for number in numbers for item in scenes.objects[number]} for numbers in (range(400), captioned)
    ]
    assert pairs[0] == {(shape, color) for shape in SHAPES for color in COLORS} == pairs[1] | HELD_OUT_PAIRS
    assert not pairs[1] & HELD_OUT_PAIRS
    rng = np.random.default_rng(0)
    by_pair = first_stage._by_pair(scenes, captioned)
    for drawn in (first_stage._draw(scenes, captioned, 500, rng), first_stage._draw_alike(by_pair, 500, rng)):
        assert {number for number, _ in drawn} <= set(captioned)
        assert all(item in scenes.objects[number] for number, item in drawn)


def test_an_object_is_drawn_where_and_as_it_is_told():
    hits = []
    for seed in range(60):
        scene = make_scene(seed)
        pixels = np.asarray(scene.image, dtype=float)
        for item in scene.objects:
            if item.shape not in ("square", "circle") or item.character or item.visible < 1:
                continue
            left, top, right, bottom = item.box
            middle = pixels[
                (top + bottom) // 2 - 2 : (top + bottom) // 2 + 2, (left + right) // 2 - 2 : (left + right) // 2 + 2
            ]
            distance = {name: np.abs(middle.mean((0, 1)) - value).sum() for name, value in COLORS.items()}
            hits.append(min(distance, key=distance.get) == item.color)
    assert len(hits) > 15 and all(hits)


def answer(question, objects) -> str:
    """An answer worked out from the words of the question alone."""
    text = re.sub(r"[?.]", "", question.text)
    shapes = [s for s in SHAPES if re.search(rf"\b{s}\b", text)]
    colors = [c for c in COLORS if re.search(rf"\b{c}\b", text)]
    if question.kind == "counting":
        things = [s for s in SHAPES if re.search(rf"\b{s}(es|s)\b", text)]
        return NUMBERS[sum(o.shape in (things or SHAPES) and o.color in (colors or COLORS) for o in objects)]
    named = [o for o in objects if o.shape in (shapes or SHAPES) and o.color in (colors or COLORS)]
    if question.kind == "existence":
        return "yes" if named else "no"
    (named,) = named
    if question.kind == "attribute":
        return named.color if shapes else named.shape
    if question.kind == "reading":
        assert ("digit" in text) == named.character.isdigit()
        return named.character
    signs = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    (sign,) = [sign for words, sign in signs.items() if words in text]
    x, y = named.center
    angles = []
    for other in objects:
        step = np.subtract(other.center, (x, y))
        if other is not named:
            angles.append(np.degrees(np.arccos(step @ np.array(sign) / np.linalg.norm(step))))
    assert sum(angle < 60 for angle in angles) == 1
    other = [other for other in objects if other is not named][int(np.argmin(angles))]
    return f"{other.color} {other.shape}"


def test_answers_are_right_and_balanced():
    counts: Counter = Counter()
    for seed in range(150):
        objects, rng = place_objects(seed), np.random.default_rng(seed)
        for question in ask_questions(objects, rng):
            assert answer(question, objects) == question.answer, (question, objects)
            named = question.kind in ("attribute", "relation", "reading") or question.answer == "yes"
            assert (question.target is not None) == named
            counts[question.kind, question.answer] += 1
    assert counts["existence", "yes"] == counts["existence", "no"] > 100
    assert {kind for kind, _ in counts} == set(KINDS)


def test_held_out_questions():
    first = list(held_out_questions(0, 20, 48))
    assert [q for _, q in first] == [q for _, q in held_out_questions(0, 20, 48)]
    assert Counter(q.kind for _, q in first) == dict.fromkeys(KINDS, 4)
    assert Counter(q.answer for _, q in first if q.kind == "existence") == {"yes": 2, "no": 2}
    other = {scene.image.tobytes() for scene, _ in held_out_questions(1, 20, 48)}
    assert not other & {scene.image.tobytes() for scene, _ in first}


def test_captions_name_every_object():
    for seed in range(80):
        objects, rng = place_objects(seed), np.random.default_rng(seed)
        text = caption(list(objects), rng)
        for item in objects:
            assert f"{item.color} {item.shape}" in text and (item.character or "") in text
        assert len(make_clip_tokenizer()(text).input_ids) <= 77


def test_every_word_is_one_token():
    clip_tokenizer, tokenizer = make_clip_tokenizer(), make_tokenizer()
    for word in words():
        assert len(clip_tokenizer.tokenize(word)) == 1, word
        assert tokenizer.tokenize(word) == ["▁" + word]
    text = " ".join(q.text for _, q in held_out_questions(0, 50, 24))
    assert {w.lower() for w in re.findall(r"\w+", text)} <= {w.lower() for w in words()}
    assert make_clip_tokenizer().get_vocab() == clip_tokenizer.get_vocab()  # a stopped run goes on with the same ids
    assert clip_tokenizer("a red star").input_ids[-1] == clip_tokenizer.eos_token_id


# ---------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    run(TINY, folder, compiled=False)
    return folder


def test_a_run_ends_in_stock_checkpoints(work):
    out = export(work / "llava", work / "fsr", text_encoder=work / "clip", base_model="shapes-vqa", progress=False)
    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.vision_feature_layer == -2
    scene = make_scene(0, 96)
    inputs = processor(
        images=scene.image, text="USER: <image>\nWhat colour is the star? ASSISTANT:", return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == TINY.num_patches == 64
    expected = pixel_values(torch.from_numpy(np.asarray(scene.image)[None].copy()), torch.float32)
    torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=1e-5)
    model.generate(**inputs.to(torch.bfloat16), num_visual_tokens=7, max_new_tokens=2)
    entries = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert entries[0]["seed"] == 0 and entries[0]["torch"] == version("torch")


@pytest.mark.parametrize("stage", ["llava", "llava-dropped"])
def test_a_stopped_run_goes_on(work, tmp_path, monkeypatch, stage):
    """Stopped in the middle of a stage, and started again: the same weights as without a stop."""
    save = torch.save

    def save_and_stop(state, file):
        save(state, file)
        if file.stem == stage and state["step"] == 3:  # the state of step 2 is the last that is in place
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("examples.shapes_vqa.optimizer.SAVE_EVERY", 1)
        patch.setattr(torch, "save", save_and_stop)
        run(TINY, tmp_path, compiled=False)
    assert torch.load(tmp_path / f"{stage}.pt", weights_only=True)["step"] == 2
    run(TINY, tmp_path, compiled=False)
    straight, resumed = (
        LlavaForConditionalGeneration.from_pretrained(folder / "llava").state_dict() for folder in (work, tmp_path)
    )
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_third_stage_alone(work, tmp_path):
    """It trains projector and language model of a Hub folder, and nothing else."""
    out = export(work / "llava", tmp_path / "fsr", text_encoder=work / "clip", progress=False)
    before = AutoModel.from_pretrained(out).state_dict()
    after = run_from(out, TINY, tmp_path / "work", compiled=False).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"lm_head", "model"}
    parts = {"lm_head", "language_model", "multi_modal_projector"}
    assert all(parts & set(name.split(".")) for name in changed) and parts <= {
        p for n in changed for p in n.split(".")
    }


def test_the_learning_rate_of_the_third_stage():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = MasterAdamW([weight], 1.0, 100, last_step=50, cooldown=10)
    rates = []
    for _ in range(50):
        rates.append(optimizer.optimizer.param_groups[0]["lr"])
        weight.grad = torch.ones(2)
        optimizer.step()
    cosine = [0.01 + 0.99 * (1 + np.cos(np.pi * step / 100)) / 2 for step in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, cosine[4]])
    assert rates[5:41] == pytest.approx(cosine[5:41])
    assert rates[41:] == pytest.approx([cosine[step] * (50 - step) / 10 for step in range(41, 50)])


def test_another_recipe_is_refused_in_the_same_folder(work):
    with pytest.raises(ValueError, match="another recipe"):
        run(replace(TINY, num_scenes=13), work, compiled=False)


def test_a_packed_question_is_asked_as_the_stock_model_would_be(work):
    """The same logits as the stock class gives for the question alone, whatever else is in the row."""
    model = LlavaForConditionalGeneration.from_pretrained(work / "llava", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(work / "llava")
    packer = second_stage._Packer(processor.tokenizer, TINY)
    scene = make_scene(1, 96)
    prompt = "\nWhat colour is the star? ASSISTANT:"
    inputs = processor(images=scene.image, text=f"USER: <image>{prompt}", return_tensors="pt")
    ids, others = (
        packer._after("USER: <image>", prompt),
        packer._after("USER: <image>", "\nCount the hearts. ASSISTANT:"),
    )
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1]
        hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        model.set_attn_implementation("eager")

        def last(input_ids, turns):
            row = torch.tensor([input_ids]), torch.tensor([turns])
            return model.lm_head(second_stage._decode(model, hidden, torch.tensor(packer.before_image), *row))[0]

        first = [1] * len(ids)
        alone = last(ids, first)[-1]
        packed = last(ids + others, first + [2] * len(others))
        chat = last(ids + others, [0] * (len(ids) + len(others)))
        swapped = last(ids[::-1] + others, first + [2] * len(others))
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[len(ids) - 1], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[-1], swapped[-1], rtol=0, atol=1e-5)  # it does not see the first question
    assert (packed[-1] - chat[-1]).abs().max() > 1e-4  # in a conversation it does


def test_a_picture_that_lacks_tokens_is_seen_as_the_stock_model_would_see_it(work):
    model = LlavaForConditionalGeneration.from_pretrained(work / "llava", dtype=torch.float32)
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 64, TINY.vision_width, generator=generator)
    kept = torch.stack([torch.randperm(64, generator=generator)[:20].sort().values for _ in range(2)])
    before, after = torch.tensor([1, 5, 9]), torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    language_model, embed = model.model.language_model, model.get_input_embeddings()
    with torch.no_grad():
        hidden = second_stage._decode(
            model, features, before, after, torch.zeros_like(after), kept, torch.tensor([True, False])
        )
        for row, tokens in enumerate(kept):
            image = model.model.multi_modal_projector(features[row, tokens])
            embeds = torch.cat([embed(before), image, embed(after[row])])[None]
            places = torch.cat([torch.arange(3), 3 + tokens, torch.arange(67, 71)]) if row == 0 else torch.arange(27)
            expected = language_model(
                inputs_embeds=embeds, position_ids=places[None], attention_mask=torch.ones(1, 27), use_cache=False
            ).last_hidden_state
            torch.testing.assert_close(hidden[row], expected[0, -4:], rtol=0, atol=1e-5)


def test_which_tokens_are_dropped():
    recipe, rng = RECIPES["cpu"], np.random.default_rng(0)
    budgets = [second_stage.random_budget(144, rng) for _ in range(2000)]
    assert min(budgets) == 8 and max(budgets) == 144
    assert budgets.count(144) == pytest.approx(500, abs=60) and np.median([b for b in budgets if b < 144]) < 40
    objects, shares = place_objects(3), []
    for _ in range(300):
        kept = second_stage.random_tokens(recipe, objects, 30, rng)
        assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == 30 and 0 <= kept[0] <= kept[-1] < 144
        centers = [((token % 12 + 0.5) * 12, (token // 12 + 0.5) * 12) for token in kept]
        hits = [any(o.box[0] <= x <= o.box[2] and o.box[1] <= y <= o.box[3] for o in objects) for x, y in centers]
        shares.append(np.mean(hits))
    covered = np.mean(
        [
            any(o.box[0] <= x <= o.box[2] and o.box[1] <= y <= o.box[3] for o in objects)
            for x in range(6, 144, 12)
            for y in range(6, 144, 12)
        ]
    )
    # From the share of the picture that is on objects, as by chance, to most of the budget.
    assert covered < np.quantile(shares, 0.1) + 0.1 and np.quantile(shares, 0.9) > 1.5 * covered
    assert second_stage.random_tokens(recipe, (), 144, rng).tolist() == list(range(144))


def test_labels_are_the_answers_and_the_end_of_text():
    tokenizer = make_tokenizer()
    packer = second_stage._Packer(tokenizer, RECIPES["cpu"])
    questions = ask_questions(place_objects(3), np.random.default_rng(3))
    seen = set()
    for seed in range(20):
        input_ids, turns, labels, kinds = packer.pack(questions, np.random.default_rng(seed))
        assert len(input_ids) == len(turns) == len(labels) == len(kinds) == packer.length
        said = tokenizer.decode([label for label in labels if label >= 0]).split("</s>")[:-1]
        asked = re.findall(
            r"(?:\n|USER: )([^\n]*?[?.]) ASSISTANT: ([\w ]*?)(?= USER:|\n|<unk>|$)", tokenizer.decode(input_ids)
        )
        assert [answer.strip() for answer in said] == [answer for _, answer in asked]
        right = {(q.text, q.answer) for q in questions}
        assert set(asked) <= right and len(asked) >= 8
        seen.add(max(turns))
    assert 0 in seen and len(seen) > 1  # conversations, and questions by themselves
