"""From a checkpoint to a Hub folder with FSR, without ever loading the model."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import CLIPConfig, CLIPTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import logging

from ..configuration.configuration_fsr_llava_video import is_original_config
from .cards import card_data, read_base, write_card
from .families import FAMILIES, Family
from .manifest import MANIFEST, read_manifest, write_manifest
from .original import make_processor
from .verify import check_loads, find_weights, open_tensors


__all__ = ["export"]

logger = logging.get_logger(__name__)

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLE = "pytorch_model.bin"
# What travels as it is: tokenizers, processors, templates, generation defaults, licences. No weights, no code.
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "chat_templates/*", "query_tokenizer/*", "LICENSE*", "NOTICE*")
_CARD = "README.md"
_MARK = ".fsr-hf-export"  # in a folder that an export is filling
_TEXT_ENCODER = "model.text_encoder."  # the submodule of every FSR model that holds CLIP's text side


def export(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    text_encoder: str | os.PathLike | None = None,
    fsr_config: dict[str, Any] | None = None,
    base_model: str | None = None,
    force: bool = False,
    link: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> Path:
    r"""
    Makes a Hub folder with FSR out of a checkpoint: the same weights, a config that prunes, the code, the tokenizer
    and the processor, a model card, and a manifest of them all. The model is not loaded: its shards are copied as they
    are, so memory does not grow with its size. The folder appears when it is complete; until then it is called
    `output_dir` with `.incomplete` at its end, and has no config. What a killed export leaves, the next one removes.

    Args:
        source (`str` or `os.PathLike`):
            A stock or an FSR checkpoint: a folder, or a Hub id, `org/name` or `org/name@revision`.
        output_dir (`str` or `os.PathLike`):
            The folder to make.
        text_encoder (`str` or `os.PathLike`, *optional*):
            The CLIP checkpoint that the vision tower came from, a folder or a Hub id; for LLaVA-1.5
            `openai/clip-vit-large-patch14-336`. Its text side becomes one more shard and its tokenizer a part of the
            processor, so that Focus looks for what the question names. Without it, saliency alone decides.
        fsr_config (`dict`, *optional*):
            Fields of [`FSRConfig`] that are to differ from the family's defaults: `{"num_visual_tokens": 64}`.
        base_model (`str`, *optional*):
            The Hub id of `source` for the model card, where `source` is a folder. The licence depends on it.
        force (`bool`, *optional*, defaults to `False`):
            Whether to replace what is in `output_dir`. What no export made is not deleted: it stays in
            `OUTPUT_DIR.replaced`.
        link (`bool`, *optional*, defaults to `False`):
            Whether to hard-link the shards, where the file system can, in place of copying them. It takes neither time
            nor space, but whoever later writes into one of the two files changes both.
        verify (`bool`, *optional*, defaults to `True`):
            Whether to check that the result loads: config and processor are loaded, and names and shapes of the
            weights are compared with the model's.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `Path`: `output_dir`.

    Raises:
        `ValueError`: for a checkpoint of another architecture, weights that are not safetensors, a `text_encoder` that
            the vision tower did not come from, a value that [`FSRConfig`] refuses, or a result that does not load.
        `FileExistsError`: if `output_dir` holds something that may not be replaced.
    """
    output_dir = Path(output_dir).resolve()
    _check_output(output_dir, force)
    folder = _fetch(source)
    clip_folder = None if text_encoder is None else _fetch_clip(text_encoder)
    for name, used in (("source", folder), ("text encoder", clip_folder)):
        if used is not None and output_dir in (used.resolve(), *used.resolve().parents):
            raise ValueError(f"`output_dir` {output_dir} holds the {name} {used}: choose another folder.")
    weights = find_weights(folder)
    family, config = _make_config(folder, clip_folder, fsr_config or {})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in family.model(config).state_dict().items()}
    text_shapes = {name: shape for name, shape in shapes.items() if name.startswith(_TEXT_ENCODER)}
    text_side = {} if clip_folder is None else _read_text_side(clip_folder, text_shapes)
    missing = text_shapes.keys() - text_side.keys() - weights.keys()
    if missing:
        raise ValueError(f"{source} has a text encoder in its config, but lacks weights of it: {', '.join(missing)}.")
    found_base, base_metadata = read_base(source, folder)
    base_model = base_model or found_base

    with _replacing(output_dir) as staging:
        _write_weights(weights, text_side, staging, link, progress)
        _copy_files(folder, staging)
        if is_original_config(_read_json(folder / _CONFIG)):
            make_processor(folder, config).save_pretrained(staging)
        else:
            _write_processor(family, clip_folder, staging)
            _name_processor(family, staging)
        config.save_pretrained(staging)  # last of what a loader needs: without it nothing loads
        if verify and (faults := check_loads(staging)):
            raise ValueError(f"The export of {source} would not load whole: {'; '.join(faults)}")
        write_card(staging, base_model, base_metadata=base_metadata)
        _write_notice(staging, base_model)
        write_manifest(staging)
    return output_dir


def _check_output(output_dir: Path, force: bool) -> None:
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    if not force:
        raise FileExistsError(f"`output_dir` {output_dir} is not empty: choose another, or replace it with `force`.")
    if not output_dir.is_dir():
        raise FileExistsError(f"`output_dir` {output_dir} is a file: choose another.")
    replaced = _beside(output_dir, "replaced")
    if replaced.exists() and not _is_export(replaced):
        raise FileExistsError(f"{replaced} is in the way of what is in `output_dir` now: move it away.")


def _beside(output_dir: Path, state: str) -> Path:
    return output_dir.with_name(f"{output_dir.name}.{state}")


def _is_export(folder: Path) -> bool:
    """Whether an export made everything in `folder`, so that nothing is lost with it."""
    if not (folder / MANIFEST).is_file():
        return not any(folder.iterdir())
    listed = {name.partition("/")[0] for name in read_manifest(folder)[1]} | {MANIFEST, "README.md"}
    return {path.name for path in folder.iterdir()} <= listed


def _fetch(name: str | os.PathLike, weights: str = "*.safetensors") -> Path:
    """The folder called `name`, or what an export reads of the Hub repository of that id."""
    if os.path.isdir(name):
        return Path(name)
    repo_id, _, revision = str(name).partition("@")
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision or None,
            allow_patterns=[weights, *_COPIED, _CARD],
            ignore_patterns=["*/*.safetensors", "*/*.bin", "original/*", "onnx/*"],
        )
    except HFValidationError as error:
        raise ValueError(f"{str(name)!r} is neither a folder nor the id of a Hub repository.") from error
    return Path(folder)


def _fetch_clip(name: str | os.PathLike) -> Path:
    """As `_fetch`; of OpenAI's repositories, which have no safetensors of every CLIP, the pickled tensors."""
    folder = _fetch(name)
    return folder if list(folder.glob("*.safetensors")) else _fetch(name, _PICKLE)


