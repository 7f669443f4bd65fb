"""
What git keeps of the trained model: weights in one file, config, tokenizers and processor, out of the Hub folder that
training ends with. The code is the package's, and `fsr-hf export` writes it into a Hub folder again.

    python -m examples.shapes_vqa.checkpoint build/shapes-vqa/shapes-vqa-fsr checkpoints/shapes-vqa
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from fsr_hf.hub.manifest import MANIFEST


__all__ = ["keep_data"]

# Written by the package, or by hand.
_LEFT_OUT = (MANIFEST, "README.md", "model.safetensors.index.json")


def keep_data(hub_folder: Path, output_dir: Path) -> None:
    """Copy the data of `hub_folder` to `output_dir`; the README.md there stays."""
    output_dir.mkdir(parents=True, exist_ok=True)
    weights = {name: w for file in sorted(hub_folder.glob("*.safetensors")) for name, w in load_file(file).items()}
    save_file(weights, output_dir / "model.safetensors", metadata={"format": "pt"})
    (output_dir / "model.safetensors").chmod(0o644)  # safetensors makes files for their owner alone
    for file in hub_folder.rglob("*"):
        if file.is_dir() or file.name in _LEFT_OUT or file.suffix in (".py", ".safetensors"):
            continue
        target = output_dir / file.relative_to(hub_folder)
        target.parent.mkdir(exist_ok=True)
        text = file.read_text(encoding="utf-8")
        if "auto_map" in text and file.suffix == ".json":
            content = json.loads(text)
            content.pop("auto_map", None)
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    keep_data(*map(Path, sys.argv[1:]))
