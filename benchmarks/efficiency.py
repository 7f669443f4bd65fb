"""
What FSR saves and what it costs, beside random pruning and FSR's peers, in one run.

    python -m benchmarks.efficiency                    # on a GPU the models in full size, else scaled ones on the CPU
    python -m benchmarks.efficiency --sections llava selection
    python -m benchmarks.efficiency --docs             # measures nothing: docs/efficiency.md from the results

Weights are random, sizes real (`benchmarks/models.py`). Sections are written to the results as soon as they are done,
and those of an earlier run stay, so an interrupted run goes on with `--sections`.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding

from fsr_hf import VisualSelection, select_visual_tokens
from fsr_hf.bench import Method, as_selection, format_result, measure, quartiles, random_selection, synchronize
from fsr_hf.machine import provenance
from fsr_hf.modeling.guards import get_cache
from fsr_hf.modeling.pools import VisualTokens, select_from_items
from fsr_hf.modeling.prompt import VisualItem

from . import selectors
from .models import Prompt, build, make_inputs


RESULTS = Path(__file__).parent / "results"

# Peers, and which scores they read: the others are not computed for them.
PEERS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "FasterVLM": (selectors.fastervlm, ("saliency",)),
    "VisPruner": (selectors.vispruner, ("saliency",)),
    "VisionZip": (selectors.visionzip, ("saliency",)),
    "HoloV": (selectors.holov, ("saliency",)),
    "DivPrune": (selectors.divprune, ()),
    "CDPruner": (selectors.cdpruner, ("relevance",)),
}
BUDGETS: dict[str, list[int | float]] = {
    "llava": [192, 128, 64],
    "llava_next": [960, 640, 320],
    "qwen2_5_vl": [0.5, 0.2, 0.1],
    "llava_video": [0.5, 0.3, 0.2],
}
NAMES = {
    "llava": "LLaVA-1.5-7B",
    "llava_next": "LLaVA-NeXT-7B",
    "qwen2_5_vl": "Qwen2.5-VL-7B",
    "llava_video": "LLaVA-Video-7B",
}
# The processor of Qwen2.5-VL rounds 1024 and 2048 pixels to 74 and 146 patches of 14.
SIDES = {74: "1024 x 1024", 146: "2048 x 2048", 20: "280 x 280"}


@dataclass(frozen=True)
class Case:
    """A model, a prompt and a batch size; the peers run in it if `has_peers`."""

    family: str
    size: str
    prompt: Prompt
    batch_size: int
    has_peers: bool = True

    @property
    def name(self) -> str:
        name = NAMES[self.family] if self.size == "full" else f"{self.size} {NAMES[self.family].removesuffix('-7B')}"
        details = {"qwen2_5_vl": SIDES.get(self.prompt.size), "llava_video": f"{self.prompt.size} frames"}
        return f"{name}, {details[self.family]}" if self.family in details else name


CASES = {
    "full": [
        Case("llava", "full", Prompt(), 1),
        Case("llava", "full", Prompt(), 16),
        Case("llava_next", "full", Prompt(), 1),
        Case("llava_next", "full", Prompt(), 4),
        Case("qwen2_5_vl", "full", Prompt(74), 1),
        Case("qwen2_5_vl", "full", Prompt(74), 8),
        Case("qwen2_5_vl", "full", Prompt(146), 1),
        Case("qwen2_5_vl", "full", Prompt(146), 2, has_peers=False),
        Case("llava_video", "full", Prompt(32), 1),
        Case("llava_video", "full", Prompt(32), 2, has_peers=False),
        Case("llava_video", "full", Prompt(64), 1, has_peers=False),
    ],
    "scaled": [
        Case("llava", "scaled", Prompt(), 1),
        Case("llava", "scaled", Prompt(), 2, has_peers=False),
        Case("llava_next", "scaled", Prompt(), 1),
        Case("qwen2_5_vl", "scaled", Prompt(74), 1),
        Case("llava_video", "scaled", Prompt(8), 1),
    ],
    "tiny": [
        Case("llava", "tiny", Prompt(), 2),
        Case("llava_next", "tiny", Prompt(), 1, has_peers=False),
        Case("qwen2_5_vl", "tiny", Prompt(20), 1, has_peers=False),
        Case("llava_video", "tiny", Prompt(2), 1, has_peers=False),
    ],
}

# Tokens, kept tokens, width and batch of selection by itself.
POOLS = {
    "full": [
        (576, 64, 4096, 1),
        (576, 64, 4096, 16),
        (2880, 640, 4096, 1),
        (1369, 137, 3584, 1),
        (5329, 533, 3584, 1),
        (6272, 1254, 3584, 1),
        (12544, 2509, 3584, 1),
    ],
    "scaled": [(576, 64, 4096, 1), (2880, 640, 4096, 1), (1369, 137, 3584, 1), (6272, 1254, 3584, 1)],
    "tiny": [(100, 20, 64, 2)],
}


def as_selector(select: Callable) -> Callable[..., VisualSelection]:
    """A peer's function with the arguments and the result of [`select_visual_tokens`]."""

    def run(features, saliency, relevance, num_visual_tokens, *, mask=None, **_) -> VisualSelection:
        if mask is not None or isinstance(num_visual_tokens, torch.Tensor):
            raise ValueError("Peers take pools of one size and one budget: measure them on prompts that are alike.")
        features_kept, indices = select(features, saliency, relevance, num_visual_tokens)
        indices, order = indices.sort(dim=-1)
        selection = as_selection(features, indices)
        selection.features = features_kept.gather(1, order[..., None].expand_as(features_kept))
        return selection

    return run