def _make_config(folder: Path, clip_folder: Path | None, fsr_config: dict[str, Any]) -> tuple[Family, Any]:
    """The family of the checkpoint in `folder`, and its config with FSR."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a PEFT adapter: export its base, or what `merge_and_unload()` makes of both."
        )
    stock = _read_json(folder / _CONFIG)
    model_type = "llava_onevision" if is_original_config(stock) else stock.get("model_type")
    family = next((f for f in FAMILIES if model_type in (f.stock_model_type, f.config.model_type)), None)
    if family is None:
        known = ", ".join(f"{f.stock_model_type!r}, {f.config.model_type!r}" for f in FAMILIES)
        raise ValueError(f"{folder} is a checkpoint of `model_type` {model_type!r}; there is FSR for {known}.")
    config: Any = family.config.from_dict(
        {key: value for key, value in stock.items() if key not in ("auto_map", "model_type")}, fsr_config=fsr_config
    )
    config.architectures = [family.model.__name__]
    if clip_folder is not None:
        if not family.takes_text_encoder:
            raise ValueError(f"{model_type!r} ranks tokens by saliency alone: leave out `text_encoder`.")
        if config.fsr_config.text_encoder_config is not None:
            raise ValueError(f"{folder} has a text encoder already: leave out `text_encoder`.")
        config.fsr_config.text_encoder_config = _make_text_config(clip_folder, config)
        config.fsr_config.relevance = fsr_config.get("relevance")
    elif config.fsr_config.text_encoder_config is None:
        if fsr_config.get("relevance") == "clip":
            raise ValueError('`relevance="clip"` needs a CLIP checkpoint: name it with `text_encoder`.')
        config.fsr_config.relevance = "none"
    return family, config


def _make_text_config(clip_folder: Path, config: Any) -> Any:
    """The config of CLIP's text side, after a check that its image side is the vision tower."""
    model_type = _read_json(clip_folder / _CONFIG).get("model_type")
    if model_type != CLIPConfig.model_type:
        raise ValueError(f"`text_encoder` {clip_folder} is of `model_type` {model_type!r}, but has to be a 'clip'.")
    clip = CLIPConfig.from_pretrained(clip_folder)
    for name in ("hidden_size", "patch_size", "image_size"):
        of_clip, of_tower = getattr(clip.vision_config, name), getattr(config.vision_config, name, None)
        if of_clip != of_tower:
            raise ValueError(
                f"`text_encoder` {clip_folder} is not the CLIP that the vision tower came from: {name} {of_clip}, but "
                f"{of_tower} in the tower."
            )
    clip.text_config.projection_dim = clip.projection_dim
    return clip.text_config


