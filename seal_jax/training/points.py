"""The points of ``train.vary``: their outcome as runs of their own, and which runs can be points of one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from seal_jax.core import files, vary
from seal_jax.core import mesh as meshes
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.core.state import State, Varied
from seal_jax.errors import UsageError
from seal_jax.training import manifest
from seal_jax.training import workdir as workdirs
from seal_jax.training.checkpoints import Checkpoints
from seal_jax.training.metrics import MetricsLog, read

FOLDER = "points"
_LONGEST = 200  # most file systems take names of 255


def folders(workdir: Path, settings: Settings) -> list[Path]:
    """Return where the points of a run are stored; of a run without ``train.vary`` none.

    Raises:
      UsageError: a point has more fields than the name of a folder can have.
    """
    names = [vary.label(point) for point in vary.points(settings) if point]
    for name in names:
        if len(name) > _LONGEST:
            raise UsageError(
                f"train.vary sets too many fields for a folder's name, {name[:40]}...: make the points variants of the "
                "config, for sweep"
            )
    return [workdir / FOLDER / name for name in names]


def split(
    workdir: Path, settings: Settings, state: State, step: int, epoch: int, targets: Sequence[Path]
) -> None:
    """Write each point of a finished run as the run folder that training it alone would have left.

    It has the last checkpoint alone. A folder that is there already is left as it is.

    Args:
      workdir: the run's folder.
      settings: the run's, complete.
      state: at its end; every leaf has the axis of trainings.
      step, epoch: of its end.
      targets: a folder for each point.
    """
    seeds, rows = settings.train.seeds, read(workdir)
    mesh = state.seed.sharding.mesh  # type: ignore[attr-defined]  # of all processes
    for index, (point, target) in enumerate(zip(vary.points(settings), targets, strict=True)):
        # The settings are written last: where they are, so is the rest.
        if (target / workdirs.CONFIG).exists():
            continue
        own = slice(index * seeds, (index + 1) * seeds)
        alone = vary.at(settings, point)
        draws, draw = vary.draws(alone)
        part = jax.tree.map(lambda leaf, own=own: leaf[own], state._replace(varied=Varied()))
        if len(draws) > 1:
            part = part._replace(varied=Varied(draw=meshes.place(mesh, draw)))
        main = jax.process_index() == 0
        if main and target.exists():
            files.remove_folder(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("seal_jax: what a kill left of a point is gone")
        with Checkpoints(target / workdirs.CHECKPOINTS) as checkpoints:
            checkpoints.save(step, part, {"epoch": epoch})
        if main:
            with MetricsLog(target, resume_step=-1) as log:
                for row in rows:
                    log.append({name: _part(name, value, own) for name, value in row.items()})
            for name in (manifest.MANIFEST, workdirs.LABELS):
                if (workdir / name).exists():
                    (target / name).write_bytes((workdir / name).read_bytes())
            if alone.train.pretrained.startswith(".."):
                source = os.path.relpath(workdir / alone.train.pretrained, target)
                train = dataclasses.replace(alone.train, pretrained=source)
                alone = dataclasses.replace(alone, train=train)
            workdirs.write(target, alone)
    if jax.process_count() > 1:
        # The others may read the last one next.
        multihost_utils.sync_global_devices("seal_jax: the points are written")


def _part(name: str, value: Any, own: slice) -> Any:
    """Return a value of a row of metrics as the row of the trainings ``own`` has it."""
    if not isinstance(value, list):
        return value
    # Of a point alone it is one number, which no seed changes.
    return value[own.start] if name == "learning_rate" else value[own]


def tuned(settings: Settings, workdir: Path) -> Settings:
    """Return the settings with the values that ``train.tuned_on`` finds best, one or several points; it is then empty.

    Raises:
      UsageError: it names no run with points, one that has not ended or trains something else, or all points
        diverged.
    """
    name = settings.train.tuned_on
    if not name:
        return settings
    source = files.relative_to(workdir, name)
    field = f"train.tuned_on = {name!r}"
    if not (source / workdirs.CONFIG).is_file():
        raise UsageError(
            f"{field} is not the folder of a run: {source} has no {workdirs.CONFIG}; train that one first"
        )
    tuning = settings_lib.read(Settings, workdirs.read(source))
    if tuning.data.selection == "test_best":
        raise UsageError(
            f"{field} would choose by the test split: it has data.selection = 'test_best'"
        )
    for section in ("data", "model", "method"):
        its, ours = (
            of.method.get("name") if section == "method" else getattr(of, section).name
            for of in (tuning, settings)
        )
        if its != ours:
            raise UsageError(
                f"{field} has {section}.name = {its!r} and this run {ours!r}: name a run that is tuned alike"
            )
    scored: list[tuple[float, float, vary.Point]] = []
    weights = settings.train.tuned_weights
    split = "validation_ema" if weights == "ema" else "validation"
    measure = f"{split}/accuracy"
    for point, folder in zip(
        vary.points(tuning), folders(source, tuning), strict=bool(tuning.train.vary)
    ):
        if any(value != _value(settings, of) for of, value in point.items() if of in vary.DRAWS):
            continue
        if not (folder / workdirs.CONFIG).exists():
            raise UsageError(f"{field} has not ended, there is no {folder}: train it first")
        rows = read(folder)
        if weights != "best":
            rows = rows[-1:]
        scores = [
            np.asarray(row[measure], float)
            for row in rows
            if measure in row and row["generation"] == rows[-1]["generation"]
        ]
        if scores:
            accuracy = float(np.nan_to_num(np.max(scores, axis=0), nan=-1.0).mean())
            # Accuracies of few images are often equal.
            loss = np.nan_to_num(np.mean(rows[-1].get(f"{split}/loss", 0.0)), nan=math.inf)
            if accuracy > -1:
                scored.append((accuracy, -float(loss), point))
    if not scored:
        raise UsageError(
            f"{field} has no point with this run's data and {measure} in its metrics: give a run with train.vary and a "
            f"validation split{', and optimizer.ema' * (weights == 'ema')}"
        )
    # Stable: of points that are equal in both the first come first.
    scored.sort(key=lambda one: one[:2], reverse=True)
    best = [
        {of: value for of, value in point.items() if of not in vary.DRAWS}
        for *_, point in scored[: settings.train.tuned_points]
    ]
    several = settings.train.tuned_points > 1
    train = dataclasses.replace(
        settings.train,
        tuned_on="",
        tuned_weights="last",
        tuned_points=1,
        vary=json.dumps(best) if several else settings.train.vary,
    )
    chosen = dataclasses.replace(settings, train=train)
    return chosen if several else vary.at(chosen, best[0])


def together(runs: Mapping[str, Settings], apart: Container[str], most: int) -> list[str]:
    """Return which of some runs can be points of one with the first of them, by their names, itself included.

    Args:
      runs: their settings.
      apart: fields that cannot be varied within a program.
      most: trainings in a group.
    """
    first, *others = runs
    group, room = [first], most // runs[first].train.seeds
    for name in others:
        fields = _varied([runs[member] for member in (*group, name)]) if len(group) < room else []
        if fields and not any(field in apart for field in fields):
            group.append(name)
    return group


def joined(runs: Sequence[Settings]) -> Settings:
    """Return the settings of one run whose points are these runs."""
    varied = _varied(runs)
    points = [{field: _value(settings, field) for field in varied} for settings in runs]
    train = dataclasses.replace(runs[0].train, vary=json.dumps(points))
    return dataclasses.replace(runs[0], train=train)


def _varied(runs: Sequence[Settings]) -> list[str]:
    """Return the fields in which runs differ, or none where one of them cannot be varied."""
    flat = [_flat(settings) for settings in runs]
    if any(fields.keys() != flat[0].keys() for fields in flat):
        return []
    # A path that begins with ".." is of the run's own folder, which is another one for the run of all points.
    if any(fields["train.vary"] or fields["train.pretrained"].startswith("..") for fields in flat):
        return []
    # Without wrong labels nothing of them is in the state.
    if len({bool(fields["data.label_noise"]) for fields in flat}) > 1:
        return []
    differing = [name for name in flat[0] if any(of[name] != flat[0][name] for of in flat)]
    numbers = all(type(fields[name]) in (int, float) for fields in flat for name in differing)
    if not numbers or not all(map(vary.is_variable, differing)):
        return []
    # Runs that agree, such as in what they were tuned on, would be one point.
    distinct = {tuple(fields[name] for name in differing) for fields in flat}
    return differing if len(distinct) == len(flat) else []


def _flat(settings: Settings) -> dict[str, Any]:
    sections = dataclasses.asdict(settings)
    return {f"{name}.{field}": v for name, part in sections.items() for field, v in part.items()}


def _value(settings: Settings, field: str) -> Any:
    return _flat(settings)[field]
