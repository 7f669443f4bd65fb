"""The package as others see it: its names, what importing it needs, what its wheel holds."""

import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import fsr_hf


ROOT = Path(fsr_hf.__file__).parent
PUBLIC = [
    "FSRConfig",
    "FSRLlavaConfig",
    "FSRLlavaForConditionalGeneration",
    "FSRLlavaNextConfig",
    "FSRLlavaNextForConditionalGeneration",
    "FSRLlavaNextProcessor",
    "FSRLlavaProcessor",
    "FSRLlavaVideoConfig",
    "FSRLlavaVideoForConditionalGeneration",
    "FSRLlavaVideoProcessor",
    "FSRQwen2_5_VLConfig",
    "FSRQwen2_5_VLForConditionalGeneration",
    "VisualSelection",
    "__version__",
    "export",
    "select_visual_tokens",
]


def test_public_names():
    assert fsr_hf.__all__ == sorted(PUBLIC)
    assert all(hasattr(fsr_hf, name) for name in PUBLIC)


def test_basenames_are_unique():
    """They become the files of one flat folder."""
    names = Counter(path.name for path in ROOT.rglob("*.py") if path.name != "__init__.py")
    assert [name for name, number in names.items() if number > 1] == []


def test_import_needs_no_extra():
    script = """
import json, sys
for name in ("torchvision", "av", "peft", "matplotlib", "triton"):
    sys.modules[name] = None
import fsr_hf
from transformers import AutoConfig
print(json.dumps([type(AutoConfig.for_model("fsr_llava")).__name__, "typer" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["FSRLlavaConfig", False]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT.parent, check=True, capture_output=True, timeout=120)
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_holds_every_module(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = f"fsr_hf-{fsr_hf.__version__}.dist-info"
        assert "fsr-hf = fsr_hf.cli:app" in archive.read(f"{metadata}/entry_points.txt").decode()
    assert {path.relative_to(ROOT.parent).as_posix() for path in ROOT.rglob("*.py")} <= names
    assert f"{metadata}/licenses/LICENSE" in names
    assert not [name for name in names if not name.startswith(("fsr_hf/", metadata))]


def test_wheel_holds_the_data(wheel, tmp_path):
    """The trained checkpoint, the cards and the pictures of the demo, where an installed package finds them."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    script = """
from fsr_hf.demo.run import PICTURES
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder
from fsr_hf.hub.cards import card_folder
print(shapes_vqa_folder() / "config.json", card_folder() / "cards.yaml", PICTURES / "questions.json", sep="\\n")
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    files = [Path(line) for line in done.stdout.splitlines()]
    assert all(file.is_file() and file.is_relative_to(tmp_path / "installed") for file in files), files


def test_an_editable_install_is_this_folder(tmp_path):
    """What `make` begins with: pip asks the build backend for a wheel that only points here."""
    script = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (pointer,) = [name for name in archive.namelist() if name.endswith(".pth")]
        assert archive.read(pointer).decode().split() == [str(ROOT.parent)]
