"""Settings that take several values in one program: the points of ``train.vary``, beside the seeds.

A point sets some fields; a run has as many trainings as points times seeds, the seeds of a point after one another. In
the compiled programs the values are arrays with the axis of the seeds, so that all points share one program.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from seal_jax import records
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError

Point = Mapping[str, float]

# They say which images a training sees under which labels; the draws are made on the host, and are data to the program.
DRAWN = ("label_noise", "label_noise_seed", "subset_seed")
DRAWS = tuple(f"data.{field}" for field in DRAWN)
NOISE = DRAWS[0]
# Sections whose numbers enter the update. Those of others say how large something is, or what is done on the host.
_SECTIONS = ("method", "optimizer")


class CannotVary(UsageError):
    """Fields cannot take several values, or not these, in one program."""

    def __init__(self, fields: Iterable[str], why: str):
        self.fields = tuple(fields)
        super().__init__(
            f"train.vary: {', '.join(self.fields)} cannot take several values in one program ({why}); "
            "make them variants of the config, for sweep"
        )


@functools.lru_cache
def _points(vary: str) -> tuple[Point, ...]:
    hint: Any = Mapping[str, list[int | float]]
    remedy = (
        'give {"optimizer.learning_rate": [0.1, 0.3]} for the product of lists, or a list of points '
        '[{"optimizer.learning_rate": 0.1}]'
    )
    try:
        if not vary.lstrip().startswith("["):
            lists = records.parse(vary, hint)
            values = [list(dict.fromkeys(part)) for part in lists.values()]
            points = [dict(zip(lists, part, strict=True)) for part in itertools.product(*values)]
        else:
            points = records.parse(vary, list[Mapping[str, int | float]])
    except UsageError as error:
        raise UsageError(f"train.vary cannot be read: {error}; {remedy}") from None
    if not points or not all(points) or any(set(point) != set(points[0]) for point in points):
        raise UsageError(f"train.vary = {vary!r} must set the same fields in each point; {remedy}")
    # In one order, however each was written.
    points = [{field: point[field] for field in points[0]} for point in points]
    if len({tuple(point.values()) for point in points}) < len(points):
        raise UsageError(f"train.vary = {vary!r} has a point twice; name each once")
    return tuple(points)


def points(settings: Settings) -> tuple[Point, ...]:
    """Return what each point sets, by the full names of settings; of a run without ``train.vary`` nothing, once.

    >>> vary = '{"optimizer.momentum": [0.8, 0.9], "data.label_noise": [0.2]}'
    >>> points(Settings(train=settings_lib.Train(vary=vary)))[1]
    {'optimizer.momentum': 0.9, 'data.label_noise': 0.2}
    >>> points(Settings())
    ({},)

    Raises:
      UsageError: no JSON, another field than a number of the method, the optimizer or a draw of the data, or a value
        that the field cannot have.
    """
    if not settings.train.vary:
        return ({},)
    varied = _points(settings.train.vary)
    for field in varied[0]:
        if not is_variable(field):
            raise CannotVary(
                [field], f"only numbers of method and optimizer and {', '.join(DRAWS)} can"
            )
    if len({bool(point.get(NOISE)) for point in varied}) > 1:
        # Its state and its rows have nothing of wrong labels.
        raise CannotVary([NOISE], "0 is another program than a share of wrong labels")
    fields = settings.data
    for field, drawn, needs in (
        ("data.label_noise_seed", fields.label_noise or varied[0].get(NOISE), "data.label_noise"),
        ("data.subset_seed", fields.train_count or fields.imbalance > 1, "data.train_count"),
    ):
        if field in varied[0] and not drawn:
            raise CannotVary([field], f"it draws nothing without {needs}")
    return varied


def is_variable(field: str) -> bool:
    """Return whether a number of this name may be varied, unless it changes the program."""
    return field.partition(".")[0] in _SECTIONS or field in DRAWS


def draws(settings: Settings) -> tuple[list[settings_lib.Data], np.ndarray]:
    """Return the distinct draws of the training data, as settings, and which of them each training has, int32.

    >>> fields = settings_lib.Data(label_noise=0.4, draws="per_seed")
    >>> distinct, index = draws(Settings(data=fields, train=settings_lib.Train(seeds=2)))
    >>> [data.label_noise_seed for data in distinct], index.tolist()
    ([0, 1], [0, 1])
    """
    train = settings.train
    drawn = [
        draw(data, seed)
        for data in (at(settings, point).data for point in points(settings))
        for seed in range(train.seed, train.seed + train.seeds)
    ]
    distinct = list(dict.fromkeys(drawn))
    return distinct, np.asarray([distinct.index(data) for data in drawn], np.int32)


def draw(data: settings_lib.Data, seed: int) -> settings_lib.Data:
    """Return the settings of the draw that a training of this seed has."""
    offset = seed if data.draws == "per_seed" else 0
    # Seeds that nothing is drawn with make no difference.
    noise = data.label_noise_seed + offset if data.label_noise else 0
    subset = data.subset_seed + offset if data.train_count or data.imbalance > 1 else 0
    return dataclasses.replace(data, label_noise_seed=noise, subset_seed=subset, draws="shared")


def trainings(settings: Settings) -> int:
    """Return the number of trainings of a run: points times seeds."""
    return len(points(settings)) * settings.train.seeds


def at(settings: Settings, point: Point) -> Settings:
    """Return the settings of a single run at one point, checked.

    >>> at(Settings(), {"data.label_noise": 0.4}).data.label_noise
    0.4

    Raises:
      UsageError: there is no such setting, or it cannot have this value.
    """
    values = dataclasses.asdict(settings)
    values["train"]["vary"] = ""
    for field, value in point.items():
        *outer, name = field.split(".")
        node: Any = values
        for part in outer:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise UsageError(f"train.vary: {field} is not a setting")
        node[name] = value
    try:
        return settings_lib.read(Settings, values)
    except UsageError as error:
        raise UsageError(f"train.vary: {error}") from None


def values(settings: Settings) -> dict[str, np.ndarray]:
    """Return the value of each varied field of method and optimizer in every training, ``[points * seeds]``."""
    varied = points(settings)
    return {
        field: np.repeat(_column(field, [point[field] for point in varied]), settings.train.seeds)
        for field in varied[0]
        if field not in DRAWS
    }


def _column(field: str, column: Sequence[float]) -> np.ndarray:
    if not all(isinstance(value, int) for value in column):
        return np.asarray(column, np.float32)
    if max(map(abs, column)) >= 2**31:
        raise CannotVary([field], "whole numbers have 32 bits there")
    # A field of type float takes them as such where it is read.
    return np.asarray(column, np.int32)


def replaced(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Return the settings with other values, which may be traced and are not checked: :func:`at` has checked them."""
    # Not by dataclasses.replace, which would compare them.
    changed = copy.copy(settings)
    for field, value in values.items():
        section, _, name = field.partition(".")
        fields = getattr(changed, section)
        if isinstance(fields, Mapping):
            fields = {**fields, name: value}
        elif "." in name:
            outer, _, inner = name.partition(".")
            fields = dataclasses.replace(
                fields, **{outer: {**getattr(fields, outer), inner: value}}
            )
        else:
            kind = typing.get_type_hints(type(fields))[name]
            fields = dataclasses.replace(fields, **{name: records.check(kind, value, field)})
        object.__setattr__(changed, section, fields)
    return changed


def label(point: Point) -> str:
    """Return a short name of a point, for folders, in which no two points of a run agree.

    >>> label({"optimizer.learning_rate": 0.1, "method.ascent_scale": 0.01})
    'learning_rate=0.1_ascent_scale=0.01'
    """
    return "_".join(f"{field.rpartition('.')[2]}={value}" for field, value in point.items())
