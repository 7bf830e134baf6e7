"""The plot of the kind ``perturbations``: PoF paper, Figure 6, over the runs given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import grouped, newest
from seal_jax.evaluators import pof
from seal_jax.evaluators.evaluator import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {"sgd": "SGD", "sam": "SAM", "pof": "PoF"}


def own_mark(row: Record) -> str:
    """Return a mark where a row measures the method that the run trained with."""
    return "*" if _measure_of(row["method"]) == row["measure"] else ""


def _measure_of(method: str) -> str:
    return method if method in MEASURES else "sgd"


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw histograms on a log axis: all three of one run, or of several each its own."""
    rows = newest(rows)
    styles = plots.run_styles(rows)
    several = len({row["run"] for row in rows}) > 1
    if several:
        rows = [row for row in rows if own_mark(row)]
    found = grouped(rows, ("weights",))
    grid = figure.subplots(len(found), 1, sharex=True, squeeze=False)
    sizes = np.array([size for row in rows for size in row["sizes"] if size])
    edges = pof.log_edges(sizes) if len(sizes) else np.array([0.1, 1.0])
    for (axes,), ((weights,), own) in zip(grid, found.items(), strict=True):
        groups = [
            (
                f"{run}: {MEASURES[measure]}" if several else MEASURES[measure],
                np.array([size for row in mine for size in row["sizes"] if size]),
                styles[run] if several else plots.style(index),
            )
            for index, ((run, measure), mine) in enumerate(grouped(own, ("run", "measure")).items())
        ]
        pof.histogram(axes, groups, edges)
        axes.set_xscale("log")
        shown = dict.fromkeys(MEASURES[row["measure"]] for row in own)
        axes.set_title(f"{', '.join(shown)}, {weights} weights")
        axes.set_ylabel("share of the mini-batches")
        axes.set_xlabel("‖δθ‖₂, size of the classifier's perturbation")
    grid[0][0].legend(frameon=False)
