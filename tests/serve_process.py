"""
`transformers serve` as it is, apart from a note of each prompt that the language model reads: run by `test_serve.py`.

    python serve_process.py MODE TOKENS_FILE FOLDER [OPTION ...]

MODE is `package`, where the installed package knows the family, or `clean`, where an import of it fails.
"""

import sys
from pathlib import Path


mode, tokens_file, *arguments = sys.argv[1:]
sys.argv = ["transformers", "serve", *arguments]
if mode == "clean":
    sys.modules["fsr_hf"] = None
else:
    import fsr_hf  # noqa: F401

from transformers.cli.transformers import main  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaModel  # noqa: E402


forward = LlamaModel.forward


def noted_forward(self, *args, **kwargs):
    embeddings = kwargs["inputs_embeds"]
    if embeddings.shape[1] > 1:  # not a new token by itself
        with Path(tokens_file).open("a", encoding="utf-8") as file:
            file.write(f"{embeddings.shape[0] * embeddings.shape[1]}\n")
    return forward(self, *args, **kwargs)


LlamaModel.forward = noted_forward
main()
