"""The plot of the kind ``landscape``: PoF paper, Figure 1 c and d, over the runs given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import grouped, newest
from seal_jax.evaluators.evaluator import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WHOLE = "all"  # the part that is the whole network


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw ΔL of every part, and slices along the eigenvectors of the classifier and of all."""
    rows = [row for row in newest(rows) if row["rank"] == 1]
    parts = list(dict.fromkeys(row["part"] for row in rows))
    sliced = [*[part for part in parts if part != WHOLE][-1:], WHOLE]
    found, styles = grouped(rows, ("weights",)), plots.run_styles(rows)
    grid = figure.subplots(len(found), 1 + len(sliced), squeeze=False)
    for line, ((weights,), own) in zip(grid, found.items(), strict=True):
        for (run,), mine in grouped(own, ("run",)).items():
            style = styles[run]
            means = [_mean([row["increment"] for row in mine if row["part"] == p]) for p in parts]
            line[0].plot(parts, means, marker="o", markersize=4, label=run, **style)
            for axes, part in zip(line[1:], sliced, strict=True):
                for number, row in enumerate(row for row in mine if row["part"] == part):
                    _slices(axes, row, style["color"], run if not number else None)
        line[0].set_ylim(bottom=0)
        line[0].set_title(f"{weights} weights: loss increment")
        line[0].set_ylabel("ΔL of the test loss")
        line[0].tick_params(axis="x", rotation=90)
        for axes, part in zip(line[1:], sliced, strict=True):
            axes.set_title(f"along the eigenvector of {part}")
            axes.set_xlabel("distance in the weights")
            axes.set_ylabel("loss: training solid, test dashed")
        for axes in line:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    grid[0][-1].legend(frameon=False)


def _slices(axes: Axes, row: Record, colour: str, label: str | None) -> None:
    for split, dashes, name in (("train", "-", label), ("test", "--", None)):
        values = [np.nan if value is None else value for value in row[f"{split}_slice"]]
        axes.plot(row["distances"], values, dashes, color=colour, linewidth=1.2, label=name)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan
