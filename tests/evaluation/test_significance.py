"""Significance against the binomial sum written out and Holm's adjusted p-values."""

import math

import numpy as np
import pytest

from seal_jax import UsageError
from seal_jax.evaluation import significance


def test_p_values_are_binomial_tails():
    random = np.random.default_rng(0)
    scores = random.integers(0, 4, (21, 3)) + np.array([0, 1, 0])
    found = significance.compare(("a", "b", "c"), scores.astype(float))
    for row in range(3):
        for column in range(3):
            wins = sum(scores[:, column] > scores[:, row])
            trials = wins + sum(scores[:, column] < scores[:, row])
            # Half of the ties each, and an odd one is ignored.
            better, trials = wins + (21 - trials) // 2, 21 - (21 - trials) % 2
            assert found.wins[row, column] == wins
            if row == column:
                assert not found.significant[row, column]
                continue
            tail = sum(math.comb(trials, k) for k in range(better, trials + 1)) / 2**trials
            assert found.p_values[row, column] == pytest.approx(tail)
            assert found.significant[row, column] == (tail <= 0.05)
    assert found.significant[0, 1]


def test_the_correction_is_over_pairs():
    """15 two-sided hypotheses of six methods."""
    random = np.random.default_rng(2)
    for _ in range(40):
        p_values = random.uniform(0, 1, (6, 6)) ** 6
        upper = np.triu(np.ones((6, 6), bool), 1)
        p_values = np.where(upper, p_values, 1 - p_values.T)  # of one direction small, or neither
        pairs = np.minimum(p_values, p_values.T)[upper]
        found = significance.correct(p_values)
        np.testing.assert_array_equal(
            (found | found.T)[upper], significance.holm(2 * pairs) <= 0.05
        )
        assert not (found & found.T).any()
    untested = np.full((3, 3), np.nan)
    untested[0, 1], untested[1, 0] = 0.02, 0.99  # the only pair: 0.04 is within 0.05
    assert significance.correct(untested).tolist() == [[False, True, False], *[[False] * 3] * 2]


def test_holm_rejects_step_by_step():
    """The smallest p-value against level / n, the next against level / (n - 1), until one is not rejected."""
    random = np.random.default_rng(1)
    for level in (0.01, 0.05, 0.2):
        for _ in range(50):
            p_values = random.uniform(0, 0.2, 8) ** 2
            rejected = np.zeros(8, bool)
            for left, index in zip(range(8, 0, -1), np.argsort(p_values), strict=True):
                if p_values[index] > level / left:
                    break
                rejected[index] = True
            np.testing.assert_array_equal(significance.holm(p_values) <= level, rejected)


def test_bad_input():
    with pytest.raises(UsageError, match=r"must be \[settings, 2\]"):
        significance.compare(("a", "b"), np.zeros((4, 3)))
    with pytest.raises(UsageError, match="scores hold NaN"):
        significance.compare(("a", "b"), np.full((4, 2), np.nan))
    with pytest.raises(UsageError, match="level = 2 must lie"):
        significance.compare(("a", "b"), np.zeros((4, 2)), level=2)
