"""One method against another over settings: LW paper, Figure 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import Table
from seal_jax.reports.page import Missing, Section, data_table
from seal_jax.reports.studies import settings as grouping
from seal_jax.reports.studies.settings import Entry, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "One method against another"
LEAST = 2  # settings in a panel
ACROSS = 3
MARKERS = "os^Dv"  # the next one after all colours are used


class Panel(NamedTuple):
    """Accuracy of two methods, in %, ``[x, y]`` by setting."""

    weights: str
    x: str
    y: str
    points: dict[Setting, list[float]]


def section(entries: Sequence[Entry]) -> Section | Missing:
    """Plot every method against the baseline, or against the first method if there is no baseline."""
    # The baselines come first in this list.
    methods = grouping.methods_of(entries)
    panels = []
    for weights in grouping.available(entries):
        scores = grouping.by_setting(entries, weights)
        for other in methods[1:]:
            # By setting, over the seeds that both have: the difference is then paired.
            points = grouping.means(scores, (methods[0], other))
            percent = {setting: [100 * value for value in pair] for setting, pair in points.items()}
            if len(points) >= LEAST:
                panels.append(Panel(weights, methods[0], other, percent))
    if not panels:
        return Missing(TITLE, "needs two methods over at least two settings that both finished")
    # Names and colours are chosen once for all panels, so that a point is found again in another.
    settings = list(dict.fromkeys(setting for panel in panels for setting in panel.points))
    names = grouping.describe(settings)
    records = [
        {
            "setting": names[setting],
            "weights": panel.weights,
            "method of x": panel.x,
            "x: accuracy %": f"{x:.6g}",
            "method of y": panel.y,
            "y: accuracy %": f"{y:.6g}",
        }
        for panel in panels
        for setting, (x, y) in panel.points.items()
    ]
    return Section(
        "scatter",
        TITLE,
        "Test accuracy at the end, a point for each setting; above the diagonal the method of the "
        "vertical axis is better (LW paper, Figure 2).",
        tables=[_summary(panels)],
        data=data_table(records),
        draw=lambda figure: _draw(figure, panels, settings),
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


def _draw(figure: Figure, panels: Sequence[Panel], settings: Sequence[Setting]) -> None:
    """Draw a panel for each pair; a point's colour and marker stand for model and data set."""
    from matplotlib.lines import Line2D

    # Not the colour of a run: a point stands for a setting, with runs of two methods.
    subjects = list(dict.fromkeys(map(grouping.subject, settings)))
    looks: list[dict[str, Any]] = [
        {
            "linestyle": "none",
            "marker": MARKERS[index // len(plots.COLOURS) % len(MARKERS)],
            "color": plots.style(index)["color"],
        }
        for index in range(len(subjects))
    ]
    styles = {setting: looks[subjects.index(grouping.subject(setting))] for setting in settings}
    entries = [
        (Line2D([], [], **look), plots.drawable(name))
        for look, name in zip(looks, subjects, strict=True)
    ]
    # Hollow points mean no augmentation, but only where settings with and without it are compared.
    if len(set(map(augmented, settings))) > 1:
        hollow: dict[str, Any] = {"markerfacecolor": "white"}
        styles = {
            setting: look if augmented(setting) else look | hollow
            for setting, look in styles.items()
        }
        key: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "#444444"}
        entries.append((Line2D([], [], **key), "with augmentation"))
        entries.append((Line2D([], [], **key, **hollow), "without"))
    for axes, panel in zip(
        plots.panel_grid(figure, len(panels), ACROSS, grid=None), panels, strict=True
    ):
        _points(axes, panel, styles)
    plots.legend_beside(figure, entries)


def _points(axes: Axes, panel: Panel, styles: dict[Setting, dict[str, Any]]) -> None:
    values = np.array(list(panel.points.values()))  # [settings, 2], in %
    low, high = float(np.min(values)), float(np.max(values))
    room = max(0.06 * (high - low), 0.5)
    axes.axline((low, low), slope=1, color="#888888", linewidth=0.8, zorder=1)
    for setting, (x, y) in panel.points.items():
        axes.plot(x, y, markersize=5.5, zorder=2, **styles[setting])
    # One range and scale for both axes, so that the diagonal is at 45 degrees.
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(low - room, high + room)
    axes.set_aspect("equal")
    axes.set_xlabel(f"{plots.drawable(panel.x)} (%)")
    axes.set_ylabel(f"{plots.drawable(panel.y)} (%)")
    axes.set_title(f"{panel.weights} weights", fontsize=10)
