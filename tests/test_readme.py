"""The README and the pages that it points to: their Python runs, against small checkpoints; what they name exists."""

import inspect
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml
from clips import write_clip
from PIL import Image

from fsr_hf.modeling.generation import FSRGenerationMixin
from fsr_hf.testing.small_families import export_small_model


ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *(
        ROOT / f"docs/{name}.md"
        for name in ("demo", "families", "limits", "mechanism", "paper", "publishing", "training")
    ),
]
MODELS = {"org/llava-1.5-7b-fsr": "fsr_llava", "org/llava-video-7b-fsr": "fsr_llava_video"}


@pytest.fixture(scope="module")
def run_blocks(tmp_path_factory):
    """A function that runs the blocks of a page, one after the other, and returns their names."""
    root = tmp_path_factory.mktemp("readme")
    folders = {name: export_small_model(model_type, root / model_type) for name, model_type in MODELS.items()}
    Image.effect_noise((200, 150), 80).convert("RGB").save(root / "cup.jpg")
    write_clip(root / "clip.mp4")

    def run(page: str, namespace: dict) -> dict:
        """The names after the blocks of `page`, which begin with `namespace`; `printed` is what they print."""
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
        assert blocks
        namespace = dict(namespace)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
            patch.chdir(root)
            for block in blocks:
                for name, folder in folders.items():
                    block = block.replace(name, str(folder))
                assert "org/" not in block
                exec(compile(block, page, "exec"), namespace)
        return namespace | {"printed": printed.getvalue()}

    return run


@pytest.fixture(scope="module")
def readme(run_blocks):
    return run_blocks("README.md", {})


def test_readme(readme):
    assert len(readme["printed"].split()) == 64  # the small tokenizer answers in words
    assert readme["selection"].indices.shape == (192,)


def test_families(run_blocks):
    namespace = run_blocks("docs/families.md", {})
    inputs = namespace["inputs"]  # of a video of 10 frames
    assert inputs["video_num_frames"].tolist() == [10]
    assert "lasts for 2.50 seconds" in namespace["processor"].decode(inputs["input_ids"][0])
    assert len(namespace["frames"]) == 5  # two a second


def test_training(run_blocks, readme):
    pytest.importorskip("trl")
    namespace = run_blocks("docs/training.md", readme)
    assert namespace["loss"].isfinite()
    trained = {name for name, p in namespace["peft_model"].named_parameters() if "lora" in name}
    assert trained and all(".language_model." in name for name in trained)
    assert "query_input_ids" not in namespace["processor"](text="USER: a ASSISTANT:")  # the last block binds it
    assert namespace["trainer"].state.global_step == 1


def test_mechanism(run_blocks, readme):
    """The conversation goes on: its sequences begin with all that was said, and the cache has grown."""
    namespace = run_blocks("docs/mechanism.md", readme)
    length = namespace["ids"].shape[1]
    assert namespace["out"].sequences[:, :length].equal(namespace["ids"])
    assert namespace["out"].sequences.shape[1] == length + 64


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in re.findall(r"(?:^|`)make ([\w-]+)", text, flags=re.MULTILINE):
        assert f"\n{name}:" in makefile, name
    code = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "fsr_hf").rglob("*.py"))
    for name in re.findall(r"`([a-z]\w+/[\w./-]+|\.ci/run)`", text):
        if name.split("/")[0] in ("fsr_hf", "tests", "requirements", "hub_cards", ".ci") and "_x." not in name:
            assert (ROOT / name).exists(), name
    for name in re.findall(r"\b(?:FSR[A-Z]\w+|FSR_[A-Z_]+)\b", text):
        if "FSRX" not in name:
            assert name in code, name


def test_limits_name_what_generate_refuses():
    text = (ROOT / "docs/limits.md").read_text(encoding="utf-8")
    for method in (FSRGenerationMixin._check_generation, FSRGenerationMixin._check_continuation):
        names = re.findall(r'^ {12}\(?"(\w+)"[:,] ', inspect.getsource(method), flags=re.MULTILINE)
        assert len(names) >= 5
        assert [name for name in names if not re.search(rf"`{name}\b", text)] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 115


def test_paper_has_the_numbers_of_the_cards():
    tables = yaml.safe_load((ROOT / "hub_cards/cards.yaml").read_text(encoding="utf-8"))["paper"]["tables"]
    text = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for table in tables.values():
        rows = [[*row["scores"], f"{row['score']} %"] for row in table["pruned"]]
        if not table["benchmarks"]:
            assert f"{table['name']} keeps {rows[0][0]}" in text
            continue
        body = sections.pop(table["name"])
        found = [line.strip("| ").split(" | ")[1:] for line in body.splitlines() if re.match(r"\| (\d|unp)", line)]
        expected = [[*table["unpruned"], "100 %"], *rows]
        assert found[: len(expected)] == [[str(value) for value in row] for row in expected], table["name"]
    assert not sections
