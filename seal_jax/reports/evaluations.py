"""The evaluations that were made of runs, as sections of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from seal_jax.core import plots
from seal_jax.errors import UsageError
from seal_jax.reports.runs import Run
from seal_jax.reports.section import Section

if TYPE_CHECKING:
    from seal_jax.evaluators.evaluator import Evaluator

FOLDER, RESULTS = "evaluations", "results.json"
STALE = "†"


@dataclasses.dataclass(frozen=True)
class Found:
    """The results of one kind of evaluation of one run.

    Attributes:
      run: the run.
      record: what ``results.json`` holds.
    """

    run: Run
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """The newest checkpoint that was evaluated."""
        return max((int(row.get("step", -1)) for row in self.record["rows"]), default=-1)

    @property
    def stale(self) -> bool:
        """Whether the run's newest checkpoint is another."""
        return self.run.newest_checkpoint not in (None, self.step)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows under the run's name in this report, which is marked if they are stale."""
        name = self.run.name + (STALE if self.stale else "")
        return [{**row, "run": name, "index": self.run.index} for row in self.record["rows"]]

    def newest_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the newest checkpoint that was evaluated."""
        return [row for row in self.record["rows"] if row.get("step", -1) == self.step]


def read(runs: Sequence[Run]) -> tuple[dict[str, list[Found]], list[str]]:
    """Return the results by kind, in the order of the kinds, and a sentence for each that is broken."""
    paths = {
        (run.name, path.parent.name): (run, path)
        for run in runs
        for path in sorted(run.path.glob(f"{FOLDER}/*/{RESULTS}"))
    }
    if not paths:
        return {}, []
    # Only now: runs that were not evaluated need nothing of the evaluations.
    from seal_jax.evaluators import NAMES, command

    found: dict[str, list[Found]] = {}
    broken = []
    for (name, kind), (run, path) in paths.items():
        try:
            record = command.read(path)
            if record["kind"] != kind:
                raise UsageError(f"{path} holds results of {record['kind']}; evaluate again")
            if not record["rows"]:
                raise UsageError(f"{path} holds no rows; evaluate again")
        except UsageError as error:
            broken.append(f"{name}: {error}")
            continue
        found.setdefault(kind, []).append(Found(run, record))
    return {kind: found[kind] for kind in NAMES if kind in found}, broken


def sections(
    results: dict[str, list[Found]], runs: Sequence[Run]
) -> tuple[list[Section], list[str]]:
    """Return a section for each kind, and a sentence for each result that cannot be shown.

    Those are taken out of ``results``.
    """
    made, broken = [], []
    for name, found in results.items():
        from seal_jax import evaluators

        kind = evaluators.load(name)
        try:
            made.append(_drawn(kind, found, runs))
            continue
        except (
            evaluators.UNFIT
        ):  # one of them; which, is looked for only now: drawing takes a while
            usable: list[Found] = []
        for each in found:
            try:
                drawn = _drawn(kind, [*usable, each], runs)
                usable.append(each)
            except evaluators.UNFIT as error:
                broken.append(
                    f"{each.run.name}: its results of {name} cannot be shown "
                    f"({type(error).__name__}: {error}); evaluate again with --overwrite"
                )
        found[:] = usable
        if usable:
            made.append(drawn)
    return made, broken


def _drawn(kind: Evaluator, found: Sequence[Found], runs: Sequence[Run]) -> Section:
    drawn = section(kind, found, runs)
    return drawn._replace(picture=drawn.png())


def section(kind: Evaluator, found: Sequence[Found], runs: Sequence[Run]) -> Section:
    """Return the kind's table and plot of all runs together."""
    rows = [row for each in found for row in each.rows()]
    shown = [{**row, "run": plots.drawable(row["run"])} for row in rows]
    summary = kind.summary[:1].upper() + kind.summary[1:]
    return Section(
        kind.name,
        kind.name.replace("_", " ").capitalize(),
        f"{summary} ({kind.source}).",
        tables=[kind.table(rows)],
        draw=lambda figure: kind.draw(figure, shown),
        size=kind.size(shown),
        describe=f"{summary}; the table has the numbers.",
        warnings=[*_stale(kind, found), *_other_options(found), *_left_out(kind, found, runs)],
    )


def _stale(kind: Evaluator, found: Sequence[Found]) -> list[str]:
    return [
        f"{each.run.name}{STALE} was evaluated at step {each.step}, and its newest checkpoint is of "
        f"step {each.run.newest_checkpoint}: evaluate --kind={kind.name} again, with --overwrite."
        for each in found
        if each.stale
    ]


def _other_options(found: Sequence[Found]) -> list[str]:
    """Name the options in which runs were not evaluated alike."""
    from seal_jax.evaluators.options import shown

    values: dict[str, dict[str, list[str]]] = {}
    for each in found:
        for option, value in (each.record.get("options") or {}).items():
            text = shown(tuple(value) if isinstance(value, list) else value)
            values.setdefault(option, {}).setdefault(text, []).append(each.run.name)
    return [
        f"The runs were evaluated with different --{option.replace('_', '-')}: "
        + "; ".join(f"{value} for {', '.join(names)}" for value, names in by_value.items())
        + "."
        for option, by_value in values.items()
        if len(by_value) > 1
    ]


def _left_out(kind: Evaluator, found: Sequence[Found], runs: Sequence[Run]) -> list[str]:
    names = {each.run.name for each in found}
    others = [run.name for run in runs if run.name not in names]
    return [f"Not evaluated for {kind.name}: {', '.join(others)}."] if others else []
