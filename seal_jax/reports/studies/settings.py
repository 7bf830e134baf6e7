"""Runs as the studies see them: which method, in which setting, and how well it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from seal_jax.core import plots
from seal_jax.reports.runs import ABSENT, Run, differing, per_seed, show

BASELINE = "normal"
WEIGHTS = {"last": "last weights", "best": "best weights by validation"}

# How the epochs are divided belongs to the method: the baseline of LW paper's Table 2 trains in one round
# as long as the other methods in all of their rounds together. Their product is in a setting, as `EPOCHS`.
_OWN = ("train.generations", "train.epochs_per_generation", "optimizer.schedule")
_SEEDS = ("train.seed", "train.seeds")
EPOCHS = "epochs in all"

Setting = frozenset[tuple[str, Any]]
Scores = dict[Setting, dict[str, dict[int, float]]]  # by setting, method and seed


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run among others.

    Attributes:
      run: the run.
      name: name of its method.
      method: the name with the options that tell it from others in the same setting.
      setting: all that must agree for methods to be compared: everything except the method, how it
        divides its epochs, and the seeds.
      seeds: seeds of its trainings that no earlier run in the list has too.
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
        # Trainings of a run have seeds `train.seed`, `train.seed` + 1, ... A diverged one has no score.
        row, key = self.run.rows[-1], f"test_{weights}/accuracy"
        if not self.run.finished or key not in row:
            return {}
        scores = enumerate(per_seed(row[key]).tolist(), start=_first_seed(self.run))
        return {seed: score for seed, score in scores if seed in self.seeds and np.isfinite(score)}


def entries(runs: Sequence[Run]) -> list[Entry]:
    """Return what the studies need of each run; runs whose seeds are all in earlier runs are left out."""
    # A training that is in two runs would count twice in a mean or a test.
    taken: dict[tuple[Setting, str], set[int]] = {}
    kept = []
    for run, label in zip(runs, _labels(runs), strict=True):
        setting, first = setting_of(run), _first_seed(run)
        earlier = taken.setdefault((setting, label), set())
        seeds = tuple(sorted({*range(first, first + run.seeds)} - earlier))
        earlier |= {*seeds}
        if seeds:
            kept.append(Entry(run, run.setting("method.name"), label, setting, seeds))
    return kept


def setting_of(run: Run) -> Setting:
    """Return what must agree for methods to be compared."""
    kept = {
        name: value
        for name, value in run.experiment.items()
        if not name.startswith("method.") and name not in (*_OWN, *_SEEDS)
    }
    # "single" is one cosine over all epochs, and "restart" is the same where there is one generation: a
    # baseline may be trained either way.
    schedule = run.experiment["optimizer.schedule"]
    kept |= {EPOCHS: run.epochs, "optimizer.schedule": schedule.replace("single", "restart")}
    return frozenset(kept.items())


def without(setting: Setting, *names: str) -> Setting:
    """Return the setting without some of its fields."""
    return frozenset(item for item in setting if item[0] not in names)


def describe(settings: Sequence[Setting]) -> dict[Setting, str]:
    """Return a name for each setting: model and data set, then what tells it from the others.

    >>> plain = frozenset({("model.name", "scnn"), ("data.name", "digits"), ("data.flip", True)})
    >>> describe([plain])[plain]
    'scnn on digits'
    """
    names = sorted({*differing(list(map(dict, settings)))} - {"model.name", "data.name"})
    return {
        setting: subject(setting) + "".join(f", {name} {show(values.get(name))}" for name in names)
        for setting in settings
        for values in [dict(setting)]
    }


def subject(setting: Setting) -> str:
    """Return the model and the data set."""
    values = dict(setting)
    return f"{values['model.name']} on {values['data.name']}"


def by_setting(entries: Sequence[Entry], weights: str) -> Scores:
    """Return test accuracy by setting, method and seed; runs without any are left out."""
    table: Scores = {}
    for entry in entries:
        scores = entry.scores(weights)
        if scores:
            table.setdefault(entry.setting, {}).setdefault(entry.method, {}).update(scores)
    return table


def means(table: Scores, methods: Sequence[str]) -> dict[Setting, list[float]]:
    """Return each method's accuracy, a mean over the seeds that all of them have, by setting.

    Settings that lack a method, or a common seed, are left out.
    """
    # Over common seeds only: a seed stands for the same initial weights and order of the data in every
    # method, so part of its noise cancels in a comparison.
    averages = {}
    for setting, scores in table.items():
        common = set.intersection(*(set(scores.get(method, ())) for method in methods))
        if common:
            averages[setting] = [
                float(np.mean([scores[method][seed] for seed in sorted(common)]))
                for method in methods
            ]
    return averages


def styles(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Return the style of each method, which is that of its first run in the other plots."""
    # Reversed: the first run of a method is written last.
    return {entry.method: plots.style(entry.run.index) for entry in reversed(entries)}


def methods_of(entries: Sequence[Entry]) -> list[str]:
    """Return the methods, the baselines first, otherwise in the order of the runs."""
    ordered = sorted(entries, key=lambda entry: entry.name != BASELINE)
    return list(dict.fromkeys(entry.method for entry in ordered))


def available(entries: Sequence[Entry]) -> list[str]:
    """Return the kinds of weights that have scores, "last" first."""
    return [weights for weights in WEIGHTS if any(entry.scores(weights) for entry in entries)]


def _first_seed(run: Run) -> int:
    return int(run.experiment["train.seed"])


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return the name of each run's method, with options if a setting has the method more than once."""
    options = [
        {
            name: value
            for name, value in run.experiment.items()
            if name in _OWN or (name.startswith("method.") and name != "method.name")
        }
        for run in runs
    ]
    groups: dict[tuple[Setting, str], list[dict[str, Any]]] = {}
    for run, values in zip(runs, options, strict=True):
        groups.setdefault((setting_of(run), run.setting("method.name")), []).append(values)
    # The options in which a method's runs differ within some setting. Options that differ only between
    # settings, such as those tuned for each data set, would split a method that should be compared as one.
    telling: dict[str, dict[str, None]] = {}  # by method, in their order
    for (_, name), members in groups.items():
        telling.setdefault(name, {}).update(dict.fromkeys(differing(members)))
    labels = []
    for run, values in zip(runs, options, strict=True):
        name = run.setting("method.name")
        parts = [
            f"{field.rpartition('.')[2]}={show(values.get(field, ABSENT))}"
            for field in telling[name]
        ]
        labels.append(f"{name} ({', '.join(parts)})" if parts else name)
    return labels
