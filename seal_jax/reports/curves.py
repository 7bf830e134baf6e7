"""Curves over epochs: accuracy of one or more runs, and everything about one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_jax.core import files, plots
from seal_jax.reports.runs import PathLike, Run, read_all

# Matplotlib is imported inside the functions: tables do not need it. Figures are created as objects,
# without pyplot, which would change the caller's backend and current figure.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"
DPI = 150
WIDTH = 11.0  # inches
HEIGHT = 3.0  # inches of a whole panel
LEGEND, LEGEND_RUN = 2.0, 0.42  # inches of the legend, and of a run in it
KEY = "#444444"  # colour of legend entries that stand for any run

# One panel for each, if any run has it. Test accuracy is apart from the others: its differences between
# runs are small beside the drop of training and validation accuracy at a forgetting event.
ACCURACIES = {
    "train/accuracy": "training accuracy (%)",
    "validation/accuracy": "validation accuracy (%)",
    "test_last/accuracy": "test accuracy (%)",
}
LOSSES = {"train/loss": "-", "validation/loss": "--"}
MARKERSIZE = {"last": 4.5, "best": 8.0}
SHADE = "#777777"
# Of vertical lines; more of them would merge into a grey area.
MOST_BOUNDARIES = 60


def draw(workdirs: PathLike | Sequence[PathLike], path: PathLike) -> Path:
    """Draw training, validation and test accuracy of one or more runs as a PNG of 1650 x 1350.

    Lines are means over the seeds and bands their 95 % intervals. Test accuracy is marked
    where generations end: filled for the last weights, hollow for those with the best validation
    accuracy of the generation. Vertical lines mark the starts of generations, shades the ascents.
    Without a validation split, or a finished generation, the picture is one panel (450 rows) shorter.

    Args:
      workdirs: the run folders.
      path: the file to write.

    Returns:
      ``path``.

    Raises:
      UsageError: no folder, the same one twice, one that holds no epoch of a run, or a file that
        cannot be written.
    """
    path = files.as_path(path)
    files.write(path, png(read_all(workdirs)))
    return path


def draw_run(workdir: PathLike) -> Path:
    """Draw accuracy, loss and learning rate of one run into ``curves.png`` of its folder.

    Returns:
      The path of the file; it is replaced as a whole.

    Raises:
      UsageError: the folder holds no epoch of a run, or cannot be written.
    """
    path = files.as_path(workdir) / CURVES
    files.write(path, png(read_all(workdir), losses=True))
    return path


def png(runs: Sequence[Run], *, losses: bool = False) -> bytes:
    """Return the picture that :func:`draw` writes, or with ``losses`` that of :func:`draw_run`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # At least one panel: `read_all` refuses runs without train/accuracy.
    shown = [key for key in ACCURACIES if _has(runs, key)]
    # Relative to `HEIGHT`: the accuracies, then loss and the lower learning rate of `draw_run`.
    heights = [1.0] * len(shown) + [1, 0.5] * losses
    # The legend may be longer than the panels are high.
    height = max(HEIGHT * sum(heights), LEGEND + LEGEND_RUN * len(runs))
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    ratios = {"height_ratios": heights}
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw=ratios)
    axes: list[Axes] = list(grid[:, 0])
    # Not strict: with losses, two panels are left over for them.
    for panel, key in zip(axes, shown, strict=False):
        panel.set_ylabel(ACCURACIES[key])
        for run in runs:
            if key == "test_last/accuracy":
                _ends_of_generations(panel, run)
            else:
                curve(panel, run, key, scale=100, **plots.style(run.index))
    if losses:
        # `draw_run` has one run, so the dashes are free to tell training from validation.
        colour = plots.style(0)["color"]
        for key, dashes in LOSSES.items():
            curve(axes[-2], runs[0], key, color=colour, linestyle=dashes)
        axes[-2].set_ylabel("loss")
        curve(axes[-1], runs[0], "learning_rate", color=colour)
        axes[-1].set_ylabel("learning rate")
    method = f"{runs[0].setting('method.name').upper()}: " if len(runs) == 1 else ""
    # Without mathtext: the name of a folder may contain a dollar sign.
    axes[0].set_title(method + subjects_of(runs), fontsize=14, pad=10, parse_math=False)
    for panel in axes:
        _phases(panel, runs)
        plots.tidy(panel)
        panel.set_axisbelow(True)
        panel.margins(x=0)
    # The panels share the axis. It ends at the longest training so far, not at its planned end.
    axes[-1].set_xlim(0, max(run.epochs_done for run in runs))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("epochs trained")
    figure.align_ylabels(axes)
    _legend(figure, runs, LOSSES if losses else {})
    return plots.as_png(figure)


def _has(runs: Sequence[Run], key: str) -> bool:
    return any(key in row for run in runs for row in run.rows)


