"""The whole report of runs: generations, curves, evaluations and studies, as a page and as files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from seal_jax.core import files
from seal_jax.core.plots import COLOURS, DASHES
from seal_jax.core.tables import MISSING, Spread, Table
from seal_jax.errors import UsageError
from seal_jax.reports import (
    curves,
    differences,
    evaluations,
    page,
    studies,
)
from seal_jax.reports.generations import Column, Comparison, compare
from seal_jax.reports.runs import PathLike, Run
from seal_jax.reports.section import Missing, Section

PAGE, TABLE = "report.html", "generations.csv"
# Runs that can be told apart by colour and dashes; of more, generations and curves show the first.
MOST = len(COLOURS) * len(DASHES)


def write(workdirs: PathLike | Sequence[PathLike], output: PathLike) -> Comparison:
    """Write the report of runs into a folder; return its generations table.

    ``report.html`` has everything; beside it are ``generations.csv``, ``curves.png``, and the numbers
    and plot of every other section under its name. Results of evaluations are found in
    ``RUN/evaluations/KIND/results.json``.

    Args:
      workdirs: the run folders.
      output: made if it does not exist.

    Raises:
      UsageError: no folder, the same one twice, one that holds no epoch of a run, or an output that
        cannot be written.
    """
    from seal_jax import __version__

    comparison = compare(workdirs)
    runs = [column.run for column in comparison.columns]
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from None
    comparison.to_csv(folder / TABLE)
    picture = curves.draw_all(runs[:MOST], folder / curves.CURVES).read_bytes()
    results, broken = evaluations.read(runs)
    evaluated, failed = evaluations.sections(results, runs)
    # Of results of an older checkpoint the studies would compare what is not comparable.
    margins = {
        each.run.name: each.newest_rows() for each in results.get("margins", ()) if not each.stale
    }
    made = studies.all_of(runs, margins)
    sections = [
        *_of_runs(comparison, picture),
        *evaluated,
        *(each for each in made if isinstance(each, Section)),
    ]
    missing = [each for each in made if isinstance(each, Missing)]
    if not evaluated:
        why = "needs the results of python -m seal_jax evaluate --kind=KIND --checkpoint=RUN"
        missing.insert(0, Missing("Evaluations", why))
    shown = []
    for section in sections:
        drawn = section.png()
        if section.draw is not None:
            files.write(folder / f"{section.name}.png", drawn)
        if section.csv:
            files.write(folder / f"{section.name}.csv", section.csv)
        shown.append((section, drawn))
    warnings = [f"Left out: {each}." for each in (*broken, *failed)]
    files.write(folder / PAGE, page.page(_title(runs), shown, missing, warnings, __version__))
    return comparison


def _of_runs(comparison: Comparison, picture: bytes) -> list[Section]:
    """Return the sections that every run has, and the settings in which they differ."""
    few, first = comparison, ""
    if len(comparison.columns) > MOST:
        few = dataclasses.replace(comparison, columns=comparison.columns[:MOST], warnings=())
        first = f"The first {MOST} of {len(comparison.columns)} runs"
    found = [
        Section(
            "generations",
            "Generations",
            markup=few.table(top5=True).as_html(),
            warnings=[f"{first}; the CSV file and the table of runs below have all."]
            if first
            else (),
            files=(TABLE,),
        ),
        Section(
            "curves",
            "Curves",
            picture=picture,
            describe="Training, validation and test accuracy over the epochs of every run.",
            warnings=[f"{first}: name fewer to see others."] if first else (),
            files=(curves.CURVES,),
        ),
        Section("runs", "Runs", tables=[_runs(comparison.columns)]),
    ]
    if table := differences.table([column.run for column in comparison.columns]):
        found.append(Section("settings", "Settings", tables=[table]))
    return found


def _runs(columns: Sequence[Column]) -> Table:
    def end(stats: Mapping[int, Spread]) -> str:
        return stats[max(stats)].text() if stats else MISSING

    cells = [
        [
            run.name,
            end(column.last),
            end(column.best),
            run.setting("method.name"),
            run.subject,
            str(run.seeds),
            f"{run.rows[-1]['generation'] + 1} of {run.generations}",
            f"{run.epochs_done} of {run.epochs}",
            "yes" if run.finished else "no",
            str(run.path),
        ]
        for column in columns
        for run in [column.run]
    ]
    header = (
        "run",
        "last %",
        "best %",
        "method",
        "experiment",
        "seeds",
        "generation",
        "epoch",
        "finished",
        "folder",
    )
    notes = (
        "last, best: test accuracy of the newest finished generation's last weights, and of those "
        "with its best validation accuracy, as in the generations table.",
    )
    return Table("Runs in this report", header, cells, notes)


def _title(runs: Sequence[Run]) -> str:
    what = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return f"{what}: {curves.subjects_of(runs)}"
