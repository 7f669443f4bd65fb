"""A stock Qwen2.5-VL checkpoint becomes a Hub folder that works where the package is not installed."""

import json

import pytest
import torch
from hub.clean_run import run_clean
from hub.tiny_checkpoints import tiny_clip
from old_keys import old_qwen_key
from PIL import Image
from processing.queries import chat, turn
from safetensors.torch import load_file, save_file
from tiny_qwen import save_checkpoint
from transformers import AutoModel, AutoProcessor

from fsr_hf import FSRQwen2_5_VLForConditionalGeneration, export


@pytest.fixture
def stock(tmp_path):
    """As Qwen's repositories have it: keys of old, and a config of the stock class."""
    folder = tmp_path / "stock"
    save_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {old_qwen_key(key): tensor for key, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for code in folder.glob("*.py"):
        code.unlink()
    config = json.loads((folder / "config.json").read_text())
    for name in ("auto_map", "fsr_config"):
        del config[name]
    config |= {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_export_works_in_a_clean_process(stock, tmp_path):
    folder = export(stock, tmp_path / "fsr", fsr_config={"num_visual_tokens": 3}, progress=False)
    model, info = FSRQwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = AutoModel.from_pretrained(stock).state_dict()  # the stock inner model
    weights = model.state_dict()
    assert all(torch.equal(weights[f"model.{key}"], tensor) for key, tensor in expected.items())

    report = run_clean(folder, tmp_path / "clean")
    assert report["missing"] == report["unexpected"] == report["fsr_hf"] == []
    assert report["classes"] == ["FSRQwen2_5_VLForConditionalGeneration"] * 2 + ["Qwen2_5_VLProcessor"]
    assert report["refusals"]["AutoProcessor"] == "loaded"  # the stock one needs no trust
    assert "trust_remote_code=True" in report["refusals"]["AutoModel"]
    assert {"pixel_values", "image_grid_thw", "mm_token_type_ids"} < {*report["inputs"]}
    fsr = report["config"]["fsr_config"]
    assert (fsr["num_visual_tokens"], fsr["relevance"], fsr["positions"]) == (3, "none", "original")
    assert report["other_budget"] == 2
    question = turn("user", Image.new("RGB", (28, 28), "red"), "a red dog?")
    inputs = chat(AutoProcessor.from_pretrained(folder), [question], add_generation_prompt=True)
    out = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_visual_selection=True
    )
    assert out.sequences[0].tolist() == report["tokens"]
    assert [len(selection.indices) for selection in out.visual_selections] == [3]
    # A second export, of what the clean process saved, has the same code.
    files = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert "attention_received" in files["saliency.py"] and "clip_tower.py" not in files
    assert files == {path.name: path.read_text() for path in (tmp_path / "clean" / "whole").glob("*.py")}


def test_a_text_encoder_is_refused(stock, tmp_path):
    tiny_clip().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="saliency alone: leave out `text_encoder`"):
        export(stock, tmp_path / "fsr", text_encoder=tmp_path / "clip", progress=False)
    with pytest.raises(ValueError, match="comes from no CLIP"):
        export(stock, tmp_path / "fsr", fsr_config={"relevance": "clip"}, progress=False)
    assert not (tmp_path / "fsr").exists()
