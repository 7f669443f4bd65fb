"""
The tables and the plot of docs/quality.md, from the JSON of three runs: of the model that ships, of the same model
before the last stage of its training, which has seen whole pictures only, and of variants of FSR.

    python -m benchmarks.quality_page [RESULTS.json EARLIER.json ABLATIONS.json]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.pages import fill
from benchmarks.quality import LEAST_ACCURACY, METHODS, POSITIONS
from fsr_hf.hub.cards import markdown_table


__all__ = ["BLOCKS", "EARLIER_BLOCKS", "draw_plot", "main", "write_page"]

DOCS = Path(__file__).parents[1] / "docs"
EARLIER_RESULTS = Path(__file__).parent / "results" / "quality-earlier.json"
ABLATIONS = Path(__file__).parent / "results" / "quality-ablations.json"

# Of one method at one budget.
Row = dict[str, Any]


def write_page(
    result: dict[str, Any], earlier: dict[str, Any], ablations: dict[str, Any], page: Path = DOCS / "quality.md"
) -> None:
    """
    Write the generated parts of the page, and the plot beside it.

    Args:
        result: the run with the model that ships.
        earlier: the run with the model that has seen whole pictures only.
        ablations: the run of variants of FSR, with the model that ships.

    Raises:
        `ValueError`: if the page lacks a block, or has one that nothing fills.
    """
    blocks: dict[str, Callable[[], str]] = {name: partial(make, result) for name, make in BLOCKS.items()}
    blocks |= {f"earlier-{name}": partial(BLOCKS[name], earlier) for name in EARLIER_BLOCKS}
    blocks |= {name: partial(make, ablations) for name, make in ABLATION_BLOCKS.items()}
    text = fill(page.read_text(encoding="utf-8"), blocks)
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
        f"Where positions are not named they are `{result['positions']}`. "
        f"{result['machine']}, {result['threads']} threads; {versions}. The run took {_time(result['seconds'])}."
    )


def _accuracy(result) -> str:
    """A table for each way to number the positions."""

    def table(positions):
        def cell(row):
            return f"{row['positions'][positions]['accuracy']:.1%}"

        return f'With `positions="{positions}"`:\n\n{_by_budget(result, _names_of_table(result), cell)}'

    whole = next(row for row in result["results"] if row["method"] == "unpruned")
    interval = whole["interval"]
    unpruned = f"{whole['accuracy']:.1%} ± {(interval[1] - interval[0]) / 2 * 100:.1f}"
    return f"Unpruned, with all {result['num_tokens']} tokens: {unpruned}.\n\n" + "\n\n".join(map(table, POSITIONS))


def _positions(result) -> str:
    """What original positions gain over compact ones."""
    return _by_budget(
        result, _names_of_table(result), lambda row: _interval(row["positions"]["original"]["gain_over_compact"])
    )


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
    """Each with the positions that suit it best at that budget."""

    def cell(row):
        positions, best = max(row["positions"].items(), key=lambda item: item[1]["accuracy"])
        return f"{_interval(best['against_fsr'])} {positions[0]}"

    return _by_budget(result, [name for name in _names_of_table(result) if name != "fsr"], cell)


def _ablations(result) -> str:
    names = [name for name in _names(result) if name.startswith("fsr")]
    accuracy = _by_budget(result, names, lambda row: f"{row['accuracy']:.1%}")
    return f"{accuracy}\n\nLess the accuracy of FSR, in points:\n\n" + _by_budget(result, names[1:], _difference)


# Settings that change nothing about Focus.
_AFTER_FOCUS = {"kappa", "uniform_scan"}


def _focus(result) -> str:
    rows = {(row["method"], row["budget"]): row for row in result["results"]}
    budgets = _budgets(result)

    def cell(focus):
        shares = f"{focus['median']:.2f} ({focus['low']:.2f} to {focus['high']:.2f})"
        return f"{shares}, {focus['at_limit']:.0%}, {focus['scan_empty']:.0%}"

    def lines():
        for name in _names(result):
            method = METHODS[name]
            if method.has_focus and (
                name == "fsr" or method.reads != "values" or not method.settings.keys() <= _AFTER_FOCUS
            ):
                for given, words in (("with_query", "with"), ("without_query", "without")):
                    of_budget = [rows[name, budget]["focus"][given] for budget in budgets]
                    tokens = "" if name == "fsr-mass-budget" else f"{of_budget[0]['tokens']:.0f}"
                    yield [method.label, words, tokens, *map(cell, of_budget)]

    return markdown_table(["", "question", "tokens that hold ρ", *(f"K = {budget}" for budget in budgets)], lines())


def _recall(result) -> str:
    return _by_budget(result, _names(result), lambda row: _percent(row.get("object_recall")))


def _with_relevance(result) -> str:
    """Peers that were given FSR's relevance, and how far they are from FSR."""
    names = [name for name in _names(result) if name.endswith("-values")]
    return _by_budget(result, [*names, "fsr"], _accuracy_and_difference)


def _ablations_setup(result) -> str:
    return f"{len(result['seeds'])} × {result['questions']:,} questions, with original positions."


