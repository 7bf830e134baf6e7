"""Tables 1 and 4 of the layerwise paper, and ours beside them as text and CSV."""

from __future__ import annotations

import csv
import io
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from seal_jax import papers
from seal_jax.reproduce.lw_plans import ALPHAS, METHODS, PENALTIES, PENALTY_METHODS

# Mean and standard deviation in %, by signal strength and method.
PAPER_1: Mapping[float, Mapping[str, papers.Number]] = {
    float(alpha): numbers for (alpha,), numbers in papers.load("LW", "Table 1").rows.items()
}
PAPER_4 = {  # an average of 100 runs, in %, without deviations
    method: [int(numbers[method].mean) for numbers in papers.load("LW", "Table 4").rows.values()]
    for method in papers.load("LW", "Table 4").columns
}
LINE = 100
UNREADABLE = "unreadable"
WITHIN = 2  # standard deviations of the paper


class Cell(NamedTuple):
    """A cell of a table: ours, and the paper's where it has one.

    Attributes:
      table: 1 or 4.
      row: the signal strength, or the penalty.
      method: by the paper's name.
      initialiser: "he" or "glorot".
      accuracies: of the seeds, in %.
      paper: in %, or None where it cannot be read.
      paper_std: alike; None in Table 4.
    """

    table: int
    row: float
    method: str
    initialiser: str
    accuracies: np.ndarray
    paper: float | None
    paper_std: float | None

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return float(self.accuracies.mean())

    @property
    def std(self) -> float:
        """The sample standard deviation over the seeds; 0 for one seed."""
        return float(self.accuracies.std(ddof=1)) if len(self.accuracies) > 1 else 0.0

    @property
    def distance(self) -> float | None:
        """From the paper's mean, in its standard deviations."""
        if self.paper is None or self.paper_std is None:
            return None
        return (self.mean - self.paper) / self.paper_std

    @property
    def within(self) -> bool:
        """Whether that is two at most."""
        return self.distance is not None and abs(self.distance) <= WITHIN


def cells1(test: np.ndarray, initialisers: Sequence[str]) -> list[Cell]:
    """Return the cells of Table 1 from ``Results.test`` of its plans."""
    final = iter(100 * np.asarray(test, np.float64)[:, :, -1].T)
    cells = []
    for initialiser, alpha, method in itertools.product(initialisers, ALPHAS, METHODS):
        mean, std = PAPER_1[alpha].get(method, (None, None))
        cells.append(Cell(1, alpha, method, initialiser, next(final), mean, std))
    return cells


def cells4(test: np.ndarray, initialisers: Sequence[str]) -> list[Cell]:
    """Return the cells of Table 4 from ``Results.test`` of its plans."""
    final = iter(100 * np.asarray(test, np.float64)[:, :, -1].T)
    return [
        Cell(4, penalty, method, initialiser, next(final), PAPER_4[method][index], None)
        for initialiser in initialisers
        for index, penalty in enumerate(PENALTIES)
        for method in PENALTY_METHODS
    ]


def text1(cells: Sequence[Cell]) -> str:
    """Return Table 1 for the terminal, with what agrees."""
    seeds = len(cells[0].accuracies)
    lines = [
        f"Table 1: test accuracy (%), mean (standard deviation) of {_count(seeds, 'seed')}; "
        f"* within {WITHIN} of the paper's standard deviations",
        "",
        _line("alpha", "", METHODS),
    ]
    for alpha in ALPHAS:
        rows = [cell for cell in cells if cell.row == alpha]
        published = [PAPER_1[alpha].get(method) for method in METHODS]
        lines.append(
            _line(
                f"{alpha:g}",
                "paper",
                [_number(*pair) if pair else UNREADABLE for pair in published],
            )
        )
        for initialiser, own in by_initialiser(rows):
            numbers = [_number(cell.mean, cell.std) + ("*" if cell.within else " ") for cell in own]
            lines.append(_line("", initialiser, numbers))
    lines.append("")
    for line in agreement(cells):
        lines += textwrap.wrap(line, LINE, subsequent_indent=" " * 4, break_on_hyphens=False)
    return "\n".join(lines)


