"""
A command of another package as it is, apart from a note of each prompt that the language model (a Llama) reads.

    python noted_process.py MODE TOKENS_FILE COMMAND [ARGUMENT ...]

MODE is what happens to this package first: `imported`, `hidden` (an import of it fails), or `installed` (nothing).
"""

import sys
from importlib.metadata import entry_points
from pathlib import Path


mode, tokens_file, *sys.argv = sys.argv[1:]
if mode == "hidden":
    sys.modules["fsr_hf"] = None
elif mode == "imported":
    import fsr_hf  # noqa: F401

from transformers.models.llama.modeling_llama import LlamaModel  # noqa: E402


forward = LlamaModel.forward


def noted_forward(self, *args, **kwargs):
    embeddings = kwargs["inputs_embeds"]
    if embeddings.shape[1] > 1:  # not a new token by itself
        with Path(tokens_file).open("a", encoding="utf-8") as file:
            file.write(f"{embeddings.shape[0] * embeddings.shape[1]}\n")
    return forward(self, *args, **kwargs)


LlamaModel.forward = noted_forward
(command,) = entry_points(group="console_scripts", name=sys.argv[0])
sys.exit(command.load()())
