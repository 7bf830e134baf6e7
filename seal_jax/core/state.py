"""The state of a training: one pytree, all of which a checkpoint holds."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Stream(enum.IntEnum):
    """The independent uses of a training's random key."""

    INIT = 0
    ORDER = 1
    AUGMENT = 2
    EVENT = 3
    START = 4
    STEP = 5
    EXTRA_ORDER = 6
    EXTRA_AUGMENT = 7


class Weights(NamedTuple):
    """What inference needs, each a collection of Flax variables.

    Attributes:
      params: the parameters.
      batch_stats: BatchNorm's running statistics.
      normalisers: what LW inserts after its blocks; empty for every other method.
    """

    params: PyTree
    batch_stats: PyTree
    normalisers: PyTree


class MetricSums(NamedTuple):
    """Sums over the epoch so far, float32.

    Attributes:
      loss: weighted losses.
      correct: weighted hits.
      weight: of the examples.
      measures: a method's own measures by name, summed over steps.
    """

    loss: jax.Array
    correct: jax.Array
    weight: jax.Array
    measures: dict[str, jax.Array]


class Best(NamedTuple):
    """The best weights of this generation by validation accuracy (-1 before the first)."""

    accuracy: jax.Array
    epoch: jax.Array
    weights: Weights


class EarlyStoppingState(NamedTuple):
    """How a generation goes by validation, where it may end early or slow down.

    Attributes:
      stopped: whether this training rests until the generation ends.
      rate_scale: factor on the learning rate.
      since: the epoch of the last change of ``rate_scale``.
    """

    stopped: jax.Array
    rate_scale: jax.Array
    since: jax.Array


class State(NamedTuple):
    """The state of one training; in a run every leaf has a leading axis of seeds.

    Attributes:
      step: optimizer steps so far, int32.
      seed: uint32; every random number of the training derives from it and ``step``.
      weights: parameters and BatchNorm statistics.
      opt_state: the optimizer's.
      method_state: what the method keeps beside: a teacher, counters, initial norms; ``()`` if nothing.
      metric_sums: training loss and accuracy of the running epoch.
      best: the best weights of this generation, or ``None`` without a validation split.
      early_stopping: early stopping and the plateaus of the learning rate; ``None`` where neither is on.
    """

    step: jax.Array
    seed: jax.Array
    weights: Weights
    opt_state: PyTree
    method_state: PyTree
    metric_sums: MetricSums
    best: Best | None
    early_stopping: EarlyStoppingState | None


def stream(state: State, which: Stream, index: Any) -> jax.Array:
    """Return the key of one use at one moment: a pure function of seed, use and index."""
    return stream_key(state.seed, which, index)


def stream_key(seed: jax.Array, which: Stream, index: Any) -> jax.Array:
    """Return the key for the ``index``-th draw of one use."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(which)), index)


def empty_metric_sums(measures: Sequence[str] = ()) -> MetricSums:
    """Return a metric_sums of nothing."""
    loss, correct, weight = (jnp.zeros((), jnp.float32) for _ in range(3))
    return MetricSums(
        loss, correct, weight, {name: jnp.zeros((), jnp.float32) for name in measures}
    )


def fresh_early_stopping(epoch: Any) -> EarlyStoppingState:
    """Return the course of a generation that starts with ``epoch``."""
    since = jnp.asarray(epoch, jnp.int32)
    return EarlyStoppingState(jnp.zeros((), bool), jnp.ones((), jnp.float32), since)


def empty_best(weights: Weights) -> Best:
    """Return a best that anything beats."""
    return Best(jnp.full((), -1.0, jnp.float32), jnp.zeros((), jnp.int32), weights)
