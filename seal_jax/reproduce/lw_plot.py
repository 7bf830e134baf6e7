"""Draws the synthetic experiment of the layerwise paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax.reproduce.lw_plans import ALPHAS, METHODS, PENALTIES, PENALTY_METHODS
from seal_jax.reproduce.lw_tables import PAPER_1, PAPER_4, Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette without its yellow, as in the other plots; LW in the strongest.
COLOURS = dict(
    zip(METHODS, ("#000000", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00"), strict=True)
)
PENALTY_COLOURS = dict(zip(PENALTY_METHODS, ("#000000", "#0072B2", "#D55E00"), strict=True))
DPI = 150
WIDTH, HEIGHT = 11.0, 3.2  # inches, the height of one row


def draw(
    path: Path,
    initialisers: Sequence[str],
    test: np.ndarray | None,
    steps: int,
    table4: Sequence[Cell],
) -> None:
    """Write the plot: a row of Table 1 for each initialiser, and a row of Table 4.

    Args:
      path: the PNG file.
      initialisers: the rows.
      test: ``Results.test`` of the plans of Table 1, or None to leave it out.
      steps: training steps of a round of Table 1.
      table4: the cells of Table 4; empty to leave it out.
    """
    from matplotlib.figure import Figure

    rows = (len(initialisers) if test is not None else 0) + bool(table4)
    figure = Figure(figsize=(WIDTH, HEIGHT * rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, len(ALPHAS), squeeze=False)
    if test is not None:
        shape = (len(test), len(initialisers), len(ALPHAS), len(METHODS), -1)
        accuracies = 100 * np.asarray(test, np.float64).reshape(shape)
        for row, initialiser in enumerate(initialisers):
            for column, alpha in enumerate(ALPHAS):
                _rounds(grid[row, column], accuracies[:, row, column], alpha, steps)
                grid[row, column].set_title(f"alpha {alpha:g}, {initialiser.capitalize()}")
            grid[row, 0].set_ylabel("test accuracy (%)")
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(), ncols=len(METHODS), loc="outside upper center"
        )
    if table4:
        for column, method in enumerate(PENALTY_METHODS):
            _penalties(grid[-1, column], table4, method)
        grid[-1, 0].set_ylabel("test accuracy (%)")
    figure.savefig(path)


def _rounds(axes: Axes, accuracies: np.ndarray, alpha: float, steps: int) -> None:
    """Draw ``[seeds, methods, rounds]``: means and bands, and the paper's numbers at the right."""
    ends = steps * np.arange(1, accuracies.shape[2] + 1)
    for index, method in enumerate(METHODS):
        values, colour = accuracies[:, index], COLOURS[method]
        mean = values.mean(0)
        axes.plot(ends, mean, color=colour, label=method, marker=".", markersize=5, linewidth=1.4)
        if len(values) > 1:
            std = values.std(0, ddof=1)
            axes.fill_between(ends, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
        if method in PAPER_1[alpha]:
            published, deviation = PAPER_1[alpha][method]
            # Side by side: some of the paper's numbers are nearly the same.
            axes.errorbar(
                ends[-1] * (1.06 + 0.035 * index),
                published,
                yerr=deviation,
                fmt="o",
                markersize=4.5,
                markerfacecolor="white",
                color=colour,
                linewidth=1.0,
            )
    axes.axvline(ends[-1] * 1.03, color="#8c8c8c", linewidth=0.7)
    axes.annotate(
        "paper", (0.99, 0.02), xycoords="axes fraction", ha="right", fontsize=8, color="#555555"
    )
    axes.set_xticks(ends[:: max(1, len(ends) // 4)])
    axes.set_xlabel("training steps")


def _penalties(axes: Axes, cells: Sequence[Cell], method: str) -> None:
    """Draw one column of Table 4: the paper's dashed, ours by initialiser."""
    positions = np.arange(len(PENALTIES))
    axes.plot(positions, PAPER_4[method], "o--", color="#777777", mfc="white", label="paper")
    for initialiser, line in (("he", "-"), ("glorot", ":")):
        own = [cell for cell in cells if (cell.method, cell.initialiser) == (method, initialiser)]
        if own:
            means = [cell.mean for cell in own]
            look: dict[str, Any] = {
                "color": PENALTY_COLOURS[method],
                "linestyle": line,
                "marker": ".",
            }
            axes.plot(positions, means, label=initialiser.capitalize(), **look)
    axes.set_xticks(positions, [f"{penalty:g}" for penalty in PENALTIES])
    axes.set_ylim(0, 100)
    axes.set_xlabel("L2 penalty")
    axes.set_title(f"Table 4: {method}")
    axes.legend(fontsize=7, loc="lower right")
