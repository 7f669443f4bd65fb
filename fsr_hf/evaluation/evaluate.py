"""`fsr-hf eval --data`: the score of a model on questions of one's own, unpruned and at several budgets."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor

from ..explain import check_fsr_model
from ..machine import default_device, machine_name, package_versions
from ..processing.video_files import read_video
from .answering import Budget, Records, answer, build_inputs, find_items, label
from .questions import Question, load_questions
from .report import build_report, format_report, plot_report, questions_of
from .scoring import METRICS


__all__ = ["begin_run", "check_budgets", "digest_model", "run_eval"]

_DTYPES = ("float32", "bfloat16", "float16")
_NARROW = 50  # times as long as wide; Qwen's processors refuse 200
_SMALL = 1 << 20  # bytes; larger files are known by their size and time


def run_eval(
    model: str,
    data: str | os.PathLike,
    *,
    budgets: Sequence[int | float],
    metric: str = "exact",
    keep: float = 0.98,
    instruction: str | None = None,
    split: str | None = None,
    num_frames: int = 16,
    max_new_tokens: int = 32,
    batch_size: int = 1,
    output: str | os.PathLike = "fsr-eval",
    device: str | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool | None = None,
    progress: bool = True,
    echo: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """
    Ask an FSR checkpoint questions, unpruned and at several budgets, and compare the scores. A run that was
    interrupted goes on when it is called again; under `accelerate launch` the processes share the questions.

    Args:
        model (`str`):
            A folder or a Hub id.
        data (`str` or `os.PathLike`), split (`str`, *optional*):
            As in [`load_questions`].
        budgets (`Sequence[int | float]`):
            Numbers of visual tokens to keep of each image or video, or shares of them.
        metric (`str`, *optional*, defaults to `"exact"`):
            A key of `METRICS`.
        keep (`float`, *optional*, defaults to 0.98):
            The share of the unpruned score that a budget has to keep, in (0, 1].
        instruction (`str`, *optional*):
            Follows each question on a line of its own.
        num_frames (`int`, *optional*, defaults to 16):
            Frames taken of a video, evenly.
        max_new_tokens (`int`, *optional*, defaults to 32):
            The most that an answer has.
        batch_size (`int`, *optional*, defaults to 1):
            Questions at a time.
        output (`str` or `os.PathLike`, *optional*, defaults to `"fsr-eval"`):
            Folder for what is found.
        device (`str`, *optional*):
            By default a GPU if there is one; under `accelerate launch` each process has its own.
        dtype (`str`, *optional*):
            Such as `"bfloat16"`. By default that of the checkpoint.
        attn_implementation (`str`, *optional*):
            As in `from_pretrained`.
        trust_remote_code (`bool`, *optional*):
            Whether code in the checkpoint may be run.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show bars, on stderr.
        echo (`Callable[[str], None]`, *optional*, defaults to `print`):
            Takes what there is to read, line by line.

    Returns:
        `dict[str, Any]`: the report, as report.json has it; `None` in all processes but the first.

    Raises:
        `ImportError`: if nothing decodes a video.
        `OSError`: if there is no such checkpoint or file.
        `ValueError`: for arguments that do not fit each other, bad questions, or a folder with another run.
        `RuntimeError`: for a device that is not there.
    """
    _check_arguments(budgets, metric, keep, dtype)
    # Under `accelerate launch` this also joins the processes; they do all checks alike.
    state = PartialState(cpu=device == "cpu")
    target = state.device if state.num_processes > 1 else torch.device(device or default_device())
    torch.empty(0, device=target)  # fails, and says why, if there is none
    questions = load_questions(data, split)
    check_fsr_model(model, trust_remote_code)
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
    _check_texts(processor, questions, instruction)
    _check_sizes(processor, questions)
    _check_videos(processor, questions, type(config).__name__)
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    check_budgets(config, processor, questions, budgets, num_frames, trust_remote_code)

    settings = {
        "model": model,
        "model files": digest_model(model, config),
        "questions": _digest_questions(questions),
        "instruction": instruction,
        "num_frames": num_frames,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "dtype": dtype or str(config.dtype).removeprefix("torch."),
        "attn_implementation": attn_implementation,
        "machine": machine_name(),
        "device": target.type,
        "versions": package_versions(),
    }
    folder = Path(output)
    records = Records(folder, state.process_index)
    lock = FileLock(folder / ".lock", timeout=0)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"--output {folder}: another run is writing there. Choose another folder.") from error
    try:
        if state.is_main_process:
            begin_run(folder, settings)
            records.drop_interrupted()
        state.wait_for_everyone()
        methods: list[Budget] = [None, *budgets]
        found = records.read()
        state.wait_for_everyone()  # nobody writes before all have read, so that all share the same batches
        pending = {
            number: [budget for budget in methods if (number, label(budget)) not in found]
            for number in range(len(batches))
        }
        pending = {number: missing for number, missing in pending.items() if missing}
        if found and pending and state.is_main_process:
            echo(f"Going on in {folder}: {len(batches) - len(pending)} of {len(batches)} batches are done.")
        mine = dict(list(pending.items())[state.process_index :: state.num_processes])
        if mine:
            loading: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
            if attn_implementation is not None:
                loading["attn_implementation"] = attn_implementation
            loaded = AutoModel.from_pretrained(model, **loading).to(target).eval()
            bar = tqdm(
                total=sum(map(len, mine.values())),
                desc="answering",
                unit="batch",
                disable=not (progress and state.is_main_process),
            )
            with bar:
                _answer_all(loaded, processor, batches, mine, records, instruction, num_frames, max_new_tokens, bar)
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
        answers = questions_of(questions, batches, records.read(), [label(budget) for budget in methods], metric)
        report = build_report(answers, settings, metric, keep, batch_size)
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        with open(folder / "answers.jsonl", "w", encoding="utf-8") as file:
            for entry in answers["questions"]:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        for line in format_report(report):
            echo(line)
        written = ["report.json", "answers.jsonl"]
        try:
            plot_report(report, folder / "report.png")
            written.append("report.png")
        except ImportError:
            echo("No plot: `pip install matplotlib`, and call this again.")
        echo(f"Written to {folder}: {', '.join(written)}.")
        return report
    finally:
        lock.release()


@torch.no_grad()
def _answer_all(model, processor, batches, pending, records, instruction, num_frames, max_new_tokens, bar) -> None:
    """Answer the batches that are pending, each at the budgets that it lacks."""
    is_first = True
    for number, budgets in pending.items():
        try:
            inputs = build_inputs(processor, batches[number], instruction, num_frames)
        except (OSError, RuntimeError, ValueError) as error:
            places = batches[number][0].place if len(batches[number]) == 1 else f"from {batches[number][0].place} on"
            raise ValueError(f"{places}: {error}") from error
        inputs = inputs.to(model.device, model.dtype)
        if is_first:  # the first calls of a process are slow
            for budget in budgets:
                answer(model, processor, inputs, budget, 2)
            is_first = False
        for turn in range(len(budgets)):
            budget = budgets[(turn + number) % len(budgets)]  # nobody always comes after the same one
            record = answer(model, processor, inputs, budget, max_new_tokens)
            records.add({"batch": number, "budget": label(budget), **record})
            bar.update()


# ---------------------------------------------------------------------- checks


def _check_arguments(budgets: Sequence[int | float], metric: str, keep: float, dtype: str | None) -> None:
    if len(set(map(label, budgets))) < len(budgets):
        raise ValueError(f"--budgets {','.join(map(label, budgets))} has one of them twice.")
    if metric not in METRICS:
        raise ValueError(f"--metric {metric} is not known: choose one of {', '.join(METRICS)}.")
    if not 0 < keep <= 1:
        raise ValueError(f"--keep {keep} is out of range: give a share of the unpruned score, in (0, 1].")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"--dtype {dtype} is not supported: choose one of {', '.join(_DTYPES)}.")


def _check_texts(processor: Any, questions: Sequence[Question], instruction: str | None) -> None:
    """
    Raises:
        `ValueError`: for texts with the placeholder of an image or a video, which stands for one more of them.
    """
    tokens = [getattr(processor, name, None) for name in ("image_token", "video_token")]
    texts = [("--instruction", instruction or "")] + [(question.place, question.text) for question in questions]
    for place, text in texts:
        for token in filter(None, tokens):
            if token in text:
                raise ValueError(
                    f"{place}: {text!r} has {token!r}, which the prompt gets for each image or video: leave it out."
                )


def _check_sizes(processor: Any, questions: Sequence[Question]) -> None:
    """
    Raises:
        `ValueError`: for an image that is too narrow for the processor.
    """
    for question in questions:
        if any(max(size) > _NARROW * min(size) for size in question.sizes):
            try:
                build_inputs(processor, [question], None, 1)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{question.place}: {error}") from error


def _check_videos(processor: Any, questions: Sequence[Question], name: str) -> None:
    """
    Raises:
        `ImportError`, `ValueError`: for videos that the model does not take, or that cannot be decoded.
    """
    checked = set()
    for question in questions:
        if question.video is None or question.video in checked:
            continue
        checked.add(question.video)
        if getattr(processor, "video_processor", None) is None:
            raise ValueError(f"{question.place}: `video` is given, but {name} is of a model that takes images alone.")
        try:
            read_video(processor.video_processor, str(question.video), lambda metadata, **_: [0])
        except ImportError:
            raise
        except Exception as error:  # whatever a decoder raises
            raise ValueError(f"{question.place}: {question.video} is no video that can be read ({error}).") from error


def check_budgets(config, processor, questions, budgets, num_frames: int, trust_remote_code) -> None:
    """
    Raises:
        `ValueError`: for a budget that is larger than any image or video, so that it would never prune.
    """
    numbers = [budget for budget in budgets if isinstance(budget, int)]
    if not numbers:
        return
    with torch.device("meta"):  # the layout of a prompt needs no weights
        model = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    most = 0
    for question in questions:  # as a rule the first one will do
        items = find_items(model, build_inputs(processor, [question], None, num_frames))
        most = max(most, *(item.num_candidates for item in items))
        if most >= max(numbers):
            return
    raise ValueError(
        f"--budgets {max(numbers)} is above the number of visual tokens: no image or video has "
        f"more than {most}. Choose budgets of {most} or less, or shares such as 0.25."
    )


# ---------------------------------------------------------------------- what a run is


def begin_run(folder: Path, settings: dict[str, Any]) -> None:
    """
    Write down the settings of the run, or see that they are those of the run that goes on.

    Raises:
        `ValueError`: if the folder has another run.
    """
    file = folder / "run.json"
    if not file.exists():
        file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: delete the folder {folder}, or choose another --output.") from error
    different = [name for name in settings if earlier.get(name) != settings[name]]
    if different:
        name = different[0]
        raise ValueError(
            f"--output {folder} has answers of another run, with other {', '.join(different)} ({name}: "
            f"{earlier.get(name)!r} there, {settings[name]!r} now). Choose another folder, or delete it."
        )


def digest_model(model: str, config: Any) -> str:
    """Tells whether a checkpoint is still the same: its commit on the Hub, or its files."""
    if not os.path.isdir(model):
        return str(getattr(config, "_commit_hash", None))
    digest = hashlib.sha256()
    folder = Path(model)
    for file in sorted([*folder.iterdir(), *folder.glob("query_tokenizer/*")]):
        if file.is_file():
            digest.update(str(file.relative_to(folder)).encode() + b"\0" + hashlib.sha256(_content(file)).digest())
    return digest.hexdigest()


def _content(file: Path) -> bytes:
    """What tells whether a file is still the same: all of a small one, else size and time."""
    status = file.stat()
    return file.read_bytes() if status.st_size <= _SMALL else f"{status.st_size} {status.st_mtime_ns}".encode()


def _digest_questions(questions: Sequence[Question]) -> str:
    """Tells whether the questions are still the same; answers may change, which asks for new scores alone."""
    digest = hashlib.sha256()
    for question in questions:
        files = [Path(name) for name in question.visual.split("\n") if os.path.isfile(name)]
        contents = [hashlib.sha256(_content(file)).hexdigest() for file in files]
        digest.update(json.dumps([question.text, question.visual, contents]).encode())
    return digest.hexdigest()
