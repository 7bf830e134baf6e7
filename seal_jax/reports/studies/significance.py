"""Which method is better over settings: LW paper, Table 3."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import Table
from seal_jax.evaluation import significance
from seal_jax.evaluation.significance import Comparisons
from seal_jax.reports.page import Missing, Section, data_table
from seal_jax.reports.studies import settings as grouping
from seal_jax.reports.studies.settings import Entry, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def section(entries: Sequence[Entry]) -> Section | Missing:
    """Test every pair of methods over the settings in which both were trained."""
    methods = grouping.methods_of(entries)
    tables, records = [], []
    panels: dict[str, tuple[Comparisons, Table]] = {}
    for weights in grouping.available(entries):
        scores = grouping.by_setting(entries, weights)
        # Table 3 has a part for each model. With a single one, that of all models would be the same.
        models = list(dict.fromkeys(dict(setting)["model.name"] for setting in scores))
        for model in [EVERY, *models] if len(models) > 1 else models:
            part = {
                setting: by_method
                for setting, by_method in scores.items()
                if model in (EVERY, dict(setting)["model.name"])
            }
            comparisons = pairwise(methods, part)
            if comparisons is None:
                continue
            tables.append(_table(comparisons, f"{model}, {grouping.WEIGHTS[weights]}"))
            panels[f"{model}, {weights}"] = comparisons, tables[-1]
            records += _records(comparisons, weights, model)
    if not tables:
        return Missing(TITLE, "needs two methods over at least two settings that both finished")
    # The key once, below the last table.
    tables[-1] = tables[-1]._replace(notes=[KEY, significance.RULES])
    # Panels of one kind of weights share a row, if there are at most five of them.
    kinds = len({title.rpartition(", ")[2] for title in panels})
    across = min(len(panels) // kinds, 5)
    return Section(
        "significance",
        TITLE,
        "Exact one-sided binomial test of every pair of methods over settings (LW paper, Table 3). "
        "A setting is everything in the configuration but the method, how it divides its epochs "
        "into generations, and the seed; a score is the test accuracy at the end, a mean over the "
        "seeds that both methods have.",
        tables=tables,
        data=data_table(records),
        draw=lambda figure: _draw(figure, panels, across),
        size=(0.4 + 2.6 * across, 2.8 * -(-len(panels) // across)),
        describe="Share of settings in which the column's method beats the row's, for every pair.",
    )


def pairwise(methods: Sequence[str], scores: Scores) -> Comparisons | None:
    """Test each pair over the settings that both have; ``None`` if no pair shares two.

    Methods that share two settings with no other are left out. Holm's correction is over the pairs
    that share two settings.
    """
    # Not `significance.compare` on all methods at once: that needs every method in every setting.
    shared = {
        pair: np.array(list(grouping.means(scores, pair).values()))
        for pair in itertools.combinations(methods, 2)
    }
    shared = {pair: values for pair, values in shared.items() if len(values) >= LEAST}
    kept = [name for name in methods if any(name in pair for pair in shared)]
    if not kept:
        return None
    wins = np.zeros((len(kept), len(kept)), int)
    p_values = np.full(wins.shape, np.nan)
    # Rows and columns [methods, methods]: [i, j] is about j being better than i, as in Table 3.
    for pair, values in shared.items():
        compared = significance.compare(pair, values, level=LEVEL)
        cells = np.ix_(*2 * [[kept.index(name) for name in pair]])
        wins[cells], p_values[cells] = compared.wins, compared.p_values
    # While pairs that were not tested are NaN: `correct` leaves them out of the number of tests.
    corrected = significance.correct(p_values, LEVEL)
    p_values = np.nan_to_num(p_values, nan=1.0)
    return Comparisons(tuple(kept), wins, p_values, p_values <= LEVEL, corrected)


def _table(comparisons: Comparisons, where: str) -> Table:
    wins, marks = comparisons.wins, comparisons.marks(STAR, CIRCLE)
    rows = [[name] for name in comparisons.methods]
    for row, column in np.ndindex(wins.shape):
        text = f"{marks[row, column]} {wins[row, column]}:{wins[column, row]}".strip()
        rows[row].append("" if row == column else text)
    return Table(f"Is the column better? {where}", ("", *comparisons.methods), rows)


def _records(comparisons: Comparisons, weights: str, model: str) -> list[dict[str, Any]]:
    methods, wins, marks = comparisons.methods, comparisons.wins, comparisons.marks()
    return [
        {
            "weights": weights,
            "model": model,
            "row": methods[row],
            "column": methods[column],
            "column better": wins[row, column],
            "row better": wins[column, row],
            "p": f"{comparisons.p_values[row, column]:.6g}",
            "mark": marks[row, column],
        }
        for row, column in itertools.permutations(range(len(methods)), 2)
    ]


def _draw(figure: Figure, panels: Mapping[str, tuple[Comparisons, Table]], across: int) -> None:
    """Draw the share of settings that each column wins: violet where it wins, orange where it loses."""
    grid = plots.panel_grid(figure, len(panels), across, grid=None)
    for axes, (title, (comparisons, table)) in zip(grid, panels.items(), strict=True):
        trials = comparisons.wins + comparisons.wins.T
        # Ties count for neither, so the trials are wins of either side; 0.5, the middle of the colours,
        # where there are none.
        share = np.where(trials > 0, comparisons.wins / np.maximum(trials, 1), 0.5)
        share[np.eye(len(share), dtype=bool)] = np.nan
        # The range of colours is wider than 0 to 1, so that they are pale and numbers on them readable.
        axes.set_facecolor("#eeeeee")
        axes.imshow(share, cmap="PuOr", vmin=-0.8, vmax=1.8)
        for row, column in np.argwhere(trials > 0):
            text = table.rows[row][column + 1].replace(" ", "\n")
            axes.text(column, row, text, ha="center", va="center", fontsize=7)
        names = [plots.drawable(name) for name in comparisons.methods]
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.set_xlabel("is better than the row's", fontsize=8)
        axes.spines[:].set_visible(False)
