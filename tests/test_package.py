"""The package as others see it: its names, what importing it needs, what its wheel holds."""

import json
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

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
for name in ("torchvision", "av", "peft", "skimage"):
    sys.modules[name] = None
import fsr_hf
from transformers import AutoConfig
print(json.dumps([type(AutoConfig.for_model("fsr_llava")).__name__, "typer" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["FSRLlavaConfig", False]


def test_wheel_holds_every_module(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT.parent, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = f"fsr_hf-{fsr_hf.__version__}.dist-info"
        assert "fsr-hf = fsr_hf.cli:app" in archive.read(f"{metadata}/entry_points.txt").decode()
    assert {path.relative_to(ROOT.parent).as_posix() for path in ROOT.rglob("*.py")} <= names
    assert f"{metadata}/licenses/LICENSE" in names
    assert not [name for name in names if not name.startswith(("fsr_hf/", metadata))]
