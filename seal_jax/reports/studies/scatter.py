"""One method against another over settings: LW paper, Figure 2."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import Table
from seal_jax.reports.page import Missing, Section
from seal_jax.reports.studies import settings as grouping
from seal_jax.reports.studies.settings import Entry, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "One method against another"
LEAST = 2
ACROSS = 3
MARKERS = "os^Dv"  # after each round of colours


@dataclasses.dataclass(frozen=True)
class Panel:
    """Accuracy of two methods, in %, ``[x, y]`` by setting."""

    weights: str
    x: str
    y: str
    points: dict[Setting, list[float]]


def section(entries: Sequence[Entry]) -> Section | Missing:
    """Plot every method against the baseline, or the first method if no run is a baseline."""
    methods = grouping.methods_of(entries)
    panels = []
    for weights in grouping.available(entries):
        scores = grouping.by_setting(entries, weights)
        for other in methods[1:]:
            points = grouping.means(scores, (methods[0], other))
            percent = {setting: [100 * value for value in pair] for setting, pair in points.items()}
            if len(points) >= LEAST:
                panels.append(Panel(weights, methods[0], other, percent))
    if not panels:
        return Missing(TITLE, "needs two methods over at least two settings that both finished")
    settings = list(dict.fromkeys(setting for panel in panels for setting in panel.points))
    names = grouping.describe(settings)
    lines = [
        [names[setting], panel.weights, panel.x, f"{x:.6g}", panel.y, f"{y:.6g}"]
        for panel in panels
        for setting, (x, y) in panel.points.items()
    ]
    header = ("setting", "weights", "method of x", "x: accuracy %", "method of y", "y: accuracy %")
    return Section(
        "scatter",
        TITLE,
        "Test accuracy at the end, a point a setting; above the diagonal the method of the vertical "
        "axis is better (LW paper, Figure 2).",
        tables=[_summary(panels)],
        data=Table(TITLE, header, lines),
        draw=lambda figure: _draw(figure, panels),
        size=(3.4 * min(len(panels), ACROSS) + 2.6, 3.6 * -(-len(panels) // ACROSS)),
        describe=f"Test accuracy of the other methods against that of {methods[0]}, by setting.",
    )


def augmented(setting: Setting) -> bool:
    """Return whether training images are flipped, cropped or cut."""
    values = dict(setting)
    return bool(values["data.flip"] or values["data.crop_padding"] or values["data.cutout"])


def _summary(panels: Sequence[Panel]) -> Table:
    cells = []
    for panel in panels:
        gains = np.array([y - x for x, y in panel.points.values()])
        name, counts = f"{panel.y} over {panel.x}", (len(gains), (gains > 0).sum())
        numbers = [f"{number:+.2f}" for number in (np.median(gains), np.min(gains), np.max(gains))]
        cells.append([name, panel.weights, *map(str, counts), *numbers])
    header = ("", "weights", "settings", "better in", "median gain", "least", "most")
    return Table("Gain in test accuracy, in percentage points", header, cells)


def _draw(figure: Figure, panels: Sequence[Panel]) -> None:
    settings = list(dict.fromkeys(setting for panel in panels for setting in panel.points))
    subjects = list(dict.fromkeys(_subject(setting) for setting in settings))
    both = len({augmented(setting) for setting in settings}) > 1
    grid = plots.panel_grid(figure, len(panels), ACROSS, grid=None)
    for axes, panel in zip(grid, panels, strict=True):
        _points(axes, panel, subjects, both)
    _legend(figure, subjects, both)


def _points(axes: Axes, panel: Panel, subjects: Sequence[str], both: bool) -> None:
    values = np.array(list(panel.points.values()))
    low, high = float(np.min(values)), float(np.max(values))
    room = max(0.06 * (high - low), 0.5)
    axes.axline((low, low), slope=1, color="#888888", linewidth=0.8, zorder=1)
    for setting, (x, y) in panel.points.items():
        look = _marker(subjects.index(_subject(setting)))
        if both and not augmented(setting):
            look["markerfacecolor"] = "white"
        axes.plot(x, y, markersize=5.5, zorder=2, **look)
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(low - room, high + room)
    axes.set_aspect("equal")
    axes.set_xlabel(f"{plots.drawable(panel.x)} (%)")
    axes.set_ylabel(f"{plots.drawable(panel.y)} (%)")
    axes.set_title(f"{panel.weights} weights", fontsize=10)


def _legend(figure: Figure, subjects: Sequence[str], both: bool) -> None:
    from matplotlib.lines import Line2D

    entries = [
        (Line2D([], [], **_marker(index)), plots.drawable(name))
        for index, name in enumerate(subjects)
    ]
    if both:
        key: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "#444444"}
        entries.append((Line2D([], [], **key), "with augmentation"))
        entries.append((Line2D([], [], markerfacecolor="white", **key), "without"))
    plots.legend_beside(figure, entries)


def _marker(index: int) -> dict[str, Any]:
    return {
        "linestyle": "none",
        "marker": MARKERS[index // len(plots.COLOURS) % len(MARKERS)],
        "color": plots.style(index)["color"],
    }


def _subject(setting: Setting) -> str:
    values = dict(setting)
    return f"{values['model.name']} on {values['data.name']}"
