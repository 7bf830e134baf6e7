"""Speed of training within the first, middle and last round: LW paper, Figure 8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import MISSING, Table
from seal_jax.reports.page import Missing, Section, data_table
from seal_jax.reports.runs import Run, per_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Training speed within generations"
KEY = "train/accuracy"
SHARE = 0.9  # of the first generation's best accuracy: the goal
ACROSS = 3
MOST = 21  # runs in the plot and the table; the CSV file has all


def section(runs: Sequence[Run]) -> Section | Missing:
    """Plot training accuracy against the epochs of a generation."""
    # By run and generation, [epochs, seeds]. One generation alone cannot be compared.
    by_run = {run.name: rounds for run in runs if len(rounds := chosen(run)) > 1}
    if not by_run:
        return Missing(TITLE, "needs a run that has come to its second generation")
    shown = dict(list(by_run.items())[:MOST])
    summary, records = [], []
    for name, rounds in by_run.items():
        # The first generation sets the goal for all: the question is how soon later ones get there.
        goal = SHARE * float(np.max(next(iter(rounds.values())).mean(1)))
        for generation, values in rounds.items():
            mean = values.mean(1)
            if name in shown:
                reached = np.flatnonzero(mean >= goal)
                ends = [f"{100 * value:.2f}" for value in (mean[0], mean[-1])]
                epochs = str(reached[0] + 1) if len(reached) else MISSING
                summary.append([name, str(generation + 1), *ends, epochs, f"{100 * goal:.2f}"])
            records += [
                {
                    "run": name,
                    "papers_gen": generation + 1,
                    "epoch": epoch + 1,
                    "mean %": f"{100 * mean[epoch]:.6g}",
                    "std %": f"{100 * row.std(ddof=1):.6g}" if len(row) > 1 else "",
                }
                for epoch, row in enumerate(values)
            ]
    notes = (
        f"Goal: {SHARE:.0%} of the best training accuracy in the run's first of these generations; "
        "accuracies are the mean over seeds of running averages over the epoch, with augmentation.",
    )
    colours = {run.name: plots.style(run.index)["color"] for run in runs}
    header = ("run", "Gen", "after 1 epoch %", "at its end %", "epochs to the goal", "goal %")
    return Section(
        "training_speed",
        TITLE,
        "Training accuracy against epochs within the first, the middle and the last generation "
        "(LW paper, appendix E, Figure 8).",
        tables=[Table("Training accuracy (%)", header, summary, notes)],
        data=data_table(records),
        draw=lambda figure: _draw(figure, shown, colours),
        size=(3.4 * min(len(shown), ACROSS) + 1.4, 3.0 * -(-len(shown) // ACROSS)),
        describe="Training accuracy against epochs of a generation, a panel for each run.",
        warnings=[f"The first {MOST} of {len(by_run)} runs; the CSV file has all."]
        * (len(by_run) > MOST),
    )


def chosen(run: Run) -> dict[int, np.ndarray]:
    """Return training accuracy ``[epochs, seeds]`` of the first, middle and last generation.

    An unfinished last generation is included from its first epoch on.
    """
    rows: dict[int, list[np.ndarray]] = {}
    for row in run.rows:
        if KEY in row:
            rows.setdefault(int(row["generation"]), []).append(per_seed(row[KEY]))
    every = sorted(rows)
    if not every:
        return {}
    # Of an even number of generations the lower middle; of two, first and middle are the same key.
    ends_and_middle = (every[0], every[(len(every) - 1) // 2], every[-1])
    return {generation: np.array(rows[generation]) for generation in ends_and_middle}


def _draw(
    figure: Figure, by_run: dict[str, dict[int, np.ndarray]], colours: dict[str, str]
) -> None:
    panels = plots.panel_grid(figure, len(by_run), ACROSS, sharey=True)
    for axes, (name, rounds) in zip(panels, by_run.items(), strict=True):
        # Lines have the run's colour. The dashes are counted from the end, so that the last generation is
        # always solid, also in a run of two.
        dashes = plots.DASHES[len(rounds) - 1 :: -1]
        for linestyle, (generation, values) in zip(dashes, rounds.items(), strict=True):
            line: dict[str, Any] = {"color": colours[name], "linestyle": linestyle}
            if len(values) == 1:  # a line needs two points to be seen
                line["marker"] = "."
            line |= {"label": f"Gen={generation + 1}", "limits": (0, 100)}
            plots.line_with_band(axes, np.arange(1, len(values) + 1), 100 * values, **line)
        axes.set_title(name, fontsize=10, parse_math=False)
        axes.set_xlabel("epoch of the generation")
        axes.legend(frameon=False, fontsize=8)
    for axes in panels[::ACROSS]:
        axes.set_ylabel(f"training accuracy (%)\n{plots.BAND}", fontsize=9)
