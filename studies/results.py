"""The numbers of a study, one row for each seed of each cell: collected from run folders, kept in a CSV file."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seal_jax import evaluators, methods
from seal_jax.core import programs, vary
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError
from seal_jax.evaluators import command as evaluation
from seal_jax.evaluators.loaded_run import DivergedError
from seal_jax.reports import runs as run_folders
from seal_jax.reports.runs import Run, per_seed
from seal_jax.training import metrics, pretrained
from seal_jax.training import workdir as workdirs
from studies.design import ACCURACY, Cell, Measure, Study, full

# Of every training in %: the weights at its end, those with the best validation accuracy, and their average.
_ALWAYS = {
    "last": Measure("last", "test_last/accuracy", scale=100),
    "best": Measure("best", "test_best/accuracy", scale=100),
    "ema": Measure("ema", "test_ema/accuracy", scale=100),
    "memorised": Measure("memorised", "train/memorised", scale=100),
}


class Row(NamedTuple):
    """One training.

    Attributes:
      cell: what was trained.
      seed: of the training.
      numbers: by the measure's key, NaN for one that diverged; what was not measured is left out.
      chosen: the tuned settings, as text.
      settings: the fingerprint of all of its settings.
    """

    cell: Cell
    seed: int
    numbers: Mapping[str, float]
    chosen: str
    settings: str


def collect(study: Study, workdir: Path) -> list[Row]:
    """Return the rows of all cells whose run in ``workdir`` has ended.

    Raises:
      UsageError: none has, or one has other settings than the study's.
    """
    rows = []
    for cell in study.cells():
        if run := _finished(workdir / "-".join(cell)):
            rows += _rows(cell, run, study)
    if not rows:
        raise UsageError(
            f"--workdir={workdir} has no finished run of the study: sweep its config there first"
        )
    return rows


def _finished(folder: Path) -> Run | None:
    """Return the run in a folder, if it has ended."""
    # One that begins has the first without the second, or no row yet, and a point that is written the second first.
    if not (folder / workdirs.CONFIG).exists() or not metrics.read(folder):
        return None
    (run,) = run_folders.read_all(folder)
    return run if run.finished else None


def measures(study: Study) -> dict[str, Measure]:
    """Return what is kept of every training, by key."""
    return {**_ALWAYS, **study.measures}


def _rows(cell: Cell, run: Run, study: Study) -> list[Row]:
    space = [full(field) for field in study.systems[cell.system].space]
    settings = settings_lib.read(Settings, study.config("-".join(cell)).to_dict())
    train = dataclasses.replace(settings.train, tuned_on="", tuned_weights="last")
    point = {field: run.setting(field) for field in space}
    where = {"data.data_dir": run.setting("data.data_dir")}
    expected = vary.at(dataclasses.replace(settings, train=train), point | where)
    # Of an older study, or swept with other options, but for where the data is.
    workdirs.claim(run.path, pretrained.complete(methods.complete(expected), run.path))
    seeds = range(first := int(run.setting("train.seed")), first + run.seeds)
    numbers: dict[int, dict[str, float]] = {seed: {} for seed in seeds}
    for key, measure in measures(study).items():
        values = _of_evaluation(run, measure) if measure.kind else _of_metrics(run, measure)
        for seed, value in values.items():
            numbers[seed][key] = measure.scale * value
    chosen = " ".join(f"{field.rpartition('.')[2]}={value:g}" for field, value in point.items())
    fingerprint = study.fingerprint(cell)
    return [Row(cell, seed, numbers[seed], chosen, fingerprint) for seed in seeds]


def _of_metrics(run: Run, measure: Measure) -> dict[int, float]:
    rows = [
        row
        for row in run.rows
        if all(row.get(name) == value for name, value in measure.where.items())
    ]
    if not rows or measure.field not in rows[-1]:
        return {}
    return dict(
        enumerate(per_seed(rows[-1][measure.field]).tolist(), int(run.setting("train.seed")))
    )


def _of_evaluation(run: Run, measure: Measure) -> dict[int, float]:
    path = run.path / evaluation.EVALUATIONS / measure.kind / evaluation.RESULTS
    if not path.exists():
        return {}
    read, values = evaluation.read(path), {}
    options = dataclasses.asdict(evaluators.load(measure.kind).options(**measure.options))
    newest = {row["step"] for row in read["rows"]} == {run.rows[-1]["step"]}
    if not newest or read.get("options") != json.loads(json.dumps(options)):
        raise UsageError(
            f"{path} is of {'other options' if newest else 'an earlier step'} than the study asks for: remove "
            f"{path.parent} and evaluate again"
        )
    for row in read["rows"]:
        if row["weights"] == "last" and all(
            row.get(name) == value for name, value in measure.where.items()
        ):
            value = row
            for part in measure.field.split("/"):
                value = _entry(value, part)
            values[int(row["seed"])] = math.nan if value is None else float(value)
    return values


def _entry(value: Any, part: str) -> Any:
    if not isinstance(value, list):
        return value[part]
    return float(np.mean(value)) if part == "mean" else value[int(part)]


def evaluate(study: Study, workdir: Path) -> None:
    """Do the evaluations that the study's measures need, of all its finished runs; what is done stays done."""
    for cell in study.cells():
        folder = workdir / "-".join(cell)
        for kind, options in study.evaluations().items():
            if _finished(folder):
                print(f"{kind} of {folder.name}", flush=True)
                programs.make_room()
                evaluator = evaluators.load(kind)
                output = folder / evaluation.EVALUATIONS / kind
                try:
                    evaluation.evaluate(
                        evaluator, folder, evaluator.options(**options), output, weights=("last",)
                    )
                except DivergedError as error:
                    print(f"left out: {error}", flush=True)


