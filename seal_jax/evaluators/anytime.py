"""Anytime deployment performance and forgetting of adaptations: FAST paper, Figures 3 to 15."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seal_jax.errors import UsageError, check_number, nearest
from seal_jax.evaluation import anytime as library
from seal_jax.evaluators.adaptation_systems import SYSTEMS, Rates, settings_of, system_of
from seal_jax.evaluators.anytime_report import draw, size, table
from seal_jax.evaluators.evaluator import Evaluator, Record, WorkItem

if TYPE_CHECKING:
    from seal_jax.evaluators.adaptation import Replay, Trace
    from seal_jax.evaluators.loaded_run import LoadedRun, Network

DEFAULT_STEPS = 610


@dataclasses.dataclass(frozen=True)
class Options:
    """How far a training is gone through; and what a run that is no adaptation is adapted to.

    The others go with a run that does not start from another (``train.pretrained`` is empty): it is
    adapted by each system, which leaves nothing but the results in its folder.

    Attributes:
      max_steps: steps after which to stop; 0 for the whole of an adaptation's run, 610 otherwise.
      seeds: how many, the first ones; 0 for as many as there are. A run of one seed is adapted by as
        many as you like.
      dataset: data set to adapt to; none for the run's own, under a new classifier.
      systems: what to adapt by, of FAST and its baselines.
      alpha: learning rate of the classifier, and of the features in the baselines; a tenth of it with
        Adam and RAdam.
      beta: learning rate of the features in FAST; none for a tenth of alpha.
      sigma: deviation of the classifier's weights in "gaussian" and "frozen_head".
      batch_size: images a step, as many of each class; 0 for one of each.
      image_size: side that images are resized to; 0 for that of the run's images.
      validation_fraction: held out of the training images, unless they are the run's own.
      test_fraction: share of its images that a data set without a test split is tested on, stratified
        by class.
      flip: random horizontal flip.
    """

    max_steps: int = 0
    seeds: int = 0
    dataset: str | None = None
    systems: tuple[str, ...] = (
        "fast",
        "kaiming_fan_in",
        "kaiming_fan_out",
        "xavier",
        "gaussian",
        "feature_extraction",
        "frozen_head",
        "warmup",
    )
    alpha: float = 0.01
    beta: float | None = None
    sigma: float = 0.01
    batch_size: int = 0
    image_size: int = 0
    validation_fraction: float = 0.05
    test_fraction: float = 0.2
    flip: bool = True

    def __post_init__(self):
        for field in ("max_steps", "seeds", "batch_size", "image_size"):
            flag = field.replace("_", "-")
            check_number(f"--{flag}", getattr(self, field), lambda v: v >= 0, "be 0 or more")
        for name in self.systems:
            if name not in SYSTEMS:
                raise UsageError(
                    f"--systems={name} must be of {', '.join(SYSTEMS)}{nearest(name, SYSTEMS)}"
                )
        if len(set(self.systems)) < len(self.systems):
            raise UsageError(f"--systems={','.join(self.systems)} names a system twice")
        for field in ("alpha", "sigma"):
            value = getattr(self, field)
            check_number(f"--{field}", value, lambda v: 0 < v < float("inf"), "be positive")
        if self.beta is not None:
            check_number("--beta", self.beta, lambda v: 0 < v < float("inf"), "be positive")
        for field in ("validation_fraction", "test_fraction"):
            flag = field.replace("_", "-")
            check_number(f"--{flag}", getattr(self, field), lambda v: 0 < v < 1, "lie in (0, 1)")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """An adaptation with what its records begin with, one for each seed."""

    key: str
    replay: Replay
    identities: Sequence[dict[str, Any]]
    recorded: dict[int, list[float]] = dataclasses.field(default_factory=dict)


def units(loaded_run: LoadedRun, options: Options) -> Sequence[WorkItem]:
    """Return one unit a system and seed; the first of a system trains all of its seeds."""
    plans = _gone_through if loaded_run.settings.train.pretrained else _adapted
    found = []
    for plan in plans(loaded_run, options):
        trace: Callable[[], Trace] = functools.cache(plan.replay.run)
        for index, seed in enumerate(plan.replay.experiment.seeds):
            work = functools.partial(_record, plan, trace, index)
            found.append(WorkItem(f"{plan.key}/seed{seed}", work))
    return found


def _record(plan: _Plan, trace: Callable[[], Trace], index: int) -> dict[str, Any]:
    found = trace()
    deployed = library.deployed(found.checkpoints, found.validated, found.validation[index])
    arrays = {name: value for name, value in found._asdict().items() if name != "train_loss"}
    losses = [
        abs(values[index] - plan.recorded[step][index])
        for step, values in found.train_loss.items()
        if step in plan.recorded
    ]
    return {
        **plan.identities[index],
        **{
            name: None if value is None else np.asarray(value)[index].tolist()
            for name, value in arrays.items()
            if name not in ("checkpoints", "validated")
        },
        "checkpoints": list(found.checkpoints),
        "validated": list(found.validated),
        "deployed": np.asarray(found.validated)[deployed].tolist(),
        # How far the epochs' training losses are from those in the run's metrics.
        "deviation": float(max(losses)) if losses else None,
    }


def _gone_through(loaded_run: LoadedRun, options: Options) -> list[_Plan]:
    """Return the adaptation that the run itself was."""
    from seal_jax.evaluators import adaptation
    from seal_jax.training import experiment, metrics, pretrained

    settings = loaded_run.settings
    for field in dataclasses.fields(options):
        if field.name in ("max_steps", "seeds") or getattr(options, field.name) == field.default:
            continue
        raise UsageError(
            f"--{field.name.replace('_', '-')} goes with a run to adapt, and {loaded_run.run} is an "
            f"adaptation (train.pretrained = {settings.train.pretrained!r}), which is gone through "
            "as it was; leave it out, or give the run that it started from"
        )
    count = options.seeds or settings.train.seeds
    if count > settings.train.seeds:
        raise UsageError(
            f"--seeds={count} is more than the {settings.train.seeds} of {loaded_run.run}"
        )
    train = dataclasses.replace(settings.train, seeds=count)
    source = pretrained.read(settings, loaded_run.run)
    task = experiment.load_data(source.settings.data)
    replay = adaptation.Replay(
        dataclasses.replace(settings, train=train),
        loaded_run.dataset,
        source,
        task,
        options.max_steps,
    )
    network = loaded_run.networks[0]
    own = _identity(network, replay, system_of(settings), settings.train.pretrained_weights)
    identities = [{**own, "seed": int(seed)} for seed in replay.experiment.seeds]
    rows = metrics.read(loaded_run.run)
    recorded = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    return [_Plan(f"step{network.step}/replay", replay, identities, recorded)]


def _adapted(loaded_run: LoadedRun, options: Options) -> list[_Plan]:
    """Return an adaptation by each system, from each of the run's checkpoints and weights."""
    from seal_jax.evaluators import adaptation

    target = adaptation.target(
        loaded_run,
        options.dataset,
        options.image_size,
        options.validation_fraction,
        options.test_fraction,
    )
    groups: dict[tuple[int, str], list[Network]] = {}
    for network in loaded_run.networks:
        groups.setdefault((network.step, network.weights), []).append(network)
    rates = Rates(options.alpha, options.beta or options.alpha / 10, options.sigma)
    batch_size = options.batch_size or target.num_classes
    if batch_size % target.num_classes or batch_size > len(target.train):
        raise UsageError(
            f"--batch-size={batch_size} must be a multiple of the {target.num_classes} classes of "
            f"{target.name}, and no more than its {len(target.train)} training images"
        )
    plans: list[_Plan] = []
    for (step, weights), networks in groups.items():
        count = options.seeds or len(networks)
        if count > len(networks) > 1:
            raise UsageError(
                f"--seeds={count} is more than the {len(networks)} of {loaded_run.run}; give as many, or "
                "a run of one seed"
            )
        source = adaptation.source_of(loaded_run, networks)
        for name in options.systems:
            settings = settings_of(
                name,
                rates,
                loaded_run.settings,
                target,
                batch_size=batch_size,
                steps=options.max_steps or DEFAULT_STEPS,
                seeds=count,
                flip=options.flip,
            )
            like = plans[0].replay if plans else None
            replay = adaptation.Replay(
                settings,
                target,
                source,
                loaded_run.dataset,
                options.max_steps or DEFAULT_STEPS,
                like,
            )
            own = _identity(networks[0], replay, name, weights)
            identities = [{**own, "seed": int(seed)} for seed in replay.experiment.seeds]
            plans.append(_Plan(f"step{step}/{weights}/{name}", replay, identities))
    return plans


