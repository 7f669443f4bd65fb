"""From a checkpoint to a Hub folder with FSR, without ever loading the model."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import CLIPConfig, CLIPTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from .cards import card_data, read_base, write_card
from .families import FAMILIES, Family
from .files import check_sizes, find_file, foreign_code, known_files, read_json
from .manifest import CARD, write_manifest
from .original import convert_original_config, is_original_config, make_processor
from .staging import beside, staging_folder
from .verify import check_loads
from .weights import PICKLE, Clip, check_vision_tower, find_weights, open_clip, read_text_side, write_weights


__all__ = ["export"]

_CONFIG = "config.json"
_PROCESSOR = "processor_config.json"
_DOWNLOADED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY.md", CARD)
_TEXT_ENCODER = "text_encoder."  # the submodule of an FSR model that holds CLIP's text side


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
    Of `source`, files of known names are copied and no others; none of them may lead out of it, or name other code.

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
            Whether to replace what is in `output_dir`. What no export made, or somebody has changed since, is not
            deleted: it stays in `OUTPUT_DIR.replaced`.
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
        `ValueError`: for a checkpoint of another architecture, a file that cannot be used, weights that are not
            safetensors, a `text_encoder` that the vision tower did not come from (see [`check_vision_tower`]), a value
            that [`FSRConfig`] refuses, or a result that does not load.
        `FileExistsError`: if `output_dir` holds something that may not be replaced, or another export makes it.
        `OSError`: if a file cannot be read or written.
    """
    output_dir = Path(output_dir).resolve()
    if base_model is not None:
        _check_id("base_model", base_model)
    for place in (output_dir, beside(output_dir, "incomplete"), beside(output_dir, "replaced")):
        for name, used in (("source", source), ("text encoder", text_encoder)):
            used = used if used is not None and os.path.isdir(used) else None
            if used is not None and place in (Path(used).resolve(), *Path(used).resolve().parents):
                raise ValueError(f"`output_dir` {output_dir}: {place} holds the {name} {used}: choose another folder.")
    with staging_folder(output_dir, force) as staging:
        folder = _fetch(source)
        clip = None if text_encoder is None else open_clip(_fetch_clip(text_encoder))
        weights = find_weights(folder)
        stock = _read_config(folder, len(weights))
        family, config = _make_config(folder, stock, clip, fsr_config or {})
        names = _check_files(folder, family)
        text_side = _take_text_side(folder, clip, family, config, weights)
        found_base, base_metadata = read_base(source, folder)
        base_model = base_model or found_base

        write_weights(weights, text_side, staging, link=link, progress=progress)
        _copy_files(folder, names, staging)
        if is_original_config(stock):
            with _named(folder, "it makes no processor"):
                processor = make_processor(folder, config)
            with _named(staging, "the processor cannot be written"):
                processor.save_pretrained(staging)
        else:
            _write_processor(family, clip, staging)
            _name_processor(family, staging)
        config.save_pretrained(staging)  # last of what a loader needs: without it nothing loads
        if verify and (faults := check_loads(staging)):
            raise ValueError(f"The export of {source} would not load whole: {'; '.join(faults)}")
        write_card(staging, base_model, base_metadata=base_metadata)
        _write_notice(staging, base_model)
        write_manifest(staging)
    return output_dir


