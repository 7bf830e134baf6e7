"""The settings in which runs differ."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from seal_jax.core import settings as settings_lib
from seal_jax.core.tables import MISSING, Table
from seal_jax.reports.runs import Run

# How an experiment is run and where its data lies are no part of it.
OUTSIDE = ("run.", "data.data_dir")


@functools.cache
def _defaults() -> dict[str, Any]:
    return flat(settings_lib.as_dict(settings_lib.Settings()))


def flat(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return nested settings by their whole names.

    >>> flat({"train": {"seeds": 2}})
    {'train.seeds': 2}
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{where}.{name}" if where else name
        if isinstance(value, Mapping):
            found |= flat(value, path)
        else:
            found[path] = tuple(value) if isinstance(value, list) else value
    return found


def experiment(run: Run) -> dict[str, Any]:
    """Return what a run's experiment is, by the settings' whole names.

    A setting that is younger than the folder was at its default when the folder was made.
    """
    values = {**_defaults(), **flat(run.config)}
    return {name: value for name, value in values.items() if not name.startswith(OUTSIDE)}


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the names of the settings in which runs that have them differ."""
    every = [experiment(run) for run in runs]
    names = dict.fromkeys(name for values in every for name in values)
    return [name for name in names if len({values[name] for values in every if name in values}) > 1]


def table(runs: Sequence[Run]) -> Table | None:
    """Return the settings in which the runs differ, a row a run; ``None`` if there are none."""
    names = differing(runs)
    if not names:
        return None
    cells = [
        [run.name, *(show(experiment(run).get(name, ABSENT)) for name in names)] for run in runs
    ]
    notes = [
        "Methods have options of their own; they are shown where runs of one method differ in them."
    ]
    if not any(name.startswith("method.") and name != "method.name" for name in names):
        notes = []
    return Table("Settings in which the runs differ", ("run", *names), cells, notes)


ABSENT = object()


def show(value: Any) -> str:
    """Return a setting's value as text.

    >>> show(0.0005), show(None), show(""), show(True)
    ('0.0005', 'none', 'none', 'true')
    """
    if value is ABSENT:
        return MISSING
    if value is None or value in ("", ()):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