def _identity(network: Network, replay: Replay, system: str, weights: str) -> dict[str, Any]:
    """Return what a record begins with; ``weights`` are those of the source."""
    settings = replay.settings
    rate = settings.optimizer.learning_rate
    rates = {name: settings.method.get(name) for name in ("alpha", "beta")}
    return {
        **network.identity,
        "weights": weights,
        "system": system,
        "target": settings.data.name,
        **{name: rate if value is None else value for name, value in rates.items()},
    }


def combine(records: Sequence[Record]) -> Sequence[Record]:
    """Return one row a seed and checkpoint."""
    of_deployed = ("adp", "adp_top5", "adp_source", "adp_distance")
    series = (*of_deployed, "test", "test_top5", "source", "distance", "head_norm", "deployed")
    others = (*series, "checkpoints", "validated", "validation")
    return [
        {
            **{name: value for name, value in record.items() if name not in others},
            "tau": tau,
            **{name: record[name][index] if record.get(name) else None for name in series},
        }
        for record in records
        for index, tau in enumerate(record["checkpoints"])
    ]


KIND = Evaluator(
    name="anytime",
    summary="anytime deployment performance and forgetting of adaptations, step by step",
    source="FAST paper, section 6, Figures 3 to 15, Table 1",
    options=Options,
    units=units,
    table=table,
    draw=draw,
    rows=combine,
    size=size,
)
