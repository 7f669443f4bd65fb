"""`fsr-hf demo`: compare the pruned answers of a checkpoint with its unpruned ones and the right ones, in a table."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from ..explain import check_fsr_model
from ..hub.export import export
from ..machine import machine_name
from .shapes_vqa import shapes_vqa_folder


__all__ = ["PICTURES", "run_demo"]

# Drawn pictures and, in questions.json, what is asked about each and what is right.
PICTURES = Path(__file__).with_name("pictures")
_WIDTH = 100


def run_demo(
    model: str | None = None,
    *,
    device: str | None = None,
    max_new_tokens: int = 8,
    repeats: int = 3,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """
    Compare pruned with unpruned answers of an FSR checkpoint that is loaded, with the code it brings along, in a
    process that cannot import this package.

    Args:
        model (`str`, *optional*):
            A folder or a Hub id. By default an export of the small LLaVA that comes with the package, trained on such
            pictures.
        device (`str`, *optional*):
            By default a GPU if there is one.
        max_new_tokens (`int`, *optional*, defaults to 8):
            The most that an answer has.
        repeats (`int`, *optional*, defaults to 3):
            How often each question is asked; times are medians.
        echo (`Callable[[str], None]`, *optional*, defaults to `print`):
            Takes what there is to read, piece by piece.

    Returns:
        `dict[str, Any]`: what was measured.

    Raises:
        `OSError`: if there is no such checkpoint.
        `ValueError`: for a checkpoint without FSR.
        `RuntimeError`: if the other process failed, after it said why.
    """
    questions = json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))
    if model is not None:
        check_fsr_model(model, trust_remote_code=True)
    with tempfile.TemporaryDirectory(prefix="fsr-hf-demo-") as temporary:
        root = Path(temporary)
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        if model is None:
            environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")}  # no network, and no traces
            export(shapes_vqa_folder(), root / "shapes-vqa-fsr", progress=False)
        request = {
            "folder": str(model or root / "shapes-vqa-fsr"),
            "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
            "questions": [[str(PICTURES / entry["image"]), entry["question"]] for entry in questions],
            "max_new_tokens": max_new_tokens,
            "repeats": repeats,
        }
        name = "the small LLaVA of this package" if model is None else model
        echo(f"Asking {name} {len(questions)} questions, in a process where fsr_hf cannot be imported ...\n")
        result = _ask(request, root, environment)
    for asked, entry in zip(result["questions"], questions):
        asked["right"] = entry["answer"]
    for line in _report(result, repeats):
        echo(line)
    return result


def _ask(request: dict[str, Any], root: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run `compare.py` in a process of its own, outside of the working directory, which may hold this package."""
    request["folder"] = os.path.abspath(request["folder"]) if os.path.isdir(request["folder"]) else request["folder"]
    request_file, result_file = root / "request.json", root / "result.json"
    request_file.write_text(json.dumps(request))
    script = Path(__file__).with_name("compare.py")
    command = [sys.executable, "-I", str(script), str(request_file), str(result_file)]
    done = subprocess.run(command, cwd=root, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"the process that loads the model ended with exit code {done.returncode}; see above.")
    return json.loads(result_file.read_text())


# Columns of the table: heading, field, how it is written.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("visual tokens", "num_visual_tokens", "{}".format),
    ("sequence", "length", "{}".format),
    ("KV cache", "cache_bytes", lambda value: f"{value / 1e6:.1f} MB"),
    ("prefill", "prefill", lambda value: f"{value * 1e3:.0f} ms"),
    ("per token", "per_token", lambda value: f"{value * 1e3:.1f} ms"),
)


def _report(result: dict[str, Any], repeats: int) -> Iterator[str]:
    yield f"{'':12}" + "".join(f"{heading:>15}" for heading, _, _ in _COLUMNS)
    for question in result["questions"]:
        unpruned, pruned = question["unpruned"], question["pruned"]
        yield "-" * _WIDTH
        yield f"{question['image']}: {question['question']}"
        for name, run in (("unpruned", unpruned), ("FSR", pruned)):
            yield f"  {name:10}" + "".join(f"{write(run[field]):>15}" for _, field, write in _COLUMNS)
        yield f"{'':12}" + "".join(f"{unpruned[field] / pruned[field]:>13.1f} x" for _, field, _ in _COLUMNS)
        yield f"  {'right':12}{question['right']}"
        same = "as FSR" if question["pipeline"] == pruned["answer"] else question["pipeline"]
        for name, answer in (("unpruned", unpruned["answer"]), ("FSR", pruned["answer"]), ("pipeline()", same)):
            yield textwrap.fill(answer, _WIDTH, initial_indent=f"  {name:12}", subsequent_indent=" " * 14)
    yield "-" * _WIDTH
    focus = ", ".join(
        f"{run['num_focus']} + {run['num_visual_tokens'] - run['num_focus']}"
        for run in (question["pruned"] for question in result["questions"])
    )
    yield _paragraph(
        f"Kept tokens, Focus + Scan: {focus}. Sequence: visual tokens and text. Prefill: from the call of generate() "
        f"to the first new token, vision tower and selection included. Times are medians of {repeats} calls."
    )
    yield _paragraph(
        f"{result['model']} from the checkpoint's own {result['code']}.py, {result['num_parameters'] / 1e6:.0f} M "
        f"weights in {result['dtype']}, on {result['device']}. {machine_name()}, {result['num_threads']} used by "
        f"torch {torch.__version__}; transformers {transformers.__version__}, Python {platform.python_version()}."
    )


def _paragraph(text: str) -> str:
    return textwrap.fill(text, _WIDTH)
