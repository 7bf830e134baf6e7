"""The panels of the curves: what is drawn onto one pair of axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax.reports.grid import spread
from seal_jax.reports.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which people with any of the usual colour blindnesses can tell apart;
# without its yellow, too faint on white. After the last colour the lines are dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":")
SHADE = "#777777"
MOST_BOUNDARIES = 60
BAND = "mean, 95 % interval over seeds"  # what bands and bars are in all plots

Span = tuple[float, float]


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


def curve(axes: Axes, run: Run, key: str, *, scale: float = 1, **line: Any) -> None:
    """Draw the mean over the seeds, and a band of its 95 % interval; of two seeds, of both values."""
    epochs, values = run.series(key)
    if not len(epochs):
        return
    mean, low, high = over_seeds(values * scale)
    # A line needs two points to be seen.
    marker: dict[str, Any] = (
        {"marker": ".", "markersize": 8, "clip_on": False} if len(epochs) == 1 else {}
    )
    axes.plot(epochs, mean, linewidth=1.4, **line, **marker)
    if values.shape[1] > 1:
        if key.endswith("/accuracy"):  # a band over no more than an accuracy can be
            low, high = low.clip(0), high.clip(max=scale)
        colour = line["color"]
        axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)


# The last is drawn over the best and is smaller: where they agree both are seen.
MARKS: dict[str, dict[str, Any]] = {
    "test_last": {"markersize": 4.5, "zorder": 5},
    "test_best": {"markersize": 8, "zorder": 4},
}


def marks(axes: Axes, run: Run, **line: Any) -> None:
    """Mark test accuracy where generations end: hollow for the best weights, filled for the last.

    Those of the last weights are joined and have a bar of the mean's 95 % interval.
    """
    for key, look in MARKS.items():
        epochs, values = run.series(f"{key}/accuracy")
        if not len(epochs):
            continue
        mean, low, high = over_seeds(100 * values)
        axes.plot(epochs, mean, **mark(key, line["color"]), zorder=look["zorder"])
        if key == "test_last":
            axes.plot(epochs, mean, linewidth=1.4, **line)
        # For the last only: at the same epoch the two bars would lie on each other.
        if key == "test_last" and values.shape[1] > 1:
            bar: dict[str, Any] = {"colors": line["color"], "linewidth": 1.0, "clip_on": False}
            axes.vlines(epochs, low.clip(0), high.clip(max=100), **bar)


def mark(key: str, colour: str) -> dict[str, Any]:
    """Return the look of a mark, for the curves and for the legend."""
    return {
        "linestyle": "none",
        "marker": "o",
        "markersize": MARKS[key]["markersize"],
        "markerfacecolor": colour if key == "test_last" else "white",
        "markeredgecolor": colour,
        "markeredgewidth": 1.2,
        "clip_on": False,  # the last generation ends on the edge
    }


def phases(axes: Axes, runs: Sequence[Run]) -> None:
    """Mark where generations start, and shade where a run ascends; in one grey if all runs agree."""
    end = max(run.epochs_done for run in runs)
    starts = sorted({start for run in runs for start in _starts(run, end)})
    # So many would be a grey area and not lines.
    for epoch in starts if len(starts) <= MOST_BOUNDARIES else []:
        axes.axvline(epoch, color="#8c8c8c", linewidth=0.7, zorder=0.5)
    for colour, spans in shades(runs):
        for start, stop in spans:
            axes.axvspan(start, stop, color=colour, alpha=0.15, linewidth=0, zorder=0)


def shades(runs: Sequence[Run]) -> list[tuple[str, tuple[Span, ...]]]:
    """Return the spans of ascent with their colour: one grey for all runs, or each run's own."""
    end = max(run.epochs_done for run in runs)
    spans = [(style(run.index)["color"], ascents(run, end)) for run in runs]
    found = [(colour, each) for colour, each in spans if each]
    alike = len({each for _, each in found}) == 1
    return [(SHADE, found[0][1])] if alike else found


def ascents(run: Run, end: float) -> tuple[Span, ...]:
    """Return the spans of epochs, up to ``end``, in which a run ascends; generation 0 does not."""
    k = run.ascent_epochs
    return tuple((start, min(start + k, end)) for start in _starts(run, end)) if k else ()


def _starts(run: Run, end: float) -> list[int]:
    """Return the epochs at which generations from 1 on start, before ``end``."""
    length = run.epochs_per_generation
    return [
        length * generation for generation in range(1, run.generations) if length * generation < end
    ]
