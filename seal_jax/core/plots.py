"""What all plots share: styles of runs, means and intervals over seeds, panels, legends."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from seal_jax.core.tables import Record, grouped, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any of the usual colour blindnesses can tell apart;
# without its yellow, too faint on white. After the last colour the lines are dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":")
Grid = Literal["x", "y", "both"] | None
BAND = "mean, 95 % interval over seeds"  # what bands and bars are in all plots


def style(index: int) -> dict[str, Any]:
    """Return colour and dashes of the ``index``-th run."""
    dashes = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes}


def run_styles(rows: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Return the style of each run with rows of an evaluation.

    In a report the rows hold the run's ``index``, so that a run has one style there, whatever other
    runs were evaluated; elsewhere runs are numbered in the order in which they come.
    """
    first = {row["run"]: row for row in reversed(rows)}
    names = dict.fromkeys(row["run"] for row in rows)
    return {name: style(first[name].get("index", place)) for place, name in enumerate(names)}


def drawable(name: str) -> str:
    """Return a name as matplotlib shows it: no mathematics, and never left out of a legend.

    >>> drawable("$x"), drawable("_y")
    ('\\\\$x', ' _y')
    """
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def over_seeds(values: Iterable[Iterable[float]]) -> np.ndarray:
    """Return mean and ends of the 95 % interval, ``[3, n]``, of values over seeds, ``[n][seeds]``."""
    spreads = [spread(seeds) for seeds in values]
    return np.array([(point.mean, point.low, point.high) for point in spreads]).reshape(-1, 3).T


def bars(points: np.ndarray) -> np.ndarray:
    """Return what ``errorbar`` takes for the ends that :func:`over_seeds` gives, ``[2, n]``."""
    mean, low, high = points
    return np.maximum([mean - low, high - mean], 0)  # rounding may put an end past the mean


def line_with_band(
    axes: Axes,
    x: Any,
    values: Any,
    *,
    limits: tuple[float, float] | None = None,
    linewidth: float = 1.4,
    **line: Any,
) -> None:
    """Draw the mean over seeds as a line, and its 95 % interval as a band where there are several.

    Args:
      axes: to draw on.
      x: places of the points, ``[n]``.
      values: ``[n][seeds]``.
      limits: of the quantity, which the band does not leave: an accuracy is at most 100 %.
      linewidth: of the line.
      **line: color, linestyle, label and whatever else ``Axes.plot`` takes.
    """
    mean, low, high = over_seeds(values)
    axes.plot(x, mean, linewidth=linewidth, **line)
    if len(mean) and len(values[0]) > 1:
        if limits:
            low, high = low.clip(min=limits[0]), high.clip(max=limits[1])
        axes.fill_between(x, low, high, color=line["color"], alpha=0.2, linewidth=0)


def tidy(axes: Axes, grid: Grid = "y") -> None:
    """Give axes the look of all plots: no box, and faint lines of a grid below the data."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis=grid, color="#dddddd", linewidth=0.6)


def panels_by_weights(
    figure: Figure,
    rows: Sequence[Record],
    columns: int = 1,
    *,
    beside: bool = False,
    grid: Grid = "y",
    **subplots: Any,
) -> list[tuple[str, list[Record], list[Axes]]]:
    """Divide a figure into panels for the last and for the best weights.

    Args:
      figure: to divide.
      rows: of an evaluation.
      columns: panels for each of the weights, which stand in a row.
      beside: put the weights beside each other instead, one panel each.
      grid: see :func:`tidy`.
      **subplots: for ``Figure.subplots``, such as ``sharey``.

    Returns:
      The weights, their rows and their panels.
    """
    groups = grouped(rows, ("weights",))
    shape = (columns, len(groups)) if beside else (len(groups), columns)
    panels = figure.subplots(*shape, squeeze=False, **subplots)
    for axes in panels.flat:
        tidy(axes, grid)
    lines = panels.T if beside else panels
    return [
        (weights, of_weights, list(line))
        for ((weights,), of_weights), line in zip(groups.items(), lines, strict=True)
    ]


def size_by_weights(
    width: float, height: float, margin: float = 0.0
) -> Callable[[Sequence[Record]], tuple[float, float]]:
    """Return the size, in inches, of figures with a row of panels for each of the weights.

    Args:
      width: of the figure.
      height: of a row of panels.
      margin: of the figure's height that is not the panels'.
    """
    return lambda rows: (width, margin + height * max(1, len({row["weights"] for row in rows})))


def panel_grid(
    figure: Figure, count: int, across: int, *, grid: Grid = "y", **subplots: Any
) -> list[Axes]:
    """Return ``count`` panels, at most ``across`` in a row; the rest of the last row stays empty."""
    across = min(count, across)
    panels = list(figure.subplots(-(-count // across), across, squeeze=False, **subplots).flat)
    for axes in panels[:count]:
        tidy(axes, grid)
    for axes in panels[count:]:
        axes.set_axis_off()
    return panels[:count]


def legend_below(figure: Figure, panels: Iterable[Axes], last: str = "") -> None:
    """Put one legend for all panels below them.

    Args:
      figure: gets the legend.
      panels: labels that several have are shown once.
      last: labels that begin so come last: what stands for all colours.
    """
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    order = sorted(entries, key=lambda label: bool(last) and label.startswith(last))
    figure.legend(
        [entries[label] for label in order],
        order,
        loc="outside lower center",
        ncols=min(len(order), 2),
        frameon=False,
    )


def legend_beside(figure: Figure, entries: Iterable[tuple[Any, str]]) -> None:
    """Put a legend of (handle, label) to the right of the panels."""
    handles, labels = zip(*entries, strict=True)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)


def as_png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