@contextmanager
def _named(place: Path, fault: str) -> Iterator[None]:
    """Errors of transformers and tokenizers, which can be of any kind, as a `ValueError` that names `place`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{place}: {fault}: {type(error).__name__}: {error}") from error


def _check_id(argument: str, value: str) -> None:
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(f"`{argument}` {value!r} is no id of a Hub repository, org/name: {error}") from error


def _fetch(name: str | os.PathLike, weights: str = "*.safetensors") -> Path:
    """The folder called `name`, or what an export reads of the Hub repository of that id."""
    if os.path.isdir(name):
        return Path(name)
    repo_id, _, revision = str(name).partition("@")
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision or None,
            allow_patterns=[weights, *_DOWNLOADED],
            ignore_patterns=["*/*.safetensors", "*/*.bin", "original/*", "onnx/*"],
        )
    except HFValidationError as error:
        raise ValueError(f"{str(name)!r} is neither a folder nor the id of a Hub repository.") from error
    return Path(folder)


def _fetch_clip(name: str | os.PathLike) -> Path:
    """As `_fetch`; of OpenAI's repositories, which have no safetensors of every CLIP, the pickled tensors."""
    folder = _fetch(name)
    return folder if list(folder.glob("*.safetensors")) else _fetch(name, PICKLE)


def _read_config(folder: Path, num_tensors: int) -> dict[str, Any]:
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"{folder} has no {_CONFIG}: not a checkpoint of transformers.")
    file = find_file(folder, _CONFIG)
    content = read_json(file)
    check_sizes(file, content, num_tensors)
    return content


def _make_config(
    folder: Path, stock: dict[str, Any], clip: Clip | None, fsr_config: dict[str, Any]
) -> tuple[Family, Any]:
    """The family of the checkpoint in `folder`, whose config is `stock`, and its config with FSR."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds a PEFT adapter: export its base, or what `merge_and_unload()` makes of both."
        )
    model_type = "llava_onevision" if is_original_config(stock) else stock.get("model_type")
    family = next((f for f in FAMILIES if model_type in (f.stock_model_type, f.config.model_type)), None)
    if family is None:
        known = ", ".join(f"{f.stock_model_type!r}, {f.config.model_type!r}" for f in FAMILIES)
        raise ValueError(f"{folder} is a checkpoint of `model_type` {model_type!r}; there is FSR for {known}.")
    stock = {key: value for key, value in stock.items() if key not in ("auto_map", "model_type")}
    for fault in foreign_code(stock, family.auto_map):
        raise ValueError(f"{folder / _CONFIG}: {fault}. Remove it.")
    with _named(folder / _CONFIG, f"with `fsr_config` {fsr_config} it makes no config of FSR"):
        if is_original_config(stock):
            stock = convert_original_config(stock)
        config: Any = family.config.from_dict(stock, fsr_config=fsr_config)
    config.architectures = [family.model.__name__]
    if clip is not None:
        if not family.takes_text_encoder:
            raise ValueError(f"{model_type!r} ranks tokens by saliency alone: leave out `text_encoder`.")
        if config.fsr_config.text_encoder_config is not None:
            raise ValueError(f"{folder} has a text encoder already: leave out `text_encoder`.")
        config.fsr_config.text_encoder_config = _make_text_config(clip, config)
        config.fsr_config.relevance = fsr_config.get("relevance")
    elif config.fsr_config.text_encoder_config is None:
        if fsr_config.get("relevance") not in (None, "none"):
            raise ValueError(
                f'`relevance="{fsr_config["relevance"]}"` needs a CLIP checkpoint: name it with `text_encoder`.'
            )
        config.fsr_config.relevance = "none"
    return family, config


def _make_text_config(clip: Clip, config: Any) -> Any:
    """The config of CLIP's text side, after a check that its image side could be the vision tower."""
    content = _read_config(clip.folder, len(clip.tensors))
    if content.get("model_type") != CLIPConfig.model_type:
        raise ValueError(
            f"`text_encoder` {clip.folder} is of `model_type` {content.get('model_type')!r}, but has to be a 'clip'."
        )
    with _named(clip.folder / _CONFIG, "it makes no config of CLIP"):
        clip_config: Any = CLIPConfig.from_dict(content)
    for name in ("hidden_size", "patch_size", "image_size"):
        of_clip, of_tower = getattr(clip_config.vision_config, name), getattr(config.vision_config, name, None)
        if of_clip != of_tower:
            raise ValueError(
                f"`text_encoder` {clip.folder} is not the CLIP that the vision tower came from: {name} {of_clip}, but "
                f"{of_tower} in the tower."
            )
    clip_config.text_config.projection_dim = clip_config.projection_dim
    return clip_config.text_config


