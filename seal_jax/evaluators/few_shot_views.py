"""Table and plot of few-shot classification, with the numbers of the SEAL paper's Tables 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from seal_jax.core import plots
from seal_jax.core.tables import MISSING, Table, grouped, newest, spread
from seal_jax.evaluators import transfer_data
from seal_jax.evaluators.evaluator import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADS = {"linear": "Linear", "linear_affines": "Linear+Affines"}
COLUMNS = ("ChestX", "ISIC", "EuroSAT", "CropDisease")
# Accuracy in % and half its 95 % interval over 600 episodes, in the order of COLUMNS, by shots.
PAPER: dict[tuple[str, str], dict[int, tuple[tuple[float, float], ...]]] = {
    ("linear", "Normal"): {
        1: ((21.01, 0.35), (25.7, 0.47), (53.41, 0.92), (50.31, 1.03)),
        5: ((22.79, 0.36), (33.28, 0.49), (71.74, 0.75), (77.05, 0.80)),
        20: ((25.16, 0.37), (41.24, 0.50), (79.14, 0.67), (86.74, 0.57)),
        50: ((26.55, 0.36), (46.29, 0.47), (82.20, 0.61), (90.51, 0.45)),
    },
    ("linear", "Normal (long)"): {
        1: ((20.40, 0.23), (22.59, 0.35), (36.60, 0.75), (27.50, 0.69)),
        5: ((21.00, 0.28), (28.93, 0.48), (53.40, 0.77), (57.10, 1.07)),
        20: ((21.79, 0.27), (32.85, 0.50), (60.95, 0.81), (70.20, 1.01)),
        50: ((22.56, 0.29), (36.57, 0.53), (67.14, 0.77), (80.60, 0.78)),
    },
    ("linear", "LLF"): {
        1: ((20.38, 0.24), (24.61, 0.46), (36.58, 0.86), (26.28, 0.68)),
        5: ((22.03, 0.33), (29.60, 0.48), (60.69, 0.87), (53.55, 1.12)),
        20: ((22.54, 0.29), (32.26, 0.48), (67.79, 0.85), (68.43, 1.07)),
        50: ((23.78, 0.31), (35.59, 0.5), (73.76, 0.79), (79.67, 0.78)),
    },
    ("linear", "SEAL"): {
        1: ((21.67, 0.36), (27.93, 0.55), (57.75, 0.88), (63.64, 0.96)),
        5: ((24.42, 0.42), (37.58, 0.54), (74.61, 0.65), (85.00, 0.61)),
        20: ((27.44, 0.40), (46.96, 0.53), (82.45, 0.53), (92.47, 0.39)),
        50: ((29.78, 0.40), (51.46, 0.50), (84.99, 0.52), (94.91, 0.29)),
    },
    ("linear_affines", "Normal"): {
        1: ((21.14, 0.35), (26.71, 0.56), (47.36, 1.26), (64.75, 1.13)),
        5: ((20.82, 0.26), (28.57, 0.78), (53.35, 1.74), (63.22, 2.35)),
        20: ((22.91, 0.36), (49.40, 1.14), (81.52, 1.38), (87.43, 1.67)),
        50: ((24.2, 0.40), (60.27, 1.10), (88.09, 1.30), (93.80, 1.33)),
    },
    ("linear_affines", "Normal (long)"): {
        1: ((20.90, 0.37), (26.41, 0.54), (45.51, 1.25), (63.73, 1.05)),
        5: ((21.59, 0.34), (29.67, 0.82), (55.79, 1.67), (71.55, 2.00)),
        20: ((23.38, 0.37), (47.36, 1.25), (80.03, 1.53), (89.63, 1.53)),
        50: ((24.62, 0.45), (56.98, 1.32), (85.17, 1.58), (89.8, 1.9)),
    },
    ("linear_affines", "LLF"): {
        1: ((20.24, 0.24), (23.28, 0.45), (34.02, 1.35), (35.12, 1.61)),
        5: ((20.44, 0.19), (22.01, 0.44), (30.83, 1.45), (28.06, 1.47)),
        20: ((21.10, 0.25), (30.54, 1.22), (46.55, 2.42), (39.80, 2.30)),
        50: ((22.56, 0.34), (41.53, 1.65), (58.69, 2.76), (51.35, 2.92)),
    },
    ("linear_affines", "SEAL"): {
        1: ((21.3, 0.39), (29.14, 0.57), (55.68, 1.05), (67.87, 0.54)),
        5: ((22.98, 0.36), (39.64, 0.79), (73.83, 0.93), (88.24, 0.54)),
        20: ((26.99, 0.46), (55.12, 0.77), (87.70, 0.52), (95.67, 0.28)),
        50: ((27.13, 0.45), (60.59, 1.11), (91.94, 0.53), (97.91, 0.40)),
    },
}


def paper(row: Record) -> tuple[float, float] | None:
    """Return the paper's accuracy and interval in % for a row's method, data set, head and shots."""
    column = transfer_data.paper_name(row["dataset"])
    by_shots = PAPER.get((row["head"], transfer_data.paper_method(row) or ""), {})
    if column not in COLUMNS or row["ways"] != 5 or row["shots"] not in by_shots:
        return None
    return by_shots[row["shots"]][COLUMNS.index(column)]


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
