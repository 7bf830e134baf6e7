"""Run folders as the reports see them: settings, those in which runs differ, and rows of metrics."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seal_jax.core import files
from seal_jax.core import settings as settings_lib
from seal_jax.core.tables import MISSING, Table
from seal_jax.errors import UsageError
from seal_jax.training import workdir as workdirs

PathLike = str | Path

# How an experiment is run and where its data is stored do not belong to the experiment.
_OUTSIDE = ("run.", "data.data_dir")
# Stands for a setting that a run does not have. Not None, which is the value of some settings.
ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder that holds at least one epoch.

    Attributes:
      path: the folder.
      name: short name, unique among the runs that were read together.
      config: the settings, nested.
      rows: the metrics of each epoch, in order.
      index: place among the runs that were read together, which gives the run one colour in all plots.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    index: int = 0

    def setting(self, field: str) -> Any:
        """Return the setting ``section.field``.

        Raises:
          UsageError: the run has no such setting.
        """
        value: Any = self.config
        for part in field.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise UsageError(
                    f"{self.path / workdirs.CONFIG} has no setting {field}; give the folder of a run"
                )
            value = value[part]
        return value

    @property
    def generations(self) -> int:
        """G, the number of generations of the whole run."""
        return int(self.setting("train.generations"))

    @property
    def epochs_per_generation(self) -> int:
        """E, the number of epochs in a generation."""
        return int(self.setting("train.epochs_per_generation"))

    @property
    def epochs(self) -> int:
        """G times E, the number of epochs of the whole run."""
        return self.generations * self.epochs_per_generation

    @property
    def steps_per_epoch(self) -> int:
        """Number of training steps in an epoch."""
        # From the first row: the settings do not hold the number of training images. A row is written
        # where an epoch ends, and `step` counts the steps done by then.
        return int(self.rows[0]["step"]) // (int(self.rows[0]["epoch"]) + 1)

    @property
    def seeds(self) -> int:
        """Number of trainings in this run."""
        return int(self.setting("train.seeds"))

    @property
    def seeds_text(self) -> str:
        """The number of seeds in words: "1 seed", "2 seeds"."""
        return f"{self.seeds} seed{'' if self.seeds == 1 else 's'}"

    @property
    def subject(self) -> str:
        """The model and the data set."""
        return f"{self.setting('model.name')} on {self.setting('data.name')}"

    @property
    def ascent_epochs(self) -> float:
        """k, the epochs of ascent in a generation; 0 for methods that do not ascend."""
        if self.setting("method.name") != "seal":
            return 0
        # SEAL's default is k = E / 4. The options of methods are not read by their class here, which would
        # import Flax.
        k = self.config["method"].get("ascent_epochs")
        return self.epochs_per_generation / 4 if k is None else float(k)

    @property
    def epochs_done(self) -> int:
        """Number of epochs that have been trained and scored."""
        return int(self.rows[-1]["epoch"]) + 1

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end; early stopping may have ended its last generation."""
        last = self.rows[-1]
        ended = last["generation"] == self.generations - 1 and "test_last/accuracy" in last
        return ended or self.epochs_done >= self.epochs

    @property
    def newest_checkpoint(self) -> int | None:
        """The step of the newest checkpoint, if there is one."""
        folder = self.path / workdirs.CHECKPOINTS
        if not folder.is_dir():
            return None
        # A checkpoint that is being written, or was set aside as damaged, has another name; in a bucket one that is
        # being written lacks an object that Orbax adds at the end.
        found = [path for path in folder.iterdir() if path.name.isdigit()]
        if files.is_remote(folder):
            found = [path for path in found if (path / "commit_success.txt").exists()]
        return max((int(path.name) for path in found), default=None)

    @functools.cached_property
    def experiment(self) -> dict[str, Any]:
        """The settings that define the experiment, by their full names.

        A setting that was introduced after the folder was written had its default value there.
        """
        values = {**_defaults(), **flat(self.config)}
        return {name: value for name, value in values.items() if not name.startswith(_OUTSIDE)}

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the epochs ``[n]`` that have ``key``, counted from 1, and its values ``[n, seeds]``.

        A quantity with one value for all seeds has a second axis of length 1.
        """
        # Rows without the key are normal: test accuracy is in the last row of a generation alone.
        rows = [row for row in self.rows if key in row]
        epochs = np.array([row["epoch"] + 1 for row in rows], dtype=int)
        values = np.array([per_seed(row[key]) for row in rows], dtype=float)
        return epochs, values.reshape(len(rows), -1) if rows else np.empty((0, 1))


def per_seed(value: Any) -> np.ndarray:
    """Return one float per seed, ``[seeds]``; values that are not finite are NaN."""
    return np.atleast_1d(np.asarray(value, dtype=float))


def read_all(folders: PathLike | Sequence[PathLike]) -> list[Run]:
    """Read the runs in ``folders``, with names that tell them apart.

    Raises:
      UsageError: no folder, the same folder twice, or one that holds no epoch of a run.
    """
    named = [folders] if isinstance(folders, str | os.PathLike) else folders
    paths = [files.as_path(folder) for folder in named]
    if not paths:
        raise UsageError("no run folders given; give at least one")
    resolved: set[Path] = set()
    for path in paths:
        if path.resolve() in resolved:
            raise UsageError(f"{path} is given twice; give each run folder once")
        resolved.add(path.resolve())
    # In two steps, since reading rows needs the settings: their ends and number of seeds are checked.
    return [
        dataclasses.replace(run, rows=_rows(run))
        for index, (path, name) in enumerate(zip(paths, files.short_names(paths), strict=True))
        for run in [Run(path, name, workdirs.read_single(path), (), index)]
    ]


def _rows(run: Run) -> list[dict[str, Any]]:
    from seal_jax.training import metrics

    path = run.path / workdirs.METRICS
    rows = metrics.read(run.path)
    if not rows:
        raise UsageError(
            f"{path} holds no finished epoch yet; wait for the first, or train the run"
        )
    # What follows trusts these: generations index the table, and lists have one value per seed. A folder
    # may have been edited, or put together from two runs.
    ends = {"epoch": run.epochs, "generation": run.generations}
    listed: dict[str, bool] = {}
    for row in rows:
        where = f"{path}: the row of step {row['step']} has"
        for field, end in ends.items():
            value = row.get(field)
            # True and False are integers in Python.
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < end:
                raise UsageError(
                    f"{where} {field} = {value!r}; it must be a whole number below {end}: give a "
                    "folder that was written by training"
                )
        for name, value in row.items():
            # One value for all seeds, or a list with one for each, the same in every row.
            count = len(value) if isinstance(value, list) else 0
            if count not in (0, run.seeds) or bool(count) != listed.setdefault(name, bool(count)):
                raise UsageError(
                    f"{where} {count or 'no list of'} values of {name}, and {workdirs.CONFIG} has "
                    f"train.seeds = {run.seeds}: give a folder that was written by training"
                )
    if "train/accuracy" not in listed:
        raise UsageError(
            f"{path} has no train/accuracy; give a folder that was written by training"
        )
    return rows


@functools.cache
def _defaults() -> dict[str, Any]:
    return flat(dataclasses.asdict(settings_lib.Settings()))


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings by their full names.

    >>> flat({"train": {"seeds": 2}})
    {'train.seeds': 2}
    """
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values |= {f"{name}.{field}": inner for field, inner in flat(value).items()}
        else:
            # JSON has no tuples; values are compared in sets, which lists cannot enter.
            values[name] = tuple(value) if isinstance(value, list) else value
    return values


def differing(settings: Sequence[Mapping[str, Any]], *, present: bool = False) -> list[str]:
    """Return the names of settings that differ; ``present`` ignores mappings that lack a setting.

    >>> differing([{"a": 1, "b": 2}, {"a": 3}]), differing([{"a": 1, "b": 2}, {"a": 3}], present=True)
    (['a', 'b'], ['a'])
    """
    ignored = {ABSENT} if present else set()
    names = dict.fromkeys(name for mapping in settings for name in mapping)
    return [
        name
        for name in names
        if len({values.get(name, ABSENT) for values in settings} - ignored) > 1
    ]


def differences(runs: Sequence[Run]) -> Table | None:
    """Return the settings in which the runs differ, one row per run; ``None`` if there are none."""
    # Only among runs that have a setting: otherwise every option of two methods would be listed.
    names = differing([run.experiment for run in runs], present=True)
    if not names:
        return None
    cells = [
        [run.name, *(show(run.experiment.get(name, ABSENT)) for name in names)] for run in runs
    ]
    note = (
        "Methods have options of their own; they are shown where runs of one method differ in them."
    )
    notes = [note] * any(name.startswith("method.") and name != "method.name" for name in names)
    return Table("Settings in which the runs differ", ("run", *names), cells, notes)


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
