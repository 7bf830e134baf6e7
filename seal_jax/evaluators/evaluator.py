"""An evaluator: the options, the work items, the table and the plot of one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from seal_jax.core.tables import Record, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from seal_jax.evaluators.loaded_run import LoadedRun


class WorkItem(NamedTuple):
    """A piece of work that is done once and whose record is kept.

    Attributes:
      key: its name, unique in the evaluation.
      run: does the work; returns numbers, strings and lists of them, by name.
    """

    key: str
    run: Callable[[], dict[str, Any]]


class Evaluator(NamedTuple):
    """An evaluation of the networks of a training run.

    Attributes:
      name: the value of ``--kind``.
      summary: one line for the help.
      source: paper and table or figure.
      options: frozen dataclass; each field is an option of the command line.
      work_items: ``work_items(loaded_run, options)``; anything wrong with the input is an error here,
        before any work.
      table: of rows, which may come from several runs.
      draw: draws such rows onto a figure of the size that ``size`` returns.
      rows: combines the records of the work items to rows; by default each is one.
      size: of the figure in inches, from the rows.
      order: place in lists and reports, by paper: SEAL from 10, LW from 20, PoF from 30, FAST from 40.
    """

    name: str
    summary: str
    source: str
    options: type
    work_items: Callable[[LoadedRun, Any], Sequence[WorkItem]]
    table: Callable[[Sequence[Record]], Table]
    draw: Callable[[Figure, Sequence[Record]], None]
    rows: Callable[[Sequence[Record]], Sequence[Record]] = lambda records: records
    size: Callable[[Sequence[Record]], tuple[float, float]] = lambda rows: (8.0, 5.0)
    # After the papers' own, so that an evaluation without a number is listed last.
    order: int = 90
