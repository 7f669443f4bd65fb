"""
What the code of a Hub folder may do: compute. It reads and writes no file, runs nothing, reaches no network. And what
`verify`, `push` and `export` make of folders that somebody prepared: `docs/security.md`.
"""

import ast
import json
import math
import os
import pickle
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub.tiny_checkpoints import edit_json
from huggingface_hub.hf_api import RepoFile
from isolated import ROOT, run_python
from processing.tiny_tokenizers import clip_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from typer.testing import CliRunner

from fsr_hf import __version__, export
from fsr_hf.cli import app
from fsr_hf.hub.families import FAMILIES
from fsr_hf.hub.flatten import flat_files
from fsr_hf.hub.manifest import Fingerprint, write_manifest
from fsr_hf.hub.verify import check_loads, verify


# Of the standard library, what can do none of that; of `os` and `threading` two types, and one variable of ours.
MODULES = {
    *("collections", "collections.abc", "contextlib", "contextvars", "copy", "dataclasses", "difflib", "functools"),
    *("inspect", "itertools", "math", "os", "re", "threading", "typing"),
    "huggingface_hub.dataclasses",
}
OF_MODULES = {"os": {"PathLike"}, "threading": {"local"}}
OUR_VARIABLE = "os.environ.get('FSR_SILENCE_VERSION_WARNING')"
OF_TORCH = {"torch", "torch.nn", "torch.nn.functional", "torch.nn.utils.rnn"}
FUNCTIONS = {
    *("__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "locals", "open"),
}
# Methods and functions, whatever they belong to.
ATTRIBUTES = {
    *("system", "popen", "spawn", "fork", "environ", "getenv", "putenv", "remove", "unlink", "rmdir", "makedirs"),
    *("read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "urlopen", "connect"),
    *("import_module", "load_module", "exec_module", "hub", "load_state_dict_from_url", "hf_hub_download"),
    *("snapshot_download", "load_library", "load_inline", "cpp_extension", "from_file", "tofile", "fromfile"),
    *("__subclasses__", "__globals__", "__builtins__", "__code__"),
}
OF_THE_TORCH_MODULE = {"load", "save", "ops", "classes", "serialization", "package", "multiprocessing", "distributed"}


def faults(source: str) -> list[str]:
    """What in a module of a Hub folder does more than compute."""
    found = []
    tree = ast.parse(source)
    ours = [call.func for call in ast.walk(tree) if isinstance(call, ast.Call) and ast.unparse(call) == OUR_VARIABLE]
    allowed = {id(node) for call in ours for node in ast.walk(call)}
    for node in (node for node in ast.walk(tree) if id(node) not in allowed):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
            if node.module in OF_MODULES:
                found += [f"{node.module}.{alias.name}" for alias in node.names]
            found += [
                f"torch.{a.name}" for a in node.names if node.module == "torch" and a.name in OF_THE_TORCH_MODULE
            ]
        elif isinstance(node, ast.Name) and node.id in FUNCTIONS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if (
                node.attr in ATTRIBUTES
                or node.attr not in OF_MODULES.get(owner, {node.attr})
                or (owner == "torch" and node.attr in OF_THE_TORCH_MODULE)
            ):
                found.append(f"{owner}.{node.attr}")
        for module in modules:
            root = module.partition(".")[0]
            if module not in MODULES | OF_TORCH and root not in ("transformers", "triton"):
                found.append(f"import {module}")
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.config.model_type)
def test_flat_code_computes_and_no_more(family):
    assert {name: found for name, source in flat_files(family).items() if (found := faults(source))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "open('x')",
        "f = open",
        "import subprocess",
        "from socket import socket",
        "import urllib.request",
        "import requests",
        "import pickle",
        "import os\nos.system('ls')",
        "from os import system",
        "import os\nos.environ['HF_TOKEN']",
        "import os\nos.environ.get('HF_TOKEN')",
        "import threading\nthreading.Thread(target=print)",
        "from threading import Thread",
        "eval('1')",
        "exec('1')",
        "__import__('os')",
        "import importlib",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import torch\ntorch.hub.load('x')",
        "from torch.utils import cpp_extension",
        "path.write_text('x')",
        "getattr(x, 'y').__globals__",
    ],
)
def test_the_check_finds_what_it_should(source):
    assert faults(source)


