"""What all plots share: styles of runs, means and intervals over seeds, panels, legends."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    # All colours as solid lines first, then all of them dashed, then dotted.
    dashes = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes}


def run_styles(rows: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Return the style of each run with rows of an evaluation.

    In a report the rows hold the run's ``index``, so that a run has one style there, whatever other
    runs were evaluated; elsewhere runs are numbered in the order in which they come.
    """
    # Reversed, so that of each run the first row is the one that stays.
    first = {row["run"]: row for row in reversed(rows)}
    names = dict.fromkeys(row["run"] for row in rows)
    return {name: style(first[name].get("index", place)) for place, name in enumerate(names)}


def drawable(name: str) -> str:
    """Return a name as matplotlib shows it: no mathematics, and never left out of a legend.

    >>> drawable("$x"), drawable("_y")
    ('\\\\$x', ' _y')
    """
    # Matplotlib reads $...$ as mathematics, and leaves labels that begin with _ out of a legend.
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def over_seeds(values: Iterable[Iterable[float]]) -> np.ndarray:
    """Return mean and ends of the 95 % interval, ``[3, n]``, of values over seeds, ``[n][seeds]``."""
    spreads = [spread(seeds) for seeds in values]
    # [n, 3] -> [3, n]; the reshape gives an empty array its three columns.
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

    ``x`` is ``[n]`` and ``values`` are ``[n][seeds]``. The band stays within ``limits``: an accuracy is at
    most 100 %. Further arguments are those of ``Axes.plot``.
    """
    mean, low, high = over_seeds(values)
    axes.plot(x, mean, linewidth=linewidth, **line)
    # One seed has no interval.
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
    figure: Figure, rows: Sequence[Record], columns: int = 1, *, grid: Grid = "y", **subplots: Any
) -> list[tuple[str, list[Record], list[Axes]]]:
    """Return the last and the best weights, each with its rows and a line of panels on the figure.

    There are ``columns`` panels for each; ``subplots`` go to ``Figure.subplots``, such as ``sharey``.
    """
    groups = grouped(rows, ("weights",))
    panels = figure.subplots(len(groups), columns, squeeze=False, **subplots)
    for axes in panels.flat:
        tidy(axes, grid)
    return [
        (weights, of_weights, list(line))
        for ((weights,), of_weights), line in zip(groups.items(), panels, strict=True)
    ]


def lines_by_weights(
    figure: Figure, rows: Sequence[Record], x: str, y: Callable[[Record], Any], **line: Any
) -> list[Axes]:
    """Draw a line with its band for each run, the weights side by side; return their panels.

    The x values are the rows' field ``x`` or, if they have none, 1, 2, ...; the y values are ``y(row)``.
    """
    styles, groups = run_styles(rows), grouped(rows, ("weights",))
    panels = list(figure.subplots(1, len(groups), squeeze=False, sharey=True).flat)
    for axes, ((weights,), of_weights) in zip(panels, groups.items(), strict=True):
        tidy(axes)
        for (run,), of_run in grouped(of_weights, ("run",)).items():
            # A row is a seed: [seeds, points] -> [points, seeds].
            values = np.array([y(row) for row in of_run]).T
            places = of_run[0].get(x, np.arange(1, len(values) + 1))
            line_with_band(axes, places, values, label=run, **line, **styles[run])
        axes.set_title(f"{weights} weights")
    return panels


def size_by_weights(
    width: float, height: float, margin: float = 0.0
) -> Callable[[Sequence[Record]], tuple[float, float]]:
    """Return the size, in inches, of figures with a row of panels for each of the weights.

    ``height`` is that of a row of panels, ``margin`` the height of all else in the figure.
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
    """Put one legend for all panels below them, each label once.

    Labels that begin with ``last`` come last, such as one that is for all colours.
    """
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    # The sort is stable, so the other labels keep their order.
    order = sorted(entries, key=lambda label: bool(last) and label.startswith(last))
    handles, ncols = [entries[label] for label in order], min(len(order), 2)
    figure.legend(handles, order, loc="outside lower center", ncols=ncols, frameon=False)


def legend_beside(figure: Figure, entries: Iterable[tuple[Any, str]]) -> None:
    """Put a legend of (handle, label) to the right of the panels."""
    handles, labels = zip(*entries, strict=True)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)


def log_edges(values: np.ndarray, bins: int = 60) -> np.ndarray:
    """Return the edges of bins of equal width on a log axis over all values, which are positive.

    >>> log_edges(np.array([0.01, 100.0]), 4).round(6).tolist()
    [0.01, 0.1, 1.0, 10.0, 100.0]
    """
    # Nothing to draw, but axes need a range.
    if not len(values):
        return np.array([0.1, 1.0])
    low, high = np.log10(np.min(values)), np.log10(np.max(values))
    if high - low < 1e-3:  # all the same
        low, high = low - 0.5, high + 0.5
    return np.logspace(low, high, bins + 1)


def bin_shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the share of the values in each bin; those beyond count in the outermost.

    >>> bin_shares(np.array([0.5, 1.5, 9.0, 1.7]), np.array([0.0, 1.0, 2.0])).tolist()
    [0.25, 0.75]
    """
    inside = np.clip(values, edges[0], edges[-1])
    return np.histogram(inside, edges)[0] / max(len(values), 1)


def histogram(
    axes: Axes, label: str, values: np.ndarray, edges: np.ndarray, style: Mapping[str, Any]
) -> None:
    """Draw the share of the values in each bin as filled steps, in a run's colour and dashes."""
    shares = bin_shares(values, edges)
    # Area and outline apart: where histograms overlap, the outlines stay visible.
    axes.stairs(shares, edges, fill=True, alpha=0.25, color=style["color"])
    axes.stairs(shares, edges, label=label, linewidth=1.2, **style)


def as_png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
