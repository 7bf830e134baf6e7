"""Accuracy over settings: runs of one method that differ in numbers alone, such as the points of ``train.vary``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import MISSING, Table, spread
from seal_jax.reports.page import Missing, Section
from seal_jax.reports.runs import Run, differing, per_seed, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Accuracy over settings"
ACROSS = 2
FEWEST = 3  # points that make a line
TEST, VALIDATION = "test_last/accuracy", "validation/accuracy"


class Surface(NamedTuple):
    """Runs that differ in numbers alone.

    Attributes:
      title: what they are.
      fields: the settings in which they differ, those with the most values first.
      runs: finished ones.
    """

    title: str
    fields: tuple[str, ...]
    runs: tuple[Run, ...]

    def value(self, run: Run, field: str) -> float:
        """Return a setting in which the runs differ."""
        return float(run.experiment[field])

    def best(self, runs: Sequence[Run]) -> Run:
        """Return the run with the best validation accuracy, a mean over seeds; without a validation split the first."""
        return max(runs, key=validation)


def validation(run: Run) -> float:
    """Return the validation accuracy at the run's end, a mean over seeds; below 0 where there is none."""
    accuracy = per_seed(run.rows[-1].get(VALIDATION, np.nan)).mean()
    return float(accuracy) if np.isfinite(accuracy) else -1.0


def surfaces(runs: Sequence[Run]) -> Iterator[Surface]:
    """Yield the groups of runs that differ in numbers alone."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        if run.finished and TEST in run.rows[-1]:
            # What is no number must agree, and so must which settings there are.
            others = tuple(
                (name, float if _is_number(value) else value)
                for name, value in run.experiment.items()
            )
            groups.setdefault(others, []).append(run)
    for members in groups.values():
        fields = differing([run.experiment for run in members])
        values = {field: {run.experiment[field] for run in members} for field in fields}
        if len(members) >= FEWEST and fields:
            title = f"{members[0].setting('method.name')}: {members[0].subject}"
            order = sorted(fields, key=lambda field: -len(values[field]))
            yield Surface(title, tuple(order), tuple(members))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def section(runs: Sequence[Run]) -> Section | Missing:
    """Plot test accuracy over one setting or two, and list all points."""
    groups = list(surfaces(runs))
    if not groups:
        return Missing(
            TITLE, f"needs {FEWEST} finished runs that differ in numbers alone (train.vary)"
        )
    return Section(
        "settings_surface",
        TITLE,
        "Test accuracy of the last weights over the settings in which runs differ; of more than two settings the "
        "others are those with the best validation accuracy.",
        tables=[_table(group) for group in groups],
        draw=lambda figure: _draw(figure, groups),
        size=(5.2 * min(len(groups), ACROSS), 4.2 * -(-len(groups) // ACROSS)),
        describe="Test accuracy over one or two settings, a panel for each method.",
    )


def _table(group: Surface) -> Table:
    rows = []
    for run in sorted(group.runs, key=validation, reverse=True):
        last = run.rows[-1]
        accuracies = [
            spread(100 * per_seed(last[key])).text() if key in last else MISSING
            for key in (VALIDATION, TEST)
        ]
        rows.append(
            [run.name, *(show(run.experiment[field]) for field in group.fields), *accuracies]
        )
    names = [field.rpartition(".")[2] for field in group.fields]
    notes = ["The best by validation accuracy first."]
    return Table(group.title, ("run", *names, "validation %", "test %"), rows, notes)


def _draw(figure: Figure, groups: Sequence[Surface]) -> None:
    for axes, group in zip(plots.panel_grid(figure, len(groups), ACROSS), groups, strict=True):
        axes.set_title(group.title, fontsize=10, parse_math=False)
        axes.set_xlabel(group.fields[0].rpartition(".")[2])
        if len(group.fields) == 1:
            _line(axes, group)
        else:
            _heat_map(axes, group)


def _line(axes: Axes, group: Surface) -> None:
    (field,) = group.fields
    ordered = sorted(group.runs, key=lambda run: group.value(run, field))
    # Evenly spaced: values are usually chosen on a logarithmic scale, and may include 0.
    axes.set_xticks(range(len(ordered)), [f"{group.value(run, field):g}" for run in ordered])
    values = [100 * per_seed(run.rows[-1][TEST]) for run in ordered]
    look = plots.style(ordered[0].index)
    plots.line_with_band(axes, np.arange(len(ordered)), values, limits=(0, 100), marker="o", **look)
    axes.set_ylabel(f"test accuracy (%)\n{plots.BAND}", fontsize=9)


def _heat_map(axes: Axes, group: Surface) -> None:
    across, down = group.fields[:2]
    columns, lines = (
        sorted({group.value(run, field) for run in group.runs}) for field in (across, down)
    )
    cells: dict[tuple[int, int], list[Run]] = {}
    for run in group.runs:
        place = lines.index(group.value(run, down)), columns.index(group.value(run, across))
        cells.setdefault(place, []).append(run)
    means = np.full((len(lines), len(columns)), np.nan)
    for place, members in cells.items():
        accuracy = 100 * per_seed(group.best(members).rows[-1][TEST])
        means[place] = accuracy.mean()
        text = spread(accuracy).text() if np.isfinite(accuracy).all() else "diverged"
        text = text.replace(" ± ", "\n± ").replace(" to ", "\nto ")
        axes.text(place[1], place[0], text, ha="center", va="center", fontsize=7)
    axes.imshow(means, cmap="Blues", aspect="auto", origin="lower", alpha=0.6)
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(lines)), [f"{value:g}" for value in lines])
    axes.set_ylabel(down.rpartition(".")[2])
