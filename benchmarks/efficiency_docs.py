"""
The tables and the plots of docs/efficiency.md, from the results.
"""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from fsr_hf.bench import speed_up
from fsr_hf.hub.cards import markdown_table

from .pages import fill


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "llava_video")
COMMANDS = {
    "cuda": "python -m benchmarks.gpu",
    "cpu": "python -m benchmarks.efficiency --device cpu && python -m benchmarks.growth --device cpu",
}
DEVICES = {"cuda": "GPU", "cpu": "CPU"}
OWN_SHARE = {"cuda": 0.03, "cpu": 0.05}
# Milliseconds on one H200, by tokens and kept tokens.
SELECTION_MS = {(576, 64): 0.3, (2880, 640): 1.5, (6272, 1254): 8.0}
OVER_PRODUCTS = 1.5
SERIES = {"fixed": "K = 64", "share": "K = N / 9", "kept": "N = 9,216"}


def load(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """A file of results, or nothing."""
    file = results / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# ---------------------------------------------------------------------- pieces of Markdown


def missing(device: str) -> str:
    return f"*Not measured yet. On a machine with such a device:* `{COMMANDS[device]}`"


def provenance(results: Iterable[dict[str, Any]]) -> str:
    """Machine and versions, as often as they differ."""
    lines = {
        f"{result['machine']}, {result['threads']} CPU threads used by torch; "
        + ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        for result in results
    }
    return "*" + " ".join(f"{line}." for line in sorted(lines)) + "*"


def spread(times: dict[str, Any]) -> str:
    """Median and quartiles in milliseconds."""
    scale, digits = 1e3, 0 if times["median"] >= 1 else 1 if times["median"] >= 0.01 else 3
    median, low, high = (f"{times[name] * scale:,.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def title(result: dict[str, Any]) -> str:
    return f"{result['model']}, batch of {result['prompt']['batch']}"


def cases(efficiency: dict[str, Any]) -> list[dict[str, Any]]:
    """Every prompt that was measured, in the order of the families."""
    found = [result for family in FAMILIES for result in efficiency.get(family, [])]
    return [result for result in found if "failed" not in result]


# ---------------------------------------------------------------------- blocks


def flops_block(results: Path) -> str:
    counted = load("efficiency-cpu", results).get("flops") or load("efficiency-cuda", results).get("flops")
    if not counted:
        return "*Not counted yet:* `python -m benchmarks.efficiency --sections flops`"
    rows = []
    for model in counted:
        unpruned = model["rows"][0]
        for row in model["rows"]:
            rows.append(
                [
                    f"{model['model']} ({model['parameters'] / 1e9:.2f} G weights)" if row is unpruned else "",
                    f"{row['visual_tokens']:,}",
                    f"{row['length']:,}",
                    f"{row['flops'] / 1e12:,.3f}",
                    f"{row['macs'] / 1e12:,.3f}",
                    f"{unpruned['flops'] / row['flops']:.2f}",
                    f"{row['kv_bytes'] / 2**20:,.0f}",
                    f"{row['visual_kv_bytes'] / 2**20:,.0f}",
                ]
            )
    head = ["model", "visual tokens", "prompt", "TFLOPs", "TMACs", "FLOPs ratio", "KV MiB", "of visual tokens"]
    return markdown_table(head, rows) + "\n\n" + provenance(counted)


def paper_block(results: Path) -> str:
    paper = load("paper", results)
    rows = [[name, *(f"{value:g}" for value in values)] for name, values in paper["rows"].items()]
    return markdown_table(["method", *paper["columns"]], rows) + f"\n\n*{paper['source']}.*"


def checks_block(results: Path) -> str:
    """Whether the kernels are right on the device, from `benchmarks/gpu.py`."""
    checks = load("gpu-cuda", results)
    if not checks:
        return missing("cuda")
    lines = []
    if kernels := checks.get("kernels"):
        lines.append(
            f"- **Kernels**, {kernels['problems']:,} problems each, up to {kernels['max_tokens']:,} tokens: "
            f"{len(kernels['failed'])} wrong. Scan misses the farthest token by at most {kernels['scan_excess']:.1e} "
            f"of a cosine, attention received is off by at most {kernels['attention_error']:.1e} of its value."
        )
    if tests := checks.get("tests"):
        lines.append(f"- **Tests that need a GPU**: {tests['summary']}.")
    if attention := checks.get("attention"):
        common = attention["kept_in_common"]
        half = {name: share for name, share in common.items() if "float32" not in name}
        full = min(share for name, share in common.items() if name not in half)
        lines.append(
            f"- **Kept tokens under each attention**, against SDPA in float32: in float32 {full:.1%} "
            f"in common, in bfloat16 at least {min(half.values()):.1%} ({', '.join(half)})."
        )
    return "\n".join(lines) + "\n\n" + provenance(checks.values())


def prefill_block(results: Path, device: str) -> str:
    found = cases(load(f"efficiency-{device}", results))
    if not found:
        return missing(device)
    head = ["method", "visual tokens", "TFLOPs", "TMACs", "prefill ms (quartiles)", "speed-up (quartiles)"]
    head += ["of the FLOPs ratio", "decode ms", "speed-up", "KV MiB", "of visual tokens"]
    has_peak = found[0]["methods"][0]["peak_bytes"] is not None
    parts = []
    for result in found:
        unpruned = result["methods"][0]
        rows = []
        for method in result["methods"]:
            faster, ratio = speed_up(unpruned, method), unpruned["flops"] / method["flops"]
            decode = method["decode"]
            rows.append(
                [
                    method["method"],
                    f"{method['visual_tokens']:,}",
                    f"{method['flops'] / 1e12:,.3f}",
                    f"{method['macs'] / 1e12:,.3f}",
                    spread(method["prefill"]),
                    f"{faster['median']:.2f} ({faster['low']:.2f} to {faster['high']:.2f})",
                    f"{faster['median'] / ratio:.0%}",
                    "" if decode is None else f"{decode['median'] * 1e3:,.1f}",
                    "" if decode is None else f"{speed_up(unpruned, method, 'decode')['median']:.2f}",
                    f"{method['kv_bytes'] / 2**20:,.1f}",
                    f"{method['visual_kv_bytes'] / 2**20:,.1f}",
                    *([f"{method['peak_bytes'] / 1e9:,.2f}"] if has_peak else []),
                ]
            )
        prompt = result["prompt"]
        parts.append(
            f"**{title(result)}**: {result['parameters'] / 1e6:,.0f} M weights in {result['dtype']}, "
            f"{result['attention']} attention; {prompt['candidates']:,} visual tokens and {prompt['text']} of text "
            f"in a row; {result['repeats']} rounds.\n\n"
            + markdown_table([*head, *(["peak GB"] if has_peak else [])], rows)
        )
    image = f"![Speed-up of the prefill against kept tokens](efficiency-{device}.webp)"
    return "\n\n".join([image, *parts, provenance(found)])


def stages_block(results: Path, device: str) -> str:
    found = cases(load(f"efficiency-{device}", results))
    if not found:
        return missing(device)
    names: dict[str, None] = {}
    for result in found:
        names |= dict.fromkeys(result["stages"]["stages"])
    order = ("vision tower", "projector", "features", "saliency", "text tower", "relevance", "Focus", "Scan", "Refine")
    stages = [name for name in (*order, "compaction", "language model", "rest") if name in names]
    rows = []
    for name in [*stages, "**FSR's own**"]:
        row = [name]
        for result in found:
            own = result["stages"]
            times = own["own"] if name.startswith("**") else own["stages"].get(name)
            unpruned = result["methods"][0]["prefill"]["median"]
            cell = "" if times is None else f"{times['median'] * 1e3:,.2f} ({times['median'] / unpruned:.2%})"
            row.append(cell)
        rows.append(row)
    head = ["ms (of the unpruned prefill)"]
    head += [f"{title(result)}, {result['stages']['visual_tokens']:,} kept" for result in found]
    return markdown_table(head, rows) + "\n\n" + provenance(found)


def selection_block(results: Path, device: str) -> str:
    found = load(f"efficiency-{device}", results).get("selection")
    if not found:
        return missing(device)
    head = ["ms (quartiles)"]
    for pool in found:
        batch = f", batch of {pool['batch']}" if pool["batch"] > 1 else ""
        head.append(f"{pool['tokens']:,} → {pool['kept']:,}, D = {pool['hidden_size']:,}{batch}")
    rows = []
    for number, method in enumerate(found[0]["methods"]):
        name = "least matrix products" if method["method"] == "products" else method["method"]
        rows.append([name, *(spread(pool["methods"][number]["time"]) for pool in found)])
    if all(pool.get("own_products") for pool in found):
        rows.append(["matrix products within FSR", *(spread(pool["own_products"]) for pool in found)])
    rows.append(["Focus tokens of FSR", *(f"{pool['focus_tokens']:,.0f}" for pool in found)])
    return markdown_table(head, rows) + "\n\n" + provenance(found)


def growth_block(results: Path, device: str) -> str:
    growth = load(f"growth-{device}", results)
    if not growth:
        return missing(device)
    rows, left_out = [], []
    for name, series in growth.items():
        axis = "N" if series["axis"] == "tokens" else "K"
        points = series["points"]
        exponents = (series[field] for field in ("time_exponent", "memory_exponent"))
        rows.append(
            [
                SERIES[name],
                f"{axis} = {points[0][series['axis']]:,} to {points[-1][series['axis']]:,}",
                *("" if number is None else f"{axis}^{number:.2f}" for number in exponents),
                f"{points[-1]['time']['median'] * 1e3:,.1f}",
                "" if points[-1]["peak_bytes"] is None else f"{points[-1]['peak_bytes'] / 2**20:,.0f}",
            ]
        )
        left_out += [f"{point['tokens']:,} → {point['kept']:,} ({point['reason']})" for point in series["left_out"]]
    head = ["series", "range", "time grows as", "memory grows as", "ms at its end", "MiB at its end"]
    parts = [f"![Time and memory of selection](growth-{device}.webp)", markdown_table(head, rows)]
    if left_out:
        parts.append("Left out: " + "; ".join(left_out) + ".")
    return "\n\n".join([*parts, provenance(growth.values())])


def targets_block(results: Path) -> str:
    rows = []
    for device, label in DEVICES.items():
        efficiency = load(f"efficiency-{device}", results)
        largest: dict[str, dict[str, Any]] = {}
        for result in cases(efficiency):
            if result["prompt"]["batch"] >= largest.get(result["model"], result)["prompt"]["batch"]:
                largest[result["model"]] = result
        for result in largest.values():
            unpruned = result["methods"][0]
            share = result["stages"]["own"]["median"] / unpruned["prefill"]["median"]
            target = f"{label}: FSR's own cost at most {OWN_SHARE[device]:.0%} of the unpruned prefill"
            rows.append([target, title(result), f"{share:.2%}", verdict(share <= OWN_SHARE[device])])
        for result in largest.values():
            unpruned, fsr = result["methods"][0], smallest(result)
            part = speed_up(unpruned, fsr)["median"] * fsr["flops"] / unpruned["flops"]
            target = f"{label}: prefill speed-up at least 90 % of the FLOPs ratio"
            rows.append([target, title(result), f"{part:.1%}", verdict(part >= 0.9)])
        for result in cases(efficiency):
            if device == "cuda" and "2048" in result["model"]:
                half = next(method for method in result["methods"] if method["method"] == "FSR")
                faster = speed_up(result["methods"][0], half)["median"]
                target = "GPU: Qwen2.5-VL at 2048 x 2048 faster with half of the tokens"
                rows.append([target, title(result), f"{faster:.2f}", verdict(faster > 1)])
        found = cases(efficiency)
        if found:
            exact = all(
                method["visual_kv_bytes"] * method["length"] == method["kv_bytes"] * method["visual_tokens"]
                and method["kv_bytes"] * result["methods"][0]["length"]
                == result["methods"][0]["kv_bytes"] * method["length"]
                for result in found
                for method in result["methods"]
            )
            target = f"{label}: KV cache of the visual tokens in proportion to their number"
            rows.append([target, f"all {len(found)} prompts", "exactly" if exact else "not exactly", verdict(exact)])
        for pool in efficiency.get("selection", []):
            times = {method["method"]: method["time"]["median"] for method in pool["methods"]}
            name = f"{pool['tokens']:,} → {pool['kept']:,}, batch of {pool['batch']}"
            peers = {peer: seconds for peer, seconds in times.items() if peer not in OURS}
            slower = [peer for peer, seconds in peers.items() if seconds < times["FSR"]]
            value = "faster than all" if not slower else f"slower than {', '.join(slower)}"
            rows.append([f"{label}: faster than every peer's selector", name, value, verdict(not slower)])
            if pool.get("own_products"):
                multiple = times["FSR"] / pool["own_products"]["median"]
                target = f"{label}: selection at most {OVER_PRODUCTS} times as long as its own matrix products"
                rows.append([target, name, f"{multiple:.2f}", verdict(multiple <= OVER_PRODUCTS)])
            limit = SELECTION_MS.get((pool["tokens"], pool["kept"]))
            if device == "cuda" and limit is not None and pool["batch"] == 1:
                value = f"{times['FSR'] * 1e3:.3f} ms"
                target = f"GPU: selection in at most {limit:g} ms (on an H200)"
                rows.append([target, name, value, verdict(times["FSR"] * 1e3 <= limit)])
    if not rows:
        return "*Nothing is measured yet.*"
    return markdown_table(["target", "measured on", "value", "met"], rows)


OURS = ("FSR", "FSR, one Focus token", "random", "products")


def smallest(result: dict[str, Any]) -> dict[str, Any]:
    """FSR at its smallest budget."""
    return min(
        (method for method in result["methods"] if method["method"] == "FSR"),
        key=lambda method: method["visual_tokens"],
    )


def verdict(is_met: bool) -> str:
    return "yes" if is_met else "**no**"


# ---------------------------------------------------------------------- plots


def plot_prefill(results: Path, device: str, file: Path) -> None:
    """Speed-up against kept tokens, a panel for each prompt."""
    import matplotlib.pyplot as plt

    found = cases(load(f"efficiency-{device}", results))
    if not found:
        return
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.3 * rows), squeeze=False)
    for panel in panels.flat[len(found) :]:
        panel.axis("off")
    for panel, result in zip(panels.flat, found):
        unpruned = result["methods"][0]
        by_name: dict[str, list[tuple[int, float, float, float]]] = {}
        for method in result["methods"][1:]:
            faster = speed_up(unpruned, method)
            point = (method["visual_tokens"], faster["median"], faster["low"], faster["high"])
            by_name.setdefault(method["method"], []).append(point)
            if method["method"] == "FSR":
                ratio = unpruned["flops"] / method["flops"]
                by_name.setdefault("ratio of FLOPs", []).append((method["visual_tokens"], ratio, ratio, ratio))
        for name, points in by_name.items():
            tokens, median, low, high = zip(*sorted(points))
            if name == "ratio of FLOPs":
                panel.plot(tokens, median, "--", color="grey", label=name)
                continue
            errors = [[m - l for m, l in zip(median, low)], [h - m for m, h in zip(median, high)]]
            style = {"FSR": "o-", "random": "s-"}.get(name, "x")
            panel.errorbar(tokens, median, yerr=errors, fmt=style, capsize=2, label=name, markersize=4)
        panel.axhline(1, color="black", linewidth=0.5)
        panel.set_title(title(result), fontsize=9)
        panel.set_xlabel("visual tokens kept")
        panel.set_ylabel("speed-up of the prefill")
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.09 if rows == 1 else 0.06, 1, 1))
    figure.savefig(file, dpi=80)
    plt.close(figure)


