"""Which method is better over settings: LW paper, Table 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import Table
from seal_jax.reports.section import Missing, Section
from seal_jax.reports.studies import settings as grouping
from seal_jax.reports.studies.settings import Entry, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from seal_jax.evaluation.significance import Comparisons

TITLE = "Significance"
LEVEL = 0.05
LEAST = 2  # settings that two methods share
STAR, CIRCLE = "★", "○"
EVERY = "all models"
KEY = (
    f"{STAR}: the method of the column is better than that of the row, at the 95 % level; {CIRCLE}: "
    "still so after Holm's correction over all pairs of a table. Numbers: settings in which the column "
    "is better, and in which the row is. Fewer than 5 settings cannot be significant."
)

Scores = dict[Setting, dict[str, dict[int, float]]]


def section(entries: Sequence[Entry]) -> Section | Missing:
    """Test every pair of methods over the settings that both were trained in."""
    methods = grouping.methods_of(entries)
    tables, lines = [], []
    panels: list[tuple[str, Comparisons]] = []
    for weights in grouping.available(entries):
        scores = grouping.by_setting(entries, weights)
        models = list(dict.fromkeys(dict(setting)["model.name"] for setting in scores))
        for model in [EVERY, *models] if len(models) > 1 else [EVERY]:
            part = {
                setting: found
                for setting, found in scores.items()
                if model in (EVERY, dict(setting)["model.name"])
            }
            found = pairwise(methods, part)
            if found is None:
                continue
            where = models[0] if len(models) == 1 else model
            tables.append(_table(found, f"{where}, {grouping.WEIGHTS[weights]}"))
            panels.append((f"{where}, {weights}", found))
            lines += _lines(found, weights, where)
    if not tables:
        return Missing(TITLE, "needs two methods over at least two settings that both finished")
    tables[-1] = tables[-1]._replace(notes=[KEY, panels[-1][1].rules])
    header = ("weights", "model", "row", "column", "column better", "row better", "p", "mark")
    return Section(
        "significance",
        TITLE,
        "Exact one-sided binomial test of every pair of methods over settings (LW paper, Table 3). "
        "A setting is everything in the configuration but the method, how it divides its epochs "
        "into generations, and the seed; a score is the test accuracy at the end, a mean over the "
        "seeds that both methods have.",
        tables=tables,
        data=Table(TITLE, header, lines),
        draw=lambda figure: _draw(figure, panels),
        size=(0.4 + 2.6 * _across(panels), 2.8 * -(-len(panels) // _across(panels))),
        describe="Share of settings in which the column's method beats the row's, for every pair.",
    )


def pairwise(methods: Sequence[str], scores: Scores) -> Comparisons | None:
    """Test each pair over the settings that both have; ``None`` if no pair shares two.

    Of the methods, those without such a pair are left out. Holm's correction is over the pairs that
    share two settings.
    """
    from seal_jax.evaluation import significance

    shared = {
        (a, b): np.array(list(grouping.means(scores, (a, b)).values()))
        for index, a in enumerate(methods)
        for b in methods[index + 1 :]
    }
    shared = {pair: values for pair, values in shared.items() if len(values) >= LEAST}
    kept = [name for name in methods if any(name in pair for pair in shared)]
    if not kept:
        return None
    wins = np.zeros((len(kept), len(kept)), int)
    p_values = np.full(wins.shape, np.nan)
    for pair, values in shared.items():
        found = significance.compare(pair, values, level=LEVEL)
        a, b = (kept.index(name) for name in pair)
        for row, column, ours in ((a, b, (0, 1)), (b, a, (1, 0))):
            wins[row, column], p_values[row, column] = found.wins[ours], found.p_values[ours]
    corrected = significance.correct(p_values, LEVEL)
    p_values = np.nan_to_num(p_values, nan=1.0)
    return significance.Comparisons(
        tuple(kept), wins, p_values, p_values <= LEVEL, corrected, significance.rules()
    )


def _table(found: Comparisons, where: str) -> Table:
    cells = [
        [name, *(_cell(found, row, column) for column in range(len(found.methods)))]
        for row, name in enumerate(found.methods)
    ]
    return Table(f"Is the column better? {where}", ("", *found.methods), cells)


def _cell(found: Comparisons, row: int, column: int) -> str:
    if row == column:
        return ""
    return (
        f"{_mark(found, row, column)} {found.wins[row, column]}:{found.wins[column, row]}".strip()
    )


def _mark(found: Comparisons, row: int, column: int) -> str:
    if found.corrected[row, column]:
        return CIRCLE
    return STAR if found.significant[row, column] else ""


def _lines(found: Comparisons, weights: str, model: str) -> list[list[str]]:
    names = list(enumerate(found.methods))
    return [
        [
            weights,
            model,
            row_name,
            column_name,
            str(found.wins[row, column]),
            str(found.wins[column, row]),
            f"{found.p_values[row, column]:.6g}",
            {CIRCLE: "o", STAR: "*"}.get(_mark(found, row, column), ""),
        ]
        for row, row_name in names
        for column, column_name in names
        if row != column
    ]


def _draw(figure: Figure, panels: Sequence[tuple[str, Comparisons]]) -> None:
    """Draw the share of settings that each column wins, violet where it does, orange where it loses."""
    across = _across(panels)
    grid = list(figure.subplots(-(-len(panels) // across), across, squeeze=False).flat)
    for axes, (title, found) in zip(grid, panels, strict=False):
        _matrix(axes, title, found)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()


def _across(panels: Sequence[tuple[str, Comparisons]]) -> int:
    """Return how many panels stand in a row: those of one kind of weights, if they are not many."""
    kinds = len({title.rpartition(", ")[2] for title, _ in panels})
    return min(len(panels) // kinds, 5)


def _matrix(axes: Axes, title: str, found: Comparisons) -> None:
    trials = found.wins + found.wins.T
    share = np.where(trials > 0, found.wins / np.maximum(trials, 1), 0.5)
    share[np.eye(len(share), dtype=bool)] = np.nan
    # Pale, for the numbers to be read on it.
    axes.set_facecolor("#eeeeee")
    axes.imshow(share, cmap="PuOr", vmin=-0.8, vmax=1.8)
    for row, column in np.argwhere(trials > 0):
        text = _cell(found, row, column).replace(" ", "\n")
        axes.text(column, row, text, ha="center", va="center", fontsize=7)
    names = [plots.drawable(name) for name in found.methods]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel("is better than the row's", fontsize=8)
    axes.spines[:].set_visible(False)
