"""`fsr-hf eval --tasks`: benchmarks by lmms-eval, unpruned and at several budgets, beside the paper's numbers."""

import difflib
import json
import os
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from ..explain import check_fsr_model
from ..machine import machine_name, package_versions
from .answering import UNPRUNED, Budget, label, options_of
from .evaluate import begin_run, check_budgets, digest_model
from .questions import Question


__all__ = ["paper_results", "run_tasks"]

_WIDTH = 110


def paper_results() -> dict[str, Any]:
    """
    The paper's tables (cited, not measured with this package): `citation`; `benchmarks`, with the lmms-eval task and
    the metrics, added up and times `scale`, that stand for each; `tables`, with rows by budget.
    """
    return json.loads(Path(__file__).with_name("paper_results.json").read_text(encoding="utf-8"))


def run_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    budgets: Sequence[int | float],
    batch_size: int = 1,
    limit: int | None = None,
    model_args: str | None = None,
    include_path: str | os.PathLike | None = None,
    num_processes: int = 1,
    output: str | os.PathLike = "fsr-eval",
    device: str | None = None,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """
    Run tasks of lmms-eval on an FSR checkpoint, in a process for each budget. What an earlier call with the same
    settings has finished is not run again.

    Args:
        model (`str`):
            A folder or a Hub id.
        tasks (`Sequence[str]`):
            Names, as `lmms-eval tasks list` has them.
        budgets (`Sequence[int | float]`):
            Numbers of visual tokens to keep of each image or video, or shares of them.
        batch_size (`int`, *optional*, defaults to 1):
            Questions at a time.
        limit (`int`, *optional*):
            Questions of each task. By default all.
        model_args (`str`, *optional*):
            More arguments of lmms-eval's model, such as `"max_frames_num=32"`.
        include_path (`str` or `os.PathLike`, *optional*):
            Folder with tasks of one's own.
        num_processes (`int`, *optional*, defaults to 1):
            More than one are started by `accelerate launch`, each on a GPU of its own.
        output (`str` or `os.PathLike`, *optional*, defaults to `"fsr-eval"`):
            Folder for what is found.
        device (`str`, *optional*):
            By default a GPU if there is one.
        echo (`Callable[[str], None]`, *optional*, defaults to `print`):
            Takes what there is to read, line by line.

    Returns:
        `dict[str, Any]`: the report, as report.json has it.

    Raises:
        `ImportError`: without lmms-eval.
        `OSError`: if there is no such checkpoint.
        `ValueError`: for tasks that lmms-eval does not know, or a folder with another run.
        `RuntimeError`: if lmms-eval failed; it has said why.
    """
    try:
        from lmms_eval.tasks import TaskManager

        from .lmms_eval_plugin import MANIFESTS
    except ImportError as error:
        raise ImportError(f"--tasks needs lmms-eval: `pip install lmms-eval` ({error}).") from error
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"--include-path {include_path}: there is no such folder.")
    known = TaskManager("ERROR", include_path=None if include_path is None else str(include_path)).all_tasks
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, known, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"--tasks {task} is no task of lmms-eval.{hint} `lmms-eval tasks list` names them all.")
    check_fsr_model(model)
    config = AutoConfig.from_pretrained(model)
    names = [manifest.model_id for manifest in MANIFESTS]
    if config.model_type not in names:
        raise ValueError(f"--tasks takes the families {', '.join(names)}, but {model} is of {config.model_type}.")
    processor = AutoProcessor.from_pretrained(model)
    if getattr(processor, "video_processor", None) is None:
        largest = Question("", "?", ("",), "", images=(lambda: Image.new("RGB", (4096, 4096)),))
        check_budgets(config, processor, [largest], budgets, 1, None)

    settings = {
        "model": model,
        "model files": digest_model(model, config),
        "model_args": model_args,
        "batch_size": batch_size,
        "limit": limit,
        "include_path": None if include_path is None else str(include_path),
        "device": device,
        "num_processes": num_processes,
        "machine": machine_name(),
        "versions": package_versions() | {"lmms_eval": version("lmms_eval")},
    }
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    begin_run(folder, settings)
    labels = [UNPRUNED, *map(label, budgets)]
    for task in tasks:
        for budget in (None, *budgets):
            found = _read(folder, label(budget))
            if task in found:
                continue
            echo(f"lmms-eval: {task}, {label(budget)} ...")
            command = _command(config.model_type, model, budget, task, batch_size, limit, model_args, device)
            command += [] if include_path is None else ["--include_path", str(include_path)]
            found[task] = _run(command, folder / label(budget), task, num_processes)
            _file(folder, label(budget)).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    results = {label: _read(folder, label) for label in labels}
    report = _build_report(model, tasks, results, settings)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in _format_report(report):
        echo(line)
    echo(f"Written to {folder}/report.json; what lmms-eval wrote is in a folder for each budget.")
    return report


def _command(model_type, model, budget: Budget, task, batch_size, limit, model_args, device) -> list[str]:
    arguments = [f"pretrained={model}", *(f"{name}={value}" for name, value in options_of(budget).items())]
    arguments += [] if model_args is None else [model_args]
    command = ["-m", "lmms_eval", "--model", model_type, "--model_args", ",".join(arguments)]
    command += ["--tasks", task, "--batch_size", str(batch_size), "--log_samples"]
    command += [] if limit is None else ["--limit", str(limit)]
    return command + ([] if device is None else ["--device", device])