def plot_growth(results: Path, device: str, file: Path) -> None:
    """Time and memory, both axes in logarithms."""
    import matplotlib.pyplot as plt

    growth = load(f"growth-{device}", results)
    if not growth:
        return
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    for name, series in growth.items():
        sizes = [point[series["axis"]] for point in series["points"]]
        axis = "N" if series["axis"] == "tokens" else "K"
        times = [point["time"]["median"] * 1e3 for point in series["points"]]
        peaks = [(point["peak_bytes"] or 0) / 2**20 for point in series["points"]]
        for panel, values, field in zip(panels, (times, peaks), ("time_exponent", "memory_exponent")):
            if series[field] is not None:
                panel.loglog(sizes, values, "o-", markersize=4, label=f"{SERIES[name]}: {axis}^{series[field]:.2f}")
    for panel, label in zip(panels, ("ms", "MiB beyond the arguments")):
        panel.set_xlabel("tokens N (or K, where N is fixed)")
        panel.set_ylabel(label)
        panel.grid(which="both", alpha=0.2)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------------- the page

BLOCKS: dict[str, Callable[[Path], str]] = {
    "targets": targets_block,
    "paper": paper_block,
    "flops": flops_block,
    "checks-cuda": checks_block,
    **{
        f"{name}-{device}": partial(block, device=device)
        for name, block in (
            ("prefill", prefill_block),
            ("stages", stages_block),
            ("selection", selection_block),
            ("growth", growth_block),
        )
        for device in DEVICES
    },
}


def fill_blocks(text: str, results: Path = RESULTS) -> str:
    """The page with its blocks written anew."""
    return fill(text, {name: partial(block, results) for name, block in BLOCKS.items()})


def write_docs(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Write the tables of docs/efficiency.md and its plots anew."""
    page = docs / "efficiency.md"
    page.write_text(fill_blocks(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    for device in DEVICES:
        plot_prefill(results, device, docs / f"efficiency-{device}.webp")
        plot_growth(results, device, docs / f"growth-{device}.webp")
    print(f"{page} is written")
