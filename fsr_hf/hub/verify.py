"""Checks of a Hub folder that run nothing of it: its manifest, its code, and whether its weights would load whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.hf_api import RepoFile
from transformers import AutoProcessor, GenerationConfig
from transformers.utils import logging

from ..version import __version__
from .families import FAMILIES, Family
from .files import check_sizes, foreign_code, read_json
from .flatten import flat_files
from .manifest import MANIFEST, Fingerprint, Manifest, compare_manifest, folder_files, read_manifest
from .run_check import check_run
from .weights import INDEX, WEIGHTS, find_weights, open_tensors, some_of


__all__ = ["check_code", "check_folder", "check_loads", "verify"]

# What `verify` reads of a repository: a loader takes code, or the names of code, out of these.
_READ = (".jinja", ".json", ".model", ".py", ".txt")
# Loading it can run code that is in it. No export writes any.
_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth", ".pyc", ".so")


def verify(source: str | os.PathLike, *, manifest_of: str | os.PathLike | None = None, run: bool = False) -> list[str]:
    """
    Checks a Hub folder, or a repository on the Hub, and runs nothing of it (but for `run`).

    Every file has to be what the manifest says, and listed if a loader could take it. The code has to be what this
    version of the package writes, and no JSON file may name other code, whatever the manifest says of them. Of a
    folder the weights are hashed; of a repository, the hashes that the server has of them are compared. A manifest can
    be rewritten together with the weights: `manifest_of` compares with that of another place (`docs/security.md`).

    Args:
        source (`str` or `os.PathLike`):
            A folder, or a Hub id, `org/name` or `org/name@revision`.
        manifest_of (`str` or `os.PathLike`, *optional*):
            Another folder or Hub id whose manifest is to be met, in place of the one in `source`.
        run (`bool`, *optional*, defaults to `False`):
            Whether to run the code of `source` as well, if nothing differs: pruned decoding under the installed
            transformers against a step-by-step loop, on a tiny twin of the model ([`check_run`]). Code of another
            version of the package is not run: whoever wrote the folder also wrote which version it is.

    Returns:
        `list[str]`: a line for each difference, none if all is well.

    Raises:
        `ValueError`: for a `source` or a `manifest_of` that is neither, or a `manifest_of` without a manifest.
    """
    folder, elsewhere = (Path(source), {}) if os.path.isdir(source) else _fetch_readable_files(str(source))
    manifest = None if manifest_of is None else _fetch_manifest(manifest_of)
    differences = check_folder(folder, elsewhere, manifest)
    return check_run(folder) if run and not differences else differences


def check_folder(
    folder: Path,
    elsewhere: dict[str, Fingerprint] | None = None,
    manifest: Manifest | None = None,
    *,
    allow_code_alone: bool = False,
) -> list[str]:
    """[`verify`] of a folder; the other arguments are those of [`compare_manifest`]."""
    differences = []
    try:
        manifest = manifest or read_manifest(folder)
        differences += compare_manifest(folder, manifest, elsewhere, allow_code_alone=allow_code_alone)
    except ValueError as error:
        differences.append(str(error))
    version = __version__ if manifest is None else manifest.version
    differences += check_code(folder, version, elsewhere)
    if version != __version__:
        differences.append(
            f"its code is said to be of fsr-hf {version}, and could not be compared: install that version to check it"
        )
    return differences


def _fetch_readable_files(name: str) -> tuple[Path, dict[str, Fingerprint]]:
    """The code and settings of a repository in a folder, and size and SHA-256 of the other large files."""
    repo_id, _, revision = name.partition("@")
    try:
        commit = HfApi().model_info(repo_id, revision=revision or None).sha
        entries = [
            e for e in HfApi().list_repo_tree(repo_id, recursive=True, revision=commit) if isinstance(e, RepoFile)
        ]
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder nor the id of a Hub repository.") from error
    large = {
        entry.path: Fingerprint(entry.lfs.size, entry.lfs.sha256)
        for entry in entries
        if entry.lfs is not None and not entry.path.endswith(_READ)
    }
    return Path(snapshot_download(repo_id, revision=commit, ignore_patterns=list(large))), large


def _fetch_manifest(source: str | os.PathLike) -> Manifest:
    if os.path.isdir(source):
        return read_manifest(Path(source))
    repo_id, _, revision = str(source).partition("@")
    try:
        return read_manifest(Path(hf_hub_download(repo_id, MANIFEST, revision=revision or None)).parent)
    except HFValidationError as error:
        raise ValueError(f"{str(source)!r} is neither a folder nor the id of a Hub repository.") from error
    except EntryNotFoundError as error:
        raise ValueError(f"{source} has no {MANIFEST}: name a repository of fsr-hf.") from error


def check_code(folder: Path, version: str = __version__, elsewhere: dict[str, Fingerprint] | None = None) -> list[str]:
    """
    What is wrong with the code of a Hub folder, and with what a loader would take in its place: where its JSON files
    send a loader, adapters, pickles, a second set of weights, and how the code differs from what the package writes,
    if that is of the `version` that wrote it.
    """
    names = {*folder_files(folder), *(elsewhere or {})}
    faults = []
    family = None
    try:
        family = find_family(folder)
    except ValueError as error:
        faults.append(str(error))
    for name in sorted(name for name in names if name.endswith(".json") and (folder / name).is_file()):
        try:
            content = read_json(folder / name)
        except ValueError as error:
            if name != "config.json":  # said above
                faults.append(str(error))
            continue
        auto_map = {} if family is None else family.auto_map
        if name == "config.json" and family is not None and content.get("auto_map") != auto_map:
            faults.append(f"{name}: `auto_map` is {content.get('auto_map')}, and should be {auto_map}")
            content.pop("auto_map", None)
        faults += [f"{name}: {fault}" for fault in foreign_code(content, auto_map)]
    if "adapter_config.json" in {name.rpartition("/")[2] for name in names}:
        faults.append(
            "adapter_config.json makes the folder an adapter: its base would be loaded, and run, in its place"
        )
    if {WEIGHTS, INDEX} <= names:
        faults.append(f"{WEIGHTS} would be loaded in place of the weights that {INDEX} names")
    faults += [f"{name} can run code when it is loaded" for name in sorted(names) if name.endswith(_PICKLES)]
    if family is not None and version == __version__:
        wanted = flat_files(family)
        for name in sorted(wanted):
            if not (folder / name).is_file():
                faults.append(f"{name} is missing")
            elif (folder / name).read_bytes() != wanted[name].encode():
                faults.append(f"{name} is not that of fsr-hf {version}")
        strangers = {name for name in names if name.endswith(".py")} - wanted.keys()
        faults += [f"{name} is no file of fsr-hf {version}" for name in sorted(strangers)]
    return faults


def check_loads(folder: Path) -> list[str]:
    """
    What would go wrong when the Hub folder is loaded. Config and processor are; the model is built and filled without
    data, by its own loader, from the names and shapes in the headers of the weights.
    """
    try:
        family = find_family(folder)
        weights = find_weights(folder)
        shapes = _without_data(weights)
        check_sizes(folder / "config.json", read_json(folder / "config.json"), len(weights))
    except ValueError as error:
        return [str(error)]
    try:
        with _quiet():
            config: Any = family.config.from_pretrained(folder)
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            if (folder / "generation_config.json").is_file():
                GenerationConfig.from_pretrained(folder).validate()
            faults = _check_placeholders(config, processor)
            if getattr(config, "quantization_config", None) is not None:
                return faults  # its loader wants the library, and data
            _, info = family.model.from_pretrained(
                None,
                config=config,
                state_dict=shapes,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and tokenizers raise errors of all kinds
        return [f"does not load: {type(error).__name__}: {error}"]
    missing = sorted(info["missing_keys"])  # a tensor too much does no harm
    faults += [f"weights: missing {some_of(missing)}"] if missing else []
    for name, of_file, of_model in sorted(info["mismatched_keys"]):
        faults.append(f"weights: {name} has the shape {tuple(of_file)}, and should have {tuple(of_model)}")
    return [*faults, *info.get("error_msgs", [])]


def _check_placeholders(config: Any, processor: Any) -> list[str]:
    """A tokenizer that is not the checkpoint's has other ids for the placeholders of images and videos."""
    faults = []
    for name in ("image_token_id", "video_token_id"):
        of_model, of_processor = getattr(config, name, None), getattr(processor, name, None)
        if None not in (of_model, of_processor) and of_model != of_processor:
            faults.append(
                f"tokenizer: its `{name}` is {of_processor}, but {of_model} in config.json: it is another checkpoint's"
            )
    return faults


def _without_data(weights: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Tensors of the names and shapes that the files have, read from their headers. A loader asks for no dtype."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(weights.values())):
        with open_tensors(file) as stored:
            for name in stored.keys():  # noqa: SIM118 (no dict)
                tensors[name] = torch.empty(stored.get_slice(name).get_shape(), device="meta")
    return tensors


def find_family(folder: Path) -> Family:
    """
    The family of a Hub folder.

    Raises:
        `ValueError`: if its `config.json` is missing, cannot be read or is not one of FSR.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError("config.json is missing, or no config of FSR")
    model_type = read_json(file).get("model_type")
    for family in FAMILIES:
        if family.config.model_type == model_type:
            return family
    raise ValueError(f"config.json is no config of FSR: its `model_type` is {model_type!r}")


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
