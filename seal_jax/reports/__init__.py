"""Tables and plots from run folders: :func:`compare`, :func:`draw` and :func:`draw_run`."""

from seal_jax.reports.curves import draw, draw_run
from seal_jax.reports.generations import Column, Comparison, Stat, compare

__all__ = ["Column", "Comparison", "Stat", "compare", "draw", "draw_run"]
