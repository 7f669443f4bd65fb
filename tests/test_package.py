"""The package as others see it: its names, what importing it needs, what its wheel holds."""

import json
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from isolated import run_python
from packaging.requirements import Requirement
from packaging.version import Version

import fsr_hf
from fsr_hf.hub.cards import render_card
from fsr_hf.modeling.guards import TESTED_UP_TO


ROOT = Path(fsr_hf.__file__).parent
PUBLIC = [
    "FSRConfig",
    "FSRLlavaConfig",
    "FSRLlavaForConditionalGeneration",
    "FSRLlavaModel",
    "FSRLlavaNextConfig",
    "FSRLlavaNextForConditionalGeneration",
    "FSRLlavaNextModel",
    "FSRLlavaNextProcessor",
    "FSRLlavaProcessor",
    "FSRLlavaVideoConfig",
    "FSRLlavaVideoForConditionalGeneration",
    "FSRLlavaVideoModel",
    "FSRLlavaVideoProcessor",
    "FSRQwen2_5_VLConfig",
    "FSRQwen2_5_VLForConditionalGeneration",
    "FSRQwen2_5_VLModel",
    "FSRQwen3VLConfig",
    "FSRQwen3VLForConditionalGeneration",
    "FSRQwen3VLModel",
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
for name in ("torchvision", "av", "peft", "matplotlib", "triton", "gradio"):
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
    assert {f"{metadata}/licenses/LICENSE", "fsr_hf/py.typed"} <= names
    assert not [name for name in names if not name.startswith(("fsr_hf/", metadata))]


def test_wheel_holds_the_data(wheel, tmp_path):
    """The trained checkpoint, the cards and the pictures of the demo, where an installed package finds them."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    script = """
from fsr_hf.demo.run import PICTURES
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder
from fsr_hf.hub.cards import card_folder, render_card
print(len(str(render_card("llava-1.5-7b"))), card_folder(), shapes_vqa_folder(), PICTURES, sep="\\n")
"""
    done = run_python("-c", script, cwd=tmp_path, path=[tmp_path / "installed"])
    assert done.returncode == 0, done.stderr[-2000:]
    length, *folders = done.stdout.splitlines()
    cards, checkpoint, pictures = map(Path, folders)
    assert cards == tmp_path / "installed/fsr_hf/hub_cards"
    for name in ("model_card.md", "cards.yaml"):
        assert (cards / name).read_bytes() == (ROOT.parent / "hub_cards" / name).read_bytes()
    assert int(length) == len(str(render_card("llava-1.5-7b")))
    for file in (checkpoint / "config.json", pictures / "questions.json"):
        assert file.is_file() and file.is_relative_to(tmp_path / "installed")


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


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def tested():
    """The pinned requirements, `make pin`."""
    lines = (ROOT.parent / "requirements/tested.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]


def test_every_python_has_one_pin_of_each_requirement(project, tested):
    extras = project["optional-dependencies"]
    names = [
        *project["dependencies"],
        *(line for extra in ("bench", "dev", "peft", "video", "web") for line in extras[extra]),
    ]
    required = [Requirement(name) for name in names if not name.startswith("fsr-hf")]
    pythons = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert len(pythons) >= 4
    for python in pythons:
        for machine in ("x86_64", "aarch64"):
            environment = {
                "python_version": python,
                "python_full_version": f"{python}.0",
                "platform_machine": machine,
                "sys_platform": "linux",
                "platform_system": "Linux",
            }
            for requirement in required:
                if requirement.marker and not requirement.marker.evaluate(environment):
                    continue
                pins = [
                    str(pin.specifier).removeprefix("==")
                    for pin in tested
                    if pin.name == requirement.name.replace("_", "-")
                    and (pin.marker is None or pin.marker.evaluate(environment))
                ]
                assert len(pins) == 1 and pins[0] in requirement.specifier, (python, machine, requirement, pins)


def test_one_range_of_transformers(project, tested):
    """In the metadata, the Makefile, the pinned versions, the change log and the warning about newer ones."""
    (required,) = (line for line in project["dependencies"] if line.startswith("transformers"))
    floor = re.search(r">=(\d+\.\d+),", required).group(1)
    newest = max(Version(str(pin.specifier)[2:]) for pin in tested if pin.name == "transformers")
    makefile = (ROOT.parent / "Makefile").read_text(encoding="utf-8")
    changes = (ROOT.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    row = re.search(r"^\| (\d.*?) \| (.*?) to (.*?) \| `(.*?)` \|$", changes, flags=re.MULTILINE)
    assert f"\nFLOOR := {floor}.0\n" in makefile
    assert row.group(2, 3, 4) == (floor, f"{newest.major}.{newest.minor}", required.removeprefix("transformers"))
    assert f"\n## {row.group(1)}" in changes
    assert (newest.major, newest.minor) == TESTED_UP_TO


def test_workflows_call_targets_that_exist():
    makefile = (ROOT.parent / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    for file in (ROOT.parent / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].values():
            matrix = job.get("strategy", {"matrix": {"include": []}})["matrix"]["include"]
            called = [row["target"] for row in matrix if "target" in row]
            called += re.findall(r"make ([\w-]+)", str(job["steps"]))
            assert called and set(called) <= targets, file
    run = (ROOT.parent / ".ci/run").read_text(encoding="utf-8")
    assert set(re.search(r"for target in (.*);", run).group(1).split()) <= targets