def agreement(cells: Sequence[Cell]) -> list[str]:
    """Return how many cells of Table 1 agree with the paper, and which pairs of methods do not."""
    lines = []
    for initialiser, own in by_initialiser(cells):
        known = [cell for cell in own if cell.distance is not None]
        lines.append(
            f"{initialiser}: {sum(cell.within for cell in known)} of {len(known)} cells within "
            f"{WITHIN} of the paper's standard deviations."
        )
    all_ = {(cell.row, cell.method) for cell in cells if cell.distance is not None}
    found = {(cell.row, cell.method) for cell in cells if cell.within}
    missing = [f"{method} at {alpha:g}" for alpha, method in sorted(all_ - found)]
    lines.append(
        f"With at least one initialiser: {len(found)} of {len(all_)}"
        + (f"; not {', '.join(missing)}." if missing else ".")
    )
    for initialiser, own in by_initialiser(cells):
        for alpha in ALPHAS:
            lines += _order([cell for cell in own if cell.row == alpha], initialiser, alpha)
    return lines


def _order(cells: Sequence[Cell], initialiser: str, alpha: float) -> Iterator[str]:
    """Compare the order of the methods with the paper's, the pairs that differ by name."""
    ranked = sorted(cells, key=lambda cell: -cell.mean)
    yield f"{initialiser}, alpha {alpha:g}: {' > '.join(cell.method for cell in ranked)}"
    pairs = _pairs(cells)
    reversed_ = [(high, low) for high, low in pairs if high.mean < low.mean]
    if not reversed_:
        yield "  the order of the paper"
        return
    shown = []
    for high, low in reversed_:
        difference = low.accuracies - high.accuracies  # the seeds share their examples
        error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else np.inf
        doubt = "" if difference.mean() > 2 * error else ", less than two standard errors"
        shown.append(f"{low.method} over {high.method} (by {difference.mean():.1f}{doubt})")
    yield f"  {len(pairs) - len(reversed_)} of {len(pairs)} pairs as in the paper; {'; '.join(shown)}"


def pairs_in_order(cells: Sequence[Cell]) -> int:
    """Return how many pairs of methods, at the same signal strength, are in the paper's order."""
    return sum(
        high.mean >= low.mean
        for alpha in ALPHAS
        for high, low in _pairs([cell for cell in cells if cell.row == alpha])
    )


def _pairs(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    known = [cell for cell in cells if cell.paper is not None]
    return list(itertools.combinations(sorted(known, key=lambda cell: -_paper(cell)), 2))


def text4(cells: Sequence[Cell]) -> str:
    """Return Table 4 for the terminal."""
    seeds = len(cells[0].accuracies)
    groups = list(by_initialiser(cells))
    heads = ["paper", *(initialiser for initialiser, _ in groups)]
    width = 7 * len(heads)
    lines = [
        f"Table 4: test accuracy (%) at alpha 0.5, mean of {_count(seeds, 'seed')}",
        "",
        "L2 penalty" + "".join(f" |{method:^{width}}" for method in PENALTY_METHODS),
        " " * 10 + (" |" + "".join(f"{head:>7}" for head in heads)) * len(PENALTY_METHODS),
    ]
    for index, penalty in enumerate(PENALTIES):
        line = f"{penalty:<10g}"
        for method in PENALTY_METHODS:
            line += f" |{PAPER_4[method][index]:7d}"
            for _, own in groups:
                (mean,) = (c.mean for c in own if (c.row, c.method) == (penalty, method))
                line += f"{mean:7.1f}"
        lines.append(line)
    distances = [f"{initialiser} {distance4(own):.1f}" for initialiser, own in groups]
    return "\n".join([*lines, "", f"Root mean square difference: {', '.join(distances)}"])


def distance4(cells: Iterable[Cell]) -> float:
    """Return the root mean square difference from the paper, in percentage points."""
    return float(np.sqrt(np.mean([(cell.mean - _paper(cell)) ** 2 for cell in cells])))


def csv_text(cells: Iterable[Cell]) -> str:
    """Return the cells as CSV; a field is empty where the paper has no number."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = ("table", "row", "method", "initialiser")
    writer.writerow((*names, "seeds", "mean", "std", "paper_mean", "paper_std", "within"))
    for cell in cells:
        ours = (len(cell.accuracies), f"{cell.mean:.3f}", f"{cell.std:.3f}")
        within = "" if cell.distance is None else cell.within
        writer.writerow((*cell[:4], *ours, cell.paper, cell.paper_std, within))
    return buffer.getvalue()


def _paper(cell: Cell) -> float:
    assert cell.paper is not None
    return cell.paper


def by_initialiser(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """Yield each initialiser with its cells."""
    for initialiser in dict.fromkeys(cell.initialiser for cell in cells):
        yield initialiser, [cell for cell in cells if cell.initialiser == initialiser]


def _line(row: str, source: str, columns: Sequence[str]) -> str:
    return (f"{row:<6}{source:<7}" + "".join(f"{column:>13}" for column in columns)).rstrip()


def _number(mean: float, std: float | None) -> str:
    return f"{mean:.1f} ({std:.1f})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
