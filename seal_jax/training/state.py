"""The state of a training: one pytree, all of which a checkpoint holds."""

from __future__ import annotations

import enum
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


class Weights(NamedTuple):
    """What inference needs: parameters and BatchNorm statistics."""

    params: PyTree
    batch_stats: PyTree


class Tally(NamedTuple):
    """Sums over the epoch so far, float32: ``loss`` and ``correct`` weighted, and the ``weight``."""

    loss: jax.Array
    correct: jax.Array
    weight: jax.Array


class Best(NamedTuple):
    """The best weights of this generation by validation accuracy (-1 before the first)."""

    accuracy: jax.Array
    epoch: jax.Array
    weights: Weights


class State(NamedTuple):
    """The state of one training; in a run every leaf has a leading axis of seeds.

    Attributes:
      step: optimizer steps so far, int32.
      seed: uint32; every random number of the training derives from it and ``step``.
      weights: parameters and BatchNorm statistics.
      opt_state: the optimizer's.
      tally: training loss and accuracy of the running epoch.
      best: the best weights of this generation, or ``None`` without a validation split.
    """

    step: jax.Array
    seed: jax.Array
    weights: Weights
    opt_state: PyTree
    tally: Tally
    best: Best | None


def stream(state: State, which: Stream, index: Any) -> jax.Array:
    """Return the key of one use at one moment: a pure function of seed, use and index."""
    return stream_key(state.seed, which, index)


def stream_key(seed: jax.Array, which: Stream, index: Any) -> jax.Array:
    """Return the key for the ``index``-th draw of one use."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(which)), index)


def empty_tally() -> Tally:
    """Return a tally of nothing."""
    return Tally(*(jnp.zeros((), jnp.float32) for _ in Tally._fields))


def empty_best(weights: Weights) -> Best:
    """Return a best that anything beats."""
    return Best(jnp.full((), -1.0, jnp.float32), jnp.zeros((), jnp.int32), weights)
