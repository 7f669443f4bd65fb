"""
What pruning costs and what it saves: FLOPs, times, KV cache and memory of a prompt, unpruned, under FSR, and under
selectors that FSR is compared with. `fsr-hf bench` runs it on a checkpoint.
"""

import functools
import json
import math
import os
import re
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor
from transformers.video_utils import VideoMetadata

from .configuration.configuration_fsr import FSRConfig
from .explain import check_fsr_model, load_visual
from .machine import default_device, provenance
from .modeling import clip_tower, fsr, modeling_fsr_llava_video
from .modeling.fsr import VisualSelection
from .modeling.guards import get_cache
from .processing.processing_fsr_llava_video import sample_frames
from .processing.video_files import read_video
from .testing.small_llava import export_small_llava


__all__ = [
    "Method",
    "StageClock",
    "as_selection",
    "format_result",
    "measure",
    "parse_budgets",
    "parse_size",
    "parts",
    "quartiles",
    "random_selection",
    "run_bench",
    "speed_up",
    "synchronize",
]

Selector = Callable[..., VisualSelection]

# Stages of a pruned prefill, in the order of a table. An unpruned prefill has all but OWN_STAGES: `features` is what
# get_image_features does around the tower and the projector, and `rest` what forward does around all the others.
OWN_STAGES = ("saliency", "text tower", "relevance", "Focus", "Scan", "Refine", "compaction")
STAGES = ("vision tower", "projector", "features", *OWN_STAGES, "language model", "rest")


@dataclass(frozen=True)
class Method:
    """
    One way to run a prompt.

    Args:
        name (`str`):
            As tables have it.
        budget (`int` or `float`, *optional*):
            Visual tokens to keep of each image or video, or their share. `None` runs the model unpruned.
        selector (`Callable`, *optional*):
            Takes the place of [`select_visual_tokens`], with its arguments and its result. By default FSR.
        scores (`tuple[str, ...]`, *optional*, defaults to `("saliency", "relevance")`):
            What the selector reads. What it does not is not computed.
    """

    name: str
    budget: int | float | None = None
    selector: Selector | None = None
    scores: tuple[str, ...] = ("saliency", "relevance")

    @property
    def options(self) -> dict[str, Any]:
        """`dict[str, Any]`: arguments of `forward`."""
        if self.budget is None:
            return {"fsr_enabled": False}
        return {"num_visual_tokens" if isinstance(self.budget, int) else "retention_ratio": self.budget}

    def kept(self, candidates: int) -> int:
        """How many of the visual tokens of an image or video it keeps."""
        return candidates if self.budget is None else FSRConfig(**self.options).budget(candidates)


def parse_budgets(text: str) -> list[int | float]:
    """
    The budgets in a text such as `"64,128,0.25"`: whole numbers are tokens, decimals are shares.

    Raises:
        `ValueError`: for anything else, or a number out of range.
    """
    budgets: list[int | float] = []
    for part in text.split(","):
        try:
            budget: int | float = float(part) if "." in part else int(part)
        except ValueError:
            budget = 0
        if budget <= 0 or (isinstance(budget, float) and budget > 1):
            raise ValueError(
                f"--budgets {text}: {part.strip() or 'an empty entry'!r} is no budget. Separate numbers of visual "
                "tokens (64) or shares of them between 0 and 1 (0.25) by commas."
            )
        budgets.append(budget)
    return budgets


