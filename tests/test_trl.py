"""TRL's `SFTTrainer` with its default fused head, which calls `model.base_model(...)`, trains on pruned prompts."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from fsr_hf.demo.run import PICTURES
from fsr_hf.demo.shapes_vqa import shapes_vqa_folder


datasets = pytest.importorskip("datasets", reason="trl is not installed")
trl = pytest.importorskip("trl")

STEPS, ROWS, PATCHES = 10, 2, 144  # of a picture of the small checkpoint


def questions_with_answers():
    """The demo's questions as prompt and completion, so that answers alone are labels."""
    rows = []
    for entry in json.loads((PICTURES / "questions.json").read_text(encoding="utf-8")):
        rows.append(
            {
                "images": [Image.open(PICTURES / entry["image"]).convert("RGB")],
                "prompt": [{"role": "user", "content": entry["question"]}],
                "completion": [{"role": "assistant", "content": entry["answer"]}],
            }
        )
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("options", [{}, {"num_visual_tokens": 5}, {"enabled": False}], ids=str)
def test_sft(options, tmp_path):
    folder = shapes_vqa_folder()
    model = AutoModel.from_pretrained(folder, fsr_config=options)
    fsr = model.config.fsr_config
    budget = fsr.num_visual_tokens if fsr.enabled else PATCHES
    seen, losses = [], []

    def record(module, args, kwargs):
        seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    model.get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    settings = trl.SFTConfig(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    processor = AutoProcessor.from_pretrained(folder)
    trainer = trl.SFTTrainer(model, settings, train_dataset=questions_with_answers(), processing_class=processor)
    compute_loss, given = trainer.compute_loss, []

    def remember(model, inputs, *args, **kwargs):
        given.append(tuple(inputs["input_ids"].shape))
        if not losses:  # what the class itself calls the loss of this batch
            with torch.no_grad():
                losses.append(float(type(model).forward(model, **inputs).loss))
            seen.clear()
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = remember
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    total, read = (sum(rows * length for rows, length in shapes) for shapes in (given, seen))
    print(f"{options}: of {total} tokens in {STEPS} batches, the language model saw {read}")
    assert len(given) == STEPS
    assert seen == [(rows, length - PATCHES + budget) for rows, length in given]
    assert logged[0] == pytest.approx(losses[0], rel=1e-3)
    assert sum(logged[-3:]) < sum(logged[:3])
