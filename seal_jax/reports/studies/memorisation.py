"""What trainings under wrong labels learn: test accuracy, and the wrong labels that are learnt by heart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import MISSING, Table, spread
from seal_jax.reports import curves
from seal_jax.reports.page import Missing, Section
from seal_jax.reports.runs import Run, per_seed
from seal_jax.reports.studies.settings import BASELINE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Memorisation of wrong labels"
MEMORISED, CORRECTED = "train/memorised", "train/corrected"
TEST = {"last": "test_last/accuracy", "best": "test_best/accuracy"}
MOST = 8  # runs in the plot; the table has all


def section(runs: Sequence[Run]) -> Section | Missing:
    """Plot test accuracy by generation beside the share of wrong labels that is reproduced."""
    noisy = [run for run in runs if any(MEMORISED in row for row in run.rows)]
    noisy = [run for run in noisy if len(run.series(TEST["last"])[0])]
    if not noisy:
        return Missing(TITLE, "needs a run with data.label_noise that has finished a generation")
    rows = []
    for run in noisy:
        for row in run.rows:
            if TEST["last"] in row:
                keys = (TEST["last"], TEST["best"], MEMORISED, CORRECTED)
                cells = [
                    spread(100 * per_seed(row[key])).text() if key in row else MISSING
                    for key in keys
                ]
                rows.append([run.name, str(row["generation"] + 1), *cells])
    header = ("run", "Gen", "test, last %", "test, best %", "memorised %", "corrected %")
    notes = (
        "memorised: training images under a wrong label that are predicted as that says, in the generation's last "
        "epoch; corrected: those predicted as their own label says. Validation and test labels are right.",
    )
    left_out = [f"The plot has the first {MOST} of {len(noisy)} runs."] * (len(noisy) > MOST)
    return Section(
        "memorisation",
        TITLE,
        "Wrong labels have no pattern, so a network can only learn them by heart, which costs test accuracy "
        "(Zaidi et al. 2022 study reinitialisation there).",
        tables=[Table("Test accuracy and wrong training labels", header, rows, notes)],
        draw=lambda figure: _draw(figure, noisy[:MOST]),
        size=(10.0, 4.2),
        describe="Test accuracy by generation, and the share of wrong training labels that is reproduced.",
        warnings=left_out,
    )


def _draw(figure: Figure, runs: Sequence[Run]) -> None:
    left, right = figure.subplots(1, 2)
    generations = max(run.generations for run in runs)
    for run in runs:
        look = plots.style(run.index)
        _, test = run.series(TEST["last"])
        places = np.arange(1, len(test) + 1)
        plots.line_with_band(left, places, 100 * test, limits=(0, 100), marker="o", **look)
        epochs, memorised = run.series(MEMORISED)
        generation = epochs / run.epochs_per_generation
        label = plots.drawable(run.name)
        plots.line_with_band(
            right, generation, 100 * memorised, limits=(0, 100), label=label, **look
        )
        _, best = run.series(TEST["best"])
        if run.setting("method.name") == BASELINE and len(best):
            # What a user does who stops in time, without any forgetting.
            early = f"{label}, 1 generation, stopped at its best validation"
            left.axhline(100 * best[0].mean(), color=look["color"], linestyle=":", label=early)
    for axes, title in ((left, "Test accuracy (%)"), (right, "Wrong labels learnt by heart (%)")):
        axes.set_title(title, fontsize=12)
        axes.set_xlabel("generations trained")
        axes.set_xticks(range(generations + 1) if axes is right else range(1, generations + 1))
        plots.tidy(axes)
    right.set_xlim(0, generations)
    right.set_ylim(bottom=0)
    noise = {run.experiment.get("data.label_noise") for run in runs}
    share = (
        ""
        if len(noise) > 1
        else f": {100 * float(noise.pop() or 0):g} % of the training labels are wrong"
    )
    figure.suptitle(curves.subjects_of(runs) + share, parse_math=False)
    plots.legend_below(figure, (right, left))
