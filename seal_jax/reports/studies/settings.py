"""Runs as the studies see them: which method, in which setting, and how well it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seal_jax.core import plots
from seal_jax.reports import differences
from seal_jax.reports.runs import Run, per_seed

BASELINE = "normal"
WEIGHTS = {"last": "last weights", "best": "best weights by validation"}

# How a method spends its epochs is its own: a baseline trains in one round for as long as another
# method in all of its rounds (LW paper, Table 2).
_OWN = ("train.generations", "train.epochs_per_generation", "optimizer.schedule")
_SEEDS = ("train.seed", "train.seeds")
EPOCHS = "epochs in all"

Setting = frozenset[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run among others.

    Attributes:
      run: the run.
      name: of its method.
      method: the same, with the options that tell it from others in the same setting.
      setting: all that must agree for methods to be compared: everything but the method, what is
        its own, and seeds.
      seeds: of those trainings that no run before it in the list has done already.
    """

    run: Run
    name: str
    method: str
    setting: Setting
    seeds: tuple[int, ...]

    def scores(self, weights: str) -> dict[int, float]:
        """Return test accuracy at the run's end by seed; empty for a run that is not finished.

        Args:
          weights: "last" or "best", a key of ``WEIGHTS``.
        """
        first = _first_seed(self.run)
        row = self.run.rows[-1]
        if not self.run.finished or f"test_{weights}/accuracy" not in row:
            return {}
        values = per_seed(row[f"test_{weights}/accuracy"])
        found = {first + index: float(value) for index, value in enumerate(values)}
        return {seed: found[seed] for seed in self.seeds if np.isfinite(found.get(seed, np.nan))}


def entries(runs: Sequence[Run]) -> list[Entry]:
    """Return what the studies need of each run; runs without a seed of their own are left out."""
    labels = _labels(runs)
    taken: set[tuple[Setting, str, int]] = set()
    found = []
    for run, label in zip(runs, labels, strict=True):
        setting, first = setting_of(run), _first_seed(run)
        seeds = tuple(
            seed for seed in range(first, first + run.seeds) if (setting, label, seed) not in taken
        )
        taken |= {(setting, label, seed) for seed in seeds}
        if seeds:
            found.append(Entry(run, run.setting("method.name"), label, setting, seeds))
    return found


def setting_of(run: Run) -> Setting:
    """Return what must agree for methods to be compared."""
    values = differences.experiment(run)
    kept = {
        name: value
        for name, value in values.items()
        if not name.startswith("method.") and name not in (*_OWN, *_SEEDS)
    }
    kept[EPOCHS] = run.generations * run.epochs_per_generation
    # "single" is one cosine over all epochs, which is what "restart" is in a single round.
    schedule = values["optimizer.schedule"]
    kept["optimizer.schedule"] = "restart" if schedule == "single" else schedule
    return frozenset(kept.items())


def without(setting: Setting, *names: str) -> Setting:
    """Return the setting without some of its fields."""
    return frozenset(item for item in setting if item[0] not in names)


def describe(settings: Sequence[Setting]) -> dict[Setting, str]:
    """Return what tells each setting from the others, after its model and data set.

    >>> plain = frozenset({("model.name", "scnn"), ("data.name", "digits"), ("data.flip", True)})
    >>> describe([plain])[plain]
    'scnn on digits'
    """
    every = {setting: dict(setting) for setting in settings}
    names = sorted({name for values in every.values() for name in values})
    subject = ("model.name", "data.name")
    telling = [
        name
        for name in names
        if name not in subject and len({values.get(name) for values in every.values()}) > 1
    ]
    return {
        setting: f"{values['model.name']} on {values['data.name']}"
        + "".join(f", {name} {differences.show(values.get(name))}" for name in telling)
        for setting, values in every.items()
    }


def by_setting(found: Sequence[Entry], weights: str) -> dict[Setting, dict[str, dict[int, float]]]:
    """Return test accuracy by setting, method and seed; runs without any are left out."""
    table: dict[Setting, dict[str, dict[int, float]]] = {}
    for entry in found:
        scores = entry.scores(weights)
        if scores:
            table.setdefault(entry.setting, {}).setdefault(entry.method, {}).update(scores)
    return table


def means(
    table: Mapping[Setting, Mapping[str, Mapping[int, float]]], methods: Sequence[str]
) -> dict[Setting, list[float]]:
    """Return each method's accuracy, a mean over the seeds that all of them have, by setting.

    Settings that lack a method, or a common seed, are left out.
    """
    found = {}
    for setting, scores in table.items():
        if not all(method in scores for method in methods):
            continue
        common = sorted(set.intersection(*(set(scores[method]) for method in methods)))
        if common:
            found[setting] = [
                float(np.mean([scores[method][seed] for seed in common])) for method in methods
            ]
    return found


def styles(found: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Return the style of each method: that of its first run in the other plots."""
    return {entry.method: plots.style(entry.run.index) for entry in reversed(found)}


def methods_of(found: Sequence[Entry]) -> list[str]:
    """Return the methods, the baselines first, otherwise in the order of the runs."""
    ordered = sorted(found, key=lambda entry: entry.name != BASELINE)
    return list(dict.fromkeys(entry.method for entry in ordered))


def available(found: Sequence[Entry]) -> list[str]:
    """Return which weights there are scores of."""
    return [weights for weights in WEIGHTS if any(entry.scores(weights) for entry in found)]


def _first_seed(run: Run) -> int:
    return int(differences.experiment(run)["train.seed"])


def _labels(runs: Sequence[Run]) -> list[str]:
    """Name each run's method, with options only where one setting has the method more than once."""
    own = [
        {
            name: value
            for name, value in differences.experiment(run).items()
            if name in _OWN or (name.startswith("method.") and name != "method.name")
        }
        for run in runs
    ]
    telling: dict[str, dict[str, None]] = {}
    groups: dict[tuple[Setting, str], list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault((setting_of(run), run.setting("method.name")), []).append(index)
    for (_, name), members in groups.items():
        for field in dict.fromkeys(field for index in members for field in own[index]):
            if len({own[index].get(field, differences.ABSENT) for index in members}) > 1:
                telling.setdefault(name, {})[field] = None
    labels = []
    for run, values in zip(runs, own, strict=True):
        name = run.setting("method.name")
        parts = [
            f"{field.rpartition('.')[2]}={differences.show(values.get(field, differences.ABSENT))}"
            for field in telling.get(name, {})
        ]
        labels.append(f"{name} ({', '.join(parts)})" if parts else name)
    return labels
