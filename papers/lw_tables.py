"""Tables 1 and 4 of the layerwise paper beside ours, as text, CSV and plot, and the search over settings."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from papers import lw_synthetic
from papers.lw_synthetic import METHODS, PAPER, ROWS, Settings
from seal_jax.core import plots
from seal_jax.core.tables import Table, spread
from seal_jax.papers import Number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# How far a cell may be from the paper's, in standard deviations that the paper gives, to agree with it.
WITHIN = 2
TITLES = {"1": "Table 1: test accuracy (%)", "4": "Table 4: test accuracy (%) at alpha 0.5"}
ROW_NAMES = {"1": "alpha", "4": "L2 penalty"}


class Cell(NamedTuple):
    """A cell of a table: our result, and the paper's where it has one.

    Attributes:
      table: "1" or "4".
      row: the signal strength, or the penalty.
      method: the paper's name of the method.
      initialiser: "he" or "glorot".
      rounds: test accuracy at the end of every round in %, ``[seeds, rounds]``.
      paper: mean and, in Table 1, standard deviation over seeds in %; None where it cannot be read.
    """

    table: str
    row: float
    method: str
    initialiser: str
    rounds: np.ndarray
    paper: Number | None

    @property
    def accuracies(self) -> np.ndarray:
        """The final test accuracy of each seed in %."""
        return self.rounds[:, -1]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return spread(self.accuracies).mean

    @property
    def std(self) -> float:
        """The sample standard deviation over the seeds; 0 for one seed."""
        return spread(self.accuracies).std or 0.0

    @property
    def distance(self) -> float | None:
        """The signed distance from the paper's mean, in the paper's standard deviations."""
        if self.paper is None or self.paper.spread is None:
            return None
        return (self.mean - self.paper.mean) / self.paper.spread

    @property
    def within(self) -> bool:
        """Whether that distance is two at most."""
        return self.distance is not None and abs(self.distance) <= WITHIN


def make_cells(table: str, test: Any, initialisers: Sequence[str]) -> list[Cell]:
    """Return the cells of a table from ``Results.test`` of its plans, ``[seeds, plans, rounds]``."""
    by_plan = 100 * np.asarray(test, np.float64).swapaxes(0, 1)  # [plans, seeds, rounds], in %
    return [
        Cell(table, row, method, initialiser, rounds, PAPER[table].get(f"{row:g}", column=method))
        for (initialiser, row, method), rounds in zip(
            lw_synthetic.cells(table, initialisers), by_plan, strict=True
        )
    ]


def by_initialiser(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """Yield each initialiser with its cells."""
    for initialiser in dict.fromkeys(cell.initialiser for cell in cells):
        yield initialiser, [cell for cell in cells if cell.initialiser == initialiser]


def comparison(cells: Sequence[Cell]) -> Table:
    """Return the printed table: the paper's rows with ours below, and what agrees."""
    number, seeds = cells[0].table, len(cells[0].accuracies)
    count = "1 seed" if seeds == 1 else f"{seeds} seeds"
    title = f"{TITLES[number]}, mean (standard deviation) of {count}"
    if number == "1":
        title += f"; * within {WITHIN} of the paper's standard deviations"
    rows = []
    for row in ROWS[number]:
        in_row = [cell for cell in cells if cell.row == row]
        groups = list(by_initialiser(in_row))
        # A blank where our rows may have an asterisk, so that the numbers align.
        paper = [
            f"{'unreadable' if cell.paper is None else _number(*cell.paper)} "
            for cell in groups[0][1]
        ]
        rows.append([f"{row:<6g}paper", *paper])
        for initialiser, group in groups:
            ours = [_number(cell.mean, cell.std) + ("*" if cell.within else " ") for cell in group]
            rows.append([f"{'':6}{initialiser}", *ours])
    if number == "1":
        notes = agreement(cells)
    else:
        differences = [
            f"{name} {rms_difference(group):.1f}" for name, group in by_initialiser(cells)
        ]
        notes = [f"Root mean square difference: {', '.join(differences)}"]
    return Table(title, [ROW_NAMES[number], *METHODS[number]], rows, notes)


