"""
What a sample of questions says about all of them: limits for what pruning changes, and whether a budget keeps enough.

Most questions are answered alike before and after pruning, and the few others decide. There the usual formulas, and
the bootstrap, are wrong in the dangerous direction: of 60 questions none of which got lost, they conclude that none
ever will. So a limit is found by a test that asks the opposite question: *if* exactly so much were kept, how often
would a sample look as good as this one? "So much" is represented by the distribution that keeps exactly so much and is
the most likely one given the answers, where one more outcome, the worst there is, may have any weight: with no loss
observed, it says that losses are just rare. Drawn from it, samples of the same size tell. For right and wrong answers
without gains this is the exact binomial test. tests/evaluation/test_intervals.py simulates how often it errs.

The unit is the picture: questions about one picture fail together, so their sum counts as one observation. For the
share that is kept, pictures of which nothing is right before and after say nothing, and do not count.
"""

from collections.abc import Sequence

import numpy as np


__all__ = ["CONFIDENCE", "chance", "change_limits", "kept_at_least", "smallest_sure"]

_DRAWS = 10_000
_STEPS = 14  # of bisection: to the fourth decimal
CONFIDENCE = 0.95


def chance(observed: np.ndarray, worst: float, draws: int = _DRAWS) -> float:
    """
    How likely a mean as large as that of `observed` is, if the true one is zero.

    Args:
        observed (`np.ndarray` of shape `(n,)`):
            Independent observations.
        worst (`float`):
            The least that an observation can be, below zero.
        draws (`int`, *optional*, defaults to 10,000):
            Samples to draw; always the same ones.
    """
    mean = observed.mean()
    if mean <= 0:
        return 1.0
    values, counts = np.unique(observed.round(9), return_counts=True)
    weights, rest = _most_likely(values, counts / len(observed), worst)
    rng = np.random.default_rng(0)
    samples = rng.multinomial(len(observed), np.append(weights, rest), size=draws)
    means = samples @ np.append(values, worst) / len(observed)
    return float((1 + (means >= mean - 1e-9).sum()) / (1 + draws))


def _most_likely(values: np.ndarray, shares: np.ndarray, worst: float) -> tuple[np.ndarray, float]:
    """
    Weights of `values` and of `worst` with mean zero that make the observed shares most likely (empirical likelihood):
    `shares / (1 + tilt · values)`, and nothing for `worst` unless the largest tilt is too small.
    """
    low, high = 0.0, -1.0 / worst
    for _ in range(60):
        tilt = (low + high) / 2
        if (shares * values / (1 + tilt * values)).sum() > 0:
            low = tilt
        else:
            high = tilt
    weights = shares / (1 + low * values)
    return weights / max(weights.sum(), 1.0), max(0.0, 1.0 - weights.sum())


def _lower_limit(
    top: np.ndarray, base: np.ndarray, pictures: Sequence[str], start: float, error: float, draws: int
) -> float:
    """
    The least `x` with which `E[top] = x · E[base]` is not refuted.

    Args:
        top, base (`np.ndarray` of shape `(questions,)`):
            `base` is at most 1, and `top` at least `start · base`.
        pictures (`Sequence[str]`):
            The picture of each question.
        start (`float`):
            Below it `x` cannot be.
        error (`float`):
            How often the limit may be too high.
        draws (`int`):
            As in [`chance`].
    """
    _, numbers = np.unique(np.asarray(pictures), return_inverse=True)
    top, base = np.bincount(numbers, weights=top), np.bincount(numbers, weights=base)
    largest = np.bincount(numbers).max()  # questions about one picture
    says_something = (top != 0) | (base != 0)  # wrong before and after fits any `x`, and how many are is chance alone
    top, base = top[says_something], base[says_something]
    low, high = start, float(top.sum() / base.sum())
    for _ in range(_STEPS if high > low else 0):
        middle = (low + high) / 2
        if chance(top - middle * base, (start - middle) * largest, draws) <= error:
            low = middle
        else:
            high = middle
    return low


def kept_at_least(
    unpruned: np.ndarray, pruned: np.ndarray, pictures: Sequence[str], draws: int = _DRAWS
) -> float | None:
    """
    The share of the unpruned score that is kept with 95 % confidence (one-sided).

    Args:
        unpruned, pruned (`np.ndarray` of shape `(questions,)`):
            Scores of the same questions, from 0 to 1.
        pictures (`Sequence[str]`):
            The picture of each question.
        draws (`int`, *optional*, defaults to 10,000):
            As in [`chance`].

    Returns:
        `float`, or `None` if nothing was right unpruned.
    """
    if not unpruned.sum():
        return None
    return _lower_limit(pruned, unpruned, pictures, 0.0, 1 - CONFIDENCE, draws)


def change_limits(
    unpruned: np.ndarray, pruned: np.ndarray, pictures: Sequence[str], draws: int = _DRAWS
) -> tuple[float, float]:
    """The 95 % interval of the change of the mean score, paired on the questions; arguments as [`kept_at_least`]."""
    change, ones, error = pruned - unpruned, np.ones(len(unpruned)), (1 - CONFIDENCE) / 2
    low = _lower_limit(change, ones, pictures, -1.0, error, draws)
    return low, -_lower_limit(-change, ones, pictures, -1.0, error, draws)


def smallest_sure(at_least: Sequence[float | None], keep: float) -> int | None:
    """
    The number of the last budget, from the largest to the smallest, up to which all keep `keep`; `None` if the first
    one does not.

    Each test comes only if those before it have passed, so that the chance that a budget is chosen wrongly is 5 % all
    in all, however many budgets there are. (With each tested by itself, one in many would pass by luck.)
    """
    passed = None
    for number, share in enumerate(at_least):
        if share is None or share < keep:
            break
        passed = number
    return passed
