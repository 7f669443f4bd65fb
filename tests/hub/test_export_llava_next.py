"""A stock LLaVA-NeXT checkpoint becomes a Hub folder that works where the package is not installed."""

import torch
from hub.clean_run import run_clean
from hub.tiny_checkpoints import SIDE, tiny_clip
from old_keys import old_llava_key
from PIL import Image
from processing.queries import chat, turn
from processing.tiny_tokenizers import clip_tokenizer, llama_tokenizer
from safetensors.torch import save_file
from transformers import (
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from fsr_hf import FSRLlavaNextForConditionalGeneration, export
from fsr_hf.testing.chat_templates import LLAVA_TEMPLATE


PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def save_stock(clip, folder):
    tokenizer = llama_tokenizer()
    text_config = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlavaNextConfig(
        text_config=text_config,
        vision_config=clip.config.vision_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    model = LlavaNextForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    config.save_pretrained(folder)
    weights = {old_llava_key(key): tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)
    return model.state_dict()


def test_export_works_in_a_clean_process(tmp_path):
    torch.manual_seed(0)
    clip = tiny_clip()
    clip.save_pretrained(tmp_path / "clip")
    clip_tokenizer().save_pretrained(tmp_path / "clip")
    stock = save_stock(clip, tmp_path / "stock")
    budget = {"num_visual_tokens": 9}
    folder = export(tmp_path / "stock", tmp_path / "fsr", text_encoder=tmp_path / "clip", fsr_config=budget)

    model, info = FSRLlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights = model.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in stock.items())

    report = run_clean(folder, tmp_path / "clean")
    assert report["missing"] == report["unexpected"] == report["fsr_hf"] == []
    assert report["classes"] == ["FSRLlavaNextForConditionalGeneration"] * 2 + ["FSRLlavaNextProcessor"]
    assert {"pixel_values", "image_sizes", "query_input_ids"} < {*report["inputs"]}
    assert report["config"]["fsr_config"]["num_visual_tokens"] == 9
    assert report["other_budget"] == 2
    question = turn("user", Image.new("RGB", (28, 28), "red"), "a red dog?")
    inputs = chat(AutoProcessor.from_pretrained(folder), [question], add_generation_prompt=True)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist() == report["tokens"]
