"""Significance against the binomial sum written out and Holm's adjusted p-values."""

import math

import numpy as np
import pytest

from seal_jax import UsageError
from seal_jax.evaluation import significance


def test_p_values_are_binomial_tails_and_ties_count_for_neither():
    random = np.random.default_rng(0)
    scores = random.integers(0, 4, (20, 3)) + np.array([0, 1, 0])
    found = significance.compare(("a", "b", "c"), scores.astype(float))
    for row in range(3):
        for column in range(3):
            wins = sum(scores[:, column] > scores[:, row])
            trials = wins + sum(scores[:, column] < scores[:, row])
            assert found.wins[row, column] == wins
            if row == column:
                assert not found.significant[row, column]
                continue
            tail = sum(math.comb(trials, k) for k in range(wins, trials + 1)) / 2**trials
            assert found.p_values[row, column] == pytest.approx(tail)
            assert found.significant[row, column] == (tail <= 0.05)
    assert found.significant[0, 1]
    assert found.as_text().splitlines()[1].split()[0] == "a"


def test_holm_equals_adjusted_p_values():
    """Rejected where the running maximum of (n - rank) p is within the level."""
    random = np.random.default_rng(1)
    for _ in range(50):
        p_values = random.uniform(0, 0.2, 8) ** 2
        order = np.argsort(p_values)
        adjusted = np.empty(8)
        adjusted[order] = np.maximum.accumulate((8 - np.arange(8)) * p_values[order])
        np.testing.assert_array_equal(significance.holm(p_values), adjusted <= 0.05)


def test_bad_input():
    with pytest.raises(UsageError, match=r"must be \[settings, 2\]"):
        significance.compare(("a", "b"), np.zeros((4, 3)))
    with pytest.raises(UsageError, match="scores hold NaN"):
        significance.compare(("a", "b"), np.full((4, 2), np.nan))
    with pytest.raises(UsageError, match="level = 2 must lie"):
        significance.compare(("a", "b"), np.zeros((4, 2)), level=2)