# What a hostile publisher does to a folder, and a line that `verify` prints of it: of an unlisted file, and of what is
# found even when the manifest was written anew.
def nested_auto_map(folder):
    edit_json(folder / "processor_config.json", lambda c: c["image_processor"].update(auto_map="evil/repo--evil.X"))


def zeros_beside_the_shards(folder):
    shards = [load_file(shard) for shard in sorted(folder.glob("*.safetensors"))]
    save_file(
        {name: torch.zeros_like(t) for shard in shards for name, t in shard.items()}, folder / "model.safetensors"
    )


def link_to_a_folder(folder):
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "generate.py").write_text("")
    (folder / "custom_generate").symlink_to(folder.parent / "elsewhere")


def custom_generate(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("")


UNLISTED = [
    (lambda f: (f / "preprocessor_config.json").write_text("{}"), "preprocessor_config.json is not in the manifest"),
    (lambda f: (f / "chat_template.json").write_text("{}"), "chat_template.json is not in the manifest"),
    (lambda f: (f / "weights.gguf").write_text(""), "weights.gguf is not in the manifest"),
    (link_to_a_folder, "custom_generate is not in the manifest"),
]
FOREIGN = [
    (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}'),
        "adapter_config.json makes the folder an adapter: its base would be loaded, and run, in its place",
    ),
    (
        zeros_beside_the_shards,
        "model.safetensors would be loaded in place of the weights that model.safetensors.index.json names",
    ),
    (nested_auto_map, "processor_config.json: `auto_map` names other code: evil/repo--evil.X"),
    (
        lambda f: edit_json(
            f / "query_tokenizer/tokenizer_config.json", lambda c: c.update(auto_map=["evil--x.Y", None])
        ),
        "query_tokenizer/tokenizer_config.json: `auto_map` names other code: ['evil--x.Y', None]",
    ),
    (
        lambda f: edit_json(
            f / "config.json", lambda c: c["text_config"].update(auto_map={"AutoModel": "evil/x--y.Z"})
        ),
        "config.json: `auto_map` names other code: {'AutoModel': 'evil/x--y.Z'}",
    ),
    (
        lambda f: edit_json(f / "config.json", lambda c: c.update(custom_pipelines={"x": {"impl": "evil--x.Y"}})),
        "config.json: `custom_pipelines` names other code or weights: {'x': {'impl': 'evil--x.Y'}}",
    ),
    (
        lambda f: edit_json(f / "config.json", lambda c: c.update(transformers_weights="other.safetensors")),
        "config.json: `transformers_weights` names other code or weights: other.safetensors",
    ),
    (
        lambda f: edit_json(
            f / "config.json", lambda c: c["vision_config"].update(_attn_implementation="evil/kernel")
        ),
        "config.json: `_attn_implementation` names a kernel of the Hub: evil/kernel",
    ),
    (custom_generate, f"custom_generate/generate.py is no file of fsr-hf {__version__}"),
    (lambda f: (f / "fsr.py").write_text("evil = True\n"), f"fsr.py is not that of fsr-hf {__version__}"),
    (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin can run code when it is loaded"),
]


@pytest.mark.parametrize(
    ("attack", "line", "is_listed"),
    [(*attack, False) for attack in UNLISTED] + [(*attack, listed) for attack in FOREIGN for listed in (False, True)],
)
def test_verify_finds_what_would_be_loaded_instead(attack, line, is_listed, folder):
    attack(folder)
    if is_listed:
        write_manifest(folder)
    found = verify(folder)
    assert line in found
    assert not is_listed or found == [line]
    pushed = CliRunner().invoke(app, ["push", str(folder), "org/name"])
    assert pushed.exit_code == 1 and pushed.stderr.count("\n") == 1
    assert line in pushed.stderr or "leads out of the folder" in pushed.stderr


@pytest.mark.parametrize("version", [__version__, "9.9.9"])
def test_no_code_is_run_that_was_not_compared(version, folder, tmp_path):
    """`--run` runs the code of a folder: a manifest that claims another version keeps it from being compared."""
    (folder / "fsr.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    write_manifest(folder)
    edit_json(folder / "fsr_manifest.json", lambda c: c.update(fsr_hf=version))
    done = CliRunner().invoke(app, ["verify", str(folder), "--run"])
    expected = (
        "fsr.py is not that of" if version == __version__ else "its code is said to be of fsr-hf 9.9.9, and could"
    )
    assert done.exit_code == 1 and done.stdout.startswith(expected) and done.stdout.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_all_zero_weights_are_what_transformers_would_load(folder):
    """The attack works: this is why two sets of weights are a difference."""
    zeros_beside_the_shards(folder)
    assert not AutoModel.from_pretrained(folder).lm_head.weight.any()


@pytest.mark.parametrize("content", ["{", "[]", "null", "1", '"x"', "\ud800", "[" * 100_000])
def test_a_file_that_cannot_be_read_hides_nothing(content, folder):
    (folder / "generation_config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    nested_auto_map(folder)
    (folder / "evil.py").write_text("")
    text = "\n".join(verify(folder))
    for part in (
        "generation_config.json has",
        "generation_config.json ",
        "processor_config.json: `auto_map` names",
        "evil.py is not in the manifest",
        f"{folder / 'config.json'} ",
    ):
        assert part in text
    assert len(check_loads(folder)) == 1


def test_manifest_of_another_place(checkpoints, folder, tmp_path):
    """A manifest that was rewritten along with the weights is right in itself; another copy of it tells."""
    shard = folder / "model-00001-of-00002.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(shard).items()}, shard)
    write_manifest(folder)
    assert verify(folder) == []
    found = verify(folder, manifest_of=checkpoints.fsr)
    assert [line.split(" has ")[0] for line in found] == [shard.name]
    done = CliRunner().invoke(app, ["verify", str(folder), "--manifest-of", str(checkpoints.fsr)])
    assert done.exit_code == 1 and done.stdout.splitlines() == found
    done = CliRunner().invoke(app, ["verify", str(checkpoints.fsr), "--manifest-of", str(checkpoints.fsr)])
    assert done.stdout == f"{checkpoints.fsr} is what the manifest of {checkpoints.fsr} says.\n"
    with pytest.raises(ValueError, match="is missing"):
        verify(folder, manifest_of=tmp_path)


def test_settings_of_a_repository_are_read_wherever_the_server_keeps_them(folder, monkeypatch):
    """A publisher may put any file into LFS, of which the server states hashes alone: only weights are left there."""
    nested_auto_map(folder)
    write_manifest(folder)
    left = set()

    def describe(path):
        size, sha256 = Fingerprint.of(path)
        name = path.relative_to(folder).as_posix()
        return RepoFile(path=name, size=size, oid="0" * 40, lfs={"size": size, "oid": sha256, "pointerSize": 130})

    def snapshot_download(repo_id, ignore_patterns, **kwargs):
        left.update(ignore_patterns)
        for name in ignore_patterns:
            (folder / name).unlink()
        return folder

    entries = [describe(path) for path in folder.rglob("*") if path.is_file()]
    api = SimpleNamespace(
        model_info=lambda *args, **kwargs: SimpleNamespace(sha="0" * 40),
        list_repo_tree=lambda *args, **kwargs: entries,
    )
    monkeypatch.setattr("fsr_hf.hub.verify.HfApi", lambda: api)
    monkeypatch.setattr("fsr_hf.hub.verify.snapshot_download", snapshot_download)
    assert verify("org/name") == ["processor_config.json: `auto_map` names other code: evil/repo--evil.X"]
    assert {name for name in left if not name.endswith(".md")} == {
        f"model-0000{number}-of-00002.safetensors" for number in (1, 2)
    }


def test_a_name_that_prints_a_line_of_its_own(folder):
    name = f"x\n{folder} is what its manifest says.\x1b[2J.json"
    (folder / name.replace("/", "|")).write_text("{}")
    done = CliRunner().invoke(app, ["verify", str(folder)])
    assert done.exit_code == 1 and done.stdout.count("\n") == 1 and "\x1b" not in done.stdout


def test_push_uploads_no_file_from_outside(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    done = CliRunner().invoke(app, ["push", str(folder), "org/name"])
    assert done.exit_code == 1 and f"{folder / 'LICENSE'} leads out of the folder" in done.stderr


# Sources.
@pytest.fixture
def source(checkpoints, tmp_path):
    """A stock checkpoint that a test may spoil."""
    return shutil.copytree(checkpoints.stock, tmp_path / "source")


def test_export_copies_known_names_alone(source, tmp_path):
    before = {path.name for path in source.iterdir()}
    for name in ("credentials.json", "trainer_state.json", "optimizer.pt", "notes.txt", "training_args.bin", ".env"):
        (source / name).write_text("{}")
    (source / "checkpoint-10").mkdir()
    (source / "checkpoint-10" / "config.json").write_text("{}")
    (source / "LICENSE").write_text("free")
    folder = export(source, tmp_path / "fsr", progress=False)
    ours = {"README.md", "fsr_manifest.json", *flat_files(FAMILIES[0])}
    assert {path.name for path in folder.iterdir()} == before | ours | {"LICENSE"}
    assert verify(folder) == []


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "file") for name in ("LICENSE", "config.json", "tokenizer.json", "generation_config.json")),
        *((name, "file") for name in ("README.md", "model.safetensors", "chat_template.jinja")),
        *(
            (name, how)
            for name in ("query_tokenizer/tokenizer.json", "additional_chat_templates/x.jinja")
            for how in ("file", "folder")
        ),
    ],
)
def test_export_follows_no_link_out_of_the_source(name, how, source, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    file = source / name
    if how == "file":
        file.parent.mkdir(exist_ok=True)
        (shutil.move if file.exists() else shutil.copy)(
            file if file.exists() else source / "tokenizer.json", outside / "secret"
        )
        file.symlink_to(outside / "secret")
    else:
        shutil.copy(source / "tokenizer.json", outside / file.name)
        file.parent.symlink_to(outside)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} leads out of the folder, to {outside}.*: put"):
        export(source, tmp_path / "fsr", progress=False)
    assert sorted(tmp_path.iterdir()) == before


