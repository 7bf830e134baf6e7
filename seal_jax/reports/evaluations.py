"""Results of evaluations of runs, as sections of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from seal_jax.core.plots import drawable
from seal_jax.errors import UsageError
from seal_jax.reports.page import Section
from seal_jax.reports.runs import Run

# Evaluators are imported inside the functions: they load Flax, which the report of runs that were not
# evaluated does without.
if TYPE_CHECKING:
    from seal_jax.evaluators.evaluator import Evaluator

FOLDER, RESULTS = "evaluations", "results.json"
# Marks the name of a run whose results are not of its newest checkpoint.
STALE = "†"


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of one evaluator for one run: what ``results.json`` holds."""

    run: Run
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """The step of the newest checkpoint that was evaluated, -1 if the rows have no step."""
        return max((int(row.get("step", -1)) for row in self.record["rows"]), default=-1)

    @property
    def stale(self) -> bool:
        """Whether the run has a newer checkpoint than the one evaluated."""
        # Without checkpoints there is nothing to compare with: they may have been deleted.
        return self.run.newest_checkpoint not in (None, self.step)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows under the run's name in this report, marked if the results are stale."""
        # The evaluation wrote another name, that of the folder when it was evaluated alone. The index
        # gives the run the colour that it has in all other plots of the report.
        name = self.run.name + (STALE if self.stale else "")
        return [{**row, "run": name, "index": self.run.index} for row in self.record["rows"]]

    def newest_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the newest checkpoint that was evaluated."""
        return [row for row in self.record["rows"] if row.get("step", -1) == self.step]


def read(runs: Sequence[Run]) -> tuple[dict[str, list[Results]], list[str]]:
    """Return the results by evaluator, in the registry's order, and a sentence for each broken file."""
    results: dict[str, list[Results]] = {}
    broken = []
    for run in runs:
        for path in sorted(run.path.glob(f"{FOLDER}/*/{RESULTS}")):
            from seal_jax.evaluators import command

            evaluator = path.parent.name
            try:
                record = command.read(path)
                if record["kind"] != evaluator:
                    raise UsageError(f"{path} holds results of {record['kind']}; evaluate again")
                if not record["rows"]:
                    raise UsageError(f"{path} holds no rows; evaluate again")
            except UsageError as error:
                broken.append(f"{run.name}: {error}")
            else:
                results.setdefault(evaluator, []).append(Results(run, record))
    # Before the import below: the registry loads every evaluator.
    if not results:
        return {}, broken
    from seal_jax.evaluators import registry

    return {name: results[name] for name in registry() if name in results}, broken


def sections(
    results: dict[str, list[Results]], runs: Sequence[Run]
) -> tuple[list[Section], list[str]]:
    """Return a section for each evaluator, and a sentence for each result that cannot be shown.

    Results that cannot be shown are removed from ``results``.
    """
    made, broken = [], []
    for name, of_runs in results.items():
        from seal_jax import evaluators

        evaluator = evaluators.load(name)
        try:
            made.append(section(evaluator, of_runs, runs).drawn())
            continue
        except evaluators.UNFIT:
            # One of the results is unfit. Search for it only now, since drawing takes a while. Each is
            # tried together with the usable ones before it: the section shows them together.
            usable: list[Results] = []
        for result in of_runs:
            try:
                drawn = section(evaluator, [*usable, result], runs).drawn()
                usable.append(result)
            except evaluators.UNFIT as error:
                broken.append(
                    f"{result.run.name}: its results of {name} cannot be shown "
                    f"({type(error).__name__}: {error}); evaluate again with --overwrite"
                )
        # In place: the caller passes what is left to the studies.
        of_runs[:] = usable
        if usable:
            made.append(drawn)
    return made, broken


def section(evaluator: Evaluator, results: Sequence[Results], runs: Sequence[Run]) -> Section:
    """Return the evaluator's table and plot of all runs together."""
    rows = [row for result in results for row in result.rows()]
    # Names are escaped for matplotlib in the plot only: a table shows them as they are.
    shown = [{**row, "run": drawable(row["run"])} for row in rows]
    summary = evaluator.summary[:1].upper() + evaluator.summary[1:]
    return Section(
        evaluator.name,
        evaluator.name.replace("_", " ").capitalize(),
        f"{summary} ({evaluator.source}).",
        tables=[evaluator.table(rows)],
        draw=lambda figure: evaluator.draw(figure, shown),
        size=evaluator.size(shown),
        describe=f"{summary}; the table has the numbers.",
        warnings=list(_warnings(evaluator, results, runs)),
    )


def _warnings(
    evaluator: Evaluator, results: Sequence[Results], runs: Sequence[Run]
) -> Iterable[str]:
    """Yield warnings of stale results, options that differ between runs, and runs without results."""
    from seal_jax.evaluators.options import shown

    for result in results:
        if result.stale:
            yield (
                f"{result.run.name}{STALE} was evaluated at step {result.step}, and its newest "
                f"checkpoint is of step {result.run.newest_checkpoint}: evaluate "
                f"--kind={evaluator.name} again, with --overwrite."
            )
    names: dict[str, dict[str, list[str]]] = {}  # of runs, by option and its value
    for result in results:
        for option, value in (result.record.get("options") or {}).items():
            text = shown(tuple(value) if isinstance(value, list) else value)
            names.setdefault(option, {}).setdefault(text, []).append(result.run.name)
    for option, by_value in names.items():
        if len(by_value) > 1:
            values = "; ".join(f"{text} for {', '.join(runs)}" for text, runs in by_value.items())
            yield f"The runs were evaluated with different --{option.replace('_', '-')}: {values}."
    evaluated = {result.run.name for result in results}
    if others := [run.name for run in runs if run.name not in evaluated]:
        yield f"Not evaluated for {evaluator.name}: {', '.join(others)}."
