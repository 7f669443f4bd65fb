"""
300 folders that a seed has spoilt: `export`, `verify` and a load give the right result or a clear error, and touch no
file outside. `FSR_HF_SEEDS=1000:1200` tries others.
"""

import json
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from fsr_hf import export
from fsr_hf.hub.verify import check_loads, verify


START, END = map(int, os.environ.get("FSR_HF_SEEDS", "0:300").split(":"))
PARTS = 10  # tests that share the folders

SECRET = "known-to-nobody-else"
VALUES = (None, True, 0, -1, 7, 1.5, 1e300, "", "x", "../x", [], [1], {}, {"x": 1}, [[[]]])
FOR_PEOPLE = ("notes.md", "LICENSE", "NOTICE.txt", "picture.png")
EXTRA = (
    *FOR_PEOPLE,
    *("adapter_config.json", "adapter_model.safetensors", "added_tokens.json", "audio_tokenizer_config.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/x.jinja", "credentials.json"),
    *("custom_generate/generate.py", "evil.py", "merges.txt", "model.safetensors", "model.safetensors.index.json"),
    *("notes.txt", "optimizer.pt", "preprocessor_config.json", "processor_config.json", "pytorch_model.bin"),
    *("query_tokenizer/vocab.json", "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"),
    *("video_preprocessor_config.json", "vocab.json", "a\nb.json", "\udcff.json"),
)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file of a folder, and where links lead."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for name, path in paths.items()
        if path.is_symlink() or path.is_file()
    }


def swap(folder: Path, rng: random.Random) -> None:
    one, other = rng.sample(files_of(folder), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def truncate(folder: Path, rng: random.Random) -> None:
    file = rng.choice(files_of(folder))
    file.write_bytes(file.read_bytes()[: rng.choice([0, 1, 8, rng.randrange(file.stat().st_size + 1)])])


def flip(folder: Path, rng: random.Random) -> None:
    file = rng.choice([file for file in files_of(folder) if file.stat().st_size])
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 20])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def remove(folder: Path, rng: random.Random) -> None:
    rng.choice(files_of(folder)).unlink()


def add(folder: Path, rng: random.Random) -> None:
    file = folder / rng.choice(EXTRA)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(rng.choice([b"", b"{}", b"[]", b"\xff", rng.choice(files_of(folder)).read_bytes()]))


def rename(folder: Path, rng: random.Random) -> None:
    one, other = rng.sample(files_of(folder), 2)
    one.rename(rng.choice([other, folder / "renamed.json", folder / "model-00003-of-00003.safetensors"]))


def make_folder(folder: Path, rng: random.Random) -> None:
    file = rng.choice(files_of(folder))
    file.unlink()
    file.mkdir()


def link(folder: Path, rng: random.Random) -> None:
    file = rng.choice(files_of(folder))
    outside = folder.parent / "outside" / f"{SECRET}-{file.name}"
    outside.parent.mkdir(exist_ok=True)
    try:  # a file that would work
        if file.suffix == ".safetensors":
            save_file(load_file(file), outside, metadata={"format": "pt", "note": SECRET})
        else:
            outside.write_text(json.dumps(json.loads(file.read_text()) | {"note": SECRET}))
    except Exception:
        outside.write_bytes(file.read_bytes() + SECRET.encode())
    target = rng.choice([outside, outside, file, rng.choice(files_of(folder)), folder / "nothing", outside.parent])
    file.unlink()
    file.symlink_to(target)


def change_json(folder: Path, rng: random.Random) -> None:
    """Gives a value at any depth of a JSON file another type, or removes it, or puts all of it into a list."""
    file = rng.choice([file for file in files_of(folder) if file.suffix == ".json"])
    try:
        content = json.loads(file.read_text())
    except ValueError:  # spoilt already
        return
    places = []
    pending = [content]
    while pending:
        part = pending.pop()
        keys = range(len(part)) if isinstance(part, list) else list(part)
        places += [(part, key) for key in keys][:40]
        pending += [part[key] for key in keys if isinstance(part[key], dict | list)]
    if not places or rng.random() < 0.1:
        content = rng.choice([[content], *VALUES])
    else:
        part, key = rng.choice(places)
        if rng.random() < 0.25:
            del part[key]
        else:
            part[key] = rng.choice(VALUES)
    file.write_text(json.dumps(content))


SPOIL = (swap, truncate, flip, remove, add, rename, make_folder, link, change_json, change_json, change_json)


@contextmanager
def untouched(*folders: Path):
    before = [contents(folder) for folder in folders]
    yield
    assert [contents(folder) for folder in folders] == before


def check_export(root: Path, source: Path, clip: Path | None) -> str:
    target = root / "out" / "fsr"
    target.parent.mkdir()
    try:
        folder = export(source, target, text_encoder=clip, progress=False)
    except (OSError, ValueError) as error:
        assert str(root) in str(error), error  # says which file, or which folder
        assert list(target.parent.iterdir()) == []
        return "refused"
    assert list(target.parent.iterdir()) == [folder]
    assert not any(SECRET.encode() in path.read_bytes() for path in files_of(folder))
    assert verify(folder) == []
    check_load(folder)
    return "exported"


def check_load(folder: Path) -> None:
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert AutoProcessor.from_pretrained(folder) is not None
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]


def check_hub_folder(folder: Path, original: dict[str, bytes | str]) -> str:
    found, faults = verify(folder), check_loads(folder)
    assert all(isinstance(line, str) and line for line in [*found, *faults])
    loaded = {name: content for name, content in contents(folder).items() if name not in (*FOR_PEOPLE, "README.md")}
    is_link = {name for name, content in loaded.items() if isinstance(content, str)}
    if not is_link:  # or the file behind it may be the same
        assert (found == []) == (loaded == {k: v for k, v in original.items() if k != "README.md"}), found
    if not faults and not (folder / "adapter_config.json").exists():
        check_load(folder)
    return "clean" if not found else "differs"


@pytest.mark.parametrize("part", range(PARTS))
def test_a_clear_error_or_the_right_result(part, checkpoints, tmp_path):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(part)
    results = set()
    originals = {name: contents(getattr(checkpoints, name)) for name in ("stock", "clip", "fsr")}
    for seed in range(START + part, END, PARTS):
        rng = random.Random(seed)
        root = tmp_path / f"{seed:04d}"
        spoilt = rng.choice(["fsr", "fsr", "stock", "clip"])
        folders = {
            name: shutil.copytree(getattr(checkpoints, name), root / name)
            for name in (["fsr"] if spoilt == "fsr" else ["stock", "clip"])
        }
        done = []
        for _ in range(rng.choice([1, 1, 2])):
            spoil = rng.choice(SPOIL)
            spoil(folders[spoilt], rng)
            done.append(spoil.__name__)
        note = f"seed {seed}: {spoilt}, {', '.join(done)}"
        try:
            with untouched(*(path for path in root.iterdir())):
                if spoilt == "fsr":
                    results.add(check_hub_folder(folders["fsr"], originals["fsr"]))
                    results.add(check_export(root, folders["fsr"], None))
                else:
                    results.add(check_export(root, folders["stock"], folders["clip"]))
        except BaseException as error:
            raise AssertionError(note) from error
        shutil.rmtree(root)
    if END - START >= 300:
        assert results >= {"exported", "refused", "differs"}
