"""
The tables and the plot of docs/quality.md, from the JSON of a run, by default docs/quality.json.

    python -m benchmarks.quality_page [RESULTS.json]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pages import fill
from benchmarks.quality import LEAST_ACCURACY, METHODS
from fsr_hf.hub.cards import markdown_table


__all__ = ["BLOCKS", "draw_plot", "main", "write_page"]

DOCS = Path(__file__).parents[1] / "docs"

# Of one method at one budget.
Row = dict[str, Any]


def write_page(result: dict[str, Any], page: Path = DOCS / "quality.md") -> None:
    """
    Write the generated parts of the page, and the plot beside it.

    Raises:
        `ValueError`: if the page lacks a block, or has one that nothing fills.
    """
    text = fill(page.read_text(encoding="utf-8"), {name: partial(make, result) for name, make in BLOCKS.items()})
    draw_plot(result, page.with_suffix(".webp"))
    page.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- blocks


def _setup(result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    seeds = ", ".join(map(str, result["seeds"]))
    return (
        f"{len(result['seeds'])} × {result['questions']:,} questions (by seed: {seeds}), "
        f"{result['num_tokens']} visual tokens a picture. Model: `{result['model']}`, "
        f"{result['num_parameters'] / 1e6:.1f} M weights in {result['dtype']}. `generate()` from pixels gives the "
        f"same verdict on {result['checked']['agree']} of {result['checked']['answers']} answers asked both ways. "
        f"{result['machine']}, {result['threads']} threads; {versions}. The run took {_time(result['seconds'])}."
    )


def _accuracy(result) -> str:
    def cell(row):
        interval = row["interval"]
        return f"{row['accuracy']:.1%} ± {(interval[1] - interval[0]) / 2 * 100:.1f}"

    return _by_budget(result, _peers(result), cell, unpruned=True)


def _retained(result) -> str:
    measured = list(result["results"][0]["retained_by_kind"])
    table = _by_budget(
        result, _peers(result), lambda row: _percent(sum(row["retained_by_kind"].values()), len(measured))
    )
    words = f"The mean over {', '.join(measured) or 'no kind'}."
    if result["left_out"]:
        names = ", ".join(f"{kind} ({accuracy:.1%})" for kind, accuracy in result["left_out"].items())
        words += f" Left out, because the unpruned model is right less than {LEAST_ACCURACY:.0%} of the time: {names}."
    return f"{table}\n\n{words}"


def _kinds(result) -> str:
    """Accuracy by kind at the budget nearest to a ninth of the tokens, the strongest one that the paper reports."""
    budgets = _budgets(result)
    budget = min(budgets, key=lambda budget: abs(budget - result["num_tokens"] / 9))
    rows = [row for row in result["results"] if row["budget"] == budget or row["method"] == "unpruned"]
    kinds = list(rows[0]["by_kind"])
    return f"With {budget} of {result['num_tokens']} tokens.\n\n" + markdown_table(
        ["", *kinds, "all"],
        (
            [
                METHODS[row["method"]].label,
                *(f"{row['by_kind'][kind]:.1%}" for kind in kinds),
                f"{row['accuracy']:.1%}",
            ]
            for row in rows
            if row["method"] in ["unpruned", *_peers(result)]
        ),
    )


def _against_fsr(result) -> str:
    return _by_budget(result, [name for name in _peers(result) if name != "fsr"], _difference)


def _ablations(result) -> str:
    names = [name for name in _names(result) if name.startswith("fsr")]
    accuracy = _by_budget(result, names, lambda row: f"{row['accuracy']:.1%}")
    return f"{accuracy}\n\nLess the accuracy of FSR, in points:\n\n" + _by_budget(result, names[1:], _difference)


def _focus(result) -> str:
    rows = {(row["method"], row["budget"]): row for row in result["results"]}
    budgets = _budgets(result)

    def cell(focus):
        return f"{focus['median']:.2f} ({focus['low']:.2f} to {focus['high']:.2f}), {focus['scan_empty']:.0%}"

    def lines():
        for name in _names(result):
            method = METHODS[name]
            # Refine, and where it works, change nothing about Focus.
            if method.has_focus and (name == "fsr" or method.literal or not method.settings.keys() <= {"kappa"}):
                for given, words in (("with_query", "with"), ("without_query", "without")):
                    of_budget = [rows[name, budget]["focus"][given] for budget in budgets]
                    tokens = "" if name == "fsr-mass-budget" else f"{of_budget[0]['tokens']:.0f}"
                    yield [method.label, words, tokens, *map(cell, of_budget)]

    return markdown_table(["", "question", "tokens that hold ρ", *(f"K = {budget}" for budget in budgets)], lines())


def _recall(result) -> str:
    return _by_budget(result, _names(result), lambda row: _percent(row.get("object_recall")))


def _sign(result) -> str:
    words = {
        "question": "cosine to the question",
        "name": 'cosine to the object\'s name ("a red star")',
        "saliency": "saliency ([CLS] attention)",
        "priority": "priority, relevance inverted (the default)",
        "priority-literal": "priority, relevance not inverted (the paper's formula)",
    }
    areas = result["sign"]["auc"]
    kinds = list(areas["question"]["by_kind"])
    table = markdown_table(
        ["score", "AUC", "95 % interval", *kinds],
        (
            [
                words[name],
                f"{area['mean']:.3f}",
                "{:.3f} to {:.3f}".format(*area["interval"]),
                *(f"{area['by_kind'][kind]:.3f}" for kind in kinds),
            ]
            for name, area in areas.items()
        ),
    )
    return f"{table}\n\n{result['sign']['questions']:,} questions name one object that covers a patch by half or more."


def _pairs(result) -> str:
    words = {"held_out": "in no caption that CLIP was trained on", "others": "all others"}
    return markdown_table(
        ["pair of shape and colour", "questions", "right, unpruned", "AUC of the cosine to its name"],
        (
            [words[name], f"{pairs['questions']:,}", _percent(pairs["accuracy"]), _decimals(pairs["auc"])]
            for name, pairs in result["pairs"].items()
        ),
    )


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "setup": _setup,
    "accuracy": _accuracy,
    "retained": _retained,
    "against-fsr": _against_fsr,
    "kinds": _kinds,
    "sign": _sign,
    "pairs": _pairs,
    "ablations": _ablations,
    "focus": _focus,
    "recall": _recall,
}


# ---------------------------------------------------------------- parts of them


def _names(result) -> list[str]:
    """Methods in the order of `METHODS`, without the unpruned model."""
    present = {row["method"] for row in result["results"]}
    return [name for name in METHODS if name in present and name != "unpruned"]


def _peers(result) -> list[str]:
    return [name for name in _names(result) if not name.startswith("fsr-")]


def _budgets(result) -> list[int]:
    return sorted({row["budget"] for row in result["results"] if row["method"] != "unpruned"}, reverse=True)


def _by_budget(result, names: list[str], cell: Callable[[Row], str], unpruned: bool = False) -> str:
    rows = {(row["method"], row["budget"]): row for row in result["results"]}
    budgets = _budgets(result)
    heads = ["", *(f"{budget} ({budget / result['num_tokens']:.1%})" for budget in budgets)]
    lines = [[METHODS[name].label, *(cell(rows[name, budget]) for budget in budgets)] for name in names]
    if unpruned:
        whole = cell(rows["unpruned", result["num_tokens"]])
        lines.insert(
            0, [METHODS["unpruned"].label, f"{whole} (all {result['num_tokens']})", *[""] * (len(budgets) - 1)]
        )
    return markdown_table(heads, lines)


def _difference(row: Row) -> str:
    """Bold where the interval is on one side of 0."""
    low, high = row["against_fsr"]["interval"]
    text = f"{row['against_fsr']['mean'] * 100:+.1f} ± {(high - low) / 2 * 100:.1f}"
    return f"**{text}**" if low > 0 or high < 0 else text


def _percent(value: float | None, count: int = 1) -> str:
    return "" if value is None or count == 0 else f"{value / count:.1%}"


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


# ---------------------------------------------------------------- plot

# Method: colour, marker and line; FSR stands out.
_STYLES = {
    "random": ("#9a9a9a", "x", ":"),
    "uniform": ("#9a9a9a", "+", "--"),
    "cls": ("#1f77b4", "v", "-"),
    "vispruner": ("#17a2a8", "^", "-"),
    "visionzip": ("#8c6bb1", "D", "-"),
    "divprune": ("#2ca02c", "s", "-"),
    "cdpruner": ("#ff7f0e", "P", "-"),
    "holov": ("#8c564b", "<", "-"),
    "fsr": ("#d62728", "o", "-"),
}


def draw_plot(result: dict[str, Any], file: Path) -> None:
    """Accuracy against the number of tokens kept, one line a method, with the intervals of FSR."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = _budgets(result)
    rows = {(row["method"], row["budget"]): row for row in result["results"]}
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    unpruned = rows["unpruned", result["num_tokens"]]["accuracy"]
    axes.axhline(100 * unpruned, color="black", linewidth=1, linestyle=(0, (6, 3)), label="Unpruned")
    for name in _peers(result):
        color, marker, line = _STYLES[name]
        values = [100 * rows[name, budget]["accuracy"] for budget in budgets]
        width, layer = (2.6, 5) if name == "fsr" else (1.4, 3)
        axes.plot(
            budgets, values, line, color=color, marker=marker, linewidth=width, zorder=layer, label=METHODS[name].label
        )
        if name == "fsr":
            low, high = ([100 * rows[name, budget]["interval"][side] for budget in budgets] for side in (0, 1))
            axes.fill_between(budgets, low, high, color=color, alpha=0.15, linewidth=0, zorder=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set_xlabel(f"visual tokens kept, of {result['num_tokens']}")
    axes.set_ylabel("answers that are right, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_page", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=DOCS / "quality.json")
    options = parser.parse_args(arguments)
    if not options.results.is_file():
        parser.error(f"{options.results} is no file: give the JSON that `python -m benchmarks.quality` has written.")
    write_page(json.loads(options.results.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
