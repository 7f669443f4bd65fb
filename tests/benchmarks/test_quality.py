"""The quality benchmark: its verdicts are those of `generate()`, its statistics those of another computation."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import quality, quality_page
from benchmarks.quality import METHODS, Tally
from examples.shapes_vqa.data import HELD_OUT_PAIRS, KINDS, held_out_questions
from fsr_hf import FSRLlavaConfig, select_visual_tokens
from fsr_hf.testing.small_families import export_small_model


NUM_TOKENS = 576


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_small_model("fsr_llava", tmp_path_factory.mktemp("quality") / "llava")


@pytest.fixture(scope="module")
def examples():
    return list(held_out_questions(3, 15, 336))


@pytest.fixture(scope="module")
def loaded(folder, examples):
    model, processor = quality.load(folder, "float32")
    # As it is saved, this model never ends. Now most of its answers end after a word or two.
    output = model.generate(
        **quality.prompts(processor, examples),
        max_new_tokens=4,
        do_sample=False,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    states = [step[-1][:, -1] for step in output.hidden_states]  # of the last layer, at the last place
    direction = torch.cat(states[2:]).mean(0) - states[0].mean(0)
    with torch.no_grad():
        length = 3 * model.lm_head.weight.norm(dim=-1).max() / direction.norm()
        model.lm_head.weight[processor.tokenizer.eos_token_id] = length * direction
    return model, processor


@pytest.fixture(scope="module")
def batch(loaded, examples):
    with torch.inference_mode():
        return quality.encode(*loaded, examples)


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("name", "num_kept", "options"),
    [
        ("unpruned", NUM_TOKENS, {"fsr_enabled": False}),
        ("fsr", 64, {"num_visual_tokens": 64}),
        ("fsr", 7, {"num_visual_tokens": 7}),
    ],
)
def test_a_verdict_is_that_of_generate(loaded, examples, name, num_kept, options):
    model, processor = loaded
    eos = processor.tokenizer.eos_token_id
    rewritten, expected = [], []
    for number, (scene, question) in enumerate(examples):
        inputs = quality.prompts(processor, [(scene, question)])
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)[0]
        new = output[inputs["input_ids"].shape[1] :].tolist()
        answer = processor.decode(new, skip_special_tokens=True).strip()
        if not answer:
            continue
        if number % 5 == 4:
            answer = f"{answer} red"
        elif number % 5 == 3 or new[-1] != eos:  # whether the whole would be right, the next token decides
            answer = answer.split()[0]
        question = copy.copy(question)
        object.__setattr__(question, "answer", answer)
        rewritten.append((scene, question))
        expected.append(answer == processor.decode(new, skip_special_tokens=True).strip())
    assert 3 <= sum(expected) <= len(expected) - 3
    with torch.inference_mode():
        batch = quality.encode(model, processor, rewritten)
        visual, indices = quality.select(model, METHODS[name], batch, num_kept)
        assert quality.is_right(model, batch, visual, indices if indices.numel() else None).tolist() == expected


def test_original_positions_are_those_of_the_whole_prompt(loaded, batch):
    """The hidden states are those of the whole prompt in which nothing sees the tokens that are not kept."""
    model = loaded[0]
    language_model = model.model.language_model
    hidden = []
    hook = language_model.register_forward_hook(lambda module, args, output: hidden.append(output.last_hidden_state))
    with torch.inference_mode():
        visual, indices = quality.select(model, METHODS["cls"], batch, 30)
        embed = model.get_input_embeddings()
        embeds = torch.cat([embed(batch.prefix).expand(15, -1, -1), batch.tokens, embed(batch.suffix)], dim=1)
        seen = torch.ones(15, embeds.shape[1], dtype=torch.bool)
        seen[:, len(batch.prefix) : len(batch.prefix) + NUM_TOKENS] = False
        seen.scatter_(1, len(batch.prefix) + indices, True)
        mask = (seen[:, None] & torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool).tril())[:, None]
        language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        first = quality.is_right(model, batch, visual, indices)
        second = quality.is_right(model, batch, visual.flip(1), indices.flip(-1))
        quality.is_right(model, batch, visual)
    hook.remove()
    expected, original, swapped, compact = hidden
    length = batch.suffix.shape[1]
    torch.testing.assert_close(original[:, -length:], expected[:, -length:], rtol=1e-3, atol=1e-3)
    assert torch.equal(original, swapped) and torch.equal(first, second)
    assert (compact - original).abs().max() > 1e-2


def test_what_two_methods_keep_alike_is_asked_once(loaded, batch, monkeypatch):
    model = loaded[0]
    visual, indices = quality.select(model, METHODS["fsr"], batch, 20)
    other = visual.clone()
    other[[2, 5, 11]] += 1
    asked = []

    def spy(model, batch, visual, indices=None):  # a verdict that tells the row by its answer, and the positions
        asked.append(len(visual))
        return (batch.answers[:, 0] % 2 == 0) ^ (indices is None)

    monkeypatch.setattr(quality, "is_right", spy)
    expected = batch.answers[:, 0] % 2 == 0
    first = quality._verdicts(model, batch, visual, indices, [])
    opposite = {mode: ~verdicts for mode, verdicts in first.items()}
    second = quality._verdicts(model, batch, other, indices, [(visual, indices, opposite)])
    moved = indices.clone()
    moved[4] += 1  # the same tokens from another place
    third = quality._verdicts(model, batch, visual, moved, [(visual, indices, opposite)])
    assert asked == [15, 15, 3, 3, 1, 1]
    changed = torch.zeros(15, dtype=torch.bool)
    changed[[2, 5, 11]] = True
    assert torch.equal(first["original"], expected) and torch.equal(first["compact"], ~expected)
    assert torch.equal(second["original"], expected ^ ~changed)
    assert torch.equal(third["compact"] == first["compact"], torch.arange(15) == 4)


def test_the_whole_picture_is_asked_about_once(loaded, batch, monkeypatch):
    asked = []
    monkeypatch.setattr(quality, "is_right", lambda model, batch, visual: asked.append(1) or batch.starts > 0)
    visual, indices = quality.select(loaded[0], METHODS["unpruned"], batch, NUM_TOKENS)
    right = quality._verdicts(loaded[0], batch, visual, indices, [])
    assert len(asked) == 1 and torch.equal(right["compact"], right["original"]) and right["compact"].all()


def test_fsr_selects_as_the_model_does(loaded, examples, batch):
    model, processor = loaded
    inputs = quality.prompts(processor, examples)
    output = model.generate(
        **inputs, max_new_tokens=1, num_visual_tokens=40, output_visual_selection=True, return_dict_in_generate=True
    )
    visual, indices = quality.select(model, METHODS["fsr"], batch, 40)
    for selection, chosen, features in zip(output.visual_selections, indices, visual):
        assert torch.equal(selection.indices, chosen)
        torch.testing.assert_close(selection.features, features)


def test_a_run_stops_where_generate_disagrees(loaded, examples, monkeypatch):
    monkeypatch.setattr(quality, "is_right", lambda model, batch, visual, indices: torch.ones(len(visual)) > 0)
    with pytest.raises(RuntimeError, match="another verdict on 30"):
        quality.check_generate(*loaded, examples, 64)


def test_batch(loaded, examples, batch):
    model, processor = loaded
    decode = processor.tokenizer.decode
    for row, (_, question) in enumerate(examples):
        answer = batch.answers[row][batch.answers[row] >= 0]
        assert answer[-1] == processor.tokenizer.eos_token_id
        start = batch.starts[row]
        assert decode(batch.suffix[row, :start]).strip() == f"{question.text} ASSISTANT:"
        assert torch.equal(batch.suffix[row, start : start + len(answer) - 1], answer[:-1])
        assert decode(answer[:-1]).strip() == question.answer
    assert decode(batch.prefix).strip() == "USER:"

    for row, (scene, question) in enumerate(examples):
        others = [item.box for number, item in enumerate(scene.objects) if number != question.target]
        covered = quality.object_patches(others, 24, 14).any(0) & (question.target is not None)
        assert torch.equal(batch.on_other[row], covered & ~batch.on_object[row])
    assert batch.on_other.any()

    # One picture by the modules of the tower, with its attention maps.
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    pixels = quality.prompts(processor, examples[:1])["pixel_values"]
    with torch.no_grad():
        output = tower(pixels, output_hidden_states=True, output_attentions=True)
        patches = output.hidden_states[-2][:, 1:]
        torch.testing.assert_close(batch.patches[:1], patches)
        torch.testing.assert_close(batch.tokens[:1], model.model.multi_modal_projector(patches))
        torch.testing.assert_close(batch.saliency[0], output.attentions[-2][0, :, 0, 1:].mean(0))
        block = tower.encoder.layers[-2]
        keys = block.self_attn.k_proj(block.layer_norm1(output.hidden_states[-3]))[0, 1:]
        torch.testing.assert_close(batch.keys[0], keys.view(NUM_TOKENS, block.self_attn.num_heads, -1).mean(1))
        clip = model.model.text_encoder
        joint = clip.visual_projection(tower.post_layernorm(patches[0]))
        ids = processor.query_tokenizer(examples[0][1].text, return_tensors="pt")["input_ids"]
        text = clip.text_projection(clip.text_model(ids).pooler_output)[0]
        torch.testing.assert_close(batch.cosine[0], torch.cosine_similarity(joint, text, dim=-1))

        # What a patch hands to [CLS] is what attention gives if there is nothing but this patch to look at.
        last = tower.encoder.layers[-1]
        handed = last.self_attn(last.layer_norm1(patches[0])[:, None])[0][:, 0]
        joint = clip.visual_projection(tower.post_layernorm(handed))
        by_value = torch.cosine_similarity(joint, text, dim=-1)
        torch.testing.assert_close(batch.value_cosine[0], by_value)
        ids = processor.query_tokenizer("", return_tensors="pt")["input_ids"]
        empty = clip.text_projection(clip.text_model(ids).pooler_output)[0]
        torch.testing.assert_close(
            batch.value_contrast[0], by_value - torch.cosine_similarity(joint, empty, dim=-1), atol=1e-5, rtol=1e-4
        )
        around = batch.value_contrast[0].view(24, 24)
        means = [around[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].mean() for r in range(24) for c in range(24)]
        torch.testing.assert_close(batch.relevance[0], torch.stack(means))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "unpruned"])
def test_every_method_keeps_what_it_is_asked_for(loaded, batch, name):
    generator = torch.Generator().manual_seed(0)
    visual, indices = quality.select(loaded[0], METHODS[name], batch, 20, generator)
    assert visual.shape == (15, 20, batch.tokens.shape[2]) and indices.shape == (15, 20)
    if METHODS[name].settings is None and not name.startswith("visionzip"):  # they merge
        kept = torch.stack([tokens[chosen] for tokens, chosen in zip(batch.tokens, indices)])
        torch.testing.assert_close(visual, kept)


DEFAULTS = {"focus_limit": 0.25, "uniform_scan": 1.0, "kappa": None}
PAPER = {"focus_limit": 1.0, "uniform_scan": 0.0, "kappa": 1.0}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fsr", {}),
        ("fsr-alpha0", {"alpha": 0}),
        ("fsr-beta0", {"beta": 0}),
        ("fsr-no-refine", {"kappa": 0}),
        ("fsr-kappa1", {"kappa": 1}),
        ("fsr-no-even", {"uniform_scan": 0}),
        ("fsr-rho0.5", {"rho": 0.5}),
        ("fsr-limit1", {"focus_limit": 1.0}),
        ("fsr-mass-budget", {"focus_mass": "budget"}),
    ],
)
def test_variants_of_fsr(loaded, batch, name, settings):
    expected = select_visual_tokens(batch.tokens, batch.saliency, batch.relevance, 20, **DEFAULTS | settings)
    visual, indices = quality.select(loaded[0], METHODS[name], batch, 20)
    assert torch.equal(indices, expected.indices) and torch.equal(visual, expected.features)


def test_other_variants_of_fsr(loaded, batch):
    model = loaded[0]
    for name, relevance, settings in (
        ("fsr-states", batch.cosine, DEFAULTS),
        ("fsr-negated", -batch.cosine, DEFAULTS),
        ("fsr-paper", batch.cosine, PAPER),
        ("fsr-earlier", -batch.cosine, PAPER | {"focus_limit": 0.5}),
    ):
        expected = select_visual_tokens(batch.tokens, batch.saliency, relevance, 20, **settings)
        assert torch.equal(quality.select(model, METHODS[name], batch, 20)[1], expected.indices)

    expected = select_visual_tokens(batch.patches, batch.saliency, batch.relevance, 20, **DEFAULTS)
    visual, indices = quality.select(model, METHODS["fsr-before-projector"], batch, 20)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(visual, model.model.multi_modal_projector(expected.features))

    priority = select_visual_tokens(batch.tokens, batch.saliency, batch.relevance, 20).priority.numpy()
    top = np.sort(np.argsort(-priority, axis=1, kind="stable")[:, :20], axis=1)
    assert quality.select(model, METHODS["fsr-no-scan"], batch, 20)[1].tolist() == top.tolist()


def test_the_model_has_the_defaults(loaded):
    config, default = loaded[0].config.fsr_config, FSRLlavaConfig().fsr_config
    names = ("alpha", "beta", "rho", "focus_mass", "relevance", *DEFAULTS)
    assert [getattr(config, name) for name in names] == [getattr(default, name) for name in names]
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


# ---------------------------------------------------------------- measures


def test_object_patches():
    generator = np.random.default_rng(0)
    boxes = [
        tuple(sorted(generator.integers(0, 61, 2))) + tuple(sorted(generator.integers(0, 61, 2))) for _ in range(20)
    ]
    boxes = [(left, top, right, bottom) for left, right, top, bottom in boxes]
    found = quality.object_patches([*boxes, None], 5, 12)
    assert found.shape == (21, 25) and not found[-1].any()
    for (left, top, right, bottom), row in zip(boxes, found):
        pixels = np.zeros((60, 60), dtype=bool)
        pixels[top:bottom, left:right] = True
        share = pixels.reshape(5, 12, 5, 12).mean((1, 3)).flatten()
        assert row.tolist() == (share >= 0.5).tolist()


@pytest.mark.parametrize("mass", ["all", "budget"])
@pytest.mark.parametrize("rho", [0.5, 0.9, 1.0])
def test_focus_sizes(rho, mass):
    generator = torch.Generator().manual_seed(0)
    features, saliency = torch.randn(20, 50, 6, generator=generator), torch.rand(20, 50, generator=generator) ** 6
    relevance = torch.randn(20, 50, generator=generator)
    for num_kept in (1, 10, 49):
        selection = select_visual_tokens(
            features, saliency, relevance, num_kept, rho=rho, focus_limit=1.0, focus_mass=mass
        )
        sizes = quality.focus_sizes(selection.priority, num_kept, rho=rho, focus_mass=mass)
        assert torch.equal(sizes.clamp(max=num_kept), selection.is_focus.sum(-1))


def test_area_under_curve():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (4, 30), generator=generator).float()
    on_object = torch.rand(4, 30, generator=generator) < 0.3
    on_object[3] = False
    others = ~on_object & (torch.rand(4, 30, generator=generator) < 0.5)
    areas = quality.area_under_curve(scores, on_object, others).tolist()
    for row, inside, outside, area in zip(scores.tolist()[:3], on_object.tolist(), others.tolist(), areas):
        ones, others = ([s for s, chosen in zip(row, side) if chosen] for side in (inside, outside))
        wins = [1.0 if one > other else 0.5 if one == other else 0.0 for one in ones for other in others]
        assert area == pytest.approx(sum(wins) / len(wins))
    assert np.isnan(areas[3])


def test_intervals():
    # Wilson's for 8 of 10, Student's with two degrees of freedom, and that of a mean, from tables.
    assert quality.binomial(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert quality.binomial(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert quality.over_seeds([0.7, 0.8, 0.9]) == pytest.approx([0.8 - 0.24841, 0.8 + 0.24841], abs=1e-4)
    assert quality.over_seeds([0.7]) is None
    values = quality.paired(torch.tensor([1.0, 0.0, -1.0, 1.0]).double())
    assert values["mean"] == 0.25
    assert values["interval"] == pytest.approx([0.25 - 0.93833, 0.25 + 0.93833], abs=1e-4)


def test_summary():
    asked = [(seed, kind) for seed in (4, 9) for kind in KINDS for _ in range(10)]

    def right(compact, original=None):  # of ten questions of each kind, for each seed
        return {
            mode: [torch.tensor([position < number for number in numbers * 2 for position in range(10)])]
            for mode, numbers in (("compact", compact), ("original", original or compact))
        }

    tallies = {
        ("unpruned", 144): Tally(right((10, 8, 10, 5, 10))),
        ("fsr", 16): Tally(right((10, 4, 9, 1, 8)), [torch.tensor([0.5, np.nan, 1.0])]),
        ("random", 16): Tally(right((5, 4, 9, 1, 8), (10, 4, 9, 1, 9))),
    }
    tallies["fsr", 16].focus = {"with_query": [torch.tensor([4, 4, 8, 16, 40])]}
    summary = quality.summarize(tallies, asked, 144)
    unpruned, fsr, random = summary["results"]
    assert unpruned["accuracy"] == pytest.approx(43 / 50) and unpruned["retained"] == 1
    assert "against_fsr" not in unpruned and unpruned["budget"] == 144
    assert fsr["accuracy"] == pytest.approx(32 / 50) and fsr["retained"] == pytest.approx(32 / 43)
    assert fsr["by_kind"] == pytest.approx(dict(zip(KINDS, (1.0, 0.4, 0.9, 0.1, 0.8))))
    assert fsr["by_seed"] == pytest.approx([0.64, 0.64]) and fsr["interval"] == pytest.approx([0.64, 0.64])
    assert summary["left_out"] == pytest.approx({"relation": 0.5})
    kinds = ("attribute", "existence", "counting", "reading")
    assert fsr["retained_by_kind"] == pytest.approx(dict(zip(kinds, (1.0, 0.5, 0.9, 0.8))))
    assert fsr["object_recall"] == pytest.approx(0.75) and "object_recall" not in random
    assert fsr["focus"]["with_query"] == pytest.approx(
        {"median": 0.25, "low": 0.25, "high": 0.25, "at_limit": 0.6, "scan_empty": 0, "tokens": 8}
    )
    modes = random["positions"]
    assert modes["compact"]["accuracy"] == random["accuracy"] == pytest.approx(27 / 50)
    assert modes["original"]["accuracy"] == pytest.approx(33 / 50)
    assert modes["original"]["gain_over_compact"]["mean"] == pytest.approx(6 / 50)
    assert modes["original"]["against_fsr"]["mean"] == pytest.approx(1 / 50)
    assert modes["compact"]["against_fsr"] == random["against_fsr"]
    other = quality.summarize(tallies, asked, 144, "original")["results"][2]
    assert other["accuracy"] == pytest.approx(33 / 50) and other["by_kind"]["attribute"] == 1
    difference = random["against_fsr"]
    assert difference["mean"] == pytest.approx(-0.1)
    assert difference["interval"][0] == pytest.approx(-0.1 - 1.959964 * 0.3015113 / 10, abs=1e-5)


# ---------------------------------------------------------------- command line and page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "fsr,nothing"], "unknown method 'nothing'; known are unpruned, random"),
        (["--budgets", "half"], "budget 'half' is neither"),
        (["--budgets", "0"], "budget '0' must keep 1 to 575 of the 576 tokens"),
        (["--budgets", "8,576"], "budget '576' must keep 1 to 575"),
        (["--budgets", "1/2000"], "budget '1/2000' must keep"),
        (["--seed", "1", "--seeds", "1,2"], "give --seed or --seeds"),
        (["--seeds", "1,1"], "seeds must differ"),
        (["--seed", "-1"], "seeds must differ and be at least 0"),
        (["--questions", "3"], "--questions must be at least 5"),
        (["--dtype", "int8"], "--dtype int8 must be"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_refused_before_any_work(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(quality, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as error:
        quality.main(["--model", str(folder), *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_budgets():
    assert quality.parse_budgets("1/3,2/9,1/9,1/18", 576) == [192, 128, 64, 32]
    assert quality.parse_budgets(",".join(quality.BUDGETS), 144) == [48, 32, 16, 8]
    assert quality.parse_budgets("48, 1/3,7", 144) == [48, 7]


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A whole run of few questions, twice, the second time in other batches."""
    results = []
    for batch_size in ("4", "10"):
        file = tmp_path_factory.mktemp("run") / "quality.json"
        options = ["--seeds", "0,2", "--questions", "10", "--budgets", "1/9,8", "--dtype", "float32"]
        quality.main([*options, "--model", str(folder), "--batch-size", batch_size, "--json", str(file)])
        results.append(json.loads(file.read_text(encoding="utf-8")))
    return results


