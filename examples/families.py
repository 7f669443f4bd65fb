"""
Runs every family, from `AutoModel.from_pretrained` to decoded text, pruned and unpruned: an image, two images in one
prompt, a batch of two prompts, and a video where the family takes videos.

The models are small and their weights random: what they answer is noise, the numbers of tokens are those of the
published models. Nothing is downloaded. It takes less than a minute on two cores:

    python examples/families.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from fsr_hf.testing.small_families import SMALL_FAMILIES, export_small_model


NEW_TOKENS = 6
ROW = "{:16} {:24} {:>14} {:>14} {:>20}  {}"


def draw(width: int, height: int, step: int = 0) -> Image.Image:
    """A disc over a field; from step to step it moves."""
    image = Image.new("RGB", (width, height), "skyblue")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, height * 2 // 3, width, height), fill="darkgreen")
    left = width // 8 + 20 * step
    pen.ellipse((left, height // 4, left + height // 4, height // 2), fill="gold")
    return image


def ask(*visuals: Image.Image | np.ndarray, question: str) -> list[dict]:
    """A conversation about images, and videos as arrays of frames."""
    kinds = ["image" if isinstance(visual, Image.Image) else "video" for visual in visuals]
    parts: list[dict] = [{"type": kind, kind: visual} for kind, visual in zip(kinds, visuals)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def conversations(takes_videos: bool) -> dict[str, list]:
    wide, tall = draw(640, 480), draw(300, 400, step=3)
    cases = {
        "image": ask(wide, question="What is yellow?"),
        "two images in a prompt": ask(wide, tall, question="Where is the sun?"),
        "batch of two prompts": [ask(wide, question="What is it?"), ask(tall, question="What is in the picture?")],
    }
    if takes_videos:
        frames = np.stack([np.asarray(draw(320, 240, step)) for step in range(8)])
        cases["video of 8 frames"] = ask(frames, question="Where is the sun going?")
    return cases


def generate(model, inputs, **options) -> tuple[tuple[int, int, int], torch.Tensor]:
    """Visual tokens of all rows, length of the sequence, and bytes of the KV cache after the prefill; new tokens."""
    outputs = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **options
    )
    if selections := outputs.get("visual_selections"):  # one of each image or video
        num_visual_tokens = sum(len(selection.indices) for selection in selections)
    else:
        placeholders = torch.tensor([*model.model.placeholder_ids.values()])
        num_visual_tokens = int(torch.isin(inputs["input_ids"], placeholders).sum())
    cache = outputs.get("cache", outputs.get("past_key_values"))  # transformers 5.24 renamed it
    cached = cache.get_seq_length()
    length = cached - (NEW_TOKENS - 1)  # the last new token is chosen, not cached
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) * length // cached
    return (num_visual_tokens, length, cache_bytes), outputs.sequences[:, inputs["input_ids"].shape[1] :]


def main() -> None:
    logging.disable_progress_bar()
    print(
        "Small models of random weights: their answers are noise, and only numbers of tokens and bytes mean anything."
    )
    print(
        "Each number is unpruned -> pruned, with the default budget of the family. Newlines count as visual tokens.\n"
    )
    print(ROW.format("family", "prompt", "visual tokens", "sequence", "bytes of KV cache", "answer"))
    with tempfile.TemporaryDirectory(prefix="fsr-hf-families-") as root:
        for model_type in SMALL_FAMILIES:
            folder = export_small_model(model_type, Path(root) / model_type)
            model = AutoModel.from_pretrained(folder, trust_remote_code=True)
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            for name, messages in conversations(takes_videos=hasattr(processor, "video_processor")).items():
                inputs = processor.apply_chat_template(
                    messages,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs={"padding": True},
                )
                unpruned, _ = generate(model, inputs, fsr_enabled=False)
                pruned, new_tokens = generate(model, inputs, output_visual_selection=True)
                numbers = [f"{before} -> {after}" for before, after in zip(unpruned, pruned)]
                answers = processor.batch_decode(new_tokens, skip_special_tokens=True)
                print(ROW.format(model_type, name, *numbers, " | ".join(answers)))


if __name__ == "__main__":
    main()