def methods_of(case: Case) -> list[Method]:
    """Unpruned, FSR and random tokens at each budget, the peers at the smallest one."""
    budgets = BUDGETS[case.family]
    methods = [Method("unpruned", scores=())]
    methods += [Method("FSR", budget) for budget in budgets]
    methods += [Method("random", budget, random_selection, scores=()) for budget in budgets]
    if case.has_peers:
        methods += [
            Method(name, min(budgets), as_selector(select), scores=scores) for name, (select, scores) in PEERS.items()
        ]
    return methods


# ---------------------------------------------------------------------- sections


def measure_family(family: str, size: str, device: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case of a family, on one model."""
    model = build(family, size, device, torch.float32 if device == "cpu" else torch.bfloat16)
    results = []
    for case in CASES[size]:
        if case.family != family:
            continue
        inputs = make_inputs(model, family, case.prompt, case.batch_size)
        try:
            result = measure(
                model,
                inputs,
                methods_of(case),
                repeats=options.repeats,
                seconds=options.seconds,
                warmup=1 if device == "cpu" else 2,
                new_tokens=options.new_tokens,
                name=case.name,
            )
        except torch.OutOfMemoryError as error:
            print(f"{case.name}, batch of {case.batch_size}: {error}", file=sys.stderr)
            result = {"model": case.name, "failed": "out of memory", "batch": case.batch_size}
        else:
            print("", *format_result(result), sep="\n", flush=True)
        results.append({"family": family, "size": size, **result})
        del inputs
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return results


@torch.no_grad()
def measure_selection(size: str, device: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """
    Selection by itself, on random tokens: FSR, its peers, random tokens, and the matrix products that FSR needs at
    least, those of its anchors with all tokens and of its weights with merged tokens. Scores are so uneven that Focus
    holds about as many tokens as in the paper's pictures (9 and 15); with one Focus token Scan has the most to do.
    """
    results = []
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for tokens, kept, width, batch in POOLS[size]:
        torch.manual_seed(0)
        features = torch.randn(batch, tokens, width, device=device, dtype=dtype)
        saliency, relevance = (1.25 * torch.randn(2, batch, tokens, device=device)).exp()
        unit, weights = features.float(), torch.rand(batch, kept, kept, device=device)
        arguments = (features, saliency, relevance, kept)
        calls: dict[str, Callable[[], Any]] = {
            "FSR": lambda arguments=arguments: select_visual_tokens(*arguments),
            "FSR, one Focus token": lambda arguments=arguments: select_visual_tokens(*arguments, rho=1e-9),
            "random": lambda arguments=arguments: random_selection(*arguments),
            "products": lambda unit=unit, weights=weights, kept=kept: (
                unit[:, :kept] @ unit.mT,
                weights @ unit[:, :kept],
            ),
        }
        for name, (select, _) in PEERS.items():
            calls[name] = lambda select=select, arguments=arguments: select(*arguments)
        times = time_calls(calls, device, 3 * options.repeats, options.seconds / len(calls), f"{tokens} -> {kept}")
        peaks = {name: peak_memory(call) for name, call in calls.items()} if device == "cuda" else {}
        results.append(
            {
                "tokens": tokens,
                "kept": kept,
                "hidden_size": width,
                "batch": batch,
                "dtype": str(dtype).removeprefix("torch."),
                "focus_tokens": int(select_visual_tokens(*arguments).is_focus.sum()) / batch,
                "own_products": quartiles([time_products(calls["FSR"]) for _ in range(5)])
                if device == "cpu"
                else None,
                "methods": [
                    {"method": name, "time": quartiles(seconds), "peak_bytes": peaks.get(name)}
                    for name, seconds in times.items()
                ],
                **provenance(),
            }
        )
        medians = ", ".join(
            f"{method['method']} {method['time']['median'] * 1e3:.2f}" for method in results[-1]["methods"]
        )
        print(f"selection, {tokens} -> {kept}, batch of {batch}, ms: {medians}", flush=True)
    return results


def time_products(call: Callable[[], Any]) -> float:
    """Seconds that a call spends in matrix products on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    products = ("aten::mm", "aten::bmm", "aten::addmm")
    return sum(event.self_cpu_time_total for event in profiler.key_averages() if event.key in products) / 1e6


def time_calls(
    calls: dict[str, Callable[[], Any]], device: str, repeats: int, seconds: float, name: str
) -> dict[str, list[float]]:
    """
    Seconds of each call, all in turn, after one that does not count. A call that has had its `seconds` and three runs
    (one, if that alone takes as long) is left out of the further rounds.
    """
    target = torch.device(device)
    times: dict[str, list[float]] = {call: [] for call in calls}
    for call in tqdm(calls, desc=f"{name}, warm-up", leave=False):
        calls[call]()
    for _ in tqdm(range(repeats), desc=name):
        for call, run in calls.items():
            spent = sum(times[call])
            if spent > seconds and (len(times[call]) >= 3 or spent > 3 * seconds):
                continue
            synchronize(target)
            start = time.perf_counter()
            run()
            synchronize(target)
            times[call].append(time.perf_counter() - start)
    return times


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes that a call holds at most on the GPU, beyond what was there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def count_flops(size: str) -> list[dict[str, Any]]:
    """
    FLOPs and KV cache of the models in full size. Nothing is computed: on the meta device tensors have shapes alone.
    """
    results = []
    cases = {(case.family, case.prompt): case for case in CASES[size]}
    for case in tqdm(cases.values(), desc="FLOPs"):
        model = build(case.family, size, "meta", torch.bfloat16)
        for module in model.modules():
            if isinstance(module, Qwen2_5_VLVisionRotaryEmbedding):
                # Positions come from grids, which have values, and meet frequencies, which have none.
                module.register_forward_pre_hook(lambda _, args: (args[0], args[1].to("meta")))
        inputs = make_inputs(model, case.family, case.prompt, 1)
        inner = model.model
        visual = inner.pop_visual(inputs)
        items = inner.place_items(inputs["input_ids"], inner.build_items(**visual))
        rows = []
        with FlopCounterMode(display=False) as encoder:  # what an unpruned model computes
            get_features = inner.get_video_features if items[0].modality == "video" else inner.get_image_features
            get_features(**{name: value for name, value in visual.items() if name != "mm_token_type_ids"})
        with FlopCounterMode(display=False) as scorer:  # the same, and the scores
            tokens = _meta_tokens(inner, inputs, items, visual)
        for budget in (None, *BUDGETS[case.family]):
            with FlopCounterMode(display=False) as counter:
                kept = items[0].length
                if budget is not None:
                    kept = Method("FSR", budget).kept(items[0].num_candidates)
                    select_from_items(tokens, items, [kept], model.config.fsr_config, model.selector, False)
                cache = _meta_prefill(model, inputs["input_ids"].shape[1] - items[0].length + kept)
            flops = counter.get_total_flops() + (encoder if budget is None else scorer).get_total_flops()
            length = cache.get_seq_length()
            kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            rows.append(
                {
                    "budget": budget,
                    "visual_tokens": kept,
                    "length": length,
                    "flops": flops,
                    "macs": flops // 2,
                    "kv_bytes": kv_bytes,
                    "visual_kv_bytes": kv_bytes // length * kept,
                }
            )
        results.append(
            {
                "model": case.name,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "text": case.prompt.text,
                "encoder_flops": encoder.get_total_flops(),
                "rows": rows,
                **provenance(),
            }
        )
        flops = ", ".join(f"{row['visual_tokens']}: {row['flops'] / 1e12:.3f}" for row in rows)
        print(f"{case.name}, TFLOPs by visual tokens: {flops}", flush=True)
    return results


def _meta_tokens(inner, inputs: dict[str, Any], items: list[VisualItem], visual: dict[str, Any]) -> VisualTokens:
    """The tokens of the image or video, and their scores."""
    if (grid := visual.get("image_grid_thw")) is not None:
        # `encode_items` would move the grid to the device of the pixels, where it has no values.
        last = inner.config.vision_config.depth - 1
        outputs = inner.get_image_features(visual["pixel_values"], grid, output_hidden_states=[last - 1, last])
        return VisualTokens(list(outputs.pooler_output), inner.saliency(outputs.hidden_states[-2], grid))
    query = None
    if inner.text_encoder is not None:
        names = ("query_input_ids", "query_attention_mask")
        query = inner.text_encoder.encode_query(*(inputs[name].to("meta") for name in names))
    return inner.encode_items(items, query, **visual)[0]


def _meta_prefill(model, length: int):
    """The language model on a prompt of this length, up to the logits of the first new token: its cache."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    outputs = model.model.language_model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=True)
    model.lm_head(outputs.last_hidden_state[:, -1:])
    return get_cache(outputs)


# ---------------------------------------------------------------------- the command

SECTIONS = ("flops", "selection", *BUDGETS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        metavar="NAME",
        help=f"{', '.join(SECTIONS)}; by default all, but on a GPU without flops, which are the same anywhere",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, help="rounds over all methods, at most")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="after so long a prompt gets no further round, if it has had three"
    )
    parser.add_argument("--new-tokens", type=int, default=8, help="decoding steps after each prefill")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs; needs --output")
    parser.add_argument("--output", type=Path, help="file of the results")
    parser.add_argument(
        "--docs", action="store_true", help="write docs/efficiency.md from the results, and measure nothing"
    )
    options = parser.parse_args(arguments)
    if options.docs:
        from .efficiency_docs import write_docs

        write_docs()
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if options.repeats < 1 or options.seconds < 0 or options.new_tokens < 0:
        parser.error("--repeats must be 1 or more, --seconds and --new-tokens 0 or more")
    if options.quick and options.output is None:
        parser.error("--quick needs --output: tiny models are no results")
    output = options.output or RESULTS / f"efficiency-{options.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    size = "tiny" if options.quick else "full" if options.device == "cuda" else "scaled"
    if options.quick:
        options.repeats = 1

    results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    for section in options.sections or SECTIONS[size == "full" :]:
        started = time.perf_counter()
        if section == "flops":
            results[section] = count_flops("tiny" if options.quick else "full")
        elif section == "selection":
            results[section] = measure_selection(size, options.device, options)
        else:
            results[section] = measure_family(section, size, options.device, options)
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(output)
        print(f"{section}: {time.perf_counter() - started:.0f} s, written to {output}", flush=True)


if __name__ == "__main__":
    main()
