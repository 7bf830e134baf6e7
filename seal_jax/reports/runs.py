"""Run folders as the reports see them: settings, rows of metrics, and short names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seal_jax.errors import UsageError
from seal_jax.training import workdir as workdirs

PathLike = str | Path

# Longer folder names are cut in the middle, for three runs to fit into 100 columns.
NAME_LENGTH = 18


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder that holds at least one epoch.

    Attributes:
      path: the folder.
      name: the folder's name, made short, and different from those of the other runs.
      config: the settings, nested.
      rows: one mapping an epoch, in order.
      index: its place among the runs that were read together, which gives it one colour in all plots.
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
        """G, of the whole run."""
        return int(self.setting("train.generations"))

    @property
    def epochs_per_generation(self) -> int:
        """E."""
        return int(self.setting("train.epochs_per_generation"))

    @property
    def epochs(self) -> int:
        """G times E."""
        return self.generations * self.epochs_per_generation

    @property
    def seeds(self) -> int:
        """Trainings in this run."""
        return int(self.setting("train.seeds"))

    @property
    def seeds_text(self) -> str:
        """Their number in words: "1 seed", "2 seeds"."""
        return f"{self.seeds} seed{'' if self.seeds == 1 else 's'}"

    @property
    def subject(self) -> str:
        """The model and the data set."""
        return f"{self.setting('model.name')} on {self.setting('data.name')}"

    @property
    def ascent_epochs(self) -> float:
        """k, of methods that ascend; otherwise 0."""
        if self.setting("method.name") != "seal":
            return 0
        k = self.config["method"].get("ascent_epochs")
        return self.epochs_per_generation / 4 if k is None else float(k)

    @property
    def epochs_done(self) -> int:
        """Epochs that have been trained and scored."""
        return int(self.rows[-1]["epoch"]) + 1

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end; validation may have ended its last generation."""
        last = self.rows[-1]
        ended = last["generation"] == self.generations - 1 and "test_last/accuracy" in last
        return ended or self.epochs_done >= self.epochs

    @property
    def newest_checkpoint(self) -> int | None:
        """The step of the newest checkpoint, if there is one."""
        folder = self.path / workdirs.CHECKPOINTS
        if not folder.is_dir():
            return None
        # What is being written, or was set aside as damaged, has another name.
        return max(
            (int(each.name) for each in folder.iterdir() if each.name.isdigit()), default=None
        )

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the epochs ``[n]`` that have ``key``, counted from 1, and its values ``[n, seeds]``.

        A quantity with one value for all seeds has a second axis of length 1.
        """
        rows = [row for row in self.rows if key in row]
        epochs = np.array([row["epoch"] + 1 for row in rows], dtype=int)
        values = np.array([per_seed(row[key]) for row in rows], dtype=float)
        return epochs, values.reshape(len(rows), -1) if rows else np.empty((0, 1))


def per_seed(value: Any) -> np.ndarray:
    """Return one float a seed; what is not finite is NaN."""
    return np.atleast_1d(np.asarray(value, dtype=float))


def read_all(folders: PathLike | Sequence[PathLike]) -> list[Run]:
    """Read the runs in ``folders``, with names that tell them apart.

    Raises:
      UsageError: no folder, the same folder twice, or one that holds no epoch of a run.
    """
    if isinstance(folders, str | Path):
        folders = [folders]
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise UsageError("no run folders given; give at least one")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UsageError(f"{path} is given twice; give each run folder once")
        seen.add(path.resolve())
    return [
        dataclasses.replace(run, rows=_rows(run))
        for index, (path, name) in enumerate(zip(paths, short_names(paths), strict=True))
        for run in [Run(path, name, workdirs.read(path), (), index)]
    ]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return a short name for each folder, all different.

    >>> short_names([Path("a/seal"), Path("b/seal"), Path("b/normal")])
    ['a/seal', 'b/seal', 'normal']
    >>> short_names([Path("seal_resnet50_tiny_imagenet"), Path("seal_resnet50_digits_imagenet")])
    ['seal_resn…imagenet', 'seal_res…imagenet2']
    """
    parts = [path.resolve().parts for path in paths]
    depths = [1] * len(paths)

    def names() -> list[str]:
        return ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]

    # Paths that differ come apart once enough of their parents are named.
    while len(set(names())) < len(paths):
        found = names()
        for index, name in enumerate(found):
            if found.count(name) > 1:
                depths[index] += 1
    short: list[str] = []
    for name in names():
        candidate, number = _cut(name), 1
        while candidate in short:
            number += 1
            candidate = _cut(name, str(number))
        short.append(candidate)
    return short


def _cut(name: str, suffix: str = "") -> str:
    room = NAME_LENGTH - len(suffix)
    if len(name) <= room:
        return name + suffix
    return f"{name[: (room - 1) - (room - 1) // 2]}…{name[-((room - 1) // 2) :]}{suffix}"


def _rows(run: Run) -> list[dict[str, Any]]:
    # Here and not above: it loads TensorBoard's event format, which a report has no use for.
    from seal_jax.training import metrics

    path = run.path / workdirs.METRICS
    rows = metrics.read(run.path)
    if not rows:
        raise UsageError(
            f"{path} holds no finished epoch yet; wait for the first, or train the run"
        )
    ends = {"epoch": run.epochs, "generation": run.generations}
    listed: dict[str, bool] = {}
    for row in rows:
        where = f"{path}: the row of step {row['step']} has"
        for field, end in ends.items():
            value = row.get(field)
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
    if not any("train/accuracy" in row for row in rows):
        raise UsageError(
            f"{path} has no train/accuracy; give a folder that was written by training"
        )
    return rows