def _take_text_side(
    folder: Path, clip: Clip | None, family: Family, config: Any, weights: dict[str, Path]
) -> dict[str, torch.Tensor]:
    """The tensors of CLIP's text side that are to be added, under their names in the model."""
    with _named(folder / _CONFIG, "it makes no model"), torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in family.model(config).state_dict().items()}
    in_clip = {name: name.partition(_TEXT_ENCODER)[2] for name in shapes if _TEXT_ENCODER in name}
    if clip is not None:
        check_vision_tower(clip, weights)
        _check_files(clip.folder, family)
        text_side = read_text_side(clip, {of_clip: shapes[name] for name, of_clip in in_clip.items()})
        return {name: text_side[of_clip] for name, of_clip in in_clip.items()}
    if missing := sorted(in_clip.keys() - weights.keys()):
        raise ValueError(f"{folder} has a text encoder in its config, but lacks weights of it: {', '.join(missing)}.")
    return {}


def _check_files(folder: Path, family: Family) -> list[str]:
    """The files to copy, after a look at what their JSON says."""
    names = known_files(folder)
    _check_tokenizer(folder)
    for name in names:
        if name.endswith(".json"):
            for fault in foreign_code(read_json(folder / name), family.auto_map):
                raise ValueError(f"{folder / name}: {fault}. An export does not carry it along: remove it.")
    return names


def _check_tokenizer(folder: Path) -> None:
    """A tokenizer without a vocabulary would load, with its special tokens alone."""
    complete = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    if not any(all((folder / name).is_file() for name in names) for names in complete):
        raise ValueError(f"{folder} has no tokenizer.json: take the tokenizer's files from the checkpoint's source.")


def _copy_files(folder: Path, names: list[str], staging: Path) -> None:
    for name in names:
        (staging / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, staging / name)


def _write_processor(family: Family, clip: Clip | None, staging: Path) -> None:
    """Makes the processor in `staging` the family's, where it has one, with CLIP's tokenizer if it needs that."""
    has_query = clip is not None or (staging / "query_tokenizer").is_dir()
    if family.processor is None or (family.takes_text_encoder and not has_query):
        return
    if clip is not None:
        with _named(clip.folder, "its tokenizer does not load"):
            tokenizer = CLIPTokenizer.from_pretrained(clip.folder)
        with _named(staging, "the tokenizer cannot be written"):
            tokenizer.save_pretrained(staging / "query_tokenizer")
    auto_map = {"AutoProcessor": family.auto_map["AutoProcessor"]}
    _update_json(staging / _PROCESSOR, {"processor_class": family.processor.__name__, "auto_map": auto_map})


def _name_processor(family: Family, staging: Path) -> None:
    """Writes down the class of a stock processor whose files leave it to the stock `model_type`, which is gone."""
    files = [staging / name for name in (_PROCESSOR, "preprocessor_config.json", "tokenizer_config.json")]
    if not any("processor_class" in read_json(file) for file in files if file.is_file()):
        _update_json(staging / _PROCESSOR, {"processor_class": PROCESSOR_MAPPING_NAMES[family.stock_model_type]})


def _write_notice(staging: Path, base_model: str | None) -> None:
    """The notice that the licence of the base asks for."""
    models = card_data()["models"].values()
    name = next((facts["licence"] for facts in models if facts.get("base_model", base_model) == base_model), None)
    licence = card_data()["licences"].get(name, {})
    if "notice" in licence and not (staging / "NOTICE").exists():
        (staging / "NOTICE").write_text(f"{licence['notice']}\n{licence['url']}\n", encoding="utf-8")


def _update_json(file: Path, entries: dict[str, Any]) -> None:
    content = (read_json(file) if file.is_file() else {}) | entries
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
