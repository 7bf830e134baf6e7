"""Paired comparisons: effects with intervals, Holm's correction over all claims, and what would have been seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from seal_jax.evaluation.significance import holm
from studies.design import ACCURACY, Cell, Claim, Study
from studies.results import Scores

LEVEL, POWER = 0.05, 0.8
FEWEST = 3  # pairs of seeds
SHOWN, CONTRADICTED, OPEN = "shown", "contradicted", "not shown"


class Comparison(NamedTuple):
    """One claim in one setting and condition, over the seeds that both systems have.

    Attributes:
      claim, setting, condition: what is compared, and where.
      effect: mean difference between the better and the worse system of the claim, of accuracies in points.
      half: half the 95 % interval of the mean (Student's t), not corrected.
      p_value: two-sided, of the paired t test, after Holm's correction over all comparisons of the study, those that
        are not trained yet too.
      seeds: pairs; a training that diverged has the accuracy of chance, and leaves the pair out of other measures.
      lower: whether less of the measure is better.
      detectable: true difference that would have been significant with a probability of 80 %, at the level of Holm's
        first step, by the spread that was seen.
    """

    claim: Claim
    setting: str
    condition: str
    effect: float
    half: float
    p_value: float
    seeds: int
    lower: bool
    detectable: float

    @property
    def verdict(self) -> str:
        """What it says of the claim."""
        if self.p_value > LEVEL:
            return OPEN
        return SHOWN if (self.effect < 0) == self.lower else CONTRADICTED


def compare(study: Study, scores: Mapping[str, Scores]) -> list[Comparison]:
    """Return all comparisons of a study whose two cells have been trained.

    Args:
      study: its claims.
      scores: by measure, cell and seed; NaN for a training that diverged.
    """
    from scipy import optimize, stats

    compared, planned = [], study.comparisons()
    for claim, setting, condition in planned:
        pair = [
            scores.get(measure, {}).get(Cell(setting, key, condition), {})
            for key, measure in (
                (claim.better, claim.measure),
                (claim.worse, claim.worse_measure or claim.measure),
            )
        ]
        seeds = sorted({*pair[0]} & {*pair[1]})
        values = np.array([[of[seed] for seed in seeds] for of in pair])
        if claim.measure == ACCURACY:
            values = np.nan_to_num(values, nan=study.chance.get(setting, 10.0))
        better, worse = values[:, np.isfinite(values).all(0)]
        if len(better) >= FEWEST:
            compared.append((claim, setting, condition, better - worse))
    p_values = []
    for *_, differences in compared:
        # Equal in every seed, which the t test has no answer to: the sign test.
        sign = 2.0 ** (1 - len(differences)) if differences[0] else 1.0
        p_values.append(stats.ttest_1samp(differences, 0).pvalue if np.ptp(differences) else sign)
    # Of the whole study, so that no verdict depends on what else has been trained by now.
    p_values += [1.0] * (len(planned) - len(compared))
    corrected = holm(np.array(p_values)).tolist()
    comparisons = []
    for (claim, setting, condition, differences), p_value in zip(compared, corrected, strict=False):
        count = len(differences)
        error = differences.std(ddof=1) / math.sqrt(count)
        critical = stats.t.ppf(1 - LEVEL / 2 / len(planned), count - 1)
        # In standard errors: the noncentral t of this shift is beyond the critical value with this probability.
        shift = optimize.brentq(
            lambda shift, critical=critical, count=count: (
                stats.nct.sf(critical, count - 1, shift) - POWER
            ),
            0.0,
            4 * critical,
        )
        comparisons.append(
            Comparison(
                claim,
                setting,
                condition,
                float(differences.mean()),
                float(stats.t.ppf(1 - LEVEL / 2, count - 1) * error),
                p_value,
                count,
                claim.measure != ACCURACY and study.measures[claim.measure].lower,
                float(shift * error),
            )
        )
    return comparisons