def _run(command: list[str], folder: Path, task: str, num_processes: int) -> dict[str, Any]:
    """
    What a run of lmms-eval finds: `metrics` of the task, and `tokens` of a prompt that the language model read.

    Raises:
        `RuntimeError`: if it wrote no results, whatever its exit code is.
    """
    launch = [sys.executable]
    if num_processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes)]
    earlier = set(folder.rglob("*_results.json"))
    done = subprocess.run([*launch, *command, "--output_path", str(folder)], stdin=subprocess.DEVNULL)
    written = sorted(set(folder.rglob("*_results.json")) - earlier)
    if not written:
        raise RuntimeError(f"lmms-eval ended with exit code {done.returncode} and wrote no results; see above.")
    result = json.loads(written[-1].read_text(encoding="utf-8"))
    return {"metrics": _metrics(result, task), "tokens": result.get("throughput", {}).get("avg_prompt_tokens_read")}


def _metrics(result: dict[str, Any], task: str) -> dict[str, float]:
    """The numbers of a task; of a group without its own, the means of its tasks."""
    found = {
        name.partition(",")[0]: float(value)
        for name, value in result["results"].get(task, {}).items()
        if isinstance(value, (int, float)) and "," in name and "_stderr" not in name
    }
    if found:
        return found
    parts = [_metrics(result, part) for part in result.get("group_subtasks", {}).get(task, [])]
    names = set.intersection(*map(set, parts)) if parts else set()
    if not names:
        raise RuntimeError(f"lmms-eval has computed no metric of {task}: it may write answers for a server alone.")
    return {name: statistics.mean(part[name] for part in parts) for name in sorted(names)}


def _file(folder: Path, label: str) -> Path:
    return folder / f"results-{label}.json"


def _read(folder: Path, label: str) -> dict[str, Any]:
    file = _file(folder, label)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# ---------------------------------------------------------------------- report


def _base_model(model: str) -> str | None:
    """The Hub id that the checkpoint was made from, as its card says."""
    try:
        card = ModelCard.load(Path(model) / "README.md" if os.path.isdir(model) else model)
    except (OSError, ValueError, EntryNotFoundError):
        return None
    base = card.data.base_model
    return base[0] if isinstance(base, list) and base else base


def _build_report(model: str, tasks: Sequence[str], results: dict[str, Any], settings: dict[str, Any]):
    paper = paper_results()
    base = _base_model(model)
    table = next((table for table in paper["tables"] if base in table["base_models"]), None)
    rows = []
    for task in tasks:
        known = [(name, facts) for name, facts in paper["benchmarks"].items() if facts and facts["task"] == task]
        name, facts = known[0] if known else (None, None)
        if facts is None:
            metrics = {metric: ([metric], 1.0) for metric in results[UNPRUNED][task]["metrics"]}
        else:
            metrics = {" + ".join(facts["metrics"]): (facts["metrics"], facts["scale"])}
        for metric, (parts, scale) in metrics.items():
            values = {
                label: scale * sum(found[task]["metrics"][part] for part in parts) for label, found in results.items()
            }
            published = {}
            if table is not None and name in table["benchmarks"]:
                column = table["benchmarks"].index(name)
                published = {label: table["rows"][label][column] for label in results if label in table["rows"]}
            rows.append({"task": task, "metric": metric, "values": values, "paper": published})
        tokens = {label: found[task]["tokens"] for label, found in results.items()}
        rows.append({"task": task, "metric": "tokens read", "values": tokens, "paper": {}})
    return {
        "settings": settings,
        "base_model": base,
        "paper_model": None if table is None else table["model"],
        "paper_setting": None if table is None else table["setting"],
        "citation": paper["citation"],
        "budgets": list(results),
        "rows": rows,
    }


def _format_report(report: dict[str, Any]) -> Iterator[str]:
    labels = report["budgets"]
    left = max(len(f"{row['task']} ({row['metric']})") for row in report["rows"]) + 2
    yield ""
    yield f"{'':{left}}" + "".join(f"{budget:>18}" for budget in labels)
    for row in report["rows"]:
        cells = []
        for budget in labels:
            paper = row["paper"].get(budget)
            value = row["values"][budget]
            cells.append("-" if value is None else f"{value:,.4g}" + ("" if paper is None else f" [{paper:,.4g}]"))
        yield f"{row['task'] + ' (' + row['metric'] + ')':{left}}" + "".join(f"{cell:>18}" for cell in cells)
    yield ""
    notes = []
    if any(row["paper"] for row in report["rows"]):
        notes.append(
            f"In brackets: what the paper reports for {report['paper_model']} ({report['paper_setting']}; "
            f"{report['citation']}). It was measured with other code: docs/evaluation.md has what differs."
        )
    elif report["paper_model"] is None:
        base = report["base_model"] or "a model whose card names no `base_model`"
        notes.append(f"The paper has no table of {base}.")
    if report["settings"]["limit"] is not None:
        notes.append(f"Only {report['settings']['limit']} questions of each task: no result to report.")
    versions = ", ".join(f"{package} {number}" for package, number in report["settings"]["versions"].items())
    notes.append(f"{report['settings']['machine']}; {versions}.")
    for note in notes:
        yield from textwrap.wrap(note, _WIDTH)
