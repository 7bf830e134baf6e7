"""The state of a training: one pytree, all of which a checkpoint holds, and its random streams."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Stream(enum.Enum):
    """The independent uses of a training's random key: the numbers that are folded into it.

    The first number comes before the index (an epoch, a step or a generation), a second one after
    it: the uses within a step share the step's key up to there.
    """

    # All results depend on these numbers: a new use takes a new one, none is ever changed.
    INIT = (0,)
    ORDER = (1,)
    AUGMENT = (2,)
    EVENT = (3,)
    START = (4,)
    STEP = (5,)
    DROPOUT = (5, 0)
    GRADIENT = (5, 1)
    UPDATE = (5, 2)
    EXTRA_DROPOUT = (5, 3)
    EXTRA_ORDER = (6,)
    EXTRA_AUGMENT = (7,)
    WARM = (8,)
    MIX = (9,)
    PLASTICITY = (10,)

    def within(self, key: jax.Array) -> jax.Array:
        """Return the key of this use from that of its step, ``stream_key(seed, STEP, step)``."""
        for number in self.value[1:]:
            key = jax.random.fold_in(key, number)
        return key


def stream_key(seed: jax.Array, stream: Stream, index: Any) -> jax.Array:
    """Return the key of one use at one index: a pure function of seed, use and index.

    >>> step = stream_key(0, Stream.STEP, 7)
    >>> bool(stream_key(0, Stream.UPDATE, 7) == Stream.UPDATE.within(step))
    True
    """
    # Nothing is split and carried, so a run resumed at any step has the same keys.
    key = jax.random.fold_in(jax.random.key(seed), stream.value[0])
    return stream.within(jax.random.fold_in(key, index))


class Weights(NamedTuple):
    """What inference needs, each a collection of Flax variables."""

    params: PyTree
    batch_stats: PyTree
    normalisers: PyTree  # what LW inserts after its blocks; empty for every other method


class NoiseSums(NamedTuple):
    """Sums over images, float32, where some are trained on under another label than their own."""

    clean_correct: jax.Array  # predicted as their own label says
    wrong: jax.Array  # images under another label,
    memorised: jax.Array  # those of them that are predicted as that says,
    corrected: jax.Array  # and those that are predicted as their own says


class MetricSums(NamedTuple):
    """Sums over a split, or over the epoch so far, float32: of weighted losses, hits and weights."""

    loss: jax.Array
    correct: jax.Array
    weight: jax.Array
    measures: dict[str, jax.Array]  # a method's own by name, summed over steps
    noise: NoiseSums | None = None  # None where every image has its own label

    @classmethod
    def zero(cls, measures: Sequence[str] = (), *, noisy: bool = False) -> MetricSums:
        """Return the sums over nothing."""
        loss, correct, weight, *noise = (jnp.zeros((), jnp.float32) for _ in range(7))
        by_name = {name: jnp.zeros((), jnp.float32) for name in measures}
        return cls(loss, correct, weight, by_name, NoiseSums(*noise) if noisy else None)


class Best(NamedTuple):
    """The best weights of this generation by validation accuracy (-1 before the first)."""

    accuracy: jax.Array
    epoch: jax.Array
    weights: Weights

    @classmethod
    def none(cls, weights: Weights) -> Best:
        """Return a best that any accuracy exceeds, with ``weights`` in its place."""
        return cls(jnp.full((), -1.0, jnp.float32), jnp.zeros((), jnp.int32), weights)


class EarlyStoppingState(NamedTuple):
    """Whether a training has stopped for this generation, and how far its learning rate has fallen."""

    stopped: jax.Array  # frozen until the generation ends
    rate_scale: jax.Array  # factor on the learning rate
    since: jax.Array  # the epoch of the last change of rate_scale, or of the generation's start


class Varied(NamedTuple):
    """What sets a training apart from the others of its run, besides the seed."""

    values: dict[str, jax.Array] = {}  # noqa: RUF012 - of settings by their full names: ``train.vary``
    # Which draw of the training data is its own; None where there is one.
    draw: jax.Array | None = None


class State(NamedTuple):
    """The state of one training; in a run every leaf has a leading axis of seeds."""

    step: jax.Array  # optimizer steps so far, int32
    seed: jax.Array  # uint32; every random number of the training derives from it and the step
    weights: Weights
    opt_state: PyTree
    method_state: PyTree  # what the method keeps: a teacher, counters, initial norms; () if nothing
    metric_sums: MetricSums  # of the running epoch
    best: Best | None  # of this generation; None without a validation split
    early_stopping: EarlyStoppingState | None  # None if neither it nor plateaus are on
    ema: Weights | None = None  # the average of the weights; None if it is off
    varied: Varied = Varied()


# What three fields of the state were called in checkpoints of earlier versions.
EARLIER_FIELDS = ("memory", "tally", "course")