def test_a_run(runs):
    result = runs[0]
    assert result["num_tokens"] == NUM_TOKENS and result["questions"] == 10
    assert result["seed"] == 0 and result["seeds"] == [0, 2]
    assert {"fsr-hf", "python", "torch", "transformers"} <= result["versions"].keys() and result["machine"]
    assert result["checked"] == {"answers": 20, "agree": 20}
    keys = [(row["method"], row["budget"]) for row in result["results"]]
    others = [(name, budget) for name in METHODS if name != "unpruned" for budget in (64, 8)]
    assert sorted(keys) == sorted([("unpruned", NUM_TOKENS), *others])
    for row in result["results"]:
        assert {"accuracy", "retained", "by_kind", "interval"} <= row.keys()
        assert set(row["by_kind"]) == set(KINDS)
        assert ("focus" in row) == METHODS[row["method"]].has_focus
    assert result["left_out"].keys() == set(KINDS)  # the model is random
    pairs = result["pairs"]
    examples = [example for seed in (0, 2) for example in held_out_questions(seed, 10, 96)]
    named = [scene.objects[question.target].pair for scene, question in examples if question.target is not None]
    assert pairs["held_out"]["questions"] == sum(pair in HELD_OUT_PAIRS for pair in named)
    assert pairs["held_out"]["questions"] + pairs["others"]["questions"] == len(named) > 0
    assert 0 <= pairs["others"]["accuracy"] <= 1
    for areas in result["sign"].values():
        assert set(areas["auc"]) == {
            *("question", "name", "values", "contrast", "relevance", "saliency"),
            *("priority", "priority-states", "priority-negated"),
        }
    assert result["sign"]["all"]["questions"] >= result["sign"]["objects"]["questions"] > 0
    assert result["positions"] == FSRLlavaConfig().fsr_config.positions and result["fsr"]["focus_limit"] == 0.25


