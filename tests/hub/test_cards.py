"""Model cards: what they say, where they say it from, and that their examples run."""

import copy
import json
import re
import shutil
from fractions import Fraction
from functools import partial
from pathlib import Path

import jinja2
import jinja2.meta
import numpy as np
import pytest
from clips import write_clip
from huggingface_hub import ModelCard
from isolated import run_python
from PIL import Image

import fsr_hf
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder
from fsr_hf.hub import cards
from fsr_hf.hub.card_checks import check_card, main
from fsr_hf.hub.cards import address_card, card_data, card_folder, card_names, read_base, render_card, write_card
from fsr_hf.hub.families import FAMILIES
from fsr_hf.testing.small_families import export_small_model


# Base, licence on the Hub and pipeline of each card.
CARDS = {
    "llava-1.5-7b": ("llava-hf/llava-1.5-7b-hf", "llama2", "image-text-to-text"),
    "llava-1.5-13b": ("llava-hf/llava-1.5-13b-hf", "llama2", "image-text-to-text"),
    "llava-next-vicuna-7b": ("llava-hf/llava-v1.6-vicuna-7b-hf", "llama2", "image-text-to-text"),
    "llava-next-vicuna-13b": ("llava-hf/llava-v1.6-vicuna-13b-hf", "llama2", "image-text-to-text"),
    "llava-next-mistral-7b": ("llava-hf/llava-v1.6-mistral-7b-hf", "apache-2.0", "image-text-to-text"),
    "qwen2.5-vl-3b": ("Qwen/Qwen2.5-VL-3B-Instruct", "other", "image-text-to-text"),
    "qwen2.5-vl-7b": ("Qwen/Qwen2.5-VL-7B-Instruct", "apache-2.0", "image-text-to-text"),
    **{
        f"qwen3-vl-{size.lower()}": (f"Qwen/Qwen3-VL-{size}-Instruct", "apache-2.0", "image-text-to-text")
        for size in ("2B", "4B", "8B", "32B")
    },
    "llava-video-7b-qwen2": ("lmms-lab/LLaVA-Video-7B-Qwen2", "apache-2.0", "video-text-to-text"),
    "shapes-vqa": (None, "apache-2.0", "image-text-to-text"),
}
# What the paper prints for FSR: the sum of the unpruned scores; for each budget, the score kept and the sum of scores.
PAPER = {
    "llava-1.5-7b": (2370.4, {"192": (99.1, 2308.8), "128": (98.3, 2271.6), "64": (96.1, 2193.7)}),
    "llava-1.5-13b": (0, {"64": (96.7, 0)}),
    "llava-next-vicuna-7b": (2404.0, {"1/3": (100.0, 2331.3), "2/9": (99.9, 2356.0), "1/9": (97.6, 2294.4)}),
    "llava-next-vicuna-13b": (2371.7, {"1/3": (102.1, 2430.7), "2/9": (101.7, 2449.7), "1/9": (100.0, 2414.2)}),
    "qwen2.5-vl-7b": (
        2871.1,
        {"0.5": (97.9, 2790.5), "0.4": (96.4, 2751.0), "0.2": (91.9, 2590.9), "0.1": (84.0, 2365.3)},
    ),
    "llava-video-7b-qwen2": (
        361.7,
        {"0.5": (100.3, 362.5), "0.4": (99.6, 360.4), "0.3": (98.9, 357.8), "0.2": (98.2, 355.1)},
    ),
}
DEFAULTS = {
    "fsr_llava": 128,
    "fsr_llava_next": 1 / 9,
    "fsr_qwen2_5_vl": 0.5,
    "fsr_qwen3_vl": 0.5,
    "fsr_llava_video": 0.2,
}
MEASURED = [
    {
        "dataset": {"name": "Shapes", "type": "shapes"},
        "metric": {"name": "accuracy", "type": "accuracy"},
        "source": {"name": "a run", "url": "https://example.org/run"},
        "unpruned": 91.5,
        "pruned": [{"num_visual_tokens": 64, "value": 90.25}, {"retention_ratio": 0.05, "value": 80.5}],
    }
]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, without the line under its header."""
    found = re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE)
    rows = [[[cell.strip() for cell in row.strip("|\n").split("|")] for row in t.splitlines()] for t in found]
    return [[header, *body] for header, _, *body in rows]


def section(card: ModelCard, title: str) -> str:
    return card.text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def prose(text: str) -> str:
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_every_checkpoint_has_a_card():
    assert card_names() == list(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_card(name):
    card = render_card(name)
    assert check_card(str(card)) == []
    base, licence, pipeline_tag = CARDS[name]
    metadata = card.data.to_dict()
    assert metadata.get("base_model") == base
    assert metadata.get("base_model_relation") == ("finetune" if base else None)
    assert (metadata["license"], metadata["pipeline_tag"]) == (licence, pipeline_tag)
    assert metadata["library_name"] == "transformers" and metadata["language"] == ["en"]
    assert {"visual-token-pruning", "fsr", "custom_code"} <= {*metadata["tags"]}
    assert "\n\n\n" not in card.text and " \n" not in card.text and "  " not in prose(card.text)
    if base:
        assert f"](https://huggingface.co/{base})" in card.text
        assert "**Same weights as the base; not a new training.**" in card.text
    # It is found by the id of its base, too.
    if base:
        assert str(render_card(base)) == str(card)


def test_licences_ask_for_their_notices():
    def quoted(name):
        return [line[2:] for line in section(render_card(name), "Licence").splitlines() if line.startswith("> ")]

    meta = (
        "Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    )
    alibaba = (
        "Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved."
    )
    notices = {name: quoted(name) for name in CARDS}
    assert {name for name, lines in notices.items() if lines == [meta]} == {
        name for name, (_, licence, _) in CARDS.items() if licence == "llama2"
    }
    assert {name for name, lines in notices.items() if lines not in ([], [meta])} == {"qwen2.5-vl-3b"}
    assert notices["qwen2.5-vl-3b"] == [alibaba]
    metadata = render_card("qwen2.5-vl-3b").data.to_dict()
    assert metadata["license_name"] == "qwen-research"
    assert metadata["license_link"].startswith("https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/")


@pytest.mark.parametrize("name", CARDS)
def test_numbers_of_the_paper(name):
    card = render_card(name)
    text = section(card, "What the paper reports")
    if name == "shapes-vqa":
        assert not text
        return
    if name.startswith("qwen3"):
        assert not text and not tables(card.text) and "model-index" not in str(card)
        nothing = section(card, "What was measured").split()
        assert nothing[:5] == ["Nothing,", "on", "these", "weights.", "The"]
        return
    assert "Source: [arXiv 2602.05809](https://arxiv.org/abs/2602.05809)." in text
    reported = {"qwen2.5-vl-3b": "qwen2.5-vl-7b", "llava-next-mistral-7b": "llava-next-vicuna-7b"}.get(name, name)
    assert ("The paper does not report this checkpoint." in text) == (reported != name)
    unpruned_sum, expected = PAPER[reported]
    header, *rows = tables(text)[0]
    first = 2 if "visual tokens per image" in header else 1
    unpruned = [float(cell) for cell in rows.pop(0)[first:-1]] if unpruned_sum else []
    assert sum(unpruned) == pytest.approx(unpruned_sum)
    found = {}
    for row in rows:
        argument, value = row[0].strip("`").split("=")
        scores, kept = [float(cell) for cell in row[first:-1]], float(row[-1].removesuffix(" %"))
        found[value] = (kept, pytest.approx(sum(scores)))
        assert argument == ("num_visual_tokens" if value.isdigit() else "retention_ratio")
        assert len(scores) == len(unpruned)
        if scores:  # what the paper calls the score kept is close to this
            ratios = [score / full for score, full in zip(scores, unpruned, strict=True)]
            assert kept == pytest.approx(100 * sum(ratios) / len(ratios), abs=1.2)
        if first == 2:
            assert int(row[1]) == Fraction(value) * 2880
    assert found == expected
    # None of it is passed off as this repository's own.
    assert "model-index" not in str(card)


def test_time_and_memory_of_the_paper():
    (efficiency,) = tables(section(render_card("llava-1.5-7b"), "What the paper reports"))[1:]
    assert efficiency[1:] == [
        ["unpruned, 576 tokens", "9.042", "3.056", "23.952", "288.0", "16.9"],
        ["`num_visual_tokens=64`", "2.291", "0.788", "22.317", "32.0", "13.2"],
    ]
    for name in set(CARDS) - {"llava-1.5-7b"}:
        assert "GPU memory" not in str(render_card(name))


def test_budgets_are_those_of_the_config():
    for family in FAMILIES:
        fsr = family.config().fsr_config
        card = render_card("me/mine", model_type=family.config.model_type, fsr_config=fsr.to_dict())
        budget = fsr.num_visual_tokens or fsr.retention_ratio
        assert budget == DEFAULTS[family.config.model_type]
        named = cards.default_budget(family.config.model_type)
        assert getattr(fsr, named.name) == (named.value if named.name == "num_visual_tokens" else float(named.value))
        assert f"The config of this repository says `{named}`." in card.text
    assert "passes on 128 of 576 visual tokens" in render_card("llava-1.5-7b").text
    assert "passes on 1/9 of the visual tokens" in render_card("llava-next-mistral-7b").text
    assert "passes on 20 % of the visual tokens" in render_card("llava-video-7b-qwen2").text
    other = render_card("llava-1.5-7b", fsr_config={"num_visual_tokens": 192, "relevance": "none"})
    assert "passes on 192 of 576 visual tokens" in other.text
    assert "num_visual_tokens=128)" in other.text


def test_where_relevance_is_read_and_its_sign_are_said():
    def text(**fsr_config):
        config = {"num_visual_tokens": 64, "text_encoder_config": {"vocab_size": 99}, **fsr_config}
        return section(render_card("llava-1.5-7b", fsr_config=config), "How tokens are ranked")

    of_states = {"relevance": "clip", "invert_relevance": True}
    assert "Relevance is the *negative* cosine here, and the plain one in the paper." in text(**of_states)
    assert "Relevance is the plain cosine, as in the paper." in text(**of_states | {"invert_relevance": False})
    for given in ({}, {"relevance": None}, {"relevance": "clip_values"}):
        assert "what a patch hands to [CLS] in the tower's last block" in text(**given)
        assert "**The sign.**" not in text(**given)
    for without in ({"relevance": "none"}, {"text_encoder_config": None}):
        assert "The question plays no part in it" in text(**without) and "[CLS] in the tower" not in text(**without)
        plain = render_card("llava-1.5-7b", fsr_config={"num_visual_tokens": 64, **without}).text
        assert "openai/clip" not in plain and "MIT" not in plain
    for name in CARDS:
        is_said = "**Where relevance is read.**" in render_card(name).text
        assert is_said == (not name.startswith(("qwen", "llava-video")))


def test_template_holds_no_number():
    source = (card_folder() / "model_card.md").read_text()
    literal = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", source, flags=re.DOTALL)
    assert re.findall(r"\d+", prose(literal)) == []
    code = "".join(re.findall(r"^```python\n(.*?)^```$", literal, flags=re.MULTILINE | re.DOTALL))
    assert set(re.findall(r"\b\d+", code)) <= {"0", "1"}  # indices


def test_template_is_filled(monkeypatch):
    """Whatever the template prints has a value, and whatever it is given is printed or asked for."""

    class Printed(jinja2.Undefined):
        __str__ = jinja2.Undefined._fail_with_undefined_error

    given = set()

    def from_template(data, template_path, **kwargs):
        given.update(kwargs)
        return original(data, template_path, **kwargs)

    original = ModelCard.from_template
    monkeypatch.setattr(ModelCard, "from_template", from_template)
    expected = [str(render_card(name)) for name in CARDS]
    monkeypatch.setattr(jinja2, "Template", partial(jinja2.Template, undefined=Printed))
    assert [str(render_card(name)) for name in CARDS] == expected
    source = (card_folder() / "model_card.md").read_text()
    names = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(source))
    known = {"card_data", "base_model"}  # of huggingface_hub: the metadata, whole and by its keys
    assert names - known == given


def test_the_numbers_of_the_trained_checkpoint_are_those_of_the_benchmark():
    """Written to one decimal from the file that the benchmark wrote."""
    result = json.loads((Path(__file__).parents[2] / "docs" / "quality.json").read_text(encoding="utf-8"))
    config = json.loads((shapes_vqa_folder() / "config.json").read_text(encoding="utf-8"))
    fsr_config = config["fsr_config"]
    assert fsr_config | {"relevance": "clip_values"} | result["fsr"] == fsr_config | {"relevance": "clip_values"}
    card = render_card("shapes-vqa", revision="v1")
    text = section(card, "Measured with this code")
    rows = [row for row in result["results"] if row["method"] in ("unpruned", "fsr")]
    positions = fsr_config["positions"]
    accuracy = {row["budget"]: row.get("positions", {}).get(positions, row)["accuracy"] for row in rows}
    unpruned = f"{100 * accuracy.pop(result['num_tokens']):.1f}"
    rows = [[f"`num_visual_tokens={budget}`", f"{100 * value:.1f}"] for budget, value in accuracy.items()]
    assert tables(text) == [[["budget", "Shapes-VQA, accuracy"], ["unpruned", unpruned], *rows]]
    assert "Source: [docs/quality.md of fsr-hf](https://pypi.org/project/fsr-hf/)." in text
    (model,) = card.data.to_dict()["model-index"]
    values = [metric["value"] for entry in model["results"] for metric in entry["metrics"]]
    assert values == [round(100 * value, 1) for value in accuracy.values()]
    assert {entry["source"]["url"] for entry in model["results"]} == {"https://pypi.org/project/fsr-hf/"}


def test_own_measurements_stand_apart(monkeypatch):
    data = copy.deepcopy(card_data())
    data["models"]["llava-1.5-7b"]["measured"] = MEASURED
    monkeypatch.setattr(cards, "card_data", lambda: data)
    card = render_card("llava-1.5-7b", repo_id="org/llava-1.5-7b-fsr")
    assert check_card(str(card)) == []
    text = section(card, "Measured with this code")
    assert tables(text) == [
        [
            ["budget", "Shapes, accuracy"],
            ["unpruned", "91.5"],
            ["`num_visual_tokens=64`", "90.25"],
            ["`retention_ratio=0.05`", "80.5"],
        ]
    ]
    assert "Source: [a run](https://example.org/run)." in text
    metadata = card.data.to_dict()
    (model,) = metadata["model-index"]
    assert model["name"] == "llava-1.5-7b-fsr"
    values = [metric["value"] for result in model["results"] for metric in result["metrics"]]
    assert values == [90.25, 80.5]
    assert all(result["source"]["url"] == "https://example.org/run" for result in model["results"])
    for name in set(CARDS) - {"llava-1.5-7b", "shapes-vqa"}:
        assert "Measured with this code" not in render_card(name).text


def test_card_of_somebody_elses_checkpoint():
    card = render_card("me/llava-med", model_type="fsr_llava", base_metadata={"license": "mit", "tags": ["medical"]})
    assert check_card(str(card), is_complete=False) == []
    assert check_card(str(card).replace("license: mit", "license: mit\nlanguage: en"), is_complete=False) == []
    assert [fault for fault in check_card(str(card)) if "language" not in fault] == [
        "metadata: license is 'mit', not one of apache-2.0, llama2, other"
    ]
    assert card.data.base_model == "me/llava-med" and card.data.license == "mit"
    assert card.text.startswith("\n# llava-med with FSR\n") and 'repo, revision = "org/llava-med-fsr", "v' in card.text
    assert "The paper does not report this checkpoint." in card.text
    assert "576 visual tokens" not in card.text  # its pictures may have another size
    nobody = render_card(model_type="fsr_llava")
    assert nobody.data.get("base_model") is None and "base_model_relation" not in nobody.data.to_dict()
    assert "**Same weights as the checkpoint that it was made from; not a new training.**" in nobody.text
    assert nobody.text.startswith("\n# LLaVA-1.5 with FSR\n") and '"org/llava-1.5-fsr"' in nobody.text
    for text in (card.text, nobody.text):  # its CLIP may be another one, too
        assert "text side of the CLIP of the vision tower" in text and "openai" not in text
    with pytest.raises(ValueError, match="`model_type='fsr_opt'` has no card; there are fsr_llava, "):
        render_card("me/mine", model_type="fsr_opt")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("license: llama2\n", "", "metadata: license is missing"),
        ("license: llama2", "license: other", "metadata: license other needs license_name and license_link"),
        ("license: llama2", "license: mit", "metadata: license is 'mit', not one of"),
        ("pipeline_tag: image-text-to-text", "pipeline_tag: text-generation", "metadata: pipeline_tag is 'text-gen"),
        ("library_name: transformers\n", "", "metadata: library_name is missing"),
        ("base_model_relation: finetune", "base_model_relation: tuned", "metadata: base_model_relation is 'tuned'"),
        ("base_model_relation: finetune\n", "", "metadata: base_model and base_model_relation need each other"),
        ("- custom_code\n", "", "metadata: tags need custom_code"),
        ("- en\n", "- english\n", "metadata: language 'english' is no ISO 639-1 code"),
        ("library_name: transformers", "library_name: [", "metadata: "),
        ("## Limits", "## {{ limits }}", "not filled in: '{{'"),
        ("## Limits", "## None", "not filled in: 'None'"),
        ("out = model.generate(**inputs, max_new_tokens=64)\n", "out = (\n", "python: '(' was never closed"),
        (", trust_remote_code=True, dtype", ", dtype", "python: `AutoModel` without trust_remote_code=True"),
        (
            'pipeline("image-text-to-text", model=repo, revision=revision, ',
            "pipeline(model=repo, ",
            "pins no revision",
        ),
        (
            "processor = AutoProcessor.from_pretrained(",
            "processor = get(",
            "python: no `AutoProcessor.from_pretrained`",
        ),
        (
            "](https://arxiv.org/abs/2602.05809).\n\n## Pipe",
            "](paper.pdf).\n\n## Pipe",
            "link: 'paper.pdf' leads nowhere",
        ),
        ("](https://arxiv.org/abs/2602.05809).\n\n## Pipe", "]().\n\n## Pipe", "link: '' leads nowhere"),
        ("](https://arxiv.org/abs/2602.05809).\n\n## Pipe", "](#papers).\n\n## Pipe", "link: '#papers' leads nowhere"),
        ("Source: [arXiv", "See [arXiv", "What the paper reports: measured numbers without a line"),
        ("suffer first.", "suffer first, by 12 %.", "Limits: measured numbers without a line"),
        (" | 99.1 % |", " |", "What the paper reports: rows of a table differ in length"),
    ],
)
def test_faults_are_found(old, new, fault):
    content = str(render_card("llava-1.5-7b"))
    assert content.count(old) >= 1
    faults = check_card(content.replace(old, new, 1))
    assert any(fault in found for found in faults), faults


def test_links_to_files_of_the_folder(tmp_path):
    content = str(render_card("llava-1.5-7b")).replace("## Limits", "See [NOTICE](NOTICE).\n\n## Limits")
    assert check_card(content, tmp_path) == ["link: 'NOTICE' leads nowhere"]
    (tmp_path / "NOTICE").touch()
    assert check_card(content, tmp_path) == []


def test_command(tmp_path, capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == f"{len(CARDS)} model cards, 0 faults\n"
    (tmp_path / "README.md").write_text(str(render_card("llava-1.5-7b")).replace("finetune", "tuned"))
    assert main([str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"{tmp_path}: metadata: base_model_relation is 'tuned', not one of {', '.join(RELATIONS)}\n"


RELATIONS = ("adapter", "finetune", "merge", "quantized")


@pytest.fixture
def folder(tmp_path):
    config = {"model_type": "fsr_llava", "fsr_config": {"num_visual_tokens": 64, "retention_ratio": None}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_card_of_a_folder(folder):
    file = write_card(folder, "llava-hf/llava-1.5-13b-hf")
    assert file == folder / "README.md" and check_card(file.read_text()) == []
    card = ModelCard.load(file)
    assert card.data.license == "llama2" and card.text.startswith("\n# LLaVA-1.5-13B with FSR\n")
    assert "passes on 64 of 576 visual tokens" in card.text and "openai/clip" not in card.text
    # An export of this export is one of the same base, whatever its folder is called.
    assert read_base(folder, folder)[0] == "llava-hf/llava-1.5-13b-hf"
    assert read_base("me/mine", folder)[0] == "llava-hf/llava-1.5-13b-hf"


def test_address_of_a_card(folder):
    file = write_card(folder, "llava-hf/llava-1.5-7b-hf")
    assert f'repo, revision = "org/llava-1.5-7b-fsr", "v{fsr_hf.__version__}"' in file.read_text()
    edited = file.read_text().replace("## Limits", "## My limits")
    file.write_text(edited)
    address_card(folder, "me/mine", "v2.0.0")
    text = file.read_text()
    assert 'repo, revision = "me/mine", "v2.0.0"' in text and 'push_to_hub("me/other-budget")' in text
    assert '"org/' not in text and "## My limits" in text
    assert check_card(text) == []
    file.write_text("# Mine\n")
    address_card(folder, "me/mine", "v2.0.0")
    assert file.read_text() == "# Mine\n"


def test_base_of_a_source(tmp_path):
    stock = tmp_path / "models--me--llava-med" / "snapshots" / ("0" * 40)
    stock.mkdir(parents=True)
    (stock / "README.md").write_text("---\nlicense: mit\nbase_model: llava-hf/llava-1.5-7b-hf\n---\n# Mine\n")
    assert read_base("me/llava-med@main", stock) == (
        "me/llava-med",
        {"license": "mit", "base_model": "llava-hf/llava-1.5-7b-hf"},
    )
    assert read_base(stock, stock)[0] == "me/llava-med"
    assert read_base(tmp_path, tmp_path) == (None, {})
    for broken in ("---\nlicense: [\n---\n", "---\n- mit\n---\n", "# No metadata\n"):
        (tmp_path / "README.md").write_text(broken)
        assert read_base(tmp_path, tmp_path) == (None, {})


@pytest.mark.parametrize("model_type", card_data()["families"])
def test_examples_run(model_type, tmp_path):
    """A reader copies the python blocks of a card, all of them, where transformers and PEFT are installed alone."""
    names = [name for name, facts in card_data()["models"].items() if facts["family"] == model_type]
    checkpoint = export_small_model(model_type, tmp_path)
    assert check_card((checkpoint / "README.md").read_text(), checkpoint, is_complete=False) == []
    work = tmp_path / "work"
    for name in names:
        repository = work / "org" / f"{name}-fsr"
        repository.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(checkpoint, repository)
        render_card(name).save(work / f"{name}.md")
    pixels = np.random.default_rng(0).integers(0, 255, (120, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(work / "photo.jpg")
    write_clip(work / "video.mp4")

    script = Path(__file__).with_name("card_process.py")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = run_python(script, *(f"{name}.md" for name in names), cwd=work, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((work / "report.json").read_text())
    assert list(report) == [f"{name}.md" for name in names]
    family = next(family for family in FAMILIES if family.config.model_type == model_type)
    for name in names:
        result = report[f"{name}.md"]
        assert result["class"] == family.model.__name__
        assert all(0 < length <= card_data()["code"]["max_new_tokens"] for length in result["lengths"])
        kept, of = result["kept"]  # placeholders of newlines are among the latter
        assert kept == 128 if model_type == "fsr_llava" else 0 < kept <= round(DEFAULTS[model_type] * of)
        assert isinstance(result["answer"], str)
        assert result["trained"] and all("language_model" in parameter for parameter in result["trained"])
        assert "config.json" in result["files"] and not [file for file in result["files"] if "safetensors" in file]
        # The first block prunes to the repository's budget; what the second one sets, the config-only one brings.
        default = [None, DEFAULTS[model_type]] if DEFAULTS[model_type] < 1 else [DEFAULTS[model_type], None]
        first, changed, loaded = result["budgets"][:3]
        assert first == pytest.approx(default)
        assert changed == loaded != first and (changed[0] is None) == (default[0] is None)
