"""
How time and memory of selection grow with the tokens of a picture or a video, and with those that are kept.

    python -m benchmarks.growth                # on a GPU if there is one
    python -m benchmarks.growth --series share # one series; the others stay as they were

Tokens are random and have no structure; Focus is one token, so that Scan has the most to do. Memory is what a call
holds at most beyond its arguments: what torch's allocator counts on a GPU, the resident set of the process on Linux.
"""

import argparse
import ctypes
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fsr_hf import select_visual_tokens
from fsr_hf.bench import quartiles, synchronize
from fsr_hf.machine import provenance


RESULTS = Path(__file__).parent / "results"
TOKENS = (576, 1152, 2304, 4608, 9216, 18432, 36864, 50000)
# Pairs of tokens and kept tokens, and which of both is the axis.
SERIES: dict[str, tuple[str, list[tuple[int, int]]]] = {
    "fixed": ("tokens", [(tokens, 64) for tokens in TOKENS]),
    "share": ("tokens", [(tokens, tokens // 9) for tokens in TOKENS]),
    "kept": ("kept", [(9216, kept) for kept in (64, 128, 256, 512, 1024, 2048, 4096)]),
}
_FREE = 2  # of the memory that is free, at most one part in so many is used


def exponent(sizes: list[int], values: list[float]) -> float | None:
    """The slope of a straight line through logarithms, by least squares over the upper half of the sizes."""
    pairs = [(math.log(size), math.log(value)) for size, value in zip(sizes, values) if value > 0]
    pairs = pairs[len(pairs) // 2 :]
    if len(pairs) < 2:
        return None
    mean_x, mean_y = (sum(numbers) / len(pairs) for numbers in zip(*pairs))
    return sum((x - mean_x) * (y - mean_y) for x, y in pairs) / sum((x - mean_x) ** 2 for x, _ in pairs)


def measure_point(tokens: int, kept: int, width: int, device: str, repeats: int, seconds: float) -> dict[str, Any]:
    """Times and memory of one size. A first run that takes less than a second does not count."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    features = torch.randn(1, tokens, width, device=device, dtype=dtype)
    saliency = torch.rand(1, tokens, device=device)

    def run() -> None:
        select_visual_tokens(features, saliency, None, kept, rho=1e-9)

    times: list[float] = []
    for number in range(repeats + 1):
        synchronize(torch.device(device))
        start = time.perf_counter()
        run()
        synchronize(torch.device(device))
        times.append(time.perf_counter() - start)
        if number == 0 and times[0] < 1.0:
            times = []
        elif sum(times) > seconds:
            break
    peak = _peak_on_gpu(run) if device == "cuda" else _peak_on_host(run)
    return {"tokens": tokens, "kept": kept, "time": quartiles(times), "peak_bytes": peak}


def _peak_on_gpu(run: Callable[[], None]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_host(run: Callable[[], None]) -> int | None:
    """By the mark that Linux keeps of the largest resident set; `None` where it cannot be set back."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what earlier calls have left in the heap
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    run()
    return max(_memory("VmHWM") - before, 0)


def _memory(field: str) -> int:
    """Bytes in a field of the status of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_series(axis: str, points: list[tuple[int, int]], options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The points of a series, as far as time and memory reach, and the exponents."""
    measured: list[dict[str, Any]] = []
    left_out = []
    for tokens, kept in tqdm(points, desc=name):
        reason = None
        if measured:
            last = measured[-1]
            growth = tokens * kept / (last["tokens"] * last["kept"])  # at least; it may be more
            if last["time"]["median"] * growth > options.limit:
                reason = f"it would take more than {options.limit:g} s"
        if 5 * tokens * options.hidden_size * 4 > _free_bytes(options.device) / _FREE:
            reason = "memory is short"
        if reason is None:
            try:
                point = measure_point(
                    tokens, kept, options.hidden_size, options.device, options.repeats, options.seconds
                )
            except torch.OutOfMemoryError:
                reason = "memory is short"
            else:
                measured.append(point)
                continue
        left_out.append({"tokens": tokens, "kept": kept, "reason": reason})
    sizes = [point[axis] for point in measured]
    peaks = [point["peak_bytes"] or 0 for point in measured]
    return {
        "axis": axis,
        "points": measured,
        "left_out": left_out,
        "time_exponent": exponent(sizes, [point["time"]["median"] for point in measured]),
        "memory_exponent": exponent(sizes, peaks),
        "hidden_size": options.hidden_size,
        "dtype": "bfloat16" if options.device == "cuda" else "float32",
        **provenance(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden-size", type=int, default=4096, help="width of a token")
    parser.add_argument("--repeats", type=int, default=5, help="runs of a size, at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="after so long a size gets no further run")
    parser.add_argument("--limit", type=float, default=60.0, help="a size whose run would take longer is left out")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; needs --output")
    parser.add_argument("--output", type=Path, help="file of the results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if min(options.hidden_size, options.repeats) < 1:
        parser.error("--hidden-size and --repeats must be 1 or more")
    if options.quick and options.output is None:
        parser.error("--quick needs --output: small sizes are no results")
    output = options.output or RESULTS / f"growth-{options.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)

    results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    for name in options.series:
        axis, points = SERIES[name]
        if options.quick:
            points = [(tokens // 16, max(kept // 8, 8)) for tokens, kept in points[:4]]
        results[name] = measure_series(axis, points, options, name)
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for point in results[name]["points"]:
            peak = "" if point["peak_bytes"] is None else f", {point['peak_bytes'] / 1e6:,.0f} MB"
            print(f"{name}: {point['tokens']:,} -> {point['kept']:,}: {point['time']['median'] * 1e3:,.1f} ms{peak}")
        for point in results[name]["left_out"]:
            print(f"{name}: {point['tokens']:,} -> {point['kept']:,} left out: {point['reason']}")
        exponents = (results[name][field] for field in ("time_exponent", "memory_exponent"))
        time_text, memory_text = ("-" if number is None else f"{number:.2f}" for number in exponents)
        print(f"{name}: time grows as {axis}^{time_text}, memory as {axis}^{memory_text}", flush=True)


if __name__ == "__main__":
    main()
