"""What the code of a Hub folder may do: compute. It reads and writes no file, runs nothing, reaches no network."""

import ast

import pytest

from fsr_hf.hub.families import FAMILIES
from fsr_hf.hub.flatten import flat_files


# Of the standard library, what can do none of that; of `os` the name of a type.
MODULES = {
    *("collections", "collections.abc", "contextlib", "contextvars", "copy", "dataclasses", "difflib", "functools"),
    *("inspect", "itertools", "math", "os", "re", "typing"),
    "huggingface_hub.dataclasses",
}
OF_OS = {"PathLike"}
OF_TORCH = {"torch", "torch.nn", "torch.nn.functional", "torch.nn.utils.rnn"}
FUNCTIONS = {
    *("__import__", "breakpoint", "compile", "delattr", "eval", "exec", "globals", "input", "locals", "open", "vars"),
}
# Methods and functions, whatever they belong to.
ATTRIBUTES = {
    *("system", "popen", "spawn", "fork", "environ", "getenv", "putenv", "remove", "unlink", "rmdir", "makedirs"),
    *("read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "urlopen", "connect"),
    *("import_module", "load_module", "exec_module", "hub", "load_state_dict_from_url", "hf_hub_download"),
    *("snapshot_download", "load_library", "load_inline", "cpp_extension", "from_file", "tofile", "fromfile"),
    *("__subclasses__", "__globals__", "__builtins__", "__code__"),
}
OF_THE_TORCH_MODULE = {"load", "save", "ops", "classes", "serialization", "package", "multiprocessing", "distributed"}


def faults(source: str) -> list[str]:
    """What in a module of a Hub folder does more than compute."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
            if node.module == "os":
                found += [f"os.{alias.name}" for alias in node.names]
            found += [
                f"torch.{a.name}" for a in node.names if node.module == "torch" and a.name in OF_THE_TORCH_MODULE
            ]
        elif isinstance(node, ast.Name) and node.id in FUNCTIONS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if (
                node.attr in ATTRIBUTES
                or (owner == "os" and node.attr not in OF_OS)
                or (owner == "torch" and node.attr in OF_THE_TORCH_MODULE)
            ):
                found.append(f"{owner}.{node.attr}")
        for module in modules:
            root = module.partition(".")[0]
            if module not in MODULES | OF_TORCH and root not in ("transformers", "triton"):
                found.append(f"import {module}")
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.config.model_type)
def test_flat_code_computes_and_no_more(family):
    assert {name: found for name, source in flat_files(family).items() if (found := faults(source))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "open('x')",
        "f = open",
        "import subprocess",
        "from socket import socket",
        "import urllib.request",
        "import requests",
        "import pickle",
        "import os\nos.system('ls')",
        "from os import system",
        "import os\nos.environ['HF_TOKEN']",
        "eval('1')",
        "exec('1')",
        "__import__('os')",
        "import importlib",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import torch\ntorch.hub.load('x')",
        "from torch.utils import cpp_extension",
        "path.write_text('x')",
        "getattr(x, 'y').__globals__",
    ],
)
def test_the_check_finds_what_it_should(source):
    assert faults(source)
