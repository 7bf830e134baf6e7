"""The generations table: test accuracy of one or more runs where each generation ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seal_jax.core import files
from seal_jax.core.tables import Spread, spread
from seal_jax.papers import PaperColumn, comparable_column
from seal_jax.reports import runs, tables
from seal_jax.reports.runs import PathLike, Run

# With more generations than this, the printed tables hold a selection; the CSV file holds all.
MOST_ROWS = 12

# Runs that differ in these are not quite comparable.
_TO_AGREE = (
    "data.name",
    "data.validation_fraction",
    "model.name",
    "train.generations",
    "train.epochs_per_generation",
)


@dataclasses.dataclass(frozen=True)
class Column:
    """One run in the table; generations count from 0, as in its metrics.

    Attributes:
      run: the run.
      last: test accuracy of the weights at a generation's end, by generation.
      best: that of the weights with the generation's best validation accuracy; empty without a
        validation split.
      chosen: the generation whose best validation accuracy, as a mean over the seeds, is highest;
        ``None`` without a validation split or before the first generation has ended.
      paper: the paper's column for this setting, if it has one.
      top5_last: top-5 test accuracy like ``last``; empty where the run did not score it.
      top5_best: the same like ``best``.
    """

    run: Run
    last: dict[int, Spread]
    best: dict[int, Spread]
    chosen: int | None
    paper: PaperColumn | None
    top5_last: dict[int, Spread] = dataclasses.field(default_factory=dict)
    top5_best: dict[int, Spread] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Test accuracy by generation and run.

    Attributes:
      columns: one a run, in the order given.
      warnings: one line for each setting in which the runs differ.
    """

    columns: tuple[Column, ...]
    warnings: tuple[str, ...]

    @property
    def generations(self) -> list[int]:
        """The generations, from 0, that at least one run has finished."""
        return sorted({generation for column in self.columns for generation in column.last})

    @property
    def shown(self) -> list[int]:
        """The generations in the printed tables.

        All of them up to 12; of more, those that the papers print (Gen=1, 3 and 10) and each run's
        last and chosen one.
        """
        every = self.generations
        if len(every) <= MOST_ROWS:
            return every
        chosen = {column.chosen for column in self.columns if column.chosen is not None}
        last = {max(column.last) for column in self.columns if column.last}
        return sorted({0, 2, 9, *chosen, *last} & set(every))

    def as_text(self, width: int = 100) -> str:
        """Return an aligned table with a legend; runs that do not fit ``width`` follow below."""
        return tables.text(self, width)

    def as_markdown(self) -> str:
        """Return the table with its legend as Markdown."""
        return tables.markdown(self)

    def to_csv(self, path: PathLike) -> None:
        """Write one line for each run and finished generation, accuracies in % and unrounded.

        Raises:
          UsageError: the file cannot be written.
        """
        files.write(Path(path), tables.csv_text(self))


def compare(workdirs: PathLike | Sequence[PathLike]) -> Comparison:
    """Return the generations table of the runs in these folders.

    Each cell has the test accuracy of the last weights of a generation and that of the best, by
    validation accuracy: the test split never chooses anything. Runs need not be finished.

    Args:
      workdirs: the run folders, with different names or parents.

    Raises:
      UsageError: no folder, the same one twice, or one that holds no epoch of a run.
    """
    found = runs.read_all(workdirs)
    return Comparison(tuple(map(_column, found)), tuple(_disagreements(found)))


def stat(values: Any) -> Spread:
    """Summarise one fraction per seed, in %.

    >>> stat([0.5, 0.52]).text(), stat([0.5]).text()
    ('50.00 to 52.00', '50.00')
    """
    return spread(100 * runs.per_seed(values))


def _column(run: Run) -> Column:
    ends = [row for row in run.rows if "test_last/accuracy" in row]

    def stats(key: str) -> dict[int, Spread]:
        return {int(row["generation"]): stat(row[key]) for row in ends if key in row}

    last, best = stats("test_last/accuracy"), stats("test_best/accuracy")
    for field in ("data.name", "model.name", "method.name", "train.seeds"):
        run.setting(field)  # an error that names the field, before anything needs it
    return Column(
        run,
        last,
        best,
        _chosen(run, best),
        comparable_column(run.config),
        top5_last=stats("test_last/top5_accuracy"),
        top5_best=stats("test_best/top5_accuracy"),
    )


def _chosen(run: Run, finished: dict[int, Spread]) -> int | None:
    """Choose a finished generation by the seeds' mean of the best validation accuracy within it."""
    scores: dict[int, float] = {}
    for generation in finished:
        rows = [
            runs.per_seed(row["validation/accuracy"])
            for row in run.rows
            if row["generation"] == generation and "validation/accuracy" in row
        ]
        if rows and np.isfinite(rows).all():
            scores[generation] = float(np.max(rows, axis=0).mean())
    return max(scores, key=lambda generation: scores[generation], default=None)


def _disagreements(found: Sequence[Run]) -> list[str]:
    lines = []
    for field in _TO_AGREE:
        values: dict[Any, list[str]] = {}
        for run in found:
            values.setdefault(run.setting(field), []).append(run.name)
        if len(values) > 1:
            each = "; ".join(f"{value}: {', '.join(names)}" for value, names in values.items())
            lines.append(f"the runs differ in {field} ({each})")
    return lines
