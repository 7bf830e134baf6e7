"""The design of a study, and the variants of its config: every system is tuned alike, then trained with fresh seeds.

A config file of ``configs/studies/`` declares a :class:`Study`; its ``VARIANTS`` and ``get_config`` are those of the
study. ``python -m seal_jax sweep`` trains them: first the tuning of each system in each condition, quasi-random
points by ``train.vary``, then the system with its best point by validation accuracy (``train.tuned_on``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict
from scipy.stats import qmc

from seal_jax.cli.configs import base, set_fields
from seal_jax.core.settings import differences

# Seeds of the tuning, where few of many points that were screened with one seed are left, and where none were screened.
FINAL_SEEDS, ONLY_SEEDS = 8, 2
# Far from the seeds that are reported: no training that was tuned on is, but networks that tunings start from may be.
FIRST_TUNING_SEED = 1000
_SOURCE, _SCREEN, _TUNING = "source-", "screen-", "tuning-"


@dataclasses.dataclass(frozen=True)
class System:
    """A way to train.

    Attributes:
      name: what tables call it.
      method: ``method.name``.
      fields: settings that set it apart; without a dot options of the method.
      space: the range of each tuned setting, in which points are drawn evenly on a logarithmic scale.
      weights: which are scored, the "last", the "best" by validation, or the average of the weights, "ema".
      continues: key of the system, before this one, from whose final run in the same setting and condition it starts;
        its tuning starts from the first seeds of that run.
    """

    name: str
    method: str = "normal"
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    space: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    weights: Literal["last", "best", "ema"] = "last"
    continues: str = ""


def full(field: str) -> str:
    """Return the full name of a setting, which without a dot is an option of the method."""
    return field if "." in field else f"method.{field}"


def spread(count: int, space: Mapping[str, tuple[float, float]]) -> list[dict[str, float]]:
    """Return so many points spread evenly over the ranges of a space, by full names.

    The first settings of two spaces have the same values where their ranges agree.

    >>> spread(2, {"optimizer.learning_rate": (0.01, 1.0)})
    [{'optimizer.learning_rate': 0.1}, {'optimizer.learning_rate': 0.0316}]
    """
    # Not scrambled, so that it is the same everywhere; the first one is 0 in all dimensions.
    drawn = qmc.Halton(len(space), scramble=False).random(count + 1)[1:]
    return [
        {
            full(field): float(f"{low * (high / low) ** share:.3g}")
            for share, (field, (low, high)) in zip(shares, space.items(), strict=True)
        }
        for shares in drawn
    ]


ACCURACY = "accuracy"
OURS = "ours"  # the source of a claim that nobody else makes: a question


class Measure(NamedTuple):
    """A number of every network besides its accuracy.

    Attributes:
      name: what tables call it.
      field: of a row, "largest/0" for the first entry of a list and "smallest/mean" for its mean.
      kind: of the evaluation whose rows these are; empty for metrics.jsonl.
      options: of the evaluation.
      where: fields that choose among the evaluation's rows of a network, or the epoch of metrics.jsonl, the last one
        by default.
      lower: whether less of it is better.
      scale: factor on it.
    """

    name: str
    field: str
    kind: str = ""
    options: Mapping[str, Any] = MappingProxyType({})
    where: Mapping[str, Any] = MappingProxyType({})
    lower: bool = False
    scale: float = 1.0


class Claim(NamedTuple):
    """That one system is better than another, by its accuracy or another measure.

    Attributes:
      text: what is claimed.
      source: who claims it.
      better, worse: keys of systems.
      measure: a key.
      worse_measure: where that of the worse is another one.
      conditions: keys, where they are compared; empty for all.
      said_of: the conditions that the source speaks of; empty for all.
      elsewhere: who claims it, or asks, of the others.
    """

    text: str
    source: str
    better: str
    worse: str
    measure: str = ACCURACY
    worse_measure: str = ""
    conditions: Sequence[str] = ()
    said_of: Sequence[str] = ()
    elsewhere: str = OURS

    def source_of(self, condition: str) -> str:
        """Return who claims it of a condition.

        >>> Claim("A beats B", "its paper", "a", "b", said_of=["clean"]).source_of("noise")
        'ours'
        """
        return self.source if condition in (self.said_of or [condition]) else self.elsewhere


class Cell(NamedTuple):
    """What one final variant trains: keys of setting, system and condition."""

    setting: str
    system: str
    condition: str


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared with what, where.

    Attributes:
      title: of its section.
      question: and what was looked at before the settings were fixed.
      fields: settings that all variants share.
      settings: networks and data, by a key: their fields.
      conditions: by a key: their fields.
      names: what tables call settings and conditions, by their keys.
      systems: by a key; a setting may have some of them only.
      some: for settings, the keys of their systems and of their conditions where they have not all.
      ranges: for settings, the ranges of tuned fields that are not those of the systems.
      adapt: sets what systems take from the settings of a variant, all of which it is given.
      claims: the comparisons, over all of which Holm's correction goes.
      points: that each system is tuned on.
      finalists: how many of the points, the best with one seed, are tuned on more seeds; 0 for all.
      seeds: of the trainings that are compared.
      measures: by a key, besides the accuracy; those of one evaluation have the same options.
      sources: networks that are trained plainly before all others, by a key: all of their fields, as ``fields`` are of
        the others alone. A setting starts from one by ``train.pretrained`` = "../source-KEY", seed from seed.
      chance: accuracy in % of a network that has learnt nothing, where it is not that of ten classes.
    """

    title: str
    question: str
    fields: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, Any]]
    conditions: Mapping[str, Mapping[str, Any]]
    names: Mapping[str, str]
    systems: Mapping[str, System]
    claims: Sequence[Claim]
    points: int = 32
    finalists: int = 4
    seeds: int = 20
    adapt: Callable[[ConfigDict], None] = lambda config: None
    some: Mapping[str, tuple[Sequence[str], Sequence[str]]] = dataclasses.field(
        default_factory=dict
    )
    ranges: Mapping[str, Mapping[str, tuple[float, float]]] = dataclasses.field(
        default_factory=dict
    )
    chance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    measures: Mapping[str, Measure] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that there is what is named, that systems follow those they start from, and evaluations' options."""
        keys = [*self.systems]
        for key, system in self.systems.items():
            if system.continues and system.continues not in keys[: keys.index(key)]:
                raise ValueError(
                    f"{self.title}: {key} starts from {system.continues}: declare that before it"
                )
        named = itertools.chain.from_iterable(
            (setting, *systems, *conditions) for setting, (systems, conditions) in self.some.items()
        )
        of_claims = ((claim.better, claim.worse) for claim in self.claims)
        known = {*self.settings, *self.systems, *self.conditions}
        for key in (*named, *self.ranges, *itertools.chain.from_iterable(of_claims)):
            if key not in known:
                raise ValueError(f"{self.title}: {key} is no setting, system or condition of it")
        tuned = {field for system in self.systems.values() for field in system.space}
        for field in itertools.chain.from_iterable(self.ranges.values()):
            if field not in tuned:
                raise ValueError(f"{self.title}: ranges name {field}, which no system is tuned in")
        self.evaluations()

    def evaluations(self) -> dict[str, Mapping[str, Any]]:
        """Return the options of the evaluations that the measures need, by their kind."""
        kinds: dict[str, Mapping[str, Any]] = {}
        for measure in self.measures.values():
            # One evaluation of a kind is kept for each run.
            if measure.kind and kinds.setdefault(measure.kind, measure.options) != measure.options:
                raise ValueError(
                    f"{self.title}: measures of {measure.kind} differ in its options: give all the same"
                )
        return kinds

    def cells(self) -> Iterator[Cell]:
        """Yield what is trained and reported."""
        for setting in self.settings:
            systems, conditions = self.some.get(setting, (self.systems, self.conditions))
            yield from itertools.starmap(Cell, itertools.product([setting], systems, conditions))

    def space(self, setting: str, system: str) -> dict[str, tuple[float, float]]:
        """Return the range of each field that a system is tuned in, in a setting."""
        ranges = self.ranges.get(setting, {})
        return {
            field: ranges.get(field, default)
            for field, default in self.systems[system].space.items()
        }

    def comparisons(self) -> list[tuple[Claim, str, str]]:
        """Return what is compared where: claim, setting and condition, of which both systems are trained."""
        cells = {*self.cells()}
        return [
            (claim, setting, condition)
            for claim, setting in itertools.product(self.claims, self.settings)
            for condition in claim.conditions or self.conditions
            if {Cell(setting, key, condition) for key in (claim.better, claim.worse)} <= cells
        ]

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the variants: sources, then of each system the tunings in all conditions and its trainings."""
        names: dict[tuple[str, str], list[str]] = {}
        for cell in self.cells():
            names.setdefault(cell[:2], []).append("-".join(cell))
        # In this order a sweep can train those of a system as one.
        return (
            *(f"{_SOURCE}{key}" for key in self.sources),
            *(
                stage + name
                for group in names.values()
                for stage in (*[_SCREEN] * bool(self.finalists), _TUNING, "")
                for name in group
            ),
        )

    def is_percentage(self, measure: str) -> bool:
        """Return whether a measure, by its key, is in %, so that its differences are points."""
        return measure == ACCURACY or self.measures[measure].scale == 100

    def fingerprint(self, cell: Cell) -> str:
        """Return what changes with every setting that leads to a cell, of its tuning and of evaluations too.

        Where data is makes no difference.

        Defaults are not in it: a new setting makes no cell another one.
        """
        default = base().to_dict()
        variants = ["-".join(cell)]
        lines = [f"{kind}: {dict(options)}" for kind, options in self.evaluations().items()]
        while variants:
            config = self.config(variants.pop())
            config.data.data_dir = default["data"]["data_dir"]
            lines += differences(default, config.to_dict())
            starts = (config.train.tuned_on, config.train.pretrained)
            variants += [name.removeprefix("../") for name in starts if name.startswith("../")]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]

    def config(self, variant: str) -> ConfigDict:
        """Return the settings of a variant."""
        if variant.startswith(_SOURCE):
            config = base("normal")
            config.train.seeds = self.seeds
            set_fields(config, self.sources[variant.removeprefix(_SOURCE)])
        else:
            config = self._config_of_cell(variant)
        # One at the end: a study is many short trainings.
        config.run.checkpoint_every_epochs = (
            config.train.generations * config.train.epochs_per_generation
        )
        config.run.keep_checkpoints = 1
        # It has the accuracy of chance, and the others are not lost.
        config.run.keep_diverged = True
        config.run.loggers = ""
        return config

    def _config_of_cell(self, variant: str) -> ConfigDict:
        *stages, setting, key, condition = variant.split("-")
        stage = f"{stages[0]}-" if stages else ""
        name = "-".join(Cell(setting, key, condition))
        system = self.systems[key]
        config = base(system.method)
        config.train.seeds = self.seeds
        for fields in (
            self.fields,
            self.settings[setting],
            self.conditions[condition],
            system.fields,
        ):
            set_fields(config, fields)
        self.adapt(config)
        if system.continues:
            config.train.pretrained = f"../{'-'.join(Cell(setting, system.continues, condition))}"
        train = config.train
        if stage:
            train.seed = FIRST_TUNING_SEED
            train.seeds = 1 if stage == _SCREEN else ONLY_SEEDS
        if stage == _TUNING and self.finalists:
            train.seed, train.seeds = FIRST_TUNING_SEED + 1, FINAL_SEEDS
            train.tuned_on, train.tuned_points = f"../{_SCREEN}{name}", self.finalists
        elif stage:
            train.vary = json.dumps(spread(self.points, self.space(setting, key)))
        else:
            train.tuned_on = f"../{_TUNING}{name}"
        if train.tuned_on:
            train.tuned_weights = system.weights
        return config