def test_batches_do_not_matter(runs):
    first, second = runs
    areas = [{name: area["mean"] for name, area in run["sign"]["objects"]["auc"].items()} for run in runs]
    assert areas[0] == pytest.approx(areas[1], abs=1e-3)
    for row, other in zip(first["results"], second["results"]):
        if row["method"] != "random":  # a set for each batch
            assert row["accuracy"] == other["accuracy"] and row.get("focus") == other.get("focus")


def test_page(runs, tmp_path):
    page = tmp_path / "quality.md"
    shutil.copy(quality_page.DOCS / "quality.md", page)
    words = re.compile(r"<!-- begin \S+ -->\n.*?<!-- end \S+ -->", re.DOTALL)
    before = words.split(page.read_text(encoding="utf-8"))
    quality_page.write_page(*runs, runs[0], page)
    text = page.read_text(encoding="utf-8")
    assert words.split(text) == before
    quality_page.write_page(*runs, runs[0], page)
    assert page.read_text(encoding="utf-8") == text

    row = next(row for row in runs[0]["results"] if row["method"] == "fsr" and row["budget"] == 64)
    for mode in row["positions"].values():
        assert re.search(rf"\n\| FSR \| {mode['accuracy']:.1%} \| ", text)
    assert "Unpruned, with all 576 tokens: " in text and "Left out" in text
    plot = tmp_path / "quality.webp"
    assert plot.stat().st_size < 100_000
    assert Image.open(plot).width >= 800


def test_the_page_needs_results(capsys):
    with pytest.raises(SystemExit):
        quality_page.main(["/nowhere/at/all.json"])
    assert "/nowhere/at/all.json is no file" in capsys.readouterr().err


def test_the_page_names_every_block(tmp_path, runs):
    page = tmp_path / "quality.md"
    page.write_text("<!-- begin setup -->\n<!-- end setup -->\n")
    with pytest.raises(ValueError, match="must have each of these blocks once"):
        quality_page.write_page(*runs, runs[0], page)
