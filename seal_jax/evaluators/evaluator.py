"""What a kind of evaluation is: its options, its units of work, its table and its plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from seal_jax.core.tables import Record, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from seal_jax.evaluators.loaded_run import LoadedRun


class WorkItem(NamedTuple):
    """A piece of work that is done once and kept.

    Attributes:
      key: its name, unique in the evaluation.
      run: does the work; returns numbers, strings and lists of them, by name.
    """

    key: str
    run: Callable[[], dict[str, Any]]


def as_they_are(records: Sequence[Record]) -> Sequence[Record]:
    """Return each unit's record as a row."""
    return records


class Evaluator(NamedTuple):
    """A kind of evaluation.

    Attributes:
      name: what ``--kind`` calls it.
      summary: one line for the help.
      source: paper and table or figure.
      options: frozen dataclass; each field is an option of the command line.
      units: ``units(loaded_run, options)``; whatever can be wrong with the input is found here.
      table: of rows, which may come from several runs.
      draw: draws such rows onto a figure of the size that ``size`` gives.
      rows: combines the units' records to rows.
      size: of the figure in inches, from the rows.
    """

    name: str
    summary: str
    source: str
    options: type
    units: Callable[[LoadedRun, Any], Sequence[WorkItem]]
    table: Callable[[Sequence[Record]], Table]
    draw: Callable[[Figure, Sequence[Record]], None]
    rows: Callable[[Sequence[Record]], Sequence[Record]] = as_they_are
    size: Callable[[Sequence[Record]], tuple[float, float]] = lambda rows: (8.0, 5.0)
