"""How fast training goes within a round, in the first, middle and last: LW paper, Figure 8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import MISSING, Table
from seal_jax.reports.runs import Run, per_seed
from seal_jax.reports.section import Missing, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Training speed within generations"
KEY = "train/accuracy"
SHARE = 0.9
ACROSS = 3
MOST = 21  # runs that are shown; the CSV file has all


def section(runs: Sequence[Run]) -> Section | Missing:
    """Plot training accuracy against the epochs of a generation."""
    found = {run.name: rounds for run in runs if len(rounds := chosen(run)) > 1}
    if not found:
        return Missing(TITLE, "needs a run that has come to its second generation")
    summary: list[list[str]] = []
    lines: list[list[str]] = []
    for name, rounds in found.items():
        first = next(iter(rounds.values()))
        goal = SHARE * float(np.max(first.mean(1)))
        for generation, values in rounds.items():
            mean = values.mean(1)
            reached = np.flatnonzero(mean >= goal)
            ends = (mean[0], mean[-1])
            summary.append(
                [
                    name,
                    str(generation + 1),
                    *(f"{100 * value:.2f}" for value in ends),
                    str(reached[0] + 1) if len(reached) else MISSING,
                    f"{100 * goal:.2f}",
                ]
            )
            for epoch, row in enumerate(values):
                std = f"{100 * row.std(ddof=1):.6g}" if len(row) > 1 else ""
                line = [name, str(generation + 1), str(epoch + 1), f"{100 * mean[epoch]:.6g}", std]
                lines.append(line)
    notes = (
        f"Goal: {SHARE:.0%} of the best training accuracy in the run's first of these generations; "
        "accuracies are the mean over seeds of running averages over the epoch, with augmentation.",
    )
    shown = dict(list(found.items())[:MOST])
    colours = {run.name: plots.style(run.index)["color"] for run in runs}
    summary = [cells for cells in summary if cells[0] in shown]
    header = ("run", "Gen", "after 1 epoch %", "at its end %", "epochs to the goal", "goal %")
    csv_header = ("run", "papers_gen", "epoch", "mean %", "std %")
    return Section(
        "training_speed",
        TITLE,
        "Training accuracy against epochs within the first, the middle and the last generation "
        "(LW paper, appendix E, Figure 8).",
        tables=[Table("Training accuracy (%)", header, summary, notes)],
        data=Table(TITLE, csv_header, lines),
        draw=lambda figure: _draw(figure, shown, colours),
        size=(3.4 * min(len(shown), ACROSS) + 1.4, 3.0 * -(-len(shown) // ACROSS)),
        describe="Training accuracy against epochs of a generation, a panel a run.",
        warnings=[f"The first {MOST} of {len(found)} runs; the CSV file has all."]
        if len(found) > MOST
        else (),
    )


def chosen(run: Run) -> dict[int, np.ndarray]:
    """Return training accuracy ``[epochs, seeds]`` of the first, middle and last generation.

    An unfinished last generation counts from its first epoch on.
    """
    rows: dict[int, list[np.ndarray]] = {}
    for row in run.rows:
        if KEY in row:
            rows.setdefault(int(row["generation"]), []).append(per_seed(row[KEY]))
    every = sorted(rows)
    if not every:
        return {}
    wanted = dict.fromkeys((every[0], every[(len(every) - 1) // 2], every[-1]))
    return {generation: np.array(rows[generation]) for generation in wanted}


def _draw(figure: Figure, found: dict[str, dict[int, np.ndarray]], colours: dict[str, str]) -> None:
    across = min(len(found), ACROSS)
    down = -(-len(found) // across)
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes, (name, rounds) in zip(grid, found.items(), strict=False):
        # The run's colour, and the last of its generations as a solid line.
        dashes = plots.DASHES[len(rounds) - 1 :: -1]
        for linestyle, (generation, values) in zip(dashes, rounds.items(), strict=True):
            epochs, (mean, low, high) = (
                np.arange(1, len(values) + 1),
                plots.over_seeds(100 * values),
            )
            look = {"color": colours[name], "linestyle": linestyle}
            point = {"marker": "."} if len(values) == 1 else {}
            axes.plot(epochs, mean, linewidth=1.4, label=f"Gen={generation + 1}", **look, **point)
            if values.shape[1] > 1:
                low, high = low.clip(0), high.clip(max=100)
                axes.fill_between(epochs, low, high, color=look["color"], alpha=0.2, linewidth=0)
        axes.set_title(name, fontsize=10, parse_math=False)
        axes.set_xlabel("epoch of the generation")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in grid[len(found) :]:
        axes.set_axis_off()
    for axes in grid[::across]:
        axes.set_ylabel(f"training accuracy (%)\n{plots.BAND}", fontsize=9)
