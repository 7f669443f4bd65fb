"""`fsr-hf demo`: compare pruned answers of a checkpoint with unpruned and right ones, and what each of them costs."""

import json
import os
import platform
import statistics
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
from ..machine import default_device, machine_name
from ..testing.small_llava import export_small_llava
from .shapes_vqa import PICTURES, example_questions, shapes_vqa_folder


__all__ = ["PICTURES", "run_demo"]

_WIDTH = 100
# Arguments of `generate` for what is compared.
_UNPRUNED: dict[str, dict] = {"all tokens": {"fsr_enabled": False}}
_PRUNED: dict[str, dict] = {"FSR": {}}
# Of the 576 visual tokens of LLaVA-1.5, a third and a ninth, as in the paper.
_BUDGETS = {f"FSR, {budget}": {"num_visual_tokens": budget} for budget in (192, 64)}


def run_demo(
    model: str | None = None,
    *,
    device: str | None = None,
    max_new_tokens: int = 8,
    repeats: int = 3,
    echo: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """
    Compare pruned with unpruned answers of an FSR checkpoint that is loaded, with the code it brings along, in a
    process that cannot import this package.

    Args:
        model (`str`, *optional*):
            A folder or a Hub id. By default two models, neither of which needs a download: the small LLaVA that comes
            with the package, for its answers, and a larger one of random weights, for its times.
        device (`str`, *optional*):
            By default a GPU if there is one.
        max_new_tokens (`int`, *optional*, defaults to 8):
            The most that an answer has.
        repeats (`int`, *optional*, defaults to 3):
            How often each question is asked where times are shown; they are medians.
        echo (`Callable[[str], None]`, *optional*, defaults to `print`):
            Takes what there is to read, piece by piece.

    Returns:
        `list[dict[str, Any]]`: what was measured of each model.

    Raises:
        `OSError`: if there is no such checkpoint.
        `ValueError`: for a checkpoint without FSR.
        `RuntimeError`: if the other process failed, after it said why.
    """
    if model is not None:
        check_fsr_model(model, trust_remote_code=True)
    examples = example_questions()
    questions = [(str(example.image), example.question) for example in examples]
    options = {
        "device": device or default_device(),
        "max_new_tokens": max_new_tokens,
    }
    with tempfile.TemporaryDirectory(prefix="fsr-hf-demo-") as temporary:
        root = Path(temporary)
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        if model is None:
            echo("Asking two models, in a process where fsr_hf cannot be imported ...")
            environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")}  # no network, and no traces
            small = export(shapes_vqa_folder(), root / "shapes-vqa-fsr", progress=False)
            large = export_small_llava(root)
            jobs = [
                {"folder": str(small), "questions": questions, "runs": _UNPRUNED | _PRUNED, "repeats": 1},
                {"folder": str(large), "questions": questions[:1], "runs": _UNPRUNED | _BUDGETS, "repeats": repeats}
                | {"max_new_tokens": 2},  # for its times
            ]
        else:
            echo(f"Asking {model}, in a process where fsr_hf cannot be imported ...")
            folder = os.path.abspath(model) if os.path.isdir(model) else model
            jobs = [{"folder": folder, "questions": questions, "runs": _UNPRUNED | _PRUNED, "repeats": repeats}]
        results = _ask([options | job for job in jobs], root, environment)
    for asked, example in zip(results[0]["questions"], examples):
        asked["right"] = example.answer
    for line in _report(results, model, repeats):
        echo(line)
    return results


def _ask(jobs: list[dict[str, Any]], root: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Run `compare.py` in a process of its own, outside of the working directory, which may hold this package."""
    request_file, result_file = root / "request.json", root / "result.json"
    request_file.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("compare.py")
    command = [sys.executable, "-I", str(script), str(request_file), str(result_file)]
    done = subprocess.run(command, cwd=root, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"the process that loads the model ended with exit code {done.returncode}; see above.")
    return json.loads(result_file.read_text())


def _report(results: list[dict[str, Any]], model: str | None, repeats: int) -> Iterator[str]:
    answers, costs = results[0], results[-1]
    runs = answers["questions"][0]["runs"]
    num_tokens, num_kept = (run["visual_tokens"] for run in runs.values())
    if model is None:
        yield from _heading("Right answers with a ninth of the visual tokens")
        yield (
            f"A LLaVA of {answers['num_parameters'] / 1e6:.0f} M weights, trained on such pictures. It has "
            f"{num_tokens} visual tokens of each, FSR keeps {num_kept}."
        )
        yield ""
        yield from _answer_table(answers["questions"])
        yield from _heading("What it saves in a model that is large enough to show it")
        yield _paragraph(
            f"The shapes of LLaVA-1.5 on a small scale: {costs['num_parameters'] / 1e6:.0f} M weights. They are "
            "random, so its answers mean nothing; its times do."
        )
    else:
        yield from _heading("Answers")
        yield from _answer_list(answers["questions"])
        yield from _heading("Costs")
    yield ""
    yield from _cost_table(costs["questions"])
    yield ""
    yield _paragraph(
        f"Prompt: what the language model saw, text and visual tokens. Prefill: from the call of generate() to the "
        f"first new token, vision tower and selection included. Times are medians of {repeats} calls. "
        f"{costs['model']} from the checkpoint's own {costs['code']}.py in {costs['dtype']}, on {costs['device']}. "
        f"{machine_name()}, {costs['num_threads']} used by torch {torch.__version__}; transformers "
        f"{transformers.__version__}, Python {platform.python_version()}."
    )
    yield ""
    yield "Next: fsr-hf demo --web opens a chat, fsr-hf explain draws kept tokens, fsr-hf bench measures more."


def _heading(text: str) -> Iterator[str]:
    yield from ("", text, "-" * len(text))


def _answer_table(questions: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each question. For short answers."""
    names = list(questions[0]["runs"])
    row = "{:<46}{:<15}" + "{:<15}" * len(names)
    yield row.format("", "right answer", *names).rstrip()
    right = dict.fromkeys(names, 0)
    for question in questions:
        given = {name: run["answer"] for name, run in question["runs"].items()}
        for name, answer in given.items():
            right[name] += answer == question["right"]
        yield row.format(question["question"], question["right"], *given.values()).rstrip()
    yield row.format("", "", *(f"{count} of {len(questions)} right" for count in right.values())).rstrip()


def _answer_list(questions: list[dict[str, Any]]) -> Iterator[str]:
    """A line or more for each answer. Long ones are no match for the right one word by word."""
    for question in questions:
        yield f"{question['image']}: {question['question']}"
        given = {name: run["answer"] for name, run in question["runs"].items()}
        for name, answer in ({"right": question["right"]} | given).items():
            yield textwrap.fill(answer, _WIDTH, initial_indent=f"  {name:12}", subsequent_indent=" " * 14)


# Columns of the table: heading, field, how it is written.
_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("visual tokens", "visual_tokens", "{:.0f}".format),
    ("prompt", "length", "{:.0f}".format),
    ("KV cache", "cache_bytes", lambda value: f"{value / 1e6:.1f} MB"),
    ("prefill", "prefill", lambda value: f"{value * 1e3:,.0f} ms"),
)


def _cost_table(questions: list[dict[str, Any]]) -> Iterator[str]:
    """Medians over the questions, and beside them how many times more the unpruned ones are."""
    yield f"{'':10}" + "".join(f"{heading:>14}{'':8}" for heading, *_ in _COLUMNS).rstrip()
    first: dict[str, float] = {}
    for name in questions[0]["runs"]:
        cells = []
        for _, field, write in _COLUMNS:
            value = statistics.median(question["runs"][name][field] for question in questions)
            ratio = first.setdefault(field, value) / value
            cells.append(f"{write(value):>14}" + (f"{f'{ratio:.1f}x':>6}  " if name not in _UNPRUNED else " " * 8))
        yield f"{name:10}" + "".join(cells).rstrip()


def _paragraph(text: str) -> str:
    return textwrap.fill(text, _WIDTH)