def _number(mean: float, std: float | None) -> str:
    return f"{mean:g}" if std is None else f"{mean:.1f} ({std:.1f})"


def agreement(cells: Sequence[Cell]) -> list[str]:
    """Return how many cells of Table 1 agree with the paper, and which pairs of methods do not."""
    lines = []
    # "Known" are cells whose deviation can be read in our copy of the paper.
    for initialiser, group in by_initialiser(cells):
        known = [cell for cell in group if cell.distance is not None]
        lines.append(
            f"{initialiser}: {sum(cell.within for cell in known)} of {len(known)} cells within "
            f"{WITHIN} of the paper's standard deviations."
        )
    # The paper does not name its initialiser, so a cell that agrees with either one counts.
    known_cells = {(cell.row, cell.method) for cell in cells if cell.distance is not None}
    agreeing = {(cell.row, cell.method) for cell in cells if cell.within}
    missing = [f"{method} at {alpha:g}" for alpha, method in sorted(known_cells - agreeing)]
    lines.append(
        f"With at least one initialiser: {len(agreeing)} of {len(known_cells)}"
        + (f"; not {', '.join(missing)}." if missing else ".")
    )
    for initialiser, group in by_initialiser(cells):
        for alpha in ROWS["1"]:
            lines += _order([cell for cell in group if cell.row == alpha], initialiser, alpha)
    return lines


def _order(cells: Sequence[Cell], initialiser: str, alpha: float) -> Iterator[str]:
    """Yield the order of the methods and how it compares with the paper's, with the pairs that differ."""
    ranked = sorted(cells, key=lambda cell: -cell.mean)
    yield f"{initialiser}, alpha {alpha:g}: {' > '.join(cell.method for cell in ranked)}"
    pairs = _pairs(cells)
    differing = []
    for high, low in pairs:
        if high.mean >= low.mean:
            continue
        # [seeds]; paired, since the methods of a seed have the same examples and initial weights.
        difference = low.accuracies - high.accuracies
        error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else np.inf
        doubt = "" if difference.mean() > 2 * error else ", less than two standard errors"
        differing.append(f"{low.method} over {high.method} (by {difference.mean():.1f}{doubt})")
    if differing:
        same = f"{len(pairs) - len(differing)} of {len(pairs)} pairs as in the paper"
        yield f"  {same}; {'; '.join(differing)}"
    else:
        yield "  the order of the paper"


def pairs_in_order(cells: Sequence[Cell]) -> tuple[int, int]:
    """Return how many pairs of methods with the same signal strength are in the paper's order, of how many."""
    rows = ([cell for cell in cells if cell.row == alpha] for alpha in ROWS["1"])
    pairs = [high.mean >= low.mean for row in rows for high, low in _pairs(row)]
    return sum(pairs), len(pairs)


