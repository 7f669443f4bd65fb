"""
Everything that is to be measured on a GPU, by one command that can be cut off and taken up again.

    python -m benchmarks.gpu                     # all parts that this machine has not done yet
    python -m benchmarks.gpu --parts kernels     # some of them
    python -m benchmarks.gpu --limit 540         # starts no part after 540 s; the next call goes on

Parts, in this order: `kernels` (Triton against float64 and against torch, on random and adversarial problems), `tests`
(those that need a GPU: no wait of the host for the device), `attention` (the same selection under eager, SDPA and
FlashAttention), then each section of `benchmarks.efficiency` and each series of `benchmarks.growth`, and the page. A
part is written to the results as it ends. One that fails is said, and the others still run.
"""

import argparse
import json
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import is_flash_attn_2_available

from fsr_hf.machine import provenance
from fsr_hf.modeling import fsr, received_kernel, saliency, scan_kernel
from fsr_hf.modeling.triton_launch import can_launch, is_interpreted

from . import efficiency, growth
from .efficiency_docs import load
from .models import build, make_inputs


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-4  # of a cosine; sums of a few thousand products in float32 are within 1e-5


# ---------------------------------------------------------------------- kernels


def scan_problems(number: int, max_tokens: int, device: str) -> Iterator[tuple[bool, tuple[torch.Tensor, ...]]]:
    """
    Problems of Scan, the arguments of `scan_on_gpu`, and whether every cosine in them is exact, so that ties are ties:
    features of signs and powers of two in 16 or 64 dimensions, zeros and non-finite values among them. The others are
    random tokens, or tokens as a projector gives them, with cosines of 0.98 to each other.
    """
    for seed in range(number):
        rng, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
        is_exact = seed % 2 == 0
        batch = rng.choice((1, 1, 2, 5))
        tokens = max(2, round(max_tokens ** rng.uniform(0.3, 1.0)))
        if seed % 100 == 1:  # the largest ones, beyond the cosines of all pairs
            batch, tokens = 1, max_tokens
        options = {"generator": generator, "device": device}
        width = rng.choice((16, 64)) if is_exact else rng.choice((24, 90, 1024, 3584, 4096))
        if batch * tokens * width > 2**28:
            width = 64 if is_exact else 90
        features = torch.randn(batch, tokens, width, **options)
        if is_exact:
            features = features.sign() * 2.0 ** torch.randint(-3, 4, (batch, tokens, 1), **options)
            features = features[:, torch.randint(0, tokens, (tokens,), **options) % rng.choice((3, 40, tokens))]
            odd = torch.rand(batch, tokens, **options)
            features[odd < 0.02] = 0.0
            features[odd > 0.99] = rng.choice((torch.nan, torch.inf, -torch.inf))
        elif rng.random() < 0.5:
            features = 7.0 * torch.randn(width, **options) + features
        features = features.to(rng.choice((torch.float32, torch.bfloat16, torch.float16)))
        mask = torch.rand(batch, tokens, **options) < rng.choice((0.5, 0.95, 1.0))
        mask[:, 0] = True
        real = mask.sum(1)
        budget = min(rng.choice((8, 64, 640)), tokens, 512 if tokens > 20000 else tokens)
        # What Focus would leave: the first `num_focus` of the real tokens, in an order of their own.
        order = torch.rand(batch, tokens, **options).masked_fill(~mask, 2.0).argsort(1)
        num_focus = torch.minimum(torch.full_like(real, rng.randint(1, budget)), real)
        num_anchors = torch.minimum(budget - num_focus, real - num_focus).clamp(min=0)
        slots = torch.arange(budget + 1, device=device)
        focus = order[:, :1].expand(-1, budget + 1).clone()
        focus[:, : min(budget + 1, tokens)] = order[:, : budget + 1]
        focus = focus.masked_fill(slots >= num_focus[:, None], tokens)
        even, num_even = fsr._spread_evenly(mask, focus, real.clamp(max=budget), num_anchors, rng.choice((0.0, 1.0)))
        yield is_exact, (features, mask, focus, num_focus, even, num_even, num_anchors)


