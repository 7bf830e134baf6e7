"""Studies across runs, as the layerwise paper (Alabdulmohsin et al. 2022) makes them.

Each module has ``section``, which returns a :class:`seal_jax.reports.page.Section`, or a
:class:`seal_jax.reports.page.Missing` that says what these runs lack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seal_jax.reports.page import Missing, Section
from seal_jax.reports.runs import Run
from seal_jax.reports.studies import (
    budget,
    scatter,
    significance,
    size,
    speed,
    tree,
)
from seal_jax.reports.studies.settings import entries

__all__ = ["all_of"]


def all_of(
    runs: Sequence[Run], margins: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Section | Missing]:
    """Return every study of these runs.

    Args:
      runs: the runs.
      margins: by name of the run, the rows of its evaluation of margins.
    """
    compared = entries(runs)
    return [
        significance.section(compared),
        scatter.section(compared),
        tree.section(compared),
        budget.section(compared),
        speed.section(runs),
        size.section(compared, margins),
    ]
