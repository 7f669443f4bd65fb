"""`fsr-hf demo`: build or take a checkpoint, compare its pruned answers with its unpruned ones, print a table."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from ..explain import check_fsr_model
from ..hub.export import export
from ..machine import machine_name
from .small_llava import SmallLlava, save_small_llava


__all__ = ["PHOTOGRAPHS", "export_small_llava", "run_demo"]

# Photographs in the public domain or under CC0 that scikit-image brings along, and what is asked about each.
PHOTOGRAPHS = {
    "coffee.png": "What is in the cup, and what is beside it?",
    "chelsea.png": "Which animal is this, and where is it looking?",
    "astronaut.png": "What is the woman wearing?",
}
_WIDTH = 100


def run_demo(
    model: str | None = None,
    *,
    keep: str | os.PathLike | None = None,
    device: str | None = None,
    max_new_tokens: int = 12,
    repeats: int = 3,
    size: SmallLlava | None = None,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """
    Compare pruned with unpruned answers of an FSR checkpoint that is loaded, with the code it brings along, in a
    process that cannot import this package.

    Args:
        model (`str`, *optional*):
            A folder or a Hub id. By default a small LLaVA of random weights is built and exported.
        keep (`str` or `os.PathLike`, *optional*):
            Folder that the export of the small LLaVA is written to. By default it is gone afterwards.
        device (`str`, *optional*):
            By default a GPU if there is one.
        max_new_tokens (`int`, *optional*, defaults to 12):
            Length of the answers.
        repeats (`int`, *optional*, defaults to 3):
            How often each question is asked; times are medians.
        size (`SmallLlava`, *optional*):
            Sizes of the small LLaVA.
        echo (`Callable[[str], None]`, *optional*, defaults to `print`):
            Takes what there is to read, piece by piece.

    Returns:
        `dict[str, Any]`: what was measured.

    Raises:
        `ImportError`: without scikit-image, which has the photographs.
        `OSError`: if there is no such checkpoint, or `keep` exists already.
        `ValueError`: for a checkpoint without FSR.
        `RuntimeError`: if the other process failed, after it said why.
    """
    questions = [[str(path), PHOTOGRAPHS[path.name]] for path in _find_photographs()]
    if model is not None:
        check_fsr_model(model, trust_remote_code=True)
    if keep is not None and os.path.exists(keep):
        raise FileExistsError(f"{keep} exists already: choose another name.")
    with tempfile.TemporaryDirectory(prefix="fsr-hf-demo-") as temporary:
        root = Path(temporary)
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        folder = model
        if folder is None:
            echo("Building a small LLaVA-1.5 of random weights, and exporting it with FSR ...")
            folder = str(export_small_llava(root, size, keep))
            environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")}  # no network, and no traces
        request = {
            "folder": folder,
            "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
            "questions": questions,
            "max_new_tokens": max_new_tokens,
            "repeats": repeats,
        }
        echo(f"Asking about {len(questions)} photographs, in a process where fsr_hf cannot be imported ...\n")
        result = _ask(request, root, environment)
    for line in _report(result, repeats):
        echo(line)
    if model is None:
        echo(
            _paragraph(
                "This model's weights are random: its answers are noise, and only sizes and times mean anything."
            )
        )
    if keep is not None:
        echo(f"The model is in {keep}: fsr-hf explain {keep} PHOTOGRAPH QUESTION")
    return result


def _find_photographs() -> list[Path]:
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ImportError('the photographs of the demo come with scikit-image: pip install "fsr-hf[demo]"')
    return [Path(spec.origin).parent / "data" / name for name in PHOTOGRAPHS]


def export_small_llava(root: Path, size: SmallLlava | None = None, keep: str | os.PathLike | None = None) -> Path:
    """Build the small LLaVA in folders of `root`, and export it, to `keep` if that is named; the exported folder."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        save_small_llava(root / "llava", root / "clip", size)
    finally:
        if bars:
            logging.enable_progress_bar()
    return export(root / "llava", keep or root / "llava-fsr", text_encoder=root / "clip", progress=False)


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