def scan_excess(arguments: tuple[torch.Tensor, ...], result: tuple[torch.Tensor, ...]) -> float:
    """
    By how much of a cosine, at most, a result of Scan misses Eqs. 5 and 8 in float64: an anchor after those given that
    is not the farthest token, or a nearest anchor that is not the nearest. Infinity if the anchors are not what they
    must be.
    """
    excess = 0.0
    for features, mask, focus, num_focus, even, num_even, num_anchors, anchors, nearest, similarity in zip(
        *arguments, *result
    ):
        tokens, count, given = len(mask), int(num_anchors), int(num_even)
        chosen, first = anchors[:count], focus[: int(num_focus)]
        is_free = mask.clone().index_fill_(0, first, False)
        if len(chosen.unique()) < count or (anchors[count:] != tokens).any() or (count and not is_free[chosen].all()):
            return float("inf")
        if not torch.equal(chosen[:given], even[:given]):
            return float("inf")
        if not count:
            continue
        unit = torch.nn.functional.normalize(features.double(), dim=-1)
        cosines = unit[chosen] @ unit.T  # (anchors, tokens)
        closest = torch.cat([(unit[first] @ unit.T).amax(0, keepdim=True), cosines[:-1]]).cummax(0).values
        steps = torch.arange(count, device=mask.device)
        chosen_at = torch.full((tokens,), count, device=mask.device).index_copy_(0, chosen, steps)
        is_candidate = is_free & (chosen_at >= steps[:, None])
        farthest = closest.masked_fill(~is_candidate, torch.inf).amin(1)
        if given < count:
            excess = max(excess, float((closest[steps, chosen] - farthest)[given:].max()))
        rank = torch.full((tokens,), -1, device=mask.device).index_copy_(0, chosen, steps)
        best = cosines.amax(0)
        excess = max(excess, float((best - cosines[rank[nearest], torch.arange(tokens, device=mask.device)]).max()))
        excess = max(excess, float((best - similarity).abs().max()))
    return excess


