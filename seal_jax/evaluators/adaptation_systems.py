"""FAST and the baselines it is compared with, as settings of an adaptation."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings

if TYPE_CHECKING:
    from seal_jax import data

ADAPTIVE = ("adam", "radam")
# Steps between the validations that end the classifier's warm-up, where they divide an epoch.
WARMUP_EVERY = 5


class System(NamedTuple):
    """A way to adapt, by the names of ``configs/fast_cifar100.py``.

    Attributes:
      head: how the new classifier starts.
      alpha: whether it learns.
      beta: whether the features learn.
      warmup: whether it learns alone at first.
      optimizer: "sgd", "nesterov", "adam" or "radam".
    """

    head: str = "zero"
    alpha: bool = True
    beta: bool = True
    warmup: bool = False
    optimizer: str = "sgd"


SYSTEMS = {
    "fast": System(),
    "fast_nesterov": System(optimizer="nesterov"),
    "fast_adam": System(optimizer="adam"),
    "fast_radam": System(optimizer="radam"),
    "kaiming_fan_in": System("kaiming_fan_in"),
    "kaiming_fan_out": System("kaiming_fan_out"),
    "xavier": System("xavier"),
    "gaussian": System("normal"),
    "feature_extraction": System(beta=False),
    "frozen_head": System("normal", alpha=False),
    "warmup": System("kaiming_fan_in", warmup=True),
}


class Rates(NamedTuple):
    """Learning rate of the classifier and of FAST's features, and the deviation of a normal head."""

    alpha: float
    beta: float
    sigma: float


def settings_of(
    name: str,
    rates: Rates,
    source: Settings,
    target: data.Dataset,
    *,
    batch_size: int,
    steps: int,
    seeds: int,
    flip: bool,
) -> Settings:
    """Return the settings by which a system adapts a run's network to other data.

    Constant rates, damped momentum 0.9, no decay, balanced batches (FAST paper, section 6.2.1).

    Args:
      name: of the system.
      rates: the baselines have alpha for everything; with Adam and RAdam all are a tenth.
      source: the run's settings.
      target: the data.
      batch_size: a multiple of the classes.
      steps: at least so many; whole epochs are made of them.
      seeds: how many.
      flip: whether images are mirrored.
    """
    from seal_jax import data, methods

    system = SYSTEMS[name]
    scale = 0.1 if system.optimizer in ADAPTIVE else 1.0
    alpha = scale * rates.alpha
    beta = scale * rates.beta if name.startswith("fast") else alpha
    method: dict[str, Any] = {"name": "fast", "head": system.head}
    method |= {"alpha": alpha if system.alpha else 0.0, "beta": beta if system.beta else 0.0}
    if system.head == "normal":
        method["sigma"] = rates.sigma
    if system.warmup:
        method["warmup"] = True
    per_epoch = data.steps_per_epoch(len(target.train), batch_size, True)
    settings = Settings(
        data=settings_lib.Data(
            name=target.name,
            data_dir=source.data.data_dir,
            flip=flip,
            normalisation=_normalisation(target, source),
        ),
        model=source.model,
        method=method,
        optimizer=settings_lib.Optimizer(
            name=system.optimizer if system.optimizer in ADAPTIVE else "sgd",  # type: ignore[arg-type]
            nesterov=system.optimizer == "nesterov",
            learning_rate=alpha,
            schedule="constant",
            weight_decay=0.0,
            label_smoothing=0.0,
        ),
        train=dataclasses.replace(
            settings_lib.Train(),
            generations=1,
            epochs_per_generation=math.ceil(steps / per_epoch),
            batch_size=batch_size,
            sampling="balanced",
            validate_every=math.gcd(per_epoch, WARMUP_EVERY) if system.warmup else 0,
            seed=source.train.seed,
            seeds=seeds,
            dtype=source.train.dtype,
        ),
        run=settings_lib.Run(eval_batch_size=source.run.eval_batch_size),
    )
    return methods.complete(settings)


def _normalisation(target: data.Dataset, source: Settings) -> str:
    """Return whose statistics: the target's own if there are any, else those of the source."""
    from seal_jax import data

    own = data.STATISTICS.get(target.name)
    if own is not None and len(own.mean) == target.image_shape[-1]:
        return target.name
    fields = source.data
    return fields.normalisation or (fields.name if fields.name in data.STATISTICS else "imagenet")


def system_of(settings: Settings) -> str:
    """Return the name of the system that a run adapted by, or that of its method.

    >>> system_of(Settings(method={"name": "fast", "beta": 0.0}))
    'feature_extraction'
    >>> system_of(Settings(method={"name": "fast", "head": "xavier"}))
    'xavier'
    """
    from seal_jax import methods

    if settings.method["name"] != "fast":
        return str(settings.method["name"])
    options = {**dataclasses.asdict(methods.options("fast")), **settings.method}
    optimizer = settings.optimizer
    kind = "nesterov" if optimizer.name == "sgd" and optimizer.nesterov else optimizer.name
    head = "zero" if options["head"] == "tiny" else options["head"]
    learns = {name: options[name] != 0 for name in ("alpha", "beta")}
    own = System(head, **learns, warmup=options["warmup"], optimizer=kind)
    for name, system in SYSTEMS.items():
        if system == own:
            return name
    return " ".join([head, *(["warmup"] if own.warmup else []), kind])
