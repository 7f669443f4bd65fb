"""
Run by `test_cards.py` in a process that has never heard of the package: does what a reader of each model card does who
copies its python blocks one after the other, and leaves in `report.json` what became of them.

    python -I card_process.py CARD ...
"""

import json
import re
import sys
from pathlib import Path


sys.modules["fsr_hf"] = None  # an import of it fails, installed or not

report: dict = {}
for card in sys.argv[1:]:
    text = Path(card).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    lengths, budgets, kept, of = [], [], 0, 0
    for number, block in enumerate(blocks):
        exec(compile(block, f"{card}, block {number + 1}", "exec"), names)
        lengths.append(names["out"].shape[1] - names["inputs"]["input_ids"].shape[1])
        budgets.append(names["model"].config.fsr_config.to_dict())
        if number == 0:
            model, inputs = names["model"], names["inputs"]
            asked = {"return_dict_in_generate": True, "output_visual_selection": True}
            (selection,) = model.generate(**inputs, max_new_tokens=1, **asked).visual_selections
            kept = selection.indices.ge(0).sum().item()
            of = sum(inputs["input_ids"].eq(token).sum().item() for token in model.model.placeholder_ids.values())
    report[card] = {
        "class": type(names["model"].get_base_model()).__name__,
        "lengths": lengths,
        "kept": [kept, of],
        "budgets": [[budget[name] for name in ("num_visual_tokens", "retention_ratio")] for budget in budgets],
        "answer": names["answers"][0]["generated_text"],
        "trained": [name for name, parameter in names["model"].named_parameters() if parameter.requires_grad],
        "files": sorted(path.name for path in Path("other-budget").iterdir()),
    }
Path("report.json").write_text(json.dumps(report))
