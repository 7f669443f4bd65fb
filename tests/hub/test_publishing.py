"""What an export writes beside the model, and what `verify` and `push` make of a folder that is not right."""

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hub.tiny_checkpoints import edit_json
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor
from typer.testing import CliRunner

from fsr_hf import __version__, export
from fsr_hf.cli import app
from fsr_hf.hub.cards import card_data
from fsr_hf.hub.manifest import MANIFEST, Fingerprint, compare_manifest, read_manifest
from fsr_hf.hub.verify import check_code, check_folder, check_loads, verify


def test_manifest_lists_every_file(folder):
    _, listed = read_manifest(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(listed) == present - {MANIFEST}
    assert {"config.json", "query_tokenizer/tokenizer.json", "model-00001-of-00002.safetensors"} <= set(listed)
    assert verify(folder) == [] and check_loads(folder) == []


@pytest.mark.parametrize(
    ("spoil", "lines"),
    [
        (lambda f: (f / "README.md").write_text("mine"), []),
        (lambda f: (f / "LICENSE").write_text("mine"), []),
        (lambda f: (f / "chat_template.jinja").unlink(), ["chat_template.jinja is missing"]),
        (
            lambda f: edit_json(f / "generation_config.json", lambda c: c.update(num_beams=2)),
            ["generation_config.json has"],
        ),
        (lambda f: (f / "fsr.py").unlink(), ["fsr.py is missing", "fsr.py is missing"]),
        (lambda f: (f / "evil.py").write_text(""), ["evil.py is not in the manifest", "evil.py is no file of fsr-hf"]),
        (
            lambda f: (f / "pytorch_model.bin").write_bytes(b""),
            ["pytorch_model.bin is not in the manifest", "pytorch_model.bin can run code"],
        ),
        (
            lambda f: edit_json(f / "config.json", lambda c: c["auto_map"].update(AutoModel="org/evil--x.Y")),
            ["config.json has", "config.json: `auto_map` is"],
        ),
        (
            lambda f: edit_json(
                f / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil.X", None]})
            ),
            ["tokenizer_config.json has", "tokenizer_config.json: `auto_map` names other code"],
        ),
        (lambda f: (f / MANIFEST).unlink(), [f"{MANIFEST} is missing"]),
        (lambda f: (f / MANIFEST).write_text("{}"), [f"{MANIFEST} cannot be read"]),
        (lambda f: (f / MANIFEST).write_text("[1"), [f"{MANIFEST} cannot be read"]),
    ],
)
def test_verify_names_what_differs(spoil, lines, folder):
    spoil(folder)
    found = verify(folder)
    assert len(found) == len(lines), found
    assert all(line.startswith(start) for line, start in zip(found, lines)), found
    done = CliRunner().invoke(app, ["verify", str(folder)])
    assert done.exit_code == bool(lines)
    assert done.stdout.splitlines() == (found or [f"{folder} is what its manifest says."])


def test_one_bit_of_the_weights(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert verify(folder) == [f"{shard.name} has other contents"]


def test_code_of_another_version_is_left_to_the_manifest(folder):
    (folder / "fsr.py").write_text("# another version\n")
    assert check_code(folder, "0.0.1") == []
    assert check_code(folder) == [f"fsr.py is not that of fsr-hf {__version__}"]


def test_saved_by_the_installed_package(checkpoints, tmp_path):
    """The code is listed at once; weights and settings that come later are not, and a later save makes it no lie."""
    folder = shutil.copytree(checkpoints.fsr, tmp_path / "fsr")
    config = AutoConfig.from_pretrained(folder)
    config.fsr_config.num_visual_tokens = 3
    config.save_pretrained(folder)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    for saved in (folder, tmp_path / "saved"):
        assert read_manifest(saved).lists_code_alone
        (line,) = verify(saved)  # what nobody vouches for
        assert line.startswith(f"{MANIFEST} lists the code alone") and "processor_config.json" in line
        assert check_folder(saved, allow_code_alone=True) == check_loads(saved) == []  # enough for `push`
        (saved / "credentials.json").write_text("{}")
        assert check_folder(saved, allow_code_alone=True) == ["credentials.json is not in the manifest"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("missing", "weights: missing lm_head.weight"),
        (
            "shape",
            "weights: model.multi_modal_projector.linear_1.weight has the shape (3, 16), and should have (32, 16)",
        ),
        ("processor", "does not load: "),
        ("budget", "does not load: ValueError: `num_visual_tokens=0`"),
        ("shard", "lacks shards"),
    ],
)
def test_what_would_not_load(change, fault, folder):
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    if change == "missing":
        del tensors["language_model.lm_head.weight"]
        edit_json(
            folder / "model.safetensors.index.json", lambda c: c["weight_map"].pop("language_model.lm_head.weight")
        )
    elif change == "shape":
        tensors["multi_modal_projector.linear_1.weight"] = torch.zeros(3, 16)
    elif change == "processor":
        shutil.rmtree(folder / "query_tokenizer")
    elif change == "budget":
        edit_json(folder / "config.json", lambda c: c["fsr_config"].update(num_visual_tokens=0))
    save_file(tensors, shard)
    if change == "shard":
        shard.unlink()
    (found,) = check_loads(folder)
    assert fault in found
    done = CliRunner().invoke(app, ["push", str(folder), "org/name"])
    assert done.exit_code == 1 and done.stderr.startswith(f"fsr-hf: {folder} is not uploaded: ")


def test_export_that_would_not_load_is_refused(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints.stock, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"would not load whole: weights: missing lm_head\.weight"):
        export(source, tmp_path / "fsr", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    export(source, tmp_path / "fsr", verify=False, progress=False)
    done = CliRunner().invoke(app, ["export", str(source), str(tmp_path / "cli"), "--no-verify"])
    assert done.exit_code == 0, done.stderr


def killed(target: str, run) -> None:
    """Runs `run` in a process that is killed by SIGKILL when it calls `target`."""
    if (child := os.fork()) == 0:
        with suppress(BaseException), pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
            run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    "step", ["weights.copy_shard", "weights._save_tensors", "export._copy_files", "export._name_processor"]
)
def test_killed_export_leaves_nothing_that_loads(step, checkpoints, tmp_path):
    target = tmp_path / "fsr"
    killed(f"fsr_hf.hub.{step}", lambda: export(checkpoints.stock, target, text_encoder=checkpoints.clip))
    left = tmp_path / "fsr.incomplete"
    assert not target.exists() and left.is_dir()
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(left)
    assert CliRunner().invoke(app, ["push", str(left), "org/name"]).exit_code == 1
    export(checkpoints.stock, target, progress=False)
    assert list(tmp_path.iterdir()) == [target] and verify(target) == []


@pytest.mark.parametrize(
    "step",
    [
        *("fsr_hf.hub.export.write_card", "fsr_hf.hub.export.write_manifest", "pathlib.Path.rename"),
        *("pathlib.Path.replace", "fsr_hf.hub.staging.folder_files", "pathlib.Path.rmdir"),
    ],
)
def test_killed_replacement_leaves_the_old_or_the_new_folder(step, folder, checkpoints, tmp_path):
    """... and the next export, with or without `force`, finishes what the killed one has begun."""
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    old = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    killed(step, lambda: export(checkpoints.stock, folder, force=True, progress=False))
    replaced = tmp_path / "fsr.replaced"
    is_new = step.endswith(("folder_files", "rmdir"))
    whole = folder if step != "pathlib.Path.replace" else replaced  # killed between the two renames
    if is_new:
        assert verify(folder) == check_loads(folder) == []
    else:
        found = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
        found.pop(Path(".fsr-hf-export"), None)
        assert found == old
    with pytest.raises(FileExistsError, match="is not empty"):
        export(checkpoints.stock, folder, progress=False)
    if not is_new:
        assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} >= old.keys()
        export(checkpoints.stock, folder, force=True, progress=False)
    assert verify(folder) == check_loads(folder) == []
    assert [path for path in replaced.rglob("*") if path.is_file()] == [replaced / "mine" / "notes.txt"]
    assert sorted(tmp_path.iterdir()) == [folder, replaced]