def test_links_within_the_source_and_the_cache_of_the_hub_are_followed(source, tmp_path):
    shutil.move(source / "tokenizer.json", source / "kept.json")
    (source / "tokenizer.json").symlink_to("kept.json")
    (source / "notes.txt").symlink_to("/etc/passwd")  # not a name that is copied
    assert not (export(source, tmp_path / "fsr", progress=False) / "tokenizer.json").is_symlink()
    (source / "notes.txt").unlink()
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(path for path in source.iterdir() if not path.is_symlink()):
        name = "tokenizer.json" if path.name == "kept.json" else path.name
        shutil.copy(path, cache / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    folder = export(snapshot, tmp_path / "cached", link=True, progress=False)
    assert verify(folder) == check_loads(folder) == []
    (snapshot / "LICENSE").symlink_to("../../../source/config.json")
    with pytest.raises(ValueError, match="LICENSE leads out of the folder"):
        export(snapshot, tmp_path / "other", progress=False)


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("shard", ["../outside.safetensors", "{tmp_path}/outside.safetensors", "sub/x.safetensors"])
def test_shards_are_files_of_the_source(shard, link, source, tmp_path):
    shutil.move(source / "model.safetensors", tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    shard = shard.format(tmp_path=tmp_path)
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)})
    )
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"may only name .safetensors files beside it, without a path: .*x?.safe"):
        export(source, tmp_path / "fsr", link=link, progress=False)
    (source / "shard.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "shard.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shard\.safetensors leads out of the folder"):
        export(source, tmp_path / "fsr", link=link, progress=False)
    assert sorted(tmp_path.iterdir()) == before


OTHER_CODE = "names other code.*Remove it|names other code.*remove it"


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("config.json", b"[]", "config.json holds a list, but has to hold a JSON object"),
        ("config.json", b"null", "config.json holds null, but"),
        ("config.json", b'"llava"', "config.json holds a string, but"),
        ("config.json", b"7", "config.json holds a number, but"),
        ("config.json", b"{", "config.json cannot be read as JSON"),
        ("config.json", b"\xff\xfe", "config.json cannot be read as JSON"),
        ("config.json", b"[" * 100_000, "config.json cannot be read as JSON"),
        ("config.json", None, "has no config.json"),
        (
            "config.json",
            {"text_config.num_attention_heads": 0},
            r"`text_config\.num_attention_heads` is 0, but has to",
        ),
        ("config.json", {"vision_config.num_attention_heads": 0}, r"`vision_config\.num_attention_heads` is 0"),
        (
            "config.json",
            {"vision_config.patch_size": 0},
            r"`vision_config\.patch_size` is 0, but has to be at least 1",
        ),
        ("config.json", {"text_config.num_hidden_layers": 10**9}, r"is 1000000000, but the weights are \d+ tensors"),
        ("config.json", {"vision_config.hidden_size": "big"}, "config.json: .* makes no"),
        ("config.json", {"text_config.auto_map": {"AutoModel": "evil--x.Y"}}, OTHER_CODE),
        ("model.safetensors.index.json", b"{}", "needs a `weight_map`"),
        ("model.safetensors.index.json", b"[]", "index.json holds a list"),
        ("model.safetensors.index.json", {"weight_map": []}, "needs a `weight_map`"),
        ("model.safetensors.index.json", {"weight_map": {"x": "y.safetensors"}}, "and `metadata`"),
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"x": 1}}, "may only name .safetensors files"),
        (
            "model.safetensors.index.json",
            {"metadata": {}, "weight_map": {"x": None}},
            "may only name .safetensors files",
        ),
        (
            "model.safetensors.index.json",
            {"metadata": {}, "weight_map": {"x": "y.safetensors"}},
            "lacks shards .*: y.safetensors",
        ),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", b"[]", "tokenizer.json holds a list"),
        ("tokenizer.json", b"{}", "would not load whole"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a list"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.X", None]}}, OTHER_CODE),
        ("processor_config.json", b"[1]", "processor_config.json holds a list"),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.X"}}, OTHER_CODE),
        ("processor_config.json", {"image_processor.auto_map": "evil/repo--evil.X"}, OTHER_CODE),
        ("generation_config.json", b"[1]", "generation_config.json holds a list"),
        ("generation_config.json", {"max_new_tokens": "many"}, "would not load whole: does not load"),
    ],
)
def test_a_source_that_cannot_work_is_refused(file, content, error, source, tmp_path):
    if file.endswith("index.json"):
        (source / "model.safetensors").unlink()
    if content is None:
        (source / file).unlink()
    elif isinstance(content, bytes):
        (source / file).write_bytes(content)
    else:
        settings = json.loads((source / file).read_text()) if (source / file).exists() else {}
        for path, value in content.items():
            part = settings
            *parents, last = path.split(".")
            for parent in parents:
                part = part[parent]
            part[last] = value
        (source / file).write_text(json.dumps(settings))
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["export", str(source), str(tmp_path / "fsr")])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    message = done.stderr.splitlines()[-1]
    assert message.startswith("fsr-hf: ") and str(source) in message and re.search(error, message), message
    assert sorted(tmp_path.iterdir()) == before


def test_another_checkpoints_tokenizer_is_refused(source, tmp_path):
    clip_tokenizer().save_pretrained(source)
    with pytest.raises(ValueError, match=r"tokenizer: its `image_token_id` is \d+, but \d+ in config.json"):
        export(source, tmp_path / "fsr", progress=False)


def test_base_model_is_an_id(source, tmp_path):
    done = CliRunner().invoke(app, ["export", str(source), str(tmp_path / "fsr"), "--base-model", "not an id!!"])
    assert done.exit_code == 1 and done.stderr.startswith("fsr-hf: `base_model` 'not an id!!' is no id of a Hub repo")


@pytest.mark.parametrize(
    "card",
    [b"\xff", b"---\n- 1\n---\n", b"---\ntags: 7\n---\n", b"---\ntags: [focus-scan-refine]\nbase_model: [a b]\n---\n"],
)
def test_a_card_that_cannot_be_read_is_none(card, source, tmp_path):
    (source / "README.md").write_bytes(card)
    folder = export(source, tmp_path / "fsr", progress=False)
    assert "base_model" not in (folder / "README.md").read_text().split("---")[1]


def add_noise(scale):
    return lambda tensor: tensor + scale * tensor.std() * torch.randn_like(tensor)


@pytest.mark.parametrize(
    ("change", "cosine"),
    [
        (torch.Tensor.half, None),
        (torch.Tensor.bfloat16, None),
        (add_noise(0.1), None),  # trained further
        (add_noise(1), None),
        (add_noise(4), "0.2"),
        (torch.zeros_like, "0.00"),
        (lambda tensor: tensor * math.nan, "nan"),
        (torch.randn_like, "-?0.0"),  # another tower
    ],
)
def test_the_text_encoder_is_that_of_the_vision_tower(change, cosine, source, checkpoints, tmp_path):
    torch.manual_seed(0)
    file = source / "model.safetensors"
    tensors = load_file(file)
    save_file({name: change(t) if "vision_tower" in name else t for name, t in tensors.items()}, file)
    if cosine is None:
        assert verify(export(source, tmp_path / "fsr", text_encoder=checkpoints.clip, progress=False)) == []
        return
    with pytest.raises(ValueError, match=rf"is not the CLIP that .*: the mean cosine of their matrices is {cosine}"):
        export(source, tmp_path / "fsr", text_encoder=checkpoints.clip, progress=False)


