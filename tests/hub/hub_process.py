"""
Run by `test_round_trip.py` in a process that has never heard of the package, with an empty cache: loads what
`push_process.py` has pushed to the Hub at `HF_ENDPOINT`, and leaves what the test compares in
`OUTPUT_DIR/report.json`.

    python -I hub_process.py MODEL_TYPE OUTPUT_DIR FAULTS

FAULTS are `[status, file, Auto class]` in JSON, each tried by itself.
"""

import json
import re
import sys
import time
import urllib.request
from pathlib import Path


sys.modules["fsr_hf"] = None  # an import of it fails, installed or not
sys.path.append(str(Path(__file__).parent))

import torch  # noqa: E402
from clean_inputs import digest, make_inputs, make_messages  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    dynamic_module_utils,
    pipeline,
)


model_type, output_dir = sys.argv[1], Path(sys.argv[2])
trust = {"trust_remote_code": True}
report: dict = {}
time.sleep = lambda seconds: None  # between the client's attempts


def tell(what: str, content):
    """Sets faults of the server, moves its branches, or empties and reads its log."""
    request = urllib.request.Request(f"{constants.ENDPOINT}/_test/{what}", json.dumps(content).encode())
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def attempt(load, *arguments, **options) -> str:
    try:
        load(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def budget(config) -> list:
    return [config.fsr_config.num_visual_tokens, config.fsr_config.retention_ratio]


def tokens(model, inputs) -> list[int]:
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()


# Without the flag.
loaders = {cls.__name__: cls.from_pretrained for cls in (AutoConfig, AutoModel, AutoModelForImageTextToText)}
loaders |= {"AutoProcessor": AutoProcessor.from_pretrained}
report["refusals"] = {name: attempt(load, "org/fsr") for name, load in loaders.items()}
report["refusals"]["pipeline"] = attempt(pipeline, "image-text-to-text", model="org/fsr")

# The first version, as `main`.
tell("branch", {"repo": "org/fsr", "name": "main", "to": "v0.1.0"})
model, info = AutoModel.from_pretrained("org/fsr", output_loading_info=True, **trust)
processor = AutoProcessor.from_pretrained("org/fsr", **trust)
inputs = make_inputs(processor, model_type)
report["missing"] = sorted(info["missing_keys"])
report["classes"] = [type(model).__name__, type(processor).__name__]
report["digest"], report["tokens"] = digest(model), tokens(model, inputs)
report["budget"] = budget(model.config)

# Again without a network.
tell("log", None)
tell("faults", [{"pattern": ".", "status": 503}])
constants.HF_HUB_OFFLINE = True
offline = AutoModel.from_pretrained("org/fsr", **trust)
AutoProcessor.from_pretrained("org/fsr", **trust)
report["offline"] = [digest(offline), tell("log", None)]
constants.HF_HUB_OFFLINE = False
# ... and with a Hub that is down.
report["down"] = attempt(AutoModel.from_pretrained, "org/fsr", **trust)
tell("faults", [])

pipe = pipeline("image-text-to-text", model="org/fsr", **trust)
answers = pipe(
    make_messages(model_type), max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False}
)
report["pipeline"] = [type(pipe.model).__name__, answers[0]["generated_text"]]
prompt = inputs["input_ids"].shape[1]
report["answer"] = processor.decode(report["tokens"][prompt:], skip_special_tokens=True)

# A newer version: `main` follows, a pinned revision stays, a branch is a revision too.
tell("branch", {"repo": "org/fsr", "name": "main", "to": "next"})
report["updated"] = budget(AutoModel.from_pretrained("org/fsr", **trust).config)
report["pinned"] = budget(AutoModel.from_pretrained("org/fsr", revision="v0.1.0", **trust).config)
report["branch"] = budget(AutoConfig.from_pretrained("org/fsr", revision="next", **trust))
report["no_revision"] = attempt(AutoModel.from_pretrained, "org/fsr", revision="v9", **trust)

# What the stock methods pushed, a config by itself, an adapter.
plain = AutoModel.from_pretrained("org/plain", **trust)
report["plain"] = [digest(plain), type(AutoProcessor.from_pretrained("org/plain", **trust)).__name__]
config = AutoConfig.from_pretrained("org/budget", **trust)
other = AutoModel.from_pretrained("org/fsr", revision="v0.1.0", config=config, **trust)
report["config_only"] = [budget(other.config), digest(other)]
adapted = PeftModel.from_pretrained(plain, "org/lora")
with torch.no_grad():
    report["lora_logits"] = adapted(**inputs).logits[0, -1].tolist()
    report["plain_logits"] = model(**inputs).logits[0, -1].tolist()

# What goes wrong on the way. A cache of its own for each, so that the retry starts from what the failure left.
report["private"] = attempt(AutoModel.from_pretrained, "org/secret", **trust)
report["nobody"] = attempt(AutoModel.from_pretrained, "org/nothing", **trust)
report["faults"] = []
for number, (status, file, auto_class) in enumerate(json.loads(sys.argv[3])):
    load = globals()[auto_class].from_pretrained
    dynamic_module_utils.HF_MODULES_CACHE = str(output_dir / f"modules-{number}")
    cache = {"cache_dir": output_dir / f"cache-{number}", "revision": "v0.1.0", **trust}
    tell("faults", [{"pattern": f"(GET|HEAD) .*{file}", "status": status}])
    failed = attempt(load, "org/fsr", **cache)
    tell("faults", [{"pattern": f"GET .*{file}", "status": 0, "times": 1}])  # a connection lost once
    tell("log", None)
    retried = attempt(load, "org/fsr", **cache)
    asked = [request for request in tell("log", None) if re.search(f"GET .*{file}", request)]
    tell("faults", [])
    report["faults"].append([status, file, failed, retried, asked])

report["fsr_hf"] = [name for name in sys.modules if name.startswith("fsr_hf.")]
(output_dir / "report.json").write_text(json.dumps(report))