def test_licence_of_the_base(checkpoints, tmp_path):
    base = "llava-hf/llava-1.5-7b-hf"
    folder = export(checkpoints.stock, tmp_path / "fsr", base_model=base, progress=False)
    notice = (folder / "NOTICE").read_text()
    assert notice.startswith(card_data()["licences"]["llama2"]["notice"])
    assert f"base_model: {base}" in (folder / "README.md").read_text()
    assert "NOTICE" in read_manifest(folder)[1]
    done = CliRunner().invoke(app, ["push", str(folder), "org/name"])
    assert done.exit_code == 1 and "wants a copy of itself to go along" in done.stderr
    assert done.stderr.count("\n") == 1
    # An export of the export knows its base, and what is there stays.
    (folder / "NOTICE").write_text("mine")
    again = export(folder, tmp_path / "again", progress=False)
    assert f"base_model: {base}" in (again / "README.md").read_text()
    assert (again / "NOTICE").read_text() == "mine"
    assert not (checkpoints.fsr / "NOTICE").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["push", "nowhere", "org/name"], "nowhere is no folder"),
        (["push", ".", "org/name"], "fsr_manifest.json is missing"),
        (["verify", "nowhere at all"], "is neither a folder nor the id of a Hub repository"),
        (["verify", "org/name"], "offline"),
    ],
)
def test_errors_take_one_line(arguments, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("fsr-hf: ") and error in done.stderr and done.stderr.count("\n") == 1


def test_manifest_of_files_on_a_server(folder):
    shard = "model-00001-of-00002.safetensors"
    known, manifest = {shard: Fingerprint.of(folder / shard)}, read_manifest(folder)
    (folder / shard).unlink()
    assert compare_manifest(folder, manifest, known) == []
    assert compare_manifest(folder, manifest) == [f"{shard} is missing"]
    assert compare_manifest(folder, manifest, {shard: Fingerprint(known[shard].size, "0" * 64)}) == [
        f"{shard} has other contents"
    ]
