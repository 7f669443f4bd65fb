"""Scores of answers: cases worked out by hand from the published rules."""

import pytest

from fsr_hf.evaluation.scoring import anls, contains, exact, normalize_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red Bus.", "red bus"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("100,978", "100978"),
        ("red, blue", "red blue"),
        ("well-done", "well done"),
        ("2:50 PM", "2:50 pm"),
        ("the girl's hat", "girl's hat"),
        ("dont know", "don't know"),
        ("its well", "its well"),  # other words without an apostrophe stay
        ("A", "a"),  # a choice, not an article
        ("A.", "a"),
        ("?", "?"),
        ("  yes\nsir ", "yes sir"),
        ("", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalize_answer(text) == expected


def test_exact_takes_any_of_a_few_answers():
    assert exact("The Cat.", ("dog", "cat")) == 1.0
    assert exact("cats", ("dog", "cat")) == 0.0
    assert exact("B", ("A",)) == 0.0 and exact("a", ("A",)) == 1.0


@pytest.mark.parametrize(("votes", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_answers_are_votes(votes, expected):
    """Leaving one person out at a time: of 2 who agree, 2 people leave 1 (1/3), 8 leave 2 (2/3): 0.6."""
    assert exact("cat", ("a cat",) * votes + ("dog",) * (10 - votes)) == pytest.approx(expected)


def test_contains_whole_words():
    assert contains("It is a red star.", ("red star",)) == 1.0
    assert contains("It is a star", ("red star", "star")) == 1.0
    assert contains("starfish", ("star",)) == 0.0
    assert contains("There are 12 of them", ("two",)) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("kitten", ("sitting",), 1 - 3 / 7),  # the textbook's distance of 3
        ("Invoice 42", ("invoice 42",), 1.0),
        ("abcd", ("abxy",), 0.0),  # half of it is wrong
        ("abcde", ("abcxy", "abcdx"), 0.8),
        ("", ("a",), 0.0),
    ],
)
def test_anls(prediction, answers, expected):
    assert anls(prediction, answers) == pytest.approx(expected)
