"""Which method is better over many settings: exact binomial tests with Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from seal_jax.errors import UsageError


class Comparisons(NamedTuple):
    """All ordered pairs of methods, ``[row, column]``: is the column's method better than the row's?

    Attributes:
      methods: their names.
      wins: settings in which the column is better.
      p_values: of the exact one-sided binomial test.
      significant: at the level asked for, a star in the LW paper's Table 3.
      corrected: and still so after Holm's step-down correction, a circle there.
    """

    methods: tuple[str, ...]
    wins: np.ndarray
    p_values: np.ndarray
    significant: np.ndarray
    corrected: np.ndarray

    def as_text(self) -> str:
        """Return the table as the paper prints it: ``*`` significant, ``o`` after the correction."""
        width = max(map(len, self.methods))
        lines = [" " * width + "  " + "  ".join(name.rjust(width) for name in self.methods)]
        for row, name in enumerate(self.methods):
            cells = np.where(self.corrected[row], "o", np.where(self.significant[row], "*", "."))
            lines.append(f"{name:{width}}  " + "  ".join(cell.rjust(width) for cell in cells))
        return "\n".join(lines)


def compare(methods: Sequence[str], scores: np.ndarray, *, level: float = 0.05) -> Comparisons:
    """Test every pair of methods over settings.

    Of the settings in which two methods differ, the better one wins each with probability 1/2 under
    the null hypothesis; ties count for neither. Holm's correction is over all ordered pairs.

    Args:
      methods: names, m of them.
      scores: ``[settings, m]``, larger is better.
      level: of significance.

    Raises:
      UsageError: scores that do not fit the methods, or are not finite.

    References:
      Alabdulmohsin et al. 2022, Table 3; Demsar, `Statistical Comparisons of Classifiers over Multiple
      Data Sets`, 2006, section 3.2.2.

    >>> found = compare(("BL", "LW"), np.array([[0.0, 1.0]] * 6))
    >>> found.p_values[0].tolist(), found.corrected[0].tolist()
    ([1.0, 0.015625], [False, True])
    """
    from scipy import stats

    if scores.ndim != 2 or scores.shape[1] != len(methods) or not len(scores):
        raise UsageError(f"scores {scores.shape} must be [settings, {len(methods)}], one a method")
    if not np.isfinite(scores).all():
        raise UsageError("scores hold NaN or infinity: leave out settings that did not finish")
    if not 0 < level < 1:
        raise UsageError(f"level = {level:g} must lie between 0 and 1")
    better = (scores[:, None, :] > scores[:, :, None]).sum(0)
    p_values = np.ones(better.shape)
    for row, column in zip(*np.nonzero(better), strict=True):
        trials = better[row, column] + better[column, row]
        test = stats.binomtest(int(better[row, column]), int(trials), alternative="greater")
        p_values[row, column] = test.pvalue
    off_diagonal = ~np.eye(len(methods), dtype=bool)
    corrected = np.zeros(better.shape, bool)
    corrected[off_diagonal] = holm(p_values[off_diagonal], level)
    significant = (p_values <= level) & off_diagonal
    return Comparisons(tuple(methods), better, p_values, significant, corrected)


def holm(p_values: np.ndarray, level: float = 0.05) -> np.ndarray:
    """Return which hypotheses Holm's step-down procedure rejects, ``[n]``.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [True, False, False]
    """
    order = np.argsort(p_values, kind="stable")
    limits = level / np.arange(len(p_values), 0, -1)
    passed = np.cumprod(p_values[order] <= limits).astype(bool)
    rejected = np.zeros(len(p_values), bool)
    rejected[order] = passed
    return rejected