def _sign(result) -> str:
    words = {
        "question": "cosine to the question",
        "name": 'cosine to the object\'s name ("a red star")',
        "values": "cosine to the question, by values",
        "contrast": "the same, less that to a text without a word",
        "relevance": "the same, a mean over 3 × 3 patches: FSR's relevance",
        "saliency": "saliency ([CLS] attention)",
        "priority": "priority, with FSR's relevance",
        "priority-states": "priority, with the cosine to the question (the paper's formula)",
        "priority-negated": "priority, with that cosine negated",
    }
    of_all, of_objects = result["sign"]["all"]["auc"], result["sign"]["objects"]["auc"]

    def cells(area):
        low, high = area["interval"]
        return [f"{area['mean']:.3f} ({low:.3f} to {high:.3f})"]

    table = markdown_table(
        ["score", "against all other patches", "against patches of other objects"],
        ([words[name], *cells(of_all[name]), *cells(of_objects[name])] for name in words),
    )
    return (
        f"{table}\n\n{result['sign']['all']['questions']:,} questions name one object that covers a patch by half or "
        f"more, and in {result['sign']['objects']['questions']:,} of them another object does, too."
    )


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
    "positions": _positions,
    "against-fsr": _against_fsr,
    "with-relevance": _with_relevance,
    "kinds": _kinds,
    "sign": _sign,
    "pairs": _pairs,
    "recall": _recall,
}
ABLATION_BLOCKS = {"ablations-setup": _ablations_setup, "ablations": _ablations, "focus": _focus}
# Those that the page has for both models.
EARLIER_BLOCKS = ("setup", "accuracy", "retained", "positions", "against-fsr")


# ---------------------------------------------------------------- parts of them


def _names(result) -> list[str]:
    """Methods in the order of `METHODS`, without the unpruned model."""
    present = {row["method"] for row in result["results"]}
    return [name for name in METHODS if name in present and name != "unpruned"]


def _peers(result) -> list[str]:
    return [name for name in _names(result) if not name.startswith("fsr-") and not name.endswith("-values")]


def _names_of_table(result) -> list[str]:
    """All methods, and of FSR's variants the paper's and the one that was the default before."""
    return [*_peers(result), *(name for name in _names(result) if name in ("fsr-paper", "fsr-earlier"))]


def _budgets(result) -> list[int]:
    return sorted({row["budget"] for row in result["results"] if row["method"] != "unpruned"}, reverse=True)


def _by_budget(result, names: list[str], cell: Callable[[Row], str]) -> str:
    rows = {(row["method"], row["budget"]): row for row in result["results"]}
    budgets = _budgets(result)
    heads = ["", *(f"{budget} ({budget / result['num_tokens']:.1%})" for budget in budgets)]
    lines = [[METHODS[name].label, *(cell(rows[name, budget]) for budget in budgets)] for name in names]
    return markdown_table(heads, lines)


def _accuracy_and_difference(row: Row) -> str:
    return f"{row['accuracy']:.1%}" + ("" if row["method"] == "fsr" else f" ({_difference(row)})")


def _difference(row: Row) -> str:
    return _interval(row["against_fsr"])


def _interval(difference: dict[str, Any]) -> str:
    """In points; bold where the interval is on one side of 0."""
    low, high = difference["interval"]
    text = f"{difference['mean'] * 100:+.1f} ± {(high - low) / 2 * 100:.1f}"
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
    "idpruner": ("#e377c2", ">", "-"),
    "scope": ("#bcbd22", "d", "-"),
    "prunesid": ("#17408b", "*", "-"),
    "fsr-paper": ("#d62728", "o", ":"),
    "fsr-earlier": ("#d62728", ".", "--"),
    "fsr": ("#d62728", "o", "-"),
}


def draw_plot(result: dict[str, Any], file: Path) -> None:
    """Accuracy against the number of tokens kept, one line a method and a panel for each way to number positions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = _budgets(result)
    rows = {(row["method"], row["budget"]): row for row in result["results"]}
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    unpruned = rows["unpruned", result["num_tokens"]]["accuracy"]
    for positions, axes in zip(POSITIONS, panels):
        axes.axhline(100 * unpruned, color="black", linewidth=1, linestyle=(0, (6, 3)), label="Unpruned")
        for name in _names_of_table(result):
            color, marker, line = _STYLES[name]
            values = [100 * rows[name, budget]["positions"][positions]["accuracy"] for budget in budgets]
            width, layer = (2.6, 5) if name == "fsr" else (1.3, 3)
            axes.plot(
                budgets,
                values,
                line,
                color=color,
                marker=marker,
                linewidth=width,
                zorder=layer,
                label=METHODS[name].label,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.minorticks_off()
        axes.set_title(f"{positions} positions", fontsize="medium")
        axes.set_xlabel(f"visual tokens kept, of {result['num_tokens']}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("answers that are right, %")
    panels[1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_page", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=DOCS / "quality.json")
    parser.add_argument("earlier", nargs="?", type=Path, default=EARLIER_RESULTS)
    parser.add_argument("ablations", nargs="?", type=Path, default=ABLATIONS)
    options = parser.parse_args(arguments)
    files = (options.results, options.earlier, options.ablations)
    for file in files:
        if not file.is_file():
            parser.error(f"{file} is no file: give the JSON that `python -m benchmarks.quality` has written.")
    write_page(*(json.loads(file.read_text(encoding="utf-8")) for file in files))


if __name__ == "__main__":
    main()
