"""The numbers of a study, one row for each seed of each cell: collected from run folders, kept in a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from seal_jax.errors import UsageError
from seal_jax.reports import runs as run_folders
from seal_jax.reports.runs import Run, per_seed
from studies.design import Cell, Study

# Of the network at the end and of the one with the best validation accuracy, in %; what is not measured is empty.
NUMBERS = ("last", "best", "memorised")
_KEYS = {"last": "test_last/accuracy", "best": "test_best/accuracy", "memorised": "train/memorised"}


class Row(NamedTuple):
    """One training.

    Attributes:
      cell: what was trained.
      seed: of the training.
      numbers: by name in %, NaN for one that diverged.
      chosen: the tuned settings, as text.
    """

    cell: Cell
    seed: int
    numbers: Mapping[str, float]
    chosen: str


def collect(study: Study, workdir: Path) -> list[Row]:
    """Return the rows of all cells whose run in ``workdir`` has ended.

    Raises:
      UsageError: none has.
    """
    rows = []
    for cell in study.cells():
        folder = workdir / "-".join(cell)
        if not (folder / "metrics.jsonl").exists():
            continue
        (run,) = run_folders.read_all(folder)
        if run.finished:
            rows += _rows(cell, run, study)
    if not rows:
        raise UsageError(
            f"--workdir={workdir} has no finished run of the study: sweep its config there first"
        )
    return rows


def _rows(cell: Cell, run: Run, study: Study) -> list[Row]:
    last, first = run.rows[-1], int(run.setting("train.seed"))
    values = {name: 100 * per_seed(last[key]) for name, key in _KEYS.items() if key in last}
    chosen = " ".join(
        f"{field.rpartition('.')[2]}={run.setting(study.full(field)):g}"
        for field in study.systems[cell.system].grid
    )
    return [
        Row(
            cell, first + seed, {name: float(value[seed]) for name, value in values.items()}, chosen
        )
        for seed in range(run.seeds)
    ]


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows as the content of a CSV file."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*Cell._fields, "seed", *NUMBERS, "chosen"])
    for row in rows:
        numbers = [_text(row.numbers.get(name)) for name in NUMBERS]
        writer.writerow([*row.cell, row.seed, *numbers, row.chosen])
    return file.getvalue()


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV file that :func:`as_csv` made."""
    with path.open(newline="") as file:
        return [
            Row(
                Cell(*(line[field] for field in Cell._fields)),
                int(line["seed"]),
                {name: float(line[name]) for name in NUMBERS if line[name]},
                line["chosen"],
            )
            for line in csv.DictReader(file)
        ]


def scores(study: Study, rows: Sequence[Row]) -> dict[Cell, dict[int, float]]:
    """Return the accuracy of each cell by seed, of the weights that its system is scored by."""
    table: dict[Cell, dict[int, float]] = {}
    for row in rows:
        value = row.numbers.get(study.systems[row.cell.system].weights, math.nan)
        table.setdefault(row.cell, {})[row.seed] = value
    return table
