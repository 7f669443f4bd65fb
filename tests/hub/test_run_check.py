"""`fsr-hf verify --run`: the code of a folder, run on the folder's tiny twin."""

import json
import shutil

import pytest
import torch
from transformers import GenerationMixin
from typer.testing import CliRunner

from fsr_hf.cli import app
from fsr_hf.hub.run_check import check_run
from fsr_hf.hub.verify import verify
from fsr_hf.testing.small_families import SMALL_FAMILIES, export_small_model


@pytest.fixture(scope="module", params=SMALL_FAMILIES)
def folder(request, tmp_path_factory):
    return export_small_model(request.param, tmp_path_factory.mktemp(request.param))


def test_a_sound_folder(folder):
    assert verify(folder, run=True) == []


def test_a_version_that_loses_the_visual_tokens(folder, monkeypatch):
    original = GenerationMixin.prepare_inputs_for_generation

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = original(self, *args, **kwargs)
        inputs.pop("mm_encoder_outputs", None)
        return inputs

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepare_inputs_for_generation)
    differences = check_run(folder)
    assert len(differences) == 4  # every way through `generate`, and `forward()` is right
    assert all("RuntimeError: FSR stops here" in difference for difference in differences)


def test_a_version_that_samples_something_else(folder, monkeypatch):
    """No invariant can see that: the tokens do."""
    original = GenerationMixin._get_logits_processor

    def _get_logits_processor(self, *args, **kwargs):
        processors = original(self, *args, **kwargs)
        processors.append(lambda ids, scores: -scores)
        return processors

    monkeypatch.setattr(GenerationMixin, "_get_logits_processor", _get_logits_processor)
    differences = check_run(folder)
    assert any(difference.startswith("greedy decoding: tokens [[") for difference in differences)


def test_code_that_is_wrong(folder, tmp_path):
    """The folder's own code is run, not the package's."""
    broken = shutil.copytree(folder, tmp_path / f"{folder.parent.name}-broken")
    code = (broken / "compression.py").read_text()
    wrong = code.replace("carry_states(outputs.last_hidden_state", "torch.neg(outputs.last_hidden_state", 1)
    assert wrong != code
    wrong = wrong.replace(", prompt.columns, input_ids.shape[1])", ")", 1)
    (broken / "compression.py").write_text(wrong)
    assert any("`forward()`" in difference for difference in check_run(broken))
    assert not any("forward" in difference for difference in verify(broken, run=True))  # it is not run at all


def test_cli(folder):
    result = CliRunner().invoke(app, ["verify", "--run", str(folder)])
    assert result.exit_code == 0, result.output
    assert "Its code prunes rightly under transformers" in result.output


def test_a_folder_without_code(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no code .*`fsr-hf export` writes it along"):
        check_run(tmp_path)
    assert torch.is_grad_enabled()
