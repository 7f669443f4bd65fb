"""An original LLaVA-Video checkpoint becomes a Hub folder that works where the package is not installed."""

import json

import pytest
import torch
from families import TEXT_CONFIG, initialize
from hub.clean_run import run_clean
from original_llava_video import save_original
from PIL import Image
from processing.tiny_tokenizers import qwen_tokenizer
from transformers import AutoProcessor

from fsr_hf import FSRLlavaVideoConfig, FSRLlavaVideoForConditionalGeneration, FSRLlavaVideoProcessor, export


SPECIAL = {"im_start_token": "<|im_start|>", "im_end_token": "<|im_end|>"}
SIDE = 28  # pixels, 4 x 4 patches
FIELDS = {
    "vocab_size": 300,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 7,
        "vision_use_head": False,
    },
}


def save(folder):
    """The checkpoint as LLaVA-Video's own code leaves it: no processor, and a tokenizer without placeholders."""
    folder.mkdir()
    config = FSRLlavaVideoConfig(
        text_config={"model_type": "qwen2", **TEXT_CONFIG, "vocab_size": 300}, vision_config=FIELDS["vision_config"]
    )
    model = initialize(FSRLlavaVideoForConditionalGeneration(config))
    save_original(folder, model, **FIELDS)
    qwen_tokenizer(extra_special_tokens=SPECIAL, padding_side="right").save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return model.state_dict()


def ask(processor, content, **kwargs):
    return processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": "a red dog?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **kwargs,
    )


def test_export_works_in_a_clean_process(tmp_path):
    weights = save(tmp_path / "original")
    folder = export(tmp_path / "original", tmp_path / "fsr", fsr_config={"num_visual_tokens": 3})

    model, info = FSRLlavaVideoForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, FSRLlavaVideoProcessor)
    tokens = processor.tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    assert [model.config.image_token_id, model.config.video_token_id] == tokens == [258 + 1, 258 + 2]
    assert processor.spatial_pool_mode == model.config.spatial_pool_mode == "average"
    assert processor.video_processor.num_frames == 32 and processor.tokenizer.padding_side == "left"

    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
    inputs = ask(processor, [{"type": "video", "video": frames}])
    out = model.generate(
        **inputs, max_new_tokens=4, return_dict_in_generate=True, output_visual_selection=True, do_sample=False
    )
    (selection,) = out.visual_selections
    assert len(selection.indices) == 3 and len(selection.grid) == 3 * 2 * 3

    report = run_clean(folder, tmp_path / "clean")
    assert report["missing"] == report["unexpected"] == report["fsr_hf"] == []
    assert report["classes"] == ["FSRLlavaVideoForConditionalGeneration"] * 2 + ["FSRLlavaVideoProcessor"]
    assert {"pixel_values", "image_sizes", "batch_num_images"} < {*report["inputs"]}
    assert report["config"]["fsr_config"]["num_visual_tokens"] == 3
    assert report["other_budget"] == 2
    inputs = ask(processor, [{"type": "image", "image": Image.new("RGB", (28, 28), "red")}])
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist() == report["tokens"]


def test_too_few_embeddings_for_the_placeholders(tmp_path):
    save(tmp_path / "original")
    file = tmp_path / "original" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 260}))
    with pytest.raises(ValueError, match="260 token embeddings, too few for the 261 tokens"):
        export(tmp_path / "original", tmp_path / "fsr")
    assert not (tmp_path / "fsr").exists()
