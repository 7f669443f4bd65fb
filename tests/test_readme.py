"""The Python of the README, run against a small checkpoint."""

import re
from pathlib import Path

import pytest
from PIL import Image

from fsr_hf import export
from fsr_hf.demo.small_llava import SmallLlava, save_small_llava


README = Path(__file__).parents[1] / "README.md"
MODEL = "org/llava-1.5-7b-fsr"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    size = SmallLlava(64, 2, 64, 3, 32, 2, 16, 32)
    save_small_llava(root / "stock", root / "clip", size)
    return export(root / "stock", root / "fsr", text_encoder=root / "clip", progress=False)


def test_every_block_runs_one_after_the_other(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((200, 150), 80).convert("RGB").save("cup.jpg")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict = {}
    for block in blocks:
        assert "org/" not in block.replace(MODEL, "")
        exec(compile(block.replace(MODEL, str(folder)), "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert len(printed.split()) == 64  # the small tokenizer answers in words
    assert namespace["selection"].indices.shape == (192,)
    trained = {name for name, p in namespace["peft_model"].named_parameters() if "lora" in name}
    assert trained and all(".language_model." in name for name in trained)


def test_what_the_readme_points_at_exists():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (README.parent / target).is_file(), target
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for name in re.findall(r"\bmake (\w+)", text.replace("with make and", "")):
        assert f"\n{name}:" in makefile, name
