"""Tables, plots and pages from run folders.

:func:`compare` makes the generations table, :func:`draw` and :func:`draw_run` the curves, and
:func:`write_report` all of it with evaluations and studies across runs.
"""

from seal_jax.core.tables import Spread
from seal_jax.reports.curves import CURVES, draw, draw_run
from seal_jax.reports.generations import Column, Comparison, compare
from seal_jax.reports.report import write as write_report

__all__ = [
    "CURVES",
    "Column",
    "Comparison",
    "Spread",
    "compare",
    "draw",
    "draw_run",
    "write_report",
]
