"""Checks of a Hub folder that run nothing of it: its manifest, its code, and whether its weights would load whole."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor
from transformers.utils import logging

from ..version import __version__
from .families import FAMILIES, Family
from .flatten import flat_files
from .manifest import Fingerprint, compare_manifest, read_manifest


__all__ = ["check_code", "check_loads", "find_weights", "open_tensors", "read_json", "verify"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def verify(source: str | os.PathLike) -> list[str]:
    """
    Checks a Hub folder, or a repository on the Hub, and runs nothing of it.

    Every file has to be what the manifest says, and the code what this version of the package writes; code of another
    version is a difference, since a manifest can be rewritten along with it. Of a folder the weights are hashed; of a
    repository, the hashes that the server has of them are compared, and only the small files are downloaded.

    Args:
        source (`str` or `os.PathLike`):
            A folder, or a Hub id, `org/name` or `org/name@revision`.

    Returns:
        `list[str]`: a line for each difference, none if all is well.

    Raises:
        `ValueError`: for a `source` that is neither.
    """
    elsewhere: dict[str, Fingerprint] = {}
    if os.path.isdir(source):
        folder = Path(source)
    else:
        folder, elsewhere = _fetch_small_files(str(source))
    try:
        version, _ = read_manifest(folder)
        differences = [*compare_manifest(folder, elsewhere), *check_code(folder, version)]
    except ValueError as error:
        return [str(error)]
    if version != __version__:
        differences.append(
            f"its code is said to be of fsr-hf {version}, and could not be compared: install that version to check it"
        )
    return differences


def _fetch_small_files(name: str) -> tuple[Path, dict[str, Fingerprint]]:
    """The files of a repository that git keeps, in a folder, and size and SHA-256 of the others."""
    repo_id, _, revision = name.partition("@")
    try:
        commit = HfApi().model_info(repo_id, revision=revision or None).sha
        entries = [
            e for e in HfApi().list_repo_tree(repo_id, recursive=True, revision=commit) if isinstance(e, RepoFile)
        ]
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder nor the id of a Hub repository.") from error
    large = {entry.path: Fingerprint(entry.lfs.size, entry.lfs.sha256) for entry in entries if entry.lfs is not None}
    return Path(snapshot_download(repo_id, revision=commit, ignore_patterns=list(large))), large


def check_code(folder: Path, version: str = __version__) -> list[str]:
    """
    What is wrong with the code of a Hub folder: where its JSON files send a loader, and how the files differ from
    those that the package writes, if it is of the `version` that wrote them.
    """
    family = _find_family(folder)
    if family is None:
        return ["config.json is missing, or no config of FSR"]
    faults = []
    for file in sorted(folder.rglob("*.json")):
        content = read_json(file)
        auto_map = content.get("auto_map") if isinstance(content, dict) else None
        if isinstance(content, dict) and "custom_pipelines" in content:
            faults.append(f"{file.name}: `custom_pipelines` names other code: {content['custom_pipelines']}")
        if file == folder / "config.json" and auto_map != family.auto_map:
            faults.append(f"config.json: `auto_map` is {auto_map}, and should be {family.auto_map}")
        elif auto_map and not auto_map.items() <= family.auto_map.items():
            faults.append(f"{file.name}: `auto_map` names other code: {auto_map}")
    if version == __version__:
        wanted = flat_files(family)
        for name in sorted(wanted):
            if not (folder / name).is_file():
                faults.append(f"{name} is missing")
            elif (folder / name).read_bytes() != wanted[name].encode():
                faults.append(f"{name} is not that of fsr-hf {version}")
        strangers = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")} - wanted.keys()
        faults += [f"{name} is no file of fsr-hf {version}" for name in sorted(strangers)]
    return faults


def open_tensors(file: Path) -> Any:
    """A safetensors file, open; a damaged one is a `ValueError` that names it."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or incomplete: {error}") from error


def check_loads(folder: Path) -> list[str]:
    """
    What would go wrong when the Hub folder is loaded. Config and processor are; the model is built and filled without
    data, by its own loader, from the names and shapes in the headers of the weights.
    """
    family = _find_family(folder)
    if family is None:
        return ["config.json is missing, or no config of FSR"]
    try:
        config: Any = family.config.from_pretrained(folder)
        AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        return [f"does not load: {error}"]
    try:
        weights = find_weights(folder)
    except ValueError as error:
        return [str(error)]
    if getattr(config, "quantization_config", None) is not None:
        return []  # its loader wants the library, and data
    with _quiet():
        _, info = family.model.from_pretrained(
            None,
            config=config,
            state_dict=_without_data(weights),
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])  # a tensor too much does no harm
    faults = [f"weights: missing {_some(missing)}"] if missing else []
    for name, of_file, of_model in sorted(info["mismatched_keys"]):
        faults.append(f"weights: {name} has the shape {tuple(of_file)}, and should have {tuple(of_model)}")
    return [*faults, *info.get("error_msgs", [])]


def find_weights(folder: Path) -> dict[str, Path]:
    """
    Which file holds each tensor; of a single file and an index the file wins, as in transformers.

    Raises:
        `ValueError`: if there are none, or shards of the index are missing.
    """
    if (folder / _WEIGHTS).is_file():
        with open_tensors(folder / _WEIGHTS) as tensors:
            return dict.fromkeys(tensors.keys(), folder / _WEIGHTS)
    if (folder / _INDEX).is_file():
        weights = {name: folder / file for name, file in read_json(folder / _INDEX)["weight_map"].items()}
        missing = sorted({file.name for file in weights.values() if not file.is_file()})
        if missing:
            raise ValueError(f"{folder} lacks shards that {_INDEX} names: {', '.join(missing)}.")
        return weights
    raise ValueError(
        f"{folder} has no {_WEIGHTS} and no {_INDEX}. Pickled weights (.bin, .pt, .pth, .ckpt) are refused: opening "
        "one can run code that is in it: `from_pretrained(...)`, then `save_pretrained(...)`, converts them."
    )


def _without_data(weights: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Tensors of the names and shapes that the files have, read from their headers. A loader asks for no dtype."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(weights.values())):
        with open_tensors(file) as stored:
            for name in stored.keys():  # noqa: SIM118 (no dict)
                tensors[name] = torch.empty(stored.get_slice(name).get_shape(), device="meta")
    return tensors


def _find_family(folder: Path) -> Family | None:
    if not (folder / "config.json").is_file():
        return None
    model_type = read_json(folder / "config.json").get("model_type")
    return next((family for family in FAMILIES if family.config.model_type == model_type), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its report and its bar: the caller says what is wrong."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