def check_kernels(device: str, number: int, max_tokens: int) -> dict[str, Any]:
    """
    Both kernels on `number` problems each. An exact problem must give what torch gives, to the last index; any other
    must be right in float64.
    """
    result: dict[str, Any] = {"problems": number, "max_tokens": max_tokens, "failed": [], "scan_excess": 0.0}
    if not scan_kernel.can_scan_on_gpu(torch.zeros(1, 2, 8, device=device), fsr._scan_with_torch):
        raise RuntimeError("The kernels of Scan are not trusted on this device; the warning above says why.")
    for seed, (is_exact, arguments) in enumerate(tqdm(scan_problems(number, max_tokens, device), "scan", number)):
        found = scan_kernel.scan_on_gpu(*arguments)
        if is_exact:
            expected = fsr._scan_with_torch(*arguments)
            has_anchor = expected[2] > -torch.inf
            is_right = torch.equal(found[0], expected[0])
            is_right &= torch.equal(found[1][has_anchor], expected[1][has_anchor])
        else:
            excess = scan_excess(arguments, found)
            result["scan_excess"] = max(result["scan_excess"], excess)
            is_right = excess <= TOLERANCE
        if not is_right:
            result["failed"].append(f"scan {seed}: {list(arguments[0].shape)}, {arguments[0].dtype}")

    result["attention_error"] = 0.0
    for seed in tqdm(range(number), "attention received"):
        rng, generator = random.Random(seed), torch.Generator(device).manual_seed(seed)
        lengths = [rng.randint(1, max(2, max_tokens // 20)) for _ in range(rng.randint(1, 4))]
        shape = (2, sum(lengths), rng.choice((1, 3, 16)), rng.choice((8, 20, 64, 80, 128)))
        dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
        scores = torch.randn(shape, generator=generator, device=device) * rng.choice((0.5, 2.0, 30.0))
        query, key = scores.to(dtype)
        found = received_kernel.received_on_gpu(query, key, lengths, shape[3] ** -0.5)
        expected = saliency._received_in_blocks(query.double(), key.double(), lengths, shape[3] ** -0.5)
        error = float(((found.double() - expected).abs() / (expected + 1e-6)).max())
        result["attention_error"] = max(result["attention_error"], error)
        if not error <= 2e-2:
            result["failed"].append(f"attention {seed}: {lengths}, {shape}, {dtype}: {error}")
    return result


# ---------------------------------------------------------------------- tests, attention


def run_tests() -> dict[str, Any]:
    """The tests that need a GPU, which other machines skip."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/modeling/test_kernels.py"]
    done = subprocess.run([*command, "-k", "gpu"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not failed:
        failed = [done.stderr or done.stdout]
    return {"summary": lines[-1] if lines else "", "failed": failed}


def compare_attention(device: str, size: str) -> dict[str, Any]:
    """
    The selection of each family under each attention: equal in float32; in half precision at least 90 % of the kept
    tokens, against SDPA in float32.
    """
    result: dict[str, Any] = {"size": size, "kept_in_common": {}, "failed": []}
    backends = ["eager", "sdpa", *["flash_attention_2"] * is_flash_attn_2_available()]
    for family, prompt in {case.family: case.prompt for case in efficiency.CASES[size]}.items():
        kept: dict[str, list[set[int]]] = {}
        model = build(family, size, device, torch.float32)
        model.config.fsr_config.rho = 0.9  # `build` sets it so low that Scan, which hangs by the last digits, does all
        torch.manual_seed(0)
        inputs = make_inputs(model, family, prompt, 2)
        for dtype in (torch.float32, torch.bfloat16):
            model = model.to(dtype)
            for backend in backends:
                if backend == "flash_attention_2" and dtype == torch.float32:
                    continue  # it has none
                model.set_attn_implementation(backend)
                outputs = model.generate(
                    **{key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()},
                    retention_ratio=0.5,
                    max_new_tokens=2,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_visual_selection=True,
                )
                kept[f"{backend}, {str(dtype).removeprefix('torch.')}"] = [
                    set(selection.indices.tolist()) for selection in outputs.visual_selections
                ]
        reference = kept["sdpa, float32"]
        for name, sets in kept.items():
            common = min(len(one & other) / len(other) for one, other in zip(sets, reference))
            result["kept_in_common"][f"{family}, {name}"] = common
            if common < (1.0 if "float32" in name else 0.9):
                result["failed"].append(f"{family}, {name}: {common:.1%} of the kept tokens in common")
    return result


# ---------------------------------------------------------------------- the command


def is_done(results: dict[str, Any], name: str) -> bool:
    """Whether a part was measured on this machine, with these versions, and nothing failed."""
    entries = results.get(name) or []
    entries = entries if isinstance(entries, list) else [entries]
    here = provenance()
    return bool(entries) and all(
        not entry.get("failed") and all(entry.get(key) == here[key] for key in ("machine", "versions"))
        for entry in entries
    )


def main(arguments: list[str] | None = None) -> None:
    checks = ("kernels", "tests", "attention")
    parts = (*checks, *efficiency.BUDGETS, "selection", *growth.SERIES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=parts, metavar="NAME", help=f"{', '.join(parts)}; all by default"
    )
    parser.add_argument("--again", action="store_true", help="also what this machine has done already")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no part is started")
    parser.add_argument("--problems", type=int, default=1000, help="problems for each kernel")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes; with TRITON_INTERPRET=1 also on the CPU, to see that it runs; needs --output",
    )
    options = parser.parse_args(arguments)
    device = "cpu" if options.quick and is_interpreted() else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --quick with TRITON_INTERPRET=1 runs on the CPU")
    if not can_launch(torch.zeros(1, device=device)):
        parser.error("the kernels need Triton and an NVIDIA GPU from Ampere on")
    if options.quick and options.output == RESULTS:
        parser.error("--quick needs --output: small sizes are no results")
    if options.problems < 1:
        parser.error("--problems must be 1 or more")
    options.output.mkdir(parents=True, exist_ok=True)
    files = {name: options.output / f"{name}-{device}.json" for name in ("gpu", "efficiency", "growth")}

    def check(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        results = load(files["gpu"].stem, options.output)
        results[name] = measure() | provenance()
        files["gpu"].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if results[name]["failed"]:
            raise RuntimeError("\n".join(results[name]["failed"]))

    size, max_tokens = ("tiny", 60) if options.quick else ("scaled", 50000)
    measures = {
        "kernels": lambda: check_kernels(device, options.problems, max_tokens),
        "tests": run_tests,
        "attention": lambda: compare_attention(device, size),
    }
    quick = ["--quick"] * options.quick + ["--device", device]
    start, failed, left = time.perf_counter(), [], []
    for part in options.parts or parts:
        module = "gpu" if part in checks else "growth" if part in growth.SERIES else "efficiency"
        if is_done(load(files[module].stem, options.output), part) and not options.again:
            print(f"{part}: done before", flush=True)
            continue
        if time.perf_counter() - start > options.limit:
            left.append(part)
            continue
        print(f"::: {part}", flush=True)
        try:
            if module == "gpu":
                check(part, measures[part])
            elif module == "growth":
                growth.main([*quick, "--series", part, "--output", str(files[module])])
            else:
                efficiency.main([*quick, "--sections", part, "--output", str(files[module])])
        except Exception:
            traceback.print_exc()
            failed.append(part)
        print(f"{part}: {time.perf_counter() - start:.0f} s since the start", flush=True)
    if options.output == RESULTS:
        efficiency.main(["--docs"])
    if left:
        print(f"left for the next call: {', '.join(left)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
