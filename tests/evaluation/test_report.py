"""The report of `fsr-hf eval`, from records that are written by hand."""

from pathlib import Path

import pytest

from fsr_hf.evaluation.questions import Question
from fsr_hf.evaluation.report import build_report, format_report, questions_of


SETTINGS = {
    "model": "a-model",
    "dtype": "float32",
    "machine": "a machine",
    "device": "cpu",
    "versions": {"torch": "2"},
}


def report_of(right: dict[str, list[int]], tokens: dict[str, list[int]], keep: float = 0.98, answers=("yes",)):
    """A report on one question a batch; `right` says at which budget which answer is right."""
    number = len(right["unpruned"])
    questions = [Question(f"line {row}", "?", answers, str(row), video=Path(str(row))) for row in range(number)]
    records = {
        (row, label): {
            "answers": ["yes" if right[label][row] else "no"],
            "visual_tokens": [tokens[label][row]],
            "prompt_tokens": [tokens[label][row] + 10],
            "prefill": 0.2 if label == "unpruned" else 0.1,
            "decode": None if row else 0.01,
        }
        for label in right
        for row in range(number)
    }
    found = questions_of(questions, [[question] for question in questions], records, list(right), "exact")
    report = build_report(found, SETTINGS, "exact", keep, 1)
    return report, "\n".join(format_report(report))


def test_what_was_never_pruned_keeps_everything_for_sure():
    """Ten questions are too few for any other budget, and the largest must not stand in the way of the others."""
    right = {"unpruned": [1] * 9 + [0], "8": [1] * 9 + [0], "16": [1] * 9 + [0]}
    report, text = report_of(right, {"unpruned": [16] * 10, "16": [16] * 10, "8": [8] * 10})
    unpruned, largest, smaller = report["methods"]
    assert [method["budget"] for method in report["methods"]] == ["unpruned", "16", "8"]  # by tokens
    assert largest["kept_at_least"] == 1 and (largest["change_low"], largest["change_high"]) == (0, 0)
    assert smaller["kept"] == 1 and smaller["kept_at_least"] < 0.8
    assert report["smallest_budget"] == "16" and "95 % confidence: 16." in text
    assert "16: 10 of 10 questions" in text and "8: " not in text
    assert (unpruned["score"], unpruned["prompt_tokens"], smaller["prompt_tokens"]) == (pytest.approx(0.9), 26, 18)
    assert smaller["prefill"] == 0.1 and smaller["prefill_speed_up"] == 2
    assert smaller["decode"] == 0.01  # of the one batch that has more than a token


def test_too_few_questions_and_too_small_budgets_are_told_apart():
    right = {"unpruned": [1] * 40, "8": [1] * 40, "4": [0] * 20 + [1] * 20}
    tokens = {"unpruned": [16] * 40, "8": [16] * 5 + [8] * 35, "4": [4] * 40}
    report, text = report_of(right, tokens)
    assert report["smallest_budget"] is None
    assert "The nearest is 8: on these questions it does, but they are too few" in text.replace("\n", " ")
    assert "8: 5 of 40 questions" in text
    del right["8"], tokens["8"]
    _, text = report_of(right, tokens)
    assert "The nearest is 4: it keeps less" in text.replace("\n", " ")


def test_a_model_that_knows_nothing():
    report, text = report_of({"unpruned": [0] * 5, "8": [1] * 5}, {"unpruned": [16] * 5, "8": [8] * 5})
    assert report["methods"][1]["kept"] is None and report["smallest_budget"] is None
    assert "no answer is right" in text and "--instruction" in text


def test_votes_are_named():
    _, text = report_of({"unpruned": [1], "8": [1]}, {"unpruned": [16], "8": [8]}, answers=("yes",) * 10)
    assert "1 questions have ten answers or more" in text.replace("\n", " ")
