"""The whole report of runs: generations, curves, evaluations and studies, as a page and as files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from seal_jax.core import files, plots
from seal_jax.core.tables import MISSING, Spread, Table
from seal_jax.errors import UsageError
from seal_jax.reports import curves, evaluations
from seal_jax.reports.generations import Column, Comparison, compare
from seal_jax.reports.page import Missing, Section, data_table, page
from seal_jax.reports.runs import PathLike, differences
from seal_jax.reports.studies import (
    budget,
    memorisation,
    scatter,
    significance,
    size,
    speed,
    surface,
    tree,
)
from seal_jax.reports.studies.settings import entries
from seal_jax.training import manifest

PAGE = "report.html"
# How many runs colour and dashes can tell apart. Of more, generations and curves show the first ones.
MOST = len(plots.COLOURS) * len(plots.DASHES)


def write(workdirs: PathLike | Sequence[PathLike], output: PathLike) -> Comparison:
    """Write the report of runs into a folder; return its generations table.

    ``report.html`` has everything; beside it are ``generations.csv``, ``curves.png``, and the numbers
    and plot of every other section, named after it. Results of evaluations are read from
    ``RUN/evaluations/KIND/results.json``.

    Args:
      workdirs: the run folders.
      output: folder, created if it does not exist.

    Raises:
      UsageError: no folder, the same one twice, one that holds no epoch of a run, or an output that
        cannot be written.
    """
    from seal_jax import __version__

    comparison = compare(workdirs)
    runs = [column.run for column in comparison.columns]
    folder = files.as_path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from None
    results, broken = evaluations.read(runs)
    evaluated, failed = evaluations.sections(results, runs)
    # The studies compare final networks, so stale results, of an older checkpoint, are left out. By now
    # `results` lacks those that could not be shown.
    margins = {
        result.run.name: result.newest_rows()
        for result in results.get("margins", ())
        if not result.stale
    }
    compared = entries(runs)
    # The order of the page.
    made = [
        *_of_runs(comparison),
        memorisation.section(runs),
        *evaluated,
        *(study.section(compared) for study in (significance, scatter, tree, budget)),
        speed.section(runs),
        size.section(compared, margins),
        surface.section(runs),
    ]
    sections = [section.drawn() for section in made if isinstance(section, Section)]
    missing = [section for section in made if isinstance(section, Missing)]
    if not evaluated:
        why = "needs the results of python -m seal_jax evaluate --kind=KIND --checkpoint=RUN"
        missing.insert(0, Missing("Evaluations", why))
    # The page comes last: when it exists, so do the files that it names.
    for section in sections:
        for name, content in section.files.items():
            files.write(folder / name, content)
    what = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    title = f"{what}: {curves.subjects_of(runs)}"
    warnings = [f"Left out: {reason}." for reason in (*broken, *failed)]
    files.write(folder / PAGE, page(title, sections, missing, warnings, __version__))
    return comparison


def _of_runs(comparison: Comparison) -> list[Section]:
    """Return the sections that every run has, and the settings in which they differ."""
    runs = [column.run for column in comparison.columns]
    few = comparison
    more: list[str] = []  # the beginning of a warning
    if len(runs) > MOST:
        # Without the warnings, which name runs that the cut table does not show.
        few = dataclasses.replace(comparison, columns=comparison.columns[:MOST], warnings=())
        more = [f"The first {MOST} of {len(runs)} runs"]
    sections = [
        Section(
            "generations",
            "Generations",
            tables=[few.table(top5=True)],
            data=comparison.csv_table(),
            warnings=[
                f"{first}; the CSV file and the table of runs below have all." for first in more
            ],
        ),
        Section(
            "curves",
            "Curves",
            picture=curves.png(runs[:MOST]),
            describe="Training, validation and test accuracy over the epochs of every run.",
            warnings=[f"{first}: name fewer to see others." for first in more],
        ),
        Section("runs", "Runs", tables=[_runs(comparison.columns)]),
    ]
    if table := differences(runs):
        sections.append(Section("settings", "Settings", tables=[table]))
    return sections


def _runs(columns: Sequence[Column]) -> Table:
    def end(stats: Mapping[int, Spread]) -> str:
        """Return the accuracy of the newest finished generation."""
        return stats[max(stats)].text() if stats else MISSING

    records = [
        {
            "run": run.name,
            "last %": end(column.last),
            "best %": end(column.best),
            "method": run.setting("method.name"),
            "experiment": run.subject,
            "seeds": str(run.seeds),
            "generation": f"{run.rows[-1]['generation'] + 1} of {run.generations}",
            "epoch": f"{run.epochs_done} of {run.epochs}",
            "finished": "yes" if run.finished else "no",
            "started on": manifest.summary(run.path) or MISSING,
            "folder": str(run.path),
        }
        for column in columns
        for run in [column.run]
    ]
    notes = (
        "last, best: test accuracy of the newest finished generation's last weights, and of those "
        "with its best validation accuracy, as in the generations table.",
    )
    return data_table(records)._replace(title="Runs in this report", notes=notes)
