"""The plot of the kind ``gradients``: PoF paper, Figures 2 and 5, over the runs given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import grouped, newest
from seal_jax.evaluators import pof
from seal_jax.evaluators.evaluator import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPLITS = ("train", "test")
Runs = Mapping[tuple[str, ...], Sequence[Record]]
Styles = Mapping[str, Mapping[str, Any]]


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw counts, distances, and the curvatures of both splits, one row of panels for weights."""
    rows = newest(rows)
    found, styles = grouped(rows, ("weights",)), plots.run_styles(rows)
    grid = figure.subplots(len(found), 4, squeeze=False)
    for line, ((weights,), own) in zip(grid, found.items(), strict=True):
        runs = grouped(own, ("run",))
        _counts(line[0], runs, styles)
        line[0].set_title(f"{weights} weights: strongest eigenvector")
        _distances(line[1], runs, styles)
        line[1].set_title("ξ*: training filled, test dashed")
        for axes, split in zip(line[2:], SPLITS, strict=True):
            values = _values(own, split, "curvatures")
            # A few outliers would leave the others in one bin: they are counted in the last.
            top = float(np.quantile(values, 0.99)) if len(values) else 1.0
            edges = np.linspace(min(0.0, np.min(values, initial=0.0)), top or 1.0, 41)
            groups = [
                (run, _values(mine, split, "curvatures"), styles[run])
                for (run,), mine in runs.items()
            ]
            pof.histogram(axes, groups, edges)
            axes.set_title(f"g'Hg, {split} images")
            beyond = f"\n(last bin: all from {edges[-2]:.3g} up)" if (values > top).any() else ""
            axes.set_xlabel(f"curvature along the gradient{beyond}")
            axes.set_ylabel("share of the mini-batches")
    grid[0][-1].legend(frameon=False)


def _values(rows: Sequence[Record], split: str, name: str) -> np.ndarray:
    """Return the values of all seeds together."""
    return np.array(
        [v for row in rows if row["split"] == split for v in row[name] if v is not None]
    )


def _counts(axes: Axes, runs: Runs, styles: Styles) -> None:
    width = 0.8 / len(runs)
    for index, ((run,), mine) in enumerate(runs.items()):
        counts = np.sum([row["counts"] for row in mine if row["split"] == "train"], axis=0)
        place = np.arange(1, len(counts) + 1) + width * (index - (len(runs) - 1) / 2)
        axes.bar(place, counts, width, color=styles[run]["color"], label=run)
    axes.set_xticks(np.arange(1, len(counts) + 1))
    axes.set_xlabel("eigenvector, the largest eigenvalue first")
    axes.set_ylabel("training mini-batches")
    axes.spines[["top", "right"]].set_visible(False)


def _distances(axes: Axes, runs: Runs, styles: Styles) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    values = [_values(mine, split, "distances") for mine in runs.values() for split in SPLITS]
    positive = np.concatenate(values)
    if len(positive):
        edges = pof.log_edges(positive)
        for (run,), mine in runs.items():
            style = styles[run]
            for split, dashes in (("train", "-"), ("test", "--")):
                share = pof.shares(_values(mine, split, "distances"), edges)
                look = {"color": style["color"], "linestyle": dashes}
                axes.stairs(share, edges, label=run if split == "train" else None, **look)
                if split == "train":
                    axes.stairs(share, edges, fill=True, alpha=0.25, color=style["color"])
        axes.set_xscale("log")
        # Over less than a decade matplotlib labels every small tick, one upon the other.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("distance of the mini-batch's minimum")
    axes.set_ylabel("share of the mini-batches")
    axes.spines[["top", "right"]].set_visible(False)