def test_a_tower_without_its_last_block_is_the_same(source, checkpoints, tmp_path):
    tensors = load_file(source / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "vision_model.encoder.layers.2." not in n}, source / "model.safetensors"
    )
    edit_json(source / "config.json", lambda c: c["vision_config"].update(num_hidden_layers=2))
    folder = export(source, tmp_path / "fsr", text_encoder=checkpoints.clip, progress=False)
    assert verify(folder) == check_loads(folder) == []


def test_a_clip_of_pickles_that_would_run_code(source, checkpoints, tmp_path):
    clip = shutil.copytree(checkpoints.clip, tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    for content in (b"", b"cos\nsystem\n(S'touch ran'\ntR.", pickle.dumps(["no", "tensors"])):
        (clip / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match="holds more than tensors, or is damaged, and is refused"):
            export(source, tmp_path / "fsr", text_encoder=clip, progress=False)
    assert not Path("ran").exists()


# Outputs.
def test_force_keeps_what_no_export_made(folder, source, tmp_path):
    shard = folder / "model-00002-of-00002.safetensors"
    mine = {
        "query_tokenizer/notes.txt": "mine",
        "mine/deep/notes.txt": "mine",
        ".git/config": "mine",
        "README.md": (folder / "README.md").read_text() + "\nEdited.\n",
        shard.name: "other weights",
    }
    for name, content in mine.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    done = CliRunner().invoke(app, ["export", str(source), str(folder), "--force"])
    assert done.exit_code == 0 and verify(folder) == []
    replaced = tmp_path / "fsr.replaced"
    kept = {path.relative_to(replaced).as_posix(): path.read_text() for path in replaced.rglob("*") if path.is_file()}
    assert kept == mine
    for again in (folder, tmp_path / "fsr.replaced"):
        with pytest.raises((FileExistsError, ValueError), match=r"in the way|holds the source"):
            export(again if again != folder else source, folder, force=True, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"fsr", "fsr.replaced", "source"}


@pytest.mark.parametrize("content", ["[]", "{", '{"files": {"x": 1}, "fsr_hf": "0.1.0"}'])
def test_a_broken_manifest_is_said_before_anything_moves(content, folder, source, tmp_path):
    (folder / "fsr_manifest.json").write_text(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"was not replaced: fsr_manifest\.json cannot be read"):
        export(source, folder, force=True, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_manifest_deletes_nothing_outside(folder, source, tmp_path):
    (tmp_path / "outside.txt").write_text("mine")
    listed = Fingerprint.of(tmp_path / "outside.txt")._asdict()
    names = ("../outside.txt", str(tmp_path / "outside.txt"), "sub/outside.txt")
    (folder / "sub").symlink_to(tmp_path)
    edit_json(folder / "fsr_manifest.json", lambda c: c["files"].update(dict.fromkeys(names, listed)))
    export(source, folder, force=True, progress=False)
    assert (tmp_path / "outside.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "fsr.replaced").iterdir()] == ["sub"]


def test_a_second_export_into_one_output_is_refused_at_once(source, tmp_path):
    if (child := os.fork()) == 0:
        with suppress(BaseException), pytest.MonkeyPatch.context() as patch:
            patch.setattr("fsr_hf.hub.export.write_weights", lambda *args, **kwargs: time.sleep(60))
            export(source, tmp_path / "fsr", progress=False)
        os._exit(1)
    while not (tmp_path / "fsr.incomplete" / ".fsr-hf-export").exists():
        time.sleep(0.01)
    for force in (False, True):
        with pytest.raises(FileExistsError, match=r"fsr is being made by another export: wait for it"):
            export(source, tmp_path / "fsr", force=force, progress=False)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert verify(export(source, tmp_path / "fsr", progress=False)) == []
    assert {path.name for path in tmp_path.iterdir()} == {"fsr", "source"}


def test_a_disk_that_fills_while_the_text_side_is_written(source, checkpoints, tmp_path):
    clip = shutil.copytree(checkpoints.clip, tmp_path / "clip")
    tensors = load_file(clip / "model.safetensors")
    tensors["text_model.embeddings.token_embedding.weight"] = torch.zeros(20_000, 24)
    save_file(tensors, clip / "model.safetensors")
    edit_json(clip / "config.json", lambda c: c["text_config"].update(vocab_size=20_000))
    script = (
        "import resource, sys; from fsr_hf.cli import app; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); app(sys.argv[1:])"
    )
    assert (source / "model.safetensors").stat().st_size < 10**6
    arguments = ["export", str(source), str(tmp_path / "fsr"), "--text-encoder", str(clip)]
    done = run_python("-c", script, *arguments, cwd=tmp_path, path=[ROOT])
    assert done.returncode == 1
    assert re.search(
        r"^fsr-hf: .*model-00002-of-00002.safetensors cannot be written: .*Is the disk full\?$",
        done.stderr,
        re.MULTILINE,
    ), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"clip", "source"}
