"""The generations table: test accuracy of one or more runs where each generation ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from seal_jax.core import files
from seal_jax.core.tables import MISSING, Spread, Table, cell, spread
from seal_jax.papers import PaperColumn, comparable_column
from seal_jax.reports import runs
from seal_jax.reports.runs import PathLike, Run

# With more generations than this, the printed tables hold a selection; the CSV file holds all.
MOST_ROWS = 12
UNFINISHED = "*"

# Names in the table of what is measured at the end of a generation, and its field in the metrics. The
# order is that of the CSV file's columns.
ACCURACIES = {
    "last": "test_last/accuracy",
    "best": "test_best/accuracy",
    "top-5 last": "test_last/top5_accuracy",
    "top-5 best": "test_best/top5_accuracy",
    "EMA": "test_ema/accuracy",
}

# Runs that differ in one of these are warned of. The method and its options are not among them: they are
# what is compared.
_TO_AGREE = (
    "data.name",
    "data.validation_fraction",
    "model.name",
    "train.generations",
    "train.epochs_per_generation",
)


@dataclasses.dataclass(frozen=True)
class Column:
    """One run in the table; generations are counted from 0, as in its metrics.

    Attributes:
      run: the run.
      accuracy: test accuracy by generation, for each of ``ACCURACIES``; empty for the best weights
        without a validation split, and for top-5 accuracy where the run did not score it.
      chosen: the generation whose best validation accuracy, as a mean over the seeds, is highest;
        ``None`` without a validation split or before the first generation has ended.
      paper: the paper's column for this setting, if it has one.
    """

    run: Run
    accuracy: dict[str, dict[int, Spread]]
    chosen: int | None
    paper: PaperColumn | None

    @property
    def last(self) -> dict[int, Spread]:
        """Test accuracy of the weights at the end of each generation."""
        return self.accuracy["last"]

    @property
    def best(self) -> dict[int, Spread]:
        """Test accuracy of the weights with the best validation accuracy of each generation."""
        return self.accuracy["best"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Test accuracy by generation and run.

    Attributes:
      columns: one for each run, in their order.
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
        # Gen=1, 3 and 10 of the papers' tables are 0, 2 and 9 here.
        chosen = {column.chosen for column in self.columns if column.chosen is not None}
        last = {max(column.last) for column in self.columns if column.last}
        return sorted({0, 2, 9, *chosen, *last} & set(every))

    def table(self, *, top5: bool = False) -> Table:
        """Return the table of the shown generations, each run's columns under its name, with a legend.

        Args:
          top5: whether to show top-5 accuracy too, where it was scored.
        """
        header, groups = ["Gen"], []
        rows = [[str(generation + 1)] for generation in self.shown]
        for column in self.columns:
            run = column.run
            # A run without a validation split has no column "best" instead of an empty one. "last" stays
            # while no generation has finished, so that every run has a column.
            measured = {
                name: stats
                for name, stats in column.accuracy.items()
                if name == "last" or (stats and (top5 or "top-5" not in name))
            }
            for row, generation in zip(rows, self.shown, strict=True):
                row += [cell(stats.get(generation), Spread.text) for stats in measured.values()]
                if column.paper:
                    published = column.paper.accuracy.get(generation + 1)
                    row.append(MISSING if published is None else f"{published:.2f}")
            headings = [*measured, *(["paper"] if column.paper else [])]
            title = f"{run.name}{'' if run.finished else UNFINISHED} ({run.seeds_text})"
            header += headings
            groups.append((title, len(headings)))
        subjects = dict.fromkeys(column.run.subject for column in self.columns)
        title = f"Test accuracy (%) by generation: {', '.join(subjects)}"
        return Table(title, header, rows, self.notes(), groups)

    def notes(self) -> list[str]:
        """Return the legend of the table."""
        unfinished = [
            f"{UNFINISHED} {run.name} is not finished: {run.epochs_done} of {run.epochs} epochs, "
            f"{len(column.last)} of {run.generations} generations."
            for column in self.columns
            for run in [column.run]
            if not run.finished
        ]
        if not self.shown:
            return ["No run has finished a generation yet.", *unfinished]
        notes = []
        if len(self.shown) < len(self.generations):
            notes.append(
                f"{len(self.shown)} of {len(self.generations)} generations: 1, 3, 10, and the last "
                "and the chosen of each run; the CSV file has all."
            )
        notes += [
            "Gen=1, as the papers count, is generation 0 of the metrics: plain training for all "
            "methods.",
            "last: the weights at the end of the generation.",
        ]
        if any(column.best for column in self.columns):
            notes.append(
                "best: the weights with the best validation accuracy of that generation; test never "
                "chooses."
            )
        if any(column.accuracy["EMA"] for column in self.columns):
            notes.append(
                "EMA: the average of the weights (optimizer.ema) at the end of the generation."
            )
        notes += _paper_notes(self.columns)
        notes += [_best_note(column) for column in self.columns if column.last]
        return [*notes, *unfinished, *(f"Warning: {line}." for line in self.warnings)]

    def as_text(self, width: int = 100) -> str:
        """Return an aligned table with a legend; runs that do not fit ``width`` follow below."""
        return self.table().as_text(width)

    def to_csv(self, path: PathLike) -> None:
        """Write one line for each run and finished generation, accuracies in % and unrounded.

        Raises:
          UsageError: the file cannot be written.
        """
        files.write(files.as_path(path), self.csv_table().as_csv())

    def csv_table(self) -> Table:
        """Return the content of the CSV file; a missing value is ``None``."""
        # The order of `ACCURACIES`. What was added later is written at the end, so that the columns
        # before it keep their places.
        names = ("last", "best", "last_top5", "best_top5", "ema")
        means = [f"{name}_{statistic}" for name in names for statistic in ("mean", "std")]
        header = (
            *("run", "workdir", "data", "model", "method", "seeds", "finished"),
            *("generation", "papers_gen", *means[:4], "chosen", "paper", "paper_table", *means[4:]),
        )
        rows = []
        for column in self.columns:
            run, paper = column.run, column.paper
            identity: list[Any] = [run.name, run.path]
            identity += [run.setting(f"{section}.name") for section in ("data", "model", "method")]
            for generation in sorted(column.last):
                published = paper.accuracy.get(generation + 1) if paper else None
                numbers: list[float | None] = []  # mean and std of each of `ACCURACIES`
                for stats in column.accuracy.values():
                    numbers += stats[generation][:2] if generation in stats else (None, None)
                rows.append(
                    [
                        *(*identity, run.seeds, run.finished, generation, generation + 1),
                        *(*numbers[:4], generation == column.chosen, published),
                        paper.table if paper and published is not None else None,
                        *numbers[4:],
                    ]
                )
        return Table("", header, rows)


def compare(workdirs: PathLike | Sequence[PathLike]) -> Comparison:
    """Return the generations table of the runs in these folders.

    Each cell has the test accuracy of the last weights of a generation and of the best by validation
    accuracy: the test split never chooses anything. Runs need not be finished.

    Args:
      workdirs: the run folders, with different names or parents.

    Raises:
      UsageError: no folder, the same one twice, or one that holds no epoch of a run.
    """
    compared = runs.read_all(workdirs)
    return Comparison(tuple(map(_column, compared)), tuple(_disagreements(compared)))


def stat(values: Any) -> Spread:
    """Summarise one fraction per seed, in %.

    >>> stat([0.5, 0.52]).text(), stat([0.5]).text()
    ('50.00 to 52.00', '50.00')
    """
    return spread(100 * runs.per_seed(values))


def _column(run: Run) -> Column:
    for field in ("data.name", "model.name", "method.name", "train.seeds"):
        run.setting(field)  # an error that names the field, before anything needs it
    # Only the last row of a generation has test accuracy.
    ends = [row for row in run.rows if "test_last/accuracy" in row]
    accuracy = {
        name: {int(row["generation"]): stat(row[key]) for row in ends if key in row}
        for name, key in ACCURACIES.items()
    }
    chosen = _chosen(run, accuracy["best"])
    return Column(run, accuracy, chosen, comparable_column(run.config))


def _chosen(run: Run, finished: dict[int, Spread]) -> int | None:
    """Choose the finished generation with the highest best validation accuracy, a mean over seeds."""
    scores: dict[int, float] = {}
    for generation in finished:
        # [epochs, seeds]. The best epoch is of each seed alone: a seed keeps its best weights whenever
        # they come.
        rows = [
            runs.per_seed(row["validation/accuracy"])
            for row in run.rows
            if row["generation"] == generation and "validation/accuracy" in row
        ]
        # A diverged seed makes the mean NaN, and `max` over NaN depends on the order.
        if rows and np.isfinite(rows).all():
            scores[generation] = float(np.max(rows, axis=0).mean())
    return max(scores, key=lambda generation: scores[generation], default=None)


def _disagreements(compared: Sequence[Run]) -> Iterator[str]:
    for field in _TO_AGREE:
        names: dict[Any, list[str]] = {}
        for run in compared:
            names.setdefault(run.setting(field), []).append(run.name)
        if len(names) > 1:
            values = "; ".join(f"{value}: {', '.join(members)}" for value, members in names.items())
            yield f"the runs differ in {field} ({values})"


def _paper_notes(columns: Sequence[Column]) -> list[str]:
    # Runs compared with the same paper, or that depart alike from its setting, share a sentence.
    sources: dict[str, list[str]] = {}
    departures: dict[tuple[str, ...], list[str]] = {}
    for column in columns:
        if column.paper:
            name = column.run.name
            source = f'{name}, {column.paper.table} "{column.paper.heading}"'
            sources.setdefault(column.paper.paper, []).append(source)
            departures.setdefault(column.paper.differences, []).append(name)
    notes = [f"paper: the {paper}; {'; '.join(texts)}." for paper, texts in sources.items()]
    return notes + [
        f"Other settings than the paper's in {', '.join(names)}: {', '.join(differences)}."
        for differences, names in departures.items()
        if differences
    ]


def _best_note(column: Column) -> str:
    name = column.run.name
    if column.chosen is not None:
        accuracy = column.best[column.chosen].text()
        return (
            f"Best generation of {name}, by validation: Gen={column.chosen + 1}, best {accuracy}."
        )
    final = max(column.last)
    why = "validation is not finite" if column.best else "it has no validation split"
    return (
        f"Best generation of {name}: nothing chooses one, as {why}; the last, Gen={final + 1}, has "
        f"{column.last[final].text()}."
    )
