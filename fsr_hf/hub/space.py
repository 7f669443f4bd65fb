"""The folder of a Hugging Face Space: the web demo, this package, and a model or its name."""

import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from packaging.requirements import Requirement

from ..demo.shapes_vqa import shapes_vqa_folder
from ..explain import check_fsr_model
from ..package_data import data_folder
from ..version import __version__
from .export import export
from .verify import check_loads


__all__ = ["write_space"]

_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__")


def write_space(output_dir: str | os.PathLike, model: str | os.PathLike | None = None) -> Path:
    """
    Makes the folder of a Space out of the templates in `hub_cards/space`. It holds a copy of this package and pins the
    versions of what is installed here, so that the Space runs as `fsr-hf demo --web` does here.

    Args:
        output_dir (`str` or `os.PathLike`):
            The folder to make. It may exist, but has to be empty.
        model (`str` or `os.PathLike`, *optional*):
            FSR checkpoint: a folder, which is copied to `output_dir/model`, or a Hub id, which the Space loads. By
            default an export of the small LLaVA that comes with the package.

    Returns:
        `Path`: `output_dir`.

    Raises:
        `FileExistsError`: if there is something in `output_dir`.
        `ValueError`: for a checkpoint without FSR, or one that would not load, and if gradio is not installed.
        `OSError`: if there is no such checkpoint, or a file cannot be written.
    """
    output_dir = Path(output_dir).resolve()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"`output_dir` {output_dir} is a file or is not empty: choose another.")
    try:
        gradio = version("gradio")
    except PackageNotFoundError as error:
        raise ValueError("a Space pins the gradio that it was tried with: pip install 'fsr-hf[web]'") from error
    is_folder = model is not None and os.path.isdir(model)
    if model is not None:
        check_fsr_model(str(model))
    if is_folder and (faults := check_loads(Path(str(model)))):
        raise ValueError(f"{model} would not load: {'; '.join(faults)}.")

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as temporary:
        staging = Path(temporary) / "space"
        package = Path(__file__).parents[1]
        shutil.copytree(package, staging / package.name, ignore=_ignore(package))
        if model is None:
            export(shapes_vqa_folder(), staging / "model", progress=False)
        elif is_folder:
            shutil.copytree(model, staging / "model", ignore=_LEFT_OUT)
        is_hub_id = model is not None and not is_folder
        values = {
            "gradio": gradio,
            "is_hub_id": is_hub_id,
            "model": model if is_hub_id else "model",
            "packages": _installed(),
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "version": __version__,
        }
        environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
        for template in (data_folder("hub_cards") / "space").iterdir():
            text = environment.from_string(template.read_text(encoding="utf-8")).render(values)
            (staging / template.name).write_text(text, encoding="utf-8")
        if (licence := distribution("fsr-hf").read_text("licenses/LICENSE")) is not None:
            (staging / "LICENSE").write_text(licence, encoding="utf-8")
        if output_dir.exists():
            output_dir.rmdir()
        staging.rename(output_dir)
    return output_dir


def _ignore(package: Path):
    """What of the package a Space does without: caches, and the data that an installed package holds for `export`."""
    data = {"checkpoints", "hub_cards"}

    def ignore(folder: str, names: list[str]) -> set[str]:
        return _LEFT_OUT(folder, names) | (data & {*names} if Path(folder) == package else set())

    return ignore


def _installed() -> dict[str, str]:
    """The versions of what the package needs, and of torchvision, which some processors need."""
    needed = [Requirement(text) for text in requires("fsr-hf") or []]
    names = [requirement.name for requirement in needed if "extra" not in str(requirement.marker)]
    found = {}
    for name in [*names, "torchvision"]:
        try:
            found[name] = version(name).partition("+")[0]  # "+cpu" is in no registry
        except PackageNotFoundError:  # torchvision, or what this platform does without
            continue
    return found
