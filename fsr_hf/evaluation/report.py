"""What `fsr-hf eval` has found: numbers, a table, a plot."""

import os
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .answering import UNPRUNED
from .intervals import CONFIDENCE, change_limits, kept_at_least, smallest_sure
from .questions import Question
from .scoring import VOTES, score


__all__ = ["build_report", "format_report", "plot_report", "questions_of"]

_WIDTH = 110


def questions_of(
    questions: Sequence[Question],
    batches: Sequence[Sequence[Question]],
    records: dict[tuple[int, str], dict[str, Any]],
    labels: Sequence[str],
    metric: str,
) -> dict[str, Any]:
    """
    The records of a run, question by question.

    Returns:
        `labels`: those of the methods, unpruned first, then from the most visual tokens to the least.
        `questions`: for each question what was asked, and answer, score and tokens of each method.
        `times`: for each method `prefill` and `decode`, one for each batch.
    """
    entries: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        for place, question in enumerate(batch):
            methods = {}
            for label in labels:
                record = records[number, label]
                said = record["answers"][place]
                methods[label] = {
                    "answer": said,
                    "score": score(metric, said, question.answers),
                    "visual_tokens": record["visual_tokens"][place],
                    "prompt_tokens": record["prompt_tokens"][place],
                }
            entries.append(
                {
                    "place": question.place,
                    "visual": question.visual,
                    "question": question.text,
                    "answers": list(question.answers),
                    "methods": methods,
                }
            )

    def tokens(label: str) -> int:
        return sum(entry["methods"][label]["visual_tokens"] for entry in entries)

    full = [number for number, batch in enumerate(batches) if len(batch) == len(batches[0])]
    return {
        "labels": [UNPRUNED, *sorted((label for label in labels if label != UNPRUNED), key=tokens, reverse=True)],
        "questions": entries,
        "times": {
            label: {name: [records[number, label][name] for number in full] for name in ("prefill", "decode")}
            for label in labels
        },
    }


def build_report(
    answers: dict[str, Any], settings: dict[str, Any], metric: str, keep: float, batch_size: int
) -> dict[str, Any]:
    """All numbers of a run, which JSON can hold. Times are in seconds and medians, of batches of one size."""
    entries, times = answers["questions"], answers["times"]
    pictures = [entry["visual"] for entry in entries]
    scores, tokens = {}, {}
    for label in answers["labels"]:
        scores[label] = np.array([entry["methods"][label]["score"] for entry in entries])
        tokens[label] = np.array([entry["methods"][label]["visual_tokens"] for entry in entries])
    methods = []
    for label in answers["labels"]:
        method: dict[str, Any] = {
            "budget": label,
            "visual_tokens": float(tokens[label].mean()),
            "prompt_tokens": statistics.mean(entry["methods"][label]["prompt_tokens"] for entry in entries),
            "score": float(scores[label].mean()),
        }
        for name in ("prefill", "decode"):
            pairs = [
                (mine, other)
                for mine, other in zip(times[label][name], times[UNPRUNED][name])
                if mine is not None and other is not None
            ]
            method[name] = statistics.median(mine for mine, _ in pairs) if pairs else None
            method[f"{name}_speed_up"] = statistics.median(other / mine for mine, other in pairs) if pairs else None
        if label != UNPRUNED:
            unpruned = scores[UNPRUNED]
            method["change"] = method["score"] - float(unpruned.mean())
            method["kept"] = method["score"] / float(unpruned.mean()) if unpruned.sum() else None
            method["not_pruned"] = int((tokens[label] == tokens[UNPRUNED]).sum())
            if method["not_pruned"] < len(entries):
                method["change_low"], method["change_high"] = change_limits(unpruned, scores[label], pictures)
                method["kept_at_least"] = kept_at_least(unpruned, scores[label], pictures)
            else:  # the same computation: no matter of chance
                method["change_low"] = method["change_high"] = 0.0
                method["kept_at_least"] = method["kept"]
        methods.append(method)
    chosen = smallest_sure([method["kept_at_least"] for method in methods[1:]], keep)
    return {
        "settings": settings,
        "questions": len(entries),
        "pictures": len(set(pictures)),
        "votes": sum(len(entry["answers"]) >= VOTES for entry in entries) if metric == "exact" else 0,
        "metric": metric,
        "keep": keep,
        "batch_size": batch_size,
        "methods": methods,
        "smallest_budget": None if chosen is None else methods[1 + chosen]["budget"],
    }


