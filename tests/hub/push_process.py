"""
Run by `test_round_trip.py` where the package is installed: pushes all that a family can push to the Hub at
`HF_ENDPOINT`, and leaves in `OUTPUT_DIR/pushed.json` what a process without the package should find.

    python push_process.py MODEL_TYPE OUTPUT_DIR
"""

import json
import sys
from pathlib import Path

import torch
from hub.clean_inputs import digest, make_inputs
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoProcessor
from typer.testing import CliRunner

from fsr_hf import export
from fsr_hf.cli import app
from fsr_hf.testing.small_families import export_small_model


def run(*arguments: str) -> dict:
    done = CliRunner().invoke(app, [*arguments])
    return {"code": done.exit_code, "stdout": done.stdout, "stderr": done.stderr}


model_type, output_dir = sys.argv[1], Path(sys.argv[2])
torch.manual_seed(0)
folder = export_small_model(model_type, output_dir)
api = HfApi()
report: dict = {"push": run("push", str(folder), "org/fsr", "--tag", "v0.1.0")}
report["again"] = run("push", str(folder), "org/fsr", "--tag", "v0.1.0")
report["verify"] = run("verify", "org/fsr@v0.1.0")
report["verify_by_manifest"] = run("verify", str(folder), "--manifest-of", "org/fsr@v0.1.0")

# What the checkpoint computes, by the installed classes.
model, processor = AutoModel.from_pretrained("org/fsr"), AutoProcessor.from_pretrained("org/fsr")
inputs = make_inputs(processor, model_type)
report["digest"] = digest(model)
report["tokens"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
report["classes"] = [type(model).__name__, type(processor).__name__]

# The methods of the stock classes.
model.push_to_hub("org/plain")
report["half"] = sorted(api.list_repo_files("org/plain"))
processor.push_to_hub("org/plain")
config = AutoConfig.from_pretrained("org/fsr")
config.fsr_config.retention_ratio = 0.25
config.push_to_hub("org/budget")
report["plain_verify"] = run("verify", "org/plain")
report["budget_files"] = sorted(api.list_repo_files("org/budget"))

# A second version with another budget, and new code after it.
second = export(folder, output_dir / "second", fsr_config={"retention_ratio": 0.75}, progress=False)
(second / "stale.safetensors").write_bytes(b"")
api.upload_file(path_or_fileobj=second / "stale.safetensors", path_in_repo="model.safetensors", repo_id="org/fsr")
(second / "stale.safetensors").unlink()
report["second"] = run("push", str(second), "org/fsr", "--tag", "v0.2.0")
report["branch"] = run("push", str(second), "org/fsr", "--revision", "next")
code = next(path for path in second.glob("modeling_fsr_*.py") if type(model).__name__ in path.read_text())
content = code.read_text() + "\nNEWER = True\n"
api.upload_file(path_or_fileobj=content.encode(), path_in_repo=code.name, repo_id="org/fsr")
report["newer_verify"] = run("verify", "org/fsr")
report["newer_file"] = code.name

adapted = get_peft_model(
    model,
    LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    ),
)
adapted.push_to_hub("org/lora")
with torch.no_grad():
    report["lora_logits"] = adapted(**inputs).logits[0, -1].tolist()

report["private"] = run("push", str(folder), "org/secret", "--private")
(output_dir / "pushed.json").write_text(json.dumps(report))