def _pairs(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Return the pairs of cells that the paper has, the better one in the paper first."""
    known = [(cell.paper.mean, cell) for cell in cells if cell.paper is not None]
    ranked = [cell for _, cell in sorted(known, key=lambda pair: -pair[0])]
    return list(itertools.combinations(ranked, 2))


def rms_difference(cells: Iterable[Cell]) -> float:
    """Return the root mean square difference from the paper's means, in percentage points."""
    differences = [cell.mean - cell.paper.mean for cell in cells if cell.paper is not None]
    return float(np.sqrt(np.mean(np.square(differences))))


def csv_text(cells: Sequence[Cell]) -> str:
    """Return the cells of a table as CSV; a field is empty where the paper has no number."""
    header = ("table", "row", "method", "initialiser", "seeds", "mean", "std")
    form = ".1f" if cells[0].table == "1" else "g"  # as the paper prints them
    rows = [
        [
            *map(str, cell[:4]),
            str(len(cell.accuracies)),
            f"{cell.mean:.3f}",
            f"{cell.std:.3f}",
            *(
                "" if number is None else f"{number:{form}}"
                for number in cell.paper or (None, None)
            ),
            "" if cell.distance is None else str(cell.within),
        ]
        for cell in cells
    ]
    return Table("", (*header, "paper_mean", "paper_std", "within"), rows).as_csv()


def draw(path: Path, cells: Sequence[Cell], steps: int) -> None:
    """Write the plot: a row of Table 1 for each initialiser, and a row of Table 4.

    Args:
      path: the PNG file.
      cells: of one table or of both.
      steps: training steps of a round of Table 1.
    """
    from matplotlib.figure import Figure

    table1 = list(by_initialiser([cell for cell in cells if cell.table == "1"]))
    table4 = [cell for cell in cells if cell.table == "4"]
    rows = len(table1) + bool(table4)
    figure = Figure(figsize=(11.0, 3.2 * rows), dpi=150, layout="constrained")
    # Three columns serve both tables: Table 1 has three signal strengths and Table 4 three methods.
    grid = figure.subplots(rows, len(ROWS["1"]), squeeze=False)
    for row, (initialiser, group) in enumerate(table1):
        for axes, alpha in zip(grid[row], ROWS["1"], strict=True):
            _draw_rounds(axes, [cell for cell in group if cell.row == alpha], steps)
            axes.set_title(f"alpha {alpha:g}, {initialiser.capitalize()}")
    if table1:
        entries = grid[0, 0].get_legend_handles_labels()
        figure.legend(*entries, ncols=len(METHODS["1"]), loc="outside upper center")
    if table4:
        for axes, method in zip(grid[-1], METHODS["4"], strict=True):
            _draw_penalties(axes, [cell for cell in table4 if cell.method == method])
            axes.set_title(f"Table 4: {method}")
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy (%)")
    figure.savefig(path)


def _draw_rounds(axes: Axes, cells: Sequence[Cell], steps: int) -> None:
    """Draw means and standard deviations by training steps, and the paper's numbers at the right."""
    ends = steps * np.arange(1, cells[0].rounds.shape[1] + 1)
    for index, cell in enumerate(cells):
        look, mean = plots.style(index), cell.rounds.mean(0)
        axes.plot(ends, mean, label=cell.method, marker=".", markersize=5, linewidth=1.4, **look)
        if len(cell.rounds) > 1:
            # The standard deviation and not the interval of the mean, unlike in other plots: the paper
            # gives it.
            std = cell.rounds.std(0, ddof=1)
            axes.fill_between(
                ends, mean - std, mean + std, color=look["color"], alpha=0.12, linewidth=0
            )
        if cell.paper is not None:
            # Beside one another, right of the last round: some of the paper's numbers nearly coincide.
            axes.errorbar(
                ends[-1] * (1.06 + 0.035 * index),
                cell.paper.mean,
                yerr=cell.paper.spread,
                fmt="o",
                markersize=4.5,
                markerfacecolor="white",
                color=look["color"],
                linewidth=1.0,
            )
    axes.axvline(ends[-1] * 1.03, color="#8c8c8c", linewidth=0.7)
    axes.annotate(
        "paper", (0.99, 0.02), xycoords="axes fraction", ha="right", fontsize=8, color="#555555"
    )
    axes.set_xticks(ends[:: max(1, len(ends) // 4)])
    axes.set_xlabel("training steps")


def _draw_penalties(axes: Axes, cells: Sequence[Cell]) -> None:
    """Draw a method's column of Table 4: the paper's dashed, ours by initialiser."""
    # Evenly spaced: a log axis has no place for the penalty 0.
    positions = np.arange(len(ROWS["4"]))
    groups = list(by_initialiser(cells))
    paper = [np.nan if cell.paper is None else cell.paper.mean for cell in groups[0][1]]
    axes.plot(positions, paper, "o--", color="#777777", mfc="white", label="paper")
    for index, (initialiser, group) in enumerate(groups):
        means = [cell.mean for cell in group]
        axes.plot(
            positions, means, label=initialiser.capitalize(), marker=".", **plots.style(index)
        )
    axes.set_xticks(positions, [f"{penalty:g}" for penalty in ROWS["4"]])
    axes.set_ylim(0, 100)
    axes.set_xlabel("L2 penalty")
    axes.legend(fontsize=7, loc="lower right")


# The settings that the search tries. Table 1: one departure from the given settings at a time.
DEPARTURES: tuple[dict[str, Any], ...] = (
    {},
    {"first_round": "algorithm"},
    {"head": "normalised"},
    {"normaliser": "before"},
    {"fc": "one"},
    {"dsd": "global"},
    {"share": 0.3},
    {"share": 0.3, "dsd": "global"},
    {"data": "shared"},
)
# Table 4: optimizer, learning rate and steps per round, each with every one of CHOICES_4. The first is gradient
# descent as in Table 1, where 1,800 steps over five rounds are 360.
TRAININGS: tuple[tuple[str, float, int], ...] = (
    ("gd", 0.05, 360),
    ("adam", 0.001, 360),
    ("adam", 0.003, 360),
    ("adam", 0.01, 40),
    ("adam", 0.01, 100),
    ("adam", 0.01, 360),
    ("adam", 0.03, 100),
    ("adam", 0.03, 360),
)
CHOICES_4: tuple[dict[str, Any], ...] = tuple(
    {"penalty": penalty, "first_round": first_round}
    for penalty, first_round in itertools.product(("half", "sum"), ("algorithm", "train"))
)


def search1(settings: Settings, initialisers: Sequence[str], seeds: int) -> Iterator[str]:
    """Yield a line for each departure: by initialiser, the number of cells and of pairs that agree."""
    yield "Cells within two of the paper's standard deviations; pairs of methods in its order"
    for departure in DEPARTURES:
        departed = dataclasses.replace(settings, **departure)
        plans = lw_synthetic.plans("1", departed, initialisers)
        cells = make_cells("1", lw_synthetic.train_all(departed, plans, seeds).test, initialisers)
        counts = [
            "{} {} of {}, {} of {} pairs".format(
                initialiser,
                sum(cell.within for cell in group),
                sum(cell.distance is not None for cell in group),
                *pairs_in_order(group),
            )
            for initialiser, group in by_initialiser(cells)
        ]
        either = {(cell.row, cell.method) for cell in cells if cell.within}
        yield f"{_shown(departure) or 'as given':24} {'; '.join(counts)}; either {len(either)}"


def search4(settings: Settings, initialisers: Sequence[str], seeds: int) -> Iterator[str]:
    """Yield a line for each setting as soon as it is trained, then the closest of them."""
    lines = []
    yield "Root mean square difference from Table 4, and of each of its columns"
    for optimiser, learning_rate, steps in TRAININGS:
        training = {"optimiser": optimiser, "learning_rate": learning_rate, "steps": steps}
        # A dict of values of several types, which mypy cannot match to the fields.
        trained = dataclasses.replace(settings, **training)  # type: ignore[arg-type]
        # One program serves all choices, since plans are data; only a new training compiles.
        plans = [
            lw_synthetic.plans("4", dataclasses.replace(trained, **choice), initialisers)
            for choice in CHOICES_4
        ]
        results = lw_synthetic.train_all(trained, lw_synthetic.concatenate(plans), seeds)
        parts = np.split(results.test, len(CHOICES_4), axis=1)
        for choice, test in zip(CHOICES_4, parts, strict=True):
            for initialiser, group in by_initialiser(make_cells("4", test, initialisers)):
                columns = ", ".join(
                    f"{rms_difference(cell for cell in group if cell.method == method):.1f}"
                    for method in METHODS["4"]
                )
                line = f"({columns})  {_shown({**training, **choice})} initialiser={initialiser}"
                lines.append((rms_difference(group), line))
                yield f"{lines[-1][0]:5.1f} {line}"
    yield "Closest:"
    for distance, line in sorted(lines)[:10]:
        yield f"{distance:5.1f} {line}"


def _shown(departure: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in departure.items())
