"""Curves over epochs: accuracy of one or more runs, and everything about one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_jax.core import files, plots
from seal_jax.reports.runs import PathLike, Run, read_all

# Matplotlib is imported inside the functions: the tables do without it. Its figures are made as
# objects, without pyplot, so that nothing of the caller's state changes.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "curves.png"
DPI = 150
WIDTH = 11.0  # inches
HEIGHT = 3.0  # inches of a whole panel
LEGEND, LEGEND_RUN = 2.0, 0.42  # inches of the legend, and of a run in it
KEY = "#444444"  # what stands for any run in the legend

# A panel each, if any run has it. Test has its own, since its differences are small beside the
# falls of training and validation where something is forgotten.
ACCURACIES = {
    "train/accuracy": "training accuracy (%)",
    "validation/accuracy": "validation accuracy (%)",
    "test_last/accuracy": "test accuracy (%)",
}
LOSSES = {"train/loss": "-", "validation/loss": "--"}
SHADE = "#777777"
MOST_BOUNDARIES = 60

Span = tuple[float, float]


def draw(workdirs: PathLike | Sequence[PathLike], path: PathLike) -> Path:
    """Draw training, validation and test accuracy of one or more runs as a PNG of 1650 x 1350.

    Lines are means over the seeds and bands their 95 % intervals. Test accuracy is marked
    where generations end: filled for the last weights, hollow for those with the best validation
    accuracy of the generation. Vertical lines are the starts of generations, shades the ascents.
    Without a validation split, or a finished generation, there is a panel of 450 rows less.

    Args:
      workdirs: the run folders.
      path: the file to write.

    Returns:
      ``path``.

    Raises:
      UsageError: no folder, the same one twice, one that holds no epoch of a run, or a file that
        cannot be written.
    """
    path = Path(path)
    files.write(path, png(read_all(workdirs)))
    return path


def png(runs: Sequence[Run]) -> bytes:
    """Return the picture that :func:`draw` writes."""
    figure, axes = _figure(runs)
    return _finish(figure, axes, runs)


def draw_run(workdir: PathLike) -> Path:
    """Draw accuracy, loss and learning rate of one run into ``curves.png`` of its folder.

    Returns:
      The path of the file; it is replaced as a whole.

    Raises:
      UsageError: the folder holds no epoch of a run, or cannot be written.
    """
    runs = read_all(workdir)
    figure, axes = _figure(runs, more=(1, 0.5))
    colour = plots.style(0)["color"]
    for key, dashes in LOSSES.items():
        curve(axes[-2], runs[0], key, color=colour, linestyle=dashes)
    axes[-2].set_ylabel("loss")
    curve(axes[-1], runs[0], "learning_rate", color=colour)
    axes[-1].set_ylabel("learning rate")
    path = Path(workdir) / CURVES
    files.write(path, _finish(figure, axes, runs, lines=LOSSES))
    return path


def _figure(runs: Sequence[Run], more: Sequence[float] = ()) -> tuple[Figure, list[Axes]]:
    """Return a figure of the accuracies, with panels of ``more`` heights below for other things."""
    from matplotlib.figure import Figure

    shown = [key for key in ACCURACIES if any(key in row for run in runs for row in run.rows)]
    heights = [*(1.0 for _ in shown), *more]
    height = max(HEIGHT * sum(heights), LEGEND + LEGEND_RUN * len(runs))
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    ratios = {"height_ratios": heights}
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw=ratios)
    axes: list[Axes] = list(grid[:, 0])
    for panel, key in zip(axes, shown, strict=False):
        panel.set_ylabel(ACCURACIES[key])
        for run in runs:
            if key == "test_last/accuracy":
                marks(panel, run, **plots.style(run.index))
            else:
                curve(panel, run, key, scale=100, **plots.style(run.index))
    method = f"{runs[0].setting('method.name').upper()}: " if len(runs) == 1 else ""
    # No mathematics in names: a folder's may hold a dollar sign.
    axes[0].set_title(method + subjects_of(runs), fontsize=14, pad=10, parse_math=False)
    return figure, axes


def _finish(
    figure: Figure,
    axes: Sequence[Axes],
    runs: Sequence[Run],
    lines: Mapping[str, str] | None = None,
) -> bytes:
    """Add what all panels have in common and the legend; return the picture.

    Args:
      figure: the figure.
      axes: its panels, from top to bottom.
      runs: whose phases are marked.
      lines: the dashes of further quantities, which the legend explains.
    """
    from matplotlib.ticker import MaxNLocator

    for panel in axes:
        phases(panel, runs)
        plots.tidy(panel)
        panel.set_axisbelow(True)
        panel.margins(x=0)
    end = max(run.epochs_done for run in runs)
    axes[-1].set_xlim(0, end)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("epochs trained")
    figure.align_ylabels(axes)
    _legend(figure, runs, lines or {})
    return plots.as_png(figure)


def subjects_of(runs: Sequence[Run], most: int = 3) -> str:
    """Return the models and data sets, at most so many of them."""
    every = list(dict.fromkeys(run.subject for run in runs))
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def _legend(figure: Figure, runs: Sequence[Run], lines: Mapping[str, Any]) -> None:
    """Put the runs, and below them what is common to all, to the right of the panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[tuple[Any, str]] = []
    for run in runs:
        left = "" if run.finished else ", unfinished"
        line = Line2D([], [], linewidth=2.5, **plots.style(run.index))
        entries.append((line, f"{run.name}\n({run.seeds_text}{left})"))
    entries.append((Line2D([], [], linestyle="none"), ""))
    if any(run.seeds > 1 for run in runs):
        band = (Patch(color=KEY, alpha=0.25, linewidth=0), Line2D([], [], color=KEY))
        entries.append((band, plots.BAND.replace(", ", ",\n")))
    for key, label in (("test_last", "test, last weights"), ("test_best", "test, best weights")):
        if any(f"{key}/accuracy" in row for run in runs for row in run.rows):
            entries.append((Line2D([], [], **mark(key, KEY)), label))
    spans = shades(runs)
    if spans:
        label = "ascent" + (" (in the run's colour)" if len(spans) > 1 else "")
        entries.append((Patch(color=SHADE, alpha=0.25, linewidth=0), label))
    for key, dashes in lines.items():
        if any(key in row for run in runs for row in run.rows):
            line = Line2D([], [], color=KEY, linestyle=dashes)
            entries.append((line, key.replace("/", " ")))
    legend = figure.legend(
        [handle for handle, _ in entries],
        # Set below: a legend takes a leading underscore for "leave this out".
        ["x"] * len(entries),
        loc="outside right upper",
        frameon=False,
        labelspacing=0.8,
    )
    for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def curve(axes: Axes, run: Run, key: str, *, scale: float = 1, **line: Any) -> None:
    """Draw the mean over the seeds, and a band of its 95 % interval; of two seeds, of both values."""
    epochs, values = run.series(key)
    if not len(epochs):
        return
    if len(epochs) == 1:  # a line needs two points to be seen
        line |= {"marker": ".", "markersize": 8, "clip_on": False}
    limits = (0, scale) if key.endswith("/accuracy") else None
    plots.line_with_band(axes, epochs, values * scale, limits=limits, **line)


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
        mean, low, high = plots.over_seeds(100 * values)
        axes.plot(epochs, mean, **mark(key, line["color"]), zorder=look["zorder"])
        if key == "test_last":
            axes.plot(epochs, mean, linewidth=1.4, **line)
        # For the last only: at the same epoch the two bars would hide one another.
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
    of_runs = [(plots.style(run.index)["color"], ascents(run, end)) for run in runs]
    of_runs = [(colour, spans) for colour, spans in of_runs if spans]
    alike = len({spans for _, spans in of_runs}) == 1
    return [(SHADE, of_runs[0][1])] if alike else of_runs


def ascents(run: Run, end: int) -> tuple[Span, ...]:
    """Return the spans of epochs, up to ``end``, in which a run ascends; generation 0 does not."""
    k = run.ascent_epochs
    return tuple((start, min(start + k, end)) for start in _starts(run, end)) if k else ()


def _starts(run: Run, end: int) -> range:
    """Return the epochs at which generations from 1 on start, before ``end``."""
    length = run.epochs_per_generation
    return range(length, min(run.epochs, end), length)
