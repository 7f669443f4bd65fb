"""Export of checkpoints, and what `save_pretrained` writes beside weights and settings."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub.clean_run import run_clean
from hub.tiny_checkpoints import SIDE
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports
from typer.testing import CliRunner

from fsr_hf import FSRLlavaConfig, FSRLlavaForConditionalGeneration, FSRLlavaProcessor, export
from fsr_hf.cli import app
from fsr_hf.configuration.remote_code import RemoteCodeMixin
from fsr_hf.hub import flatten
from fsr_hf.hub.families import FAMILIES, Family
from fsr_hf.hub.flatten import flat_files


def python_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


@pytest.fixture(scope="module")
def generations(checkpoints, tmp_path_factory) -> list[tuple[Path, dict]]:
    """An export, what a clean process saved of it, and what another one, by a Hub id, saved of that."""
    root = tmp_path_factory.mktemp("generations")
    second, third = root / "second", root / "third"
    first_report = run_clean(checkpoints.fsr, second)
    second_report = run_clean(second / "whole", third, hub_id="org/name")
    return [(checkpoints.fsr, first_report), (second, second_report), (third, {})]


def test_folder_works_in_a_clean_process(generations):
    _, report = generations[0]
    assert report["missing"] == report["unexpected"] == []
    assert report["classes"] == [FSRLlavaForConditionalGeneration.__name__] * 2 + [FSRLlavaProcessor.__name__]
    assert report["inputs"] == [
        "attention_mask",
        "input_ids",
        "pixel_values",
        "query_attention_mask",
        "query_input_ids",
    ]
    assert report["config"]["fsr_config"]["num_visual_tokens"] == 5
    assert report["other_budget"] == 2
    assert report["pipeline"]
    assert report["fsr_hf"] == []


def test_no_trust_no_model(generations):
    for refusal in generations[0][1]["refusals"].values():
        assert "trust_remote_code=True" in refusal


def test_clean_process_computes_what_the_installed_package_does(checkpoints, generations):
    _, report = generations[0]
    model = FSRLlavaForConditionalGeneration.from_pretrained(checkpoints.fsr)
    processor = AutoProcessor.from_pretrained(checkpoints.fsr)
    ids = torch.tensor([report["tokens"]])
    content = [
        {"type": "image", "image": Image.new("RGB", (SIDE, SIDE), "red")},
        {"type": "text", "text": "a red dog?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(report["logits"]), rtol=1e-5, atol=1e-6)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist() == ids.tolist()


def test_generations_stay_equal(generations):
    (first, first_report), (second, second_report), (third, _) = generations
    for key in ("digest", "tokens", "pipeline", "missing", "classes"):
        assert first_report[key] == second_report[key]
    # The same weights, but their places in memory may differ, and with them the last digit of a sum.
    assert first_report["logits"] == pytest.approx(second_report["logits"], rel=1e-5, abs=1e-6)
    assert python_files(first) == python_files(second / "whole") == python_files(third / "whole") != {}
    for part in ("whole", "config_only", "processor_only"):
        assert python_files(first) == python_files(second / part) == python_files(third / part)
    files = sorted(path.relative_to(second / "whole") for path in (second / "whole").rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(third / "whole") for path in (third / "whole").rglob("*") if path.is_file()
    )
    for file in files:
        contents = [(folder / "whole" / file).read_bytes() for folder in (second, third)]
        if file.name == "tokenizer_config.json":  # says where it was loaded from
            contents = [re.sub(rb'"(is_local|local_files_only)": \w+', b"", content) for content in contents]
        assert contents[0] == contents[1], file
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second / "whole")]
    for config in configs:
        for part in (config, config["text_config"], config["vision_config"]):
            part.pop("dtype", None)  # of the loaded model
    assert configs[0] == configs[1]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.config.model_type)
def test_flat_files_import_no_stranger(family, tmp_path):
    files = flat_files(family)
    for name, source in files.items():
        (tmp_path / name).write_text(source)
        assert source.startswith("# Generated from fsr_hf ") and "do not edit" in source.splitlines()[0]
        tree = ast.parse(source)
        tried = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in files
                continue
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                root = module.partition(".")[0]
                assert (
                    root in sys.stdlib_module_names | {"torch", "transformers"}
                    or module == "huggingface_hub.dataclasses"
                    or (root == "triton" and id(node) in tried)
                ), f"{name}: {module}"
    for reference in family.auto_map.values():  # as transformers follows imports: from every class to every file
        entry = tmp_path / f"{reference.partition('.')[0]}.py"
        assert {Path(file).name for file in get_relative_import_files(entry)} | {entry.name} == set(files)
        # After an interrupted download it asks again for those alone that this file names.
        assert {f"{name}.py" for name in get_relative_imports(entry)} | {entry.name} == set(files)


def toy_family(root: Path, monkeypatch, name: str, **modules: str) -> Family:
    """A package `name` with these modules, whose `entry` is the only one that a family names."""
    for module, source in {"__init__": "", "entry": "", **modules}.items():
        file = root / name / f"{module.replace('__in__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        if not (file.parent / "__init__.py").exists():
            (file.parent / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(root)
    monkeypatch.setattr(flatten, "_PACKAGE", name)
    entry = type("Entry", (), {"__module__": f"{name}.entry"})
    return Family("toy", entry, entry, None)


def test_flattening_rewrites_imports_and_nothing_else(tmp_path, monkeypatch):
    entry = '"""See from_pretrained."""\n\nfrom .deep.first import (\n    a,\n    b,\n)\nfrom .second import c as d\n'
    optional = "try:\n    import triton\nexcept ImportError:\n    triton = None\n"
    family = toy_family(
        tmp_path,
        monkeypatch,
        "toy_flat",
        entry=entry,
        deep__in__first="from ..second import c\n\na = b = c\n",
        second=f"from huggingface_hub.dataclasses import strict\n{optional}c = '×'\n",
        unused="import numpy\n",
    )
    files = flat_files(family)
    assert sorted(files) == ["entry.py", "first.py", "second.py"]
    assert files["entry.py"].partition("\n")[2] == entry.replace(".deep.first", ".first")
    assert files["first.py"].partition("\n")[2] == "from .second import c\n\na = b = c\n"
    assert files["second.py"].partition("\n")[2].endswith("c = '×'\n")


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ("import numpy as np\n", r"line 1.*'numpy'"),
        ("import torch\nif torch:\n    import torchvision.ops\n", r"line 3.*'torchvision.ops'"),
        ("import triton\n", "'triton'"),
        ("try:\n    import torch\nexcept ImportError:\n    import triton\n", "'triton'"),
        ("from huggingface_hub import HfApi\n", "'huggingface_hub'"),
        ("from {package}.other import x\n", "'{package}.other'"),
        ("from . import other\n", "not from {package}"),
        ("from .folder import other\n", "not from {package}.folder"),
        ("from .missing import x\n", "not from {package}.missing"),
        ('"""Use\nfrom .words import x\n"""\n', "line of text for an import of words"),
        ("from .other import x\nfrom .folder.other import y\n", "one flat file"),
    ],
)
def test_what_cannot_be_flattened_is_named(entry, error, tmp_path, monkeypatch, request):
    package = f"toy_{request.node.callspec.indices['entry']}"
    modules = {"other": "x = 1\n", "folder__in__other": "y = 1\n"}
    family = toy_family(tmp_path, monkeypatch, package, entry=entry.replace("{package}", package), **modules)
    with pytest.raises(ValueError, match=error.replace("{package}", package)):
        flat_files(family)


def test_old_layout_and_text_tower_load_whole(checkpoints):
    assert sorted(path.name for path in checkpoints.fsr.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    model, info = FSRLlavaForConditionalGeneration.from_pretrained(checkpoints.fsr, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    stock = LlavaForConditionalGeneration.from_pretrained(checkpoints.stock).state_dict()
    clip = load_file(checkpoints.clip / "model.safetensors")
    text_side = {f"model.text_encoder.{key}": clip[key] for key in clip if key.startswith("text_model.")}
    for key in ("text_projection.weight", "visual_projection.weight"):
        text_side[f"model.text_encoder.{key}"] = clip[key]
    assert state.keys() == stock.keys() | text_side.keys()
    for key, tensor in {**stock, **text_side}.items():
        assert torch.equal(state[key], tensor), key
    assert {path.stat().st_mode for path in checkpoints.fsr.glob("*.json")} == {
        path.stat().st_mode for path in checkpoints.fsr.glob("*.safetensors")
    }
    index = json.loads((checkpoints.fsr / "model.safetensors.index.json").read_text())
    stored = load_file(checkpoints.stock / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in [*stored.values(), *text_side.values()])


def test_installed_package_saves_the_same_folder(checkpoints, tmp_path):
    model = AutoModel.from_pretrained(checkpoints.fsr)
    assert type(model) is type(AutoModelForImageTextToText.from_pretrained(checkpoints.fsr))
    assert type(model) is FSRLlavaForConditionalGeneration
    model.save_pretrained(tmp_path / "whole")
    AutoProcessor.from_pretrained(checkpoints.fsr).save_pretrained(tmp_path / "whole")
    AutoConfig.from_pretrained(checkpoints.fsr).save_pretrained(tmp_path / "config")
    code = flat_files(FAMILIES[0])
    assert (
        python_files(checkpoints.fsr) == python_files(tmp_path / "whole") == python_files(tmp_path / "config") == code
    )
    for folder in (checkpoints.fsr, tmp_path / "whole", tmp_path / "config"):
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "fsr_llava"
        assert config["auto_map"] == {
            "AutoConfig": "configuration_fsr_llava.FSRLlavaConfig",
            "AutoModel": "modeling_fsr_llava.FSRLlavaForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_fsr_llava.FSRLlavaForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_fsr_llava.FSRLlavaForConditionalGeneration",
            "AutoProcessor": "processing_fsr_llava.FSRLlavaProcessor",
        }
    for folder in (checkpoints.fsr, tmp_path / "whole"):
        processor = json.loads((folder / "processor_config.json").read_text())
        assert processor["processor_class"] == "FSRLlavaProcessor"
        assert processor["auto_map"] == {"AutoProcessor": "processing_fsr_llava.FSRLlavaProcessor"}


def test_auto_map_of_a_loaded_copy_names_no_other_repository(checkpoints, tmp_path):
    config = FSRLlavaConfig.from_pretrained(checkpoints.fsr)
    config.auto_map = {auto: f"org/name--{reference}" for auto, reference in config.auto_map.items()}
    config.save_pretrained(tmp_path / "installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteCodeMixin, "_write_remote_code", None)  # as in a copy from a Hub folder
        config.auto_map = {auto: f"org/name--{reference}" for auto, reference in config.auto_map.items()}
        config.save_pretrained(tmp_path / "loaded")
    for folder in (tmp_path / "installed", tmp_path / "loaded"):
        assert json.loads((folder / "config.json").read_text())["auto_map"] == FAMILIES[0].auto_map


@pytest.fixture
def uploads(monkeypatch) -> list[set[str]]:
    """The files of each commit to the Hub, none of which reaches it."""
    commits: list[set[str]] = []

    def create_commit(self, *, operations, **kwargs):
        commits.append({operation.path_in_repo for operation in operations})

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: ModelCard("card"))
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *args, **kwargs: ModelCard(""))
    return commits


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModel, AutoProcessor])
def test_code_is_pushed_with_what_needs_it(auto_class, checkpoints, uploads, tmp_path):
    saved = auto_class.from_pretrained(checkpoints.fsr)
    saved.push_to_hub("org/name")
    for _ in range(2):  # the second time the files are there already
        saved.save_pretrained(str(tmp_path / "folder"), push_to_hub=True, repo_id="org/name")
    assert len(uploads) == 3
    for files in uploads:
        assert files >= set(python_files(checkpoints.fsr))
        assert files & {"config.json", "processor_config.json"}


def test_without_text_encoder_relevance_is_off(checkpoints, tmp_path):
    folder = export(checkpoints.stock, tmp_path / "fsr", progress=False)
    config = AutoConfig.from_pretrained(folder)
    assert config.fsr_config.relevance == "none" and config.fsr_config.text_encoder_config is None
    assert config.fsr_config.num_visual_tokens == 128
    assert type(AutoProcessor.from_pretrained(folder)) is LlavaProcessor
    assert [path.name for path in folder.glob("model*safetensors*")] == ["model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == (checkpoints.stock / "model.safetensors").read_bytes()
    for path in checkpoints.stock.iterdir():
        if path.name != "config.json":
            assert (folder / path.name).read_bytes() == path.read_bytes()
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    # A text encoder can be added later.
    later = export(folder, tmp_path / "later", text_encoder=checkpoints.clip, progress=False)
    assert AutoConfig.from_pretrained(later).fsr_config.relevance is None
    assert type(AutoProcessor.from_pretrained(later)) is FSRLlavaProcessor


def test_stock_processor_that_only_the_model_type_names(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints.stock, tmp_path / "source")
    settings = json.loads((source / "processor_config.json").read_text())
    (source / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    (source / "processor_config.json").unlink()
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    del tokenizer["processor_class"]
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert type(AutoProcessor.from_pretrained(source)) is LlavaProcessor
    folder = export(source, tmp_path / "fsr", progress=False)
    assert type(AutoProcessor.from_pretrained(folder)) is LlavaProcessor


def test_export_of_an_export_changes_the_config_alone(checkpoints, tmp_path):
    folder = export(checkpoints.fsr, tmp_path / "fsr", fsr_config={"retention_ratio": 0.25}, progress=False)
    config = AutoConfig.from_pretrained(folder)
    assert config.fsr_config.retention_ratio == 0.25 and config.fsr_config.num_visual_tokens is None
    names = sorted(path.relative_to(checkpoints.fsr) for path in checkpoints.fsr.rglob("*") if path.is_file())
    assert sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) == names
    for name in names:
        differs = name.name in ("config.json", "README.md", "fsr_manifest.json")  # the budget, and what tells of it
        assert differs or (folder / name).read_bytes() == (checkpoints.fsr / name).read_bytes()
    with pytest.raises(ValueError, match="has a text encoder already"):
        export(checkpoints.fsr, tmp_path / "again", text_encoder=checkpoints.clip)


def test_shards_are_renamed_and_can_be_linked(checkpoints, tmp_path):
    source = tmp_path / "sharded"
    stock = LlavaForConditionalGeneration.from_pretrained(checkpoints.stock)
    stock.save_pretrained(source, max_shard_size="60KB")
    shards = sorted(source.glob("*.safetensors"))
    AutoProcessor.from_pretrained(checkpoints.stock).save_pretrained(source)
    folder = export(source, tmp_path / "fsr", link=True, fsr_config={"alpha": 0}, verify=False, progress=False)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [path.name for path in shards]
    folder = export(source, tmp_path / "clip", link=True, text_encoder=checkpoints.clip, progress=False)
    count = len(shards) + 1
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == names
    assert all((folder / name).samefile(shard) for name, shard in zip(names, shards, strict=False))
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in stock.state_dict().items())


def test_text_encoder_of_pickled_tensors(checkpoints, tmp_path, monkeypatch):
    """OpenAI's repositories hold no safetensors of every CLIP; the tensors are read without running anything."""
    clip = shutil.copytree(checkpoints.clip, tmp_path / "clip")
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    asked = []

    def snapshot_download(repo_id, allow_patterns, **kwargs):
        asked.append(allow_patterns[0])
        return str(clip)

    monkeypatch.setattr("fsr_hf.hub.export.snapshot_download", snapshot_download)
    folder = export(checkpoints.stock, tmp_path / "fsr", text_encoder="org/clip", progress=False)
    assert asked == ["*.safetensors", "pytorch_model.bin"]
    shard = "model-00002-of-00002.safetensors"
    ours, theirs = load_file(folder / shard), load_file(checkpoints.fsr / shard)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    torch.save({"text_projection.weight": Path("runs code")}, clip / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors, or is damaged, and is refused"):
        export(checkpoints.stock, tmp_path / "other", text_encoder=clip)


def test_hub_ids_carry_a_revision(checkpoints, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo_id, revision, **kwargs):
        asked.append((repo_id, revision))
        return str({"org/llava": checkpoints.stock, "org/clip": checkpoints.clip}[repo_id])

    monkeypatch.setattr("fsr_hf.hub.export.snapshot_download", snapshot_download)
    folder = export("org/llava", tmp_path / "fsr", text_encoder="org/clip@refs/pr/8", progress=False)
    assert asked == [("org/llava", None), ("org/clip", "refs/pr/8")]
    assert python_files(folder) == python_files(checkpoints.fsr)


@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        ("stock: config.json: model_type=opt", {}, "`model_type` 'opt'; there is FSR for 'llava', 'fsr_llava'"),
        ("stock: config.json: vision_config.model_type=siglip_vision_model", {}, "siglip_vision_model"),
        ("stock: remove model.safetensors", {}, "Pickled weights .* are refused"),
        ("stock: add adapter_config.json", {}, "holds a PEFT adapter"),
        ("stock: nothing", {"fsr_config": {"relevance": "clip"}}, "name it with `text_encoder`"),
        ("stock: nothing", {"fsr_config": {"num_visual_tokens": 0}}, "num_visual_tokens=0"),
        ("stock: nothing", {"fsr_config": {"num_visual_tokens": 9, "retention_ratio": 0.5}}, "both set"),
        ("clip: config.json: vision_config.hidden_size=32", {}, "hidden_size 32, but 16 in the tower"),
        ("clip: config.json: vision_config.image_size=56", {}, "image_size 56, but 28 in the tower"),
        ("clip: config.json: model_type=siglip", {}, "of `model_type` 'siglip'"),
        ("clip: config.json: projection_dim=13", {}, r"text_projection.weight should be of shape \(13, 24\)"),
        ("clip: remove model.safetensors", {}, "Pickled weights .* are refused"),
    ],
)
def test_wrong_input_is_refused_before_any_work(change, options, error, checkpoints, tmp_path):
    which, _, change = change.partition(": ")
    inputs = {"stock": checkpoints.stock, "clip": checkpoints.clip}
    inputs[which] = shutil.copytree(inputs[which], tmp_path / which)
    if change.startswith("remove "):
        (inputs[which] / change.split()[1]).unlink()
    elif change.startswith("add "):
        (inputs[which] / change.split()[1]).write_text("{}")
    elif change.startswith("config.json: "):
        config = json.loads((inputs[which] / "config.json").read_text())
        path, _, value = change.removeprefix("config.json: ").partition("=")
        *parents, last = path.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = int(value) if value.isdigit() else value
        (inputs[which] / "config.json").write_text(json.dumps(config))
    if which == "clip":
        options = {**options, "text_encoder": inputs["clip"]}
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=error):
        export(inputs["stock"], tmp_path / "fsr", **options)
    assert set(tmp_path.iterdir()) == before