def format_report(report: dict[str, Any]) -> Iterator[str]:
    """The report in lines: a table, and what it says."""
    settings, methods = report["settings"], report["methods"]
    number, pictures = report["questions"], report["pictures"]
    yield ""
    yield (
        f"{settings['model']} in {settings['dtype']}: {number:,} questions about {pictures:,} images or videos, "
        f"score: {report['metric']}"
    )
    yield ""
    heads = ["budget", "tokens", "score", "change, 95 %", "kept", "surely kept", "prefill ms", "", "decode ms", ""]
    widths = [10, 9, 8, 18, 9, 13, 12, 8, 11, 8]
    yield _row(heads, widths)
    for method in methods:
        is_pruned = method["budget"] != UNPRUNED
        change = f"{method['change_low'] * 100:+.1f} to {method['change_high'] * 100:+.1f}" if is_pruned else ""
        row = [
            method["budget"],
            f"{method['visual_tokens']:,.0f}",
            f"{method['score']:.1%}",
            change,
            _share(method["kept"]) if is_pruned else "",
            _share(method["kept_at_least"]) if is_pruned else "",
        ]
        for name in ("prefill", "decode"):
            seconds = method[name]
            row += ["-" if seconds is None else f"{seconds * 1e3:,.1f}"]
            row += [f"{method[f'{name}_speed_up']:.2f}x" if is_pruned and seconds is not None else ""]
        yield _row(row, widths)
    yield ""
    for note in _notes(report):
        yield from textwrap.wrap(note, _WIDTH)


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"{cells[0]:<{widths[0]}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:]))


def _notes(report: dict[str, Any]) -> Iterator[str]:
    keep, chosen = report["keep"], report["smallest_budget"]
    unpruned, *pruned = report["methods"]
    share = f"{keep * 100:.4g} %"
    if not unpruned["score"]:
        yield (
            "Unpruned, no answer is right, so that there is nothing to keep: see what is said in answers.jsonl. An "
            "--instruction such as 'Answer in a single word.' or another --metric may help."
        )
    elif chosen is not None:
        yield f"Smallest budget that keeps {share} of the unpruned score with 95 % confidence: {chosen}."
    else:
        best = max(pruned, key=lambda method: method["kept_at_least"])
        reason = "it keeps less"
        if best["kept"] >= keep:
            reason = "on these questions it does, but they are too few to be sure"
        yield (
            f"No budget keeps {share} of the unpruned score with 95 % confidence. The nearest is {best['budget']}: "
            f"{reason}."
        )
    for method in pruned:
        if method["not_pruned"]:
            yield (
                f"{method['budget']}: {method['not_pruned']:,} of {report['questions']:,} questions have no more "
                "visual tokens than that, and ran unpruned."
            )
    if report["votes"]:
        yield f"{report['votes']:,} questions have ten answers or more: people's votes, scored by VQA accuracy."
    yield (
        "Tokens: visual ones that the language model saw of a question, on average. Change: points, and kept: share "
        f"of the unpruned score; both paired on the questions. Surely kept: with {CONFIDENCE:.0%} confidence. "
        f"Prefill: from the call to the first new token, for {report['batch_size']} question"
        f"{'s' if report['batch_size'] > 1 else ''}; decode: for each token after it. Medians, and speed-ups in pairs."
    )
    settings = report["settings"]
    versions = ", ".join(f"{package} {version}" for package, version in settings["versions"].items())
    yield f"{settings['machine']}, on {settings['device']}; {versions}."


def plot_report(report: dict[str, Any], file: str | os.PathLike) -> None:
    """
    Score and prefill over visual tokens.

    Raises:
        `ImportError`: without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    unpruned, *pruned = report["methods"]
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [method["visual_tokens"] for method in pruned]
    low = [method["change"] - method["change_low"] for method in pruned]
    high = [method["change_high"] - method["change"] for method in pruned]
    left.axhline(unpruned["score"], color="0.3", label=f"unpruned, {unpruned['visual_tokens']:,.0f} tokens")
    kept = report["keep"] * unpruned["score"]
    left.axhline(kept, color="0.3", linestyle=":", label=f"{report['keep'] * 100:.4g} % of it")
    style = {"marker": "o", "color": "tab:blue"}
    left.errorbar(x, [method["score"] for method in pruned], yerr=[low, high], capsize=3, label="FSR", **style)
    figure.legend(loc="outside lower center", ncols=3)
    left.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    left.set_ylabel(f"score ({report['metric']}), 95 % interval of the change")
    right.axhline(unpruned["prefill"] * 1e3, color="0.3")
    right.plot(x, [method["prefill"] * 1e3 for method in pruned], **style)
    right.set_ylim(bottom=0)
    right.set_ylabel("prefill, ms")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted(set(x))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("visual tokens that the language model saw")
    figure.suptitle(f"{report['settings']['model']}, {report['questions']:,} questions")
    figure.savefig(file, dpi=150)