def merge(study: Study, rows: Sequence[Row], kept: Sequence[Row]) -> list[Row]:
    """Return the rows, and of the kept ones, from other machines or earlier, those of other cells, in order.

    What was kept of cells that the study has no more, or with other settings, is left out.
    """
    cells = {cell: study.fingerprint(cell) for cell in study.cells()}
    new = {row.cell for row in rows}
    others = [row for row in kept if row.cell not in new and cells.get(row.cell) == row.settings]
    order = [*cells]
    return sorted([*rows, *others], key=lambda row: (order.index(row.cell), row.seed))


def as_csv(study: Study, rows: Sequence[Row]) -> str:
    """Return rows as the content of a CSV file."""
    keys = [key for key in measures(study) if any(key in row.numbers for row in rows)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*Cell._fields, "seed", *keys, "chosen", "settings"])
    for row in rows:
        numbers = [_text(row.numbers.get(name)) for name in keys]
        writer.writerow([*row.cell, row.seed, *numbers, row.chosen, row.settings])
    return file.getvalue()


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV file that :func:`as_csv` made."""
    named = (*Cell._fields, "seed", "chosen", "settings")
    with path.open(newline="") as file:
        return [
            Row(
                Cell(*(line[field] for field in Cell._fields)),
                int(line["seed"]),
                {name: float(line[name]) for name in line if name not in named and line[name]},
                line["chosen"],
                line["settings"],
            )
            for line in csv.DictReader(file)
        ]


Scores = dict[Cell, dict[int, float]]  # by cell and seed


def scores(study: Study, rows: Sequence[Row]) -> dict[str, Scores]:
    """Return all numbers by measure; the accuracy is that of the weights that a system is scored by."""
    table: dict[str, Scores] = {ACCURACY: {}}
    cells = {cell: study.fingerprint(cell) for cell in study.cells()}
    for row in rows:
        if cells.get(row.cell) != row.settings:
            raise UsageError(
                f"{'-'.join(row.cell)} is no cell of the study, or has other settings: train and collect it again"
            )
        weights = study.systems[row.cell.system].weights
        if weights not in row.numbers:
            raise UsageError(
                f"{'-'.join(row.cell)}, seed {row.seed} has no accuracy of its {weights!r} weights: train and collect "
                "it again"
            )
        table[ACCURACY].setdefault(row.cell, {})[row.seed] = row.numbers[weights]
        for key, value in row.numbers.items():
            table.setdefault(key, {}).setdefault(row.cell, {})[row.seed] = value
    return table