def test_text_tower_in_the_config_but_not_in_the_weights(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints.fsr, tmp_path / "source")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.text_encoder.text_projection.weight"]
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks weights of it: model\.text_encoder\.text_proj"):
        export(source, tmp_path / "fsr")
    (source / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks shards .*: model-00001-of-00002\.safetensors"):
        export(source, tmp_path / "fsr")


def test_output_is_replaced_whole_or_not_at_all(checkpoints, tmp_path, monkeypatch):
    folder = tmp_path / "fsr"
    folder.mkdir()
    export(checkpoints.stock, folder, progress=False)  # an empty folder is no obstacle
    (folder / "note.txt").write_text("old")
    with pytest.raises(FileExistsError, match="is not empty"):
        export(checkpoints.stock, folder)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("fsr_hf.hub.weights.save_file", raise_disk_full)
        export(checkpoints.stock, folder, text_encoder=checkpoints.clip, force=True, progress=False)
    assert list(tmp_path.iterdir()) == [folder] and (folder / "note.txt").exists()
    # What no export made is kept; what one made is not.
    replaced = tmp_path / "fsr.replaced"
    export(checkpoints.stock, folder, force=True, progress=False)
    assert sorted(tmp_path.iterdir()) == [folder, replaced] and not (folder / "note.txt").exists()
    assert (replaced / "note.txt").read_text() == "old"
    with pytest.raises(FileExistsError, match="in the way"):
        export(checkpoints.stock, folder, force=True)
    shutil.rmtree(replaced)
    export(checkpoints.stock, folder, force=True, progress=False)
    assert list(tmp_path.iterdir()) == [folder]

    with pytest.raises(ValueError, match="holds the source"):
        export(folder, folder, force=True)
    clip = tmp_path / "clip"
    shutil.copytree(checkpoints.clip, clip)
    with pytest.raises(ValueError, match="holds the text encoder"):
        export(checkpoints.stock, clip, text_encoder=clip, force=True)
    assert (clip / "config.json").exists()
    (tmp_path / "new.incomplete").mkdir()
    (tmp_path / "new.incomplete" / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no export left it"):
        export(checkpoints.stock, tmp_path / "new", progress=False)
    assert (tmp_path / "new.incomplete" / "note.txt").exists()


def test_damaged_weights(checkpoints, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints.stock, source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        export(source, tmp_path / "fsr")


def raise_disk_full(*args, **kwargs):
    raise OSError("disk full")


def test_command_line(checkpoints, tmp_path):
    arguments = ["export", str(checkpoints.stock), str(tmp_path / "fsr"), "--text-encoder", str(checkpoints.clip)]
    done = CliRunner().invoke(app, [*arguments, "--retention-ratio", "0.5"])
    assert done.exit_code == 0, done.output
    assert AutoConfig.from_pretrained(tmp_path / "fsr").fsr_config.retention_ratio == 0.5
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert again.stderr.startswith("fsr-hf: `output_dir`") and again.stderr.count("\n") == 1
    both = CliRunner().invoke(app, [*arguments, "--force", "--retention-ratio", "0.5", "--num-visual-tokens", "4"])
    assert both.exit_code == 1 and "both set" in both.stderr