def subjects_of(runs: Sequence[Run], most: int = 3) -> str:
    """Return the models and data sets of the runs, at most ``most`` of them by name."""
    every = list(dict.fromkeys(run.subject for run in runs))
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def _legend(figure: Figure, runs: Sequence[Run], lines: Mapping[str, Any]) -> None:
    """Draw the legend right of the panels: the runs, below them what is common to all."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[tuple[Any, str]] = []
    for run in runs:
        left = "" if run.finished else ", unfinished"
        line = Line2D([], [], linewidth=2.5, **plots.style(run.index))
        entries.append((line, f"{plots.drawable(run.name)}\n({run.seeds_text}{left})"))
    # An empty line between the runs and the rest.
    entries.append((Line2D([], [], linestyle="none"), ""))
    if any(run.seeds > 1 for run in runs):
        band = (Patch(color=KEY, alpha=0.25, linewidth=0), Line2D([], [], color=KEY))
        entries.append((band, plots.BAND.replace(", ", ",\n")))
    entries += [
        (Line2D([], [], **mark(weights, KEY)), f"test, {weights} weights")
        for weights in MARKERSIZE
        if _has(runs, f"test_{weights}/accuracy")
    ]
    if spans := shades(runs):
        label = "ascent" + (" (in the run's colour)" if len(spans) > 1 else "")
        entries.append((Patch(color=SHADE, alpha=0.25, linewidth=0), label))
    entries += [
        (Line2D([], [], color=KEY, linestyle=dashes), key.replace("/", " "))
        for key, dashes in lines.items()
        if _has(runs, key)
    ]
    handles, labels = zip(*entries, strict=True)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, labelspacing=0.8)


def curve(axes: Axes, run: Run, key: str, *, scale: float = 1, **line: Any) -> None:
    """Draw the mean over the seeds with a band of its 95 % interval; of two seeds, both values."""
    epochs, values = run.series(key)  # [n], [n, seeds]
    if not len(epochs):
        return
    if len(epochs) == 1:  # a line needs two points to be seen
        line |= {"marker": ".", "markersize": 8, "clip_on": False}
    # The t interval of an accuracy near 1 would reach past it.
    limits = (0, scale) if key.endswith("/accuracy") else None
    plots.line_with_band(axes, epochs, values * scale, limits=limits, **line)


def _ends_of_generations(axes: Axes, run: Run) -> None:
    """Draw test accuracy where generations end, of the last and of the best weights."""
    for weights in MARKERSIZE:
        epochs, values = run.series(f"test_{weights}/accuracy")
        if len(epochs):
            marks(axes, weights, epochs, 100 * values, plots.style(run.index))


def marks(axes: Axes, weights: str, x: Any, values: Any, look: Mapping[str, Any]) -> None:
    """Mark test accuracies in %, ``[n][seeds]``, at ``x``: hollow for the best weights.

    Those of the last weights are joined and have bars of the mean's 95 % interval.
    """
    mean, low, high = plots.over_seeds(values)
    # The mark of the last weights is smaller and drawn above that of the best: where they agree, both show.
    zorder = 5 if weights == "last" else 4
    axes.plot(x, mean, **mark(weights, look["color"]), zorder=zorder)
    # For the last weights only: two bars at the same x would hide one another.
    if weights == "last":
        axes.plot(x, mean, linewidth=1.4, **look)
        bar: dict[str, Any] = {"colors": look["color"], "linewidth": 1.0, "clip_on": False}
        axes.vlines(x, low.clip(0), high.clip(max=100), **bar)


def mark(weights: str, colour: str) -> dict[str, Any]:
    """Return the look of a mark, for the plots and for their legends."""
    return {
        "linestyle": "none",
        "marker": "o",
        "markersize": MARKERSIZE[weights],
        "markerfacecolor": colour if weights == "last" else "white",
        "markeredgecolor": colour,
        "markeredgewidth": 1.2,
        "clip_on": False,  # the last generation ends on the edge
    }


def _phases(axes: Axes, runs: Sequence[Run]) -> None:
    """Mark where generations start, and shade where a run ascends."""
    end = max(run.epochs_done for run in runs)
    starts = sorted({start for run in runs for start in _starts(run, end)})
    for epoch in starts if len(starts) <= MOST_BOUNDARIES else []:
        axes.axvline(epoch, color="#8c8c8c", linewidth=0.7, zorder=0.5)
    for colour, spans in shades(runs):
        for start, stop in spans:
            axes.axvspan(start, stop, color=colour, alpha=0.15, linewidth=0, zorder=0)


def shades(runs: Sequence[Run]) -> list[tuple[str, tuple[tuple[float, float], ...]]]:
    """Return the spans of ascent with their colour: grey if all agree, otherwise that of each run."""
    end = max(run.epochs_done for run in runs)
    # [(colour, ((start, end), ...))] of the runs that ascend.
    of_runs = [(plots.style(run.index)["color"], ascents(run, end)) for run in runs]
    of_runs = [(colour, spans) for colour, spans in of_runs if spans]
    alike = len({spans for _, spans in of_runs}) == 1
    return [(SHADE, of_runs[0][1])] if alike else of_runs


def ascents(run: Run, end: int) -> tuple[tuple[float, float], ...]:
    """Return the spans of epochs, up to ``end``, in which a run ascends; generation 0 has none."""
    k = run.ascent_epochs
    return tuple((start, min(start + k, end)) for start in _starts(run, end)) if k else ()


def _starts(run: Run, end: int) -> range:
    """Return the epochs at which generations from 1 on start, before ``end``."""
    length = run.epochs_per_generation
    return range(length, min(run.epochs, end), length)
