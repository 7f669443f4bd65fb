"""
Run by `test_export.py` in a process that has never heard of the package: loads a folder by the Auto classes, saves
what it loaded, and leaves what the test compares in `OUTPUT_DIR/report.json`.

    python -I clean_process.py FOLDER OUTPUT_DIR
"""

import hashlib
import json
import sys
from pathlib import Path


sys.modules["fsr_hf"] = None  # an import of it fails, installed or not

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)


def digest(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def refusal(auto_class: type, folder: str) -> str:
    try:
        auto_class.from_pretrained(folder)
    except ValueError as error:
        return str(error)
    return "loaded"


folder, output_dir = sys.argv[1], Path(sys.argv[2])
trust = {"trust_remote_code": True}
auto_classes = (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor)
report: dict = {"refusals": {cls.__name__: refusal(cls, folder) for cls in auto_classes}}

config = AutoConfig.from_pretrained(folder, **trust)
report["config"] = config.to_dict()
config.save_pretrained(output_dir / "config_only")

model, loading_info = AutoModel.from_pretrained(folder, output_loading_info=True, **trust)
report["missing"] = sorted(loading_info["missing_keys"])
report["unexpected"] = sorted(loading_info["unexpected_keys"])
report["digest"] = digest(model)
report["classes"] = [type(model).__name__, type(AutoModelForImageTextToText.from_pretrained(folder, **trust)).__name__]
# A config from one copy of the code, weights and model from another.
other = AutoConfig.from_pretrained(output_dir / "config_only", fsr_config={"num_visual_tokens": 2}, **trust)
report["other_budget"] = AutoModel.from_pretrained(folder, config=other, **trust).config.fsr_config.num_visual_tokens

processor = AutoProcessor.from_pretrained(folder, **trust)
report["classes"].append(type(processor).__name__)
content = [{"type": "image", "image": Image.new("RGB", (28, 28), "red")}, {"type": "text", "text": "a red dog?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
report["inputs"] = sorted(inputs)
with torch.no_grad():
    report["logits"] = model(**inputs).logits[0, -1].tolist()
report["tokens"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
pipe = pipeline("image-text-to-text", model=folder, **trust)
messages = [{"role": "user", "content": content}]
report["pipeline"] = pipe(messages, max_new_tokens=4, return_full_text=False)[0]["generated_text"]

model.save_pretrained(output_dir / "whole")
processor.save_pretrained(output_dir / "whole")
processor.save_pretrained(output_dir / "processor_only")
report["fsr_hf"] = [name for name in sys.modules if name.startswith("fsr_hf.")]
(output_dir / "report.json").write_text(json.dumps(report))
