"""
The statistics of `fsr-hf eval`: against exact computations where there are any, else by simulating how often they err.
The simulations draw from a fixed seed; bounds leave room for 3 standard errors of them.
"""

import math

import numpy as np
import pytest

from fsr_hf.evaluation.intervals import chance, change_limits, kept_at_least, smallest_sure


def outcomes(both: int, gained: int, lost: int, neither: int):
    """Scores of questions, unpruned and pruned, by what becomes of them."""
    counts = [both, gained, lost, neither]
    return np.repeat([1.0, 0.0, 1.0, 0.0], counts), np.repeat([1.0, 1.0, 0.0, 0.0], counts)


def binomial_tail(number: int, at_most: int, rate: float) -> float:
    return sum(math.comb(number, k) * rate**k * (1 - rate) ** (number - k) for k in range(at_most + 1))


def exact_lower_bound(number: int, lost: int) -> float:
    """Clopper and Pearson's: the share of kept answers below which so few losses have a chance under 5 %."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_tail(number, lost, 1 - middle) < 0.05 else (low, middle)
    return low


@pytest.mark.parametrize(
    ("number", "lost", "neither"), [(60, 0, 0), (60, 0, 40), (148, 0, 300), (200, 1, 0), (300, 6, 100), (500, 40, 0)]
)
def test_losses_alone_give_the_exact_binomial_bound(number, lost, neither):
    """Questions that are wrong before and after make it neither higher nor lower."""
    unpruned, pruned = outcomes(number - lost, 0, lost, neither)
    bound = kept_at_least(unpruned, pruned, range(number + neither))
    assert bound == pytest.approx(exact_lower_bound(number, lost), abs=0.003)


def test_few_questions_prove_nothing():
    """Of 100 questions none is lost, which is as likely as not if 0.7 % are: 98 % kept is not sure, 97 % is."""
    unpruned, pruned = outcomes(100, 0, 0, 0)
    bound = kept_at_least(unpruned, pruned, range(100))
    assert 0.969 < bound < 0.972
    low, high = change_limits(unpruned, pruned, range(100))
    assert -0.04 < low < -0.03 and 0.03 < high < 0.04


def test_many_questions_agree_with_the_normal_approximation():
    both, gained, lost, neither = 2000, 300, 400, 1300
    unpruned, pruned = outcomes(both, gained, lost, neither)
    low, high = change_limits(unpruned, pruned, range(4000))
    mean, error = -100 / 4000, math.sqrt((700 / 4000 - (100 / 4000) ** 2) / 4000)
    assert (low, high) == (
        pytest.approx(mean - 1.96 * error, abs=0.001),
        pytest.approx(mean + 1.96 * error, abs=0.001),
    )


def test_limits_of_the_extremes():
    ones, zeros = np.ones(50), np.zeros(50)
    assert kept_at_least(ones, zeros, range(50)) == 0.0
    assert kept_at_least(zeros, ones, range(50)) is None
    assert change_limits(ones, zeros, range(50))[0] == -1.0
    assert change_limits(zeros, ones, range(50))[1] == 1.0


def test_questions_about_one_picture_are_one_observation():
    """Ten questions about each of 100 pictures, lost or kept together, prove as little as 100 questions."""
    unpruned, pruned = outcomes(98, 0, 2, 0)
    alone = kept_at_least(unpruned, pruned, range(100))
    pictures = np.repeat(np.arange(100), 10)
    together = kept_at_least(unpruned.repeat(10), pruned.repeat(10), pictures)
    assert together == pytest.approx(alone, abs=0.003)
    assert kept_at_least(unpruned.repeat(10), pruned.repeat(10), range(1000)) > alone + 0.01


# Shares of right answers that stay and of wrong ones that become right; the rest keeps exactly `keep` of the score.
@pytest.mark.parametrize(
    ("number", "both", "gained", "keep"),
    [
        (100, 0.9, 0.0, 0.9),
        (150, 0.97, 0.0, 0.98),
        (150, 0.6, 0.05, 0.98),
        (400, 0.85, 0.02, 0.98),
        (400, 0.3, 0.02, 0.9),
    ],
)
def test_a_budget_that_just_keeps_enough_is_called_sure_in_one_of_twenty_samples(number, both, gained, keep):
    lost = ((1 - keep) * both + gained) / keep
    rng, trials = np.random.default_rng(0), 1000
    wrong = 0
    for _ in range(trials):
        counts = rng.multinomial(number, [both, gained, lost, max(0.0, 1 - both - gained - lost)])
        unpruned, pruned = outcomes(*counts)
        wrong += chance(pruned - keep * unpruned, -keep, draws=1000) <= 0.05
    assert wrong / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_scores_between_zero_and_one():
    """VQA accuracies, whose loss is rarely whole: wrong in one of twenty samples, and right where it can be."""
    keep, rng, trials = 0.95, np.random.default_rng(0), 300
    sure = {keep: 0, 0.99: 0}
    for true in sure:
        for _ in range(trials):
            unpruned = rng.choice([0.0, 0.3, 0.6, 1.0], size=300, p=[0.2, 0.1, 0.1, 0.6])
            is_lost = rng.random(300) < (1 - true) / (1 - 0.3)  # what is lost keeps 0.3 of its score
            pruned = np.where(is_lost, 0.3 * unpruned, unpruned)
            sure[true] += chance(pruned - keep * unpruned, -keep, draws=1000) <= 0.05
    assert sure[keep] / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert sure[0.99] / trials > 0.9


def test_the_choice_among_budgets_errs_in_one_of_twenty():
    """All but the first budget keep less than is asked for; tested one by one, some pass far more often."""
    keep, rng, trials, number = 0.95, np.random.default_rng(0), 300, 400
    wrong = one_by_one = 0
    for _ in range(trials):
        sure = []
        for true in (1.0, *[0.949] * 9):
            lost = rng.binomial(number, 1 - true)
            unpruned, pruned = outcomes(number - lost, 0, lost, 0)
            is_sure = chance(pruned - keep * unpruned, -keep, draws=1000) <= 0.05
            sure.append(keep if is_sure else 0.0)
        wrong += smallest_sure(sure, keep) not in (None, 0)
        one_by_one += keep in sure[1:]
    assert wrong / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials) < one_by_one / trials


def test_the_smallest_budget_comes_before_the_first_that_fails():
    assert smallest_sure([1.0, 0.99, 0.97, 0.99], 0.98) == 1
    assert smallest_sure([0.97, 1.0], 0.98) is None
    assert smallest_sure([None], 0.98) is None and smallest_sure([], 0.98) is None
    assert smallest_sure([1.0, 0.98], 0.98) == 1