def parse_size(text: str) -> tuple[int, int]:
    """
    Width and height in a text such as `"672x336"`.

    Raises:
        `ValueError`: for anything else.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"--image-size {text}: give width and height in pixels, such as 672x336.")
    return int(match[1]), int(match[2])


def random_selection(
    features: torch.Tensor,
    saliency: torch.Tensor,
    relevance: torch.Tensor | None,
    num_visual_tokens: int | torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    max_num_visual_tokens: int | None = None,
    **_: Any,
) -> VisualSelection:
    """
    Random tokens, with the arguments and the result of [`select_visual_tokens`]: the least that any pruning costs.
    """
    batch, num_tokens, _ = features.shape
    draw = torch.rand(batch, num_tokens, device=features.device)
    if mask is not None:
        draw = draw.masked_fill(~mask, -1.0)
    if isinstance(num_visual_tokens, torch.Tensor):
        width = num_tokens if max_num_visual_tokens is None else min(max_num_visual_tokens, num_tokens)
        is_kept = torch.arange(width, device=features.device) < num_visual_tokens[:, None]
        kept = draw.topk(width).indices.masked_fill(~is_kept, num_tokens).sort().values
    else:
        kept = draw.topk(min(num_visual_tokens, num_tokens)).indices.sort().values
    return as_selection(features, kept)


def as_selection(features: torch.Tensor, kept: torch.Tensor) -> VisualSelection:
    """The [`VisualSelection`] of tokens `kept` `(batch, k)`, ascending, `num_tokens` for none, without a merge."""
    num_tokens = features.shape[1]
    places = kept.clamp(max=num_tokens - 1)[..., None].expand(-1, -1, features.shape[-1])
    return VisualSelection(
        indices=kept.masked_fill(kept == num_tokens, -1),
        is_focus=torch.zeros_like(kept, dtype=torch.bool),
        features=features.gather(1, places),
        priority=features.new_zeros(features.shape[:2], dtype=torch.float32),
        merged_into=torch.full(features.shape[:2], -1, device=features.device),
    )


# ---------------------------------------------------------------------- stages


class StageClock:
    """
    Times of the stages of a forward. While the clock runs, the functions of each stage are wrapped; the package itself
    holds nothing for it. On CUDA a time is what passes between two events on the stream of the call.

    Args:
        device (`torch.device`):
            Where the model is.
    """

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._spans: list[_Span] = []
        self._open: list[_Span] = []

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wrap(self, name: str, function: Callable) -> Callable:
        """`function`, each of whose calls counts as a part of the stage `name`."""

        @functools.wraps(function, updated=())
        def timed(*args, **kwargs):
            span = _Span(name, self._open[-1] if self._open else None, self._now())
            self._spans.append(span)
            self._open.append(span)
            try:
                return function(*args, **kwargs)
            finally:
                self._open.pop()
                span.end = self._now()

        return timed

    @contextmanager
    def running(self, model) -> Iterator[None]:
        """All stages of `model` are timed in this context, from zero."""
        self._spans = []
        with _replaced([(owner, name, self.wrap(stage, getattr(owner, name))) for stage, owner, name in parts(model)]):
            yield

    def times(self) -> dict[str, float]:
        """Seconds of each stage, less those of the stages within it. The device must be idle."""
        times: dict[str, float] = {}
        for span in self._spans:
            seconds = span.start.elapsed_time(span.end) / 1e3 if self._is_cuda else span.end - span.start
            times[span.name] = times.get(span.name, 0.0) + seconds
            if span.parent is not None:
                times[span.parent.name] = times.get(span.parent.name, 0.0) - seconds
        return times


@dataclass(eq=False)
class _Span:
    name: str
    parent: "_Span | None"
    start: Any
    end: Any = None


def parts(model) -> list[tuple[str, Any, str]]:
    """What each stage of `model` runs: stage, owner, name of a function."""
    inner = model.model
    if _family(model).startswith("qwen"):
        tower, projector = inner.visual, inner.visual.merger
    else:
        tower, projector = inner.vision_tower, inner.multi_modal_projector
    found = [
        ("vision tower", tower, "forward"),
        ("projector", projector, "forward"),
        ("features", inner, "get_image_features"),
        ("saliency", *_saliency_function(model)),
        ("Focus", fsr, "_priority"),
        ("Focus", fsr, "_focus"),
        ("Scan", fsr, "_spread_evenly"),
        ("Scan", fsr, "_scan"),
        ("Refine", fsr, "_refine"),
        ("compaction", inner, "compress"),
        ("language model", inner.language_model, "forward"),
        ("language model", model.lm_head, "forward"),
        ("rest", model, "forward"),
    ]
    if _family(model) == "llava_video":
        found += [("features", inner, "get_video_features"), ("projector", inner, "_pool")]
    elif _family(model).startswith("qwen"):
        found += [("features", inner, "get_video_features")]
    elif inner.text_encoder is not None:
        found += [("text tower", inner.text_encoder, "encode_query"), ("relevance", inner.text_encoder, "forward")]
        found += [("relevance", clip_tower, name) for name in ("patch_values", "mean_of_neighbours")]
    return found


def _family(model) -> str:
    return model.config.model_type.removeprefix("fsr_")


def _saliency_function(model) -> tuple[Any, str]:
    if _family(model) in ("llava", "llava_next"):
        return clip_tower, "cls_attention"
    return (
        (modeling_fsr_llava_video, "patch_attention") if _family(model) == "llava_video" else (model.model, "saliency")
    )


@contextmanager
def _replaced(replacements: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Other values for attributes of objects in this context."""
    undo = []
    try:
        for owner, name, value in replacements:
            undo.append((owner, name, name in vars(owner), getattr(owner, name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, is_own, value in reversed(undo):
            if is_own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


def _replacements(model, method: Method) -> list[tuple[Any, str, Any]]:
    """What to set in the model to run a method other than FSR, and without scores that it does not read."""
    replacements: list[tuple[Any, str, Any]] = []
    if method.selector is not None:
        replacements.append((model.model, "selector", method.selector))
    if "saliency" not in method.scores:
        replacements.append((*_saliency_function(model), functools.partial(_no_saliency, model)))
    if "relevance" not in method.scores:
        replacements.append((model.config.fsr_config, "relevance", "none"))
    return replacements


def _no_saliency(model, block_or_states, states_or_grid) -> torch.Tensor:
    """Zeros in the shape of the family's saliency."""
    if _family(model).startswith("qwen"):
        area = model.config.vision_config.spatial_merge_size**2
        return torch.zeros(len(block_or_states) // area, device=block_or_states.device)
    views, tokens, _ = states_or_grid.shape
    tokens -= _family(model) != "llava_video"  # [CLS]
    return torch.zeros(views, tokens, device=states_or_grid.device)


# ---------------------------------------------------------------------- measurement


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def quartiles(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the values themselves."""
    values = list(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "low": low, "high": high, "runs": values}


@torch.no_grad()
def measure(
    model,
    inputs: Mapping[str, Any],
    methods: Sequence[Method],
    *,
    stages: bool = True,
    repeats: int = 5,
    seconds: float | None = None,
    warmup: int = 1,
    new_tokens: int = 4,
    progress: bool = True,
    name: str = "",
) -> dict[str, Any]:
    """
    Run a prompt by every method in turn, again and again, so that whatever else the machine does meets all alike.

    Args:
        model:
            One of this package, in eval mode.
        inputs (`Mapping[str, Any]`):
            What its processor returns, on its device; rows of one length.
        methods (`Sequence[Method]`):
            The first one is what the others are compared with.
        stages (`bool`, *optional*, defaults to `True`):
            Whether to time the stages of FSR, at its smallest budget, in further runs.
        repeats (`int`, *optional*, defaults to 5):
            Rounds over all methods.
        seconds (`float`, *optional*):
            After so long no further round begins, though there are three (or `repeats`, if that is less).
        warmup (`int`, *optional*, defaults to 1):
            Rounds that do not count. FLOPs are counted in the first, and there is one in any case.
        new_tokens (`int`, *optional*, defaults to 4):
            Decoding steps that are timed after each prefill.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a bar, on stderr.
        name (`str`, *optional*):
            What the bar and the result call the model; by default its class.

    Returns:
        `dict[str, Any]`: numbers and strings, which JSON can hold. Times are in seconds.

    Raises:
        `ValueError`: if a budget would prune nothing.
    """
    device = model.device
    prompt = _describe_prompt(model, inputs)
    for method in methods:
        if method.budget is not None and method.kept(prompt["candidates"]) == prompt["candidates"]:
            raise ValueError(
                f"A budget of {method.budget} would prune nothing: the prompt has {prompt['candidates']} visual "
                "tokens for each image or video. Choose a smaller one."
            )
    ours = [method for method in methods if method.budget is not None and method.selector is None]
    stages_of = None
    if stages and ours:
        stages_of = min(ours, key=lambda method: method.kept(prompt["candidates"]))
    runs: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(methods))}
    stage_runs: list[dict[str, float]] = []
    clock = StageClock(device)
    rounds = 0
    with tqdm(total=(max(warmup, 1) + repeats) * len(methods), desc=name, disable=not progress) as bar:
        counted = []
        for number in range(max(warmup, 1)):
            for method in methods:
                if number == 0:
                    counted.append(_count(model, inputs, method, prompt))
                else:
                    _run(model, inputs, method, new_tokens)
                bar.update()
        if stages_of is not None:
            with clock.running(model):
                _run(model, inputs, stages_of, 0)
        started = time.perf_counter()
        while rounds < repeats:
            if seconds is not None and rounds >= 3 and time.perf_counter() - started > seconds:
                break
            for turn in range(len(methods)):
                number = (turn + rounds) % len(methods)  # nobody always comes after the same one
                runs[number].append(_run(model, inputs, methods[number], new_tokens))
                bar.update()
            if stages_of is not None:
                with clock.running(model):
                    _run(model, inputs, stages_of, 0)
                stage_runs.append(clock.times())
            rounds += 1
        bar.total = bar.n

    return {
        "model": name or type(model).__name__,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "attention": model.config.get_text_config()._attn_implementation,
        "prompt": prompt,
        "repeats": rounds,
        "methods": [
            {
                "method": method.name,
                "budget": method.budget,
                **counted[number],
                "prefill": quartiles([run["prefill"] for run in runs[number]]),
                "decode": quartiles([run["decode"] for run in runs[number]]) if new_tokens else None,
                "peak_bytes": max(run["peak_bytes"] for run in runs[number]) if device.type == "cuda" else None,
            }
            for number, method in enumerate(methods)
        ],
        "stages": None
        if stages_of is None
        else _summarize_stages(counted[methods.index(stages_of)], stages_of, stage_runs),
        **provenance(),
    }


def _describe_prompt(model, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Rows, columns and visual tokens of a prompt with one image or video a row."""
    input_ids = inputs["input_ids"].cpu()
    visual = model.model.pop_visual(dict(inputs))
    items = model.model.place_items(input_ids, model.model.build_items(**visual))
    batch, length = input_ids.shape
    return {
        "batch": batch,
        "length": length,
        "items": len(items),
        "placeholders": items[0].length,
        "candidates": items[0].num_candidates,
        "text": length - sum(item.length for item in items if item.row == 0),
    }


# torch 2.14 does not count the FLOPs of its attention kernel for the CPU.
_NOT_COUNTED_BY_TORCH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    )
}


def _count(model, inputs: Mapping[str, Any], method: Method, prompt: dict[str, int]) -> dict[str, Any]:
    """What does not change from run to run: FLOPs, lengths, sizes, and how many Focus tokens there are."""
    selections = []

    def remember(select: Selector, *args, **kwargs) -> VisualSelection:
        selections.append(select(*args, **kwargs))
        return selections[-1]

    counter = FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED_BY_TORCH)
    with _replaced(_replacements(model, method)):
        remembering = functools.partial(remember, model.model.selector)
        with _replaced([(model.model, "selector", remembering)]), counter:
            cache = get_cache(model(**inputs, **method.options, use_cache=True, logits_to_keep=1))
    length = cache.get_seq_length()
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    visual_tokens = length - prompt["text"]
    focus = None
    if selections and method.selector is None:
        focus = sum(int(selection.is_focus.sum()) for selection in selections) / prompt["batch"]
    return {
        "visual_tokens": visual_tokens,
        "length": length,
        "flops": counter.get_total_flops(),
        "macs": counter.get_total_flops() // 2,
        "kv_bytes": cache_bytes,
        "visual_kv_bytes": cache_bytes // length * visual_tokens,
        "focus_tokens": focus,
    }


def _run(model, inputs: Mapping[str, Any], method: Method, new_tokens: int) -> dict[str, Any]:
    """One prefill, from the call to the first new token, and the median of the decoding steps after it."""
    device = model.device
    replacements = _replacements(model, method)
    with _replaced(replacements) if replacements else nullcontext():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        start = time.perf_counter()
        outputs = model(**inputs, **method.options, use_cache=True, logits_to_keep=1)
        token = outputs.logits[:, -1:].argmax(-1)
        synchronize(device)
        prefill = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    cache, steps = get_cache(outputs), []
    del outputs
    for _ in range(new_tokens):
        start = time.perf_counter()
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        synchronize(device)
        steps.append(time.perf_counter() - start)
    return {"prefill": prefill, "decode": statistics.median(steps) if steps else None, "peak_bytes": peak}


def _summarize_stages(counted: dict[str, Any], method: Method, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Times of the stages, and of all that only a pruned prefill does."""
    own = [sum(run.get(stage, 0.0) for stage in OWN_STAGES) for run in runs]
    stages = {stage: [run[stage] for run in runs] for stage in STAGES if all(stage in run for run in runs)}
    return {
        "budget": method.budget,
        "visual_tokens": counted["visual_tokens"],
        "focus_tokens": counted["focus_tokens"],
        "stages": {stage: quartiles(times) for stage, times in stages.items()},
        "own": quartiles(own),
    }


# ---------------------------------------------------------------------- tables


def speed_up(reference: dict[str, Any], other: dict[str, Any], field: str = "prefill") -> dict[str, Any]:
    """How many times as fast as `reference` a method is: round by round, so that both ran at the same time."""
    pairs = zip(reference[field]["runs"], other[field]["runs"])
    return quartiles([slow / fast for slow, fast in pairs])


def format_result(result: dict[str, Any]) -> list[str]:
    """The tables of a result of [`measure`], line by line."""
    prompt, methods = result["prompt"], result["methods"]
    reference = methods[0]
    unit, divisor = ("TFLOPs", 1e12) if reference["flops"] >= 1e12 else ("GFLOPs", 1e9)
    newlines = prompt["placeholders"] - prompt["candidates"]
    lines = [
        f"{result['model']}: {result['parameters'] / 1e6:,.0f} M weights in {result['dtype']}, {result['attention']} "
        f"attention, on {result['device']}",
        f"Batch of {prompt['batch']}; in each row {prompt['placeholders']:,} visual tokens"
        + (f" ({newlines} of them newlines)" if newlines else "")
        + f" and {prompt['text']} others.",
        "",
    ]
    heads = ["method", "tokens", unit, "prefill ms", "quartiles", "speed-up", "of FLOPs", "decode ms", "speed-up"]
    heads += ["KV MB", "visual KV"]
    widths = [10, 7, 9, 11, 17, 9, 9, 10, 9, 9, 10]
    if reference["peak_bytes"] is not None:
        heads, widths = [*heads, "peak GB"], [*widths, 8]
    lines.append(_row(heads, widths))
    for method in methods:
        prefill, decode = method["prefill"], method["decode"]
        faster = speed_up(reference, method)["median"]
        row = [
            method["method"],
            f"{method['visual_tokens']:,}",
            f"{method['flops'] / divisor:,.3f}",
            f"{prefill['median'] * 1e3:,.1f}",
            f"{prefill['low'] * 1e3:,.1f}-{prefill['high'] * 1e3:,.1f}",
            f"{faster:.2f}x",
            f"{faster * method['flops'] / reference['flops']:.0%}",
            "-" if decode is None else f"{decode['median'] * 1e3:,.1f}",
            "-" if decode is None else f"{speed_up(reference, method, 'decode')['median']:.2f}x",
            f"{method['kv_bytes'] / 1e6:,.1f}",
            f"{method['visual_kv_bytes'] / 1e6:,.1f}",
        ]
        if method["peak_bytes"] is not None:
            row.append(f"{method['peak_bytes'] / 1e9:,.2f}")
        lines.append(_row(row, widths))
    if (stages := result["stages"]) is not None:
        unpruned = reference["prefill"]["median"]
        widths = [22, 10, 18, 14]
        head = f"FSR at {stages['visual_tokens']:,} tokens"
        lines += ["", _row([head, "ms", "quartiles", "of unpruned"], widths)]
        for name, times in [*stages["stages"].items(), ("FSR's own", stages["own"])]:
            spread = f"{times['low'] * 1e3:,.2f}-{times['high'] * 1e3:,.2f}"
            row = [name, f"{times['median'] * 1e3:,.2f}", spread, f"{times['median'] / unpruned:.2%}"]
            lines.append(_row(row, widths))
        lines.append(f"{stages['focus_tokens']:,.0f} of the {stages['visual_tokens']:,} are Focus tokens.")
    return lines


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The first cell to the left, the others to the right."""
    return f"{cells[0]:<{widths[0]}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:]))


# ---------------------------------------------------------------------- the command


def run_bench(
    model: str | None = None,
    *,
    budgets: Sequence[int | float] = (0.5, 0.2, 0.1),
    batch_sizes: Sequence[int] = (1,),
    image: str | os.PathLike | None = None,
    question: str = "What is in it?",
    image_size: tuple[int, int] = (672, 672),
    num_frames: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    repeats: int = 5,
    new_tokens: int = 8,
    json_file: str | os.PathLike | None = None,
    progress: bool = True,
    echo: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """
    Measure an FSR checkpoint: unpruned, pruned by FSR, and pruned at random.

    Args:
        model (`str`, *optional*):
            A folder or a Hub id. By default a small LLaVA of random weights is built.
        budgets (`Sequence[int | float]`, *optional*, defaults to `(0.5, 0.2, 0.1)`):
            Numbers of visual tokens to keep, or shares of them.
        batch_sizes (`Sequence[int]`, *optional*, defaults to `(1,)`):
            Rows of the prompt, all alike.
        image (`str` or `os.PathLike`, *optional*):
            Picture or video to ask about. By default noise.
        question (`str`, *optional*):
            What to ask.
        image_size (`tuple[int, int]`, *optional*, defaults to `(672, 672)`):
            Width and height of the noise.
        num_frames (`int`, *optional*):
            Noise is a video of so many frames; of a video file, so many are taken. By default 32, and noise is a
            picture for all models but LLaVA-Video.
        device (`str`, *optional*):
            By default a GPU if there is one.
        dtype (`str`, *optional*):
            Such as `"bfloat16"`. By default that of the checkpoint.
        attn_implementation (`str`, *optional*):
            As in `from_pretrained`.
        repeats (`int`, *optional*, defaults to 5):
            Rounds over all methods.
        new_tokens (`int`, *optional*, defaults to 8):
            Decoding steps after each prefill.
        json_file (`str` or `os.PathLike`, *optional*):
            File to write the results to.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show bars, on stderr.
        echo (`Callable[[str], None]`, *optional*, defaults to `print`):
            Takes what there is to read, line by line.

    Returns:
        `list[dict[str, Any]]`: a result of [`measure`] for each batch size.

    Raises:
        `ImportError`: if nothing decodes the video.
        `OSError`: if there is no such checkpoint or file.
        `ValueError`: for arguments that do not fit each other or the checkpoint, or noise that memory may not hold.
        `RuntimeError`: for a device that is not there.
    """
    pixels = math.prod(image_size) * (num_frames or _NUM_FRAMES)
    if image is None and pixels > _MAX_PIXELS:
        raise ValueError(
            f"--image-size {image_size[0]}x{image_size[1]} is too large: {num_frames or _NUM_FRAMES} frames of noise "
            f"would have {pixels:,} pixels, and may have {_MAX_PIXELS:,}. Choose a smaller size or fewer --num-frames."
        )
    target = torch.device(device or default_device())
    torch.empty(0, device=target)  # fails, and says why, if there is none
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"--dtype {dtype} is not supported: choose one of {', '.join(_DTYPES)}.")
    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {json_file}: there is no folder {Path(json_file).absolute().parent}.")
    visual = None if image is None else load_visual(image)
    if model is not None:
        check_fsr_model(model)

    with tempfile.TemporaryDirectory(prefix="fsr-hf-bench-") as temporary:
        folder = model
        if folder is None:
            echo("Building a small LLaVA-1.5 of random weights ...")
            folder = str(export_small_llava(Path(temporary)))
        processor = AutoProcessor.from_pretrained(folder)
        loading: dict[str, Any] = {"dtype": dtype or "auto"}
        if attn_implementation is not None:
            loading["attn_implementation"] = attn_implementation
        loaded = AutoModel.from_pretrained(folder, **loading).to(target).eval()
    part, metadata = _visual_part(loaded, processor, visual, image_size, num_frames)
    messages = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
    methods = [
        Method("unpruned", scores=()),
        *(Method("FSR", budget) for budget in budgets),
        *(Method("random", budget, random_selection, scores=()) for budget in budgets),
    ]
    results = []
    for batch_size in batch_sizes:
        settings: dict[str, Any] = {}
        if part["type"] == "video":
            settings = {"video_metadata": [metadata] * batch_size, "do_sample_frames": False}
        inputs = processor.apply_chat_template(
            [messages] * batch_size,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=settings,
        ).to(loaded.device, loaded.dtype)
        result = measure(
            loaded,
            inputs,
            methods,
            repeats=repeats,
            new_tokens=new_tokens,
            progress=progress,
            name=model or "small LLaVA-1.5 of random weights",
        )
        results.append(result)
        for line in ("", *format_result(result)):
            echo(line)
    for line in ("", *_notes(results[0], is_random=model is None)):
        echo(line)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        echo(f"Written to {json_file}.")
    return results


_DTYPES = ("float32", "bfloat16", "float16")


def _visual_part(model, processor, visual: Image.Image | Path | None, size: tuple[int, int], num_frames: int | None):
    """The picture or the video in a message, and the metadata of a video."""
    takes_videos = getattr(processor, "video_processor", None) is not None
    if not takes_videos and (isinstance(visual, Path) or num_frames is not None):
        raise ValueError(f"{type(model).__name__} takes images alone: leave out videos and --num-frames.")
    number = num_frames or _NUM_FRAMES
    if isinstance(visual, Path):
        choose = functools.partial(sample_frames, num_frames=number)
        frames, metadata = read_video(processor.video_processor, str(visual), choose)
        return {"type": "video", "video": frames}, metadata
    if visual is None and (num_frames is not None or _family(model) == "llava_video"):
        frames = np.stack([np.asarray(_noise(size)) for _ in range(number)])
        metadata = VideoMetadata(total_num_frames=number, fps=1.0, duration=number, frames_indices=list(range(number)))
        return {"type": "video", "video": frames}, metadata
    return {"type": "image", "image": visual or _noise(size)}, None


def _noise(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


_NUM_FRAMES = 32
_MAX_PIXELS = 2**30  # of all frames of noise, three bytes each


def _notes(result: dict[str, Any], is_random: bool) -> Iterator[str]:
    notes = [
        f"Medians of {result['repeats']} rounds over all methods in turn, and quartiles. Prefill: forward() to the "
        "logits of the first new token, towers and selection included. Of FLOPs: the speed-up as a share of the ratio "
        "of FLOPs. Random: tokens drawn without scores, the least that pruning costs. Decode: forward() of one token. "
        "FSR's own: the stages from saliency to compaction."
    ]
    if is_random:
        notes.append("This model is small and its weights are random: its ratios are not a published model's.")
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    notes.append(f"{result['machine']}, {result['threads']} used by torch; {versions}.")
    for note in notes:
        yield from textwrap.wrap(note, _WIDTH)


_WIDTH = 110
