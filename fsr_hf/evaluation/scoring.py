"""How good an answer is, from 0 to 1, by the usual rules of benchmarks about pictures."""

import re
import string


__all__ = ["METRICS", "VOTES", "anls", "contains", "exact", "normalize_answer", "score"]

# Answers from which on a list is that of people who were asked, as in VQAv2 and TextVQA, not of all that is right.
VOTES = 10

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
# Words whose apostrophe is often left out, where it is no other word without (such as "well", "its", "hell").
_NOT = ["ai", "are", "could", "did", "does", "do", "had", "has", "have", "is"]
_NOT += ["might", "must", "need", "should", "was", "were", "wo", "would"]
_WITH_APOSTROPHE = [
    *(f"{word}n't" for word in _NOT),
    *("can't", "i'm", "i've", "you're", "you've", "you'll", "he's", "she's", "they're", "they've", "they'll"),
    *("we've", "that's", "there's", "what's", "where's", "who's", "who've", "how's", "why's", "let's", "it'll"),
    *("could've", "should've", "would've", "might've", "must've", "somebody's", "someone's", "y'all", "o'clock"),
]
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHE}
_PUNCTUATION = re.compile("[" + re.escape("".join(c for c in string.punctuation if c not in "':.,")) + "]")


def normalize_answer(text: str) -> str:
    """
    The normalisation of the VQA evaluation (https://visualqa.org/evaluation.html): lower case; no full stop but in a
    decimal; "two" becomes "2"; no articles; "dont" becomes "don't"; a space for other punctuation but apostrophes and
    colons, and nothing for a comma between digits. An answer of which nothing would be left, such as the choice "A",
    keeps its articles.
    """
    text = " ".join(text.lower().split())
    plain = re.sub(r"\.(?!\d)", "", text)
    plain = re.sub(r"(?<=\d),(?=\d)", "", plain).replace(",", " ")
    plain = _PUNCTUATION.sub(" ", plain)
    words = [_DIGITS.get(word, _CONTRACTIONS.get(word, word)) for word in plain.split()]
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words) or text


def exact(prediction: str, answers: tuple[str, ...]) -> float:
    """
    1 if the normalised prediction is one of the answers. Of ten answers or more, which are then people's votes, the
    VQA accuracy: min(1, others who say so / 3), averaged over leaving one of the people out.
    """
    prediction = normalize_answer(prediction)
    matches = [normalize_answer(answer) == prediction for answer in answers]
    if len(answers) < VOTES:
        return float(any(matches))
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def contains(prediction: str, answers: tuple[str, ...]) -> float:
    """1 if the words of an answer stand in the prediction, one after the other; both normalised."""
    prediction = f" {normalize_answer(prediction)} "
    return float(any(f" {normalize_answer(answer)} " in prediction for answer in answers))


def anls(prediction: str, answers: tuple[str, ...]) -> float:
    """
    Average normalised Levenshtein similarity, of documents (arXiv 1905.13648): 1 - edits / length of the longer text,
    in lower case, for the closest answer; 0 from a half of wrong letters on.
    """
    prediction = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        answer = " ".join(answer.lower().split())
        distance = _edits(prediction, answer) / max(len(prediction), len(answer), 1)
        best = max(best, 1 - distance if distance < 0.5 else 0.0)
    return best


def _edits(first: str, second: str) -> int:
    """Letters to insert, delete or replace to get from one text to the other."""
    row = list(range(len(second) + 1))
    for number, letter in enumerate(first, start=1):
        diagonal, row[0] = row[0], number
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = min(above + 1, row[column - 1] + 1, diagonal + (letter != other))
            diagonal = above
    return row[-1]


METRICS = {"exact": exact, "contains": contains, "anls": anls}


def score(metric: str, prediction: str, answers: tuple[str, ...]) -> float:
    """A key of `METRICS`, applied."""
    return METRICS[metric](prediction, answers)