def _read_text_side(clip_folder: Path, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The tensors of CLIP's text side under the names they have in an FSR model, mapped from the file."""
    names = {name.removeprefix(_TEXT_ENCODER): name for name in shapes}
    tensors: dict[str, torch.Tensor] = {}
    if (clip_folder / _PICKLE).is_file() and not list(clip_folder.glob("*.safetensors")):
        # Unpickled as tensors, which runs nothing, and written as safetensors.
        try:
            stored = torch.load(clip_folder / _PICKLE, map_location="cpu", weights_only=True, mmap=True)
        except (UnpicklingError, RuntimeError) as error:
            raise ValueError(
                f"`text_encoder` {clip_folder}: {_PICKLE} holds more than tensors and is refused."
            ) from error
        tensors = {names[name]: tensor for name, tensor in stored.items() if name in names}
    else:
        weights = find_weights(clip_folder)
        for file in sorted(set(weights.values())):
            with open_tensors(file) as stored:
                tensors |= {names[name]: stored.get_tensor(name) for name in names.keys() & set(stored.keys())}
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(shape):
            raise ValueError(
                f"`text_encoder` {clip_folder}: {name.removeprefix(_TEXT_ENCODER)} should be of shape {tuple(shape)}, "
                f"but {'is missing' if found is None else f'is of shape {found}'}."
            )
    return tensors


@contextmanager
def _replacing(output_dir: Path) -> Iterator[Path]:
    """A new folder beside `output_dir` that takes its place at the end, and is gone if anything fails before."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    staging, old = _beside(output_dir, "incomplete"), _beside(output_dir, "replaced")
    if staging.exists() and not (staging / _MARK).exists():
        raise FileExistsError(f"{staging} is in the way, and no export left it there: move it away.")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    (staging / _MARK).touch()
    try:
        yield staging
        (staging / _MARK).unlink()
        if output_dir.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a killed export, or `_check_output` would have refused
            output_dir.rename(old)
        staging.rename(output_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if old.exists() and _is_export(old):
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        logger.warning(f"{output_dir} held what no export made: it is in {old} now.")


def _copy_files(folder: Path, staging: Path) -> None:
    for path in (path for pattern in _COPIED for path in folder.glob(pattern)):
        if path.is_file() and path.name not in (_CONFIG, MANIFEST) and not path.name.endswith(".index.json"):
            target = staging / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _write_processor(family: Family, clip_folder: Path | None, staging: Path) -> None:
    """Makes the processor in `staging` the family's, where it has one, with CLIP's tokenizer if it needs that."""
    has_query = clip_folder is not None or (staging / "query_tokenizer").is_dir()
    if family.processor is None or (family.takes_text_encoder and not has_query):
        return
    if clip_folder is not None:
        CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(staging / "query_tokenizer")
    file = staging / "processor_config.json"
    settings = _read_json(file) if file.is_file() else {}
    settings["processor_class"] = family.processor.__name__
    settings["auto_map"] = {"AutoProcessor": family.auto_map["AutoProcessor"]}
    _write_json(file, settings)


def _name_processor(family: Family, staging: Path) -> None:
    """Writes down the class of a stock processor whose files leave it to the stock `model_type`, which is gone."""
    names = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    if not any("processor_class" in _read_json(staging / name) for name in names if (staging / name).is_file()):
        _write_json(staging / names[0], {"processor_class": PROCESSOR_MAPPING_NAMES[family.stock_model_type]})


def _write_notice(staging: Path, base_model: str | None) -> None:
    """The notice that the licence of the base asks for."""
    models = card_data()["models"].values()
    name = next((facts["licence"] for facts in models if facts.get("base_model", base_model) == base_model), None)
    licence = card_data()["licences"].get(name, {})
    if "notice" in licence and not (staging / "NOTICE").exists():
        (staging / "NOTICE").write_text(f"{licence['notice']}\n{licence['url']}\n", encoding="utf-8")


def _write_weights(
    weights: dict[str, Path], text_side: dict[str, torch.Tensor], staging: Path, link: bool, progress: bool
) -> None:
    files = sorted(set(weights.values()))
    count = len(files) + bool(text_side)
    shard_names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    if count == 1:
        shard_names = [_WEIGHTS]
    new_names = dict(zip(files, shard_names, strict=False))
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, disable=not progress) as bar:
        for file, name in new_names.items():
            bar.set_description(name)
            _copy_shard(file, staging / name, bar, link)
    if text_side:
        save_file(text_side, staging / shard_names[-1], metadata={"format": "pt"})
    if count > 1:
        weight_map = {name: new_names[file] for name, file in weights.items()}
        weight_map |= dict.fromkeys(text_side, shard_names[-1])
        total_size = sum(_payload_size(staging / name) for name in shard_names)
        _write_json(staging / _INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    if text_side:
        shutil.copymode(staging / _INDEX, staging / shard_names[-1])  # safetensors makes files for their owner alone


def _copy_shard(source: Path, target: Path, bar: tqdm, link: bool) -> None:
    if link:
        with suppress(OSError):  # another file system: copy
            os.link(source.resolve(), target)
            bar.update(target.stat().st_size)
            return
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while block := reader.read(1 << 24):
            writer.write(block)
            bar.update(len(block))


def _payload_size(file: Path) -> int:
    """Bytes of the tensors in a safetensors file: all but the header and its length, 8 bytes."""
    with open(file, "rb") as reader:
        return file.stat().st_size - 8 - int.from_bytes(reader.read(8), "little")


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
