"""Which method is better over many settings: exact binomial tests with Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from seal_jax.errors import UsageError

# The note for a table of :func:`compare`.
RULES = (
    "One-sided exact binomial test, ties count half for each method (Demsar); Holm's correction over "
    "all unordered pairs, two-sided."
)


class Comparisons(NamedTuple):
    """All ordered pairs of methods, ``[row, column]``: is the column's method better than the row's?

    Attributes:
      methods: their names.
      wins: settings in which the column is better.
      p_values: of the exact one-sided binomial test.
      significant: at the level asked for, a star in the LW paper's Table 3.
      corrected: significant after Holm's step-down correction too, a circle there.
    """

    methods: tuple[str, ...]
    wins: np.ndarray
    p_values: np.ndarray
    significant: np.ndarray
    corrected: np.ndarray

    def marks(self, significant: str = "*", corrected: str = "o", neither: str = "") -> np.ndarray:
        """Return the mark of each pair, strings ``[m, m]``."""
        marks = np.where(self.significant, significant, neither)
        return np.where(self.corrected, corrected, marks)


def compare(methods: Sequence[str], scores: np.ndarray, *, level: float = 0.05) -> Comparisons:
    """Test every pair of methods over settings.

    Under the null hypothesis each of two methods wins a setting with probability 1/2. Settings in
    which two methods are equal support it, so each method gets half of them (Demsar; an odd one is
    ignored), and the test is conservative. The paper does not say; the marks of its Table 3 that its
    Tables 2, 6 and 7 give are the same without the ties.

    Args:
      methods: names, m of them.
      scores: ``[settings, m]``, larger is better.
      level: of significance.

    Raises:
      UsageError: scores that do not fit the methods or are not finite, or a level that is none.

    References:
      Alabdulmohsin et al. 2022, Table 3; Demsar, `Statistical Comparisons of Classifiers over Multiple
      Data Sets`, 2006, sections 3.1.4 and 3.2.2.

    >>> comparisons = compare(("BL", "LW"), np.array([[0.0, 1.0]] * 6))
    >>> comparisons.p_values[0].tolist(), comparisons.corrected[0].tolist()
    ([1.0, 0.015625], [False, True])
    """
    from scipy import stats

    if scores.ndim != 2 or scores.shape[1] != len(methods) or not len(scores):
        raise UsageError(f"scores {scores.shape} must be [settings, {len(methods)}], one a method")
    if not np.isfinite(scores).all():
        raise UsageError("scores hold NaN or infinity: leave out settings that did not finish")
    if not 0 < level < 1:
        raise UsageError(f"level = {level:g} must lie between 0 and 1")
    # [row, column]: settings in which the column's method is better
    wins = (scores[:, None, :] > scores[:, :, None]).sum(0)
    # What is neither a win nor a loss is a tie; of an odd number Demsar ignores one.
    halves = (len(scores) - wins - wins.T) // 2
    p_values = np.ones(wins.shape)
    for row, column in np.argwhere(~np.eye(len(methods), dtype=bool)):
        better, worse = (wins + halves)[row, column], (wins + halves)[column, row]
        # Of a single setting that is a tie nothing is left, and p stays 1.
        if better + worse:
            test = stats.binomtest(int(better), int(better + worse), alternative="greater")
            p_values[row, column] = test.pvalue
    return Comparisons(tuple(methods), wins, p_values, p_values <= level, correct(p_values, level))


def correct(p_values: np.ndarray, level: float = 0.05) -> np.ndarray:
    """Return which differences are significant after Holm's correction, bool ``[m, m]``.

    There is one hypothesis for each two methods, that they are equally good, which the smaller of
    their two p-values, doubled, tests: 15 of six methods. One for each direction, 30, would be valid
    too, but reject less.

    Args:
      p_values: one-sided ``[m, m]`` of all ordered pairs; NaN for those that were not tested. The
        diagonal is ignored.
      level: the probability of any false rejection.

    >>> p_values = np.array([[1, 0.008, 0.012], [1, 1, 0.2], [1, 0.9, 1]])
    >>> correct(p_values)[0].tolist()
    [False, True, True]
    """
    tested = np.isfinite(p_values) & ~np.eye(len(p_values), dtype=bool)
    # The direction with the smaller p-value; of equals, which are never significant, the upper one.
    upper = np.triu(np.ones(p_values.shape, bool))
    tested &= (p_values < p_values.T) | (upper & (p_values == p_values.T))
    rejected = np.zeros(p_values.shape, bool)
    # The smaller of two one-sided p-values, doubled, is the two-sided one: the binomial with 1/2 is symmetric.
    rejected[tested] = holm(2 * p_values[tested]) <= level
    return rejected


def holm(p_values: np.ndarray) -> np.ndarray:
    """Return p-values ``[n]`` after Holm's step-down correction: those at most a level are rejected at that level.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    # Times m, m - 1, ..., 1 in ascending order; no smaller than the one before, since the procedure stops at the first
    # hypothesis that is not rejected.
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(np.minimum(p_values[order] * factors, 1))
    return corrected
