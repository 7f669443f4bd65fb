"""The Python of the README, run against small checkpoints."""

import re
from pathlib import Path

import pytest
from clips import write_clip
from PIL import Image

from fsr_hf.testing.small_families import export_small_model


README = Path(__file__).parents[1] / "README.md"
MODELS = {"org/llava-1.5-7b-fsr": "fsr_llava", "org/llava-video-7b-fsr": "fsr_llava_video"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    return {name: export_small_model(model_type, root / model_type) for name, model_type in MODELS.items()}


def test_every_block_runs_one_after_the_other(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((200, 150), 80).convert("RGB").save("cup.jpg")
    write_clip(tmp_path / "clip.mp4")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict = {}
    for block in blocks:
        for name, folder in folders.items():
            block = block.replace(name, str(folder))
        assert "org/" not in block
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert len(printed.split()) == 64  # the small tokenizer answers in words
    assert namespace["selection"].indices.shape == (192,)
    inputs = namespace["inputs"]  # of the last block, which is about a video of 10 frames
    assert inputs["video_num_frames"].tolist() == [10]
    assert "lasts for 2.50 seconds" in namespace["processor"].decode(inputs["input_ids"][0])
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
