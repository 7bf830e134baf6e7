"""The style of every plot: colours and dashes of runs, means and intervals over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from seal_jax.core.tables import spread

# Okabe and Ito's palette, which people with any of the usual colour blindnesses can tell apart;
# without its yellow, too faint on white. After the last colour the lines are dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":")
BAND = "mean, 95 % interval over seeds"  # what bands and bars are in all plots


def style(index: int) -> dict[str, Any]:
    """Return colour and dashes of the ``index``-th run."""
    dashes = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes}


def run_styles(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the style of each run with rows of an evaluation.

    In a report the rows hold the run's ``index``, so that a run has one style there, whatever other
    runs were evaluated; elsewhere runs are numbered as they come.
    """
    first = {row["run"]: row for row in reversed(rows)}
    names = dict.fromkeys(row["run"] for row in rows)
    return {name: style(first[name].get("index", place)) for place, name in enumerate(names)}


def over_seeds(values: Iterable[Iterable[float]]) -> np.ndarray:
    """Return mean and ends of the 95 % interval, ``[3, n]``, of values over seeds, ``[n][seeds]``."""
    spreads = [spread(seeds) for seeds in values]
    return np.array([(each.mean, each.low, each.high) for each in spreads]).reshape(-1, 3).T


def bars(points: np.ndarray) -> np.ndarray:
    """Return what ``errorbar`` takes for the ends that :func:`over_seeds` gives, ``[2, n]``."""
    mean, low, high = points
    return np.maximum([mean - low, high - mean], 0)  # rounding may put an end past the mean
