"""Accuracy against the compute budget: LW paper, Figures 4 and 9."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from seal_jax.core import plots
from seal_jax.core.tables import Table, spread
from seal_jax.reports import curves
from seal_jax.reports.page import Missing, Section
from seal_jax.reports.studies import settings as grouping
from seal_jax.reports.studies.settings import BASELINE, EPOCHS, Entry, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Accuracy against compute budget"
ACROSS = 2
Styles = Mapping[str, Mapping[str, Any]]


class Point(NamedTuple):
    """How one method ends with one budget, its accuracies by seed."""

    method: str
    weights: str
    steps: float
    total: int
    scores: tuple[float, ...]


class Panel(NamedTuple):
    """One experiment in so many rounds, with several budgets."""

    title: str
    rounds: int
    points: list[Point]


def section(entries: Sequence[Entry]) -> Section | Missing:
    """Plot test accuracy at the end against steps per round, in experiments that differ in these."""
    groups: dict[Setting, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(grouping.without(entry.setting, EPOCHS), []).append(entry)
    names = grouping.describe(list(groups))
    panels = [
        panel for setting, members in groups.items() for panel in _panels(names[setting], members)
    ]
    if not panels:
        return Missing(
            TITLE,
            "needs finished runs of a method that differ only in train.epochs_per_generation, and "
            "have more than one generation",
        )
    header = ("experiment", "rounds", "method", "weights", "steps per round", "steps in all")
    lines = [
        [
            panel.title,
            str(panel.rounds),
            point.method,
            point.weights,
            f"{point.steps:g}",
            str(point.total),
            f"{100 * mean:.2f}",
            "" if std is None else f"{100 * std:.2f}",
            str(len(point.scores)),
        ]
        for panel in panels
        for point in panel.points
        for mean, std, *_ in [spread(point.scores)]
    ]
    return Section(
        "compute_budget",
        TITLE,
        "Test accuracy at the end by the training steps of a round of reinitialisation (LW paper, "
        "Figures 4 and 9); the baseline, which trains once, stands where its steps are as many in "
        "all. A round that ends early by validation takes fewer steps than its budget.",
        tables=[Table("Test accuracy (%) by budget", (*header, "mean", "std", "seeds"), lines)],
        draw=lambda figure: _draw(figure, panels, grouping.styles(entries)),
        size=(4.2 * min(len(panels), ACROSS) + 2.4, 3.4 * -(-len(panels) // ACROSS)),
        describe="Test accuracy against training steps per round, a line a method.",
    )


def _panels(name: str, members: Sequence[Entry]) -> list[Panel]:
    """Return a panel for each number of rounds in which some method has several budgets."""
    panels = []
    rounds = dict.fromkeys(
        entry.run.generations
        for entry in members
        if entry.name != BASELINE and entry.run.generations > 1
    )
    for count in rounds:
        points = [
            point
            for entry in members
            if entry.name == BASELINE or entry.run.generations == count
            for point in _points(entry, count)
        ]
        others = {entry.method for entry in members if entry.name != BASELINE}
        budgets = {(point.method, point.steps) for point in points if point.method in others}
        if len(budgets) > len({method for method, _ in budgets}):  # a method has two
            title = name if len(rounds) == 1 else f"{name}, {count} rounds"
            panels.append(Panel(title, count, _merged(points)))
    return panels


def _points(entry: Entry, rounds: int) -> list[Point]:
    first = entry.run.rows[0]
    per_epoch = first["step"] // (first["epoch"] + 1)
    total = entry.run.generations * entry.run.epochs_per_generation * per_epoch
    return [
        Point(entry.method, weights, total / rounds, total, tuple(scores.values()))
        for weights in grouping.WEIGHTS
        if (scores := entry.scores(weights))
    ]


def _merged(points: Sequence[Point]) -> list[Point]:
    """Put the seeds of several runs of one method and budget together; order by budget."""
    seeds: dict[tuple[str, str, float, int], tuple[float, ...]] = {}
    for point in sorted(points, key=lambda point: point.steps):
        seeds[point[:4]] = seeds.get(point[:4], ()) + point.scores
    return [Point(*key, scores) for key, scores in seeds.items()]


def _draw(figure: Figure, panels: Sequence[Panel], styles: Styles) -> None:
    methods = list(dict.fromkeys(point.method for panel in panels for point in panel.points))
    for axes, panel in zip(plots.panel_grid(figure, len(panels), ACROSS), panels, strict=True):
        for method in methods:
            for weights in grouping.WEIGHTS:
                _line(axes, panel, method, weights, styles[method])
        axes.set_title(panel.title, fontsize=10, parse_math=False)
        axes.set_xlabel(f"training steps per round, of {panel.rounds}")
        axes.set_ylabel(f"test accuracy (%)\n{plots.BAND}", fontsize=9)
    shown = {name: styles[name] for name in methods}
    _legend(figure, shown, {point.weights for panel in panels for point in panel.points})


def _line(axes: Axes, panel: Panel, method: str, weights: str, look: Mapping[str, Any]) -> None:
    """Draw the last weights as a line with intervals over seeds, the best as marks, as curves do."""
    points = [point for point in panel.points if (point.method, point.weights) == (method, weights)]
    if not points:
        return
    steps = [point.steps for point in points]
    mean, low, high = 100 * plots.over_seeds(point.scores for point in points)
    axes.plot(steps, mean, **curves.mark(f"test_{weights}", look["color"]))
    if weights == "last":
        axes.plot(steps, mean, linewidth=1.4, **look)
        axes.vlines(steps, low, high, colors=look["color"], linewidth=0.8)


def _legend(figure: Figure, methods: Styles, weights: set[str]) -> None:
    from matplotlib.lines import Line2D

    entries = [
        (Line2D([], [], linewidth=2, **look), plots.drawable(method))
        for method, look in methods.items()
    ]
    if len(weights) > 1:
        entries += [
            (Line2D([], [], **curves.mark(f"test_{name}", "#444444")), label)
            for name, label in grouping.WEIGHTS.items()
        ]
    plots.legend_beside(figure, entries)
