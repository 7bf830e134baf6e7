"""Table and plot of few-shot classification, with the numbers of the SEAL paper's Tables 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from seal_jax import papers
from seal_jax.core import plots
from seal_jax.core.tables import MISSING, Table, grouped, newest, spread
from seal_jax.evaluators import transfer_data
from seal_jax.evaluators.evaluator import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADS = {"linear": "Linear", "linear_affines": "Linear+Affines"}


def paper(row: Record) -> papers.Number | None:
    """Return the paper's accuracy and half its interval in % for a row's method, data set, head and shots."""
    if row["ways"] != 5:
        return None
    keys = (row["head"], transfer_data.paper_method(row) or "", str(row["shots"]))
    column = transfer_data.paper_name(row["dataset"])
    return papers.load("SEAL", "Tables 4, 5").get(*keys, column=column)


def table(rows: Sequence[Record]) -> Table:
    """Return a line for each run, head and number of shots, as in Tables 4 and 5."""
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    known = {row["dataset"] for row in rows if paper(row)}
    header = ["run", "weights", "step", "seed", "head", "shots"]
    for name in names:
        header += [transfer_data.paper_name(name), *(["paper"] if name in known else [])]
    cells = []
    for (run, weights, step, head, shots), own in grouped(
        rows, ("run", "weights", "step", "head", "shots")
    ).items():
        seeds = list(dict.fromkeys(row["seed"] for row in own))
        lines = [(str(seed), [row for row in own if row["seed"] == seed]) for seed in seeds]
        if len(seeds) > 1:
            lines.append((f"{len(seeds)} seeds", own))
        for label, mine in lines:
            line = [str(run), weights, str(step), label, HEADS[head], str(shots)]
            for name in names:
                there = [row for row in mine if row["dataset"] == name]
                line.append(_accuracy(there))
                if name in known:
                    theirs = paper(there[0]) if there else None
                    line.append("{:.2f} ± {:.2f}".format(*theirs) if theirs else MISSING)
            cells.append(line)
    first = rows[0]
    notes = [
        f"Accuracy in % of {first['ways']}-way episodes ({first['episodes']} of each kind). In "
        "brackets: the 95 % interval of one network over its episodes (1.96 standard errors).",
    ]
    if known:
        notes.append(
            "paper: SEAL paper, Tables 4 and 5, the row of the same method; ResNet-50 trained on "
            "Tiny-ImageNet (64x64) for 10 generations of 160 epochs, Normal for one. Its ± is half "
            "the 95 % interval over 600 episodes. Here: "
            f"{transfer_data.settings_of(rows)}."
        )
    diverged = sum(row["diverged"] for row in rows)
    if diverged:
        notes.append(f"{diverged} episodes diverged; each counts with the accuracy of chance.")
    title = "Few-shot classification across domains"
    return Table(title, header, cells, notes)


def _accuracy(own: Sequence[Record]) -> str:
    if len(own) > 1:
        return spread([row["accuracy"] for row in own]).text(scale=100)
    if not own:
        return MISSING
    mean, half = 100 * own[0]["accuracy"], 100 * own[0]["interval"]
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def draw(figure: Figure, rows: Sequence[Record]) -> None:
    """Draw accuracy over shots: a panel a data set and kind of weights, a line a run and head."""
    rows = newest(rows)
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    kinds = list(dict.fromkeys(row["weights"] for row in rows))
    panes = figure.subplots(len(kinds), len(names), squeeze=False, sharex=True, sharey="col")
    shots = sorted({row["shots"] for row in rows})
    for line, weights in enumerate(kinds):
        for axes, name in zip(panes[line], names, strict=True):
            own = [row for row in rows if (row["weights"], row["dataset"]) == (weights, name)]
            _draw_lines(axes, own, shots)
            if line == 0:
                axes.set_title(transfer_data.paper_name(name), parse_math=False)
            if line == len(kinds) - 1:
                axes.set_xticks(range(len(shots)), [str(each) for each in shots])
                axes.set_xlabel("images a class")
        panes[line][0].set_ylabel(f"accuracy, %, {weights} weights\nmean, 95 % interval")
    plots.legend_below(figure, panes.flat, transfer_data.PAPER_LABEL)


def _draw_lines(axes: Axes, rows: Sequence[Record], shots: Sequence[int]) -> None:
    styles = plots.run_styles(rows)
    for (run,), mine in grouped(rows, ("run",)).items():
        colour = styles[run]["color"]
        for (head,), own in grouped(mine, ("head",)).items():
            by_shots = grouped(own, ("shots",))
            place = [shots.index(each) for (each,) in by_shots]
            points = 100 * np.array([_point(each) for each in by_shots.values()]).T
            axes.errorbar(
                place,
                points[0],
                plots.bars(points),
                color=colour,
                linestyle="-" if head == "linear" else "--",
                marker="o" if head == "linear" else "s",
                markersize=4,
                linewidth=1.4,
                elinewidth=1.0,
                label=f"{run}, {HEADS[head]}",
            )
            theirs = [(shots.index(each), paper(own[0])) for (each,), own in by_shots.items()]
            numbers = [(x, published[0]) for x, published in theirs if published]
            if numbers:
                axes.plot(
                    *zip(*numbers, strict=True),
                    linestyle="none",
                    marker="o" if head == "linear" else "s",
                    markersize=7,
                    markerfacecolor="none",
                    markeredgecolor=colour,
                    alpha=0.6,
                    label=f"{transfer_data.PAPER_LABEL} (hollow)",
                )
    if rows:
        axes.axhline(100 / rows[0]["ways"], color="#888888", linewidth=0.7, linestyle=":")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _point(own: Sequence[Record]) -> tuple[float, float, float]:
    """Return accuracy and ends of its interval: of one seed over episodes, of several over seeds."""
    if len(own) == 1:
        mean, half = own[0]["accuracy"], own[0]["interval"]
        return mean, mean - half, mean + half
    mean, _, _, low, high = spread([row["accuracy"] for row in own])
    return mean, low, high


def size(rows: Sequence[Record]) -> tuple[float, float]:
    """Return the figure's size: a panel for each data set and kind of weights."""
    wide = len({row["dataset"] for row in rows})
    high = len({row["weights"] for row in rows})
    lines = math.ceil(len({(row["run"], row["head"]) for row in rows}) / 2)
    return (max(2.7 * wide + 0.8, 6.0), 2.7 * high + 0.7 + 0.25 * lines)
